#include "tiles.hpp"

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kernels::tiles {

bool available() {
#ifdef __AMX_BF16__
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // <asm/prctl.h>, state component
  static const bool granted = __builtin_cpu_supports("amx-bf16") &&
                              __builtin_cpu_supports("avx512bf16") &&
                              __builtin_cpu_supports("avx512vl") &&
                              syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  bool supported = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl");
#ifdef __AVX512BF16__
  supported = supported && __builtin_cpu_supports("avx512bf16");
#endif
  return supported;
#endif
}

}  // namespace kernels::tiles

extern "C" int tc_available() { return kernels::tiles::available(); }
