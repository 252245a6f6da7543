// Elementwise kernels and argmax with AVX-512.
#include "attention.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx512vbmi,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")
#include "vecmath_avx512.h"

namespace pm {
namespace avx512 {
namespace {

static inline __mmask16 lanes_of(int left) { return left >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << left) - 1); }

static void rms_norm_row(const float* x, const float* weight, int k, float eps, float* out) {
  __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  int i = 0;
  for (; i + 64 <= k; i += 64)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512 v = _mm512_loadu_ps(x + i + 16 * j);
      sum[j] = _mm512_fmadd_ps(v, v, sum[j]);
    }
  for (; i < k; i += 16) {
    const __m512 v = _mm512_maskz_loadu_ps(lanes_of(k - i), x + i);
    sum[0] = _mm512_fmadd_ps(v, v, sum[0]);
  }
  const float total = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
  const __m512 factor = _mm512_set1_ps(1.0f / __builtin_sqrtf(total / float(k) + eps));
  for (i = 0; i < k; i += 16) {
    const __mmask16 m = lanes_of(k - i);
    _mm512_mask_storeu_ps(out + i, m, _mm512_mul_ps(_mm512_mul_ps(_mm512_maskz_loadu_ps(m, x + i), factor), _mm512_maskz_loadu_ps(m, weight + i)));
  }
}

static inline __m512 silu(__m512 x) {
  const __m512 e = exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), x));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

static void silu_mul(const float* gate, const float* up, int n, float* out) {
  int i = 0;
  for (; i + 16 <= n; i += 16) _mm512_storeu_ps(out + i, _mm512_mul_ps(silu(_mm512_loadu_ps(gate + i)), _mm512_loadu_ps(up + i)));
  if (i < n) {
    const __mmask16 m = lanes_of(n - i);
    _mm512_mask_storeu_ps(out + i, m, _mm512_mul_ps(silu(_mm512_maskz_loadu_ps(m, gate + i)), _mm512_maskz_loadu_ps(m, up + i)));
  }
}

static void rope_head(float* x, int head_dim, const float* cos, const float* sin, bool interleaved) {
  const int half = head_dim / 2;
  if (!interleaved) {
    for (int i = 0; i < half; i += 16) {
      const __mmask16 m = lanes_of(half - i);
      const __m512 a = _mm512_maskz_loadu_ps(m, x + i), b = _mm512_maskz_loadu_ps(m, x + half + i);
      const __m512 c = _mm512_maskz_loadu_ps(m, cos + i), s = _mm512_maskz_loadu_ps(m, sin + i);
      _mm512_mask_storeu_ps(x + i, m, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
      _mm512_mask_storeu_ps(x + half + i, m, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
    }
    return;
  }
  const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  for (int i = 0; i < head_dim; i += 16) {
    const __mmask16 m = lanes_of(head_dim - i), h = lanes_of((head_dim - i) / 2 < 8 ? (head_dim - i) / 2 : 8);
    const __m512 v = _mm512_maskz_loadu_ps(m, x + i), swapped = _mm512_permute_ps(v, 0xB1);
    const __m512 c = _mm512_permutexvar_ps(twice, _mm512_maskz_loadu_ps(h, cos + i / 2));
    const __m512 s = _mm512_permutexvar_ps(twice, _mm512_maskz_loadu_ps(h, sin + i / 2));
    _mm512_mask_storeu_ps(x + i, m, _mm512_fmaddsub_ps(v, c, _mm512_mul_ps(swapped, s)));
  }
}

static int argmax(const float* x, int n, float* value) {
  const __m512 lowest = _mm512_set1_ps(-__builtin_inff());
  __m512 top[4] = {lowest, lowest, lowest, lowest};
  __mmask16 nan = 0;
  int i = 0;
  for (; i + 64 <= n; i += 64)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512 v = _mm512_loadu_ps(x + i + 16 * j);
      nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
      top[j] = _mm512_max_ps(top[j], v);
    }
  for (; i < n; i += 16) {
    const __m512 v = _mm512_mask_loadu_ps(lowest, lanes_of(n - i), x + i);
    nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    top[0] = _mm512_max_ps(top[0], v);
  }
  const float best = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(top[0], top[1]), _mm512_max_ps(top[2], top[3])));
  *value = nan ? __builtin_nanf("") : best;
  if (nan || !(best > -__builtin_inff() && best < __builtin_inff())) return -1;
  const __m512 wanted = _mm512_set1_ps(best);
  for (i = 0; i < n; i += 16) {
    const __mmask16 hit = _mm512_mask_cmp_ps_mask(lanes_of(n - i), _mm512_maskz_loadu_ps(lanes_of(n - i), x + i), wanted, _CMP_EQ_OQ);
    if (hit) return i + __builtin_ctz(hit);
  }
  return -1;
}

static void steps_below(const float* x, int n, float top, uint8_t* out) {
  const __m512 t = _mm512_set1_ps(top), eight = _mm512_set1_ps(8.0f), most = _mm512_set1_ps(255.0f), lowest = _mm512_set1_ps(-__builtin_inff());
  for (int i = 0; i < n; i += 64, out += 16) {
    __m512 v[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const int left = n - i - 16 * j;
      v[j] = left >= 16 ? _mm512_loadu_ps(x + i + 16 * j) : left > 0 ? _mm512_mask_loadu_ps(lowest, lanes_of(left), x + i + 16 * j) : lowest;
    }
    const __m512 largest = _mm512_max_ps(_mm512_max_ps(v[0], v[1]), _mm512_max_ps(v[2], v[3]));
    const __m512 below = _mm512_min_ps(_mm512_mul_ps(_mm512_sub_ps(t, largest), eight), most);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtusepi32_epi8(_mm512_cvttps_epi32(below)));
  }
}

static const OpsKernels table = {"avx512",         rms_norm_row,    silu_mul,         rope_head, kv_append,
                                 attention_split, attention_merge, attention_finish, argmax,    steps_below};

}  // namespace
}  // namespace avx512

const OpsKernels* ops_avx512() { return &avx512::table; }
}  // namespace pm
#pragma GCC pop_options
#else
namespace pm {
const OpsKernels* ops_avx512() { return nullptr; }
}  // namespace pm
#endif
