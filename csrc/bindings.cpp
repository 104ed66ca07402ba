// Python bindings: addresses as integers, no logic beyond the choice of the instruction set. Checks are in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "epilogue_bindings.h"
#include "head_bindings.h"
#include "parallel.h"
#include "row_logprob.h"

#if defined(ROBUST_DPO_X86)
#include <cpuid.h>
#endif

namespace robust_dpo {
namespace {

using Rows = void (*)(const RowLogprobArgs&, int64_t, int64_t);

struct Isa {
    const char* name;
    Rows rows;
    bool usable;
};

#if defined(ROBUST_DPO_X86)
bool has_f16c() {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

// Worst first. __builtin_cpu_supports also asks whether the operating system saves the registers.
const std::vector<Isa>& isas() {
    static const std::vector<Isa> all = [] {
        std::vector<Isa> found{{"generic", row_logprob_generic, true}};
#if defined(ROBUST_DPO_X86)
        __builtin_cpu_init();
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
#if defined(ROBUST_DPO_AVX2)
        found.push_back({"avx2", row_logprob_avx2, avx2});
#endif
        [[maybe_unused]] const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(ROBUST_DPO_AVX512)
        found.push_back({"avx512", row_logprob_avx512, avx512});
#endif
#if defined(ROBUST_DPO_AVX512_BF16)
        found.push_back({"avx512_bf16", row_logprob_avx512_bf16, avx512 && __builtin_cpu_supports("avx512bf16")});
#endif
#endif
        return found;
    }();
    return all;
}

std::vector<std::string> usable_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : isas())
        if (isa.usable) names.emplace_back(isa.name);
    return names;
}

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

struct Call {
    const RowLogprobArgs* args;
    Rows rows;
};

void row_logprob(const std::string& isa, uintptr_t tile, int tile_dtype, int64_t tile_stride, int64_t rows, int64_t vocab,
                 uintptr_t targets, uintptr_t bias, double softcap, double scale, uintptr_t logp, uintptr_t lse,
                 uintptr_t entropy, uintptr_t grad, int grad_dtype, int64_t grad_stride, uintptr_t row_scale, int threads) {
    const auto found = std::find_if(isas().begin(), isas().end(), [&](const Isa& i) { return i.usable && isa == i.name; });
    if (found == isas().end()) throw pybind11::value_error("isa: this CPU or build has no " + isa);

    RowLogprobArgs args{};
    args.tile = pointer<const void>(tile);
    args.targets = pointer<const int64_t>(targets);
    args.bias = pointer<const void>(bias);
    args.row_scale = pointer<const void>(row_scale);
    args.logp = pointer<void>(logp);
    args.lse = pointer<void>(lse);
    args.entropy = pointer<void>(entropy);
    args.grad = pointer<void>(grad);
    args.rows = rows;
    args.vocab = vocab;
    args.tile_stride = tile_stride;
    args.grad_stride = grad_stride;
    args.scale = scale;
    args.softcap = softcap;
    args.tile_dtype = static_cast<Dtype>(tile_dtype);
    args.grad_dtype = static_cast<Dtype>(grad_dtype);

    const Call call{&args, args.tile_dtype == Dtype::kFloat64 ? row_logprob_generic : found->rows};
    // A piece of 64 K elements takes some 20 µs, several times what waking a thread costs.
    const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, vocab));
    pybind11::gil_scoped_release release;
    parallel_ranges(
        rows, grain, threads,
        [](const void* context, int64_t begin, int64_t end) {
            const Call& c = *static_cast<const Call*>(context);
            c.rows(*c.args, begin, end);
        },
        &call);
}

}  // namespace
}  // namespace robust_dpo

PYBIND11_MODULE(_cpu, m) {
    namespace py = pybind11;
    m.doc() = "CPU kernels of robust_dpo; use them through robust_dpo.kernels.";
    m.def("usable_isas", &robust_dpo::usable_isas, "Instruction sets that this build and this CPU have, best last.");
    m.def("thread_runtime", &robust_dpo::thread_runtime, "What runs the threads: 'openmp' (shared with torch) or 'std::thread'.");
    m.def("row_logprob", &robust_dpo::row_logprob, "See csrc/row_logprob.h; addresses as integers, 0 for none.", py::kw_only(),
          py::arg("isa"), py::arg("tile"), py::arg("tile_dtype"), py::arg("tile_stride"), py::arg("rows"), py::arg("vocab"),
          py::arg("targets"), py::arg("bias"), py::arg("softcap"), py::arg("scale"), py::arg("logp"), py::arg("lse"),
          py::arg("entropy"), py::arg("grad"), py::arg("grad_dtype"), py::arg("grad_stride"), py::arg("row_scale"),
          py::arg("threads"));
    robust_dpo::bind_linear_head(m);
    robust_dpo::bind_group_epilogue(m);
    robust_dpo::bind_calibration_weights(m);
    robust_dpo::bind_formulas(m);
}
