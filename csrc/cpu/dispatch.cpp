// SPDX-License-Identifier: Apache-2.0
// Chooses the kernels of the widest instruction set at the first call.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fe {
#if defined(__x86_64__) && defined(__GNUC__)
namespace avx512 {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
#endif
namespace baseline {
extern const Kernels table;
}

namespace {

constexpr const char* VARIABLE = "FUSED_EWCLORA_CPU_ISA";

const Kernels& choose() {
  const char* variable = std::getenv(VARIABLE);
  const std::string asked = variable ? variable : "";
  const Kernels* candidates[] = {
#if defined(__x86_64__) && defined(__GNUC__)
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl")
          ? &avx512::table
          : nullptr,
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &avx2::table : nullptr,
#endif
      &baseline::table,
  };
  for (const Kernels* table : candidates)
    if (table && (asked.empty() || asked == table->name)) return *table;
  throw std::runtime_error(std::string(VARIABLE) + ": expected avx512, avx2 or baseline that this processor has, got " + asked);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& table = choose();
  return table;
}

}  // namespace fe
