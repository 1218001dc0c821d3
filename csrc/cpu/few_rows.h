// The forward pass of few rows. Included by algorithm.h, after product.h.

// ---- few rows of x times A ------------------------------------------------------------------------------------------

template <int D, int MB, int RB>
void dot_block(const float* x, int64_t ldx, const Matrix& a, int64_t r0, float* s) {
  constexpr int kSize = dtype_size(D);
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

void segment_sums(const float* x, int64_t segment, int64_t segments, float* out) {
  for (int64_t s = 0; s < segments; ++s) {
    V::F sum = V::zero();
    for (int64_t i = 0; i < segment; i += kLanes) sum = V::add(sum, V::load(x + s * segment + i));
    out[s] = V::reduce(sum);
  }
}

template <class A>
struct FewRows : Product<A> {
  using typename Product<A>::E;
  using typename Product<A>::F;
  using typename Product<A>::Tiles;
  using Product<A>::kBlock;
  using Product<A>::kFewRows;
  using Product<A>::kGroupPanel;
  using Product<A>::kHasTiles;
  using Product<A>::kStep;
  using Product<A>::multiply;
  using Product<A>::pack_lanes_t;
  using Product<A>::packed_block;
  using Product<A>::row_blocks;

  // ---- forward, few rows: decode in registers ----

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
  // matrix that is read once or twice, what lies kCodesAhead further is prefetched, up to `end` and then from `next`
  // on.
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
  // other. An instruction set may have others (Floats, and Words for x that is bf16: byte_planes.h, avx512.h):
  // `weights<S>` times `operand<S>` adds to the sum S % parts, `join` makes the rows of these sums, times the scale of
  // x where `arrange` gave it one every `unit` columns.
  struct Lanes {
    using Elem = E;
    using Sum = F;
    using Table = typename A::Table;
    static constexpr int kUnits = kGroupColumns / kStep;
    static constexpr int kMostRows = V::kGemvRows;
    static constexpr int parts(int rows) { return V::gemv_parts(rows); }
    static int64_t unit(const Weight& w) { return w.segment; }
    static Table table(const Weight& w) { return A::table(w); }
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
    const char *b_ahead, *b_ahead_end;  // what is prefetched of it, b_lines every segment
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
    const float factor = A::factor(g.w);
    F acc[MB][kTileVecs];  // times the factor
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
            each(rows, PF_BODY(int M) { acc[M][U] = V::mul(sum<kChains>(part[M]), V::set1(factor)); });
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
          each(vecs, PF_BODY(int U) { V::store(out + U * kLanes, V::mul(acc[M][U], V::set1(1.0f / factor))); });
          if (g.bias != nullptr)
            for (int64_t i = 0; i < lanes; ++i) out[i] += g.bias[n0 + i];
          from_float(out, static_cast<char*>(g.y) + ((row0 + M) * g.w.n + n0) * dtype_size(g.y_dtype), g.y_dtype,
                     lanes);
        });
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
      const auto rows = [&](int64_t m, int n) {
        pick(n, []<int R>() { return &gemv_rows<D, R>; }, MakeInts<D::kMostRows>{})(g, t, m);
      };
      row_blocks(g.rows, rows, D::kMostRows);
    }
  }

  template <class Vocabulary>
  static void gemv_of(const GemvArgs& g, int64_t tile0, int64_t tile1) {
    const auto by = [&]<class D>(const D&, const GemvArgs& args) {
      const FewColumns<typename D::Elem> x = D::arrange(args);
      gemv_with<D>(args, x, tile0, tile1);
      return x.left_out;
    };
    const auto exactly = [&](const GemvArgs& args) {
      if constexpr (requires { typename Vocabulary::Floats; })
        by(typename Vocabulary::Floats{}, args);
      else
        by(Lanes{}, args);
    };
    if constexpr (requires { typename Vocabulary::Words; } && kStep == 1)
      if (g.x_dtype == kBFloat16) {
        const uint32_t left_out = by(typename Vocabulary::Words{}, g);
        for (int64_t r = 0; r < g.rows; ++r)
          if (left_out >> r & 1) exactly(row_of(g, r));
        return;
      }
    exactly(g);
  }
  static void gemv(const GemvArgs& g, int64_t tile0, int64_t tile1) { gemv_of<V>(g, tile0, tile1); }

  static GemvArgs row_of(const GemvArgs& g, int64_t r) {
    GemvArgs row = g;
    row.x = static_cast<const E*>(g.x) + r * g.ldx;
    row.rows = 1;
    if (g.xsum != nullptr) row.xsum = g.xsum + r * g.w.segments();
    if (g.s != nullptr) row.s = static_cast<const E*>(g.s) + r * steps_ld(g.lora_b.cols);
    row.y = static_cast<char*>(g.y) + r * g.w.n * dtype_size(g.y_dtype);
    return row;
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
        constexpr auto first = []<int M>() { return &pair_dots<M, false>; };
        constexpr auto again = []<int M>() { return &pair_dots<M, true>; };
        const int64_t left = g.x.rows - m, n = left >= 8 ? 8 : min64(left, 4);
        const auto dots = n == 8   ? &pair_dots<8, false>
                          : m == 0 ? pick(n, first, MakeInts<4>{})
                                   : pick(n, again, MakeInts<4>{});
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
        Product<A>::template multiply_tiles<1>(reinterpret_cast<const E*>(g.w.row(n0)), g.w.ld, done, panel, g.w.cols,
                                               {}, sums, kTile);
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
};
