// Python bindings of the LM head: addresses as integers, no logic. Checks, and the choice of a usable variant, are in Python.
#include "head_bindings.h"

#include <cstdint>
#include <string>

#include "head.h"

namespace py = pybind11;

namespace robust_dpo {

#if defined(ROBUST_DPO_AVX512)
namespace {

// Python asks for bf16 only where avx512_bf16 is among the usable instruction sets.
#if defined(ROBUST_DPO_AVX512_BF16)
constexpr auto kForwardBf16 = head_forward_avx512_bf16;
constexpr auto kBackwardBf16 = head_backward_avx512_bf16;
#else
constexpr decltype(&head_forward_avx512) kForwardBf16 = nullptr;
constexpr decltype(&head_backward_avx512) kBackwardBf16 = nullptr;
#endif

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

HeadInputs inputs(uintptr_t x, uintptr_t weight, uintptr_t targets, uintptr_t bias, int64_t rows, int64_t hidden,
                  int64_t vocab, int64_t x_stride, int64_t weight_stride, float scale, float softcap, int threads) {
    return {pointer<const void>(x), pointer<const void>(weight), pointer<const int64_t>(targets),
            pointer<const float>(bias), rows, hidden, vocab, x_stride, weight_stride, scale, softcap, threads};
}

HeadTile tile_at(uintptr_t values, uintptr_t references, uintptr_t target_logp, uintptr_t target_derivative) {
    return {pointer<void>(values), pointer<float>(references), pointer<float>(target_logp),
            pointer<float>(target_derivative)};
}

void forward(const HeadInputs& in, bool bf16, uintptr_t logp, uintptr_t lse, uintptr_t entropy, const HeadTile& tile) {
    const HeadForwardOutputs out{pointer<float>(logp), pointer<float>(lse), pointer<float>(entropy),
                                 tile.values == nullptr ? nullptr : &tile};
    const py::gil_scoped_release release;
    (bf16 ? kForwardBf16 : head_forward_avx512)(in, out);
}

void backward(const HeadInputs& in, bool bf16, const HeadTile& tile, uintptr_t lse, uintptr_t coefficients,
              uintptr_t grad_x, int64_t grad_x_stride, uintptr_t grad_weight, int64_t grad_weight_stride,
              uintptr_t grad_bias, bool overwrites_weight) {
    const HeadBackwardOutputs out{pointer<const float>(lse), pointer<const float>(coefficients), pointer<float>(grad_x),
                                  pointer<float>(grad_weight), pointer<float>(grad_bias), grad_x_stride,
                                  grad_weight_stride, overwrites_weight};
    const py::gil_scoped_release release;
    (bf16 ? kBackwardBf16 : head_backward_avx512)(in, tile, out);
}

}  // namespace

void bind_linear_head(py::module_& m) {
    m.attr("HEAD_VOCAB_BLOCK") = kVocabBlock;
    py::class_<HeadInputs>(m, "HeadInputs")
        .def(py::init(&inputs), py::kw_only(), py::arg("x"), py::arg("weight"), py::arg("targets"), py::arg("bias"),
             py::arg("rows"), py::arg("hidden"), py::arg("vocab"), py::arg("x_stride"), py::arg("weight_stride"),
             py::arg("scale"), py::arg("softcap"), py::arg("threads"));
    py::class_<HeadTile>(m, "HeadTile")
        .def(py::init(&tile_at), py::kw_only(), py::arg("values"), py::arg("references"), py::arg("target_logp"),
             py::arg("target_derivative"));
    m.def("head_forward", &forward, "See csrc/head.h; addresses as integers, 0 for none.", py::arg("inputs"), py::kw_only(),
          py::arg("bf16"), py::arg("logp"), py::arg("lse"), py::arg("entropy"), py::arg("tile"));
    m.def("head_backward", &backward, "See csrc/head.h; addresses as integers, 0 for none.", py::arg("inputs"),
          py::kw_only(), py::arg("bf16"), py::arg("tile"), py::arg("lse"), py::arg("coefficients"), py::arg("grad_x"),
          py::arg("grad_x_stride"), py::arg("grad_weight"), py::arg("grad_weight_stride"), py::arg("grad_bias"),
          py::arg("overwrites_weight"));
}
#else
void bind_linear_head(py::module_&) {}
#endif

}  // namespace robust_dpo
