// Adds the operators on responses and groups, and the formulas themselves, to the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace robust_dpo {

void bind_group_epilogue(pybind11::module_& m);
void bind_calibration_weights(pybind11::module_& m);
void bind_formulas(pybind11::module_& m);

}  // namespace robust_dpo
