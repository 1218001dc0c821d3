// Torch's threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>

#include "spin.h"

namespace pf {

// body(begin, end) over [0, n) in chunks of at least `grain`, the first by the caller, who then stays awake until the
// others have come too: where OpenMP's threads sleep (OMP_WAIT_POLICY=PASSIVE), one that waits at the end of a region
// does, and to be woken there costs as much as it costs to wake the others (4096 x 4096, two threads, 4 rows: 190 us
// for 233, 16 rows: 610 for 660). Others that take more than a millisecond longer are left to OpenMP.
template <class Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  constexpr int kPatience = 1 << 15;
  if (n <= grain) return body(0, n);
  std::atomic<int64_t> left{n};
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    struct Arrival {  // also when the body throws
      std::atomic<int64_t>& left;
      const int64_t begin, end;
      ~Arrival() {
        left.fetch_sub(end - begin, std::memory_order_release);
        for (int spins = 0; begin == 0 && spins < kPatience && left.load(std::memory_order_acquire) > 0; ++spins)
          relax(spins);
      }
    } const arrival{left, begin, end};
    body(begin, end);
  });
}

// The same as a ParallelFor.
inline void parallel(int64_t n, int64_t grain, void* ctx, void (*body)(void*, int64_t, int64_t)) {
  parallel_for(n, grain, [&](int64_t begin, int64_t end) { body(ctx, begin, end); });
}

}  // namespace pf
