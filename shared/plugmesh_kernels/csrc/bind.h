// What each part adds to the Python module.
#pragma once
#include <pybind11/pybind11.h>

void bind_linear(pybind11::module_& m);
void bind_ops(pybind11::module_& m);
void bind_executor(pybind11::module_& m);
void bind_memory(pybind11::module_& m);
