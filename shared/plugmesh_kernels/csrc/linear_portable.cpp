// Linear kernels for any machine: vectors of 16 values in the language extension of GCC and Clang, which become whatever registers there are.
// Products are not fused with sums, because fmaf is a slow function where the instruction is missing.
#include "linear_common.h"

namespace pm {
namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

template <class V>
inline V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

// Shifts exponent and mantissa into place and scales away the difference of the exponents' biases.
inline Floats load_f16(const uint8_t* p) {
  const Words h = __builtin_convertvector(load<Halves>(p), Words);
  const Words rest = (h & 0x7fffu) << 13;
  const Words scaled = (Words)((Floats)rest * 5192296858534827628530496329220096.0f);  // 2^112
  const Words special = (Words)(rest >= 0x0f800000u);                                  // infinity and NaN
  return (Floats)(((h & 0x8000u) << 16) | (special & (rest | 0x7f800000u)) | (~special & scaled));
}

// Weights and activations as floats: 32 products of at most 128 * 127 and their sums are exact, and float multiplication is everywhere.
struct Token {
  int16_t q[INPUT_GROUP];
  float scale, sum[2];
};

inline void pack_token(const Input& x, size_t index, Token& to) {
  for (int i = 0; i < INPUT_GROUP; ++i) to.q[i] = x.q[index * INPUT_GROUP + i];
  to.scale = x.scale[index];
  memcpy(to.sum, x.sum + 2 * index, sizeof to.sum);
}

inline Floats dot(const Floats* w, const int16_t* q) {
  Floats even = {}, odd = {};
  for (int k = 0; k < GROUP; k += 2) {
    even += w[k] * static_cast<float>(q[k]);
    odd += w[k + 1] * static_cast<float>(q[k + 1]);
  }
  return even + odd;
}

inline void add_to(float* acc, Floats part, float scale) {
  const Floats sum = part * scale + load<Floats>(acc);
  memcpy(acc, &sum, sizeof sum);
}

struct Q4 {
  static constexpr int BYTES = 640;
  struct Piece {
    Floats w[INPUT_GROUP], d[2], m[2];
  };
  using Token = pm::Token;
  static void pack(const Input& x, size_t index, Token& to) { pack_token(x, index, to); }
  static void unpack(const uint8_t* bytes, Piece& to) {
    for (int v = 0; v < 8; ++v) {
      const Words four = load<Words>(bytes + 128 + 64 * v);
      Floats* out = to.w + GROUP * (v / 4) + 4 * (v % 4);
      for (int i = 0; i < 4; ++i) {
        const Words both = four >> (8 * i);
        out[i] = __builtin_convertvector((both & 15u), Floats);
        out[i + 16] = __builtin_convertvector(((both >> 4) & 15u), Floats);
      }
    }
    for (int g = 0; g < 2; ++g) to.d[g] = load_f16(bytes + 32 * g), to.m[g] = load_f16(bytes + 64 + 32 * g);
  }
  static void apply(const Piece& w, const Token& x, float* acc) {
    Floats part = dot(w.w, x.q) * w.d[0];
    part = w.m[0] * x.sum[0] + part;
    part = dot(w.w + GROUP, x.q + GROUP) * w.d[1] + part;
    part = w.m[1] * x.sum[1] + part;
    add_to(acc, part, x.scale);
  }
};

struct Q8 {
  static constexpr int BYTES = 1088;
  struct Piece {
    Floats w[INPUT_GROUP], d[2];
  };
  using Token = pm::Token;
  static void pack(const Input& x, size_t index, Token& to) { pack_token(x, index, to); }
  static void unpack(const uint8_t* bytes, Piece& to) {
    for (int v = 0; v < 16; ++v) {
      const Words four = load<Words>(bytes + 64 + 64 * v);
      for (int i = 0; i < 4; ++i) to.w[4 * v + i] = __builtin_convertvector(((four >> (8 * i)) & 255u), Floats) - 128.0f;
    }
    for (int g = 0; g < 2; ++g) to.d[g] = load_f16(bytes + 32 * g);
  }
  static void apply(const Piece& w, const Token& x, float* acc) {
    Floats part = dot(w.w, x.q) * w.d[0];
    part = dot(w.w + GROUP, x.q + GROUP) * w.d[1] + part;
    add_to(acc, part, x.scale);
  }
};

template <int U>
inline void float_piece(const uint8_t* w, const float* x, size_t stride, float* acc) {
  for (int u = 0; u < U; ++u) {
    Floats sum = load<Floats>(acc + ROWS * u);
    for (int v = 0; v < INPUT_GROUP; ++v) sum += load<Floats>(w + 64 * v) * x[u * stride + v];
    memcpy(acc + ROWS * u, &sum, sizeof sum);
  }
}

inline float widen(uint16_t bf16) {
  const uint32_t bits = uint32_t(bf16) << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

template <int U>
inline void float_piece(const uint8_t* w, const uint16_t* x, size_t stride, float* acc) {
  for (int u = 0; u < U; ++u) {
    Floats sum = load<Floats>(acc + ROWS * u);
    for (int v = 0; v < INPUT_GROUP / 2; ++v) {
      const Words pairs = load<Words>(w + 64 * v);
      sum += (Floats)(pairs << 16) * widen(x[u * stride + 2 * v]);
      sum += (Floats)(pairs & 0xffff0000u) * widen(x[u * stride + 2 * v + 1]);
    }
    memcpy(acc + ROWS * u, &sum, sizeof sum);
  }
}

}  // namespace

#include "linear_generic.inc"
#include "linear_row.inc"

const LinearKernels* linear_portable() {
  static const LinearKernels table = {"portable", quantize_row, to_bf16_row, linear, dequantize_row};
  return &table;
}

size_t linear_scratch_bytes(int max_kp) {
  return (ROWS * sizeof(float) + static_cast<size_t>(round_up(max_kp, INPUT_GROUP) / INPUT_GROUP) * TOKEN_PIECE_BYTES) * TILE_TOKENS;
}

}  // namespace pm
