// Launching kernels: the device of the call, the shape of the grid, and errors that say what was launched.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#if !defined(ROBUST_DPO_EMULATED)
#include <cuda_runtime.h>
// Where the pointers of a call point to, as PyTorch calls it.
#define ROBUST_DPO_DEVICE_TYPE "cuda"
#endif

namespace robust_dpo {

// Where a call runs: the stream is one of the device's, as an address.
struct CudaTarget {
    int device;
    uintptr_t stream;
};

struct CudaGrid {
    int64_t blocks;
    int threads;
    int cluster;         // blocks that see each other's shared memory; above 1 on sm_90 and later only
    size_t shared_bytes;  // of a block, dynamic
};

// A block has this much dynamic shared memory without being asked.
constexpr size_t kSharedWithoutAsking = 48 * 1024;

#if !defined(ROBUST_DPO_EMULATED)

inline void check_cuda(cudaError_t status, const std::string& what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // the runtime would report it again with the next call
    throw std::runtime_error(what + ": " + cudaGetErrorName(status) + ", " + cudaGetErrorString(status));
}

// Why kernels cannot be launched, with the versions of driver and runtime; empty where they can. PyTorch's copy of the runtime
// may be older than the one that is linked here, and content with a driver that this one is not.
inline std::string cuda_problem() {
    int devices = 0;
    const cudaError_t found = cudaGetDeviceCount(&devices);
    if (found == cudaSuccess) return "";
    cudaGetLastError();  // as in check_cuda
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);  // 0 where there is none
    cudaRuntimeGetVersion(&runtime);
    const auto text = [](int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); };
    return std::string(cudaGetErrorName(found)) + ", " + cudaGetErrorString(found) + " (CUDA of the driver " + text(driver) +
           ", of the extension " + text(runtime) + ")";
}

// Makes a device current for a scope. PyTorch has its own copy of the runtime; both follow the context that is current in
// the driver, so the one that was found is put back.
class DeviceScope {
  public:
    explicit DeviceScope(int device) {
        check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
        changed_ = previous_ != device;
        if (changed_) check_cuda(cudaSetDevice(device), "cudaSetDevice(" + std::to_string(device) + ")");
    }
    ~DeviceScope() {
        if (changed_) cudaSetDevice(previous_);
    }
    DeviceScope(const DeviceScope&) = delete;
    DeviceScope& operator=(const DeviceScope&) = delete;

  private:
    int previous_ = 0;
    bool changed_ = false;
};

// `what` names the kernel and the shape for people. Never waits for the device.
template <class... Parameters, class... Arguments>
void launch(const CudaTarget& target, const CudaGrid& grid, const std::string& what, void (*kernel)(Parameters...),
            Arguments... arguments) {
    if (grid.shared_bytes > kSharedWithoutAsking)
        check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(grid.shared_bytes)),
                   what);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
    config.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config.dynamicSmemBytes = grid.shared_bytes;
    config.stream = reinterpret_cast<cudaStream_t>(target.stream);
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = grid.cluster > 1 ? 1 : 0;
    check_cuda(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), what);
    check_cuda(cudaGetLastError(), what);
}

#endif

}  // namespace robust_dpo

#if defined(ROBUST_DPO_EMULATED)
#include "cuda_emulation.h"  // the same for the host, see there
#endif
