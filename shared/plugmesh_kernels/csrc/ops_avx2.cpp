// The generic kernels with AVX2 and FMA.
#include "attention.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#include <immintrin.h>

#define PM_ISA avx2
#define PM_ISA_NAME "avx2"
#define PM_LANES 8
#define PM_FMA(a, b, c) vf(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)))
#define PM_FMA_1(a, b, c) __builtin_fmaf(a, b, c)
#include "ops_generic.inc"

namespace pm {
const OpsKernels* ops_avx2() { return &avx2::table; }
}  // namespace pm
#pragma GCC pop_options
#else
namespace pm {
const OpsKernels* ops_avx2() { return nullptr; }
}  // namespace pm
#endif
