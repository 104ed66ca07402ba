// What device code says in the chip's own words: approximate 2^x, 16-byte vectors of logits, warps, clusters.
//
// tests/cuda_emulation.h offers the same functions on the host, where the kernels run as they are, thread by thread.
#pragma once

#include <cstdint>

#include "cuda_launch.h"
#include "element.h"

namespace robust_dpo {
namespace {

constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;  // the widest load of a thread before sm_100

struct alignas(16) Vector16 {
    uint32_t words[4];
};

#if !defined(ROBUST_DPO_EMULATED)

// Two ulp, and 0 for what would be subnormal. Sums of exponentials average the error, single ones are rounded to the tile's dtype.
__device__ __forceinline__ float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ uint32_t pack_fp16(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ float fp16_to_float(uint32_t half) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<unsigned short>(half)));
    return x;
}

__device__ __forceinline__ float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t float_to_bits(float x) { return __float_as_uint(x); }

// The dynamic shared memory of the block, aligned to 16 bytes.
__device__ __forceinline__ unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char bytes[];
    return bytes;
}

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

// The value of the warp's first lane.
template <class T>
__device__ __forceinline__ T shuffle_first(T value) {
    return __shfl_sync(0xffffffffu, value, 0);
}

// Blocks that see each other's shared memory exist from sm_90 on; elsewhere a cluster is one block. The barrier is not the
// `.aligned` one: threads of a warp may come out of their loops apart.

// Announces that this block has written (release); `cluster_wait` returns when all have (acquire).
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// Where `mine`, in shared memory, lies in the block of that rank.
template <class T>
__device__ __forceinline__ const T* cluster_peer(const T* mine, int rank) {
#if __CUDA_ARCH__ >= 900
    uint64_t peer;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(peer) : "l"(reinterpret_cast<uint64_t>(mine)), "r"(rank));
    return reinterpret_cast<const T*>(peer);
#else
    return mine;
#endif
}

#endif

__device__ __forceinline__ float fast_exp(float x) { return fast_exp2(x * 1.4426950408889634f); }

// How logits of a dtype lie in a vector.
template <class Tile>
struct Elements;

template <>
struct Elements<float> {
    static constexpr int kCount = 4;
    static __device__ __forceinline__ void unpack(const Vector16& v, float (&x)[kCount]) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) x[k] = bits_to_float(v.words[k]);
    }
    static __device__ __forceinline__ float load(const float* p) { return *p; }
    static __device__ __forceinline__ void store(float* p, float x) { *p = x; }
};

template <>
struct Elements<BFloat16> {
    static constexpr int kCount = 8;
    static __device__ __forceinline__ void unpack(const Vector16& v, float (&x)[kCount]) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            x[2 * k] = bits_to_float(v.words[k] << 16);
            x[2 * k + 1] = bits_to_float(v.words[k] & 0xffff0000u);
        }
    }
    static __device__ __forceinline__ uint32_t pack(float low, float high) { return pack_bf16(low, high); }
    static __device__ __forceinline__ float load(const BFloat16* p) {
        return bits_to_float(static_cast<uint32_t>(p->bits) << 16);
    }
    static __device__ __forceinline__ void store(BFloat16* p, float x) {
        p->bits = static_cast<uint16_t>(pack_bf16(x, 0.0f));
    }
};

template <>
struct Elements<Float16> {
    static constexpr int kCount = 8;
    static __device__ __forceinline__ void unpack(const Vector16& v, float (&x)[kCount]) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            x[2 * k] = fp16_to_float(v.words[k] & 0xffffu);
            x[2 * k + 1] = fp16_to_float(v.words[k] >> 16);
        }
    }
    static __device__ __forceinline__ uint32_t pack(float low, float high) { return pack_fp16(low, high); }
    static __device__ __forceinline__ float load(const Float16* p) { return fp16_to_float(p->bits); }
    static __device__ __forceinline__ void store(Float16* p, float x) {
        p->bits = static_cast<uint16_t>(pack_fp16(x, 0.0f));
    }
};

template <class Out>
__device__ __forceinline__ void store_element(Out* p, float x) {
    Elements<Out>::store(p, x);
}

struct alignas(8) Vector8 {
    uint32_t words[2];
};

// kCount consecutive gradients to an address that is a multiple of their size (16 where they are more).
template <class Out, int kCount>
__device__ __forceinline__ void store_vector(Out* p, const float (&x)[kCount]) {
    using E = Elements<Out>;
    if constexpr (sizeof(Out) == sizeof(float)) {
#pragma unroll
        for (int k = 0; k < kCount; k += 4)
            *reinterpret_cast<Vector16*>(p + k) = {
                {float_to_bits(x[k]), float_to_bits(x[k + 1]), float_to_bits(x[k + 2]), float_to_bits(x[k + 3])}};
    } else if constexpr (kCount == 8) {
        *reinterpret_cast<Vector16*>(p) = {
            {E::pack(x[0], x[1]), E::pack(x[2], x[3]), E::pack(x[4], x[5]), E::pack(x[6], x[7])}};
    } else {
        *reinterpret_cast<Vector8*>(p) = {{E::pack(x[0], x[1]), E::pack(x[2], x[3])}};
    }
}

}  // namespace
}  // namespace robust_dpo
