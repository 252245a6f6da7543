// The linear kernels for Python's tests and measurements: one call is one kernel call on numpy buffers, in an instruction set of choice.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind.h"
#include "cpu.h"
#include "kernels.h"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Scratch memory of exactly the size that the kernels ask for, so that a sanitizer sees what lies beyond.
std::unique_ptr<void, Free> scratch_for(int kp) {
  const size_t bytes = (pm::linear_scratch_bytes(kp) + 63) / 64 * 64;
  return std::unique_ptr<void, Free>(std::aligned_alloc(64, bytes ? bytes : 64));
}

pm::Weight weight_of(int type, int n, int k, const Array<uint8_t>& data, const std::optional<Array<float>>& bias) {
  if (type < 0 || type > 3 || n < 0 || k < 0) throw std::invalid_argument("no such weight");
  const pm::Weight w{static_cast<pm::WeightType>(type), n, k, data.data(), bias ? bias->data() : nullptr};
  const size_t bytes = static_cast<size_t>(w.row_blocks()) * w.row_block_bytes();
  if (static_cast<size_t>(data.size()) != bytes) throw std::invalid_argument("the weight has " + std::to_string(bytes) + " bytes");
  if (bias && bias->size() != n) throw std::invalid_argument("bias: (n,)");
  return w;
}

// Activations in all encodings, made by the instruction set's own kernels.
struct Encoded {
  int t, k, kp;
  Array<int8_t> q;
  Array<float> scale, sum;
  Array<int32_t> init;
  Array<uint16_t> bf16;
  Array<float> f32;
  std::vector<pm::QuantPiece> pieces;

  Encoded(const std::string& isa, const Array<float>& x) {
    if (x.ndim() != 2) throw std::invalid_argument("x: (tokens, k)");
    const pm::LinearKernels* kernels = pm::kernels_for(isa).linear;
    t = static_cast<int>(x.shape(0)), k = static_cast<int>(x.shape(1)), kp = pm::round_up(k, pm::INPUT_GROUP);
    const ssize_t count = kp / pm::INPUT_GROUP;
    pieces.resize(static_cast<size_t>(count * t));
    q = Array<int8_t>({t, kp}), scale = Array<float>({ssize_t(t), count}), sum = Array<float>({ssize_t(t), 2 * count});
    init = Array<int32_t>({ssize_t(t), 2 * count}), bf16 = Array<uint16_t>({t, kp}), f32 = Array<float>({t, kp});
    for (ssize_t i = 0; i < t; ++i) {
      const float* row = x.data() + i * k;
      kernels->quantize_row(row, k, pieces.data() + i, static_cast<size_t>(t));
      for (ssize_t p = 0; p < count; ++p) {
        const pm::QuantPiece& piece = pieces[static_cast<size_t>(p * t + i)];
        std::copy(piece.q, piece.q + pm::INPUT_GROUP, q.mutable_data() + i * kp + p * pm::INPUT_GROUP);
        scale.mutable_data()[i * count + p] = piece.scale;
        std::copy(piece.sum, piece.sum + 2, sum.mutable_data() + 2 * (i * count + p));
        std::copy(piece.init, piece.init + 2, init.mutable_data() + 2 * (i * count + p));
      }
      kernels->to_bf16_row(row, k, kp, bf16.mutable_data() + i * kp);
      float* out = f32.mutable_data() + i * kp;
      std::fill(std::copy(row, row + k, out), out + kp, 0.0f);
    }
  }

  pm::Input input() {
    return {t, k, pieces.data(), static_cast<size_t>(t), bf16.mutable_data(), f32.mutable_data()};
  }
};

void linear(const std::string& isa, int type, int n, int k, const Array<uint8_t>& data, Encoded& x, Array<float> y, const std::optional<Array<float>>& bias,
            int block0, int block1, bool add, int repeat) {
  const pm::Weight w = weight_of(type, n, k, data, bias);
  const pm::LinearKernels* kernels = pm::kernels_for(isa).linear;
  if (x.k != k) throw std::invalid_argument("x has another k");
  if (y.ndim() != 2 || y.shape(0) < x.t || (x.t > 0 && y.shape(1) < n)) throw std::invalid_argument("y: (tokens, n or more)");
  if (block0 < 0 || block1 > w.row_blocks()) throw std::invalid_argument("no such row blocks");
  const auto scratch = scratch_for(w.kp());
  const pm::Input input = x.input();
  float* out = y.mutable_data();
  const size_t ldy = static_cast<size_t>(y.shape(1));
  py::gil_scoped_release release;
  for (int i = 0; i < repeat; ++i) kernels->linear(w, input, block0, block1, out, ldy, add, scratch.get());
}

Array<float> dequantize_row(const std::string& isa, int type, int n, int k, const Array<uint8_t>& data, int row) {
  const pm::Weight w = weight_of(type, n, k, data, std::nullopt);
  if (row < 0 || row >= n) throw std::out_of_range("row");
  Array<float> out(k);
  pm::kernels_for(isa).linear->dequantize_row(w, row, out.mutable_data());
  return out;
}

}  // namespace

void bind_linear(py::module_& m) {
  py::class_<Encoded>(m, "LinearInput", "Rows of activations in the encodings that weights want; padded to a multiple of 64.")
      .def(py::init<const std::string&, const Array<float>&>(), py::arg("isa"), py::arg("x"))
      .def_readonly("q", &Encoded::q)
      .def_readonly("scale", &Encoded::scale)
      .def_readonly("sum", &Encoded::sum)
      .def_readonly("init", &Encoded::init)
      .def_readonly("bf16", &Encoded::bf16)
      .def_readonly("f32", &Encoded::f32);
  m.def("linear", &linear, "Row blocks [block0, block1) of x @ w.T + bias into y, in place; the GIL is released.", py::arg("isa"), py::arg("type"),
        py::arg("n"), py::arg("k"), py::arg("data").noconvert(), py::arg("x"), py::arg("y").noconvert(), py::kw_only(), py::arg("bias") = py::none(),
        py::arg("block0"), py::arg("block1"), py::arg("add") = false, py::arg("repeat") = 1);
  m.def("dequantize_row", &dequantize_row, "One row of a weight as floats.", py::arg("isa"), py::arg("type"), py::arg("n"), py::arg("k"),
        py::arg("data").noconvert(), py::arg("row"));
}
