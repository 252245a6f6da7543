// Linear kernels for AVX2 + FMA + F16C. The integer products are written out; everything else is linear_generic.inc, vectorised by the compiler.
// This file must not use standard library templates (see linear_common.h).
#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#include <immintrin.h>

#include "linear_common.h"

namespace pm {
namespace {

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void save(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
inline __m256i four_bytes(const void* p) {
  int32_t bits;
  memcpy(&bits, p, 4);
  return _mm256_set1_epi32(bits);
}

inline __m256 load_f16(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

#define PM_INLINE inline __attribute__((always_inline))

struct Q4 {
  static constexpr int BYTES = 640;
  struct Piece {
    uint8_t w[16][64];  // one nibble a byte, in the order of K
    __m256 d[4], m[4];  // [2 * group + half of the rows]
  };
  struct Token {
    int8_t q[INPUT_GROUP];
    float scale, sum[2];
  };
  static void pack(const QuantPiece& x, Token& to) {
    memcpy(to.q, x.q, sizeof to.q);
    to.scale = x.scale;
    memcpy(to.sum, x.sum, sizeof to.sum);
  }
  static PM_INLINE void unpack(const uint8_t* bytes, Piece& to) {
    const __m256i mask = _mm256_set1_epi8(15);
    for (int v = 0; v < 8; ++v)
      for (int h = 0; h < 64; h += 32) {
        const __m256i both = load(bytes + 128 + 64 * v + h);
        const int at = v < 4 ? v : v + 4;
        save(to.w[at] + h, _mm256_and_si256(both, mask));
        save(to.w[at + 4] + h, _mm256_and_si256(_mm256_srli_epi16(both, 4), mask));
      }
    for (int i = 0; i < 4; ++i) to.d[i] = load_f16(bytes + 16 * i), to.m[i] = load_f16(bytes + 64 + 16 * i);
  }
  static PM_INLINE void apply(const Piece& w, const Token& x, float* acc) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256 part[2];
    for (int g = 0; g < 2; ++g) {
      // 8 pairs of products of at most 15 * 127 fit 16 bits, so that one widening is enough for a group.
      __m256i sums[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
      for (int v = 8 * g; v < 8 * g + 8; ++v) {
        const __m256i bytes = four_bytes(x.q + 4 * v);
        for (int h = 0; h < 2; ++h) sums[h] = _mm256_add_epi16(sums[h], _mm256_maddubs_epi16(load(w.w[v] + 32 * h), bytes));
      }
      for (int h = 0; h < 2; ++h) {
        const __m256 value = _mm256_cvtepi32_ps(_mm256_madd_epi16(sums[h], ones)), d = w.d[2 * g + h];
        part[h] = g == 0 ? _mm256_mul_ps(value, d) : _mm256_fmadd_ps(value, d, part[h]);
        part[h] = _mm256_fmadd_ps(w.m[2 * g + h], _mm256_set1_ps(x.sum[g]), part[h]);
      }
    }
    for (int h = 0; h < 2; ++h)
      _mm256_storeu_ps(acc + 8 * h, _mm256_fmadd_ps(part[h], _mm256_set1_ps(x.scale), _mm256_loadu_ps(acc + 8 * h)));
  }
};

// maddubs would saturate with weights up to 255, so both sides are widened to 16 bits: of four bytes along K first the even, then the odd ones.
struct Q8 {
  static constexpr int BYTES = 1088;
  struct Piece {
    uint8_t w[32][64];
    __m256 d[4];
  };
  struct Token {
    int16_t q[INPUT_GROUP];
    float scale;
    int32_t init[2];
  };
  static void pack(const QuantPiece& x, Token& to) {
    const int8_t* q = x.q;
    for (int i = 0; i < INPUT_GROUP; i += 4) to.q[i] = q[i], to.q[i + 1] = q[i + 2], to.q[i + 2] = q[i + 1], to.q[i + 3] = q[i + 3];
    to.scale = x.scale;
    memcpy(to.init, x.init, sizeof to.init);
  }
  static PM_INLINE void unpack(const uint8_t* bytes, Piece& to) {
    for (int v = 0; v < 16; ++v)
      for (int h = 0; h < 64; h += 32) {
        const __m256i four = load(bytes + 64 + 64 * v + h);
        save(to.w[2 * v] + h, _mm256_and_si256(four, _mm256_set1_epi16(255)));
        save(to.w[2 * v + 1] + h, _mm256_srli_epi16(four, 8));
      }
    for (int i = 0; i < 4; ++i) to.d[i] = load_f16(bytes + 16 * i);
  }
  static PM_INLINE void apply(const Piece& w, const Token& x, float* acc) {
    __m256 part[2];
    for (int g = 0; g < 2; ++g) {
      __m256i sums[2] = {_mm256_set1_epi32(x.init[g]), _mm256_set1_epi32(x.init[g])};
      for (int v = 16 * g; v < 16 * g + 16; ++v) {
        const __m256i pair = four_bytes(x.q + 2 * v);
        for (int h = 0; h < 2; ++h) sums[h] = _mm256_add_epi32(sums[h], _mm256_madd_epi16(load(w.w[v] + 32 * h), pair));
      }
      for (int h = 0; h < 2; ++h) {
        const __m256 value = _mm256_cvtepi32_ps(sums[h]), d = w.d[2 * g + h];
        part[h] = g == 0 ? _mm256_mul_ps(value, d) : _mm256_fmadd_ps(value, d, part[h]);
      }
    }
    for (int h = 0; h < 2; ++h)
      _mm256_storeu_ps(acc + 8 * h, _mm256_fmadd_ps(part[h], _mm256_set1_ps(x.scale), _mm256_loadu_ps(acc + 8 * h)));
  }
};

template <int U>
PM_INLINE void float_piece(const uint8_t* w, const float* x, size_t stride, float* acc) {
  __m256 sum[U][2];
  for (int u = 0; u < U; ++u) sum[u][0] = _mm256_loadu_ps(acc + ROWS * u), sum[u][1] = _mm256_loadu_ps(acc + ROWS * u + 8);
  for (int v = 0; v < INPUT_GROUP; ++v, w += 64) {
    const __m256 w0 = _mm256_castsi256_ps(load(w)), w1 = _mm256_castsi256_ps(load(w + 32));
    for (int u = 0; u < U; ++u) {
      const __m256 value = _mm256_set1_ps(x[u * stride + v]);
      sum[u][0] = _mm256_fmadd_ps(w0, value, sum[u][0]);
      sum[u][1] = _mm256_fmadd_ps(w1, value, sum[u][1]);
    }
  }
  for (int u = 0; u < U; ++u) _mm256_storeu_ps(acc + ROWS * u, sum[u][0]), _mm256_storeu_ps(acc + ROWS * u + 8, sum[u][1]);
}

template <int U>
PM_INLINE void float_piece(const uint8_t* w, const uint16_t* x, size_t stride, float* acc) {
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  __m256 sum[U][2];
  for (int u = 0; u < U; ++u) sum[u][0] = _mm256_loadu_ps(acc + ROWS * u), sum[u][1] = _mm256_loadu_ps(acc + ROWS * u + 8);
  for (int v = 0; v < INPUT_GROUP; v += 2, w += 64)
    for (int h = 0; h < 2; ++h) {
      const __m256i pairs = load(w + 32 * h);
      const __m256 w0 = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)), w1 = _mm256_castsi256_ps(_mm256_and_si256(pairs, upper));
      for (int u = 0; u < U; ++u) {
        const __m256i pair = four_bytes(x + u * stride + v);
        sum[u][h] = _mm256_fmadd_ps(w0, _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16)), sum[u][h]);
        sum[u][h] = _mm256_fmadd_ps(w1, _mm256_castsi256_ps(_mm256_and_si256(pair, upper)), sum[u][h]);
      }
    }
  for (int u = 0; u < U; ++u) _mm256_storeu_ps(acc + ROWS * u, sum[u][0]), _mm256_storeu_ps(acc + ROWS * u + 8, sum[u][1]);
}

}  // namespace

#include "linear_generic.inc"
#include "linear_row.inc"

const LinearKernels* linear_avx2() {
  static const LinearKernels table = {"avx2", quantize_row, to_bf16_row, linear, dequantize_row};
  return &table;
}

}  // namespace pm

#else
#include "kernels.h"
namespace pm {
const LinearKernels* linear_avx2() { return nullptr; }
}  // namespace pm
#endif
