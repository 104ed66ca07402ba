// Python bindings of the operators on responses and groups: addresses as integers, no logic. Checks are in Python.
#include "epilogue_bindings.h"

#include <pybind11/stl.h>

#include <cstdint>

#include "calibration_weights.h"
#include "group_epilogue.h"
#include "group_loss_table.h"

namespace py = pybind11;

namespace robust_dpo {
namespace {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}


void group_epilogue(int loss, double first, double second, uintptr_t token_logps, uintptr_t ref_token_logps,
                    uintptr_t counted, uintptr_t seq_offsets, uintptr_t group_offsets, uintptr_t lengths, uintptr_t scores,
                    uintptr_t calibration, uintptr_t logps, uintptr_t ref_logps, uintptr_t losses, uintptr_t derivative,
                    uintptr_t coefficients, uintptr_t state, bool live, bool tilted, int64_t first_group, int64_t last_group, double temperature,
                    double headroom, int threads) {
    const GroupEpilogueArgs args{pointer<const float>(token_logps),
                                 pointer<const float>(ref_token_logps),
                                 pointer<const uint8_t>(counted),
                                 pointer<const int64_t>(seq_offsets),
                                 pointer<const int64_t>(group_offsets),
                                 pointer<const float>(lengths),
                                 pointer<const float>(scores),
                                 pointer<const float>(calibration),
                                 pointer<float>(logps),
                                 pointer<float>(ref_logps),
                                 pointer<float>(losses),
                                 pointer<float>(derivative),
                                 pointer<float>(coefficients),
                                 pointer<double>(state),
                                 live,
                                 tilted,
                                 first_group,
                                 last_group,
                                 temperature,
                                 headroom,
                                 first,
                                 second};
    const py::gil_scoped_release release;
    group_epilogue_cpu(args, loss, threads);
}

void calibration_weights(uintptr_t probs, int prob_dtype, uintptr_t betas, uintptr_t gammas, uintptr_t weights,
                         int64_t responses, int64_t classifiers, int64_t slots, int64_t period, bool paper, double offset,
                         double clip, int threads) {
    const CalibrationWeightsArgs args{pointer<const void>(probs),
                                      pointer<const void>(betas),
                                      pointer<const void>(gammas),
                                      pointer<void>(weights),
                                      responses,
                                      classifiers,
                                      slots,
                                      period,
                                      offset,
                                      clip,
                                      static_cast<Dtype>(prob_dtype),
                                      paper};
    const py::gil_scoped_release release;
    calibration_weights_cpu(args, threads);
}

}  // namespace

void bind_group_epilogue(py::module_& m) {
    m.def("group_losses", &group_losses, "(name, options) of the losses of group_epilogue; the code of one is its place.");
    m.def("group_epilogue", &group_epilogue, "See csrc/group_epilogue.h; addresses as integers, 0 for none.", py::kw_only(),
          py::arg("loss"), py::arg("first"), py::arg("second"), py::arg("token_logps"), py::arg("ref_token_logps"),
          py::arg("counted"), py::arg("seq_offsets"), py::arg("group_offsets"), py::arg("lengths"), py::arg("scores"),
          py::arg("calibration"), py::arg("logps"), py::arg("ref_logps"), py::arg("losses"), py::arg("derivative"),
          py::arg("coefficients"), py::arg("state"), py::arg("live"), py::arg("tilted"), py::arg("first_group"), py::arg("last_group"), py::arg("temperature"),
          py::arg("headroom"), py::arg("threads"));
}

void bind_calibration_weights(py::module_& m) {
    m.def("calibration_weights", &calibration_weights, "See csrc/calibration_weights.h; addresses as integers.",
          py::kw_only(), py::arg("probs"), py::arg("prob_dtype"), py::arg("betas"), py::arg("gammas"), py::arg("weights"),
          py::arg("responses"), py::arg("classifiers"), py::arg("slots"), py::arg("period"), py::arg("paper"),
          py::arg("offset"), py::arg("clip"), py::arg("threads"));
}

}  // namespace robust_dpo
