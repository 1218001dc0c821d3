// The kernels, written once over the vocabulary `V` of an instruction set (avx512.h, avx2.cpp, neon.cpp, generic.cpp).
//
// V provides kLanes float lanes and: F (a vector of floats), C (a vector of 32-bit lanes of codes), T (a code table in
// registers), load/store/set1/zero/add/mul/fma/max/abs, conversions, code loads and `decode<column>`.
// Include inside the instruction set's own namespace; nothing here may use inline functions of the standard library,
// which a linker could pick from a file compiled for another instruction set.
//
// A product has a broadcast side (PackedRows) and a vector side (panels):
//   PackedRows  [block][row][kStride]            kBlock columns a block, row stride padded by 64 bytes
//   panels      [block][group][step][vector][..] kGroupVecs vectors of lanes a group, kStep of the contraction a lane
#include "kernels.h"

inline void copy_bytes(void* dst, const void* src, int64_t n) { __builtin_memcpy(dst, src, n); }

// Instructions that multiply matrices of several rows (amx.h), where there are any.
struct NoTiles {
  static constexpr int kRows = 1, kColumns = 1;
};

// Arithmetic in float32: one column a step.
struct F32 {
  using Elem = float;
  static constexpr int kStep = 1;
  using Tiles = NoTiles;
  using W = V::F;
  using Table = V::T;
  static Table table(const float* t) { return V::table(t); }
  template <int I>
  static W decode(const Table& t, V::C codes) {
    return V::decode<I>(t, codes);
  }
  static W load(const Elem* p) { return V::load(p); }
  static void store(Elem* p, W w) { V::store(p, w); }
  static void store_steps(Elem* dst, const V::F* columns) { store(dst, columns[0]); }
  // Steps of columns that are finite, infinite or the product of what `clean` returns, decoded beside products.
  static W steps(const V::F* columns) { return columns[0]; }
  static V::F clean(V::F v) { return v; }
  using X = V::F;
  static X broadcast(const Elem* x) { return V::set1(*x); }
  static V::F fma(V::F acc, W w, X x) { return V::fma(w, x, acc); }
  static void store_row(Elem* dst, V::F v) { V::store(dst, v); }
  // A group's lanes side by side.
  static void store_lanes(Elem* dst, const V::F* lanes) {
    for (int v = 0; v < V::kGroupVecs; ++v) V::store(dst + v * V::kLanes, lanes[v]);
  }
  // kLanes pairs of bf16, as the steps that they are, `stride` elements apart.
  static void store_pairs(Elem* dst, const uint16_t* pairs, int64_t stride) {
    V::store(dst, V::first_of_pairs(pairs));
    V::store(dst + stride, V::second_of_pairs(pairs));
  }
  // Products with such pairs: two columns of x.
  struct Pairs {
    V::F first, second;
  };
  static Pairs load_pairs(const uint16_t* p) { return {V::first_of_pairs(p), V::second_of_pairs(p)}; }
  static V::F fma_pairs(V::F acc, const Pairs& w, const Elem* x) {
    return V::fma(w.second, V::set1(x[1]), V::fma(w.first, V::set1(x[0]), acc));
  }
};

#ifdef PF_BF16
// Arithmetic in pairs of bf16, accumulated in float32: two columns a step.
struct BF16 {
  using Elem = uint16_t;
  static constexpr int kStep = 2;
#ifdef PF_TILES
  using Tiles = AmxTiles;
#else
  using Tiles = NoTiles;
#endif
  using W = V::Pair;
  using Table = V::PairTable;
  static Table table(const float* t) { return V::pair_table(t); }
  template <int I>
  static W decode(const Table& t, V::C codes) {
    return V::decode_pair<I>(t, codes);
  }
  static W load(const Elem* p) { return V::load_pair(p); }
  static void store(Elem* p, W w) { V::store_raw_pair(p, w); }
  static void store_steps(Elem* dst, const V::F* columns) { store(dst, V::pair(columns[0], columns[1])); }
  static W steps(const V::F* columns) { return V::pair_beside_products(columns[0], columns[1]); }
  static V::F clean(V::F v) { return V::default_nan(v); }
  using X = V::Pair;
  static X broadcast(const Elem* x) { return V::broadcast_pair(x); }
  static V::F fma(V::F acc, W w, X x) { return V::fma_pair(acc, w, x); }
  static void store_row(Elem* dst, V::F v) { V::store_factor(dst, v); }
  static void store_lanes(Elem* dst, const V::F* lanes) { V::store_two(dst, lanes[0], lanes[1]); }
  static void interleave(const void* even, const void* odd, Elem* dst) { V::interleave_rows(even, odd, dst); }
  static void store_pairs(Elem* dst, const uint16_t* pairs, int64_t) { copy_bytes(dst, pairs, V::kLanes * 4); }
  static W load_pairs(const uint16_t* p) { return load(p); }
  static V::F fma_pairs(V::F acc, W w, const Elem* x) { return fma(acc, w, broadcast(x)); }
};
#endif

constexpr int kLanes = V::kLanes;
constexpr int kTileVecs = kTile / kLanes;
constexpr int kGroupTiles = V::kGroupVecs / kTileVecs;
constexpr int kGroupLanes = V::kGroupVecs * kLanes;
// Few rows stream codes and scales once, slower than memory delivers them: asked for this far ahead (bytes), across the
// end of a tile, the time becomes the larger of arithmetic and memory, not their sum. Codes come into the second-level
// cache, which has more requests under way than the first (4096 x 4096, 2 rows: 418 us for 529 on Zen 4); on Zen 5 into
// the first, which has as many (4096 x 14336, one row: 775 us for 890).
// The B of the branch is asked for by tiles: a tile's is short, and no hardware sees it coming.
constexpr int64_t kTilesAhead = 8;
#ifdef PF_BF16X2
constexpr int64_t kCodesAhead = 24576, kRowsAhead = 4096, kFewTilesAhead = 2, kLocality = 3;
#else
constexpr int64_t kCodesAhead = 16384, kRowsAhead = 16384, kFewTilesAhead = kTilesAhead, kLocality = 2;
#endif
constexpr int64_t kScalesAhead = 1024;
PF_INLINE void prefetch_stream(const void* at) { __builtin_prefetch(at, 0, kLocality); }

// Calls body.operator()<I>() for each I, everything inlined.
#define PF_BODY(index) [&]<index>() __attribute__((always_inline))
template <class Body, int... I>
PF_INLINE void each(IntList<I...>, const Body& body) {
  (body.template operator()<I>(), ...);
}

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Asks for a part of the B of tiles [tile0, tile1), as much of it as columns [col0, col1) are of k: in bursts it would
// hold up the codes.
inline void prefetch_b_part(const Matrix& b, int64_t tile0, int64_t tile1, int64_t col0, int64_t col1, int64_t k) {
  if (b.data == nullptr) return;
  const char* at = b.packed ? reinterpret_cast<const char*>(b.pairs(tile0, 0)) : b.row(tile0 * kTile);
  const int64_t row0 = tile0 * kTile, rows = min64(tile1 * kTile, b.rows) - row0;
  const int64_t lines = b.packed ? (reinterpret_cast<const char*>(b.pairs(tile1, 0)) - at) / 64 : rows;
  const int64_t step = b.packed ? 64 : b.row(1) - b.row(0);
  for (int64_t i = lines * col0 / k; i < lines * col1 / k; ++i) prefetch_stream(at + i * step);
}

// ---- elements -------------------------------------------------------------------------------------------------------

template <int D>
PF_INLINE V::F load_as(const char* p) {
  if constexpr (D == kFloat32) return V::load(reinterpret_cast<const float*>(p));
  if constexpr (D == kBFloat16) return V::load_bf16(reinterpret_cast<const uint16_t*>(p));
  if constexpr (D == kFloat16) return V::load_f16(reinterpret_cast<const uint16_t*>(p));
}

// body.operator()<dtype>().
template <class Body>
PF_INLINE void with_dtype(int dtype, const Body& body) {
  if (dtype == kFloat32) return body.template operator()<kFloat32>();
  if (dtype == kBFloat16) return body.template operator()<kBFloat16>();
  body.template operator()<kFloat16>();
}

template <int D>
PF_INLINE void store_as(char* p, V::F v) {
  if constexpr (D == kFloat32) V::store(reinterpret_cast<float*>(p), v);
  if constexpr (D == kBFloat16) V::store_bf16(reinterpret_cast<uint16_t*>(p), v);
  if constexpr (D == kFloat16) V::store_f16(reinterpret_cast<uint16_t*>(p), v);
}

// Elements [i, min(i + kLanes, n)) of a row, zeros after the last.
template <int D>
PF_INLINE V::F load_part(const char* row, int64_t i, int64_t n) {
  constexpr int kSize = D == kFloat32 ? 4 : 2;
  if (i + kLanes <= n) return load_as<D>(row + i * kSize);
  alignas(64) char part[kLanes * kSize] = {};
  copy_bytes(part, row + i * kSize, (n - i) * kSize);
  return load_as<D>(part);
}

template <int D>
PF_INLINE void store_part(char* row, int64_t i, int64_t n, V::F v) {
  constexpr int kSize = D == kFloat32 ? 4 : 2;
  if (i + kLanes <= n) return store_as<D>(row + i * kSize, v);
  alignas(64) char part[kLanes * kSize];
  store_as<D>(part, v);
  copy_bytes(row + i * kSize, part, (n - i) * kSize);
}

void to_float(const void* src, int dtype, float* dst, int64_t n) {
  with_dtype(
      dtype, PF_BODY(int D) {
        for (int64_t i = 0; i < n; i += kLanes)
          store_part<kFloat32>(reinterpret_cast<char*>(dst), i, n, load_part<D>(static_cast<const char*>(src), i, n));
      });
}

// n floats to `dtype`.
inline void from_float(const float* src, char* dst, int dtype, int64_t n) {
  with_dtype(
      dtype, PF_BODY(int D) {
        for (int64_t i = 0; i < n; i += kLanes)
          store_part<D>(dst, i, n, load_part<kFloat32>(reinterpret_cast<const char*>(src), i, n));
      });
}

// out[c][r] = m[row0 + r][col0 + c] as float32 for r < 16, c < ncols <= 16. Rows from nrows on are zero; columns from
// ncols on hold anything.
inline void load_transposed(const Matrix& m, int64_t row0, int64_t nrows, int64_t col0, int64_t ncols, float* out) {
  alignas(64) float rows[16 * 16 + 16];
  const int size = dtype_size(m.dtype);
  const char* from = m.row(row0) + col0 * size;
  const int64_t stride = m.ld * size;
  if (nrows == 16 && ncols == 16) {
    if (m.dtype == kFloat32) return V::transpose16(reinterpret_cast<const float*>(from), m.ld, out);
    with_dtype(
        m.dtype, PF_BODY(int D) {
          for (int r = 0; r < 16; ++r)
            for (int v = 0; v < kTileVecs; ++v)
              V::store(rows + r * 16 + v * kLanes,
                       load_as<D>(from + r * stride + v * kLanes * (D == kFloat32 ? 4 : 2)));
        });
  } else if (nrows == 16 && ncols == m.ld) {
    to_float(from, m.dtype, rows, 16 * ncols);  // short rows side by side: one run
    return V::transpose16(rows, ncols, out);
  } else {
    __builtin_memset(rows, 0, sizeof(rows));
    for (int64_t r = 0; r < nrows; ++r) to_float(from + r * stride, m.dtype, rows + r * 16, ncols);
  }
  V::transpose16(rows, 16, out);
}

// Steps [0, 16) of 16 rows, a word each and `ld` words from row to row, as the lanes of a panel whose steps are `step`
// words apart.
PF_INLINE void steps_to_lanes(const float* rows, int64_t ld, float* panel, int64_t step) {
  alignas(64) float square[16 * 16];
  V::transpose16(rows, ld, square);
  for (int i = 0; i < 16; ++i)
    for (int v = 0; v < kTileVecs; ++v) V::store(panel + i * step + v * kLanes, V::load(square + i * 16 + v * kLanes));
}

// ---- dropout --------------------------------------------------------------------------------------------------------

inline uint32_t mix32(uint32_t h) {
  h ^= h >> 16;
  h *= 0x7FEB352Du;
  h ^= h >> 15;
  h *= 0x846CA68Bu;
  return h ^ (h >> 16);
}

// values[c] *= 0 or 1 / (1 - p) for columns col0 + c of `row`.
inline void apply_dropout(const Dropout& d, int64_t row, int64_t col0, int64_t n, float* values) {
  if (d.threshold == 0) return;
  const uint32_t base =
      mix32(static_cast<uint32_t>(row) + static_cast<uint32_t>(d.seed)) ^ static_cast<uint32_t>(d.seed >> 32);
  const uint32_t first = static_cast<uint32_t>(col0);
  for (int64_t c = 0; c < n; ++c) {
    const uint32_t h = mix32((first + static_cast<uint32_t>(c)) * 0x9E3779B9u + base);
    values[c] = h >= d.threshold ? values[c] * d.scale : 0.0f;
  }
}

// ---- scales ---------------------------------------------------------------------------------------------------------

// Double-quantized scales of a tile's segments [seg0, seg0 + n), decoded into `out` [n][16].
inline void nested_scales(const Weight& w, int64_t tile, int64_t seg0, int64_t n, float* out) {
  const uint8_t* codes = w.scale8 + (tile * w.segments() + seg0) * kTile;
  V::lookup_bytes(kDynamicMap, codes, n * kTile, out);
  alignas(64) float scale2[kTile], offset[kTile];
  // Block sizes are powers of two, and so are segments.
  const int group = __builtin_ctzll(w.blocksize) + 8, segment = __builtin_ctzll(w.segment);
  for (int64_t s = 0; s < n;) {
    // Up to where one of the rows comes to its next second-level scale.
    int64_t end = n;
    for (int lane = 0; lane < kTile; ++lane) {
      const int64_t row = tile * kTile + lane, at = row * w.k + ((seg0 + s) << segment);
      scale2[lane] = row < w.n ? w.scale2[at >> group] : 0.0f;
      offset[lane] = row < w.n ? w.offset : 0.0f;
      const int64_t next = ((at >> group) + 1) << group;
      if (row < w.n) end = min64(end, s + ((next - at + w.segment - 1) >> segment));
    }
    for (; s < end; ++s)
      for (int v = 0; v < kTile; v += kLanes) {
        float* at = out + s * kTile + v;
        V::store(at, V::add(V::mul(V::load(at), V::load(scale2 + v)), V::load(offset + v)));
      }
  }
}

// Float32 scales of a tile's segments [seg0, seg0 + n): where they lie, or decoded into `out` [n][16].
inline const float* tile_scales(const Weight& w, int64_t tile, int64_t seg0, int64_t n, float* out) {
  if (w.scale != nullptr) return w.scale + (tile * w.segments() + seg0) * kTile;
  nested_scales(w, tile, seg0, n, out);
  return out;
}

// Asks for the scales and zeros of a tile's columns [col0, col0 + n): lines that no stream leads to cost more than
// their share of the bytes (4096 x 4096, 17 rows: a tenth of the time).
inline void prefetch_scales(const Weight& w, int64_t tile, int64_t col0, int64_t n) {
  const int64_t first = (tile * w.segments() + col0 / w.segment) * kTile, end = first + ceil_div(n, w.segment) * kTile;
  const float* const held[] = {w.scale, w.zero};
  for (const float* values : held)
    for (int64_t i = first; values != nullptr && i < end; i += kTile) __builtin_prefetch(values + i);
  for (int64_t i = first; w.scale8 != nullptr && i < end; i += 4 * kTile) __builtin_prefetch(w.scale8 + i);
}

// Asks for share `i` of `shares` of a part of m, which is used later: all of it at once would have to be waited for.
inline void prefetch_share(const Matrix& m, int64_t row0, int64_t row1, int64_t col0, int64_t cols, int64_t i,
                           int64_t shares) {
  const int64_t size = dtype_size(m.dtype), count = row1 - row0;
  for (int64_t r = row0 + count * i / shares; r < row0 + count * (i + 1) / shares; ++r)
    for (int64_t byte = 0; byte < cols * size; byte += 64) prefetch_stream(m.row(r) + col0 * size + byte);
}

// ---- few rows of x times A ------------------------------------------------------------------------------------------

template <int D, int MB, int RB>
void dot_block(const float* x, int64_t ldx, const Matrix& a, int64_t r0, float* s) {
  constexpr int kSize = D == kFloat32 ? 4 : 2;
  V::F acc[MB][RB];
  each(MakeInts<MB>{}, PF_BODY(int M) { each(MakeInts<RB>{}, PF_BODY(int R) { acc[M][R] = V::zero(); }); });
  const int64_t whole = a.cols / kLanes * kLanes;
  const char* row = a.row(r0);
  for (int64_t k = 0; k < whole; k += kLanes)
    each(
        MakeInts<RB>{}, PF_BODY(int R) {
          const char* at = row + (R * a.ld + k) * kSize;
          prefetch_stream(at + kCodesAhead);
          const V::F w = load_as<D>(at);
          each(MakeInts<MB>{}, PF_BODY(int M) { acc[M][R] = V::fma(w, V::load(x + M * ldx + k), acc[M][R]); });
        });
  alignas(64) float tail[RB][kLanes];
  for (int r = 0; r < RB; ++r) to_float(a.row(r0 + r) + whole * kSize, D, tail[r], a.cols - whole);
  each(
      MakeInts<MB>{}, PF_BODY(int M) {
        each(
            MakeInts<RB>{}, PF_BODY(int R) {
              float sum = V::reduce(acc[M][R]);
              for (int64_t k = whole; k < a.cols; ++k) sum += tail[R][k - whole] * x[M * ldx + k];
              s[M * a.rows + r0 + R] = sum;
            });
      });
}

template <int D, int MB>
void dot_rows(const float* x, int64_t ldx, const Matrix& a, float* s, int64_t r0, int64_t r1) {
  int64_t r = r0;
  for (; r + 4 <= r1; r += 4) dot_block<D, MB, 4>(x, ldx, a, r, s);
  for (; r < r1; ++r) dot_block<D, MB, 1>(x, ldx, a, r, s);
}

void dots(const float* x, int64_t ldx, int64_t rows, const Matrix& a, float* s, int64_t r0, int64_t r1) {
  with_dtype(
      a.dtype, PF_BODY(int D) {
        int64_t m = 0;
        for (; m + 4 <= rows; m += 4) dot_rows<D, 4>(x + m * ldx, ldx, a, s + m * a.rows, r0, r1);
        for (; m + 2 <= rows; m += 2) dot_rows<D, 2>(x + m * ldx, ldx, a, s + m * a.rows, r0, r1);
        for (; m < rows; ++m) dot_rows<D, 1>(x + m * ldx, ldx, a, s + m * a.rows, r0, r1);
      });
}

template <class A>
struct Algorithm {
  using E = typename A::Elem;
  using F = V::F;
  static constexpr int kStep = A::kStep;
  static constexpr int kBlock = 512 / sizeof(E);
  static constexpr int kStride = kBlock + 64 / sizeof(E);
  static constexpr int64_t kGroupPanel = static_cast<int64_t>(kBlock) * kGroupLanes;  // elements of one group's block
  using Tiles = typename A::Tiles;
  static constexpr bool kHasTiles = Tiles::kRows > 1;
  // Outputs that share a block of x, or of dy, while it is in the second-level cache, in tiles of a forward and columns
  // of a backward pass. Instructions on tiles are so fast that fetching the block anew shows (4096 x 4096, 512 rows, a
  // quarter of them: 1.3 times the time).
  static constexpr int kPanelTiles = kHasTiles ? 32 : 8;
  static constexpr int64_t kRowChunk = kHasTiles ? 512 : 256;  // rows whose float32 results stay in cache together
  static constexpr int64_t kColumnChunk = kPanelTiles * kTile;
  // Up to here decoding in registers is faster; then, up to kLateRows, scales cost less on the sums than on every
  // decoded weight, which zeros do not allow. Sums to be scaled leave registers for twelve more, no more than are under
  // way where two bf16 products start in a cycle (Zen 5, 4096 x 4096, 64 rows: 423 GFLOP/s, with scales on the weights
  // 479).
  static constexpr int64_t kFewRows = kHasTiles ? 4 : 16, kFewRowsOfZeros = kHasTiles ? 8 : 16;
#ifdef PF_BF16X2
  static constexpr int64_t kLateRows = 0;
#else
  static constexpr int64_t kLateRows = kHasTiles ? 32 : kStep == 2 ? INT64_MAX : 0;
#endif
  static constexpr int kDecodingRows = kHasTiles ? 0 : V::kDecodingRows;

  static constexpr int kElement = sizeof(E) == 4 ? kFloat32 : kBFloat16;

  // Tiles also read what follows the last rows, and ignore it.
  static int64_t packed_rows_bytes(int64_t rows, int64_t cols) {
    return (ceil_div(cols, kBlock) * rows + Tiles::kRows - 1) * kStride * sizeof(E);
  }
  static int64_t panels_bytes(int64_t lanes, int64_t contraction) {
    return ceil_div(contraction, kBlock) * ceil_div(lanes, kGroupLanes) * kGroupPanel * sizeof(E);
  }
  static const E* packed_block(const PackedRows& x, int64_t block) {
    return static_cast<const E*>(x.data) + block * x.rows * kStride;
  }

  // ---- packing ----

  static void store_packed_row(const float* values, int64_t n, E* dst) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) A::store_row(dst + i, V::load(values + i));
    if (i < n) {
      alignas(64) float in[kLanes] = {};
      copy_bytes(reinterpret_cast<char*>(in), reinterpret_cast<const char*>(values + i), (n - i) * 4);
      A::store_row(dst + i, V::load(in));  // fits: a row has 64 bytes of padding
    }
  }

  static void pack_rows(const Matrix& src, const float* factor, int64_t factor_ld, const Dropout& d, void* out,
                        int64_t row0, int64_t row1) {
    const bool same = src.dtype == kElement && factor == nullptr && d.threshold == 0;
    alignas(64) float values[kBlock];
    for (int64_t r = row0; r < row1; ++r)
      for (int64_t block = 0; block * kBlock < src.cols; ++block) {
        const int64_t col0 = block * kBlock, n = min64(kBlock, src.cols - col0);
        E* dst = static_cast<E*>(out) + (block * src.rows + r) * kStride;
        const char* from = src.row(r) + col0 * dtype_size(src.dtype);
        if (same) {
          copy_bytes(reinterpret_cast<char*>(dst), from, n * sizeof(E));
          if (n % kStep) dst[n] = 0;
          continue;
        }
        to_float(from, src.dtype, values, n);
        if (factor != nullptr)
          for (int64_t i = 0; i < n; ++i) values[i] *= factor[r * factor_ld + col0 + i];
        apply_dropout(d, r, col0, n, values);
        store_packed_row(values, n, dst);
      }
  }

  static void pack_rows_t(const Matrix& src, const float* factor, int64_t factor_ld, void* out) {
    alignas(64) float square[16 * 16];
    for (int64_t r = 0; r < src.rows; r += 16) {
      const int64_t nr = min64(16, src.rows - r), block = r / kBlock;
      for (int64_t c = 0; c < src.cols; c += 16) {
        const int64_t nc = min64(16, src.cols - c);
        load_transposed(src, r, nr, c, nc, square);
        for (int64_t i = 0; i < nc; ++i) {
          if (factor != nullptr)
            for (int64_t j = 0; j < nr; ++j) square[i * 16 + j] *= factor[(r + j) * factor_ld + c + i];
          E* dst = static_cast<E*>(out) + (block * src.cols + c + i) * kStride + r % kBlock;
          for (int v = 0; v < kTileVecs; ++v) A::store_row(dst + v * kLanes, V::load(square + i * 16 + v * kLanes));
        }
      }
    }
  }

  // Contraction columns [col0, col0 + n) of 16 rows of `src` as lanes, into vectors `vec..` of a panel of `vecs`
  // vectors.
  static void pack_lanes_t(const Matrix& src, int64_t row0, int64_t col0, int64_t n, E* panel, int vec, int vecs) {
    if (src.packed) {
      const uint16_t* pairs = src.pairs(row0 / kTile, col0);
      for (int64_t i = 0; i < n; i += 2, pairs += 2 * kTile) {
        prefetch_stream(reinterpret_cast<const char*>(pairs) + kCodesAhead);
        for (int v = 0; v < kTileVecs; ++v)
          A::store_pairs(panel + (i / kStep * vecs + vec + v) * kLanes * kStep, pairs + v * kLanes * 2,
                         vecs * kLanes * kStep);
      }
      return;
    }
    int64_t c = 0;
    if (src.dtype == kElement && row0 + 16 <= src.rows && src.ld % kStep == 0)
      for (; c + 16 * kStep <= n; c += 16 * kStep)
        steps_to_lanes(reinterpret_cast<const float*>(src.row(row0) + (col0 + c) * sizeof(E)), src.ld / kStep,
                       reinterpret_cast<float*>(panel + (c / kStep * vecs + vec) * kLanes * kStep), vecs * kLanes);
    alignas(64) float square[16 * 16];
    for (; c < n; c += 16) {
      const int64_t nc = min64(16, n - c);
      load_transposed(src, row0, min64(16, src.rows - row0), col0 + c, nc, square);
      for (int64_t i = 0; i < nc; i += kStep)
        for (int v = 0; v < kTileVecs; ++v) {
          F columns[kStep];
          for (int s = 0; s < kStep; ++s)
            columns[s] = i + s < nc ? V::load(square + (i + s) * 16 + v * kLanes) : V::zero();
          A::store_steps(panel + ((c + i) / kStep * vecs + vec + v) * kLanes * kStep, columns);
        }
    }
  }

  // body(first of the contraction, its length, group, panel) for lane groups [group0, group1) of whole panels.
  template <class Body>
  static void each_panel(void* out, int64_t lanes, int64_t contraction, int64_t group0, int64_t group1,
                         const Body& body) {
    const int64_t groups = ceil_div(lanes, kGroupLanes);
    for (int64_t i = 0; i < contraction; i += kBlock)
      for (int64_t g = group0; g < group1; ++g)
        body(i, min64(kBlock, contraction - i), g, static_cast<E*>(out) + (i / kBlock * groups + g) * kGroupPanel);
  }

  static void pack_panels_t(const Matrix& src, void* out, int64_t group0, int64_t group1) {
    each_panel(out, src.rows, src.cols, group0, group1, [&](int64_t col0, int64_t n, int64_t g, E* panel) {
      for (int t = 0; t < kGroupTiles; ++t) {
        const int64_t row0 = g * kGroupLanes + t * kTile;
        pack_lanes_t(src, min64(row0, src.rows), col0, n, panel, t * kTileVecs, V::kGroupVecs);
      }
    });
  }

  static void pack_panels(const Matrix& src, void* out, int64_t group0, int64_t group1) {
    each_panel(out, src.cols, src.rows, group0, group1, [&](int64_t row0, int64_t n, int64_t g, E* panel) {
      pack_lanes(src, {}, row0, n, g * kGroupLanes, panel);
    });
  }

  // Rows [row0, row0 + n) of `src` as contraction, its columns [lane0, ..) as lanes of one group's panel.
  static void pack_lanes(const Matrix& src, const Dropout& d, int64_t row0, int64_t n, int64_t lane0, E* panel) {
    alignas(64) float values[kStep][kGroupLanes];
    const int64_t lanes = min64(kGroupLanes, src.cols - lane0);
    for (int64_t i = 0; i < n; i += kStep) {
      E* at = panel + i * kGroupLanes;
      if constexpr (kStep == 2)
        if (src.dtype == kBFloat16 && d.threshold == 0 && lanes == kGroupLanes && i + 1 < n) {
          A::interleave(src.row(row0 + i) + lane0 * 2, src.row(row0 + i + 1) + lane0 * 2, at);
          continue;
        }
      for (int s = 0; s < kStep; ++s) {
        if (i + s >= n || lanes < kGroupLanes) __builtin_memset(values[s], 0, sizeof(values[s]));
        if (i + s >= n) continue;
        to_float(src.row(row0 + i + s) + lane0 * dtype_size(src.dtype), src.dtype, values[s], lanes);
        apply_dropout(d, row0 + i + s, lane0, lanes, values[s]);
      }
      for (int v = 0; v < V::kGroupVecs; ++v) {
        F columns[kStep];
        for (int s = 0; s < kStep; ++s) columns[s] = V::load(values[s] + v * kLanes);
        A::store_steps(at + v * kLanes * kStep, columns);
      }
    }
  }

  // What comes next, asked for while a block is worked on: decoding alone takes less time than it needs to arrive.
  struct Ahead {
    const uint8_t* codes = nullptr;
    int64_t tile_stride = 0;
    int64_t steps = 0;  // of the product that ask, for every second line of kGroupTiles tiles; decoding asks for others

    Ahead tile(int64_t i) const { return {codes + i * tile_stride, tile_stride}; }
    void next_line() {
      __builtin_prefetch(codes);
      codes += kHasTiles ? 128 : 64;
    }
    void next_step() {
      if (steps-- <= 0) return;
      for (int64_t i = 0; i < kGroupTiles * tile_stride; i += tile_stride) {
        __builtin_prefetch(codes + i + 64);
        __builtin_prefetch(codes + i + 192);
      }
      codes += 256;
    }
  };

  // Of columns [col0, col0 + n) of the group from `tile` on, where tiles [tile0, tile1) make a panel: the next group's
  // columns, at the end the first group's next ones, or the next panel's first.
  static Ahead codes_ahead(const Weight& w, int64_t tile, int64_t tile0, int64_t tile1, int64_t col0, int64_t n) {
    tile += kGroupTiles;
    if (tile >= tile1) tile = tile0, col0 += n;
    if (col0 >= w.k) tile = tile1, col0 = 0;
    for (int64_t i = 0; i < kGroupTiles; ++i) prefetch_scales(w, tile + i, col0, n);
    return {w.codes + (tile * w.k + col0) * (kTile / 2), w.k * (kTile / 2), n / Tiles::kColumns};
  }

  // ---- the product ----

  // c[r][lane] += sum over steps of x[r] * panel: MR rows by NV vectors, held in registers.
  template <int MR, int NV>
  static void micro(const E* x, const E* panel, int64_t steps, float* c, int64_t ldc) {
    F acc[MR][NV];
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] = V::load(c + r * ldc + v * kLanes);
    for (int64_t s = 0; s < steps; ++s, x += kStep, panel += NV * kLanes * kStep) {
      typename A::W w[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) w[v] = A::load(panel + v * kLanes * kStep);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        const typename A::X xb = A::broadcast(x + r * kStride);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[r][v] = A::fma(acc[r][v], w[v], xb);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) V::store(c + r * ldc + v * kLanes, acc[r][v]);
  }

  // Where micro_late takes the weight of a group of NV vectors from, without its scales: a panel, or the codes, which
  // makes the panel on the way. `next` goes to the next eight columns; weight<S, U> are those of step S.
  struct Panel {
    const E* at;  // before the first columns

    template <int NV>
    PF_INLINE void next() {
      at += NV * kLanes * kGroupColumns;
    }
    template <int NV, int S, int U>
    PF_INLINE typename A::W weight() const {
      return A::load(at + (S * NV + U) * kLanes * kStep);
    }
  };

  struct Codes {
    typename A::Table table;
    const uint8_t* codes[kGroupTiles];
    E* to;
    Ahead ahead;
    V::C held[V::kGroupVecs];

    template <int NV>
    PF_INLINE void next() {
      each(
          MakeInts<NV>{},
          PF_BODY(int U) { held[U] = V::load_codes(codes[U / kTileVecs] + U % kTileVecs * kLanes * 4); });
      each(
          MakeInts<NV / kTileVecs>{}, PF_BODY(int T) {
            codes[T] += 64;
            __builtin_prefetch(ahead.codes + T * ahead.tile_stride);
          });
      ahead.codes += 64;
      to += NV * kLanes * kGroupColumns;
    }
    template <int NV, int S, int U>
    PF_INLINE typename A::W weight() const {
      const typename A::W w = A::template decode<S>(table, held[U]);
      A::store(to + (S * NV + U) * kLanes * kStep, w);
      return w;
    }
  };

  // The same where scales multiply the sums of each segment. `scales` are those of the first vector's tile,
  // [segment][16]; the next tile's lie `tile_stride` floats further. Both kinds of sums stay in registers, for half as
  // many rows: keeping those of all segments in memory cost 6 % of the speed.
  template <int MR, int NV, class Source>
  static void micro_late(const E* x, Source source, int64_t groups, int64_t segments, const float* scales,
                         int64_t tile_stride, float* c, int64_t ldc) {
    constexpr MakeInts<MR> rows{};
    constexpr MakeInts<NV> vecs{};
    F sums[MR][NV];
    each(rows, PF_BODY(int R) { each(vecs, PF_BODY(int U) { sums[R][U] = V::load(c + R * ldc + U * kLanes); }); });
    for (int64_t segment = 0; segment < segments; ++segment, scales += kTile) {
      F acc[MR][NV];
      each(rows, PF_BODY(int R) { each(vecs, PF_BODY(int U) { acc[R][U] = V::zero(); }); });
      for (int64_t group = 0; group < groups; ++group, x += kGroupColumns) {
        source.template next<NV>();
        each(
            MakeInts<kGroupColumns / kStep>{}, PF_BODY(int S) {
              typename A::W w[NV];
              each(vecs, PF_BODY(int U) { w[U] = source.template weight<NV, S, U>(); });
              each(
                  rows, PF_BODY(int R) {
                    const typename A::X xb = A::broadcast(x + R * kStride + S * kStep);
                    each(vecs, PF_BODY(int U) { acc[R][U] = A::fma(acc[R][U], w[U], xb); });
                  });
            });
      }
      each(
          vecs, PF_BODY(int U) {
            const F scale = V::load(scales + U / kTileVecs * tile_stride + U % kTileVecs * kLanes);
            each(rows, PF_BODY(int R) { sums[R][U] = V::fma(acc[R][U], scale, sums[R][U]); });
          });
    }
    each(rows, PF_BODY(int R) { each(vecs, PF_BODY(int U) { V::store(c + R * ldc + U * kLanes, sums[R][U]); }); });
  }

  // micro that decodes the group's columns [col0, col0 + n) itself and leaves them in `panel`: the weights of a step
  // are decoded before the products of the step before, which hide that. `scales` [tiles][segments and room][16].
  template <int MR, int NV, bool kHasZero>
  static void micro_decoding(const E* x, const Weight& w, int64_t tile, int64_t col0, int64_t n, E* panel,
                             const float* scales, int64_t tile_stride, Ahead ahead, float* c, int64_t ldc) {
    constexpr MakeInts<MR> rows{};
    constexpr MakeInts<NV> vecs{};
    constexpr int kSteps = kGroupColumns / kStep;
    const V::T table = V::table(kTables[w.format]);
    const int64_t groups = n / kGroupColumns, code_stride = w.k * (kTile / 2), zero_stride = w.segments() * kTile;
    // Segments are powers of two; the block may be a part of one.
    const int per_segment = n < w.segment ? 63 : __builtin_ctzll(w.segment / kGroupColumns);
    const uint8_t* codes = w.codes + tile * code_stride + col0 * (kTile / 2);
    const float* zeros = kHasZero ? w.zero + tile * zero_stride + col0 / w.segment * kTile : nullptr;
    V::C held[NV];
    F scale[NV], zero[NV];
    const auto load = [&](int64_t group) __attribute__((always_inline)) {
      const int64_t segment = (group >> per_segment) * kTile;
      each(
          vecs, PF_BODY(int U) {
            const int64_t of = U / kTileVecs, at = U % kTileVecs * kLanes;
            held[U] = V::load_codes(codes + of * code_stride + group * 64 + at * 4);
            scale[U] = V::load(scales + of * tile_stride + segment + at);
            if constexpr (kHasZero) zero[U] = A::clean(V::load(zeros + of * zero_stride + segment + at));
          });
    };
    F acc[MR][NV];
    each(rows, PF_BODY(int R) { each(vecs, PF_BODY(int U) { acc[R][U] = V::load(c + R * ldc + U * kLanes); }); });
    typename A::W next[NV];
    const auto decode = PF_BODY(int S) {
      each(
          vecs, PF_BODY(int U) {
            F columns[kStep];
            scaled<kHasZero, S>(table, held[U], scale[U], zero[U], columns);
            next[U] = A::steps(columns);
          });
    };
    load(0);
    decode.template operator()<0>();
    for (int64_t group = 0; group < groups; ++group, x += kGroupColumns, panel += kGroupColumns * NV * kLanes) {
      each(MakeInts<NV / kTileVecs>{}, PF_BODY(int T) { __builtin_prefetch(ahead.codes + T * ahead.tile_stride); });
      ahead.codes += 64;
      each(
          MakeInts<kSteps>{}, PF_BODY(int S) {
            typename A::W now[NV];
            each(
                vecs, PF_BODY(int U) {
                  now[U] = next[U];
                  A::store(panel + (S * NV + U) * kLanes * kStep, now[U]);
                });
            if constexpr (S == kSteps - 1) load(min64(group + 1, groups - 1));
            decode.template operator()<(S + 1) % kSteps>();
            each(
                rows, PF_BODY(int R) {
                  const typename A::X xb = A::broadcast(x + R * kStride + S * kStep);
                  each(vecs, PF_BODY(int U) { acc[R][U] = A::fma(acc[R][U], now[U], xb); });
                });
          });
    }
    each(rows, PF_BODY(int R) { each(vecs, PF_BODY(int U) { V::store(c + R * ldc + U * kLanes, acc[R][U]); }); });
  }

  using Micro = void (*)(const E*, const E*, int64_t, float*, int64_t);
  template <class Source>
  using MicroLate = void (*)(const E*, Source, int64_t, int64_t, const float*, int64_t, float*, int64_t);
  template <int NV, int... R>
  static Micro pick(int rows, IntList<R...>) {
    static constexpr Micro kMicros[] = {micro<R + 1, NV>...};
    return kMicros[rows - 1];
  }
  template <int NV>
  static Micro pick(int rows) {
    return pick<NV>(rows, MakeInts<V::kMicroRows>{});
  }
  template <int NV, class Source, int... R>
  static MicroLate<Source> pick_late(int rows, IntList<R...>) {
    static constexpr MicroLate<Source> kMicros[] = {micro_late<R + 1, NV, Source>...};
    return kMicros[rows - 1];
  }
  template <int NV, bool kHasZero, int... R>
  static auto pick_decoding(int rows, IntList<R...>) {
    static constexpr decltype(&micro_decoding<1, NV, kHasZero>) kMicros[] = {micro_decoding<R + 1, NV, kHasZero>...};
    return kMicros[rows - 1];
  }
  static constexpr int kLateMicroRows = V::kMicroRows > 1 ? V::kMicroRows / 2 : 1;

  // Runs `body(first row, rows)` over [0, rows) in even blocks of at most `most`.
  template <class Body>
  static void row_blocks(int64_t rows, const Body& body, int64_t most = V::kMicroRows) {
    const int64_t blocks = ceil_div(rows, most);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t r0 = rows * b / blocks, r1 = rows * (b + 1) / blocks;
      body(r0, static_cast<int>(r1 - r0));
    }
  }

  // c[group][rows][ldc] += x rows * panels of `tiles` tiles, groups of kGroupTiles (the last may hold fewer). Where
  // there are instructions on tiles, the caller holds them.
  static void multiply(const E* x, int64_t rows, const E* panels, int64_t contraction, int64_t tiles, float* c,
                       int64_t ldc, Ahead ahead = {}) {
    if constexpr (kHasTiles)
      if (rows > Tiles::kRows / 2 || contraction >= Tiles::kColumns) {  // else a tile is filled for little
        for (int64_t t = 0; t < tiles; t += kGroupTiles, panels += kGroupPanel, c += rows * ldc) {
          if (tiles - t >= kGroupTiles)
            multiply_tiles<kGroupTiles>(x, kStride, rows, panels, contraction, ahead, c, ldc);
          else
            multiply_tiles<1>(x, kStride, rows, panels, contraction, ahead, c, ldc);
        }
        return;
      }
    const int64_t steps = ceil_div(contraction, kStep);
    for (int64_t t = 0; t < tiles; t += kGroupTiles, panels += kGroupPanel, c += rows * ldc)
      row_blocks(rows, [&](int64_t r0, int n) {
        const Micro kernel = tiles - t >= kGroupTiles ? pick<V::kGroupVecs>(n) : pick<kTileVecs>(n);
        kernel(x + r0 * kStride, panels, steps, c + r0 * ldc, ldc);
      });
  }

  // The same for one group of L tiles and rows `ldx` apart. What does not fill a tile goes through a whole one: last
  // rows with sums that nothing reads, last columns with zeros.
  template <int L>
  static void multiply_tiles(const E* x, int64_t ldx, int64_t rows, const E* panel, int64_t contraction, Ahead ahead,
                             float* c, int64_t ldc) {
    constexpr int64_t kRows = Tiles::kRows, kColumns = Tiles::kColumns, kWide = L * kTile;
    const int64_t steps = contraction / kColumns, rest = contraction - steps * kColumns;
    const int64_t pairs = rows / (2 * kRows) * (2 * kRows);
    if (pairs > 0 && steps > 0) Tiles::template add<2, L>(x, ldx, pairs, panel, steps, ahead, c, ldc);
    alignas(64) float part[kRows * kWide];
    // body(sums) for the rows from r on, fewer than a pair of tiles.
    const auto whole = [&](int64_t r, const auto& body) {
      const int64_t n = min64(kRows, rows - r);
      if (n == kRows) return body(c + r * ldc, ldc);
      for (int64_t i = 0; i < n; ++i) copy_bytes(part + i * kWide, c + (r + i) * ldc, kWide * sizeof(float));
      body(part, kWide);
      for (int64_t i = 0; i < n; ++i) copy_bytes(c + (r + i) * ldc, part + i * kWide, kWide * sizeof(float));
    };
    if (steps > 0)
      for (int64_t r = pairs; r < rows; r += kRows)
        whole(r, [&](float* sums, int64_t ld) {
          Tiles::template add<1, L>(x + r * ldx, ldx, kRows, panel, steps, ahead, sums, ld);
        });
    if (rest == 0) return;
    alignas(64) E last_panel[kColumns * kWide] = {}, last_columns[kRows * kColumns];
    copy_bytes(last_panel, panel + steps * kColumns * kWide, ceil_div(rest, kStep) * kStep * kWide * sizeof(E));
    for (int64_t r = 0; r < rows; r += kRows) {
      Tiles::copy_columns(x + r * ldx + steps * kColumns, ldx, rest, last_columns);
      whole(r, [&](float* sums, int64_t ld) {
        Tiles::template add<1, L>(last_columns, kColumns, kRows, last_panel, 1, ahead, sums, ld);
      });
    }
  }

  // c[rows][ldc] += x rows * columns [col0, col0 + n) of `tiles` tiles (one or a group), whose scales multiply the
  // sums: `scales` [tiles][`segments` of them and room][16], `tile_stride` floats a tile. The rows after the first find
  // the decoded columns in `panel`.
  static void multiply_late(const E* x, int64_t rows, const Weight& w, int64_t tile, int64_t tiles, int64_t col0,
                            int64_t n, E* panel, int64_t segments, const float* scales, int64_t tile_stride,
                            Ahead ahead, float* c, int64_t ldc) {
    if constexpr (kHasTiles) {
      const int64_t steps = n / Tiles::kColumns / segments;
      for (int64_t i = 0; i < tiles; ++i)
        decode_codes(w, tile + i, col0, n, ahead.tile(i), panel, i * kTileVecs, tiles * kTileVecs);
      const auto add =
          tiles == kGroupTiles ? Tiles::template add_scaled<kGroupTiles, Ahead> : Tiles::template add_scaled<1, Ahead>;
      for (int64_t r = 0; r < rows; r += Tiles::kRows)
        add(x + r * kStride, kStride, min64(Tiles::kRows, rows - r), panel, steps, segments, scales, tile_stride, ahead,
            c + r * ldc, ldc);
    } else {
      const auto with = [&]<int NV>() {
        constexpr int64_t kPanelGroup = NV * kLanes * kGroupColumns;
        constexpr MakeInts<kLateMicroRows> sizes{};
        const int64_t groups = n / kGroupColumns / segments;
        Codes codes{A::table(kTables[w.format]), {}, panel - kPanelGroup, ahead, {}};
        for (int64_t i = 0; i < tiles; ++i) codes.codes[i] = w.codes + ((tile + i) * w.k + col0) * (kTile / 2);
        const auto body = [&](int64_t r, int m) {
          const E* from = x + r * kStride;
          float* to = c + r * ldc;
          if (r == 0)
            pick_late<NV, Codes>(m, sizes)(from, codes, groups, segments, scales, tile_stride, to, ldc);
          else
            pick_late<NV, Panel>(m, sizes)(from, Panel{panel - kPanelGroup}, groups, segments, scales, tile_stride, to,
                                           ldc);
        };
        row_blocks(rows, body, kLateMicroRows);
      };
      if (tiles == kGroupTiles)
        with.template operator()<V::kGroupVecs>();
      else
        with.template operator()<kTileVecs>();
    }
  }

  // The same where scales multiply the weights, also those in the panel.
  static void multiply_scaled(const E* x, int64_t rows, const Weight& w, int64_t tile, int64_t tiles, int64_t col0,
                              int64_t n, E* panel, const float* scales, int64_t tile_stride, Ahead ahead, float* c,
                              int64_t ldc) {
    const auto with = [&]<int NV, bool kHasZero>() {
      const int first = static_cast<int>(min64(rows, kDecodingRows));
      const auto decoding = pick_decoding<NV, kHasZero>(first, MakeInts<kDecodingRows>{});
      decoding(x, w, tile, col0, n, panel, scales, tile_stride, ahead, c, ldc);
      row_blocks(rows - first, [&](int64_t r, int m) {
        r += first;
        pick<NV>(m)(x + r * kStride, panel, n / kStep, c + r * ldc, ldc);
      });
    };
    const auto of = [&]<int NV>() {
      if (w.zero != nullptr)
        with.template operator()<NV, true>();
      else
        with.template operator()<NV, false>();
    };
    if (tiles == kGroupTiles)
      of.template operator()<V::kGroupVecs>();
    else
      of.template operator()<kTileVecs>();
  }

  // ---- decoding ----

  // Columns [col0, col0 + n) of a tile, code values without scales, into vectors vec.. of a panel of `vecs` vectors.
  static void decode_codes(const Weight& w, int64_t tile, int64_t col0, int64_t n, Ahead ahead, E* panel, int vec,
                           int vecs) {
    const typename A::Table table = A::table(kTables[w.format]);
    const uint8_t* codes = w.codes + (tile * w.k + col0) * (kTile / 2);
    for (int64_t c = 0; c < n; c += kGroupColumns, codes += 64) {
      if (!kHasTiles || c % (2 * kGroupColumns) == 0) ahead.next_line();
      for (int v = 0; v < kTileVecs; ++v) {
        const V::C lanes = V::load_codes(codes + v * kLanes * 4);
        each(
            MakeInts<kGroupColumns / kStep>{}, PF_BODY(int S) {
              A::store(panel + ((c / kStep + S) * vecs + vec + v) * kLanes * kStep,
                       A::template decode<S>(table, lanes));
            });
      }
    }
  }

  // Step S of eight columns, dequantized.
  template <bool kHasZero, int S>
  PF_INLINE static void scaled(const V::T& table, V::C codes, F scale, F zero, F* columns) {
    columns[0] = V::mul(V::decode<S * kStep>(table, codes), scale);
    if constexpr (kStep == 2) columns[kStep - 1] = V::mul(V::decode<S * kStep + kStep - 1>(table, codes), scale);
    if constexpr (kHasZero)
      for (int s = 0; s < kStep; ++s) columns[s] = V::add(columns[s], zero);
  }

  static void decode_group(const V::T& table, V::C codes, F scale, F zero, bool has_zero, E* dst, int stride) {
    each(
        MakeInts<kGroupColumns / kStep>{}, PF_BODY(int S) {
          F columns[kStep];
          if (has_zero)
            scaled<true, S>(table, codes, scale, zero, columns);
          else
            scaled<false, S>(table, codes, scale, zero, columns);
          A::store_steps(dst + S * stride, columns);
        });
  }

  // Columns [col0, col0 + n) of a tile, dequantized, into vectors vec.. of a panel of `vecs` vectors.
  static void decode_tile(const Weight& w, int64_t tile, int64_t col0, int64_t n, Ahead ahead, E* panel, int vec,
                          int vecs) {
    const V::T table = V::table(kTables[w.format]);
    const int64_t seg0 = col0 / w.segment, segs = (col0 + n - 1) / w.segment - seg0 + 1;
    alignas(64) float decoded[(kBlock / 32 + 1) * kTile];
    const float* scales = tile_scales(w, tile, seg0, segs, decoded);
    const float* zeros = w.zero == nullptr ? nullptr : w.zero + (tile * w.segments() + seg0) * kTile;
    const uint8_t* codes = w.codes + (tile * w.k + col0) * (kTile / 2);
    if constexpr (kHasTiles)
      for (int64_t s = 0; s < segs; ++s) __builtin_prefetch(scales + (kGroupTiles * w.segments() + s) * kTile);
    const int64_t columns = min64(w.segment, n);  // blocks are whole segments, or a part of one
    for (int64_t c0 = 0; c0 < n; c0 += columns, scales += kTile)
      for (int64_t c = c0; c < c0 + columns; c += kGroupColumns, codes += 64) {
        if (!kHasTiles || c % (2 * kGroupColumns) == 0) ahead.next_line();
        for (int v = 0; v < kTileVecs; ++v) {
          const F zero = zeros == nullptr ? V::zero() : V::load(zeros + c0 / columns * kTile + v * kLanes);
          decode_group(table, V::load_codes(codes + v * kLanes * 4), V::load(scales + v * kLanes), zero,
                       zeros != nullptr, panel + (c / kStep * vecs + vec + v) * kLanes * kStep, vecs * kLanes * kStep);
        }
      }
  }

  // Columns [col0, col0 + n) of tiles [tile0, tile1), as PackedRows: one row a column, contraction over output rows. A
  // last group that lacks tiles takes its last tile again, which nothing reads.
  static void decode_transposed(const Weight& w, int64_t tile0, int64_t tile1, int64_t col0, int64_t n, E* rows) {
    constexpr MakeInts<V::kGroupVecs> vecs{};
    const V::T table = V::table(kTables[w.format]);
    const int64_t seg0 = col0 / w.segment, segs = (col0 + n - 1) / w.segment - seg0 + 1;
    alignas(64) float decoded[kGroupTiles][(kColumnChunk / 32 + 1) * kTile];
    for (int64_t tile = tile0; tile < tile1; tile += kGroupTiles, rows += kGroupLanes) {
      const float *scales[kGroupTiles], *zeros[kGroupTiles];
      const uint8_t* codes[kGroupTiles];
      for (int i = 0; i < kGroupTiles; ++i) {
        const int64_t t = min64(tile + i, tile1 - 1);
        prefetch_scales(w, t + kGroupTiles, col0, n);
        scales[i] = tile_scales(w, t, seg0, segs, decoded[i]);
        zeros[i] = w.zero == nullptr ? nullptr : w.zero + (t * w.segments() + seg0) * kTile;
        codes[i] = w.codes + (t * w.k + col0) * (kTile / 2);
      }
      for (int64_t c0 = 0; c0 < n;) {
        const int64_t s = (col0 + c0) / w.segment - seg0, end = min64(n, (seg0 + s + 1) * w.segment - col0);
        F scale[V::kGroupVecs], zero[V::kGroupVecs];
        each(
            vecs, PF_BODY(int U) {
              const int64_t at = s * kTile + U % kTileVecs * kLanes;
              scale[U] = V::load(scales[U / kTileVecs] + at);
              zero[U] = w.zero == nullptr ? V::zero() : V::load(zeros[U / kTileVecs] + at);
            });
        for (; c0 < end; c0 += kGroupColumns) {
          V::C held[V::kGroupVecs];
          each(
              vecs, PF_BODY(int U) {
                const uint8_t* at = codes[U / kTileVecs] + c0 * (kTile / 2) + U % kTileVecs * kLanes * 4;
                __builtin_prefetch(at + kGroupTiles * w.k * (kTile / 2));
                held[U] = V::load_codes(at);
              });
          each(
              MakeInts<kGroupColumns>{}, PF_BODY(int C) {
                F lanes[V::kGroupVecs];
                each(
                    vecs, PF_BODY(int U) {
                      lanes[U] = V::mul(V::decode<C>(table, held[U]), scale[U]);
                      if (w.zero != nullptr) lanes[U] = V::add(lanes[U], zero[U]);
                    });
                A::store_lanes(rows + (c0 + C) * kStride, lanes);
              });
        }
      }
    }
  }

  // ---- forward, few rows: decode in registers ----

  // Columns [col0, col0 + n) of a tile of rows as a panel of its own: where it lies, or made in `out`.
  static const E* tile_panel(const Matrix& m, int64_t tile, int64_t col0, int64_t n, E* out) {
    if constexpr (kStep == 2)
      if (m.packed) return m.pairs(tile, col0);
    pack_lanes_t(m, tile * kTile, col0, n, out, 0, kTileVecs);
    return out;
  }

  // Asks for a tile's B, into the second-level cache: it is read tiles later.
  static void prefetch_b(const Matrix& b, int64_t tile) {
    if (b.packed) {
      const char* pairs = reinterpret_cast<const char*>(b.pairs(tile, 0));
      for (int64_t i = 0; i < b.cols * kTile * 2; i += 64) __builtin_prefetch(pairs + i, 0, 2);
    } else {
      for (int64_t row = tile * kTile; row < min64((tile + 1) * kTile, b.rows); ++row)
        __builtin_prefetch(b.row(row), 0, 2);
    }
  }

  static void prefetch_first_b(const Matrix& b, int64_t tile0) {
    for (int64_t tile = tile0; tile < min64(tile0 + kTilesAhead, ceil_div(b.rows, kTile)); ++tile) prefetch_b(b, tile);
  }

  // Elements from one row of few to the next, where packed matrices meet them: an odd last column with a zero.
  static int64_t steps_ld(int64_t cols) { return ceil_div(cols, 2) * 2; }

  static void to_steps(const float* src, int64_t rows, int64_t cols, void* dst) {
    const int64_t ld = steps_ld(cols);
    alignas(64) float in[kLanes];
    alignas(64) E out[kLanes];
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < ld; c += kLanes) {
        const int64_t have = min64(kLanes, cols - c), want = min64(kLanes, ld - c);
        __builtin_memset(in, 0, sizeof(in));
        copy_bytes(in, src + r * cols + c, have * sizeof(float));
        A::store_row(out, V::load(in));
        copy_bytes(static_cast<E*>(dst) + r * ld + c, out, want * sizeof(E));
      }
  }

  static constexpr int kManyDots = 6;  // rows at once of a matrix that stays in cache

  // MB rows of x times `steps` pairs of NT tiles, `stride` from one tile to the next, in independent chains. Of a
  // matrix that is read once or twice, what lies kCodesAhead further is asked for, up to `end` and then from `next` on.
  template <int MB, int NT>
  static void dots_rows(const E* x, int64_t ldx, const uint16_t* pairs, int64_t stride, int64_t steps, const char* end,
                        const char* next, float (*out)[MB][kTile]) {
    constexpr int kParts = MB * NT > kManyDots ? 1 : MB == kManyDots ? 2 : 8 / MB;
    constexpr MakeInts<kParts> parts{};
    for (int u = 0; u < kTileVecs; ++u) {
      F part[NT][MB][kParts];
      each(
          MakeInts<NT * MB>{},
          PF_BODY(int I) { each(parts, PF_BODY(int P) { part[I % NT][I / NT][P] = V::zero(); }); });
      const auto step = [&]<int P>(int64_t s) __attribute__((always_inline)) {
        const uint16_t* at = pairs + (s * kTileVecs + u) * kLanes * 2;
        decltype(A::load_pairs(at)) w[NT];
        each(
            MakeInts<NT>{}, PF_BODY(int T) {
              w[T] = A::load_pairs(at + T * stride);
              if constexpr (MB < kManyDots) {
                const char* ahead = reinterpret_cast<const char*>(at + T * stride) + kCodesAhead;
                prefetch_stream(ahead < end ? ahead : next + (ahead - end));
              }
            });
        each(
            MakeInts<NT * MB>{}, PF_BODY(int I) {
              F& sum = part[I % NT][I / NT][P];
              sum = A::fma_pairs(sum, w[I % NT], x + I / NT * ldx + s * 2);
            });
      };
      int64_t s = 0;
      for (; s + kParts <= steps; s += kParts) each(parts, PF_BODY(int P) { step.template operator()<P>(s + P); });
      for (; s < steps; ++s) step.template operator()<0>(s);
      each(
          MakeInts<NT * MB>{}, PF_BODY(int I) {
            const F* chains = part[I % NT][I / NT];
            F sum = chains[0];
            for (int p = 1; p < kParts; ++p) sum = V::add(sum, chains[p]);
            V::store(out[I % NT][I / NT] + u * kLanes, sum);
          });
    }
  }

  static void dots_packed(const GemvArgs& g, const Matrix& p, int64_t tile0, int64_t tile1, int64_t col0, int64_t col1,
                          const void* next, float* out) {
    const int64_t steps = (col1 - col0) / 2, stride = p.pairs(1, 0) - p.pairs(0, 0);
    const char* end = reinterpret_cast<const char*>(p.pairs(ceil_div(p.rows, kTile), 0));
    // Blocks of MB rows from m, NT tiles each; then what is left.
    const auto blocks = [&]<int MB, int NT>(int64_t m, int64_t tile) {
      alignas(64) float sums[NT][MB][kTile];
      for (; m + MB <= g.rows; m += MB) {
        dots_rows<MB, NT>(static_cast<const E*>(g.x) + m * g.ldx + col0, g.ldx, p.pairs(tile, col0), stride, steps, end,
                          static_cast<const char*>(next), sums);
        for (int t = 0; t < NT; ++t)
          for (int r = 0; r < MB; ++r)
            copy_bytes(out + (m + r) * p.rows + (tile + t) * kTile, sums[t][r],
                       min64(kTile, p.rows - (tile + t) * kTile) * sizeof(float));
      }
      return m;
    };
    int64_t m = 0;
    if constexpr (V::kMicroRows > kManyDots)
      for (int64_t t = tile0; g.rows > kFewRows && t < tile1;) {
        const auto many = [&]<int NT>() { m = blocks.template operator()<kManyDots, NT>(0, t), t += NT; };
        if (tile1 - t >= 4)
          many.template operator()<4>();
        else if (tile1 - t >= 2)
          many.template operator()<2>();
        else
          many.template operator()<1>();
      }
    for (int64_t t = tile0; t < tile1; ++t) {
      int64_t r = blocks.template operator()<4, 1>(m, t);
      r = blocks.template operator()<2, 1>(r, t);
      blocks.template operator()<1, 1>(r, t);
    }
  }

  // Few rows' decoding where lanes are the rows of a tile: a vector of codes gives its columns one step after the
  // other. An instruction set may have others (BytePlanes in avx2.cpp, Words in avx512.h): `weights<S>` times
  // `operand<S>` adds to the sum S % parts, `join` makes the rows of these sums, times the scale of x where `arrange`
  // gave it one every `unit` columns.
  struct Lanes {
    using Elem = E;
    using Sum = F;
    using Table = typename A::Table;
    static constexpr int kUnits = kGroupColumns / kStep;
    static constexpr int kMostRows = V::kGemvRows;
    static constexpr int parts(int rows) { return V::gemv_parts(rows); }
    static int64_t unit(const Weight& w) { return w.segment; }
    static Table table(const Weight& w) { return A::table(kTables[w.format]); }
    template <int S>
    static typename A::W weights(const Table& t, V::C codes) {
      return A::template decode<S>(t, codes);
    }
    template <int S>
    static typename A::X operand(const E* x) {
      return A::broadcast(x + S * kStep);
    }
    static F zero() { return V::zero(); }
    static F fma(F acc, typename A::W w, typename A::X x) { return A::fma(acc, w, x); }
    template <int N>
    static F join(const F* part, const FewColumns<E>&, int64_t, int64_t) {
      return sum<N>(part);
    }
    static FewColumns<E> arrange(const GemvArgs& g) { return {static_cast<const E*>(g.x), g.ldx}; }
  };

  template <int N>
  static F sum(const F* part) {
    if constexpr (N == 1) return part[0];
    if constexpr (N == 2) return V::add(part[0], part[1]);
    if constexpr (N == 4) return V::add(V::add(part[0], part[1]), V::add(part[2], part[3]));
  }

  // What gemv_rows is told of its tile.
  template <class D>
  struct GemvTile {
    FewColumns<typename D::Elem> x;
    int64_t tile;
    const float *scales, *zeros;
    const E* b;                         // of a branch
    const uint16_t* b_pairs;            // of a packed one
    const char *b_ahead, *b_ahead_end;  // what is asked for of it, b_lines every segment
    int64_t b_lines;
    typename D::Table table;
  };

  // MB rows of x, from row0, times one tile. Sums of a segment are kept in independent chains, to hide the latency of
  // the multiply-add; every index is a compile-time constant, so that all sums stay in registers.
  template <class D, int MB>
  static void gemv_rows(const GemvArgs& g, const GemvTile<D>& t, int64_t row0) {
    constexpr int kParts = D::parts(MB), kChains = V::gemv_parts(MB);
    constexpr MakeInts<MB> rows{};
    constexpr MakeInts<kTileVecs> vecs{};
    F acc[MB][kTileVecs];
    // The branch first: its sums run while the first codes are still on their way.
    const int64_t rank = g.s == nullptr ? 0 : g.lora_b.cols, ld = steps_ld(rank);
    const E* s_rows = static_cast<const E*>(g.s) + row0 * ld;
    const auto branch = [&]<int Columns>(const auto& weights, const auto& fma) __attribute__((always_inline)) {
      each(
          vecs, PF_BODY(int U) {
            F part[MB][kChains];
            each(rows, PF_BODY(int M) { each(MakeInts<kChains>{}, PF_BODY(int P) { part[M][P] = V::zero(); }); });
            const auto step = [&]<int P>(int64_t r) __attribute__((always_inline)) {
              const auto w = weights(r * kTile + U * kLanes * Columns);
              each(rows, PF_BODY(int M) { part[M][P] = fma(part[M][P], w, s_rows + M * ld + r); });
            };
            int64_t r = 0;
            for (; r + kChains * Columns <= rank; r += kChains * Columns)
              each(MakeInts<kChains>{}, PF_BODY(int P) { step.template operator()<P>(r + P * Columns); });
            for (; r < rank; r += Columns) step.template operator()<0>(r);
            each(rows, PF_BODY(int M) { acc[M][U] = sum<kChains>(part[M]); });
          });
    };
    if (g.lora_b.packed)
      branch.template operator()<2>([&](int64_t at) { return A::load_pairs(t.b_pairs + at); },
                                    [](F acc, auto w, const E* x) { return A::fma_pairs(acc, w, x); });
    else
      branch.template operator()<kStep>([&](int64_t at) { return A::load(t.b + at); },
                                        [](F acc, auto w, const E* x) { return A::fma(acc, w, A::broadcast(x)); });
    const uint8_t* codes = g.w.codes + t.tile * g.w.k * (kTile / 2);
    const typename D::Elem* x = t.x.data + row0 * t.x.ld;
    const int64_t segments = g.w.segments(), unit = D::unit(g.w), groups = unit / kGroupColumns;
    const char* b_ahead = t.b_ahead;
    int64_t at_unit = 0;
    for (int64_t s = 0; s < segments; ++s) {
      __builtin_prefetch(reinterpret_cast<const char*>(t.scales + s * kTile) + kScalesAhead);
      for (int64_t i = 0; i < t.b_lines && b_ahead < t.b_ahead_end; ++i, b_ahead += 64) prefetch_stream(b_ahead);
      for (int64_t column = 0; column < g.w.segment; column += unit, codes += groups * 64, x += unit, ++at_unit)
        each(
            vecs, PF_BODY(int U) {
              typename D::Sum part[MB][kParts];
              each(rows, PF_BODY(int M) { each(MakeInts<kParts>{}, PF_BODY(int P) { part[M][P] = D::zero(); }); });
              for (int64_t group = 0; group < groups; ++group) {
                const uint8_t* at = codes + group * 64;
                if constexpr (U == 0) prefetch_stream(at + kCodesAhead);
                const V::C c = V::load_codes(at + U * kLanes * 4);
                each(
                    MakeInts<D::kUnits>{}, PF_BODY(int S) {
                      const auto w = D::template weights<S>(t.table, c);
                      each(
                          rows, PF_BODY(int M) {
                            auto& sum = part[M][S % kParts];
                            sum = D::fma(sum, w, D::template operand<S>(x + M * t.x.ld + group * kGroupColumns));
                          });
                    });
              }
              const F scale = V::load(t.scales + s * kTile + U * kLanes);
              each(
                  rows, PF_BODY(int M) {
                    const F sum = D::template join<kParts>(part[M], t.x, row0 + M, at_unit);
                    acc[M][U] = V::fma(sum, scale, acc[M][U]);
                  });
            });
      if (t.zeros != nullptr)
        each(
            vecs, PF_BODY(int U) {
              const F zero = V::load(t.zeros + s * kTile + U * kLanes);
              each(
                  rows,
                  PF_BODY(int M) { acc[M][U] = V::fma(zero, V::set1(g.xsum[(row0 + M) * segments + s]), acc[M][U]); });
            });
    }
    const int64_t n0 = t.tile * kTile, lanes = min64(kTile, g.w.n - n0);
    each(
        rows, PF_BODY(int M) {
          alignas(64) float out[kTile];
          each(vecs, PF_BODY(int U) { V::store(out + U * kLanes, acc[M][U]); });
          if (g.bias != nullptr)
            for (int64_t i = 0; i < lanes; ++i) out[i] += g.bias[n0 + i];
          from_float(out, static_cast<char*>(g.y) + ((row0 + M) * g.ldy + n0) * dtype_size(g.y_dtype), g.y_dtype,
                     lanes);
        });
  }

  template <class D, int... M>
  static auto pick_gemv(int rows, IntList<M...>) {
    static constexpr void (*kRows[])(const GemvArgs&, const GemvTile<D>&, int64_t) = {gemv_rows<D, M + 1>...};
    return kRows[rows - 1];
  }

  template <class D>
  static void gemv_with(const GemvArgs& g, const FewColumns<typename D::Elem>& x, int64_t tile0, int64_t tile1) {
    const int64_t segments = g.w.segments();
    const int64_t rank = g.s == nullptr ? 0 : g.lora_b.cols, padded_rank = ceil_div(rank, 16) * 16;
    float* decoded = static_cast<float*>(scratch(0, (segments + padded_rank) * kTile * sizeof(float)));
    E* made = reinterpret_cast<E*>(decoded + segments * kTile);
    GemvTile<D> t{};
    t.x = x;
    t.b = made;
    t.table = D::table(g.w);
    for (t.tile = tile0; t.tile < tile1; ++t.tile) {
      if (g.w.scale == nullptr)  // memory works while the scales are decoded
        for (int64_t i = 0; i < segments * kTile; i += 16)
          prefetch_stream(g.w.codes + t.tile * g.w.k * (kTile / 2) + kCodesAhead + i * 4);
      t.scales = tile_scales(g.w, t.tile, 0, segments, decoded);
      t.zeros = g.w.zero == nullptr ? nullptr : g.w.zero + t.tile * segments * kTile;
      if (rank != 0 && g.lora_b.packed) {
        t.b_pairs = g.lora_b.pairs(t.tile, 0);
        t.b_ahead = reinterpret_cast<const char*>(g.lora_b.pairs(min64(t.tile + kFewTilesAhead, tile1), 0));
        t.b_ahead_end = reinterpret_cast<const char*>(g.lora_b.pairs(min64(t.tile + kFewTilesAhead + 1, tile1), 0));
        t.b_lines = ceil_div(t.b_ahead_end - t.b_ahead, 64 * segments);
      } else if (rank != 0) {
        pack_lanes_t(g.lora_b, t.tile * kTile, 0, rank, made, 0, kTileVecs);
        if (t.tile + kFewTilesAhead < tile1) prefetch_b(g.lora_b, t.tile + kFewTilesAhead);
      }
      row_blocks(g.rows, [&](int64_t m, int n) { pick_gemv<D>(n, MakeInts<D::kMostRows>{})(g, t, m); }, D::kMostRows);
    }
  }

  template <class Vocabulary>
  static void gemv_of(const GemvArgs& g, int64_t tile0, int64_t tile1) {
    const auto by = [&]<class D>(const D&, const GemvArgs& args) {
      const FewColumns<typename D::Elem> x = D::arrange(args);
      gemv_with<D>(args, x, tile0, tile1);
      return x.left_out;
    };
    if constexpr (requires { typename Vocabulary::template BytePlanes<4>; }) {
      if (g.x_dtype == kBFloat16)
        by(typename Vocabulary::template BytePlanes<2>{}, g);
      else
        by(typename Vocabulary::template BytePlanes<4>{}, g);
      return;
    }
    if constexpr (requires { typename Vocabulary::Words; } && kStep == 1)
      if (g.x_dtype == kBFloat16) {
        const uint32_t left_out = by(typename Vocabulary::Words{}, g);
        for (int64_t r = 0; r < g.rows; ++r)
          if (left_out >> r & 1) by(Lanes{}, row_of(g, r));
        return;
      }
    by(Lanes{}, g);
  }
  static void gemv(const GemvArgs& g, int64_t tile0, int64_t tile1) { gemv_of<V>(g, tile0, tile1); }

  static GemvArgs row_of(const GemvArgs& g, int64_t r) {
    GemvArgs row = g;
    row.x = static_cast<const E*>(g.x) + r * g.ldx;
    row.rows = 1;
    if (g.xsum != nullptr) row.xsum = g.xsum + r * g.w.segments();
    if (g.s != nullptr) row.s = static_cast<const E*>(g.s) + r * steps_ld(g.lora_b.cols);
    row.y = static_cast<char*>(g.y) + r * g.ldy * dtype_size(g.y_dtype);
    return row;
  }

  // ---- forward, many rows: decode a panel, then a dense product ----

  static void gemm(const GemmArgs& g, int64_t tile0, int64_t tile1) {
    const int64_t k = g.w.k, rank = g.lora_b.data == nullptr ? 0 : g.lora_b.cols;
    E* panel = static_cast<E*>(scratch(0, kGroupPanel * sizeof(E)));
    const bool late = kLateRows > 0 && g.late;
    // More rows share what decoding costs where the weights are scaled (512 rows on Zen 5: 1.045 times dense bf16, not
    // 1.012); with scales on the sums, on Zen 4, fewer were faster.
    const int64_t chunk = kDecodingRows > 0 && !late ? 2 * kRowChunk : kRowChunk;
    float* c = static_cast<float*>(scratch(1, chunk * kPanelTiles * kTile * sizeof(float)));
    const int64_t count = ceil_div(tile1 - tile0, kPanelTiles);
    [[maybe_unused]] const Tiles held;
    constexpr int64_t kScaleStride = (kBlock / 32 + 1) * kTile;
    alignas(64) float scales[kGroupTiles * kScaleStride];
    for (int64_t row0 = 0; row0 < g.x.rows; row0 += chunk) {
      const int64_t rows = min64(chunk, g.x.rows - row0);
      for (int64_t p = 0; p < count; ++p) {
        // Even panels, of whole groups where that is possible.
        const int64_t units = ceil_div(tile1 - tile0, kGroupTiles);
        const int64_t t0 = tile0 + units * p / count * kGroupTiles;
        const int64_t t1 = min64(tile1, tile0 + units * (p + 1) / count * kGroupTiles);
        // body(first tile, tiles, sums) for each group: its panel of a block stays in the first-level cache.
        const auto groups = [&](const auto& body) {
          for (int64_t t = t0; t < t1; t += kGroupTiles)
            body(t, min64(kGroupTiles, t1 - t), c + (t - t0) * kTile * rows);
        };
        groups([&](int64_t t, int64_t, float* out) {
          alignas(64) float bias[kGroupLanes] = {};
          const int64_t lanes = min64(kGroupLanes, g.w.n - t * kTile);
          if (g.bias != nullptr) copy_bytes(bias, g.bias + t * kTile, lanes * sizeof(float));
          for (int64_t r = 0; r < rows; ++r) {
            copy_bytes(out + r * kGroupLanes, bias, sizeof(bias));
            if (g.base.data == nullptr) continue;
            const char* from = g.base.row(row0 + r) + t * kTile * dtype_size(g.base.dtype);
            to_float(from, g.base.dtype, out + r * kGroupLanes, lanes);
          }
        });
        const auto vecs_of = [](int64_t tiles) { return tiles == kGroupTiles ? V::kGroupVecs : kTileVecs; };
        for (int64_t col0 = 0; col0 < k; col0 += kBlock) {
          const int64_t n = min64(kBlock, k - col0), segments = n > g.w.segment ? n / g.w.segment : 1;
          const E* x = packed_block(g.x, col0 / kBlock) + row0 * kStride;
          groups([&](int64_t t, int64_t tiles, float* out) {
            const Ahead ahead = codes_ahead(g.w, t, t0, t1, col0, n);
            for (int64_t i = 0; i < tiles; ++i) {
              if (rank != 0 && col0 + n == k) prefetch_b(g.lora_b, t + i);
              if (!late && kDecodingRows == 0) {
                decode_tile(g.w, t + i, col0, n, ahead.tile(i), panel, i * kTileVecs, vecs_of(tiles));
                continue;
              }
              float* own = scales + i * kScaleStride;
              const float* from = tile_scales(g.w, t + i, col0 / g.w.segment, segments, own);
              for (int64_t v = 0; v < segments * kTile; v += kLanes) V::store(own + v, A::clean(V::load(from + v)));
            }
            if constexpr (kLateRows > 0)
              if (late)
                return multiply_late(x, rows, g.w, t, tiles, col0, n, panel, segments, scales, kScaleStride, ahead, out,
                                     kGroupLanes);
            if constexpr (kDecodingRows > 0)
              multiply_scaled(x, rows, g.w, t, tiles, col0, n, panel, scales, kScaleStride, ahead, out, kGroupLanes);
            else
              multiply(x, rows, panel, n, tiles, out, kGroupLanes, ahead);
          });
        }
        for (int64_t col0 = 0; col0 < rank; col0 += kBlock) {
          const int64_t n = min64(kBlock, rank - col0);
          groups([&](int64_t t, int64_t tiles, float* out) {
            for (int64_t i = 0; i < tiles; ++i)
              pack_lanes_t(g.lora_b, (t + i) * kTile, col0, n, panel, i * kTileVecs, vecs_of(tiles));
            multiply(packed_block(g.s, col0 / kBlock) + row0 * kStride, rows, panel, n, tiles, out, kGroupLanes);
          });
        }
        for (int64_t r = 0; r < rows; ++r)
          groups([&](int64_t t, int64_t, const float* sums) {
            char* y = static_cast<char*>(g.y) + ((row0 + r) * g.ldy + t * kTile) * dtype_size(g.y_dtype);
            from_float(sums + r * kGroupLanes, y, g.y_dtype, min64(kGroupLanes, g.w.n - t * kTile));
          });
      }
    }
  }

  // ---- forward, few rows of x times a weight in full precision ----

#ifdef PF_BF16
  // sums[m][n] (+)= the products of row m of MB rows of x with row n of kTile rows of W, lane by lane; W's rows from
  // `last` on are that one again. Contraction in pairs along the lanes. W is read in the order of memory, one row after
  // the other where the sums of one are enough to hide the latency (Zen 5, 49152 x 576, one row of x: 42 GB/s; four
  // rows side by side 30). Eight rows of x need the first-level cache for themselves; `kAgain`, where W was read before
  // for other rows of x, it is in a cache, and loads of x take the time.
  template <int MB, bool kAgain>
  static void pair_dots(const Matrix& x, const Matrix& w, int64_t last, bool adds, F (*sums)[kTile]) {
    constexpr bool kMany = MB >= 8 || kAgain;
    constexpr int kRows = MB >= 8 ? 2 : kMany ? 4 : 1, kChains = kMany ? 1 : MB >= 3 ? 2 : 4, kWide = kLanes * kStep;
    constexpr int64_t kAhead = kMany ? 16384 : kRowsAhead, kHint = kMany ? 2 : kLocality;
    constexpr MakeInts<MB> ms{};
    constexpr MakeInts<kRows> rs{};
    const int64_t whole = w.cols / kWide * kWide, rest = w.cols - whole;
    const E *x0 = static_cast<const E*>(x.data), *w0 = static_cast<const E*>(w.data);
    const int64_t ldx = x.ld, ldw = w.ld;
    alignas(64) E padded_x[MB][kWide] = {}, padded_w[kRows][kWide] = {};
    for (int m = 0; m < MB; ++m) copy_bytes(padded_x[m], x0 + m * ldx + whole, rest * sizeof(E));
    for (int n = 0; n < kTile; n += kRows) {
      const E* at[kRows];
      for (int r = 0; r < kRows; ++r) at[r] = w0 + min64(n + r, last) * ldw;
      F acc[kRows][MB][kChains];
      each(
          rs, PF_BODY(int R) {
            each(
                ms, PF_BODY(int M) {
                  acc[R][M][0] = adds ? sums[M][n + R] : V::zero();
                  each(MakeInts<kChains - 1>{}, PF_BODY(int P) { acc[R][M][P + 1] = V::zero(); });
                });
          });
      const auto step = [&]<int P>(const auto& x_at, const auto& w_at) __attribute__((always_inline)) {
        typename A::W xs[MB];
        each(ms, PF_BODY(int M) { xs[M] = A::load(x_at(M)); });
        each(
            rs, PF_BODY(int R) {
              const typename A::W weights = A::load(w_at(R));
              each(ms, PF_BODY(int M) { acc[R][M][P] = A::fma(acc[R][M][P], weights, xs[M]); });
            });
      };
      const auto whole_step = [&]<int P>(int64_t k) __attribute__((always_inline)) {
        step.template operator()<P>([&](int m) { return x0 + m * ldx + k; },
                                    [&](int r) {
                                      __builtin_prefetch(reinterpret_cast<const char*>(at[r] + k) + kAhead, 0, kHint);
                                      return at[r] + k;
                                    });
      };
      int64_t k = 0;
      for (; kChains > 1 && k + kChains * kWide <= whole; k += kChains * kWide)
        each(MakeInts<kChains>{}, PF_BODY(int P) { whole_step.template operator()<P>(k + P * kWide); });
      for (; k < whole; k += kWide) whole_step.template operator()<0>(k);
      if (rest != 0) {
        for (int r = 0; r < kRows; ++r) copy_bytes(padded_w[r], at[r] + whole, rest * sizeof(E));
        step.template operator()<0>([&](int m) { return padded_x[m]; }, [&](int r) { return padded_w[r]; });
      }
      each(rs, PF_BODY(int R) { each(ms, PF_BODY(int M) { sums[M][n + R] = sum<kChains>(acc[R][M]); }); });
    }
  }

  // The same as dense_sums of matrices in pairs.
  static void dense_pairs(const DenseArgs& g, int64_t n0, int64_t lanes, float* c) {
    F sums[8][kTile];
    for (int64_t i = 0; i < lanes; i += kTile) {
      Matrix x = g.x, w = g.w;
      for (int64_t m = 0; m < g.x.rows;) {
        using Dots = void (*)(const Matrix&, const Matrix&, int64_t, bool, F(*)[kTile]);
        static constexpr Dots kFirst[] = {pair_dots<1, false>, pair_dots<2, false>, pair_dots<3, false>,
                                          pair_dots<4, false>};
        static constexpr Dots kAgain[] = {pair_dots<1, true>, pair_dots<2, true>, pair_dots<3, true>,
                                          pair_dots<4, true>};
        const int64_t left = g.x.rows - m, n = left >= 8 ? 8 : min64(left, 4);
        const Dots dots = n == 8 ? pair_dots<8, false> : (m == 0 ? kFirst : kAgain)[n - 1];
        // Of so many columns that eight rows of x stay in the first-level cache.
        const int64_t cols = n == 8 ? 1024 : g.w.cols;
        int64_t col0 = 0;
        do {
          x.data = reinterpret_cast<const E*>(g.x.row(m)) + col0;
          w.data = reinterpret_cast<const E*>(g.w.row(n0 + i)) + col0;
          w.cols = min64(cols, g.w.cols - col0);
          dots(x, w, lanes - i - 1, col0 > 0, sums);
        } while ((col0 += cols) < g.w.cols);
        for (int64_t r = 0; r < n; ++r, ++m) V::store(c + m * kGroupLanes + i, V::join16(sums[r], V::add));
      }
    }
  }
#endif

  // c[row of x][lane] = x * W^T for rows [n0, n0 + lanes) of W, up to kGroupLanes. With tiles, W is the side that lies
  // in rows; `panel` is x as a tile of lanes.
  static void dense_sums(const DenseArgs& g, const E* panel, int64_t n0, int64_t lanes, float* c) {
    int64_t done = 0;
#ifdef PF_BF16
    if constexpr (kStep == 2 && !kHasTiles)
      if (g.x.dtype == kBFloat16 && g.w.dtype == kBFloat16) return dense_pairs(g, n0, lanes, c);
#endif
    if constexpr (kHasTiles)
      if (panel != nullptr) {
        alignas(64) float sums[kGroupLanes * kTile] = {}, square[kTile * kTile];
        done = lanes / kTile * kTile;
        multiply_tiles<1>(reinterpret_cast<const E*>(g.w.row(n0)), g.w.ld, done, panel, g.w.cols, {}, sums, kTile);
        for (int64_t i = 0; i < done; i += kTile) {
          V::transpose16(sums + i * kTile, kTile, square);
          for (int64_t r = 0; r < g.x.rows; ++r)
            copy_bytes(c + r * kGroupLanes + i, square + r * kTile, kTile * sizeof(float));
        }
      }
    Matrix part = g.w;
    part.data = g.w.row(n0);
    part.rows = kGroupLanes;
    dots(g.xf, g.ldxf, g.x.rows, part, c, done, lanes);
  }

  static void dense(const DenseArgs& g, int64_t group0, int64_t group1) {
    [[maybe_unused]] const Tiles held;
    const int64_t rows = g.x.rows, rank = g.lora_b.data == nullptr ? 0 : g.lora_b.cols;
    E *b_panel = static_cast<E*>(scratch(0, kGroupPanel * sizeof(E))), *x_panel = nullptr;
    if (kHasTiles && g.x.dtype == kBFloat16 && g.w.dtype == kBFloat16) {
      x_panel = static_cast<E*>(scratch(1, ceil_div(g.x.cols, kStep) * kStep * kTile * sizeof(E)));
      pack_lanes_t(g.x, 0, 0, g.x.cols, x_panel, 0, kTileVecs);
    }
    alignas(64) float c[kTile * kGroupLanes];
    for (int64_t n0 = group0 * kGroupLanes; n0 < min64(group1 * kGroupLanes, g.w.rows); n0 += kGroupLanes) {
      const int64_t lanes = min64(kGroupLanes, g.w.rows - n0), tiles = ceil_div(lanes, kTile);
      dense_sums(g, x_panel, n0, lanes, c);
      for (int64_t col0 = 0; col0 < rank; col0 += kBlock) {
        const int64_t n = min64(kBlock, rank - col0);
        for (int64_t i = 0; i < tiles; ++i)
          pack_lanes_t(g.lora_b, n0 + i * kTile, col0, n, b_panel, i * kTileVecs, tiles * kTileVecs);
        multiply(packed_block(g.s, col0 / kBlock), rows, b_panel, n, tiles, c, kGroupLanes);
      }
      for (int64_t r = 0; r < rows; ++r) {
        float* sums = c + r * kGroupLanes;
        if (g.bias != nullptr)
          for (int64_t i = 0; i < lanes; ++i) sums[i] += g.bias[n0 + i];
        from_float(sums, static_cast<char*>(g.y) + (r * g.w.rows + n0) * dtype_size(g.y_dtype), g.y_dtype, lanes);
      }
    }
  }

  // ---- backward ----

  static void dx(const DxArgs& g, int64_t col0, int64_t col1) {
    [[maybe_unused]] const Tiles held;
    const int64_t groups = ceil_div(g.rows, kGroupLanes), rank = g.ds == nullptr ? 0 : g.lora_a.rows;
    const int64_t chunk_groups = kRowChunk / kGroupLanes;
    E* wt = static_cast<E*>(scratch(0, kColumnChunk * kStride * sizeof(E)));
    float* c = static_cast<float*>(scratch(1, kColumnChunk * kRowChunk * sizeof(float)));
    for (int64_t g0 = 0; g0 < groups; g0 += chunk_groups) {
      const int64_t ngroups = min64(chunk_groups, groups - g0);
      const auto accumulate = [&](const void* panels, int64_t block, int64_t contraction, int64_t cols) {
        const E* p = static_cast<const E*>(panels) + (block * groups + g0) * kGroupPanel;
        multiply(wt, cols, p, contraction, ngroups * kGroupTiles, c, kGroupLanes);
      };
      // body(first row, rows, sums) for each group.
      const auto each_group = [&](int64_t cols, const auto& body) {
        for (int64_t i = 0; i < ngroups; ++i) {
          const int64_t row0 = (g0 + i) * kGroupLanes;
          body(row0, min64(kGroupLanes, g.rows - row0), c + i * cols * kGroupLanes);
        }
      };
      for (int64_t k0 = col0; k0 < col1; k0 += kColumnChunk) {
        const int64_t cols = min64(kColumnChunk, col1 - k0);
        __builtin_memset(c, 0, cols * ngroups * kGroupLanes * sizeof(float));
        for (int64_t r = 0; r < rank; r += kBlock) {
          const int64_t n = min64(kBlock, rank - r);
          Matrix part = g.lora_a;
          part.data = g.lora_a.row(r);
          part.rows = n;
          Matrix shifted = part;  // its columns k0.. become rows 0..
          shifted.data = static_cast<const char*>(part.data) + k0 * dtype_size(part.dtype);
          shifted.cols = cols;
          pack_rows_t(shifted, nullptr, 0, wt);
          accumulate(g.ds, r / kBlock, n, cols);
        }
        if (rank != 0 && g.dropout.threshold != 0)
          each_group(cols, [&](int64_t row0, int64_t rows, float* sums) {
            drop_transposed(g.dropout, row0, rows, k0, cols, sums, kGroupLanes);
          });
        for (int64_t n0 = 0; n0 < g.w.tiles() * kTile; n0 += kBlock) {
          const int64_t tile0 = n0 / kTile, tile1 = min64(g.w.tiles(), tile0 + kBlock / kTile);
          decode_transposed(g.w, tile0, tile1, k0, cols, wt);
          accumulate(g.dy, n0 / kBlock, min64((tile1 - tile0) * kTile, g.w.n - n0), cols);
        }
        each_group(cols, [&](int64_t row0, int64_t rows, const float* sums) {
          store_transposed(sums, kGroupLanes, cols, rows, g.dx, g.dx_dtype, g.lddx, row0, k0);
        });
      }
    }
  }

  // c[column][row] masked as element (row0 + row, col0 + column).
  static void drop_transposed(const Dropout& d, int64_t row0, int64_t rows, int64_t col0, int64_t cols, float* c,
                              int64_t ldc) {
    alignas(64) float factors[kColumnChunk];
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < cols; ++i) factors[i] = 1.0f;
      apply_dropout(d, row0 + r, col0, cols, factors);
      for (int64_t i = 0; i < cols; ++i) c[i * ldc + r] = factors[i] == 0.0f ? 0.0f : c[i * ldc + r] * factors[i];
    }
  }

  // out[row0 + r][col0 + i] = c[i][r] in `dtype`.
  static void store_transposed(const float* c, int64_t ldc, int64_t cols, int64_t rows, void* out, int dtype,
                               int64_t ldout, int64_t row0, int64_t col0) {
    const Matrix m{c, kFloat32, cols, rows, ldc};
    with_dtype(
        dtype, PF_BODY(int D) {
          constexpr int kSize = D == kFloat32 ? 4 : 2;
          alignas(64) float square[16 * 16];
          for (int64_t r = 0; r < rows; r += 16)
            for (int64_t i = 0; i < cols; i += 16) {
              const int64_t nr = min64(16, rows - r), ni = min64(16, cols - i);
              load_transposed(m, i, ni, r, nr, square);
              for (int64_t j = 0; j < nr; ++j) {
                char* to = static_cast<char*>(out) + ((row0 + r + j) * ldout + col0 + i) * kSize;
                for (int64_t v = 0; v < ni; v += kLanes) store_part<D>(to, v, ni, V::load(square + j * 16 + v));
              }
            }
        });
  }

  // ---- the branch's small products ----

  // Rows of a group's sums to rows of `out`, ldout apart.
  static void copy_sums(const float* c, int64_t rows, int64_t lanes, float* out, int64_t ldout) {
    for (int64_t r = 0; r < rows; ++r) copy_bytes(out + r * ldout, c + r * kGroupLanes, lanes * sizeof(float));
  }

  static void rows_times_t(const PackedRows& x, const Matrix& p, float* out, int64_t row0, int64_t row1, int64_t begin,
                           int64_t end) {
    [[maybe_unused]] const Tiles held;
    const int64_t tiles = ceil_div(p.rows, kTile), groups = ceil_div(tiles, kGroupTiles), rows = row1 - row0;
    E* panels = static_cast<E*>(scratch(0, groups * kGroupPanel * sizeof(E)));
    float* c = static_cast<float*>(scratch(1, rows * groups * kGroupLanes * sizeof(float)));
    __builtin_memset(c, 0, rows * groups * kGroupLanes * sizeof(float));
    for (int64_t col0 = begin; col0 < end; col0 += kBlock) {
      const int64_t n = min64(kBlock, end - col0);
      for (int64_t t = 0; t < tiles; ++t) {
        const bool whole = tiles - t / kGroupTiles * kGroupTiles >= kGroupTiles;
        pack_lanes_t(p, t * kTile, col0, n, panels + t / kGroupTiles * kGroupPanel, t % kGroupTiles * kTileVecs,
                     whole ? V::kGroupVecs : kTileVecs);
      }
      multiply(packed_block(x, col0 / kBlock) + row0 * kStride, rows, panels, n, tiles, c, kGroupLanes);
    }
    for (int64_t lane = 0; lane < p.rows; lane += kGroupLanes, c += rows * kGroupLanes)
      copy_sums(c, rows, min64(kGroupLanes, p.rows - lane), out + row0 * p.rows + lane, p.rows);
  }

  static void rows_times_panels(const PackedRows& x, const void* panels, int64_t lanes, float* out, int64_t group0,
                                int64_t group1) {
    [[maybe_unused]] const Tiles held;
    const int64_t groups = ceil_div(lanes, kGroupLanes);
    float* c = static_cast<float*>(scratch(1, x.rows * kGroupLanes * sizeof(float)));
    for (int64_t g = group0; g < group1; ++g) {
      __builtin_memset(c, 0, x.rows * kGroupLanes * sizeof(float));
      for (int64_t block = 0; block * kBlock < x.cols; ++block)
        multiply(packed_block(x, block), x.rows, static_cast<const E*>(panels) + (block * groups + g) * kGroupPanel,
                 min64(kBlock, x.cols - block * kBlock), kGroupTiles, c, kGroupLanes);
      const int64_t lane0 = g * kGroupLanes;
      copy_sums(c, x.rows, min64(kGroupLanes, lanes - lane0), out + lane0, lanes);
    }
  }

  static void logits(const Matrix& w, const void* panels, int64_t rows, void* out, int64_t row0, int64_t row1) {
    [[maybe_unused]] const Tiles held;
    const int64_t groups = ceil_div(rows, kGroupLanes);
    if (row1 == w.rows && row1 % kStep != 0)
      for (int64_t r = 0; r < rows; ++r) static_cast<E*>(out)[(row1 / kBlock * rows + r) * kStride + row1 % kBlock] = 0;
    E* packed = static_cast<E*>(scratch(0, packed_rows_bytes(kLogits, w.cols)));
    alignas(64) float c[kLogits * kGroupLanes];
    for (int64_t n0 = row0; n0 < row1; n0 += kLogits) {
      const int64_t n = min64(kLogits, row1 - n0), block = n0 / kBlock;
      const Matrix part{w.row(n0), w.dtype, n, w.cols, w.ld};
      pack_rows(part, nullptr, 0, {}, packed, 0, n);
      for (int64_t g = 0; g < groups; ++g) {
        prefetch_share(w, n0 + n, min64(row1, n0 + n + kLogits), 0, w.cols, g, groups);
        __builtin_memset(c, 0, sizeof(c));
        for (int64_t i = 0; i * kBlock < w.cols; ++i)
          multiply(packed_block({packed, n, w.cols}, i), n,
                   static_cast<const E*>(panels) + (i * groups + g) * kGroupPanel, min64(kBlock, w.cols - i * kBlock),
                   kGroupTiles, c, kGroupLanes);
        const int64_t lane0 = g * kGroupLanes;
        store_transposed(c, kGroupLanes, n, min64(kGroupLanes, rows - lane0),
                         static_cast<E*>(out) + block * rows * kStride, kElement, kStride, lane0, n0 % kBlock);
      }
    }
  }

  static void rows_times(const PackedRows& x, const Matrix& p, const Dropout& d, float* out, bool transposed,
                         int64_t lane0, int64_t lane1) {
    [[maybe_unused]] const Tiles held;
    constexpr int64_t kLanesTogether = 16 * kGroupLanes;  // whose sums stay in cache, while p is read along its rows
    constexpr int64_t kRowsTogether = 32;                 // between them, some of what comes next is asked for
    constexpr int64_t kSummands = 16 * kBlock;            // of one float32 sum: more are a sum of such sums
    E* panel = static_cast<E*>(scratch(0, kGroupPanel * sizeof(E)));
    const int64_t rows = x.rows;
    const bool splits = p.rows > kSummands;
    float* sums = static_cast<float*>(scratch(1, (splits ? 2 : 1) * rows * kLanesTogether * sizeof(float)));
    float* totals = splits ? sums + rows * kLanesTogether : sums;
    for (int64_t first = lane0; first < lane1; first += kLanesTogether) {
      const int64_t end = min64(lane1, first + kLanesTogether);
      const int64_t count = ceil_div(end - first, kGroupLanes) * kGroupLanes * rows;
      // body(first lane, lanes, sums) for each group.
      const auto groups = [&](float* c, const auto& body) {
        for (int64_t lane = first; lane < end; lane += kGroupLanes)
          body(lane, min64(kGroupLanes, end - lane), c + (lane - first) * rows);
      };
      __builtin_memset(totals, 0, count * sizeof(float));
      for (int64_t i = 0; i < p.rows; i += kBlock) {
        const int64_t n = min64(kBlock, p.rows - i);
        if (splits && i % kSummands == 0) __builtin_memset(sums, 0, count * sizeof(float));
        groups(sums, [&](int64_t lane, int64_t, float* c) {
          pack_lanes(p, d, i, n, lane, panel);
          // What the next panel is made of: beside this one's part, or below.
          const bool below = lane + kGroupLanes >= end;
          const int64_t next = below ? i + n : i, col = below ? first : lane + kGroupLanes;
          for (int64_t r = 0; r < rows; r += kRowsTogether) {
            prefetch_share(p, next, min64(p.rows, next + kBlock), col, min64(kGroupLanes, p.cols - col),
                           r / kRowsTogether, ceil_div(rows, kRowsTogether));
            multiply(packed_block(x, i / kBlock) + r * kStride, min64(kRowsTogether, rows - r), panel, n, kGroupTiles,
                     c + r * kGroupLanes, kGroupLanes);
          }
        });
        if (splits && ((i + n) % kSummands == 0 || i + n == p.rows))
          for (int64_t j = 0; j < count; ++j) totals[j] += sums[j];
      }
      groups(totals, [&](int64_t lane, int64_t lanes, float* c) {
        if (transposed) return store_transposed(c, kGroupLanes, rows, lanes, out, kFloat32, rows, lane, 0);
        copy_sums(c, rows, lanes, out + lane, p.cols);
      });
    }
  }

  static Arithmetic table() {
    return {kElement,
            kGroupLanes,
            kBlock,
            kStride,
            kFewRows,
            kFewRowsOfZeros,
            kLateRows,
            kHasTiles,
            packed_rows_bytes,
            panels_bytes,
            pack_rows,
            pack_rows_t,
            pack_panels_t,
            pack_panels,
            gemv,
            dots_packed,
            prefetch_first_b,
            to_steps,
            gemm,
            dense,
            dx,
            rows_times_t,
            logits,
            rows_times_panels,
            rows_times};
  }
};

void pack_pairs(const Matrix& src, uint16_t* dst, int64_t tile0, int64_t tile1) {
  alignas(64) float square[16 * 16];
  alignas(64) uint16_t columns[16 * 16];
  dst += tile0 * ceil_div(src.cols, 2) * kTile * 2;
  for (int64_t tile = tile0; tile < tile1; ++tile) {
    const int64_t row0 = tile * kTile, nrows = min64(kTile, src.rows - row0);
    for (int64_t col = 0; col < src.cols; col += 16) {
      const int64_t n = min64(16, src.cols - col);
      load_transposed(src, row0, nrows, col, n, square);
      __builtin_memset(columns, 0, sizeof(columns));
      from_float(square, reinterpret_cast<char*>(columns), kBFloat16, n * kTile);
      for (int64_t pair = 0; pair < (n + 1) / 2; ++pair)
        for (int row = 0; row < kTile; ++row, dst += 2) {
          dst[0] = columns[2 * pair * kTile + row];
          dst[1] = columns[(2 * pair + 1) * kTile + row];
        }
    }
  }
}

void segment_sums(const float* x, int64_t segment, int64_t segments, float* out) {
  for (int64_t s = 0; s < segments; ++s) {
    V::F sum = V::zero();
    for (int64_t i = 0; i < segment; i += kLanes) sum = V::add(sum, V::load(x + s * segment + i));
    out[s] = V::reduce(sum);
  }
}

// ---- quantize and dequantize, the `rows` layout ---------------------------------------------------------------------

// Nibbles of n codes (one a byte), the first in the high half; an odd last one is paired with `pad`.
inline void pack_nibbles(const uint8_t* codes, int64_t n, uint8_t pad, uint8_t* out) {
  for (int64_t i = 0; i < n / 2; ++i) out[i] = static_cast<uint8_t>(codes[2 * i] << 4 | codes[2 * i + 1]);
  if (n % 2) out[n / 2] = static_cast<uint8_t>(codes[n - 1] << 4 | pad);
}

// The quantizer's sorted codebook: 15 midpoints and the code of each rank.
struct Codebook {
  alignas(64) float midpoints[16];
  alignas(64) int32_t order[16];
  explicit Codebook(const float* table) {
    for (int i = 0; i < 16; ++i) {
      int rank = 0;  // FP4 holds 0 and -0: equal values keep their order
      for (int j = 0; j < 16; ++j) rank += table[j] < table[i] || (table[j] == table[i] && j < i);
      order[rank] = i;
    }
    for (int i = 0; i < 15; ++i) midpoints[i] = (table[order[i]] + table[order[i + 1]]) / 2;
    midpoints[15] = __builtin_inff();
  }
};

constexpr int64_t kQuantizeStrip = 4096;

void quantize(const void* src, int dtype, int64_t n, int format, int64_t blocksize, uint8_t* codes, float* scale,
              float* zero, int64_t block0, int64_t block1) {
  const Codebook book(kTables[format]);
  const typename V::Search search(book.midpoints, book.order);
  alignas(64) float values[kQuantizeStrip + 16];
  alignas(64) uint8_t out[kQuantizeStrip + 64];
  for (int64_t block = block0; block < block1; ++block) {
    const int64_t at = block * blocksize, count = min64(blocksize, n - at);
    to_float(static_cast<const char*>(src) + at * dtype_size(dtype), dtype, values, count);
    const int64_t padded = ceil_div(count, kLanes) * kLanes;
    for (int64_t i = count; i < padded; ++i) values[i] = values[count - 1];
    uint8_t pad = 0;
    if (format == kINT4) {
      V::F low = V::load(values), high = low, sum = V::zero();
      for (int64_t i = 0; i < padded; i += kLanes) {
        const V::F v = V::load(values + i);
        low = V::min(low, v);
        high = V::max(high, v);
        sum = V::add(sum, V::mul(v, V::zero()));  // NaN when any value is NaN or infinite
      }
      float lo = V::reduce_min(low), hi = V::reduce_max(high);
      const float poison = V::reduce(sum);
      if (poison != poison)  // a NaN, or an infinity whose sign min and max keep
        for (int64_t i = 0; i < count; ++i)
          if (values[i] != values[i]) lo = hi = values[i];
      const float step = (hi - lo) / 15.0f, inverse = step > 0.0f ? 1.0f / step : 0.0f;
      V::round_codes(values, padded, lo, inverse, out);
      scale[block] = step;
      zero[block] = lo;
    } else {
      V::F most = V::zero();
      bool nan = false;
      for (int64_t i = 0; i < padded; i += kLanes) {
        const V::F v = V::load(values + i);
        most = V::max(most, V::abs(v));
        nan |= V::any_nan(v);
      }
      float absmax = nan ? __builtin_nanf("") : V::reduce_max(most);
      const bool tail = count < blocksize;
      const float least = absmax < 1e-38f ? 1e-38f : absmax;
      if (tail) absmax = least;
      // bitsandbytes divides in the short last block and multiplies by the reciprocal elsewhere.
      const V::F by = V::set1(tail ? least : 1.0f / least);
      for (int64_t i = 0; i < padded; i += kLanes) {
        const V::F v = V::load(values + i);
        search.codes(tail ? V::div(v, by) : V::mul(v, by), out + i);
      }
      scale[block] = absmax;
      pad = format == kNF4 ? 7 : 0;
    }
    pack_nibbles(out, count, pad, codes + at / 2);
  }
}

void dequantize(const uint8_t* codes, const float* scale, const float* zero, int64_t n, int format, int64_t blocksize,
                void* dst, int dtype, int64_t block0, int64_t block1) {
  const V::T table = V::table(kTables[format]);
  const int size = dtype_size(dtype);
  for (int64_t block = block0; block < block1; ++block) {
    const int64_t at = block * blocksize, count = min64(blocksize, n - at);
    const V::F s = V::set1(scale[block]), z = V::set1(zero == nullptr ? 0.0f : zero[block]);
    char* out = static_cast<char*>(dst) + at * size;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      V::F v = V::mul(V::decode_bytes(table, codes + (at + i) / 2), s);
      if (zero != nullptr) v = V::add(v, z);
      with_dtype(dtype, PF_BODY(int D) { store_as<D>(out + i * size, v); });
    }
    for (; i < count; ++i) {
      const int byte = codes[(at + i) / 2];
      float v = kTables[format][i % 2 ? byte & 15 : byte >> 4] * scale[block];
      if (zero != nullptr) v += zero[block];
      from_float(&v, out + i * size, dtype, 1);
    }
  }
}

#include "elementwise.h"

#include "attention.h"

#include "prefix_attention.h"

Kernels make_kernels(const char* name) {
  Kernels kernels{};
  kernels.name = name;
  kernels.f32 = Algorithm<F32>::table();
#ifdef PF_BF16
  kernels.bf16 = Algorithm<BF16>::table();
  kernels.attention_bf16 = Attention<BF16>::table();
#endif
  kernels.attention_f32 = Attention<F32>::table();
  kernels.dots = dots;
  kernels.to_float = to_float;
  kernels.pack_pairs = pack_pairs;
  kernels.from_float = from_float;
  kernels.segment_sums = segment_sums;
  kernels.quantize = quantize;
  kernels.dequantize = dequantize;
  kernels.rms_norm = rms_norm;
  kernels.rms_norm_backward = rms_norm_backward;
  kernels.rms_norm_weight_backward = rms_norm_weight_backward;
  kernels.swiglu = swiglu;
  kernels.swiglu_backward = swiglu_backward;
  kernels.rope = rope;
  kernels.cross_entropy = cross_entropy;
  kernels.attend = attend;
  return kernels;
}
