// Waiting for another thread that is at work.
#pragma once
#include <thread>

namespace pf {

// Between two looks at what is waited for; `spins` counts them.
inline void relax(int spins) {
  if (spins % 4096 == 4095) return std::this_thread::yield();
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace pf
