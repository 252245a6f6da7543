// What each part adds to the Python module.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace pm {
class Pool;

// Lends a worker of the pool to the matchers of a step.
pybind11::tuple check_matches(Pool& pool, const pybind11::list& rows, const pybind11::list& tokens, const pybind11::list& positions,
                              const pybind11::array& logits, const pybind11::list& logit_rows, const pybind11::list& asks_forced, double timeout_s);
inline constexpr const char* CHECK_MATCHES =
    "Accepted tokens, and flags of matching.h; shorter than `rows` when a matcher hung, that one and those behind it are missing then.";
}  // namespace pm

void bind_linear(pybind11::module_& m);
void bind_ops(pybind11::module_& m);
void bind_executor(pybind11::module_& m);
void bind_memory(pybind11::module_& m);
void bind_matching(pybind11::module_& m);
