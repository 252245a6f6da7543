// Python's door to matching.*. A row keeps its capsule and the capsule's owner; what a thread that hangs may still look at is never freed.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <chrono>
#include <memory>
#include <stdexcept>
#include <string>

#include "bind.h"
#include "matching.h"

namespace py = pybind11;

namespace pm {
namespace {

constexpr const char* MATCHER = "plugmesh.matcher.v1";
constexpr auto KEEPS_LOCK = std::chrono::microseconds(30);  // the interpreter's, while it waits for a part: most are done by then

struct PyMatchRow {
  MatchRow row;
  py::capsule matcher;
  py::object owner;
  PyMatchRow(py::capsule capsule, py::object its_owner, int num_words, uint64_t seed, uint64_t sequence, float temperature, bool asks_forced)
      : matcher(std::move(capsule)), owner(std::move(its_owner)) {
    if (matcher.name() == nullptr || std::string(matcher.name()) != MATCHER) throw std::invalid_argument("not a matcher's capsule");
    if (num_words < 1) throw std::invalid_argument("a mask has words");
    row.call = reinterpret_cast<MatcherFn>(matcher.get_pointer<void>());
    row.state = PyCapsule_GetContext(matcher.ptr());
    row.seed = seed;
    row.sequence = sequence;
    row.temperature = temperature;
    row.asks_forced = asks_forced;
    row.mask.resize(size_t(num_words));
  }
};

// The tokens of a step on a worker of a pool, told one after another.
class PyMatchRun {
 public:
  PyMatchRun(Pool& pool, KeptLogits* kept, const py::list& rows, const py::list& tokens, const py::list& positions, const py::array& logits, const py::list& logit_rows,
             double timeout_s)
      : pool_(pool), job_(std::make_shared<MatchJob>()), rows_(rows), logits_(logits) {
    const size_t n = rows.size();
    if (tokens.size() != n || positions.size() != n || logit_rows.size() != n)
      throw std::invalid_argument("one token, position and row of the logits per row");
    if (!py::isinstance<py::array_t<float, py::array::c_style>>(logits) || logits.ndim() != 2)
      throw std::invalid_argument("logits: (R, V) float32 in C order");
    job_->vocab = int(logits.shape(1));
    job_->kept = kept;
    job_->parts.reserve(n);
    for (size_t i = 0; i < n; ++i) {
      MatchRow& row = rows[i].cast<PyMatchRow&>().row;
      const auto at = logit_rows[i].cast<py::ssize_t>();
      if (at >= logits.shape(0) || (at < 0 && (kept == nullptr || !kept->is_kept(int(-1 - at))))) throw std::invalid_argument("row of the logits out of range");
      if (at < 0 && row.temperature > 0) throw std::invalid_argument("of kept logits only the largest is known");
      if (row.mask.size() * 32 < size_t(job_->vocab)) throw std::invalid_argument("one bit per token");
      job_->parts.push_back({&row, at < 0 ? nullptr : static_cast<const float*>(logits.data(at, 0)), int(-1 - at), positions[i].cast<uint64_t>(),
                             tokens[i].cast<int32_t>(), 0});
    }
    if (n > 0) {
      const py::gil_scoped_release release;  // of a job before it that nobody waited for
      pool.lend(job_, timeout_s);
    }
  }
  PyMatchRun(const PyMatchRun&) = delete;
  PyMatchRun& operator=(const PyMatchRun&) = delete;

  ~PyMatchRun() {  // of one that a step left behind
    if (job_->parts.empty() || wait(job_->parts.size() - 1)) return;
    rows_.inc_ref();  // a thread that nobody can stop may still look at these
    logits_.inc_ref();
  }

  py::object result(size_t i) {
    if (i >= job_->parts.size()) throw py::index_error("no such row");
    if (!wait(i)) return py::none();
    return py::make_tuple(job_->parts[i].token, int(job_->parts[i].flags));
  }

  int given_up_at() const { return job_->given_up_at(); }

 private:
  bool wait(size_t i) {
    if (job_->is_past(int(i))) return true;
    if (job_->given_up_at() >= 0) return false;  // the pool may be gone
    const auto until = std::chrono::steady_clock::now() + KEEPS_LOCK;
    do {
      for (int spins = 0; spins < 32; ++spins) {
        if (job_->is_past(int(i))) return true;
        cpu_relax();
      }
    } while (std::chrono::steady_clock::now() < until);
    const py::gil_scoped_release release;
    return pool_.await(*job_, int(i));
  }

  Pool& pool_;
  std::shared_ptr<MatchJob> job_;
  py::list rows_;
  py::array logits_;
};

}  // namespace

py::object begin_matches(Pool& pool, KeptLogits* kept, const py::list& rows, const py::list& tokens, const py::list& positions, const py::array& logits,
                         const py::list& logit_rows, double timeout_s) {
  return py::cast(std::make_unique<PyMatchRun>(pool, kept, rows, tokens, positions, logits, logit_rows, timeout_s));
}

}  // namespace pm

void bind_matching(py::module_& m) {
  using namespace py::literals;
  using namespace pm;
  py::class_<PyMatchRow>(m, "MatchRow", "One sequence: the capsule of its matcher, who owns what that points at, and what names the random numbers of its second draws.")
      .def(py::init<py::capsule, py::object, int, uint64_t, uint64_t, float, bool>(), "matcher"_a, "owner"_a, "num_words"_a, "seed"_a, "sequence"_a, "temperature"_a,
           "asks_forced"_a);
  py::class_<Pool>(m, "MatchThread", "A thread that asks matchers for drawn tokens, where no executor lends one of its own.")
      .def(py::init([] { return std::make_unique<Pool>(2, 0, false); }))
      .def("begin_matches",
           [](Pool& pool, const py::list& rows, const py::list& tokens, const py::list& positions, const py::array& logits, const py::list& logit_rows,
              double timeout_s) {
             return begin_matches(pool, nullptr, rows, tokens, positions, logits, logit_rows, timeout_s);
           },
           py::keep_alive<0, 1>(), BEGIN_MATCHES, "rows"_a, "tokens"_a, "positions"_a, "logits"_a, "logit_rows"_a, "timeout_s"_a);
  py::class_<PyMatchRun>(m, "MatchRun", "The tokens of one step in their matchers.")
      .def("result", &PyMatchRun::result, "row"_a,
           "The accepted token, -1 for none, and flags of matching.h, as soon as they are there. None for a row whose matcher hangs, and those behind it.")
      .def_property_readonly("given_up_at", &PyMatchRun::given_up_at, "The row whose matcher hangs, -1 for none.");
  m.attr("MATCH_REDRAWN") = int(MATCH_REDRAWN);
  m.attr("MATCH_COMPLETED") = int(MATCH_COMPLETED);
  m.attr("MATCH_TERMINATED") = int(MATCH_TERMINATED);
  m.attr("MATCH_IS_FORCED") = int(MATCH_IS_FORCED);
  m.attr("MATCH_FAILED") = int(MATCH_FAILED);
  m.attr("MATCH_NOTHING") = int(MATCH_NOTHING);
  m.def("match_uniform", &match_uniform, "seed"_a, "sequence"_a, "position"_a);
}
