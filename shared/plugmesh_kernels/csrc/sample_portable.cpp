// Sampling passes for any machine.
#include "sample.h"

#include <limits>

#define PM_ISA portable
#define PM_DOUBLES 2
#define PM_FMA_D(a, b, c) ((a) * (b) + (c))
#include "sample_generic.inc"

namespace pm {
const SamplePasses* sample_portable() {
  static const SamplePasses passes = {"portable", ops_portable(), portable::mass, portable::masses, portable::keep, portable::next_above, portable::forbid};
  return &passes;
}
}  // namespace pm
