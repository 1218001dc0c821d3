// Loading and storing elements of any dtype, dropout, scales; and prefetching what is needed later.
// Included by algorithm.h, after arithmetic.h.

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
  constexpr int kSize = dtype_size(D);
  if (i + kLanes <= n) return load_as<D>(row + i * kSize);
  alignas(64) char part[kLanes * kSize] = {};
  copy_bytes(part, row + i * kSize, (n - i) * kSize);
  return load_as<D>(part);
}

template <int D>
PF_INLINE void store_part(char* row, int64_t i, int64_t n, V::F v) {
  constexpr int kSize = dtype_size(D);
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
              V::store(rows + r * 16 + v * kLanes, load_as<D>(from + r * stride + v * kLanes * dtype_size(D)));
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

// Prefetches the scales and zeros of a tile's columns [col0, col0 + n): lines that no stream leads to cost more than
// their share of the bytes (4096 x 4096, 17 rows: a tenth of the time).
inline void prefetch_scales(const Weight& w, int64_t tile, int64_t col0, int64_t n) {
  const int64_t first = (tile * w.segments() + w.segment_of(col0)) * kTile;
  const int64_t end = first + (w.segment_of(n - 1) + 1) * kTile;
  const float* const held[] = {w.scale, w.zero};
  for (const float* values : held)
    for (int64_t i = first; values != nullptr && i < end; i += kTile) __builtin_prefetch(values + i);
  for (int64_t i = first; w.scale8 != nullptr && i < end; i += 4 * kTile) __builtin_prefetch(w.scale8 + i);
}

// Prefetches share `i` of `shares` of a part of m, which is used later: all of it at once would have to be waited for.
inline void prefetch_share(const Matrix& m, int64_t row0, int64_t row1, int64_t col0, int64_t cols, int64_t i,
                           int64_t shares) {
  const int64_t size = dtype_size(m.dtype), count = row1 - row0;
  for (int64_t r = row0 + count * i / shares; r < row0 + count * (i + 1) / shares; ++r)
    for (int64_t byte = 0; byte < cols * size; byte += 64) prefetch_stream(m.row(r) + col0 * size + byte);
}

// Lines of a tile's B: where it is not packed, of each row the first.
inline int64_t b_lines(const Matrix& b) { return b.packed ? b.cols * kTile * 2 / 64 : kTile; }

// Prefetches some of them: all at once would hold up the codes.
inline void prefetch_b_lines(const Matrix& b, int64_t tile, int64_t line0, int64_t lines) {
  if (b.data == nullptr) return;
  const int64_t end = b.packed ? b_lines(b) : min64(kTile, b.rows - tile * kTile);
  const char* at = b.packed ? reinterpret_cast<const char*>(b.pairs(tile, 0)) : b.row(tile * kTile);
  const int64_t step = b.packed ? 64 : b.row(1) - b.row(0);
  for (int64_t i = line0; i < min64(line0 + lines, end); ++i) prefetch_stream(at + i * step);
}

// Prefetches a tile's B into the second-level cache: it is read tiles later.
inline void prefetch_b(const Matrix& b, int64_t tile) {
  if (b.packed) {
    const char* pairs = reinterpret_cast<const char*>(b.pairs(tile, 0));
    for (int64_t i = 0; i < b.cols * kTile * 2; i += 64) __builtin_prefetch(pairs + i, 0, 2);
  } else {
    for (int64_t row = tile * kTile; row < min64((tile + 1) * kTile, b.rows); ++row)
      __builtin_prefetch(b.row(row), 0, 2);
  }
}

inline void prefetch_first_b(const Matrix& b, int64_t tile0) {
  for (int64_t tile = tile0; tile < min64(tile0 + kTilesAhead, ceil_div(b.rows, kTile)); ++tile) prefetch_b(b, tile);
}
