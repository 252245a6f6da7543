// Python's door to matching.*. A row keeps its capsule and the capsule's owner; what a thread that hangs may still look at is never freed.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "bind.h"
#include "matching.h"

namespace py = pybind11;

namespace pm {
namespace {

constexpr const char* MATCHER = "plugmesh.matcher.v1";

struct PyMatchRow {
  MatchRow row;
  py::capsule matcher;
  py::object owner;
  PyMatchRow(py::capsule capsule, py::object its_owner, int num_words, uint64_t seed, uint64_t sequence, float temperature)
      : matcher(std::move(capsule)), owner(std::move(its_owner)) {
    if (matcher.name() == nullptr || std::string(matcher.name()) != MATCHER) throw std::invalid_argument("not a matcher's capsule");
    if (num_words < 1) throw std::invalid_argument("a mask has words");
    row.call = reinterpret_cast<MatcherFn>(matcher.get_pointer<void>());
    row.state = PyCapsule_GetContext(matcher.ptr());
    row.seed = seed;
    row.sequence = sequence;
    row.temperature = temperature;
    row.mask.resize(size_t(num_words));
  }
};

}  // namespace

py::tuple check_matches(Pool& pool, const py::list& rows, const py::list& tokens, const py::list& positions, const py::array& logits,
                        const py::list& logit_rows, const py::list& asks_forced, double timeout_s) {
  const size_t n = rows.size();
  if (tokens.size() != n || positions.size() != n || logit_rows.size() != n || asks_forced.size() != n)
    throw std::invalid_argument("one token, position, row of the logits and question per row");
  if (!py::isinstance<py::array_t<float, py::array::c_style>>(logits) || logits.ndim() != 2)
    throw std::invalid_argument("logits: (R, V) float32 in C order");
  const auto job = std::make_shared<MatchJob>();
  job->vocab = int(logits.shape(1));
  job->parts.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    MatchRow& row = rows[i].cast<PyMatchRow&>().row;
    const auto at = logit_rows[i].cast<py::ssize_t>();
    if (at < 0 || at >= logits.shape(0)) throw std::invalid_argument("row of the logits out of range");
    if (row.mask.size() * 32 < size_t(job->vocab)) throw std::invalid_argument("one bit per token");
    job->parts.push_back({&row, static_cast<const float*>(logits.data(at, 0)), positions[i].cast<uint64_t>(), asks_forced[i].cast<bool>(),
                          tokens[i].cast<int32_t>(), 0});
  }
  bool is_done = true;
  if (n > 0) {
    py::gil_scoped_release release;
    is_done = pool.lend(job, timeout_s);
  }
  if (!is_done) {  // a thread that nobody can stop may still look at these
    rows.inc_ref();
    logits.inc_ref();
  }
  const size_t num_done = is_done ? n : size_t(std::max(0, job->progress()));
  py::list accepted(num_done), flags(num_done);
  for (size_t i = 0; i < num_done; ++i) {
    accepted[i] = py::int_(job->parts[i].token);
    flags[i] = py::int_(job->parts[i].flags);
  }
  return py::make_tuple(accepted, flags);
}

}  // namespace pm

void bind_matching(py::module_& m) {
  using namespace py::literals;
  using namespace pm;
  py::class_<PyMatchRow>(m, "MatchRow", "One sequence: the capsule of its matcher, who owns what that points at, and what names the random numbers of its second draws.")
      .def(py::init<py::capsule, py::object, int, uint64_t, uint64_t, float>(), "matcher"_a, "owner"_a, "num_words"_a, "seed"_a, "sequence"_a, "temperature"_a);
  py::class_<Pool>(m, "MatchThread", "A thread that asks matchers for drawn tokens, where no executor lends one of its own.")
      .def(py::init([] { return std::make_unique<Pool>(2, 0, false); }))
      .def("check_matches", check_matches, CHECK_MATCHES, "rows"_a, "tokens"_a, "positions"_a, "logits"_a, "logit_rows"_a, "asks_forced"_a, "timeout_s"_a);
  m.attr("MATCH_REDRAWN") = int(MATCH_REDRAWN);
  m.attr("MATCH_COMPLETED") = int(MATCH_COMPLETED);
  m.attr("MATCH_TERMINATED") = int(MATCH_TERMINATED);
  m.attr("MATCH_IS_FORCED") = int(MATCH_IS_FORCED);
  m.attr("MATCH_FAILED") = int(MATCH_FAILED);
  m.attr("MATCH_NOTHING") = int(MATCH_NOTHING);
  m.def("match_uniform", &match_uniform, "seed"_a, "sequence"_a, "position"_a);
}
