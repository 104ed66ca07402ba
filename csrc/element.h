// Scalar element types of a tile and their conversions. Everything is in an unnamed namespace: these headers are compiled
// once for each instruction set, and the linker must never merge an AVX-512 copy into code that older CPUs run.
#pragma once

#include <cstdint>
#include <cstring>

namespace robust_dpo {
namespace {

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

inline float to_float(float x) { return x; }

inline float to_float(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

inline float to_float(Float16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
    const uint32_t magnitude = x.bits & 0x7fff;
    // Moved to the fp32 position the exponent is biased by 15 where 127 is due: one multiplication by 2^112 repairs normal
    // and subnormal numbers alike; infinities and NaN (exponent 31) get the all-ones exponent.
    if (magnitude >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f));
}

inline void from_float(float x, float& out) { out = x; }

// Round to nearest even; a NaN keeps its sign and upper payload and becomes quiet.
inline void from_float(float x, BFloat16& out) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    out.bits = static_cast<uint16_t>((is_nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void from_float(float x, Float16& out) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t sign = bits >> 16 & 0x8000;
    const uint32_t magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) {
        half = 0x7e00 | (magnitude >> 13 & 0x3ff);
    } else if (magnitude >= 0x477ff000) {  // 65520, the first value that rounds to infinity
        half = 0x7c00;
    } else if (magnitude < 0x38800000) {  // below 2^-14 halves are multiples of 2^-24: let the fp32 adder round to them
        half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
    } else {
        half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    }
    out.bits = static_cast<uint16_t>(sign | half);
}

}  // namespace
}  // namespace robust_dpo
