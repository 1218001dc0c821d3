// Pages of memory: large ones under packed weights, where the system has them on request, raise read bandwidth by a
// half.
#pragma once
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <memory>
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

#if defined(__linux__)
using File = std::unique_ptr<FILE, int (*)(FILE*)>;

// Whether [begin, end) lies in one mapping of a file.
inline bool maps_file(uintptr_t begin, uintptr_t end) {
  const File maps(std::fopen("/proc/self/maps", "r"), std::fclose);
  unsigned long from, to, inode;
  char line[512];
  while (maps != nullptr && std::fgets(line, sizeof(line), maps.get()) != nullptr)
    if (std::sscanf(line, "%lx-%lx %*s %*s %*s %lu", &from, &to, &inode) == 3 && from <= begin && end <= to)
      return inode != 0;
  return false;
}

// Whether all pages of [begin, end) that are in memory are the file's: one that was written to is the process's own.
inline bool unwritten(uintptr_t begin, uintptr_t end, uintptr_t page) {
  constexpr uint64_t kPresent = uint64_t{1} << 63, kSwapped = uint64_t{1} << 62, kOfFile = uint64_t{1} << 61;
  const File pages(std::fopen("/proc/self/pagemap", "rb"), std::fclose);
  if (pages == nullptr || std::fseek(pages.get(), static_cast<long>(begin / page * sizeof(uint64_t)), SEEK_SET) != 0)
    return false;
  uint64_t flags;
  for (; begin < end; begin += page) {
    if (std::fread(&flags, sizeof(flags), 1, pages.get()) != 1 || (flags & kSwapped) != 0) return false;
    if ((flags & kPresent) != 0 && (flags & kOfFile) == 0) return false;
  }
  return true;
}
#endif

// Gives back the whole pages of [p, p + bytes) where that is a part of a mapped file to which nobody has written: read
// again, they come from the file again. Anything else stays.
inline void drop_mapped_pages(const void* p, int64_t bytes) {
#if defined(__linux__)
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), at = reinterpret_cast<uintptr_t>(p);
  const uintptr_t begin = (at + page - 1) & ~(page - 1), end = (at + static_cast<uintptr_t>(bytes)) & ~(page - 1);
  if (begin < end && maps_file(begin, end) && unwritten(begin, end, page))
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
#else
  (void)p, (void)bytes;
#endif
}

}  // namespace pf
