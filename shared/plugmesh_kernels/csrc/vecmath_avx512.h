// Exponentials on 512-bit registers. Include after `#pragma GCC target`, inside no namespace, in files of the AVX-512 kind only.
#pragma once
#include <immintrin.h>

namespace pm {
namespace {

constexpr float LOG2E_F = 1.4426950408889634f;

// 2^t, relative error 1.5e-7. The polynomial is a minimax fit on [-0.5, 0.5] with the constant held at 1, so that 2^n is exact. vscalefps does the
// rest: over- and underflow, 2^-inf = 0, 2^inf = inf, NaN stays.
static inline __m512 exp2_ps(__m512 t) {
  const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(t, n);
  __m512 p = _mm512_set1_ps(0.001326472614891827f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.009671512991189957f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.05550733581185341f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.24022242426872253f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.6931470036506653f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// e^x, about 1 ulp: the argument is reduced with ln 2 in two parts. Far out the reduction itself would overflow, hence the bounds; as the second operand
// a NaN gets through them.
static inline __m512 exp_ps(__m512 x) {
  x = _mm512_min_ps(_mm512_set1_ps(110.0f), _mm512_max_ps(_mm512_set1_ps(-110.0f), x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(LOG2E_F)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145751953125f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.428606765330187e-06f), r);
  __m512 p = _mm512_set1_ps(0.001384365139529109f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.00837415736168623f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.04166800156235695f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.16666431725025177f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.4999999403953552f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// e^x for x <= 0 in double, about 1 ulp (Taylor to the 13th power on |r| <= ln(2)/2).
static inline __m512d exp_pd(__m512d x) {
  x = _mm512_max_pd(_mm512_set1_pd(-800.0), x);
  const __m512d n =
      _mm512_roundscale_pd(_mm512_mul_pd(x, _mm512_set1_pd(1.4426950408889634)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512d r = _mm512_fnmadd_pd(n, _mm512_set1_pd(0.693147180369123816490), x);
  r = _mm512_fnmadd_pd(n, _mm512_set1_pd(1.90821492927058770002e-10), r);
  __m512d p = _mm512_set1_pd(1.0 / 6227020800.0);
  p = _mm512_fmadd_pd(p, r, _mm512_set1_pd(1.0 / 479001600.0));
  p = _mm512_fmadd_pd(p, r, _mm512_set1_pd(1.0 / 39916800.0));
  p = _mm512_fmadd_pd(p, r, _mm512_set1_pd(1.0 / 3628800.0));
  p = _mm512_fmadd_pd(p, r, _mm512_set1_pd(1.0 / 362880.0));
  p = _mm512_fmadd_pd(p, r, _mm512_set1_pd(1.0 / 40320.0));
  p = _mm512_fmadd_pd(p, r, _mm512_set1_pd(1.0 / 5040.0));
  p = _mm512_fmadd_pd(p, r, _mm512_set1_pd(1.0 / 720.0));
  p = _mm512_fmadd_pd(p, r, _mm512_set1_pd(1.0 / 120.0));
  p = _mm512_fmadd_pd(p, r, _mm512_set1_pd(1.0 / 24.0));
  p = _mm512_fmadd_pd(p, r, _mm512_set1_pd(1.0 / 6.0));
  p = _mm512_fmadd_pd(p, r, _mm512_set1_pd(0.5));
  p = _mm512_fmadd_pd(p, r, _mm512_set1_pd(1.0));
  p = _mm512_fmadd_pd(p, r, _mm512_set1_pd(1.0));
  return _mm512_scalef_pd(p, n);
}

}  // namespace
}  // namespace pm
