// Threads that stay together for the length of one call: one region of torch's threads, in which many small pieces of
// work are handed over without waking anybody. (Under OMP_WAIT_POLICY=PASSIVE a region costs some twenty to fifty
// microseconds, more than most products of one token.)
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

#include "cpu/linear.h"
#include "spin.h"
#include "threads.h"

namespace pf {

// The caller of `run` inside `with_team` leads; it takes pieces like everybody else and waits for those that others
// took, never for a thread that has not come. So nothing depends on how many threads the region really gets.
class Team {
 public:
  explicit Team(int64_t threads) : threads_(threads) {}

  // body(ctx, begin, end) over [0, n) in pieces of at least `grain`: one a thread, or as many more for each where they
  // are large, so that a core that is slower for a while is waited for little.
  void run(int64_t n, int64_t grain, void* ctx, void (*body)(void*, int64_t, int64_t)) {
    const int64_t most = ceil_div(n, grain);
    const int64_t pieces = std::min(most, std::clamp(most / (kLarge * threads_), int64_t{1}, kPieces) * threads_);
    if (pieces <= 1) return body(ctx, 0, n);
    ctx_.store(ctx, std::memory_order_relaxed);
    body_.store(body, std::memory_order_relaxed);
    n_.store(n, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    job_ += kJob;
    state_.store(job_ | static_cast<uint64_t>(pieces) << 16, std::memory_order_release);
    while (take_piece()) {
    }
    for (int spins = 0; done_.load(std::memory_order_acquire) < pieces; ++spins) relax(spins);
    failure_.rethrow();
  }

  void help() {
    for (int spins = 0; !over_.load(std::memory_order_acquire); ++spins)
      if (take_piece())
        spins = 0;
      else
        relax(spins);
  }

  void dismiss() { over_.store(true, std::memory_order_release); }

 private:
  static constexpr uint64_t kJob = uint64_t{1} << 32;
  static constexpr int64_t kLarge = 4, kPieces = 4;

  // A piece is taken by counting the low bits of the state up; the job's number above them says of which job.
  bool take_piece() {
    uint64_t state = state_.load(std::memory_order_acquire);
    const int64_t pieces = state >> 16 & 0xFFFF, piece = state & 0xFFFF;
    if (piece >= pieces) return false;
    void* ctx = ctx_.load(std::memory_order_relaxed);
    const auto body = body_.load(std::memory_order_relaxed);
    const int64_t n = n_.load(std::memory_order_relaxed);
    if (!state_.compare_exchange_strong(state, state + 1, std::memory_order_acq_rel)) return true;
    // The larger ones come first: two threads that took 4, 5, 4 and 5 of 18 in turn would do 8 and 10.
    const auto begin = [&](int64_t i) { return n / pieces * i + std::min(i, n % pieces); };
    failure_.catching([&] { body(ctx, begin(piece), begin(piece + 1)); });
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  const int64_t threads_;
  uint64_t job_ = 0;
  Failure failure_;  // for the leader, whose frame the others' pieces may still be working on
  alignas(64) std::atomic<uint64_t> state_{0};  // job, pieces, next piece: 32, 16 and 16 bits
  alignas(64) std::atomic<int64_t> done_{0};
  std::atomic<void*> ctx_{nullptr};
  std::atomic<void (*)(void*, int64_t, int64_t)> body_{nullptr};
  std::atomic<int64_t> n_{0};
  std::atomic<bool> over_{false};
};

// lead(parallel) on one thread of a region of torch's threads while the others help; `parallel` is a ParallelFor.
template <class Lead>
void with_team(const Lead& lead) {
  static thread_local Team* current = nullptr;
  const int64_t threads = std::min(int64_t{torch::stable::get_num_threads()}, Shares::kMost);
  Team team(threads);
  // The callers' grain is meant for waking threads. Handing over to one that is there pays from so many multiply-adds
  // on (decoding SmolLM2-135M, 2^15 takes 2 % longer, 2^20 3 %).
  const auto parallel = [](int64_t n, int64_t grain, void* ctx, void (*body)(void*, int64_t, int64_t)) {
    constexpr int64_t kHandover = int64_t{1} << 18;
    current->run(n, std::max<int64_t>(grain * kHandover / thread_work(), 1), ctx, body);
  };
  const auto member = [&](int64_t begin, int64_t) {
    if (begin != 0) return team.help();
    current = &team;
    struct Dismissal {
      ~Dismissal() {
        current->dismiss();
        current = nullptr;
      }
    } dismissal;
    lead(parallel);
  };
  parallel_for(threads, 1, member);
}

// lead(parallel) where all of it is `work` multiply-adds a row: by a team if that is enough for two threads. Few rows
// are one piece of work, for which nobody need stay.
template <class Lead>
void with_threads_for(int64_t rows, int64_t work, const Lead& lead) {
  if (rows <= kTile || rows * work < 2 * thread_work()) return lead(parallel);
  with_team(lead);
}

}  // namespace pf
