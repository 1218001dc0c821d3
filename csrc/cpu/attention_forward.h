// Attention with a prefix: which kernels compute a call, and on which threads. No torch in it.
#pragma once
#include <algorithm>

#include "linear.h"

namespace pf {

// The grain of a run whose items each read so many elements of a cache.
inline int64_t cache_grain(int64_t work_per_item) {
  constexpr int64_t kThreadWork = int64_t{1} << 17;  // below which one thread is faster
  return kThreadWork / std::max<int64_t>(work_per_item, 1);
}

// With few queries, as in decoding, reading the keys is what takes the time: kernels of their own, and a prefix that
// all rows share is read once for all of them.
void attention_forward(AttentionArgs g, ParallelFor parallel);

}  // namespace pf
