// The generic kernels for any machine, and what all instruction sets share.
#include "attention.h"

#define PM_ISA portable
#define PM_ISA_NAME "portable"
#define PM_LANES 4
#define PM_FMA(a, b, c) ((a) * (b) + (c))
#define PM_FMA_1(a, b, c) ((a) * (b) + (c))
#include "ops_generic.inc"

namespace pm {

const OpsKernels* ops_portable() { return &portable::table; }

size_t attention_scratch_bytes(int max_rows, int group, int head_dim) {
  const size_t pairs = size_t(round_up(max_rows * group, 16));
  return 64 + pairs * (attention_q_stride(head_dim) + 64 + 12) + attention_v_bytes(head_dim);
}

}  // namespace pm
