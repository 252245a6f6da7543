// The passes over a row of logits that sampling is made of, per instruction set.
#pragma once
#include "kernels.h"

namespace pm {

struct SamplePasses {
  const char* isa;
  const OpsKernels* ops;
  // Sum of exp((x[i] - top) * inverse_t) over x[i] >= floor, in double. top is the row's maximum.
  double (*mass)(const float* x, int n, float top, double inverse_t, float floor);
  // out[i] = exp((x[i] - top) * inverse_t) where x[i] >= floor, else 0.
  void (*masses)(const float* x, int n, float top, double inverse_t, float floor, double* out);
  // Copies the values >= floor in order; returns how many. `out` may be x.
  int (*keep)(const float* x, int n, float floor, float* out);
  // Index of the first value > floor from `begin` on, or n.
  int (*next_above)(const float* x, int begin, int n, float floor);
  // x[i] = -infinity where bit i % 32 of mask[i / 32] is 0. What is allowed is not written.
  void (*forbid)(float* x, int n, const uint32_t* mask);
};

const SamplePasses* sample_avx512();  // nullptr where the architecture lacks it
const SamplePasses* sample_avx2();
const SamplePasses* sample_portable();
const SamplePasses& sample_passes();                 // of the instruction set in use (cpu.h)
const SamplePasses& sample_passes(const char* isa);  // throws std::invalid_argument when the CPU lacks it

int sample_row_with(const SamplePasses& pass, const float* logits, int n, const SampleParams& p, float* scratch);
// A token of those with a bit in `mask`, as sample_row_with draws one without filters; -1 when none has a finite logit.
int draw_allowed_with(const SamplePasses& pass, const float* logits, int n, const uint32_t* mask, float temperature, double u);
void logprobs_row_with(const SamplePasses& pass, const float* logits, int n, int token, int num_top, float* token_logprob, int* top_ids,
                       float* top_values);

}  // namespace pm
