// Products of PackedRows with panels. Included by algorithm.h, after panels.h.

template <class A>
struct Product : Panels<A> {
  using typename Panels<A>::Ahead;
  using typename Panels<A>::E;
  using typename Panels<A>::F;
  using typename Panels<A>::Tiles;
  using Panels<A>::decode_codes;
  using Panels<A>::kBlock;
  using Panels<A>::kGroupPanel;
  using Panels<A>::kHasTiles;
  using Panels<A>::kStep;
  using Panels<A>::kStride;

  // Up to here decoding in registers is faster (AVX2 does so anew for every two rows: 16 of 4096 x 4096 would take 1.8
  // times as long as with panels); then, up to kLateRows, scales cost less on the sums than on every decoded weight,
  // which zeros do not allow (Zen 4, 4096 x 4096, 17 rows: 0.95 of the time, 48 the same, 512 1.03).
  // Sums to be scaled leave registers for twelve more, no more than are under way where two bf16 products start in a
  // cycle (Zen 5, 64 rows: 423 GFLOP/s, with scales on the weights 479).
  static constexpr int64_t kFewRows = kHasTiles ? 4 : V::kFewRows, kFewRowsOfZeros = kHasTiles ? 8 : V::kFewRows;
#ifdef PF_BF16X2
  static constexpr int64_t kLateRows = 0;
#else
  static constexpr int64_t kLateRows = kHasTiles ? 32 : kStep == 2 ? 48 : 0;
#endif
  static constexpr int kDecodingRows = kHasTiles ? 0 : V::kDecodingRows;

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

  // What multiplies the sums of each segment, `of` [tiles][segments and room][16], and what is added to all its
  // weights, or null. From one tile to the next it is `stride` floats.
  struct Scales {
    int64_t segments;
    const float *of, *zeros;
    int64_t stride;
  };

  // The same where scales multiply the sums of each segment. Both kinds of sums stay in registers, for half as many
  // rows: keeping those of all segments in memory cost 6 % of the speed, and passing Scales as they are 8 %, by the
  // registers that GCC then spills.
  template <int MR, int NV, class Source>
  static void micro_late(const E* x, Source source, int64_t groups, int64_t segments, const float* scales,
                         const float* zeros, int64_t tile_stride, float* c, int64_t ldc) {
    constexpr MakeInts<MR> rows{};
    constexpr MakeInts<NV> vecs{};
    const E* const end_of_row = x + kBlock;
    F sums[MR][NV];
    each(rows, PF_BODY(int R) { each(vecs, PF_BODY(int U) { sums[R][U] = V::load(c + R * ldc + U * kLanes); }); });
    for (int64_t segment = 0; segment < segments; ++segment, scales += kTile) {
      typename A::Sum acc[MR][NV];
      each(rows, PF_BODY(int R) { each(vecs, PF_BODY(int U) { acc[R][U] = A::zero(); }); });
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
            each(
                rows, PF_BODY(int R) {
                  const F value = A::value(acc[R][U], end_of_row + R * kStride, segment);
                  sums[R][U] = V::fma(value, scale, sums[R][U]);
                });
            if constexpr (A::kTakesZeros)
              if (zeros != nullptr) {
                const int64_t at = U / kTileVecs * tile_stride + segment * kTile + U % kTileVecs * kLanes;
                const F zero = V::load(zeros + at);
                each(
                    rows, PF_BODY(int R) {
                      const F sum = A::sum_of_x(end_of_row + R * kStride, segment);
                      sums[R][U] = V::fma(sum, zero, sums[R][U]);
                    });
              }
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
    const float* zeros = kHasZero ? w.zero + tile * zero_stride + w.segment_of(col0) * kTile : nullptr;
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
            Panels<A>::template scaled<kHasZero, S>(table, held[U], scale[U], zero[U], columns);
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

  template <int NV>
  static auto pick_micro(int rows) {
    return pick(rows, []<int R>() { return &micro<R, NV>; }, MakeInts<V::kMicroRows>{});
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
        const auto kernel = tiles - t >= kGroupTiles ? pick_micro<V::kGroupVecs>(n) : pick_micro<kTileVecs>(n);
        kernel(x + r0 * kStride, panels, steps, c + r0 * ldc, ldc);
        ahead.next_rows(r0, n);
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
  // sums. The rows after the first find the decoded columns in `panel`.
  static void multiply_late(const E* x, int64_t rows, const Weight& w, int64_t tile, int64_t tiles, int64_t col0,
                            int64_t n, E* panel, Scales scales, Ahead ahead, float* c, int64_t ldc) {
    if constexpr (kHasTiles) {
      const int64_t steps = n / Tiles::kColumns / scales.segments;
      for (int64_t i = 0; i < tiles; ++i)
        decode_codes(w, tile + i, col0, n, ahead.tile(i), panel, i * kTileVecs, tiles * kTileVecs);
      const auto add =
          tiles == kGroupTiles ? Tiles::template add_scaled<kGroupTiles, Ahead> : Tiles::template add_scaled<1, Ahead>;
      for (int64_t r = 0; r < rows; r += Tiles::kRows)
        add(x + r * kStride, kStride, min64(Tiles::kRows, rows - r), panel, steps, scales.segments, scales.of,
            scales.stride, ahead, c + r * ldc, ldc);
    } else {
      const auto with = [&]<int NV>() {
        constexpr int64_t kPanelGroup = NV * kLanes * kGroupColumns;
        const int64_t groups = n / kGroupColumns / scales.segments;
        Codes codes{A::table(w), {}, panel - kPanelGroup, ahead, {}};
        for (int64_t i = 0; i < tiles; ++i) codes.codes[i] = w.codes + ((tile + i) * w.k + col0) * (kTile / 2);
        const auto body = [&](int64_t r, int m) {
          const E* from = x + r * kStride;
          float* to = c + r * ldc;
          const auto add = [&]<class Source>(const Source& source) {
            pick(
                m, []<int R>() { return &micro_late<R, NV, Source>; }, MakeInts<kLateMicroRows>{})(
                from, source, groups, scales.segments, scales.of, scales.zeros, scales.stride, to, ldc);
          };
          if (r == 0)
            add(codes);
          else
            add(Panel{panel - kPanelGroup});
          ahead.next_rows(r, m);
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
      const auto decoding =
          pick(first, []<int R>() { return &micro_decoding<R, NV, kHasZero>; }, MakeInts<kDecodingRows>{});
      decoding(x, w, tile, col0, n, panel, scales, tile_stride, ahead, c, ldc);
      ahead.next_rows(0, first);
      row_blocks(rows - first, [&](int64_t r, int m) {
        r += first;
        pick_micro<NV>(m)(x + r * kStride, panel, n / kStep, c + r * ldc, ldc);
        ahead.next_rows(r, m);
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
};
