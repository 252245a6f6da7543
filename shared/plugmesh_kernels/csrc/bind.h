// What each part adds to the Python module.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace pm {
class KeptLogits;
class Pool;

// Lends a worker of the pool to the matchers of a step. The result must not outlive the pool.
pybind11::object begin_matches(Pool& pool, KeptLogits* kept, const pybind11::list& rows, const pybind11::list& tokens, const pybind11::list& positions,
                               const pybind11::array& logits, const pybind11::list& logit_rows, double timeout_s);
inline constexpr const char* BEGIN_MATCHES =
    "Begins to take drawn tokens into their matchers. `logit_rows`: of `logits`, or -1 - i for wanted row i of the executor's last run, which kept it; only "
    "greedy draws may come of those. Gives a `MatchRun`.";
}  // namespace pm

void bind_linear(pybind11::module_& m);
void bind_ops(pybind11::module_& m);
void bind_executor(pybind11::module_& m);
void bind_memory(pybind11::module_& m);
void bind_matching(pybind11::module_& m);
