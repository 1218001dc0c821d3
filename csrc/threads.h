// Torch's threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

#include "cpu/weight.h"
#include "spin.h"

namespace pf {

// [0, n) in even shares, one a thread, each taken from its front by its thread. A thread whose own is at an end takes
// from the back of another's, so that a core that is slower for a while, or was woken late, is waited for little (4096
// x 4096, two threads, one core shared with another process: 0.78 to 0.92 of the time from 8 rows on). Pieces are few
// and not small: a body prepares itself anew for each, and a product reads its rows again (on quiet cores 2048 rows
// take 3 % longer).
class Shares {
 public:
  static constexpr int64_t kMost = 1024;  // threads

  Shares(int64_t n, int64_t grain, int64_t threads) : n_(n), unit_(n / kMostUnits + 1), count_(threads) {
    constexpr int64_t kPieces = 16, kLeast = 4;
    const int64_t units = ceil_div(n, unit_);
    least_ = std::max({units / (kPieces * threads), grain / unit_ / 2, kLeast});
    for (int64_t i = 0; i < threads; ++i)
      shares_[i].store(pack(units * i / threads, units * (i + 1) / threads), std::memory_order_relaxed);
  }

  // body(begin, end) of pieces until nothing is left for thread i.
  template <class Body>
  void work(int64_t i, const Body& body) {
    const auto give = [&](int64_t from, int64_t to) { body(from * unit_, std::min(n_, to * unit_)); };
    for (int64_t victim = i, tried = 0; tried < count_; ++tried, victim = (victim + 1) % count_) {
      std::atomic<uint64_t>& share = shares_[victim];
      for (uint64_t held = share.load(std::memory_order_relaxed);;) {
        const int64_t from = static_cast<int64_t>(held >> 32), to = static_cast<int64_t>(held & 0xFFFFFFFF);
        if (from == to) break;
        // Of its own, most at once.
        const int64_t left = to - from, wanted = std::max(victim == i ? left * 3 / 4 : left / 2, least_);
        const int64_t taken = left - wanted < least_ ? left : wanted;
        const int64_t cut = victim == i ? from + taken : to - taken;
        if (!share.compare_exchange_weak(held, victim == i ? pack(cut, to) : pack(from, cut),
                                         std::memory_order_relaxed))
          continue;
        victim == i ? give(from, cut) : give(cut, to);
        held = share.load(std::memory_order_relaxed);
      }
    }
  }

 private:
  static constexpr int64_t kMostUnits = int64_t{1} << 31;
  static uint64_t pack(int64_t from, int64_t to) { return static_cast<uint64_t>(from) << 32 | to; }

  const int64_t n_, unit_, count_;
  int64_t least_;
  std::atomic<uint64_t> shares_[kMost];
};

// The first exception of several threads. (The stable interface to torch's threads passes on only that there was one.)
class Failure {
 public:
  template <class Body>
  void catching(const Body& body) {
    try {
      body();
    } catch (...) {
      if (!taken_.exchange(true, std::memory_order_relaxed)) error_ = std::current_exception();
    }
  }
  // After the threads are known to have come to their end.
  void rethrow() const {
    if (error_ != nullptr) std::rethrow_exception(error_);
  }

 private:
  std::atomic<bool> taken_{false};
  std::exception_ptr error_;
};

// body(begin, end) over [0, n) in pieces; the caller alone does fewer than `grain`. The caller spins until the others
// are done too: with OMP_WAIT_POLICY=PASSIVE it would sleep at the end of OpenMP's region, and waking it there costs as
// much as waking the others (4096 x 4096, two threads, 4 rows: 190 us instead of 233, 16 rows: 610 instead of 660).
// Others that take more than a millisecond longer are left to OpenMP.
template <class Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  constexpr int kPatience = 1 << 15;
  const int64_t threads =
      n <= grain ? 1 : std::min({int64_t{torch::stable::get_num_threads()}, ceil_div(n, grain), Shares::kMost});
  if (threads == 1) return body(0, n);
  Shares shares(n, grain, threads);
  std::atomic<int64_t> at_work{threads};
  Failure failure;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    failure.catching([&] {
      for (int64_t i = first; i < last; ++i) shares.work(i, body);
    });
    at_work.fetch_sub(last - first, std::memory_order_release);
    for (int spins = 0; first == 0 && spins < kPatience && at_work.load(std::memory_order_acquire) > 0; ++spins)
      relax(spins);
  });
  failure.rethrow();
}

// The same as a ParallelFor.
inline void parallel(int64_t n, int64_t grain, void* ctx, void (*body)(void*, int64_t, int64_t)) {
  parallel_for(n, grain, [&](int64_t begin, int64_t end) { body(ctx, begin, end); });
}

}  // namespace pf
