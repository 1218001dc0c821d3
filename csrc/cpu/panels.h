// What a product reads, made of matrices and of 4-bit weights: a broadcast side (PackedRows) and a vector side
// (panels).
//   PackedRows  [block][row][kStride]            kBlock columns a block, row stride padded by 64 bytes
//   panels      [block][group][step][vector][..] kGroupVecs vectors of lanes a group, kStep of the contraction a lane

template <class A>
struct Panels {
  using E = typename A::Elem;
  using F = V::F;
  static constexpr int kStep = A::kStep;
  // Sums are read and written once a block. Of fewer lanes they are more beside the products that are added: longer
  // blocks pay (AVX2, float32, 512 rows, 576 to 1536: 86 GFLOP/s, not 82).
  static constexpr int kBlock = sizeof(E) == sizeof(float) ? V::kFloatBlock : 256;
  static constexpr int kStride = kBlock + 64 / sizeof(E);
  static constexpr int64_t kGroupPanel = static_cast<int64_t>(kBlock) * kGroupLanes;  // elements of one group's block
  using Tiles = typename A::Tiles;
  static constexpr bool kHasTiles = Tiles::kRows > 1;
  // Outputs that share a block of x, or of dy, while it is in the second-level cache, in tiles of a forward and columns
  // of a backward pass. Instructions on tiles are so fast that fetching the block anew shows (4096 x 4096, 512 rows, a
  // quarter of them: 1.3 times the time).
  static constexpr int kPanelTiles = kHasTiles ? 32 : 8;
  static constexpr int64_t kColumnChunk = kPanelTiles * kTile;

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

  static void pack_rows(const Matrix& src, const Dropout& d, void* out, int64_t row0, int64_t row1) {
    const bool same = src.dtype == kElement && d.threshold == 0;
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
        apply_dropout(d, r, col0, n, values);
        store_packed_row(values, n, dst);
      }
  }

  static void pack_rows_t(const Matrix& src, void* out) {
    alignas(64) float square[16 * 16];
    for (int64_t r = 0; r < src.rows; r += 16) {
      const int64_t nr = min64(16, src.rows - r), block = r / kBlock;
      for (int64_t c = 0; c < src.cols; c += 16) {
        const int64_t nc = min64(16, src.cols - c);
        load_transposed(src, r, nr, c, nc, square);
        for (int64_t i = 0; i < nc; ++i) {
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

  // What comes next, prefetched while a block is worked on: decoding alone takes less time than it needs to arrive.
  struct Ahead {
    const uint8_t* codes = nullptr;
    int64_t tile_stride = 0;
    int64_t steps = 0;  // of the product that ask, for every second line of kGroupTiles tiles; decoding asks for others
    const E* rows = nullptr;       // of x, in the next block
    int64_t line0 = 0, line1 = 0;  // of each of them, that this group asks for

    // After the product of rows [r0, r0 + n).
    void next_rows(int64_t r0, int64_t n) const {
      if (rows == nullptr) return;
      for (int64_t r = r0; r < r0 + n; ++r)
        for (int64_t line = line0; line < line1; ++line)
          __builtin_prefetch(reinterpret_cast<const char*>(rows + r * kStride) + line * 64, 0, 2);
    }
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

  // Columns [col0, col0 + n) of a tile of rows as a panel of its own: where it lies, or made in `out`.
  static const E* tile_panel(const Matrix& m, int64_t tile, int64_t col0, int64_t n, E* out) {
    if constexpr (kStep == 2)
      if (m.packed) return m.pairs(tile, col0);
    pack_lanes_t(m, tile * kTile, col0, n, out, 0, kTileVecs);
    return out;
  }

  // ---- decoding ----

  // Columns [col0, col0 + n) of a tile, code values without scales, into vectors vec.. of a panel of `vecs` vectors.
  static void decode_codes(const Weight& w, int64_t tile, int64_t col0, int64_t n, Ahead ahead, E* panel, int vec,
                           int vecs) {
    const typename A::Table table = A::table(w);
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
    const int64_t seg0 = w.segment_of(col0), segs = w.segment_of(col0 + n - 1) - seg0 + 1;
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
    const int64_t seg0 = w.segment_of(col0), segs = w.segment_of(col0 + n - 1) - seg0 + 1;
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
        const int64_t s = w.segment_of(col0 + c0) - seg0, end = min64(n, (seg0 + s + 1) * w.segment - col0);
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
