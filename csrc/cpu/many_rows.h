// The forward pass of many rows, and the backward pass. Included by algorithm.h, after product.h.

#ifdef PF_WORDS
// Rows of bf16 as Product<Int16> multiplies them, and which of them this rounds too much.
inline void pack_words(const Matrix& src, const Weight& w, void* out, uint8_t* left_out, int64_t row0, int64_t row1) {
  using Words = Int16::Words;
  constexpr int64_t kBlock = Product<Int16>::kBlock, kStride = Product<Int16>::kStride;
  static_assert(kBlock <= 32 * Int16::kMostUnits &&
                2 * Int16::kMostUnits * sizeof(float) <= (kStride - kBlock) * sizeof(int16_t));
  const int64_t unit = Words::unit(w);
  alignas(64) float values[kBlock];
  for (int64_t r = row0; r < row1; ++r) {
    Words::Rounding rounding;
    const auto row = [&](int64_t block) { return static_cast<int16_t*>(out) + (block * src.rows + r) * kStride; };
    for (int64_t col0 = 0; col0 < src.cols; col0 += kBlock) {
      const int64_t n = min64(kBlock, src.cols - col0);
      to_float(src.row(r) + col0 * dtype_size(src.dtype), src.dtype, values, n);
      for (int64_t c = 0; c < n; c += kGroupColumns) Words::order(values + c);
      int16_t* words = row(col0 / kBlock);
      float* scales = reinterpret_cast<float*>(words + kBlock);
      for (int64_t c = 0; c < n; c += unit)
        *scales++ = Words::round(values + c, unit, words + c, rounding) / kWordSteps[w.format];
      segment_sums(values, unit, n / unit, reinterpret_cast<float*>(words + kBlock) + Int16::kMostUnits);
    }
    left_out[r] = rounding.shows();
    // Scales and sums of zero make the products of a row that is left out zero.
    for (int64_t block = 0; left_out[r] != 0 && block * kBlock < src.cols; ++block)
      __builtin_memset(row(block) + kBlock, 0, (kStride - kBlock) * sizeof(int16_t));
  }
}
#endif

template <class A>
struct ManyRows : Product<A> {
  using typename Product<A>::Ahead;
  using typename Product<A>::E;
  using typename Product<A>::Tiles;
  using Product<A>::codes_ahead;
  using Product<A>::decode_tile;
  using Product<A>::decode_transposed;
  using Product<A>::kBlock;
  using Product<A>::kColumnChunk;
  using Product<A>::kDecodingRows;
  using Product<A>::kElement;
  using Product<A>::kGroupPanel;
  using Product<A>::kLateRows;
  using Product<A>::kPanelTiles;
  using Product<A>::kHasTiles;
  using Product<A>::kStride;
  using Product<A>::kStep;
  using Product<A>::multiply;
  using Product<A>::multiply_late;
  using Product<A>::multiply_scaled;
  using Product<A>::pack_lanes;
  using Product<A>::pack_lanes_t;
  using Product<A>::pack_rows;
  using Product<A>::pack_rows_t;
  using Product<A>::packed_block;
  using Product<A>::packed_rows_bytes;

  static constexpr int64_t kSummands = 8192 / sizeof(E);  // of one float32 sum: more are a sum of such sums
  static_assert(kSummands % kBlock == 0);

  // ---- forward, many rows: decode a panel, then a dense product ----

  // The part of y that is computed together, in groups of tiles whose panel of a block stays in the first-level cache.
  struct Part {
    const GemmArgs& g;
    int64_t row0, rows, tile0, tile1;
    E* panel;
    float* c;  // [group][rows][kGroupLanes]

    // body(first tile, tiles, sums) for each group.
    template <class Body>
    void groups(const Body& body) const {
      for (int64_t t = tile0; t < tile1; t += kGroupTiles)
        body(t, min64(kGroupTiles, tile1 - t), c + (t - tile0) * kTile * rows);
    }
  };

  static int vecs_of(int64_t tiles) { return tiles == kGroupTiles ? V::kGroupVecs : kTileVecs; }

  static void gemm(const GemmArgs& g, int64_t row0, int64_t row1, int64_t tile0, int64_t tile1) {
    E* panel = static_cast<E*>(scratch(0, kGroupPanel * sizeof(E)));
    float* c = static_cast<float*>(scratch(1, kRowChunk * kPanelTiles * kTile * sizeof(float)));
    const int64_t count = ceil_div(tile1 - tile0, kPanelTiles), units = ceil_div(tile1 - tile0, kGroupTiles);
    [[maybe_unused]] const Tiles held;
    for (int64_t p = 0; p < count; ++p) {
      // Even panels, of whole groups where that is possible.
      const int64_t t0 = tile0 + units * p / count * kGroupTiles;
      const int64_t t1 = min64(tile1, tile0 + units * (p + 1) / count * kGroupTiles);
      const Part part{g, row0, row1 - row0, t0, t1, panel, c};
      start(part);
      if (g.words.data == nullptr) {
        add_base(part);
      } else {
        add_words(part);
        add_left_out(part);
      }
      add_branch(part);
      store(part);
    }
  }

  static void start(const Part& part) {
    const GemmArgs& g = part.g;
    part.groups([&](int64_t t, int64_t, float* out) {
      alignas(64) float bias[kGroupLanes] = {};
      const int64_t lanes = min64(kGroupLanes, g.w.n - t * kTile);
      if (g.bias != nullptr) copy_bytes(bias, g.bias + t * kTile, lanes * sizeof(float));
      for (int64_t r = 0; r < part.rows; ++r) {
        copy_bytes(out + r * kGroupLanes, bias, sizeof(bias));
        if (g.base.data == nullptr) continue;
        const char* from = g.base.row(part.row0 + r) + t * kTile * dtype_size(g.base.dtype);
        to_float(from, g.base.dtype, out + r * kGroupLanes, lanes);
      }
    });
  }

  // Where x does not stay in a cache that is near, the groups of a block prefetch the next one, in shares (Zen 4, 4096
  // x 4096, 512 rows of float32: 163 ms instead of 190; 1024 of bf16: 161 instead of 167).
  template <class P>
  static void ask_for_rows(const Part& part, const PackedRows& x, int64_t tile, int64_t col0, int64_t n,
                           typename P::Ahead& ahead) {
    constexpr int64_t kNear = 3 << 20, kBytes = P::kStride * sizeof(typename P::E), kLines = kBytes / 64;
    if (x.rows * ceil_div(x.cols, P::kBlock) * kBytes <= kNear) return;
    const int64_t group = (tile - part.tile0) / kGroupTiles, groups = ceil_div(part.tile1 - part.tile0, kGroupTiles);
    ahead.rows = P::packed_block(x, col0 + n < x.cols ? col0 / P::kBlock + 1 : 0) + part.row0 * P::kStride;
    ahead.line0 = kLines * group / groups;
    ahead.line1 = kLines * (group + 1) / groups;
  }

  static void add_base(const Part& part) {
    const GemmArgs& g = part.g;
    const int64_t k = g.w.k, rows = part.rows;
    const bool late = kLateRows > 0 && g.late;
    const V::F inverse = V::set1(late ? 1.0f / A::factor(g.w) : 1.0f);
    E* const panel = part.panel;
    constexpr int64_t kScaleStride = (kBlock / 32 + 1) * kTile;
    alignas(64) float scales[kGroupTiles * kScaleStride];
    for (int64_t col0 = 0; col0 < k; col0 += kBlock) {
      const int64_t n = min64(kBlock, k - col0), segments = n > g.w.segment ? g.w.segment_of(n) : 1;
      const E* x = packed_block(g.x, col0 / kBlock) + part.row0 * kStride;
      part.groups([&](int64_t t, int64_t tiles, float* out) {
        Ahead ahead = codes_ahead(g.w, t, part.tile0, part.tile1, col0, n);
        ask_for_rows<ManyRows>(part, g.x, t, col0, n, ahead);
        for (int64_t i = 0; i < tiles; ++i) {
          if (g.lora_b.data != nullptr && col0 + n == k) prefetch_b(g.lora_b, t + i);
          if (!late && kDecodingRows == 0) {
            decode_tile(g.w, t + i, col0, n, ahead.tile(i), panel, i * kTileVecs, vecs_of(tiles));
            continue;
          }
          float* own = scales + i * kScaleStride;
          const float* from = tile_scales(g.w, t + i, g.w.segment_of(col0), segments, own);
          for (int64_t v = 0; v < segments * kTile; v += kLanes)
            V::store(own + v, A::clean(V::mul(V::load(from + v), inverse)));
        }
        if constexpr (kLateRows > 0)
          if (late)
            return multiply_late(x, rows, g.w, t, tiles, col0, n, panel, {segments, scales, nullptr, kScaleStride},
                                 ahead, out, kGroupLanes);
        if constexpr (kDecodingRows > 0)
          multiply_scaled(x, rows, g.w, t, tiles, col0, n, panel, scales, kScaleStride, ahead, out, kGroupLanes);
        else
          multiply(x, rows, panel, n, tiles, out, kGroupLanes, ahead);
      });
    }
  }

  // The same of x in 16-bit integers.
  static void add_words([[maybe_unused]] const Part& part) {
#ifdef PF_WORDS
    using Words = Product<Int16>;
    const GemmArgs& g = part.g;
    const Weight& w = g.w;
    const PackedRows words{g.words.data, g.x.rows, w.k};
    const int64_t unit = Int16::Words::unit(w);
    constexpr int64_t kScaleStride = Int16::kMostUnits * kTile;
    alignas(64) float scales[kGroupTiles * kScaleStride], zeros[kGroupTiles * kScaleStride], decoded[kScaleStride];
    const bool has_zeros = w.zero != nullptr;
    for (int64_t col0 = 0; col0 < w.k; col0 += Words::kBlock) {
      const int64_t n = min64(Words::kBlock, w.k - col0), units = n / unit, seg0 = w.segment_of(col0);
      const int64_t segments = w.segment_of(col0 + n - 1) + 1 - seg0;
      const int16_t* x = Words::packed_block(words, col0 / Words::kBlock) + part.row0 * Words::kStride;
      part.groups([&](int64_t t, int64_t tiles, float* out) {
        auto ahead = Words::codes_ahead(w, t, part.tile0, part.tile1, col0, n);
        ask_for_rows<Words>(part, words, t, col0, n, ahead);
        for (int64_t i = 0; i < tiles; ++i) {
          if (g.lora_b.data != nullptr && col0 + n == w.k) prefetch_b(g.lora_b, t + i);
          const auto for_units = [&](const float* of_segments, float* out) {
            for (int64_t u = 0; u < units; ++u, out += kTile)
              copy_bytes(out, of_segments + (w.segment_of(col0 + u * unit) - seg0) * kTile, kTile * sizeof(float));
          };
          for_units(tile_scales(w, t + i, seg0, segments, decoded), scales + i * kScaleStride);
          if (has_zeros) for_units(w.zero + ((t + i) * w.segments() + seg0) * kTile, zeros + i * kScaleStride);
        }
        Words::multiply_late(x, part.rows, w, t, tiles, col0, n, reinterpret_cast<int16_t*>(part.panel),
                             {units, scales, has_zeros ? zeros : nullptr, kScaleStride}, ahead, out, kGroupLanes);
      });
    }
#endif
  }

  // The same of the rows that integers leave out.
  static void add_left_out(const Part& part) {
    const GemmArgs& g = part.g;
    if (g.words.left_out == nullptr) return;
    // body(first row, rows) for those side by side.
    const auto runs = [&](const auto& body) {
      const uint8_t* left_out = g.words.left_out + part.row0;
      for (int64_t r = 0, end; r < part.rows; r = end + 1) {
        for (end = r; end < part.rows && left_out[end] != 0;) ++end;
        if (end > r) body(r, end - r);
      }
    };
    bool any = false;
    runs([&](int64_t, int64_t) { any = true; });
    for (int64_t col0 = 0; any && col0 < g.w.k; col0 += kBlock) {
      const int64_t n = min64(kBlock, g.w.k - col0);
      const E* x = packed_block(g.x, col0 / kBlock) + part.row0 * kStride;
      part.groups([&](int64_t t, int64_t tiles, float* out) {
        const Ahead ahead = codes_ahead(g.w, t, part.tile0, part.tile1, col0, n);
        for (int64_t i = 0; i < tiles; ++i)
          decode_tile(g.w, t + i, col0, n, ahead.tile(i), part.panel, i * kTileVecs, vecs_of(tiles));
        runs([&](int64_t r, int64_t rows) {
          multiply(x + r * kStride, rows, part.panel, n, tiles, out + r * kGroupLanes, kGroupLanes);
        });
      });
    }
  }

  static void add_branch(const Part& part) {
    const GemmArgs& g = part.g;
    const int64_t rank = g.lora_b.data == nullptr ? 0 : g.lora_b.cols;
    for (int64_t col0 = 0; col0 < rank; col0 += kBlock) {
      const int64_t n = min64(kBlock, rank - col0);
      part.groups([&](int64_t t, int64_t tiles, float* out) {
        for (int64_t i = 0; i < tiles; ++i)
          pack_lanes_t(g.lora_b, (t + i) * kTile, col0, n, part.panel, i * kTileVecs, vecs_of(tiles));
        Ahead ahead;
        if (rank > kBlock) ask_for_rows<ManyRows>(part, g.s, t, col0, n, ahead);
        multiply(packed_block(g.s, col0 / kBlock) + part.row0 * kStride, part.rows, part.panel, n, tiles, out,
                 kGroupLanes, ahead);
      });
    }
  }

  static void store(const Part& part) {
    const GemmArgs& g = part.g;
    for (int64_t r = 0; r < part.rows; ++r)
      part.groups([&](int64_t t, int64_t, const float* sums) {
        char* y = static_cast<char*>(g.y) + ((part.row0 + r) * g.w.n + t * kTile) * dtype_size(g.y_dtype);
        from_float(sums + r * kGroupLanes, y, g.y_dtype, min64(kGroupLanes, g.w.n - t * kTile));
      });
  }

  // ---- backward ----

  static void dx(const DxArgs& g, int64_t row0, int64_t row1, int64_t col0, int64_t col1) {
    [[maybe_unused]] const Tiles held;
    const int64_t groups = ceil_div(g.rows, kGroupLanes), rank = g.ds == nullptr ? 0 : g.lora_a.rows;
    const int64_t g0 = row0 / kGroupLanes, ngroups = ceil_div(row1, kGroupLanes) - g0;
    E* wt = static_cast<E*>(scratch(0, kColumnChunk * kStride * sizeof(E)));
    const bool splits = (g.w.n > rank ? g.w.n : rank) > kSummands;
    float* c = static_cast<float*>(scratch(1, (splits ? 2 : 1) * kColumnChunk * kRowChunk * sizeof(float)));
    float* totals = splits ? c + kColumnChunk * kRowChunk : c;
    const auto accumulate = [&](const void* panels, int64_t block, int64_t contraction, int64_t cols) {
      const E* p = static_cast<const E*>(panels) + (block * groups + g0) * kGroupPanel;
      multiply(wt, cols, p, contraction, ngroups * kGroupTiles, c, kGroupLanes);
    };
    // body(first row, rows, sums) for each group.
    const auto each_group = [&](float* from, int64_t cols, const auto& body) {
      for (int64_t i = 0; i < ngroups; ++i) {
        const int64_t r = (g0 + i) * kGroupLanes;
        body(r, min64(kGroupLanes, g.rows - r), from + i * cols * kGroupLanes);
      }
    };
    for (int64_t k0 = col0; k0 < col1; k0 += kColumnChunk) {
      const int64_t cols = min64(kColumnChunk, col1 - k0), count = cols * ngroups * kGroupLanes;
      __builtin_memset(c, 0, count * sizeof(float));
      if (splits) __builtin_memset(totals, 0, count * sizeof(float));
      const auto add_up = [&] {
        for (int64_t j = 0; splits && j < count; ++j) {
          totals[j] += c[j];
          c[j] = 0.0f;
        }
      };
      for (int64_t r = 0; r < rank; r += kBlock) {
        const int64_t n = min64(kBlock, rank - r);
        Matrix part = g.lora_a;
        part.data = g.lora_a.row(r);
        part.rows = n;
        Matrix shifted = part;  // its columns k0.. become rows 0..
        shifted.data = static_cast<const char*>(part.data) + k0 * dtype_size(part.dtype);
        shifted.cols = cols;
        pack_rows_t(shifted, wt);
        accumulate(g.ds, r / kBlock, n, cols);
        if (g.dropout.threshold == 0 && (r + n) % kSummands == 0) add_up();
      }
      if (rank != 0 && g.dropout.threshold != 0)
        each_group(c, cols, [&](int64_t r, int64_t rows, float* sums) {
          drop_transposed(g.dropout, r, rows, k0, cols, sums, kGroupLanes);
        });
      add_up();
      for (int64_t n0 = 0; n0 < g.w.tiles() * kTile; n0 += kBlock) {
        const int64_t tile0 = n0 / kTile, tile1 = min64(g.w.tiles(), tile0 + kBlock / kTile);
        decode_transposed(g.w, tile0, tile1, k0, cols, wt);
        accumulate(g.dy, n0 / kBlock, min64((tile1 - tile0) * kTile, g.w.n - n0), cols);
        if ((n0 + kBlock) % kSummands == 0 || tile1 == g.w.tiles()) add_up();
      }
      each_group(totals, cols, [&](int64_t r, int64_t rows, const float* sums) {
        store_transposed(sums, kGroupLanes, cols, rows, g.dx, g.dx_dtype, g.cols, r, k0);
      });
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
          constexpr int kSize = dtype_size(D);
          alignas(64) float square[16 * 16];
          for (int64_t r = 0; r < rows; r += 16)
            for (int64_t i = 0, ni; i < cols; i += ni) {
              const int64_t nr = min64(16, rows - r);
              char* to = static_cast<char*>(out) + ((row0 + r) * ldout + col0 + i) * kSize;
              if constexpr (A::kStep == 2)
                if constexpr (D == kBFloat16)
                  if (nr == 16 && i + 32 <= cols) {  // in pairs: half as many squares, and whole lines
                    ni = 32;
                    alignas(64) float pairs[16 * 16];
#pragma GCC unroll 16
                    for (int p = 0; p < 16; ++p) {
                      const float* from = c + (i + 2 * p) * ldc + r;
                      V::store(pairs + p * 16, A::rounded_pairs(V::load(from), V::load(from + ldc)));
                    }
                    V::transpose16(pairs, 16, square);
                    for (int j = 0; j < 16; ++j) copy_bytes(to + j * ldout * kSize, square + j * 16, 64);
                    continue;
                  }
              ni = min64(16, cols - i);
              load_transposed(m, i, ni, r, nr, square);
              for (int64_t j = 0; j < nr; ++j)
                for (int64_t v = 0; v < ni; v += kLanes)
                  store_part<D>(to + j * ldout * kSize, v, ni, V::load(square + j * 16 + v));
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
      pack_rows(part, {}, packed, 0, n);
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
    // A share of what comes next is prefetched before each of some parts of a product: all at once it is waited for.
    // Few rows are cut along the contraction, but with tiles, where that was not measured (rank 16, 1024 rows of
    // float32, 576 to 576, Zen 4: LoRA adds 1.2 ms to a backward pass, not 1.6).
    // Of small tiles two are such a part (AVX2, a head's dx, 80 rows: 275 ms, not 357).
    constexpr int64_t kRowsTogether = V::kMicroRows < 8 ? 2 * V::kMicroRows : 32, kParts = kHasTiles ? 1 : 8;
    E* panel = static_cast<E*>(scratch(0, kGroupPanel * sizeof(E)));
    const int64_t rows = x.rows, blocks = ceil_div(rows, kRowsTogether);
    const int64_t together = blocks < kParts ? kBlock / (kParts / blocks) : kBlock;
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
          for (int64_t k = 0; k < n; k += together)
            for (int64_t r = 0; r < rows; r += kRowsTogether) {
              prefetch_share(p, next, min64(p.rows, next + kBlock), col, min64(kGroupLanes, p.cols - col),
                             k / together * blocks + r / kRowsTogether, ceil_div(n, together) * blocks);
              multiply(packed_block(x, i / kBlock) + r * kStride + k, min64(kRowsTogether, rows - r),
                       panel + k * kGroupLanes, min64(together, n - k), kGroupTiles, c + r * kGroupLanes, kGroupLanes);
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
};
