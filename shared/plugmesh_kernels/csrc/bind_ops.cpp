// Python's door to the kernels of ops.*, attention.* and sample.*: numpy arrays in, numpy arrays out, one thread, without the GIL.
//
// sample_rows, logprobs_rows, mask_rows and draw_allowed serve the engine; everything that takes `isa` is there for tests and measurements.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind.h"
#include "cpu.h"
#include "sample.h"

namespace py = pybind11;

namespace pm {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;
template <typename T>
using Exact = py::array_t<T, py::array::c_style>;  // changed in place, so a converted copy would be a mistake

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

const OpsKernels& ops(const std::string& isa) { return *kernels_for(isa).ops; }

const SamplePasses& passes(const std::string& isa) { return isa.empty() ? sample_passes() : sample_passes(isa.c_str()); }

struct PyKv {  // a KvMemory over a numpy array of bytes
  Exact<uint8_t> bytes;
  KvMemory kv;
  PyKv(Exact<uint8_t> memory, int num_layers, int kv_heads, int head_dim, bool int8) : bytes(std::move(memory)) {
    require(num_layers > 0 && kv_heads > 0 && head_dim > 0 && head_dim % 2 == 0, "bad KV shape");
    kv = {bytes.mutable_data(), 0, num_layers, kv_heads, head_dim, int8 ? KvType::INT8 : KvType::BF16};
    kv.block_bytes = size_t(num_layers) * kv.layer_bytes();
    require(size_t(bytes.size()) % kv.block_bytes == 0, "memory is not whole blocks");
  }
  int num_blocks() const { return int(size_t(bytes.size()) / kv.block_bytes); }
  void check(int layer, int kv_head) const {
    require(layer >= 0 && layer < kv.num_layers && kv_head >= 0 && kv_head < kv.kv_heads, "layer or KV head out of range");
  }
};

py::array_t<int32_t> sample_rows(Array<float> logits, Array<float> temperature, Array<int32_t> top_k, Array<float> top_p, Array<float> min_p,
                                 Array<double> u, const std::string& isa) {
  require(logits.ndim() == 2, "logits: (R, V)");
  const auto rows = logits.shape(0), n = logits.shape(1);
  require(temperature.size() == rows && top_k.size() == rows && top_p.size() == rows && min_p.size() == rows && u.size() == rows,
          "one temperature, top_k, top_p, min_p and u per row");
  const SamplePasses& pass = passes(isa);
  py::array_t<int32_t> tokens(rows);
  std::vector<float> scratch(static_cast<size_t>(n));
  int32_t* out = tokens.mutable_data();
  py::gil_scoped_release release;
  for (py::ssize_t r = 0; r < rows; ++r)
    out[r] = sample_row_with(pass, logits.data() + r * n, int(n),
                             {temperature.data()[r], top_k.data()[r], top_p.data()[r], min_p.data()[r], u.data()[r]}, scratch.data());
  return tokens;
}

py::tuple logprobs_rows(Array<float> logits, Array<int32_t> tokens, int num_top, const std::string& isa) {
  require(logits.ndim() == 2 && tokens.size() == logits.shape(0) && num_top >= 0, "logits: (R, V), one token per row");
  const auto rows = logits.shape(0), n = logits.shape(1);
  const SamplePasses& pass = passes(isa);
  py::array_t<float> logprob(rows);
  py::array_t<int32_t> ids({rows, py::ssize_t(num_top)});
  py::array_t<float> values({rows, py::ssize_t(num_top)});
  float *lp = logprob.mutable_data(), *v = values.mutable_data();
  int32_t* i = ids.mutable_data();
  {
    py::gil_scoped_release release;
    for (py::ssize_t r = 0; r < rows; ++r)
      logprobs_row_with(pass, logits.data() + r * n, int(n), tokens.data()[r], num_top, lp + r, i + r * num_top, v + r * num_top);
  }
  return py::make_tuple(logprob, ids, values);
}

// Row rows[i] of the logits becomes -infinity where masks[i] has no bit.
void mask_rows(Exact<float> logits, Exact<uint32_t> masks, Array<int32_t> rows, const std::string& isa) {
  require(logits.ndim() == 2 && masks.ndim() == 2, "logits: (R, V), masks: (M, words)");
  const auto num_rows = logits.shape(0), n = logits.shape(1), words = masks.shape(1);
  require(rows.size() == masks.shape(0) && words * 32 >= n, "one row per mask, one bit per token");
  for (py::ssize_t i = 0; i < rows.size(); ++i) require(rows.data()[i] >= 0 && rows.data()[i] < num_rows, "row out of range");
  const SamplePasses& pass = passes(isa);
  float* x = logits.mutable_data();
  const uint32_t* mask = masks.data();
  const int32_t* at = rows.data();
  const auto count = rows.size();
  py::gil_scoped_release release;
  for (py::ssize_t i = 0; i < count; ++i) pass.forbid(x + at[i] * n, int(n), mask + i * words);
}

int draw_allowed(Array<float> logits, Exact<uint32_t> mask, float temperature, double u, const std::string& isa) {
  require(logits.ndim() == 1 && mask.ndim() == 1 && mask.size() * 32 >= logits.size(), "logits: (V,), one bit per token");
  const SamplePasses& pass = passes(isa);
  const float* x = logits.data();
  const uint32_t* bits = mask.data();
  const int n = int(logits.size());
  py::gil_scoped_release release;
  return draw_allowed_with(pass, x, n, bits, temperature, u);
}

py::array_t<float> rms_norm(const std::string& isa, Array<float> x, Array<float> weight, float eps) {
  require(x.ndim() == 2 && weight.size() == x.shape(1), "x: (R, K), weight: (K,)");
  py::array_t<float> out({x.shape(0), x.shape(1)});
  const OpsKernels& o = ops(isa);
  for (py::ssize_t r = 0; r < x.shape(0); ++r)
    o.rms_norm_row(x.data(r, 0), weight.data(), int(x.shape(1)), eps, out.mutable_data(r, 0));
  return out;
}

py::array_t<float> silu_mul(const std::string& isa, Array<float> gate, Array<float> up) {
  require(gate.size() == up.size(), "gate and up of one size");
  py::array_t<float> out(gate.size());
  const OpsKernels& o = ops(isa);
  float* to = out.mutable_data();
  py::gil_scoped_release release;
  o.silu_mul(gate.data(), up.data(), int(gate.size()), to);
  return out;
}

py::array_t<float> rope_head(const std::string& isa, Array<float> x, Array<float> cos, Array<float> sin, bool interleaved) {
  require(x.size() % 2 == 0 && cos.size() == x.size() / 2 && sin.size() == x.size() / 2, "x: (D,), cos and sin: (D/2,)");
  py::array_t<float> out(x.size());
  std::copy(x.data(), x.data() + x.size(), out.mutable_data());
  ops(isa).rope_head(out.mutable_data(), int(x.size()), cos.data(), sin.data(), interleaved);
  return out;
}

py::tuple argmax(const std::string& isa, Array<float> x) {
  float value;
  const int index = ops(isa).argmax(x.data(), int(x.size()), &value);
  return py::make_tuple(index, value);
}

py::array_t<uint8_t> steps_below(const std::string& isa, Array<float> x, float top) {
  py::array_t<uint8_t> out((x.size() + 63) / 64 * 16);
  ops(isa).steps_below(x.data(), int(x.size()), top, out.mutable_data());
  return out;
}

void kv_append(const std::string& isa, PyKv& kv, int layer, int kv_head, int block, int offset, Array<float> k, Array<float> v) {
  kv.check(layer, kv_head);
  require(block >= 0 && block < kv.num_blocks() && offset >= 0 && offset < BLOCK_TOKENS, "block or offset out of range");
  require(k.size() == kv.kv.head_dim && v.size() == kv.kv.head_dim, "k, v: (D,)");
  ops(isa).kv_append(kv.kv, layer, kv_head, block, offset, k.data(), v.data());
}

// q: (rows of the step, heads of the group, D). Returns max (n, group), sum (n, group), out (n, group, D) of rows row0 .. row1.
py::tuple attention_split(const std::string& isa, const PyKv& kv, int layer, int kv_head, Array<int32_t> blocks, int first_row, int num_rows, int position,
                          int row0, int row1, int split, Array<float> q, float scale) {
  kv.check(layer, kv_head);
  require(q.ndim() == 3 && q.shape(2) == kv.kv.head_dim && q.shape(0) >= first_row + num_rows, "q: (rows, group, D)");
  require(first_row >= 0 && position >= 0 && 0 <= row0 && row0 <= row1 && row1 <= num_rows && split >= 0, "bad rows");
  require(blocks.size() * BLOCK_TOKENS >= position + num_rows, "too few blocks");
  for (py::ssize_t i = 0; i < blocks.size(); ++i) require(blocks.at(i) >= 0 && blocks.at(i) < kv.num_blocks(), "block out of range");
  const int group = int(q.shape(1)), n = row1 - row0, dim = kv.kv.head_dim;
  const OpsKernels& o = ops(isa);
  py::array_t<float> max({n, group}), sum({n, group}), out({n, group, dim});
  std::vector<uint8_t> scratch(attention_scratch_bytes(n, group, dim));
  const SequenceRows seq{first_row, num_rows, position, blocks.data()};
  float *m = max.mutable_data(), *s = sum.mutable_data(), *to = out.mutable_data();
  {
    py::gil_scoped_release release;
    o.attention_split(kv.kv, layer, kv_head, 1, group, seq, row0, row1, split, q.data(), size_t(group) * size_t(dim), scale, m, s, to, 0, scratch.data());
  }
  return py::make_tuple(max, sum, out);
}

void attention_merge(const std::string& isa, Exact<float> acc_max, Exact<float> acc_sum, Exact<float> acc_out, Array<float> max, Array<float> sum,
                     Array<float> out) {
  const int n = int(max.size());
  require(n > 0 && acc_max.size() == n && acc_sum.size() == n && sum.size() == n && out.size() == acc_out.size() && out.size() % n == 0, "shapes differ");
  ops(isa).attention_merge(acc_max.mutable_data(), acc_sum.mutable_data(), acc_out.mutable_data(), max.data(), sum.data(), out.data(), n,
                           int(out.size() / n));
}

py::array_t<float> attention_finish(const std::string& isa, Array<float> sum, Array<float> out) {
  const int n = int(sum.size());
  require(n > 0 && out.size() % n == 0, "shapes differ");
  const int dim = int(out.size() / n);
  py::array_t<float> y(std::vector<py::ssize_t>{n, dim});
  for (int i = 0; i < n; ++i) ops(isa).attention_finish(sum.data() + i, out.data() + size_t(i) * size_t(dim), dim, y.mutable_data(i, 0));
  return y;
}

}  // namespace
}  // namespace pm

void bind_ops(py::module_& m) {
  using namespace py::literals;
  using namespace pm;
  m.def("sample_rows", sample_rows, "One token per row of logits; -1 for a row without a finite maximum.", "logits"_a, "temperature"_a, "top_k"_a, "top_p"_a,
        "min_p"_a, "u"_a, "isa"_a = "");
  m.def("logprobs_rows", logprobs_rows, "Log-probability of each row's token, and ids and log-probabilities of the best.", "logits"_a, "tokens"_a,
        "num_top"_a, "isa"_a = "");
  m.def("draw_allowed", draw_allowed, "A token of those with a bit, as sample_rows draws one; -1 when none has a finite logit.", "logits"_a, "mask"_a.noconvert(),
        "temperature"_a, "u"_a, "isa"_a = "");
  m.def("mask_rows", mask_rows, "Sets the logits of tokens without a bit to -infinity, in place.", "logits"_a.noconvert(), "masks"_a.noconvert(), "rows"_a,
        "isa"_a = "");
  py::class_<PyKv>(m, "KvArray")
      .def(py::init<Exact<uint8_t>, int, int, int, bool>(), "memory"_a.noconvert(), "num_layers"_a, "kv_heads"_a, "head_dim"_a, "int8"_a)
      .def_static(
          "block_bytes",
          [](int num_layers, int kv_heads, int head_dim, bool int8) {
            const KvMemory kv{nullptr, 0, num_layers, kv_heads, head_dim, int8 ? KvType::INT8 : KvType::BF16};
            return size_t(num_layers) * kv.layer_bytes();
          },
          "num_layers"_a, "kv_heads"_a, "head_dim"_a, "int8"_a);
  m.def("rms_norm", rms_norm, "isa"_a, "x"_a, "weight"_a, "eps"_a);
  m.def("silu_mul", silu_mul, "isa"_a, "gate"_a, "up"_a);
  m.def("rope_head", rope_head, "isa"_a, "x"_a, "cos"_a, "sin"_a, "interleaved"_a);
  m.def("argmax", argmax, "isa"_a, "x"_a);
  m.def("steps_below", steps_below, "isa"_a, "x"_a, "top"_a);
  m.def("kv_append", kv_append, "isa"_a, "kv"_a, "layer"_a, "kv_head"_a, "block"_a, "offset"_a, "k"_a, "v"_a);
  m.def("attention_split", attention_split, "isa"_a, "kv"_a, "layer"_a, "kv_head"_a, "blocks"_a, "first_row"_a, "num_rows"_a, "position"_a, "row0"_a,
        "row1"_a, "split"_a, "q"_a, "scale"_a);
  m.def("attention_merge", attention_merge, "isa"_a, "acc_max"_a.noconvert(), "acc_sum"_a.noconvert(), "acc_out"_a.noconvert(), "max"_a, "sum"_a, "out"_a);
  m.def("attention_finish", attention_finish, "isa"_a, "sum"_a, "out"_a);
}
