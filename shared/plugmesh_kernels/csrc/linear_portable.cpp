// Linear kernels for any machine: vectors of 4 values in the language extension of GCC and Clang, which are the registers of SSE2 and NEON.
// Products are not fused with sums, because fmaf is a slow function where the instruction is missing.
#include "linear_common.h"

namespace pm {
namespace {

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
constexpr int LANES = 4, VECTORS = ROWS / LANES;

#define PM_INLINE inline __attribute__((always_inline))

template <class V>
PM_INLINE V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
PM_INLINE void save(float* p, Floats v) { memcpy(p, &v, sizeof v); }
PM_INLINE Floats floats(Ints v) { return __builtin_convertvector(v, Floats); }

// Shifts exponent and mantissa into place and scales away the difference of the exponents' biases.
PM_INLINE Floats load_f16(const uint8_t* p) {
  uint16_t half[LANES];
  memcpy(half, p, sizeof half);
  const Ints h = {half[0], half[1], half[2], half[3]};
  const Ints rest = (h & 0x7fff) << 13;
  const Ints scaled = (Ints)((Floats)rest * 5192296858534827628530496329220096.0f);  // 2^112
  const Ints special = rest >= 0x0f800000;                                          // infinity and NaN
  return (Floats)(((h & 0x8000) << 16) | (special & (rest | 0x7f800000)) | (~special & scaled));
}

struct PlainToken {
  int8_t q[INPUT_GROUP];
  float scale, sum[2];
};

// Integer weights as floats: 32 products of at most 128 * 127 and their sums are exact, and float multiplication is everywhere.
template <int MINIMA>
struct PlainPiece {
  Floats w[INPUT_GROUP][VECTORS], d[2][VECTORS], m[MINIMA][VECTORS];

  static void pack(const QuantPiece& x, PlainToken& to) {
    memcpy(to.q, x.q, sizeof to.q);
    to.scale = x.scale;
    memcpy(to.sum, x.sum, sizeof to.sum);
  }

  void load_scales(const uint8_t* bytes) {
    for (int g = 0; g < 2; ++g)
      for (int h = 0; h < VECTORS; ++h) {
        d[g][h] = load_f16(bytes + 32 * g + 2 * LANES * h);
        if (MINIMA) m[g][h] = load_f16(bytes + 64 + 32 * g + 2 * LANES * h);
      }
  }

  PM_INLINE void apply(const PlainToken& x, float* acc) const {
    float q[INPUT_GROUP];
    for (int k = 0; k < INPUT_GROUP; ++k) q[k] = x.q[k];
    Floats part[VECTORS];
    for (int g = 0; g < 2; ++g) {
      Floats sum[VECTORS] = {};
      for (int k = GROUP * g; k < GROUP * g + GROUP; ++k)
        for (int h = 0; h < VECTORS; ++h) sum[h] += w[k][h] * q[k];
      for (int h = 0; h < VECTORS; ++h) {
        part[h] = g == 0 ? sum[h] * d[g][h] : sum[h] * d[g][h] + part[h];
        if (MINIMA) part[h] = m[g][h] * x.sum[g] + part[h];
      }
    }
    for (int h = 0; h < VECTORS; ++h) save(acc + LANES * h, part[h] * x.scale + load<Floats>(acc + LANES * h));
  }
};

struct Q4 {
  static constexpr int BYTES = 640;
  using Piece = PlainPiece<2>;
  using Token = PlainToken;
  static void pack(const QuantPiece& x, Token& to) { Piece::pack(x, to); }
  static void unpack(const uint8_t* bytes, Piece& to) {
    for (int v = 0; v < 8; ++v)
      for (int h = 0; h < VECTORS; ++h) {
        const Ints four = load<Ints>(bytes + 128 + 64 * v + 16 * h);
        const int k = GROUP * (v / 4) + 4 * (v % 4);
        for (int i = 0; i < 4; ++i) {
          to.w[k + i][h] = floats((four >> (8 * i)) & 15);
          to.w[k + i + 16][h] = floats((four >> (8 * i + 4)) & 15);
        }
      }
    to.load_scales(bytes);
  }
  static PM_INLINE void apply(const Piece& w, const Token& x, float* acc) { w.apply(x, acc); }
};

struct Q8 {
  static constexpr int BYTES = 1088;
  using Piece = PlainPiece<0>;
  using Token = PlainToken;
  static void pack(const QuantPiece& x, Token& to) { Piece::pack(x, to); }
  static void unpack(const uint8_t* bytes, Piece& to) {
    for (int v = 0; v < 16; ++v)
      for (int h = 0; h < VECTORS; ++h) {
        const Ints four = load<Ints>(bytes + 64 + 64 * v + 16 * h);
        for (int i = 0; i < 4; ++i) to.w[4 * v + i][h] = floats(((four >> (8 * i)) & 255) - 128);
      }
    to.load_scales(bytes);
  }
  static PM_INLINE void apply(const Piece& w, const Token& x, float* acc) { w.apply(x, acc); }
};

template <int U>
PM_INLINE void float_piece(const uint8_t* w, const float* x, size_t stride, float* acc) {
  for (int u = 0; u < U; ++u) {
    Floats sum[VECTORS];
    for (int h = 0; h < VECTORS; ++h) sum[h] = load<Floats>(acc + ROWS * u + LANES * h);
    for (int v = 0; v < INPUT_GROUP; ++v)
      for (int h = 0; h < VECTORS; ++h) sum[h] += load<Floats>(w + 64 * v + 16 * h) * x[u * stride + v];
    for (int h = 0; h < VECTORS; ++h) save(acc + ROWS * u + LANES * h, sum[h]);
  }
}

PM_INLINE float widen(uint16_t bf16) {
  const uint32_t bits = uint32_t(bf16) << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

template <int U>
PM_INLINE void float_piece(const uint8_t* w, const uint16_t* x, size_t stride, float* acc) {
  for (int u = 0; u < U; ++u) {
    Floats sum[VECTORS];
    for (int h = 0; h < VECTORS; ++h) sum[h] = load<Floats>(acc + ROWS * u + LANES * h);
    for (int v = 0; v < INPUT_GROUP / 2; ++v) {
      const float x0 = widen(x[u * stride + 2 * v]), x1 = widen(x[u * stride + 2 * v + 1]);
      for (int h = 0; h < VECTORS; ++h) {
        const Ints pairs = load<Ints>(w + 64 * v + 16 * h);
        sum[h] += (Floats)(pairs << 16) * x0;
        sum[h] += (Floats)(pairs & ~0xffff) * x1;
      }
    }
    for (int h = 0; h < VECTORS; ++h) save(acc + ROWS * u + LANES * h, sum[h]);
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
