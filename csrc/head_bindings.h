// Adds the LM head to the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace robust_dpo {

void bind_linear_head(pybind11::module_& m);

}  // namespace robust_dpo
