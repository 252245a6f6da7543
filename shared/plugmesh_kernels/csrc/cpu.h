// Which instruction sets this processor has, and the kernels chosen for it.
#pragma once
#include <string>

#include "kernels.h"

namespace pm {

struct Kernels {
  const LinearKernels* linear;
  const OpsKernels* ops;
  std::string isa;
};

bool supports(const std::string& isa);         // "avx512", "avx2", "portable"; false for any other name
Kernels kernels_for(const std::string& isa);   // throws std::invalid_argument when it is not supported here
std::string best_isa();

// What the module uses: the best one until another is selected.
const std::string& selected_isa();
void select_isa(const std::string& isa);  // throws like kernels_for

}  // namespace pm
