// Runs CUDA blocks on the CPU: a fiber a CUDA thread, or (PF_THREADS) a thread each, for ThreadSanitizer.
//
// Made to find what hardware would hide: shared memory starts as NaN; the target of a cp.async is NaN from its issue
// until its wait; with fibers the seed decides who goes on (0: a warp runs ahead as far as barriers let it; 1: in turn;
// others: at random) and in which order blocks start. A barrier that not all reach, or a collective that a warp reaches
// at different places, ends the program with a message.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <span>
#include <vector>
#ifdef PF_THREADS
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <thread>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

struct Settings {
  unsigned seed = 0;
  int resident = 2;  // blocks at once
  int multiprocessors = 4;
  int shared_bytes = 228 << 10;
  int capability = 8;  // the major number
  int fault = 0;       // for sources with faults seeded in them
  int64_t stream = 0;  // of what follows; -1: unknown, below: a graph records it
};
inline Settings settings;

// Memory from `keep`, and what it began as.
struct Kept {
  std::vector<unsigned char> values;
  std::unique_ptr<unsigned char[]> memory;
};
inline std::vector<Kept> kept;
inline std::span<unsigned char> zeroed;  // what was set to zero last

struct Block;
struct Thread;
inline thread_local Thread* current = nullptr;

[[noreturn]] void fail(const char* what);

// Where `expected` threads meet.
struct Gate {
  std::atomic<int> expected{0};
#ifdef PF_THREADS
  // Who goes on has seen what the others did before they came, and nothing that they did since: no lock, in which
  // ThreadSanitizer would see more order than there is.
  std::atomic<int> arrived{0};
  std::atomic<unsigned> generation{0};
#else
  int arrived = 0;
  std::vector<Thread*> parked;
#endif
};

struct Copy {
  void* to;
  const void* from;  // 16 bytes
};

struct Thread {
  Block* block;
  int index;
  int place = 0;  // of the collective it waits in
  void* operands = nullptr;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
  std::shared_ptr<void> products;  // of wgmma, under way
#ifndef PF_THREADS
  ucontext_t context;
  char* stack = nullptr;
  void* fake_stack = nullptr;
#endif
};

// Blocks that run together and see one another's shared memory.
struct Cluster {
  std::vector<Block*> blocks;  // null: has ended
  Gate gate;
};

struct Block {
  int64_t index;
  uint32_t rank = 0;
  std::shared_ptr<Cluster> cluster;
  std::function<void()> body;
  std::vector<Thread> threads;
  std::unique_ptr<Gate[]> warps;
  Gate barrier, named[16];
  std::vector<std::shared_ptr<void>> kept;  // until its memory goes
  std::unique_ptr<unsigned char, void (*)(void*)> memory{nullptr, std::free};
  int live;
};

#ifdef PF_THREADS

// The system's own sleep: std::atomic's has counters that all gates share, and with them an order that no barrier made.
inline void sleep_on(std::atomic<unsigned>& word, int operation, unsigned value) {
  syscall(SYS_futex, &word, operation, value, nullptr, nullptr, 0);
}

// Meets the others; the last one runs `action`.
template <typename Action>
void meet(Gate& gate, Action action) {
  const unsigned generation = gate.generation.load(std::memory_order_relaxed);
  if (gate.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < gate.expected) {
    while (gate.generation.load(std::memory_order_acquire) == generation)
      sleep_on(gate.generation, FUTEX_WAIT_PRIVATE, generation);
    return;
  }
  action();
  gate.arrived.store(0, std::memory_order_relaxed);
  gate.generation.store(generation + 1, std::memory_order_release);
  sleep_on(gate.generation, FUTEX_WAKE_PRIVATE, INT_MAX);
}
inline void leave() {}  // fibers see who leaves while others meet
inline void yield() { std::this_thread::yield(); }

#else

constexpr size_t kStack = 256 << 10;

struct Scheduler {
  std::deque<Thread*> ready;
  std::mt19937 random;
  ucontext_t home;
  Thread* ended = nullptr;
  std::vector<char*> stacks;
  const void* home_stack = nullptr;
  size_t home_size = 0;
  void* fake_stack = nullptr;
  ~Scheduler() {
    for (char* stack : stacks) std::free(stack);
  }
};
inline thread_local Scheduler scheduler;

// Lets something happen that no thread does; false: there is nothing.
inline bool (*beside)() = nullptr;

inline Thread* next() {
  auto& ready = scheduler.ready;
  if (settings.seed > 1 && beside != nullptr && scheduler.random() % 16 == 0) beside();
  while (ready.empty())
    if (beside == nullptr || !beside()) fail("deadlock: not all threads reach a barrier or a collective");
  size_t i = settings.seed == 0 ? ready.size() - 1 : settings.seed == 1 ? 0 : scheduler.random() % ready.size();
  Thread* thread = ready[i];
  ready.erase(ready.begin() + static_cast<ptrdiff_t>(i));
  return thread;
}

// From here (a fiber, or home when null) to there.
inline void change(Thread* from, Thread* to, bool for_good) {
  ucontext_t* here = from == nullptr ? &scheduler.home : &from->context;
  ucontext_t* there = to == nullptr ? &scheduler.home : &to->context;
#ifdef __SANITIZE_ADDRESS__
  void** fake = from == nullptr ? &scheduler.fake_stack : &from->fake_stack;
  __sanitizer_start_switch_fiber(for_good ? nullptr : fake, to == nullptr ? scheduler.home_stack : to->stack,
                                 to == nullptr ? scheduler.home_size : kStack);
#else
  (void)for_good;
#endif
  current = to;
  swapcontext(here, there);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(*fake, nullptr, nullptr);
#endif
}
inline void go_on_with_another() {
  Thread *me = current, *other = next();
  if (other != me) change(me, other, false);
}
inline void release(Gate& gate) {
  gate.arrived = 0;
  for (Thread* thread : gate.parked) scheduler.ready.push_back(thread);
  gate.parked.clear();
}
// Meets the others; the last one runs `action`.
template <typename Action>
void meet(Gate& gate, Action action) {
  if (++gate.arrived < gate.expected) {
    gate.parked.push_back(current);
    go_on_with_another();
    return;
  }
  action();
  release(gate);
}
inline void leave() {
  for (Gate* gate : {&current->block->warps[current->index / 32], &current->block->barrier})
    if (gate->arrived == --gate->expected && gate->arrived > 0) release(*gate);
}
inline void yield() {  // all others go first
  if (settings.seed == 1)
    scheduler.ready.push_back(current);
  else
    scheduler.ready.push_front(current);
  go_on_with_another();
}

#endif

inline void fail(const char* what) {
  const int64_t block = current == nullptr ? -1 : current->block->index;
  std::fprintf(stderr, "emulator: %s (block %lld, thread %d)\n", what, static_cast<long long>(block),
               current == nullptr ? -1 : current->index);
  std::_Exit(3);
}

inline void barrier() {
  meet(current->block->barrier, [] {});
}

// `action(operands of the 32 lanes)`, once for the warp.
template <typename Operands, typename Action>
void collective(int place, Operands& mine, Action action) {
  Block& block = *current->block;
  const int warp = current->index / 32;
  current->place = place;
  current->operands = &mine;
  meet(block.warps[warp], [&] {
    Operands* lanes[32];
    for (int i = 0; i < 32; ++i) {
      const Thread& thread = block.threads[warp * 32 + i];
      if (thread.place != place) fail("a warp's threads are at different collectives");
      lanes[i] = static_cast<Operands*>(thread.operands);
    }
    action(lanes);
  });
}

inline void end() {
  for (const auto& group : current->groups)
    if (!group.empty()) fail("a thread ends with copies that it never waited for");
  leave();
}

inline std::unique_ptr<Block> make_block(int64_t index, int threads, int shared_bytes,
                                         const std::function<void()>& body) {
  auto block = std::make_unique<Block>();
  block->index = index;
  block->body = body;
  block->live = threads;
  // Of its own, and exactly as long as was asked for: AddressSanitizer sees every access outside.
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, std::max(shared_bytes, 1)) != 0) fail("out of memory");
  std::memset(memory, 0xFF, shared_bytes);
  block->memory.reset(static_cast<unsigned char*>(memory));
  block->threads.resize(threads);
  block->warps.reset(new Gate[threads / 32]);
  for (int i = 0; i < threads / 32; ++i) block->warps[i].expected = 32;
  block->barrier.expected = threads;
  for (int i = 0; i < threads; ++i) block->threads[i].block = block.get(), block->threads[i].index = i;
  return block;
}

#ifndef PF_THREADS
inline void fiber() {
#ifdef __SANITIZE_ADDRESS__
  const void* stack = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &size);
  if (scheduler.home_stack == nullptr) scheduler.home_stack = stack, scheduler.home_size = size;
#endif
  current->block->body();
  end();
  scheduler.ended = current;
  change(current, nullptr, true);
}
#endif

// In clusters of `size` blocks, which are resident together.
inline void run(int64_t blocks, int threads, int shared_bytes, const std::function<void()>& body, int size = 1) {
  if (shared_bytes > settings.shared_bytes) fail("more shared memory than the device has");
  std::vector<int64_t> order(blocks / size);
  for (size_t i = 0; i < order.size(); ++i) order[i] = settings.seed == 0 ? i : order.size() - 1 - i;
  std::mt19937 random(settings.seed);
  if (settings.seed > 1) std::shuffle(order.begin(), order.end(), random);
  size_t started = 0;
  std::vector<std::unique_ptr<Block>> resident;
  const auto room = static_cast<size_t>(std::max(settings.resident, size));
  const auto start = [&] {  // a cluster
    auto cluster = std::make_shared<Cluster>();
    cluster->gate.expected = size * threads;
    for (int rank = 0; rank < size; ++rank) {
      resident.push_back(make_block(order[started] * size + rank, threads, shared_bytes, body));
      resident.back()->rank = rank;
      resident.back()->cluster = cluster;
      cluster->blocks.push_back(resident.back().get());
    }
    ++started;
  };
#ifdef PF_THREADS
  while (started < order.size()) {
    std::vector<std::thread> all;
    resident.clear();
    while (started < order.size() && resident.size() + size <= room) start();
    for (const auto& block : resident)
      for (Thread& thread : block->threads)
        all.emplace_back([&thread] {
          current = &thread;
          thread.block->body();
          end();
        });
    for (std::thread& thread : all) thread.join();
  }
#else
  scheduler.random.seed(settings.seed);
  std::vector<char*> free_stacks = scheduler.stacks;
  const auto fill = [&] {
    const size_t before = resident.size();
    while (started < order.size() && resident.size() + size <= room) start();
    for (size_t i = before; i < resident.size(); ++i)
      for (Thread& thread : resident[i]->threads) {
        if (free_stacks.empty()) {
          scheduler.stacks.push_back(static_cast<char*>(std::malloc(kStack)));
          free_stacks.push_back(scheduler.stacks.back());
        }
        thread.stack = free_stacks.back();
        free_stacks.pop_back();
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack;
        thread.context.uc_stack.ss_size = kStack;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, fiber, 0);
        scheduler.ready.push_back(&thread);
      }
  };
  fill();
  while (!resident.empty()) {
    change(nullptr, next(), false);  // comes back when a fiber has ended
    Thread* ended = scheduler.ended;
    free_stacks.push_back(ended->stack);
    Block* block = ended->block;
    if (--block->live > 0) continue;
    block->cluster->blocks[block->rank] = nullptr;
    resident.erase(
        std::find_if(resident.begin(), resident.end(), [&](const auto& other) { return other.get() == block; }));
    fill();
  }
#endif
}

}  // namespace emulator
