#include "cpu.h"

#include <stdexcept>

namespace pm {

bool supports(const std::string& isa) {
  if (isa == "portable") return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == "avx512")
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return false;
}

Kernels kernels_for(const std::string& isa) {
  if (!supports(isa)) throw std::invalid_argument("this processor has no kernels for " + isa);
  if (isa == "avx512" && linear_avx512() && ops_avx512()) return {linear_avx512(), ops_avx512(), isa};
  if (isa == "avx2" && linear_avx2() && ops_avx2()) return {linear_avx2(), ops_avx2(), isa};
  if (isa == "portable") return {linear_portable(), ops_portable(), isa};
  throw std::invalid_argument("the kernels were not compiled for " + isa);
}

std::string best_isa() {
  for (const char* isa : {"avx512", "avx2"})
    if (supports(isa)) return isa;
  return "portable";
}

namespace {
std::string& selected() {
  static std::string isa = best_isa();
  return isa;
}
}  // namespace

const std::string& selected_isa() { return selected(); }

void select_isa(const std::string& isa) {
  kernels_for(isa);
  selected() = isa;
}

}  // namespace pm
