// The formulas in Python, number by number, for tests: submodules `formulas.float64` and `formulas.float32`.
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "epilogue_bindings.h"
#include "group_losses.h"

namespace py = pybind11;

namespace robust_dpo {
namespace {

template <class T>
std::pair<T, T> both(const ValueSlope<T>& x) {
    return {x.value, x.slope};
}

template <class T>
std::pair<T, T> difference(T a, T b) {
    const SumError<T> exact = exact_difference(a, b);
    return {exact.sum, exact.error};
}

// Merged part by part: (lse, log-prob of `logit`, entropy).
template <class T>
std::vector<T> merged(const std::vector<std::vector<T>>& parts, T logit) {
    ExpSums<T> all;
    for (const std::vector<T>& part : parts) {
        ExpSums<T> sums;
        for (const T x : part) sums.add(x);
        all.merge(sums);
    }
    return {all.lse(), all.logp(logit), all.entropy()};
}

template <class T>
std::vector<T> advanced(T shift, T total, T highest, T headroom) {
    TiltState<T> state{shift, total, T(0)};
    state.make_room(highest, headroom);
    return {state.shift, state.total, state.rescale, state.weight(highest)};
}

template <class T>
std::pair<T, std::vector<T>> group_loss(int loss, T first, T second, const std::vector<T>& logps, const std::vector<T>& ref_logps,
                                        const std::vector<T>& lengths, const std::vector<T>& quality) {
    const size_t size = logps.size();
    if (ref_logps.size() != size || lengths.size() != size || quality.size() != size)
        throw py::value_error("group_loss: expected vectors of one size");
    const Group<T> group{logps.data(), ref_logps.data(), lengths.data(), quality.data(), static_cast<int64_t>(size)};
    std::vector<Memo<T>> memos(size);
    std::vector<T> derivative(size);
    T value = 0;
    with_loss(loss, [&](auto chosen) {
        value = solve_group<decltype(chosen)>(group, LossOptions<T>{first, second}, memos.data(), derivative.data());
    });
    return {value, derivative};
}

template <class T>
void bind_formulas_in(py::module_ m) {
    m.def("negative_log_sigmoid", [](T u) { return both(negative_log_sigmoid(u)); }, "(−logσ(u), its derivative)", py::arg("u"));
    m.def("capped", [](T z, T softcap) { return both(capped(z, softcap)); }, "(softcap·tanh(z/softcap), its derivative)",
          py::arg("z"), py::arg("softcap"));
    m.def("softmax_minus_one", &softmax_minus_one<T>, "softmax − 1 from the log-prob", py::arg("logp"));
    m.def("exact_difference", &difference<T>, "(a − b rounded, what the rounding has lost)", py::arg("a"), py::arg("b"));
    m.def("merged", &merged<T>, "(lse, log-prob of the logit, entropy) of a row in parts", py::arg("parts"), py::arg("logit"));
    m.def("tilted_score", &tilted_score<T>, "hℓ/t", py::arg("loss"), py::arg("calibration"), py::arg("temperature"));
    m.def("advanced", &advanced<T>, "(shift, total, rescale, weight of the highest)", py::arg("shift"), py::arg("total"),
          py::arg("highest"), py::arg("headroom"));
    m.def("group_loss", &group_loss<T>, "(ℓ, ∂ℓ/∂logp) of the loss of that code", py::arg("loss"), py::arg("first"),
          py::arg("second"), py::arg("logps"), py::arg("ref_logps"), py::arg("lengths"), py::arg("quality"));
}

}  // namespace

void bind_formulas(py::module_& m) {
    py::module_ formulas = m.def_submodule("formulas", "csrc/formulas.h and csrc/group_losses.h, number by number.");
    bind_formulas_in<double>(formulas.def_submodule("float64", "In double."));
    bind_formulas_in<float>(formulas.def_submodule("float32", "In float."));
}

}  // namespace robust_dpo
