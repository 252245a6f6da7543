// Sampling passes with AVX-512.
#include "sample.h"

#include <limits>

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx512vbmi,avx2,fma,f16c,bmi,bmi2,popcnt,prefer-vector-width=512")
#include "vecmath_avx512.h"

namespace pm {
namespace avx512 {
namespace {

static inline __mmask16 lanes_of(int left) { return left >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << left) - 1); }

static inline __m512d exp_of(__m256 x, __m512d top, __m512d inverse_t) { return exp_pd(_mm512_mul_pd(_mm512_sub_pd(_mm512_cvtps_pd(x), top), inverse_t)); }

static double mass(const float* x, int n, float top, double inverse_t, float floor) {
  const __m512d t = _mm512_set1_pd(top), inv = _mm512_set1_pd(inverse_t);
  const __m512 limit = _mm512_set1_ps(floor);
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
  for (int i = 0; i < n; i += 16) {
    const __mmask16 in = lanes_of(n - i);
    const __m512 v = _mm512_maskz_loadu_ps(in, x + i);
    const __mmask16 keep = _mm512_mask_cmp_ps_mask(in, v, limit, _CMP_GE_OQ);
    if (!keep) continue;
    low = _mm512_mask_add_pd(low, __mmask8(keep), low, exp_of(_mm512_castps512_ps256(v), t, inv));
    high = _mm512_mask_add_pd(high, __mmask8(keep >> 8), high, exp_of(_mm512_extractf32x8_ps(v, 1), t, inv));
  }
  return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
}

static void masses(const float* x, int n, float top, double inverse_t, float floor, double* out) {
  const __m512d t = _mm512_set1_pd(top), inv = _mm512_set1_pd(inverse_t);
  for (int i = 0; i < n; i += 8) {
    const __mmask8 in = __mmask8(lanes_of(n - i));
    const __m256 v = _mm256_maskz_loadu_ps(in, x + i);
    const __mmask8 keep = _mm256_mask_cmp_ps_mask(in, v, _mm256_set1_ps(floor), _CMP_GE_OQ);
    _mm512_mask_storeu_pd(out + i, in, _mm512_maskz_mov_pd(keep, exp_of(v, t, inv)));
  }
}

static int keep(const float* x, int n, float floor, float* out) {
  int count = 0;
  for (int i = 0; i < n; i += 16) {
    const __mmask16 in = lanes_of(n - i);
    const __m512 v = _mm512_maskz_loadu_ps(in, x + i);
    const __mmask16 wanted = _mm512_mask_cmp_ps_mask(in, v, _mm512_set1_ps(floor), _CMP_GE_OQ);
    if (!wanted) continue;
    // Compressed in a register: compressing stores are slow on Zen 4. Lanes beyond the kept ones are not stored.
    const int num = __builtin_popcount(wanted);
    _mm512_mask_storeu_ps(out + count, lanes_of(num), _mm512_maskz_compress_ps(wanted, v));
    count += num;
  }
  return count;
}

static int next_above(const float* x, int begin, int n, float floor) {
  for (int i = begin; i < n; i += 16) {
    const __mmask16 in = lanes_of(n - i);
    const __mmask16 hit = _mm512_mask_cmp_ps_mask(in, _mm512_maskz_loadu_ps(in, x + i), _mm512_set1_ps(floor), _CMP_GT_OQ);
    if (hit) return i + __builtin_ctz(hit);
  }
  return n;
}

static void forbid(float* x, int n, const uint32_t* mask) {
  const __m512 minus_infinity = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (int i = 0; i < n; i += 32) {
    const uint32_t no = ~mask[i / 32];
    if (!no) continue;
    if (const __mmask16 low = __mmask16(no) & lanes_of(n - i)) _mm512_mask_storeu_ps(x + i, low, minus_infinity);
    if (n - i <= 16) break;
    if (const __mmask16 high = __mmask16(no >> 16) & lanes_of(n - i - 16)) _mm512_mask_storeu_ps(x + i + 16, high, minus_infinity);
  }
}

}  // namespace
}  // namespace avx512

const SamplePasses* sample_avx512() {
  static const SamplePasses passes = {"avx512", ops_avx512(), avx512::mass, avx512::masses, avx512::keep, avx512::next_above, avx512::forbid};
  return &passes;
}
}  // namespace pm
#pragma GCC pop_options
#else
namespace pm {
const SamplePasses* sample_avx512() { return nullptr; }
}  // namespace pm
#endif
