// Sampling passes with AVX2 and FMA.
#include "sample.h"

#include <limits>

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#include <immintrin.h>

#define PM_ISA avx2
#define PM_DOUBLES 4
#define PM_FMA_D(a, b, c) vd(_mm256_fmadd_pd(__m256d(a), __m256d(b), __m256d(c)))
#include "sample_generic.inc"

namespace pm {
const SamplePasses* sample_avx2() {
  static const SamplePasses passes = {"avx2", ops_avx2(), avx2::mass, avx2::masses, avx2::keep, avx2::next_above, avx2::forbid};
  return &passes;
}
}  // namespace pm
#pragma GCC pop_options
#else
namespace pm {
const SamplePasses* sample_avx2() { return nullptr; }
}  // namespace pm
#endif
