// csrc/cuda/wgmma.cuh for a CPU. A TMA copy lands, and a group of wgmma reads its operands and adds to its sums, at any
// moment that the hardware is free to choose: with seed 0 only when somebody waits for it, with seed 1 and with threads
// at once, else at random. Until a copy has landed its target is NaN. A warp's 16 rows of a wgmma are multiplied for
// themselves: the warps of a warpgroup meet nowhere. A grid that the next one may overlap goes on when that one waits.
#pragma once
#include <condition_variable>
#include <mutex>
#include <thread>

#include "device.cuh"

#define PF_SM90A 1
#define PF_REGISTERS(n)

struct alignas(8) uint2 {
  uint32_t x, y;
};
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t by) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> by % 32);
}
inline void __syncwarp() {
  int nothing = 0;
  emulator::collective(4, nothing, [](int**) {});
}
inline int __reduce_min_sync(uint32_t, int v) {
  emulator::collective(5, v, [](int** lanes) {
    int least = *lanes[0];
    for (int i = 1; i < 32; ++i) least = std::min(least, *lanes[i]);
    for (int i = 0; i < 32; ++i) *lanes[i] = least;
  });
  return v;
}

namespace emulator {

// ---- barriers in shared memory

struct BarrierState {
  int count, pending;
  int64_t bytes = 0;
  uint32_t phase = 0;
#ifdef PF_THREADS
  std::mutex mutex;
  std::condition_variable changed;
#else
  std::vector<Thread*> waiting;
#endif
};
// In memory: the address of its state, with a mark that bytes of anything else hardly have.
constexpr uint64_t kMark = uint64_t{0x5ca1} << 48;
inline BarrierState& state_of(const uint64_t* barrier) {
  if (*barrier >> 48 != kMark >> 48) fail("a barrier that was not initialized, or was overwritten");
  return *reinterpret_cast<BarrierState*>(*barrier & ~kMark);
}
inline void count_down(uint64_t* barrier, int arrivals, int64_t bytes) {
  BarrierState& state = state_of(barrier);
#ifdef PF_THREADS
  std::lock_guard lock(state.mutex);
#endif
  state.pending -= arrivals, state.bytes -= bytes;
  if (state.pending < 0) fail("more arrivals at a barrier than it counts");
  if (state.pending > 0 || state.bytes != 0) return;
  state.pending = state.count, state.phase ^= 1;
#ifdef PF_THREADS
  state.changed.notify_all();
#else
  for (Thread* thread : state.waiting) scheduler.ready.push_back(thread);
  state.waiting.clear();
#endif
}

inline uint32_t offset_of(const void* p) {
  const auto* memory = current->block->memory.get();
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - memory);
}
inline unsigned char* memory_of(uint32_t rank) {
  Block* block = current->block->cluster->blocks.at(rank);
  if (block == nullptr) fail("shared memory of a block that has ended");
  return block->memory.get();
}
inline uint32_t swizzled(uint32_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

// ---- what happens beside the threads

#ifdef PF_THREADS
inline bool at_once() { return true; }
inline void later(const std::function<void()>& copy) { copy(); }
#else
inline thread_local std::vector<std::function<void()>> copies;
inline bool land() {
  if (copies.empty()) return false;
  const size_t i = scheduler.random() % copies.size();
  const auto copy = std::move(copies[i]);
  copies.erase(copies.begin() + static_cast<ptrdiff_t>(i));
  copy();
  return true;
}
inline const bool installed = (beside = land, true);
inline bool at_once() { return settings.seed == 1 || (settings.seed > 1 && scheduler.random() % 2 == 0); }
inline void later(std::function<void()> copy) {
  copies.push_back(std::move(copy));
  if (at_once()) land();
}
#endif

// A grid in a thread of its own, held at let_next_grid_start until the next one waits for it.
struct Grid {
  std::mutex mutex;
  std::condition_variable changed;
  bool held = false, resumed = false, ended = false;
  std::thread thread;

  void finish() {
    {
      std::lock_guard lock(mutex);
      resumed = true;
    }
    changed.notify_all();
    if (thread.joinable()) thread.join();
  }
};
inline std::unique_ptr<Grid> previous;
inline thread_local Grid* mine = nullptr;

// ---- wgmma

struct Product {
  float* d;
  const uint32_t* a;  // null: a_tile, of float32
  uint64_t a_tile, b;
  int columns;
  float2 (*unpack)(uint32_t);
};
struct Products {
  bool fenced = false;
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
};
inline Products& products() { return *static_cast<Products*>(current->products.get()); }

inline uint32_t word_at(uint64_t operand, int row, int word) {
  if (operand >> 62 != 1 || (operand >> 32 & 0x3fff) != 64)
    fail("an operand of wgmma without the swizzle of 128 bytes");
  const uint32_t begin = (operand & 0x3fff) << 4;
  uint32_t value;
  std::memcpy(&value, current->block->memory.get() + swizzled(begin + row / 8 * 1024 + row % 8 * 128 + word * 4), 4);
  return value;
}
inline float tf32(uint32_t word) {
  word &= 0xffffe000;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}
// The product at `at` of the lanes' oldest groups, 16 or 8 columns deep.
inline void multiply(Products** lanes, size_t at) {
  const Product& first = lanes[0]->groups.front()[at];
  const bool words = first.a == nullptr;
  const int depth = words ? 8 : 16;
  std::vector<float> a(16 * depth), b(first.columns * depth);
  const auto put = [&](float* to, uint32_t word) {
    if (words) {
      *to = tf32(word);
    } else {
      const float2 pair = first.unpack(word);
      to[0] = pair.x, to[1] = pair.y;
    }
  };
  for (int n = 0; n < first.columns; ++n)
    for (int word = 0; word < 8; ++word) put(&b[n * depth + word * (depth / 8)], word_at(first.b, n, word));
  for (int lane = 0; lane < 32; ++lane) {
    const Product& other = lanes[lane]->groups.front()[at];
    if (other.b != first.b || other.a_tile != first.a_tile) fail("a warp's threads give wgmma different operands");
    for (int i = 0; !words && i < 4; ++i) put(&a[(lane / 4 + i % 2 * 8) * 16 + lane % 4 * 2 + i / 2 * 8], other.a[i]);
  }
  const int row0 = current->index / 32 % 4 * 16;
  for (int row = 0; words && row < 16; ++row)
    for (int word = 0; word < 8; ++word) put(&a[row * depth + word], word_at(first.a_tile, row0 + row, word));
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < first.columns / 2; ++i) {
      const float* left = &a[(lane / 4 + i / 2 % 2 * 8) * depth];
      const float* right = &b[(i / 4 * 8 + lane % 4 * 2 + i % 2) * depth];
      float sum = 0;
      for (int k = 0; k < depth; ++k) sum += left[k] * right[k];
      lanes[lane]->groups.front()[at].d[i] += sum;
    }
}
// Until the warp has only `left` groups.
inline void multiply_groups(Products** lanes, size_t left) {
  while (lanes[0]->groups.size() > left) {
    for (size_t at = 0; at < lanes[0]->groups.front().size(); ++at) multiply(lanes, at);
    for (int i = 0; i < 32; ++i) lanes[i]->groups.pop_front();
  }
}

}  // namespace emulator

namespace pf {

inline uint32_t opaque(uint32_t v) { return v; }
inline unsigned char* swizzled_memory() { return emulator::current->block->memory.get(); }

using Barrier = uint64_t;
inline void barrier_init(Barrier* b, int count) {
  auto state = std::make_shared<emulator::BarrierState>();
  state->count = state->pending = count;
  *b = reinterpret_cast<uint64_t>(state.get()) | emulator::kMark;
  emulator::current->block->kept.push_back(state);
}
inline void barriers_initialized() {}
inline void barrier_arrive(Barrier* b, int count = 1) { emulator::count_down(b, count, 0); }
inline void barrier_arrive_at(Barrier* b, uint32_t rank) {
  emulator::count_down(reinterpret_cast<Barrier*>(emulator::memory_of(rank) + emulator::offset_of(b)), 1, 0);
}
inline void barrier_expect(Barrier* b, uint32_t bytes) { emulator::count_down(b, 1, -int64_t{bytes}); }
inline void barrier_wait(Barrier* b, uint32_t parity) {
  emulator::BarrierState& state = emulator::state_of(b);
#ifdef PF_THREADS
  std::unique_lock lock(state.mutex);
  state.changed.wait(lock, [&] { return state.phase != parity; });
#else
  while (state.phase == parity) {
    state.waiting.push_back(emulator::current);
    emulator::go_on_with_another();
  }
#endif
}
inline void named_sync(int id, int threads) {
  emulator::Gate& gate = emulator::current->block->named[id];
  gate.expected.store(threads, std::memory_order_relaxed);
  emulator::meet(gate, [] {});
}

struct TileMap {
  const unsigned char* base;
  int size;
  int64_t rows, columns, pitch;
  int box_rows;
};
inline void load_tile_to(void* tile, const TileMap* map, int column, int row, Barrier* b, uint16_t blocks) {
  const uint32_t to = emulator::offset_of(tile), at = emulator::offset_of(b);
  if (to % 1024 != 0) emulator::fail("a tile that does not begin at a multiple of 1024 bytes");
  for (uint32_t rank = 0; blocks >> rank != 0; ++rank) {
    if ((blocks >> rank & 1) == 0) continue;
    unsigned char* memory = emulator::memory_of(rank);
    std::memset(memory + to, 0xFF, map->box_rows * 128);
    emulator::later([=, map = *map] {
      for (int r = 0; r < map.box_rows; ++r)
        for (int c = 0; c < 128; c += map.size) {
          const int64_t i = row + r, j = column + c / map.size;
          unsigned char* element = memory + emulator::swizzled(to + r * 128 + c);
          std::memset(element, 0, map.size);
          if (i < map.rows && j < map.columns) std::memcpy(element, map.base + i * map.pitch + j * map.size, map.size);
        }
      emulator::count_down(reinterpret_cast<Barrier*>(memory + at), 0, map.box_rows * 128);
    });
  }
}
inline void load_tile(void* tile, const TileMap* map, int column, int row, Barrier* b, uint64_t) {
  load_tile_to(tile, map, column, row, b, 1 << emulator::current->block->rank);
}
inline void stores_to_wgmma() {}

inline uint32_t cluster_rank() { return emulator::current->block->rank; }
inline void cluster_sync() {
  emulator::meet(emulator::current->block->cluster->gate, [] {});
}
template <class T>
const T* shared_of(const T* p, uint32_t rank) {
  return reinterpret_cast<const T*>(emulator::memory_of(rank) + emulator::offset_of(p));
}
inline void let_next_grid_start() {
#ifndef PF_THREADS
  emulator::Grid& grid = *emulator::mine;
  std::unique_lock lock(grid.mutex);
  grid.held = true;
  grid.changed.notify_all();
  grid.changed.wait(lock, [&] { return grid.resumed; });
#endif
}
inline void wait_for_previous_grid() {
#ifndef PF_THREADS
  if (emulator::previous != nullptr && emulator::previous.get() != emulator::mine) emulator::previous->finish();
#endif
}
template <int N>
void raise_registers() {}
template <int N>
void lower_registers() {}

inline uint64_t tile_operand(const void* tile) {
  return emulator::offset_of(tile) >> 4 | uint64_t{1} << 16 | uint64_t{64} << 32 | uint64_t{1} << 62;
}
inline void wgmma_fence() {
  if (emulator::current->products == nullptr) emulator::current->products = std::make_shared<emulator::Products>();
  emulator::products().fenced = true;
}
template <int D>
void wgmma_fence(float (&)[D]) {
  wgmma_fence();
}
inline void queue_product(const emulator::Product& product) {
  if (emulator::current->products == nullptr || !emulator::products().fenced) emulator::fail("wgmma without a fence");
  emulator::products().open.push_back(product);
}
inline void wgmma_commit() {
  emulator::Products& mine = emulator::products();
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
  mine.fenced = false;
  if (emulator::settings.seed == 0) return;
  emulator::collective(6, mine, [](emulator::Products** lanes) {
    if (emulator::at_once()) emulator::multiply_groups(lanes, 0);
  });
}
template <int N>
void wgmma_wait() {
  emulator::collective(7, emulator::products(),
                       [](emulator::Products** lanes) { emulator::multiply_groups(lanes, N); });
}
template <class T, int D>
void wgmma(float (&d)[D], const uint32_t (&a)[4], uint64_t b) {
  queue_product({d, a, 0, b, 2 * D, unpack<T>});
}
template <int D>
void wgmma_tf32(float (&d)[D], uint64_t a, uint64_t b) {
  queue_product({d, nullptr, a, b, 2 * D, nullptr});
}
inline float to_tf32(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return (bits & 0x7f800000) == 0x7f800000 ? v : emulator::tf32(bits + 0x1000);
}

inline cudaError_t map_tiles(TileMap* map, const void* base, int size, int64_t rows, int64_t columns, int64_t pitch,
                             int box_rows) {
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0 || pitch % 16 != 0 || pitch < columns * size || box_rows > 256)
    return cudaErrorInvalidValue;
  *map = {static_cast<const unsigned char*>(base), size, rows, columns, pitch, box_rows};
  return cudaSuccess;
}
template <typename... Parameters, typename... Arguments>
cudaError_t launch_clusters(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, int cluster,
                            bool overlap, void*, const Arguments&... arguments) {
  const auto body = [=] { emulator::run(blocks, threads, shared_bytes, [&] { kernel(arguments...); }, cluster); };
#ifndef PF_THREADS
  if (!overlap) {
    wait_for_previous_grid();
    emulator::previous = std::make_unique<emulator::Grid>();
    emulator::Grid& grid = *emulator::previous;
    grid.thread = std::thread([body, &grid] {
      emulator::mine = &grid;
      body();
      std::lock_guard lock(grid.mutex);
      grid.ended = true;
      grid.changed.notify_all();
    });
    std::unique_lock lock(grid.mutex);
    grid.changed.wait(lock, [&] { return grid.held || grid.ended; });
    if (!grid.ended) return cudaSuccess;
    lock.unlock();
    wait_for_previous_grid();
    return cudaSuccess;
  }
#endif
  body();
  wait_for_previous_grid();
  return cudaSuccess;
}

}  // namespace pf
