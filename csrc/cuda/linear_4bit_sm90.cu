// linear_4bit on sm_90 for 16 < M <= 256 rows: y [M, N] = x * W^T + bias + (S o f) * B^T, S = x * A^T, W in 4 bits.
//
// Rows of W are the 64 rows of wgmma and are decoded into its registers; x is its other operand, in shared memory. A
// block takes 128 rows of W and all rows of x, so that each weight is read and decoded once:
//
//   warps 0-7   two warpgroups of 64 rows each: decode 64 columns while the product of the 64 before runs
//   warp 8      copies 256 columns of W at a time, out of the L2 cache's way; warp 9 64 columns of x
//   warps 10-11 scales and zero points, where double-quantized decoded
//
// Two blocks beside one another in N are a pair: each copies half of x for both. Where N has too few rows to fill the
// GPU, up to four pairs split K and sum through the cluster's shared memory, in order. S comes from a kernel of its
// own, `project`, which runs beside the sweep; the branch is then 32 ranks a step, in tf32, whose range float16 lacks.
//
// What 64 x 64 weights cost a multiprocessor, in cycles (an H100's at 1.755 GHz: 3.0 TB/s of memory are 13 bytes each,
// 5.8 TB/s of L2 25 bytes; shared memory moves 128). cuBLAS at the limit takes 635, and 2 M where that is more:
//
//   rows   memory   L2    shared memory: table, codes, x, copies   issue slots   tensor cores   cuBLAS / the most
//   32       178    133    64 + 64 +  32 +  36 = 196                  171             64              3.2
//   64       178    174    64 + 64 +  64 +  52 = 244                  171            128              2.6
//   128      178    256    64 + 64 + 128 +  84 = 340                  171            256              1.9
//   256      178    419    64 + 64 + 256 + 148 = 532                  178            512              1.2
//
// (Codes: the four lanes that share a row read the same 16 bytes, counted as if they did not.) A call has about 2.5 us
// beside: the pipeline fills, the cluster adds. That leaves, of 4096 x 4096 and 8192 x 8192 weights, 2.2 and 2.8 times
// cuBLAS for 32 rows, 1.9 and 2.3 for 64, 1.5 and 1.8 for 128, 1.1 and 1.2 for 256.
//
// A pair of weights is a rotation and a mask that make the address of its byte in the table, a load that no bank
// conflicts with (each lane has its own copy: 32 KiB), two conversions from float16, two multiply-adds by scale and
// zero point in float32, and one rounding: 8 instructions, 128 for the 16 pairs of a lane. Scaling sums instead would
// take a second set of accumulators, 64 registers at M = 128, and INT4's zero points the sums of x.
#include <cstdint>

#include "codes.cuh"
#include "elements.cuh"
#include "linear_4bit_sm90.h"
#include "lora.cuh"
#include "wgmma.cuh"

namespace pf {
namespace {

constexpr int kRowTile = 128;  // rows of W of a block
constexpr int kPanel = 256;    // columns of W that are copied together: 128 bytes of a row
constexpr int kStep = 64;      // columns of x likewise
constexpr int kSteps = kPanel / kStep;
constexpr int kSegments = kPanel / 32;  // of the smallest block
constexpr int kRanks = 32;              // of the branch in a step: 128 bytes of float32
constexpr int kConsumers = 256, kProducers = 128;
constexpr int kPitch = kRowTile + 4;  // floats from one row of partial sums to the next: no bank conflicts
constexpr int kMostRows = 256;
constexpr int kMostMixedRows = 128;  // with adapters of their own: sums aside take registers
constexpr int kMostSplits = 4;

struct Arguments {
  TileMap codes, x;  // boxes of a row tile and a panel; of half the rows of x and a step
  PfWeight w;
  PfLora lora;     // rank 0: no branch
  const float* s;  // [m, rank], scaled
  const void* bias;
  int32_t bias_dtype;
  void* y;
  int32_t m, splits, panels;
  int32_t segment_bits, block_bits;  // log2 of the columns of a row that surely share a block; of the blocksize
};

// Eight elements side by side, wherever they lie.
template <class E>
PF_DEVICE Raw8<E> load_eight(const E* p, bool aligned) {
  if (aligned) return load_raw8(p);
  Raw8<E> raw;
#pragma unroll
  for (int i = 0; i < 8; ++i) reinterpret_cast<E*>(&raw)[i] = __ldg(p + i);
  return raw;
}

// f with a pointer of the type that `dtype` says.
template <class F>
PF_DEVICE void with_type(const void* p, int dtype, F f) {
  if (dtype == kFloat32)
    f(static_cast<const float*>(p));
  else if (dtype == kBFloat16)
    f(static_cast<const bf16*>(p));
  else
    f(static_cast<const f16*>(p));
}

// ---- the sweep ----

template <int kRows>
struct Shared {
  static constexpr int kPanels = kRows <= 128 ? 4 : 2;  // in flight
  uint32_t table[256][32];                              // [byte][lane]: the values of both codes in float16
  unsigned char x[kSteps][kRows][128];
  unsigned char codes[kPanels][kRowTile][128];
  float2 scale[kPanels][kSegments][kRowTile];
  int32_t slot[kMostRows];
  Barrier x_full[kSteps], x_empty[kSteps], codes_full[kPanels], codes_empty[kPanels];
};

// Registers of a thread: all begin with as many, which the roles then share out; 152 leave room for a block of
// `project`.
template <int kRows>
struct Registers {
  static constexpr int kAll = kRows <= 128 ? 152 : 168;
  static constexpr int kConsumer = kRows <= 128 ? 192 : 216, kProducer = 72;
  static_assert(kConsumers * kConsumer + kProducers * kProducer <= (kConsumers + kProducers) * kAll);
};

// What a block does. Asked for by each role: what lives across setmaxnreg is spilled.
struct Task {
  uint32_t rank, pair;  // in the cluster; of the first block of its pair
  unsigned split, first;
  unsigned panels;
  int64_t n0;
  PF_DEVICE explicit Task(const Arguments& g)
      : rank(cluster_rank()),
        pair(rank & ~1u),
        split(rank / 2),
        first(static_cast<int>(int64_t{g.panels} * split / g.splits)),
        panels(static_cast<int>(int64_t{g.panels} * (split + 1) / g.splits) - first),
        n0((int64_t{blockIdx.x} / (2 * g.splits) * 2 + rank % 2) * kRowTile) {}
};

// The i-th use of a ring of N buffers is of buffer i % N, in a phase of this parity. Who fills it waits for the end of
// the phase before, of the other parity.
template <int N>
PF_DEVICE uint32_t round_of(unsigned i) {
  return i / N % 2;
}

// The least slot beyond `after` that a row has; INT32_MAX where there is none. The same for all lanes of a warp.
PF_DEVICE int next_slot(const int32_t (&slot)[kMostRows], int after) {
  int least = INT32_MAX;
  for (int i = threadIdx.x % 32; i < kMostRows; i += 32)
    if (slot[i] > after && slot[i] < least) least = slot[i];
  return __reduce_min_sync(~0u, least);
}

// Calls step(slot, rank0) for the steps of the branch that this split has. The same for all threads of a block.
template <class F>
PF_DEVICE void each_branch_step(const Arguments& g, const int32_t (&slots)[kMostRows], int split, F step) {
  if (g.lora.rank == 0) return;
  int index = 0;
  for (int slot = next_slot(slots, -1); slot != INT32_MAX; slot = next_slot(slots, slot))
    for (int64_t rank0 = 0; rank0 < g.lora.rank; rank0 += kRanks)
      if (index++ % g.splits == split) step(slot, rank0);
}

// Columns 64 step to 64 step + 63 of a panel as wgmma's registers: [16 columns][register]. `row` of this thread, which
// also has row + 8; byte t of a word holds lane t's pair of the word's eight columns.
template <class T, int kRows>
PF_DEVICE void decode(const Shared<kRows>& sh, int panel, int step, int row, uint32_t column, int segment_shift,
                      uint32_t (&a)[4][4]) {
  const uint32_t turn = (8 * (threadIdx.x % 4) + 25) % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int chunk = (2 * step + half) ^ (row % 8), segment = (2 * step + half) >> segment_shift;
    uint4 codes[2];
    float2 scale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      codes[i] = reinterpret_cast<const uint4*>(sh.codes[panel][row + 8 * i])[chunk];
      scale[i] = sh.scale[panel][segment][row + 8 * i];
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t words[4] = {codes[i].x, codes[i].y, codes[i].z, codes[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t at = (__funnelshift_r(words[j], words[j], turn) & 0xff << 7) | column;
        const float2 v = unpack<f16>(*reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(sh.table) + at));
        a[2 * half + j / 2][i + j % 2 * 2] =
            pack<T>(__fmaf_rn(v.x, scale[i].x, scale[i].y), __fmaf_rn(v.y, scale[i].x, scale[i].y));
      }
    }
  }
}

// One lane of a warp tells both blocks of a pair, or its own.
PF_DEVICE void release_x(Barrier* empty, uint32_t pair) {
  __syncwarp();
  if (threadIdx.x % 32 < 2) barrier_arrive_at(empty, pair + threadIdx.x % 32);
}
PF_DEVICE void release_codes(Barrier* empty) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(empty);
}

template <class T, int D, int kCount>
PF_DEVICE void consume(const Arguments& g, Shared<2 * D * kCount>& sh) {
  const Task task(g);
  constexpr int kRows = 2 * D * kCount;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  const int byte = threadIdx.x;
  const uint32_t values = pack<f16>(kValues[g.w.format][byte / 16], kValues[g.w.format][byte % 16]);
  for (int i = 0; i < 32; ++i) sh.table[byte][(byte + i) % 32] = values;
  named_sync(1, kConsumers);

  float sums[kCount][D] = {};
  uint32_t a[2][4][4];
  constexpr unsigned kPanels = Shared<kRows>::kPanels;
  const uint64_t x = tile_operand(sh.x);
  const uint32_t column = opaque(lane * 4);  // of the table; else the compiler masks it at every use
  unsigned panel = 0;
  do {  // a split has a panel: were it left out, the sums would have two origins and ptxas wait for every product
    const unsigned at = panel % kPanels;
    barrier_wait(&sh.codes_full[at], round_of<kPanels>(panel));
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      decode<T>(sh, at, step, row, column, g.segment_bits - 5, a[step % 2]);
      if (step == kSteps - 1) release_codes(&sh.codes_empty[at]);
      barrier_wait(&sh.x_full[step], panel % 2);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int c = 0; c < kCount; ++c)
          wgmma<T>(sums[c], a[step % 2][i], x + step * kRows * 8 + 2 * D * c * 8 + 2 * i);
      wgmma_commit();
      wgmma_wait<1>();
      if (step != 0 || panel != 0) release_x(&sh.x_empty[(step + kSteps - 1) % kSteps], task.pair);
    }
  } while (++panel < task.panels);
  wgmma_wait<0>();
  release_x(&sh.x_empty[kSteps - 1], task.pair);

  // The branch: rows of B where the codes were, rows of S where x was.
  unsigned x_step = panel * kSteps;
  each_branch_step(g, sh.slot, task.split, [&](int slot, int64_t) {
    const unsigned at = panel % kPanels, x_at = x_step % kSteps;
    barrier_wait(&sh.codes_full[at], round_of<kPanels>(panel++));
    barrier_wait(&sh.x_full[x_at], round_of<kSteps>(x_step++));
    const uint64_t b = tile_operand(sh.codes[at][threadIdx.x / 128 * 64]);
    if (kRows > kMostMixedRows || g.lora.rows == nullptr) {
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int c = 0; c < kCount; ++c) wgmma_tf32(sums[c], b + 2 * i, tile_operand(sh.x[x_at][2 * D * c]) + 2 * i);
      wgmma_commit();
      wgmma_wait<0>();
    } else {  // a row takes nothing from another's adapter, be that infinite
#pragma unroll
      for (int c = 0; c < kRows / 16; ++c) {
        float part[8] = {};
        wgmma_fence(part);
#pragma unroll
        for (int i = 0; i < 4; ++i) wgmma_tf32(part, b + 2 * i, tile_operand(sh.x[x_at][16 * c]) + 2 * i);
        wgmma_commit();
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (sh.slot[16 * c + i / 4 * 8 + lane % 4 * 2 + i % 2] == slot) sums[8 * c / D][8 * c % D + i] += part[i];
      }
    }
    release_codes(&sh.codes_empty[at]);
    release_x(&sh.x_empty[x_at], task.pair);
  });

  // Partial sums as [row of x][row of W], where the operands were: this block's are used, and its pair's are here.
  named_sync(1, kConsumers);
  float (*part)[kPitch] = reinterpret_cast<float (*)[kPitch]>(sh.x);
#pragma unroll
  for (int c = 0; c < kCount; ++c)
#pragma unroll
    for (int i = 0; i < D; ++i) part[2 * D * c + i / 4 * 8 + lane % 4 * 2 + i % 2][row + i / 2 % 2 * 8] = sums[c][i];
}

// Scales and zero points of rows `row` and `row` + 64, panel after panel. They are loaded before the wait, which then
// hides the latency.
template <int kRows>
PF_DEVICE void bring_scales(const Arguments& g, Shared<kRows>& sh, const Task& task, int row) {
  constexpr unsigned kPanels = Shared<kRows>::kPanels;
  const PfWeight& w = g.w;
  const int segments = kPanel >> g.segment_bits;
  const float offset = w.scale == nullptr ? __ldg(w.offset) : 0.0f;
  for (unsigned panel = 0; panel < task.panels; ++panel) {
    const unsigned at = panel % kPanels;
    for (int segment = 0; segment < segments; segment += 4) {
      int64_t block[8];
      float scale[8], zero[8] = {};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int64_t n = task.n0 + row + i / 4 * 64;
        const int64_t k = int64_t{task.first + panel} * kPanel + ((segment + i % 4) << g.segment_bits);
        block[i] = n < w.n && k < w.k ? (n * w.k + k) >> g.block_bits : -1;
      }
      if (w.scale != nullptr) {
#pragma unroll
        for (int i = 0; i < 8; ++i) scale[i] = block[i] < 0 ? 0.0f : __ldg(w.scale + block[i]);
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
          scale[i] = block[i] < 0 ? 0.0f : scale_of(load_scale(w, block[i]), w.dynamic_map, offset);
      }
      if (w.zero != nullptr) {
#pragma unroll
        for (int i = 0; i < 8; ++i) zero[i] = block[i] < 0 ? 0.0f : __ldg(w.zero + block[i]);
      }
      if (segment == 0) barrier_wait(&sh.codes_empty[at], round_of<kPanels>(panel) ^ 1);
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (segment + i % 4 < segments) sh.scale[at][segment + i % 4][row + i / 4 * 64] = {scale[i], zero[i]};
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(&sh.codes_full[at]);
  }
}

template <class T, int kRows>
PF_DEVICE void produce(const Arguments& g, Shared<kRows>& sh) {
  const Task task(g);
  constexpr int kPanels = Shared<kRows>::kPanels;
  const int thread = threadIdx.x - kConsumers, warp = thread / 32, lane = thread % 32;
  const int64_t k0 = int64_t{task.first} * kPanel;
  if (warp == 0 && lane == 0) {
    for (unsigned panel = 0; panel < task.panels; ++panel) {
      const unsigned at = panel % kPanels;
      barrier_wait(&sh.codes_empty[at], round_of<kPanels>(panel) ^ 1);
      barrier_expect(&sh.codes_full[at], sizeof(sh.codes[0]));
      load_tile(sh.codes[at], &g.codes, static_cast<int>(k0 / 2 + panel * (kPanel / 2)), static_cast<int>(task.n0),
                &sh.codes_full[at], evict_first());
    }
  } else if (warp == 1 && lane == 0) {
    const int half = task.rank % 2 * (kRows / 2);
    for (unsigned step = 0; step < task.panels * kSteps; ++step) {
      const unsigned at = step % kSteps;
      barrier_wait(&sh.x_empty[at], round_of<kSteps>(step) ^ 1);
      barrier_expect(&sh.x_full[at], sizeof(sh.x[0]));
      load_tile_to(sh.x[at][half], &g.x, static_cast<int>(k0 + step * kStep), half, &sh.x_full[at], 3 << task.pair);
    }
  } else if (warp >= 2) {
    bring_scales(g, sh, task, thread - 64);
  }

  // All four warps bring what a step of the branch takes. Parities tell two phases apart, so nobody waits for a phase
  // before those of the sweep have come and gone.
  named_sync(2, kProducers);
  wait_for_previous_grid();
  unsigned panel = task.panels, x_step = panel * kSteps;
  each_branch_step(g, sh.slot, task.split, [&](int slot, int64_t rank0) {
    const unsigned at = panel % kPanels, x_at = x_step % kSteps;
    barrier_wait(&sh.codes_empty[at], round_of<kPanels>(panel++) ^ 1);
    barrier_wait(&sh.x_empty[x_at], round_of<kSteps>(x_step++) ^ 1);
    const auto place = [](unsigned char* row, int r, int rank) {
      return reinterpret_cast<float*>(row + ((rank / 4 ^ r % 8) * 16 + rank % 4 * 4));
    };
    const int64_t rank = rank0 + lane;
    const bool inside = rank < g.lora.rank;
    with_type(g.lora.b, g.lora.b_dtype, [&](auto* b) {
      b += slot * g.lora.b_slot_stride + rank * g.lora.b_column_stride;
#pragma unroll 4
      for (int r = warp; r < kRowTile; r += 4) {
        const float v = inside && task.n0 + r < g.w.n ? to_float(b[(task.n0 + r) * g.lora.b_stride]) : 0.0f;
        *place(sh.codes[at][r], r, lane) = to_tf32(v);
      }
    });
#pragma unroll 4
    for (int r = warp; r < kRows; r += 4) {
      const float s = inside && sh.slot[r] == slot ? g.s[r * g.lora.rank + rank] : 0.0f;
      *place(sh.x[x_at][r], r, lane) = to_tf32(s);
    }
    stores_to_wgmma();
    named_sync(2, kProducers);
    if (thread == 0) {
      barrier_arrive(&sh.codes_full[at], 3);
      barrier_arrive(&sh.x_full[x_at]);
    }
  });
}

// This split's share of the rows of y: the sums over the splits, in order.
template <class T, int kRows>
PF_DEVICE void store(const Arguments& g, const Shared<kRows>& sh) {
  const Task task(g);
  const int begin = kRows * task.split / g.splits, end = kRows * (task.split + 1) / g.splits;
  const int column = threadIdx.x % 32 * 4;
  const int64_t n = task.n0 + column;
  float bias[4] = {};
  if (g.bias != nullptr)
    with_type(g.bias, g.bias_dtype, [&](auto* p) {
      for (int i = 0; i < 4; ++i)
        if (n + i < g.w.n) bias[i] = to_float(p[n + i]);
    });
  for (int m = begin + threadIdx.x / 32; m < end && m < g.m; m += kConsumers / 32) {
    const float* here = reinterpret_cast<const float*>(sh.x) + m * kPitch + column;
    float v[4] = {bias[0], bias[1], bias[2], bias[3]};
    for (int i = 0; i < g.splits; ++i) {
      const float4 part = *reinterpret_cast<const float4*>(shared_of(here, 2 * i + task.rank % 2));
      v[0] += part.x, v[1] += part.y, v[2] += part.z, v[3] += part.w;
    }
    T* y = static_cast<T*>(g.y) + m * g.w.n + n;
    if (g.w.n % 4 == 0) {
      if (n < g.w.n) *reinterpret_cast<uint2*>(y) = {pack<T>(v[0], v[1]), pack<T>(v[2], v[3])};
    } else {
      for (int i = 0; i < 4; ++i)
        if (n + i < g.w.n) y[i] = from_float<T>(v[i]);
    }
  }
}

template <class T, int D, int kCount>
__global__ void PF_REGISTERS(Registers<2 * D * kCount>::kAll) sweep(const PF_GRID_CONSTANT Arguments g) {
#if PF_SM90A
  constexpr int kRows = 2 * D * kCount, kPanels = Shared<kRows>::kPanels;
  Shared<kRows>& sh = *reinterpret_cast<Shared<kRows>*>(swizzled_memory());
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSteps; ++i) {
      barrier_init(&sh.x_full[i], 1);
      barrier_init(&sh.x_empty[i], 2 * kConsumers / 32);
    }
    for (int i = 0; i < kPanels; ++i) {
      barrier_init(&sh.codes_full[i], 3);
      barrier_init(&sh.codes_empty[i], kConsumers / 32);
    }
    barriers_initialized();
  }
  if (threadIdx.x < kMostRows) {
    const int m = threadIdx.x;
    sh.slot[m] = g.lora.rank != 0 && m < g.m ? slot_of(g.lora, m) : -1;
  }
  cluster_sync();

  if (threadIdx.x >= kConsumers) {
    lower_registers<Registers<kRows>::kProducer>();
    produce<T>(g, sh);
    cluster_sync();
  } else {
    raise_registers<Registers<kRows>::kConsumer>();
    consume<T, D, kCount>(g, sh);
    cluster_sync();
    store<T>(g, sh);
  }
  cluster_sync();  // no block ends while another reads its sums
#endif
}

// ---- S ----

constexpr int kProjectWarps = 4, kProjectBlocks = 8;  // that split K, of a block and of a cluster

// s [m, rank] = (x * A^T) o scaling for 16 rows of x and 8 ranks a cluster; rows without an adapter are left alone. The
// order of the contraction is free: each lane takes eight elements that lie side by side.
template <class T>
__global__ void __launch_bounds__(32 * kProjectWarps, 9)
    project(const T* x, int64_t ldx, const PF_GRID_CONSTANT PfLora lora, float* s, int64_t m, int64_t k) {
#if PF_SM90A
  float (*parts)[32][4] = reinterpret_cast<float (*)[32][4]>(shared_memory());  // [warp]
  let_next_grid_start();
  const unsigned rank_in_cluster = cluster_rank();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t row_tiles = (m + 15) / 16, tile = blockIdx.x / kProjectBlocks;
  const int64_t row0 = tile % row_tiles * 16, row = row0 + lane / 4;
  const int64_t rank0 = tile / row_tiles * 8, rank = rank0 + lane / 4;
  int last = -1;
  for (;;) {
    int slot = INT32_MAX;  // the least beyond the last
    for (int64_t i = row0; i < row0 + 16 && i < m; ++i) {
      const int other = slot_of(lora, i);
      if (other > last && other < slot) slot = other;
    }
    if (slot == INT32_MAX) return;
    last = slot;
    float sums[4] = {};
    with_type(lora.a, lora.a_dtype, [&](auto* a) {
      using E = std::remove_const_t<std::remove_reference_t<decltype(*a)>>;
      a += slot * lora.a_slot_stride + rank * lora.a_stride;
      const bool aligned = aligned16(a);
      constexpr int kColumns = 32 * kProjectWarps * kProjectBlocks;
#pragma unroll 2
      for (int64_t k0 = (rank_in_cluster * kProjectWarps + warp) * 32 + lane % 4 * 8; k0 < k; k0 += kColumns) {
        uint4 low{}, high{};
        Raw8<E> raw;
        if (row < m) low = __ldg(reinterpret_cast<const uint4*>(x + row * ldx + k0));
        if (row + 8 < m) high = __ldg(reinterpret_cast<const uint4*>(x + (row + 8) * ldx + k0));
        if (rank < lora.rank) raw = load_eight(a + k0, aligned);
        const uint4 other = pack8<T>(raw);
        mma<T>(sums, {low.x, high.x, low.y, high.y}, other.x, other.y);
        mma<T>(sums, {low.z, high.z, low.w, high.w}, other.z, other.w);
      }
    });
#pragma unroll
    for (int i = 0; i < 4; ++i) parts[warp][lane][i] = sums[i];
    cluster_sync();
    if (rank_in_cluster == 0 && warp == 0) {
      const float factor = lora.factor * (lora.scaling == nullptr ? 1.0f : lora.scaling[slot]);
      for (int i = 0; i < 4; ++i) {
        float sum = 0;
        for (int block = 0; block < kProjectBlocks; ++block)
          for (int other = 0; other < kProjectWarps; ++other) sum += *shared_of(&parts[other][lane][i], block);
        const int64_t to = row + i / 2 * 8, column = rank0 + lane % 4 * 2 + i % 2;
        if (to < m && column < lora.rank && slot_of(lora, to) == slot)
          s[to * lora.rank + column] = sum * (factor * (lora.rank_scale == nullptr ? 1.0f : lora.rank_scale[column]));
      }
    }
    cluster_sync();
  }
#endif
}

// ---- host ----

// The split of K that takes the fewest panels one after another, where a block costs three panels beside its own.
int best_splits(int64_t pairs, int64_t panels, int64_t processors) {
  int best = 1;
  int64_t least = INT64_MAX;
  for (int splits = 1; splits <= kMostSplits && splits <= panels; splits *= 2) {
    const int64_t time = ceil_div(2 * pairs * splits, processors) * (ceil_div(panels, splits) + 3);
    if (time < least) least = time, best = splits;
  }
  return best;
}

template <class T, int D, int kCount>
cudaError_t run(Arguments g, const void* x, int64_t ldx, int64_t pairs, void* stream) {
  constexpr int kRows = 2 * D * kCount;
  if (const cudaError_t status = map_tiles(&g.codes, g.w.codes, 1, g.w.n, g.w.k / 2, g.w.k / 2, kRowTile))
    return status;
  if (const cudaError_t status = map_tiles(&g.x, x, 2, g.m, g.w.k, ldx * 2, kRows / 2)) return status;
  const int cluster = 2 * g.splits;
  return launch_clusters(sweep<T, D, kCount>, pairs * cluster, kConsumers + kProducers, sizeof(Shared<kRows>), cluster,
                         g.lora.rank != 0, stream, g);
}

// Rows with adapters of their own go kMostMixedRows at a time.
template <class T>
cudaError_t linear(const PfWeight& w, const T* x, int64_t ldx, const void* bias, int32_t bias_dtype, const PfLora* lora,
                   T* y, int64_t m, float* s, void* stream) {
  Arguments g{};
  g.w = w;
  if (lora != nullptr && lora->slots > 0) g.lora = *lora;
  if (g.lora.rank != 0 && g.lora.rows != nullptr && m > kMostMixedRows) {
    PfLora rest = g.lora;
    rest.rows += kMostMixedRows;
    if (const cudaError_t status = linear(w, x, ldx, bias, bias_dtype, lora, y, kMostMixedRows, s, stream))
      return status;
    return linear(w, x + kMostMixedRows * ldx, ldx, bias, bias_dtype, &rest, y + kMostMixedRows * w.n,
                  m - kMostMixedRows, s, stream);
  }
  g.s = s;
  g.bias = bias;
  g.bias_dtype = bias_dtype;
  g.y = y;
  g.m = static_cast<int32_t>(m);
  g.panels = static_cast<int32_t>(ceil_div(w.k, kPanel));
  while (1 << g.block_bits < w.blocksize) ++g.block_bits;
  g.segment_bits = 8;  // a panel
  while ((w.k | w.blocksize) & ((1 << g.segment_bits) - 1)) --g.segment_bits;
  const int64_t pairs = ceil_div(w.n, 2 * kRowTile);
  g.splits = best_splits(pairs, g.panels, device_attribute(cudaDevAttrMultiProcessorCount));
  if (g.lora.rank != 0) {
    const int64_t tiles = ceil_div(m, 16) * ceil_div(g.lora.rank, 8);
    const int threads = 32 * kProjectWarps, bytes = threads * 16;
    if (const cudaError_t status = launch_clusters(project<T>, tiles * kProjectBlocks, threads, bytes, kProjectBlocks,
                                                   false, stream, x, ldx, g.lora, s, m, w.k))
      return status;
  }
  if (m <= 32) return run<T, 16, 1>(g, x, ldx, pairs, stream);
  if (m <= 64) return run<T, 32, 1>(g, x, ldx, pairs, stream);
  if (m <= 96) return run<T, 16, 3>(g, x, ldx, pairs, stream);
  if (m <= 128) return run<T, 64, 1>(g, x, ldx, pairs, stream);
  if (m <= 192) return run<T, 32, 3>(g, x, ldx, pairs, stream);
  return run<T, 64, 2>(g, x, ldx, pairs, stream);
}

}  // namespace
}  // namespace pf

using namespace pf;

int64_t pf_linear_4bit_sm90_most_rows(const PfWeight* w, int32_t dtype) {
  const bool hopper = device_attribute(cudaDevAttrComputeCapabilityMajor) == 9;
  const bool takes = w->k > 0 && w->k % kStep == 0 && aligned16(w->codes) && (dtype == kBFloat16 || dtype == kFloat16);
  return hopper && takes ? kMostRows : 0;
}

int32_t pf_linear_4bit_sm90_takes(const PfWeight* w, const void* x, int64_t ldx, const void* y, int64_t m,
                                  int32_t dtype) {
  const bool mapped = aligned16(x) && ldx % 8 == 0 && ldx >= w->k;  // TMA knows no rows that overlap, expanded ones
  return m <= pf_linear_4bit_sm90_most_rows(w, dtype) && mapped && aligned16(y);
}

int32_t pf_linear_4bit_sm90(const PfWeight* w, const void* x, int64_t ldx, const void* bias, int32_t bias_dtype,
                            const PfLora* lora, void* y, int64_t m, int32_t dtype, float* s, void* stream) {
  const auto call = [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    return linear(*w, static_cast<const T*>(x), ldx, bias, bias_dtype, lora, typed, m, s, stream);
  };
  return dtype == kBFloat16 ? call(static_cast<bf16*>(y)) : call(static_cast<f16*>(y));
}
