// Attention with a prefix: which kernels compute a call, and on which threads. No torch in it.
#pragma once
#include <algorithm>

#include "linear.h"

namespace pf {

// body(begin, end) over [0, n), on more threads than one where there is work for them.
template <class Body>
void run(ParallelFor parallel, int64_t n, int64_t work_per_item, const Body& body) {
  constexpr int64_t kThreadWork = int64_t{1} << 17;  // elements of a cache, below which one thread is faster
  parallel(n, std::max<int64_t>(kThreadWork / std::max<int64_t>(work_per_item, 1), 1), const_cast<Body*>(&body),
           [](void* ctx, int64_t b, int64_t e) { (*static_cast<const Body*>(ctx))(b, e); });
}

// With few queries, as in decoding, reading the keys is what takes the time: kernels of their own, and a prefix that
// all rows share is read once for all of them.
void attention_forward(AttentionArgs g, ParallelFor parallel);

}  // namespace pf
