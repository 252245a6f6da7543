#include "bind.h"
#include "cpu.h"

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of plugmesh; kernels.h describes layouts and functions.";
  m.def("best_isa", &pm::best_isa, "The best instruction set that this processor has kernels for.");
  m.def("supports", &pm::supports, pybind11::arg("isa"));
  m.def("isa", &pm::selected_isa, "The instruction set in use.");
  m.def("select_isa", &pm::select_isa, pybind11::arg("isa"), "Uses another one from now on; ValueError when it is not supported.");
  bind_linear(m);
  bind_ops(m);
  bind_executor(m);
  bind_memory(m);
  bind_matching(m);
}
