// The executor as a Python object. Buffers that it is given must live as long as it does: it keeps references to their owners.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>

#include "bind.h"
#include "cpu.h"
#include "executor.h"

namespace py = pybind11;

namespace pm {
namespace {

using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;
using Doubles = py::array_t<double, py::array::c_style>;
using Ints = py::array_t<int32_t, py::array::c_style>;

void need(bool condition, const std::string& message) {
  if (!condition) throw py::value_error(message);
}

WeightType weight_type(const std::string& name) {
  if (name == "q4_1x16") return WeightType::Q4_1;
  if (name == "q8_0x16") return WeightType::Q8_0;
  if (name == "bf16x16") return WeightType::BF16;
  if (name == "f32x16") return WeightType::F32;
  throw py::value_error("unknown packed weight type " + name);
}

// Native functions of plugins come in capsules of these names, with their context as the capsule's context. v1 is called by one thread, the others (executor.h
// has their signatures) by all threads of the pool at once. What a context points at lives as long as the Python object that offers the capsule.
constexpr const char* NATIVE_LINEAR = "plugmesh.linear.v1";
constexpr const char* SHARED_LINEAR = "plugmesh.linear.v2";
constexpr const char* SHARED_LAYER = "plugmesh.layer.v1";
constexpr const char* SHARED_ATTENTION = "plugmesh.attention.v2";
constexpr const char* SHARED_EMBEDDING = "plugmesh.embedding.v1";
using NativeLinear = void (*)(void* context, const float* x, int t, int k, float* y, int n);

// Empty unless `function` is a capsule of that name.
template <class F>
Shared<F> shared(const py::object& function, const char* name) {
  if (!PyCapsule_IsValid(function.ptr(), name)) return {};
  return {reinterpret_cast<F>(PyCapsule_GetPointer(function.ptr(), name)), PyCapsule_GetContext(function.ptr())};
}

void need_callable(const py::object& function, const char* what) {
  need(function.is_none() || PyCallable_Check(function.ptr()), std::string(what) + " must be a function or a capsule of its own kind");
}

struct PyLinear {
  Linear linear;
  py::object owner;  // of data and bias, or the function

  static PyLinear packed(const std::string& type, int n, int k, Bytes data, py::object bias) {
    PyLinear l;
    l.linear.weight = {weight_type(type), n, k, data.data(), nullptr};
    need(n >= 0 && k >= 0, "negative shape");
    need(size_t(data.size()) == size_t(l.linear.weight.row_blocks()) * l.linear.weight.row_block_bytes(),
         "a " + type + " weight of this shape has another size than " + std::to_string(data.size()) + " bytes");
    py::object kept_bias = py::none();
    if (!bias.is_none()) {
      Floats b = Floats::ensure(bias);
      need(bool(b) && b.size() == n, "the bias must hold n floats");
      l.linear.weight.bias = b.data();
      kept_bias = b;
    }
    l.owner = py::make_tuple(data, kept_bias);
    return l;
  }

  static PyLinear foreign(int n, int k, py::object function, py::object bias) {
    PyLinear l;
    l.linear.weight = {WeightType::F32, n, k, nullptr, nullptr};
    if (!bias.is_none()) {
      Floats b = Floats::ensure(bias);
      need(bool(b) && b.size() == n, "the bias must hold n floats");
      l.linear.weight.bias = b.data();
      bias = b;
    }
    l.owner = py::make_tuple(function, bias);
    l.linear.shared = pm::shared<SharedLinear>(function, SHARED_LINEAR);
    if (l.linear.shared) return l;
    if (PyCapsule_CheckExact(function.ptr())) {
      auto call = reinterpret_cast<NativeLinear>(PyCapsule_GetPointer(function.ptr(), NATIVE_LINEAR));
      if (call == nullptr) throw py::error_already_set();
      void* context = PyCapsule_GetContext(function.ptr());
      l.linear.foreign = [=](const float* x, int t, float* y) { call(context, x, t, k, y, n); };
      return l;
    }
    PyObject* f = function.ptr();  // kept alive by `owner`; copies of the std::function are made and dropped without the GIL
    l.linear.foreign = [=](const float* x, int t, float* y) {
      py::gil_scoped_acquire gil;
      const py::capsule view(x, [](void*) {});
      const Floats in({t, k}, x, view);
      Floats out({t, n}, y, view);
      py::reinterpret_borrow<py::object>(f)(in, out);
    };
    return l;
  }
};

struct PyExecutor {
  std::unique_ptr<Executor> executor;
  KvMemory kv;
  std::vector<py::object> owners;
  py::object attention = py::none(), layer = py::none(), embedding = py::none();
  std::vector<std::vector<int32_t>> ints;  // tokens and blocks of the step

  Executor& get() {
    need(bool(executor), "the executor is closed");
    return *executor;
  }

  // Copies a Python sequence of ints, each within [0, limit).
  const int32_t* copy(PyObject* values, std::vector<int32_t>& to, int64_t limit, const char* what) {
    py::object fast = py::reinterpret_steal<py::object>(PySequence_Fast(values, what));
    if (!fast) throw py::error_already_set();
    const Py_ssize_t n = PySequence_Fast_GET_SIZE(fast.ptr());
    PyObject** items = PySequence_Fast_ITEMS(fast.ptr());
    to.resize(size_t(n));
    for (Py_ssize_t i = 0; i < n; ++i) {
      const long value = PyLong_AsLong(items[i]);
      if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
      if (value < 0 || value >= limit) throw py::value_error(std::string(what) + " out of range: " + std::to_string(value));
      to[size_t(i)] = int32_t(value);
    }
    return to.data();
  }

  // Checks the rows and copies them; they point into `ints`.
  std::vector<StepSequence> read_rows(const py::sequence& rows) {
    Executor& e = get();
    const size_t n = rows.size();
    if (ints.size() < 2 * n) ints.resize(2 * n);
    std::vector<StepSequence> sequences(n);
    const int64_t num_blocks = int64_t(owned_blocks);
    for (size_t i = 0; i < n; ++i) {
      const py::object r = rows[i];
      StepSequence& s = sequences[i];
      s.tokens = copy(py::object(r.attr("token_ids")).ptr(), ints[2 * i], e.shape().vocab, "token id");
      s.num_rows = int(ints[2 * i].size());
      s.position = r.attr("num_computed").cast<int>();
      s.blocks = copy(py::object(r.attr("blocks")).ptr(), ints[2 * i + 1], num_blocks, "block");
      s.num_wanted = r.attr("num_wanted").cast<int>();
      s.full = r.attr("full").cast<bool>();
      s.kept = r.attr("kept").cast<bool>();
      need(s.position >= 0 && s.position + s.num_rows <= e.shape().max_position, "a row lies beyond the model's context");
      need(size_t(s.position + s.num_rows) <= ints[2 * i + 1].size() * BLOCK_TOKENS, "a sequence has too few blocks");
      need(!(s.full && s.kept), "logits are given or kept, not both");
      need(s.num_wanted >= 0 && s.num_wanted <= s.num_rows, "more rows wanted than there are");
    }
    return sequences;
  }

  py::tuple run(const py::sequence& rows, const py::sequence& wanted_taps) {
    Executor& e = get();
    const std::vector<StepSequence> sequences = read_rows(rows);
    need(e.has_embedding(), "the embedding is not packed, and no function stands for it");
    need(kv.base != nullptr || !attention.is_none(), "the executor has no KV memory of its own, and no attention was set");
    int num_wanted = 0, num_full = 0;
    for (const StepSequence& s : sequences) {
      num_wanted += s.num_wanted;
      if (s.full) num_full += s.num_wanted;
    }
    std::vector<StepTap> taps;
    py::tuple hidden(wanted_taps.size());
    for (size_t i = 0; i < size_t(wanted_taps.size()); ++i) {
      const py::object t = wanted_taps[i];
      const int entry = t.attr("entry").cast<int>(), layer = t.attr("layer").cast<int>();
      need(entry >= 0 && size_t(entry) < sequences.size(), "a tap names an entry that is not in the step");
      need(layer >= 0 && layer <= e.shape().num_layers, "a tap names a layer that the model has not");
      Floats rows_of_entry({sequences[size_t(entry)].num_rows, e.shape().hidden});
      taps.push_back({entry, layer, rows_of_entry.mutable_data()});
      hidden[i] = rows_of_entry;
    }
    Ints best(num_wanted);
    Floats logits({num_full, e.shape().vocab});
    int32_t* best_out = best.mutable_data();
    float* logits_out = logits.mutable_data();
    {
      py::gil_scoped_release release;
      e.run(sequences, best_out, logits_out, taps);
    }
    return py::make_tuple(best, logits, hidden);
  }

  py::tuple probe(const py::sequence& rows, int layer) {
    Executor& e = get();
    const std::vector<StepSequence> sequences = read_rows(rows);
    need(e.has_embedding(), "the embedding is not packed, and no function stands for it");
    need(kv.base != nullptr || !attention.is_none(), "the executor has no KV memory of its own, and no attention was set");
    const ModelShape& s = e.shape();
    need(layer >= 0 && layer < s.num_layers, "the model has no such layer");
    int num_rows = 0;
    for (const StepSequence& one : sequences) num_rows += one.num_rows;
    Floats q({num_rows, s.num_heads, s.head_dim}), k({num_rows, s.num_kv_heads, s.head_dim});
    float *q_out = q.mutable_data(), *k_out = k.mutable_data();
    {
      py::gil_scoped_release release;
      e.probe(sequences, layer, q_out, k_out);
    }
    return py::make_tuple(q, k);
  }

  // As plugmesh_kernels.native().sample_rows, with the executor's threads.
  Ints sample(const Floats& logits, const Floats& temperature, const Ints& top_k, const Floats& top_p, const Floats& min_p, const Doubles& u) {
    Executor& e = get();
    need(logits.ndim() == 2, "logits must be (R, V)");
    const int rows = int(logits.shape(0)), v = int(logits.shape(1));
    for (py::ssize_t size : {temperature.size(), top_k.size(), top_p.size(), min_p.size(), u.size()}) need(size == rows, "one parameter per row");
    Ints tokens(rows);
    const float *l = logits.data(), *temp = temperature.data(), *p = top_p.data(), *m = min_p.data();
    const int32_t* k = top_k.data();
    const double* uniform = u.data();
    int32_t* out = tokens.mutable_data();
    py::gil_scoped_release release;
    std::vector<std::vector<float>> scratch(size_t(e.pool().num_threads()));
    e.pool().run([&](int thread) {
      auto& mine = scratch[size_t(thread)];
      for (int r; (r = e.pool().claim()) < rows;) {
        if (mine.empty()) mine.resize(size_t(v));
        out[r] = sample_row(l + size_t(r) * v, v, {temp[r], k[r], p[r], m[r], uniform[r]}, mine.data());
      }
    });
    return tokens;
  }

  py::object begin_matches(const py::list& rows, const py::list& tokens, const py::list& positions, const py::array& step_logits,
                           const py::list& logit_rows, double timeout_s) {
    Pool& pool = get().pool();
    need(pool.num_threads() > 1, "an executor with one thread has none to lend");
    return pm::begin_matches(pool, executor.get(), rows, tokens, positions, step_logits, logit_rows, timeout_s);
  }

  int best_allowed(int row, const py::array_t<uint32_t, py::array::c_style>& mask) {
    Executor& e = get();
    need(e.is_kept(row), "no logits of that row were kept");
    need(mask.size() * 32 >= e.shape().vocab, "one bit per token");
    const uint32_t* words = mask.data();
    const py::gil_scoped_release release;  // a matcher that is still asked may be Python's
    e.pool().settle();
    return e.best_allowed(row, words);
  }

  void set_attention(py::object function) {
    Executor& e = get();
    attention = function;
    if (function.is_none()) {
      need(kv.base != nullptr, "the executor has no KV memory of its own");
      return e.set_attention(nullptr);
    }
    if (const auto native = shared<SharedAttention>(function, SHARED_ATTENTION)) return e.set_attention(nullptr, native);
    need_callable(function, "the attention");
    PyObject* f = attention.ptr();
    const ModelShape& s = e.shape();
    const int heads = s.num_heads, kv_heads = s.num_kv_heads, d = s.head_dim;
    e.set_attention([=](int layer, const float* q, const float* k, const float* v, int t, float* out) {
      py::gil_scoped_acquire gil;
      const py::capsule view(q, [](void*) {});
      const Floats q3({t, heads, d}, q, view), k3({t, kv_heads, d}, k, view), v3({t, kv_heads, d}, v, view);
      Floats out3({t, heads, d}, out, view);
      py::reinterpret_borrow<py::object>(f)(layer, q3, k3, v3, out3);
    });
  }

  void set_before_layer(py::object function) {
    Executor& e = get();
    layer = function;
    if (function.is_none()) return e.set_before_layer(nullptr, {});
    if (const auto native = shared<SharedLayer>(function, SHARED_LAYER)) return e.set_before_layer(nullptr, native);
    need_callable(function, "what comes before a layer");
    PyObject* f = layer.ptr();
    e.set_before_layer(
        [f](int at) {
          py::gil_scoped_acquire gil;
          py::reinterpret_borrow<py::object>(f)(at);
        },
        {});
  }

  void set_embedding(py::object function) {
    Executor& e = get();
    embedding = function;
    if (function.is_none()) return e.set_embedding(nullptr, {});
    if (const auto native = shared<SharedEmbedding>(function, SHARED_EMBEDDING)) return e.set_embedding(nullptr, native);
    need_callable(function, "the embedding");
    PyObject* f = embedding.ptr();
    const int hidden = e.shape().hidden;
    e.set_embedding(
        [f, hidden](const int32_t* tokens, int t, float* x) {
          py::gil_scoped_acquire gil;
          const py::capsule view(x, [](void*) {});
          const Ints ids({t}, tokens, view);
          Floats out({t, hidden}, x, view);
          py::reinterpret_borrow<py::object>(f)(ids, out);
        },
        {});
  }

  size_t owned_blocks = 0;
};

bool all_finite(const PyExecutor& self, const std::vector<int>& blocks) {
  need(self.kv.base != nullptr, "the executor has no KV memory of its own");
  const size_t bytes = self.kv.block_bytes;
  for (int block : blocks) {
    need(block >= 0 && size_t(block) < self.owned_blocks, "block out of range");
    const uint8_t* data = self.kv.base + size_t(block) * bytes;
    if (self.kv.type == KvType::BF16) {
      const auto* v = reinterpret_cast<const uint16_t*>(data);
      unsigned bad = 0;
      for (size_t i = 0; i < bytes / 2; ++i) bad |= unsigned((v[i] & 0x7F80) == 0x7F80);
      if (bad) return false;
      continue;
    }
    // Of int8 blocks only the scales can be out of the ordinary.
    const size_t head = self.kv.part_bytes() / self.kv.kv_heads;
    for (size_t at = 0; at < bytes; at += head)
      for (int t = 0; t < BLOCK_TOKENS; ++t) {
        uint32_t bits;
        std::memcpy(&bits, data + at + size_t(t) * 4, 4);
        if ((bits & 0x7F800000u) == 0x7F800000u) return false;
      }
  }
  return true;
}

}  // namespace
}  // namespace pm

void bind_executor(py::module_& m) {
  using namespace pm;
  py::class_<PyLinear>(m, "Linear", "A weight in one of the packed layouts, or a function that stands for one.")
      .def_static("packed", &PyLinear::packed, py::arg("type"), py::arg("n"), py::arg("k"), py::arg("data"), py::arg("bias") = py::none())
      .def_static("foreign", &PyLinear::foreign, py::arg("n"), py::arg("k"), py::arg("function"), py::arg("bias") = py::none(),
                  "function(x (T, K) float32, y (T, N) float32 to fill), or a capsule \"plugmesh.linear.v1\" with void (*)(void* context, const float* x, "
                  "int t, int k, float* y, int n), or \"plugmesh.linear.v2\" with two more arguments, int thread and int num_threads, called by all threads.");

  py::class_<PyExecutor>(m, "Executor")
      .def(py::init([](const py::dict& shape, const py::list& layers, const PyLinear& embedding, Floats norm, const PyLinear& head, Floats cos, Floats sin,
                       const py::object& kv, int num_blocks, const std::string& kv_type, const std::string& isa, int num_threads, int spin_us, bool pin) {
             const auto number = [&](const char* key) { return shape[key].cast<int>(); };
             const ModelShape s{number("hidden"), number("intermediate"), number("num_layers"), number("num_heads"), number("num_kv_heads"), number("head_dim"),
                                number("vocab"), number("max_position"), shape["eps"].cast<float>(), shape["rope_interleaved"].cast<bool>()};
             auto self = std::make_unique<PyExecutor>();
             const auto keep = [&](const py::object& o) { self->owners.push_back(o); };
             const auto check = [](const PyLinear& l, int n, int k, const char* what) {
               need(l.linear.weight.n == n && l.linear.weight.k == k, std::string(what) + " has the wrong shape");
             };
             const int q = s.num_heads * s.head_dim, kvs = s.num_kv_heads * s.head_dim;
             need(s.num_heads % s.num_kv_heads == 0 && s.head_dim % 2 == 0, "heads must be a multiple of KV heads, and even in width");
             need(int(layers.size()) == s.num_layers, "one entry per layer");
             std::vector<LayerWeights> all;
             for (const auto& item : layers) {
               const auto d = item.cast<py::dict>();
               LayerWeights w;
               const auto linear = [&](const char* key, int n, int k) {
                 const py::object o = d[key];
                 const auto& l = o.cast<const PyLinear&>();
                 check(l, n, k, key);
                 keep(l.owner);
                 return l.linear;
               };
               const auto floats = [&](const char* key) {
                 const Floats f = Floats::ensure(d[key]);
                 need(bool(f) && f.size() == s.hidden, std::string(key) + " must hold `hidden` floats");
                 keep(f);
                 return f.data();
               };
               w.input_norm = floats("input_norm");
               w.mlp_norm = floats("mlp_norm");
               w.q = linear("q", q, s.hidden);
               w.k = linear("k", kvs, s.hidden);
               w.v = linear("v", kvs, s.hidden);
               w.o = linear("o", s.hidden, q);
               w.gate = linear("gate", s.intermediate, s.hidden);
               w.up = linear("up", s.intermediate, s.hidden);
               w.down = linear("down", s.hidden, s.intermediate);
               all.push_back(std::move(w));
             }
             check(embedding, s.vocab, s.hidden, "embedding");
             check(head, s.vocab, s.hidden, "head");
             need(norm.size() == s.hidden, "norm must hold `hidden` floats");
             need(cos.size() == py::ssize_t(s.max_position) * (s.head_dim / 2) && sin.size() == cos.size(), "cos and sin must be (max_position, head_dim / 2)");
             for (const py::object& o : std::initializer_list<py::object>{embedding.owner, norm, head.owner, cos, sin, kv}) keep(o);
             KvMemory memory{};
             memory.num_layers = s.num_layers;
             memory.kv_heads = s.num_kv_heads;
             memory.head_dim = s.head_dim;
             need(kv_type == "bfloat16" || kv_type == "int8", "kv_type must be bfloat16 or int8");
             memory.type = kv_type == "int8" ? KvType::INT8 : KvType::BF16;
             memory.block_bytes = memory.layer_bytes() * size_t(s.num_layers);
             if (kv.is_none()) {
               need(num_blocks > 0, "without KV memory the number of blocks must be told");
               self->owned_blocks = size_t(num_blocks);
             } else {
               auto bytes = kv.cast<Bytes>();
               memory.base = bytes.mutable_data();
               need(bytes.size() > 0 && size_t(bytes.size()) % memory.block_bytes == 0, "the KV memory must hold whole blocks");
               self->owned_blocks = size_t(bytes.size()) / memory.block_bytes;
             }
             self->kv = memory;
             const Kernels kernels = kernels_for(isa);
             self->executor = std::make_unique<Executor>(s, std::move(all), embedding.linear, norm.data(), head.linear, cos.data(), sin.data(), memory,
                                                         kernels.linear, kernels.ops, num_threads, spin_us, pin);
             return self;
           }),
           py::arg("shape"), py::arg("layers"), py::arg("embedding"), py::arg("norm"), py::arg("head"), py::arg("cos"), py::arg("sin"), py::arg("kv"),
           py::arg("num_blocks") = 0, py::arg("kv_type"), py::arg("isa"), py::arg("num_threads"), py::arg("spin_us"), py::arg("pin"))
      .def("run", &PyExecutor::run, py::arg("rows"), py::arg("taps") = py::tuple(),
           "One forward pass over `Rows`; (best (R,) int32, logits (F, vocab) float32, one (rows, hidden) float32 per `Tap`).")
      .def("probe", &PyExecutor::probe, py::arg("rows"), py::arg("layer"),
           "The layers before `layer` over `Rows`, then that layer's (q (T, heads, D), k (T, kv_heads, D)) float32 after the rotation.")
      .def("sample", &PyExecutor::sample, py::arg("logits"), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"), py::arg("u"))
      .def("best_allowed", &PyExecutor::best_allowed, py::arg("row"), py::arg("mask"),
           "The best token of those with a bit in `mask` (words,) uint32, -1 when there is none; `row`: a wanted one of the last run that was kept.")
      .def("begin_matches", &PyExecutor::begin_matches, py::keep_alive<0, 1>(), pm::BEGIN_MATCHES, py::arg("rows"), py::arg("tokens"), py::arg("positions"),
           py::arg("logits"), py::arg("logit_rows"), py::arg("timeout_s"))
      .def("set_attention", &PyExecutor::set_attention, py::arg("function").none(true),
           "function(layer, q (T, heads, D), k, v (T, kv_heads, D), out (T, heads, D) to fill), float32; stores k and v itself; or a capsule "
           "\"plugmesh.attention.v2\". None for the native one.")
      .def("set_before_layer", &PyExecutor::set_before_layer, py::arg("function").none(true),
           "function(layer), called before every layer and, with num_layers, before the head; or a capsule \"plugmesh.layer.v1\".")
      .def("set_embedding", &PyExecutor::set_embedding, py::arg("function").none(true),
           "function(tokens (T,) int32, x (T, hidden) float32 to fill), or a capsule \"plugmesh.embedding.v1\".")
      .def("all_finite", [](const PyExecutor& self, const std::vector<int>& blocks) { return all_finite(self, blocks); }, py::arg("blocks"))
      .def("close",
           [](PyExecutor& self) {
             if (self.executor) {
               const py::gil_scoped_release release;  // a matcher that is still asked may be Python's
               self.executor->pool().settle();
             }
             self.executor.reset();
           },
           "Ends the threads; the executor must not be running.");

  m.def("kv_block_bytes",
        [](int num_layers, int kv_heads, int head_dim, const std::string& kv_type) {
          KvMemory memory{nullptr, 0, num_layers, kv_heads, head_dim, kv_type == "int8" ? KvType::INT8 : KvType::BF16};
          return memory.layer_bytes() * size_t(num_layers);
        },
        py::arg("num_layers"), py::arg("kv_heads"), py::arg("head_dim"), py::arg("kv_type"));
}
