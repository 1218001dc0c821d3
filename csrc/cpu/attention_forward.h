// Attention with a prefix: which kernels compute a call, and on which threads. No torch in it.
#pragma once
#include <algorithm>

#include "linear.h"

namespace pf {

// The grain of a run whose items each read so many elements of a cache, in the time of four multiply-adds.
inline int64_t cache_grain(int64_t work_per_item) { return thread_work() / 4 / std::max<int64_t>(work_per_item, 1); }

// With few queries, as in decoding, reading the keys is what takes the time: kernels of their own, and a prefix that
// all rows share is read once for all of them.
void attention_forward(AttentionArgs g, ParallelFor parallel);

}  // namespace pf
