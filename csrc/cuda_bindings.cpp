// Python bindings of the CUDA kernels: addresses as integers, no logic. Checks are in Python.
//
// Calls keep the GIL: a launch takes a few microseconds, and nothing here waits for the device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "cuda_launch.h"
#include "group_loss_table.h"
#include "operators_cuda.h"
#include "row_logprob_cuda.h"

namespace robust_dpo {
namespace {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void row_logprob(int device, uintptr_t stream, int threads, int segments, bool cluster, bool keep, uintptr_t partials,
                 uintptr_t tile, int tile_dtype, int64_t tile_stride, int64_t rows, int64_t vocab, uintptr_t targets,
                 uintptr_t bias, double softcap, double scale, uintptr_t logp, uintptr_t lse, uintptr_t entropy,
                 uintptr_t grad, int grad_dtype, int64_t grad_stride, uintptr_t row_scale, uintptr_t target_logits) {
    RowLogprobArgs args{};
    args.tile = pointer<const void>(tile);
    args.targets = pointer<const int64_t>(targets);
    args.bias = pointer<const void>(bias);
    args.row_scale = pointer<const void>(row_scale);
    args.target_logits = pointer<const void>(target_logits);
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
    const DeviceScope scope(device);
    row_logprob_cuda({device, stream}, args, {threads, segments, cluster, keep, pointer<float>(partials)});
}

void group_epilogue(int device, uintptr_t stream, uintptr_t counter, int widest, int loss, double first, double second,
                    uintptr_t token_logps, uintptr_t ref_token_logps, uintptr_t counted, uintptr_t seq_offsets,
                    uintptr_t group_offsets, uintptr_t lengths, uintptr_t scores, uintptr_t calibration, uintptr_t logps,
                    uintptr_t ref_logps, uintptr_t losses, uintptr_t derivative, uintptr_t coefficients, uintptr_t state,
                    bool live, bool tilted, int64_t first_group, int64_t last_group, double temperature, double headroom) {
    GroupEpilogueArgs args{};
    args.token_logps = pointer<const float>(token_logps);
    args.ref_token_logps = pointer<const float>(ref_token_logps);
    args.counted = pointer<const uint8_t>(counted);
    args.seq_offsets = pointer<const int64_t>(seq_offsets);
    args.group_offsets = pointer<const int64_t>(group_offsets);
    args.lengths = pointer<const float>(lengths);
    args.scores = pointer<const float>(scores);
    args.calibration = pointer<const float>(calibration);
    args.logps = pointer<float>(logps);
    args.ref_logps = pointer<float>(ref_logps);
    args.losses = pointer<float>(losses);
    args.derivative = pointer<float>(derivative);
    args.coefficients = pointer<float>(coefficients);
    args.state = pointer<double>(state);
    args.live = live;
    args.tilted = tilted;
    args.first_group = first_group;
    args.last_group = last_group;
    args.temperature = temperature;
    args.headroom = headroom;
    args.first = first;
    args.second = second;
    const DeviceScope scope(device);
    group_epilogue_cuda({device, stream}, args, loss, widest, pointer<int32_t>(counter));
}

void calibration_weights(int device, uintptr_t stream, uintptr_t probs, int prob_dtype, uintptr_t betas, uintptr_t gammas,
                         uintptr_t weights, int64_t responses, int64_t classifiers, int64_t slots, int64_t period, bool paper,
                         double offset, double clip) {
    CalibrationWeightsArgs args{};
    args.probs = pointer<const void>(probs);
    args.betas = pointer<const void>(betas);
    args.gammas = pointer<const void>(gammas);
    args.weights = pointer<void>(weights);
    args.responses = responses;
    args.classifiers = classifiers;
    args.slots = slots;
    args.period = period;
    args.offset = offset;
    args.clip = clip;
    args.prob_dtype = static_cast<Dtype>(prob_dtype);
    args.paper = paper;
    const DeviceScope scope(device);
    calibration_weights_cuda({device, stream}, args);
}

void rescale(int device, uintptr_t stream, uintptr_t total, bool total_is_double, int64_t count, uintptr_t factor,
             bool factor_is_double, int blocks) {
    const DeviceScope scope(device);
    rescale_cuda({device, stream}, pointer<void>(total), total_is_double, count, pointer<const void>(factor), factor_is_double,
                 blocks);
}

}  // namespace
}  // namespace robust_dpo

PYBIND11_MODULE(_cuda, m) {
    namespace py = pybind11;
    m.doc() = "CUDA kernels of robust_dpo; use them through robust_dpo.kernels.";
    m.attr("ARCHITECTURES") = ROBUST_DPO_CUDA_ARCHITECTURES;
    m.attr("DEVICE_TYPE") = ROBUST_DPO_DEVICE_TYPE;
    m.attr("MAX_WIDTH") = robust_dpo::kMaxWidth;
    m.def("problem", &robust_dpo::cuda_problem, "Why kernels cannot be launched here; empty where they can.");
    m.def("group_losses", &robust_dpo::group_losses, "(name, options) of the losses of group_epilogue; the code of one is its place.");
    m.def("row_logprob", &robust_dpo::row_logprob, "See csrc/row_logprob_cuda.h; addresses as integers, 0 for none.",
          py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("threads"), py::arg("segments"), py::arg("cluster"),
          py::arg("keep"), py::arg("partials"), py::arg("tile"), py::arg("tile_dtype"), py::arg("tile_stride"),
          py::arg("rows"), py::arg("vocab"), py::arg("targets"), py::arg("bias"), py::arg("softcap"), py::arg("scale"),
          py::arg("logp"), py::arg("lse"), py::arg("entropy"), py::arg("grad"), py::arg("grad_dtype"), py::arg("grad_stride"),
          py::arg("row_scale"), py::arg("target_logits"));
    m.def("group_epilogue", &robust_dpo::group_epilogue, "See csrc/operators_cuda.h; addresses as integers, 0 for none.",
          py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("counter"), py::arg("widest"), py::arg("loss"),
          py::arg("first"), py::arg("second"), py::arg("token_logps"), py::arg("ref_token_logps"), py::arg("counted"),
          py::arg("seq_offsets"), py::arg("group_offsets"), py::arg("lengths"), py::arg("scores"), py::arg("calibration"),
          py::arg("logps"), py::arg("ref_logps"), py::arg("losses"), py::arg("derivative"), py::arg("coefficients"),
          py::arg("state"), py::arg("live"), py::arg("tilted"), py::arg("first_group"), py::arg("last_group"),
          py::arg("temperature"), py::arg("headroom"));
    m.def("calibration_weights", &robust_dpo::calibration_weights, "See csrc/calibration_weights.h; addresses as integers.",
          py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("probs"), py::arg("prob_dtype"), py::arg("betas"),
          py::arg("gammas"), py::arg("weights"), py::arg("responses"), py::arg("classifiers"), py::arg("slots"),
          py::arg("period"), py::arg("paper"), py::arg("offset"), py::arg("clip"));
    m.def("rescale", &robust_dpo::rescale, "See csrc/operators_cuda.h; addresses as integers.", py::kw_only(),
          py::arg("device"), py::arg("stream"), py::arg("total"), py::arg("total_is_double"), py::arg("count"),
          py::arg("factor"), py::arg("factor_is_double"), py::arg("blocks"));
}
