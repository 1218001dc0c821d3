// Copying many tensors at once, by all threads.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "tensors.h"
#include "threads.h"

namespace {

using pf::tensors::Tensor;

// memcpy that bypasses the caches: many pieces together are larger than these, and nobody reads them soon.
void stream(char* into, const char* from, int64_t n) {
#if defined(__SSE2__)
  if (reinterpret_cast<uintptr_t>(into) % 16 == 0) {
    for (; n >= 64; n -= 64, into += 64, from += 64)
      for (int i = 0; i < 64; i += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(into + i),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    _mm_sfence();
  }
#endif
  std::memcpy(into, from, n);
}

bool alike(const Tensor& a, const Tensor& b) {
  if (a.scalar_type() != b.scalar_type() || a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d)) return false;
  return a.is_contiguous() && b.is_contiguous();
}

// Whether every pair is contiguous, of one dtype and of one shape; if one is not, nothing is copied.
bool copy_tensors(std::vector<Tensor> into, std::vector<Tensor> from) {
  const size_t count = into.size();
  STD_TORCH_CHECK(from.size() == count, "from has ", from.size(), " tensors; it must have ", count);
  struct Piece {
    char* into;
    const char* from;
    int64_t start, end;  // in bytes of all pieces, one after the other
  };
  std::vector<Piece> pieces;
  pieces.reserve(count);
  int64_t total = 0;
  for (size_t i = 0; i < count; ++i) {
    if (!alike(into[i], from[i])) return false;
    const int64_t size = into[i].numel() * static_cast<int64_t>(into[i].element_size());
    pieces.push_back({static_cast<char*>(into[i].mutable_data_ptr()),
                      static_cast<const char*>(from[i].const_data_ptr()), total, total + size});
    total += size;
  }
  constexpr int64_t kBytes = int64_t{1} << 22;  // a thread takes at least: less is copied before a sleeping one wakes
  pf::parallel_for(total, kBytes, [&](int64_t at, int64_t end) {
    auto piece =
        std::upper_bound(pieces.begin(), pieces.end(), at, [](int64_t b, const Piece& p) { return b < p.end; });
    for (; at < end; ++piece) {
      const int64_t stop = std::min(end, piece->end);
      stream(piece->into + (at - piece->start), piece->from + (at - piece->start), stop - at);
      at = stop;
    }
  });
  return true;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyfastpeft, m) { m.def("copy_tensors(Tensor(a!)[] into, Tensor[] src) -> bool"); }

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CPU, m) { m.impl("copy_tensors", TORCH_BOX(&copy_tensors)); }
