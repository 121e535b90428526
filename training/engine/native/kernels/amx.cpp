#include "amx.hpp"

#include <sys/syscall.h>
#include <unistd.h>

namespace kernels::amx {

bool available() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // <asm/prctl.h>, state component
  static const bool granted = __builtin_cpu_supports("amx-bf16") &&
                              __builtin_cpu_supports("avx512bf16") &&
                              __builtin_cpu_supports("avx512vl") &&
                              syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

}  // namespace kernels::amx

extern "C" int tc_available() { return kernels::amx::available(); }
