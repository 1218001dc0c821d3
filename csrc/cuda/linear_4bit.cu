// y [M, N] = x · Wᵀ + bias + (x · Aᵀ ∘ scaling) · Bᵀ for few rows of x: see pf_linear_4bit in api.h.
//
// W is read once, from HBM, as it lies; all else is small and comes from L2. The rows of W are the rows of the tensor
// core's product (m16), those of x its columns (n8), so that eight rows of x cost what one does. A block of eight warps
// computes 64 or 128 rows of W times all rows of x over a span of columns:
//
//   codes   four stages of cp.async, 8 KB each, evict-first. Lane 4 g + t gets the bytes of columns 8 t to 8 t + 7 of
//           rows g and g + 8 by ldmatrix. The order of a contraction is free, so these are its k of two products, and
//           the same columns of x are 16 bytes in a row.
//   pairs   a byte of codes is an index into 256 words, the two values side by side. Every lane has a table of its own
//           (bank = lane), so 32 lanes look 32 bytes up in one cycle, where one table would take 3.4. Entries lie 256
//           bytes apart, and the stages of the codes between them: one byte permute makes the address.
//   scales  multiply the float32 sums of a block of 64 columns. (INT4's zero multiplies the sum of x, a product with
//           ones.)
//
// Warps that share rows and spans that share rows are added in order: the same call gives the same bits.
//
// S = x · Aᵀ is computed by the first blocks of the grid, `kSlice` columns each, while the others read W. One that
// wants to add S · Bᵀ first takes what slices nobody has begun, then waits: whatever the order in which blocks start,
// it waits only for blocks that run.
//
// Blocks find one another by counters, which every call finds and leaves at zero; see kept_counters for where they lie.
//
// What bounds it, for 16 x 64 weights (512 bytes of codes, 64 of scales), as long as rows of x are 16 or fewer:
//
//   HBM            39 cycles of an H100's multiprocessor (a 132nd of 3.35 TB/s at 1.7 GHz), 43 of an A100's
//   shared memory  4 cycles to write the codes, 4 to read them, 16 of lookups, 4 (8 rows) or 8 for x, 2 for scales
//   instructions   90 (8 rows) or 98 of the 156 that an H100 issues in 39 cycles; 46 and 54 decode and multiply
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "codes.cuh"
#include "elements.cuh"
#include "linear_4bit_sm90.h"
#include "lora.cuh"

namespace pf {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kStages = 4;                         // of 8 KB of codes
constexpr int kUnit = 64;                          // columns that a warp takes at a time
constexpr int kWarpRows = 32;                      // of W, two products high
constexpr int kMostRows = 128, kMostRowsAny = 16;  // of x; where K or an address is odd
constexpr int kMostSplits = 16;
constexpr int kTable = 64 << 10;  // bytes of the pairs and, between them, of the codes
constexpr int kSlice = 512;       // columns of x · Aᵀ that a block takes
constexpr int kRanks = 32;        // of S that are in shared memory at a time
constexpr int kCounters = 4096;   // of each kind
constexpr int kMostCounters = 32 + 2 * kCounters;
constexpr int kMostKept = 256;  // counters of streams and of graphs
constexpr int kFewRows = 16;    // that even on sm_90 are this kernel's

// How a block cuts its part when 8 NT rows of x are its columns.
template <int NT>
struct Tile {
  static constexpr int kRowWarps = NT == 1 ? 2 : 4, kDepthWarps = kWarps / kRowWarps;
  static constexpr int kRows = kRowWarps * kWarpRows, kColumns = kDepthWarps * kUnit;  // of W, a step
  static constexpr int kColumnBits = NT == 1 ? 8 : 7;
  static constexpr int kXRows = 8 * NT;
  static constexpr int kChunks = kColumns / 32;   // 16 bytes of codes each, of a row
  static constexpr int kScaleStride = kRows + 8;  // [block][row], free of bank conflicts
  static constexpr int kSumStride = kRows + 4;    // [warp][row of x][row of W], likewise
  static constexpr int kSums = kDepthWarps * kXRows * kSumStride * 4;
  static constexpr int kParts = kThreads / kRows, kPartRows = kXRows / kParts;  // in the epilogue
};

// What the whole grid knows.
struct Plan {
  int64_t row_tiles, x_tiles, steps, span, splits;  // blocks of W's rows, of x's rows; steps of columns; steps a split
  int64_t pairs, slices;                            // of S: 16 ranks times 8 rows; slices of columns
  int shared_bytes;
  bool whole_slices;  // rows of A and x are loaded 16 bytes at a time

  __host__ __device__ int64_t tiles() const { return row_tiles * x_tiles; }
  __host__ __device__ int64_t tasks() const { return pairs * slices; }
  // Words that are counted with: splits of tiles at the end, in lines of 128 bytes that nobody else waits at.
  int64_t other_counters() const { return (4 + pairs + 31) / 32 * 32; }
  int64_t counters() const {
    if (splits == 1) return pairs == 0 ? 0 : other_counters();
    return other_counters() + (tiles() + 3) / 4 * 4;
  }
};

struct Workspace {
  uint32_t *claimed, *ready, *left;  // slices of S begun, pairs of S done, blocks that need S no more
  uint32_t *slices_done, *splits_done;
  float *slice_sums, *s;  // [pair][slice][16][8], [M, rank] scaled
  float* split_sums;      // [tile][split][row of x][row of W]
};

struct Arguments {
  PfWeight w;
  PfLora lora;
  const void *x, *bias;
  void* y;
  int64_t ldx, m;
  int32_t bias_dtype;
  Plan plan;
  Workspace at;
};

PF_DEVICE int lane() { return threadIdx.x % 32; }
PF_DEVICE int warp() { return threadIdx.x / 32; }

// ---- S = x · Aᵀ

// product [ranks g, g, g + 8, g + 8; rows of x 2 t, 2 t + 1] += A · xᵀ over this warp's columns of a slice. Where the
// rows of A and x allow it they are loaded 16 bytes at a time, all before the first is needed.
template <typename T, typename A>
PF_DEVICE void multiply_slice(const Arguments& p, const void* a_row, bool low_inside, bool high_inside, const T* x_row,
                              bool x_inside, int64_t column0, float (&product)[4]) {
  constexpr int kSteps = kSlice / kWarps / 32;
  Raw8<A> low[kSteps], high[kSteps];
  Raw8<T> x[kSteps];
  const A* a = static_cast<const A*>(a_row);
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int64_t column = column0 + i * 32;
    if (column >= p.w.k) continue;
    if (low_inside) low[i] = load_raw8(a + column);
    if (high_inside) high[i] = load_raw8(a + 8 * p.lora.a_stride + column);
    if (x_inside) x[i] = load_raw8(x_row + column);
  }
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const uint4 l = pack8<T>(low[i]), h = pack8<T>(high[i]), v = pack8<T>(x[i]);
    mma<T>(product, {l.x, h.x, l.y, h.y}, v.x, v.y);
    mma<T>(product, {l.z, h.z, l.w, h.w}, v.z, v.w);
  }
}

// Sums a slice of S [16 ranks, 8 rows of x] over kSlice columns, and all slices of it if it is the last.
template <typename T>
PF_DEVICE void sum_slice(const Arguments& p, unsigned char* memory, int64_t task) {
  const PfLora& lora = p.lora;
  const int64_t pair = task / p.plan.slices, slice = task % p.plan.slices, rank_tiles = (lora.rank + 15) / 16;
  const int64_t m0 = pair / rank_tiles * 8, rank0 = pair % rank_tiles * 16;
  const int g = lane() / 4, t = lane() % 4;
  const int64_t column0 = slice * kSlice + warp() * (kSlice / kWarps) + t * 8;
  const bool low_inside = rank0 + g < lora.rank, high_inside = rank0 + g + 8 < lora.rank, x_inside = m0 + g < p.m;
  const T* x_row = static_cast<const T*>(p.x) + (m0 + g) * p.ldx;
  float sums[4] = {};
  for (int64_t first = m0; first < m0 + 8 && first < p.m; ++first) {
    const int64_t slot = slot_of(lora, first);
    bool seen = slot < 0;
    for (int64_t m = m0; m < first; ++m) seen |= slot_of(lora, m) == slot;
    if (seen) continue;
    const int64_t at = slot * lora.a_slot_stride + (rank0 + g) * lora.a_stride;
    const char* a_row = static_cast<const char*>(lora.a) + at * element_size(lora.a_dtype);
    float product[4] = {};
    if (!p.plan.whole_slices) {
#pragma unroll 1
      for (int64_t column = column0; column < column0 + kSlice / kWarps; column += 32) {
        float l[8], h[8], x[8];
        const int64_t left = p.w.k - column;
        load8(lora.a, lora.a_dtype, at + column, 1, low_inside ? left : 0, l);
        load8(lora.a, lora.a_dtype, at + 8 * lora.a_stride + column, 1, high_inside ? left : 0, h);
        load8(x_row, kDType<T>, column, 1, x_inside ? left : 0, x);
        const uint4 low = pack8<T>(l), high = pack8<T>(h), v = pack8<T>(x);
        mma<T>(product, {low.x, high.x, low.y, high.y}, v.x, v.y);
        mma<T>(product, {low.z, high.z, low.w, high.w}, v.z, v.w);
      }
    } else if (lora.a_dtype == kFloat32) {
      multiply_slice<T, float>(p, a_row, low_inside, high_inside, x_row, x_inside, column0, product);
    } else if (lora.a_dtype == kBFloat16) {
      multiply_slice<T, bf16>(p, a_row, low_inside, high_inside, x_row, x_inside, column0, product);
    } else {
      multiply_slice<T, f16>(p, a_row, low_inside, high_inside, x_row, x_inside, column0, product);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t m = m0 + 2 * t + i % 2;
      if (m < p.m && slot_of(lora, m) == slot) sums[i] = product[i];
    }
    // This adapter's B is wanted next: each slice asks for a part of its rows.
    for (int64_t n = slice * kThreads + threadIdx.x; n < p.w.n; n += p.plan.slices * kThreads) {
      const int64_t b = slot * lora.b_slot_stride + n * lora.b_stride + rank0 * lora.b_column_stride;
      prefetch_l2(static_cast<const char*>(lora.b) + b * element_size(lora.b_dtype));
    }
  }
  float* partial = reinterpret_cast<float*>(memory);  // [warp][16][8]
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; ++i) partial[warp() * 128 + (g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
  __syncthreads();
  float* slice_sums = p.at.slice_sums + pair * p.plan.slices * 128;
  const int i = threadIdx.x;
  if (i < 128) {
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += partial[w * 128 + i];
    slice_sums[slice * 128 + i] = sum;
  }
  uint32_t* last = reinterpret_cast<uint32_t*>(partial + kWarps * 128);
  __syncthreads();
  if (threadIdx.x == 0) *last = arrive(p.at.slices_done + pair) == p.plan.slices - 1;
  __syncthreads();
  if (*last == 0) return;
  const int64_t m = m0 + i % 8, rank = rank0 + i / 8;
  if (i < 128 && m < p.m && rank < lora.rank) {
    float sum = 0.0f;
    for (int64_t s = 0; s < p.plan.slices; ++s) sum += __ldcg(slice_sums + s * 128 + i);
    const int64_t slot = slot_of(lora, m);
    const float scaling = slot < 0 || lora.scaling == nullptr ? 1.0f : __ldg(lora.scaling + slot);
    const float of_rank = lora.rank_scale == nullptr ? 1.0f : __ldg(lora.rank_scale + rank);
    p.at.s[m * lora.rank + rank] = sum * (scaling * of_rank * lora.factor);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    store_relaxed(p.at.slices_done + pair, 0);
    arrive(p.at.ready);
  }
}

// The next slice that nobody has begun; from plan.tasks() on: none is left.
PF_DEVICE int64_t claim(const Arguments& p, uint32_t* shared) {
  __syncthreads();
  if (threadIdx.x == 0) *shared = arrive(p.at.claimed);
  __syncthreads();
  return *shared;
}

// Of every block that takes slices, at its end: the last one leaves the counters as they were.
PF_DEVICE void leave(const Arguments& p) {
  if (threadIdx.x != 0 || arrive(p.at.left) != p.plan.tasks() + p.plan.tiles() - 1) return;
  store_relaxed(p.at.claimed, 0);
  store_relaxed(p.at.ready, 0);
  store_relaxed(p.at.left, 0);
}

// ---- the sweep over W

// Where a chunk of a row's codes lies in its stage: between the entries of the table, in lines of eight chunks,
// swizzled so that the same chunk of eight rows lies in eight places of a line.
template <typename C>
PF_DEVICE unsigned codes_offset(int row, int chunk) {
  const unsigned i = row * C::kChunks + chunk, line = i / 8, place = i % 8 ^ (line & (C::kChunks - 1));
  return line * 256 + 128 + place * 16;
}
// Where 8 columns of a row of x lie in their stage: chunks of odd rows are swapped by fours.
template <typename C>
PF_DEVICE int x_offset(int row, int chunk) {
  return (row * (C::kColumns / 8) + (chunk ^ (row & 1) << 2)) * 16;
}

// acc [32 rows of the warp, 8 NT rows of x], zeros, = W · xᵀ over this warp's columns of steps [step0, step1). Needs K
// % 64 == 0 and 16-byte aligned codes and rows of x; without ANY_BLOCK, blocks of 64 at least and no zeros.
//
// A thread copies, loads and reads the same places of every step. Rows past the last are not read; what is computed for
// them is not used.
template <typename T, int NT, bool ANY_BLOCK>
PF_DEVICE void sweep(const Arguments& p, unsigned char* memory, int64_t row0, int64_t m0, unsigned step0,
                     unsigned step1, float (&acc)[2][NT][4]) {
  using C = Tile<NT>;
  const PfWeight& w = p.w;
  const int row_warp = warp() % C::kRowWarps, depth_warp = warp() / C::kRowWarps, g = lane() / 4, t = lane() % 4;
  const int x_rows = static_cast<int>(min64(p.m - m0, C::kXRows)), x_stage = x_rows * C::kColumns * 2;
  const bool halves = ANY_BLOCK && w.blocksize == 32, has_zero = ANY_BLOCK && w.zero != nullptr;
  const int block_bits = __ffs(w.blocksize) - 1, unit_bits = halves ? 5 : 6;
  const int row_bits = C::kColumnBits - unit_bits, per_row = 1 << row_bits;  // scales of a row, a step
  const int scale_stage = C::kScaleStride << row_bits;
  unsigned char* x_stages = memory + kTable;
  float* scales = reinterpret_cast<float*>(x_stages + kStages * x_stage);  // [2][per_row][kScaleStride]
  float* zeros = scales + 2 * scale_stage;
  float* dynamic_map = has_zero ? zeros + 2 * scale_stage : zeros;
  const uint64_t policy = evict_first();
  // Whether a unit of a step is inside the matrix: of the last step perhaps not all are.
  const unsigned whole_steps = static_cast<unsigned>(w.k >> C::kColumnBits);
  const int last_units = static_cast<int>(w.k & (C::kColumns - 1)) / kUnit;
  const auto inside = [&](unsigned step, int unit) { return step < whole_steps + (unit < last_units); };
  const int rows = static_cast<int>(min64(w.n - row0, C::kRows));

  // Codes: a chunk of kCodes rows. Places in memory, of a stage and of what is read, go round 64 KB in four steps.
  constexpr int kCodes = C::kRows * C::kChunks / kThreads, kCodeRows = kThreads / C::kChunks;
  constexpr int kCodeStage = kTable / kStages, kCodeStep = kCodeRows * C::kChunks / 8 * 256;
  const int code_row = threadIdx.x / C::kChunks, code_chunk = threadIdx.x % C::kChunks;
  unsigned codes_to = codes_offset<C>(code_row, code_chunk);
  const uint8_t* codes = w.codes + ((row0 + code_row) * w.k + int64_t{step0} * C::kColumns) / 2 + code_chunk * 16;
  // x: a chunk of kXs rows.
  constexpr int kXChunks = C::kColumns / 8, kXRowsAtOnce = kThreads / kXChunks;
  constexpr int kXs = (C::kXRows + kXRowsAtOnce - 1) / kXRowsAtOnce;
  const int x_row = threadIdx.x / kXChunks, x_chunk = threadIdx.x % kXChunks;
  const int x_to = kTable + x_offset<C>(x_row, x_chunk);
  const T* x = static_cast<const T*>(p.x) + (m0 + x_row) * p.ldx + int64_t{step0} * C::kColumns + x_chunk * 8;
  const auto copy = [&](unsigned step) {
    if (step < step1) {
      if (inside(step, code_chunk / 2)) {
#pragma unroll
        for (int j = 0; j < kCodes; ++j)
          if (code_row + j * kCodeRows < rows)
            cp_async16(memory + codes_to + j * kCodeStep, codes + j * kCodeRows * (w.k / 2), policy);
      }
      if (inside(step, x_chunk / 8)) {
#pragma unroll
        for (int j = 0; j < kXs; ++j)
          if (x_row + j * kXRowsAtOnce < x_rows)
            cp_async16(memory + x_to + step % kStages * x_stage + x_offset<C>(j * kXRowsAtOnce, 0),
                       x + j * kXRowsAtOnce * p.ldx);
      }
    }
    cp_async_commit();
    codes_to = (codes_to + kCodeStage) % kTable;
    codes += C::kColumns / 2;
    x += C::kColumns;
  };
  // Scales (up to kScales): loaded a step ahead and written when the step is over, so that nobody waits for them.
  constexpr int kScales = C::kRows * C::kColumns / (ANY_BLOCK ? 32 : kUnit) / kThreads;
  const int scale_row = threadIdx.x >> row_bits, scale_block = threadIdx.x & (per_row - 1);
  const int scale_rows = kThreads >> row_bits;  // between the scales of a thread
  int64_t scale_at = (row0 + scale_row) * w.k + int64_t{step0} * C::kColumns + (scale_block << unit_bits);
  RawScale raw[kScales] = {};
  float raw_zero[kScales] = {};
  const auto has_scales = [&](unsigned step, int j) {
    return step < step1 && scale_row + j * scale_rows < rows && inside(step, (scale_block << unit_bits) / kUnit);
  };
  const auto load_scales = [&](unsigned step) {
#pragma unroll
    for (int j = 0; j < kScales; ++j) {
      if (!has_scales(step, j)) continue;
      const int64_t block = (scale_at + j * scale_rows * w.k) >> block_bits;
      raw[j] = load_scale(w, block);
      if (has_zero) raw_zero[j] = __ldg(w.zero + block);
    }
    scale_at += C::kColumns;
  };
  const float offset = w.scale != nullptr ? 0.0f : __ldg(w.offset);
  const auto store_scales = [&](unsigned step) {
    float* to = scales + step % 2 * scale_stage + scale_block * C::kScaleStride + scale_row;
#pragma unroll
    for (int j = 0; j < kScales; ++j) {
      if (!has_scales(step, j)) continue;
      to[j * scale_rows] = scale_of(raw[j], w.scale != nullptr ? nullptr : dynamic_map, offset);
      if (has_zero) to[j * scale_rows + 2 * scale_stage] = raw_zero[j];
    }
  };

#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) copy(step0 + s);
  load_scales(step0);
  const float* value = product_values<T>(w.format);
  for (int i = 0; i < 256 / kWarps; ++i) {
    const int entry = warp() * (256 / kWarps) + i;
    const uint32_t pair = pack<T>(value[entry / 16], value[entry % 16]);
    *reinterpret_cast<uint32_t*>(memory + entry * 256 + lane() * 4) = pair;
  }
  if (w.scale == nullptr) dynamic_map[threadIdx.x] = __ldg(w.dynamic_map + threadIdx.x);
  __syncthreads();
  store_scales(step0);

  // The two values of one of four bytes.
  const uint32_t own = lane() * 4;
  const auto values = [&](uint32_t bytes, int byte) {
    return *reinterpret_cast<const uint32_t*>(memory + __byte_perm(bytes, own, 0x5504 | byte << 4));
  };
  unsigned codes_from = codes_offset<C>(row_warp * kWarpRows + lane() % 16, depth_warp * 2 + lane() / 16);
  int x_from[NT];
#pragma unroll
  for (int n = 0; n < NT; ++n)
    x_from[n] = kTable + x_offset<C>(min(n * 8 + g, x_rows - 1), depth_warp * (kUnit / 8) + t);
  const float* scales_from = scales + (depth_warp << (6 - unit_bits)) * C::kScaleStride + row_warp * kWarpRows + g;

  for (unsigned step = step0; step < step1; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    copy(step + kStages - 1);
    load_scales(step + 1);
    if (inside(step, depth_warp)) {
      const int x_stage_at = step % kStages * x_stage;
      uint32_t fragments[2][4][4];  // [16 rows][16 columns]
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        uint32_t bytes[4];  // rows g, g + 8 of columns 8 t to 8 t + 7; the same 32 columns on
        ldmatrix_x4(bytes, memory + codes_from + r * (C::kChunks * 2 * 256));
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
          for (int i = 0; i < 4; ++i) fragments[r][k][i] = values(bytes[k / 2 * 2 + i % 2], k % 2 * 2 + i / 2);
      }
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        float sums[2][4] = {}, x_sum[4] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int x_at = (x_from[n] + x_stage_at) ^ (half * 64);  // the second half is the row's other four chunks
          const uint4 v = *reinterpret_cast<const uint4*>(memory + x_at);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            mma<T>(sums[r], fragments[r][half * 2], v.x, v.y);
            mma<T>(sums[r], fragments[r][half * 2 + 1], v.z, v.w);
          }
          if (has_zero) {
            const uint32_t one = pack<T>(1.0f, 1.0f);
            mma<T>(x_sum, {one, one, one, one}, v.x, v.y);
            mma<T>(x_sum, {one, one, one, one}, v.z, v.w);
          }
          if (half == 0 && !ANY_BLOCK) continue;
          const int at = step % 2 * scale_stage + (halves ? half : 0) * C::kScaleStride;
#pragma unroll
          for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float* scale = scales_from + at + r * 16 + i / 2 * 8;
              acc[r][n][i] = fmaf(*scale, sums[r][i], acc[r][n][i]);
              if (has_zero) acc[r][n][i] = fmaf(scale[2 * scale_stage], x_sum[i % 2], acc[r][n][i]);
              sums[r][i] = 0.0f;
            }
          x_sum[0] = x_sum[1] = x_sum[2] = x_sum[3] = 0.0f;
        }
      }
    }
    codes_from = (codes_from + kCodeStage) % kTable;
    store_scales(step + 1);
  }
  cp_async_wait<0>();
  const float inverse = 1.0f / product_factor<T>(w.format);
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[r][n][i] *= inverse;
}

// The same for any K and any alignment, an element at a time.
template <typename T, int NT>
PF_DEVICE void sweep_elements(const Arguments& p, int64_t row0, int64_t m0, int step0, int step1,
                              float (&acc)[2][NT][4]) {
  using C = Tile<NT>;
  const PfWeight& w = p.w;
  const int row_warp = warp() % C::kRowWarps, depth_warp = warp() / C::kRowWarps, g = lane() / 4, t = lane() % 4;
  const int block_shift = __ffs(w.blocksize) - 1;
  const float offset = w.scale != nullptr ? 0.0f : __ldg(w.offset);
  const auto weights = [&](int64_t row, int64_t column) {
    float values[8];
    for (int i = 0; i < 8; ++i) {
      values[i] = 0.0f;
      if (row >= w.n || column + i >= w.k) continue;
      const int64_t at = row * w.k + column + i, block = at >> block_shift;
      const float scale = scale_of(load_scale(w, block), w.scale != nullptr ? nullptr : w.dynamic_map, offset);
      const float zero = w.zero == nullptr ? 0.0f : __ldg(w.zero + block);
      values[i] = decoded(kValues[w.format][code_at(w.codes, at)], scale, zero, w.zero != nullptr);
    }
    return pack8<T>(values);
  };
  for (int step = step0; step < step1; ++step)
    for (int half = 0; half < 2; ++half) {
      const int64_t column = static_cast<int64_t>(step) * C::kColumns + depth_warp * kUnit + half * 32 + t * 8;
      uint4 x[NT];
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        float values[8];
        const int64_t m = m0 + n * 8 + g;
        load8(p.x, kDType<T>, m * p.ldx + column, 1, m < p.m ? w.k - column : 0, values);
        x[n] = pack8<T>(values);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t row = row0 + row_warp * kWarpRows + r * 16 + g;
        const uint4 low = weights(row, column), high = weights(row + 8, column);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          mma<T>(acc[r][n], {low.x, high.x, low.y, high.y}, x[n].x, x[n].y);
          mma<T>(acc[r][n], {low.z, high.z, low.w, high.w}, x[n].z, x[n].w);
        }
      }
    }
}

// ---- the kernel

// v [rows of x of this part] += S · Bᵀ for row `n` of W.
template <typename C>
PF_DEVICE void add_branch(const Arguments& p, float* memory, int64_t n, int64_t m0, int x_rows,
                          float (&v)[C::kPartRows]) {
  const PfLora& lora = p.lora;
  float* s = memory;  // [row of x][kRanks]
  int64_t* slots = reinterpret_cast<int64_t*>(s + C::kXRows * kRanks);
  const int first = threadIdx.x / C::kRows * C::kPartRows;
  if (threadIdx.x < C::kXRows) slots[threadIdx.x] = threadIdx.x < x_rows ? slot_of(lora, m0 + threadIdx.x) : -1;
  for (int64_t rank0 = 0; rank0 < lora.rank; rank0 += kRanks) {
    __syncthreads();
    for (int i = threadIdx.x; i < C::kXRows * kRanks; i += kThreads) {
      const int64_t m = i / kRanks, rank = rank0 + i % kRanks;
      s[i] = m < x_rows && rank < lora.rank ? __ldcg(p.at.s + (m0 + m) * lora.rank + rank) : 0.0f;
    }
    __syncthreads();
    if (n >= p.w.n) continue;
    // For each adapter that rows of this part have, in the order in which it is first named.
    for (int row = first; row < first + C::kPartRows; ++row) {
      const int64_t slot = slots[row];
      bool seen = slot < 0;
      for (int i = first; i < row; ++i) seen |= slots[i] == slot;
      if (seen) continue;
      const int64_t b_row = slot * lora.b_slot_stride + n * lora.b_stride;
      for (int j = 0; j < kRanks && rank0 + j < lora.rank; j += 8) {
        float b[8];
        load8(lora.b, lora.b_dtype, b_row + (rank0 + j) * lora.b_column_stride, lora.b_column_stride,
              lora.rank - rank0 - j, b);
#pragma unroll
        for (int i = 0; i < C::kPartRows; ++i) {
          if (slots[first + i] != slot) continue;
#pragma unroll
          for (int e = 0; e < 8; ++e) v[i] = fmaf(s[(first + i) * kRanks + j + e], b[e], v[i]);
        }
      }
    }
  }
}

// How W is read.
enum Access { kWholeBlocks, kAnyBlocks, kElements };

// This block's part of W · xᵀ, then of the rows of W one and of x a few a thread. True in the block that shall finish
// the tile: all splits are in `v` then, and `ready` says whether S is there.
template <typename T, int NT, Access ACCESS>
PF_DEVICE bool multiply(const Arguments& p, unsigned char* memory, int64_t split, int64_t row0, int64_t m0,
                        float (&v)[Tile<NT>::kPartRows], bool& ready) {
  using C = Tile<NT>;
  const int step0 = static_cast<int>(split * p.plan.span);
  const int step1 = static_cast<int>(min64(step0 + p.plan.span, p.plan.steps));
  const int x_rows = static_cast<int>(min64(p.m - m0, C::kXRows));
  const bool branch = p.plan.pairs > 0;

  float acc[2][NT][4] = {};
  if constexpr (ACCESS == kElements)
    sweep_elements<T, NT>(p, row0, m0, step0, step1, acc);
  else
    sweep<T, NT, ACCESS == kAnyBlocks>(p, memory, row0, m0, step0, step1, acc);

  float* sums = reinterpret_cast<float*>(memory);  // [warp][row of x][row of W]
  const int g = lane() / 4, t = lane() % 4;
  __syncthreads();
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int m = warp() / C::kRowWarps * C::kXRows + n * 8 + 2 * t + i % 2;
        sums[m * C::kSumStride + warp() % C::kRowWarps * kWarpRows + r * 16 + g + i / 2 * 8] = acc[r][n][i];
      }
  __syncthreads();
  const int row = threadIdx.x % C::kRows, first = threadIdx.x / C::kRows * C::kPartRows;
#pragma unroll
  for (int i = 0; i < C::kPartRows; ++i)
#pragma unroll
    for (int d = 0; d < C::kDepthWarps; ++d) v[i] += sums[(d * C::kXRows + first + i) * C::kSumStride + row];

  uint32_t* flags = reinterpret_cast<uint32_t*>(memory + C::kSums);  // the last split, S is there
  const int64_t tile = row0 / C::kRows * p.plan.x_tiles + m0 / C::kXRows;
  float* split_sums = p.at.split_sums + tile * p.plan.splits * C::kXRows * C::kRows + row;
  const auto at = [&](int64_t s, int i) { return split_sums + (s * C::kXRows + first + i) * C::kRows; };
  if (p.plan.splits > 1) {
#pragma unroll
    for (int i = 0; i < C::kPartRows; ++i)
      if (first + i < x_rows) *at(split, i) = v[i];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    flags[1] = branch && load_acquire(p.at.ready) == p.plan.pairs;
    flags[0] = p.plan.splits == 1 || arrive(p.at.splits_done + tile) == p.plan.splits - 1;
  }
  __syncthreads();
  ready = flags[1] != 0;
  if (flags[0] == 0) return false;
  if (p.plan.splits == 1) return true;
  if (threadIdx.x == 0) store_relaxed(p.at.splits_done + tile, 0);
#pragma unroll
  for (int i = 0; i < C::kPartRows; ++i) v[i] = 0.0f;
  for (int64_t s = 0; s < p.plan.splits; ++s)
#pragma unroll
    for (int i = 0; i < C::kPartRows; ++i)
      if (first + i < x_rows) v[i] += __ldcg(at(s, i));
  return true;
}

template <typename T, int NT, Access ACCESS>
__global__ void __launch_bounds__(kThreads, NT >= 4 ? 1 : 2) linear_4bit_kernel(const PF_GRID_CONSTANT Arguments p) {
  using C = Tile<NT>;
  unsigned char* memory = shared_memory();
  const int64_t block = blockIdx.x - p.plan.tasks(), split_tile = block / p.plan.x_tiles;
  const bool for_s = block < 0;
  const int64_t m0 = block % p.plan.x_tiles * C::kXRows, row0 = split_tile / p.plan.splits * C::kRows;
  float v[C::kPartRows] = {};
  bool ready = false;
  if (!for_s && !multiply<T, NT, ACCESS>(p, memory, split_tile % p.plan.splits, row0, m0, v, ready)) return;

  const int64_t n = row0 + threadIdx.x % C::kRows;
  const int first = threadIdx.x / C::kRows * C::kPartRows, x_rows = static_cast<int>(min64(p.m - m0, C::kXRows));
  if (p.plan.pairs > 0) {
    if (!ready) {
      uint32_t* task = reinterpret_cast<uint32_t*>(memory + (kWarps * 128 + 1) * 4);
      for (int64_t i; (i = claim(p, task)) < p.plan.tasks();) {
        sum_slice<T>(p, memory, i);
        if (for_s) break;
      }
      if (!for_s && threadIdx.x == 0)
        while (load_acquire(p.at.ready) < p.plan.pairs) pause();
      __syncthreads();
    }
    leave(p);
    if (for_s) return;
    add_branch<C>(p, reinterpret_cast<float*>(memory + C::kSums + 16), n, m0, x_rows, v);
  }
  if (n >= p.w.n) return;
  const float bias = p.bias == nullptr ? 0.0f : load_element(p.bias, p.bias_dtype, n);
#pragma unroll
  for (int i = 0; i < C::kPartRows; ++i)
    if (first + i < x_rows) static_cast<T*>(p.y)[(m0 + first + i) * p.w.n + n] = from_float<T>(v[i] + bias);
}

// ---- on the host

template <typename C>
Plan plan_of(const PfWeight& w, const PfLora* lora, int64_t m, bool aligned) {
  Plan plan{};
  plan.row_tiles = ceil_div(w.n, C::kRows);
  plan.x_tiles = ceil_div(m, C::kXRows);
  plan.steps = ceil_div(w.k, C::kColumns);
  if (lora != nullptr && lora->slots > 0 && w.k > 0) {
    plan.pairs = ceil_div(m, 8) * ceil_div(lora->rank, 16);
    plan.slices = ceil_div(w.k, kSlice);
  }
  const int64_t per_row = C::kColumns / (w.blocksize == 32 ? 32 : kUnit);
  int64_t stages = kTable + kStages * min64(m, C::kXRows) * C::kColumns * 2;
  stages += 2 * per_row * C::kScaleStride * 4 * (w.zero == nullptr ? 1 : 2) + (w.scale == nullptr ? 1024 : 0);
  const int64_t epilogue = C::kSums + 16 + C::kXRows * (kRanks * 4 + 8);
  plan.shared_bytes = static_cast<int>(aligned && stages > epilogue ? stages : epilogue);

  // As many splits as make the steps of the busiest blocks the fewest, two being what a block costs by itself.
  const int64_t fit = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / (plan.shared_bytes + 1024);
  const int64_t at_once = device_attribute(cudaDevAttrMultiProcessorCount) * (fit < 2 ? 1 : 2);
  plan.span = plan.steps, plan.splits = 1;
  int64_t least = ceil_div(plan.tiles(), at_once) * (plan.steps + 2);
  for (int64_t parts = 2; parts <= min64(plan.steps, kMostSplits) && plan.tiles() <= kCounters; ++parts) {
    const int64_t span = ceil_div(plan.steps, parts), splits = ceil_div(plan.steps, span);
    const int64_t cost = ceil_div(plan.tiles() * splits, at_once) * (span + 2);
    if (cost < least) least = cost, plan.span = span, plan.splits = splits;
  }
  return plan;
}

// Counters of the sequences of calls. Never destroyed: other threads may outlive it.
struct Kept {
  std::map<Sequence, void*> of;
  std::map<int, std::vector<void*>> spare;  // of each device, of graphs that are gone
  int made = 0;
  std::mutex mutex;
  // Told by CUDA from any thread, be it while one waits for CUDA with the other mutex held.
  std::vector<Sequence> gone;
  std::mutex gone_mutex;
};
Kept& kept = *new Kept;

void is_gone(void* what) {
  const std::unique_ptr<Sequence> sequence(static_cast<Sequence*>(what));
  const std::lock_guard<std::mutex> lock(kept.gone_mutex);
  kept.gone.push_back(*sequence);
}

// Where a call on `stream` counts: memory that is at zero. Null: at the start of its workspace, which it must set to
// zero before.
//
// Calls that follow one another share counters, which are kept: each leaves them as they were. A graph is replayed in
// any stream, beside other graphs and beside calls outside of graphs, but never beside itself; so it has counters of
// its own, which are another's when it is gone. Where no memory is left to keep, in what goes beyond kMostKept, or
// where CUDA does not know what a call follows, it counts in its workspace, which other calls use too.
uint32_t* kept_counters(void* stream) {
  Sequence sequence;
  void* graph = nullptr;
  if (!sequence_of(stream, &sequence, &graph)) return nullptr;
  const std::lock_guard<std::mutex> lock(kept.mutex);
  {
    const std::lock_guard<std::mutex> gone_lock(kept.gone_mutex);
    for (const Sequence& gone : std::exchange(kept.gone, {}))
      if (const auto held = kept.of.extract(gone)) kept.spare[std::get<0>(gone)].push_back(held.mapped());
  }
  const auto found = kept.of.find(sequence);
  if (found != kept.of.end()) return static_cast<uint32_t*>(found->second);
  std::vector<void*>& spare = kept.spare[std::get<0>(sequence)];
  if (spare.empty()) {
    if (kept.made == kMostKept) return nullptr;
    void* made = nullptr;
    const std::vector<uint32_t> zeros(kMostCounters);
    if (keep(&made, zeros.data(), kMostCounters * sizeof(uint32_t)) != cudaSuccess) {
      kept.of.emplace(sequence, nullptr);  // asking again would take time
      return nullptr;
    }
    ++kept.made;
    spare.push_back(made);
  }
  if (graph != nullptr && !when_gone(graph, is_gone, new Sequence(sequence))) return nullptr;
  void* counters = spare.back();
  spare.pop_back();
  kept.of.emplace(sequence, counters);
  return static_cast<uint32_t*>(counters);
}

// Bytes of the workspace, and where each part lies when it is given; the counters in it if `counters` is null.
template <typename C>
int64_t lay_out(const Plan& plan, int64_t m, int64_t rank, uint32_t* counters, void* memory, Workspace* at) {
  uint32_t* own = static_cast<uint32_t*>(memory);
  float* floats = reinterpret_cast<float*>(own + plan.counters());
  if (counters == nullptr) counters = own;
  const int64_t slice_sums = plan.tasks() * 128, s = plan.pairs > 0 ? m * rank : 0;
  const int64_t split_sums = plan.splits > 1 ? plan.tiles() * plan.splits * C::kXRows * C::kRows : 0;
  if (at != nullptr)
    *at = {counters, counters + 1,        counters + 2,           counters + 4, counters + plan.other_counters(),
           floats,   floats + slice_sums, floats + slice_sums + s};
  return (plan.counters() + slice_sums + s + split_sums) * 4;
}

// body(Tile): as many rows of x as there are, in so far as the device's shared memory holds them.
template <typename Body>
auto with_tile(const PfWeight& w, int64_t m, bool aligned, const Body& body) {
  const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const auto fits = [&](auto tile) {
    return aligned && plan_of<decltype(tile)>(w, nullptr, m, true).shared_bytes <= most;
  };
  if (m > 32 && fits(Tile<8>{})) return body(Tile<8>{});
  if (m > 16 && fits(Tile<4>{})) return body(Tile<4>{});
  if (m > 8 && fits(Tile<2>{})) return body(Tile<2>{});
  return body(Tile<1>{});
}

bool aligned_weight(const PfWeight& w) { return w.k % kUnit == 0 && aligned16(w.codes); }

template <typename T>
cudaError_t run(Arguments p, const PfLora* lora, void* workspace, bool aligned, void* stream) {
  return with_tile(p.w, p.m, aligned, [&](auto tile) {
    using C = decltype(tile);
    p.plan = plan_of<C>(p.w, lora, p.m, aligned);
    const int64_t whole = 16 / element_size(p.lora.a_dtype);
    p.plan.whole_slices =
        aligned && aligned16(p.lora.a) && p.lora.a_stride % whole == 0 && p.lora.a_slot_stride % whole == 0;
    const int64_t counted = p.plan.counters();
    uint32_t* counters = counted > 0 && counted <= kMostCounters ? kept_counters(stream) : nullptr;
    lay_out<C>(p.plan, p.m, p.lora.rank, counters, workspace, &p.at);
    if (counted > 0 && counters == nullptr)
      if (const cudaError_t status = set_to_zero(workspace, counted * sizeof(uint32_t), stream)) return status;
    const int64_t blocks = p.plan.tasks() + p.plan.tiles() * p.plan.splits;
    auto kernel = linear_4bit_kernel<T, 1, kElements>;
    constexpr int kNT = C::kXRows / 8;
    const bool any_blocks = p.w.blocksize == 32 || p.w.zero != nullptr;
    if (aligned)
      kernel = any_blocks ? linear_4bit_kernel<T, kNT, kAnyBlocks> : linear_4bit_kernel<T, kNT, kWholeBlocks>;
    return launch(kernel, blocks, kThreads, p.plan.shared_bytes, stream, p);
  });
}

}  // namespace
}  // namespace pf

using namespace pf;

int64_t pf_linear_4bit_most_rows(const PfWeight* w, int32_t dtype) {
  const bool tensor_cores = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 8;
  if (!tensor_cores || (dtype != kBFloat16 && dtype != kFloat16)) return 0;
  const int64_t hopper = pf_linear_4bit_sm90_most_rows(w, dtype);
  return hopper != 0 ? hopper : aligned_weight(*w) ? kMostRows : kMostRowsAny;
}

int64_t pf_linear_4bit_workspace(const PfWeight* w, const PfLora* lora, int64_t m) {
  const int64_t rank = lora == nullptr ? 0 : lora->rank;
  int64_t bytes = 0;
  for (const bool aligned : {false, true})  // x decides
    with_tile(*w, m, aligned, [&](auto tile) {
      using C = decltype(tile);
      const int64_t needed = lay_out<C>(plan_of<C>(*w, lora, m, aligned), m, rank, nullptr, nullptr, nullptr);
      bytes = needed > bytes ? needed : bytes;
    });
  return bytes;
}

int32_t pf_linear_4bit(const PfWeight* w, const void* x, int64_t ldx, const void* bias, int32_t bias_dtype,
                       const PfLora* lora, void* y, int64_t m, int32_t dtype, void* workspace, void* stream) {
  if (m == 0 || w->n == 0) return cudaSuccess;
  if (m > kFewRows && pf_linear_4bit_sm90_takes(w, x, ldx, y, m, dtype)) {
    float* s = static_cast<float*>(workspace);
    return pf_linear_4bit_sm90(w, x, ldx, bias, bias_dtype, lora, y, m, dtype, s, stream);
  }
  const bool aligned = aligned_weight(*w) && aligned16(x) && ldx % 8 == 0;
  const Arguments p{*w, lora == nullptr ? PfLora{} : *lora, x, bias, y, ldx, m, bias_dtype, {}, {}};
  if (dtype == kBFloat16) return run<bf16>(p, lora, workspace, aligned, stream);
  if (dtype == kFloat16) return run<f16>(p, lora, workspace, aligned, stream);
  return cudaErrorInvalidValue;
}
