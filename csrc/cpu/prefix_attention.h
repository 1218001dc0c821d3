// Attention with a prefix, both directions, over the vocabulary `V`. Included by algorithm.h, after elementwise.h.
//
// A unit works for the heads that share one head of keys in one batch row: its rows are queries, [token][head of the
// group]. Rows are the lanes of all vectors, kGroupLanes a group, and keys are broadcast, so that a running maximum or
// sum is a vector and nothing is reduced across lanes:
//
//   scores [key][row] = K [key][dim] · Q        (Q as a panel: dim runs over steps)
//   out    [dim][row] = Vᵀ [dim][key] · P       (P as a panel: keys run over steps)
//
// A row's keys are its prefix and then the tokens', in tiles of kTileKeys; which of a tile's keys a group sees is a
// range, so that a triangle costs what it holds. Probabilities are 2^(s - max): scores carry scale · log2(e).

PF_INLINE V::F negative(V::F v) { return V::mul(v, V::set1(-1.0f)); }

// 2^x for x <= 0 or little more, to the precision of the arithmetic; 0 below -126, NaN stays.
template <int kStep>
PF_INLINE V::F exp2(V::F x) {
  x = V::max(V::set1(-127.0f), x);                       // second operand: where a NaN passes
  const V::F shifted = V::add(x, V::set1(12582912.0f));  // + 1.5 * 2^23 rounds to an integer
  const V::F r = V::add(x, negative(V::add(shifted, V::set1(-12582912.0f))));
  V::F p;
  if constexpr (kStep == 1) {  // 8e-8 relative
    p = V::fma(V::set1(1.3276471e-3f), r, V::set1(9.675542e-3f));
    p = V::fma(p, r, V::set1(5.550713e-2f));
    p = V::fma(p, r, V::set1(2.402212e-1f));
    p = V::fma(p, r, V::set1(6.9314694e-1f));
    p = V::fma(p, r, V::set1(1.0000001f));
  } else {  // 3e-6, to be rounded to bf16
    p = V::fma(V::set1(9.570101e-3f), r, V::set1(5.5917863e-2f));
    p = V::fma(p, r, V::set1(2.4024744e-1f));
    p = V::fma(p, r, V::set1(6.931218e-1f));
    p = V::fma(p, r, V::set1(9.999993e-1f));
  }
  return V::mul(p, V::pow2(shifted));
}

template <class A>
struct Attention {
  using E = typename A::Elem;
  using F = V::F;
  static constexpr int kStep = A::kStep, kVecs = V::kGroupVecs;
  static constexpr int64_t kTileKeys = 96;
  static constexpr int64_t kQueryRows = 192;  // of a unit of the forward pass
  static constexpr int64_t kSuper = 4;        // groups whose rows are contracted at once in the backward pass
  static constexpr int64_t kRow = kMostHeadSize + 64 / sizeof(E);  // elements between rows to broadcast from
  static constexpr int64_t kPanelStep = kGroupLanes * kStep;
  static constexpr bool kTiles = Product<A>::kHasTiles;
  static_assert(!kTiles || (kRow == Product<A>::kStride && kTileKeys % (2 * A::Tiles::kRows) == 0));
  static constexpr float kLeast = -3e38f;  // a running maximum of nothing: finite, so that differences are
  static_assert(kGroupLanes % (16 * kStep) == 0 && kTileKeys % kStep == 0 && kTileKeys >= kGroupLanes &&
                kSuper * kGroupLanes <= 256);

  static int64_t padded(int64_t dim) { return ceil_div(dim, kGroupLanes) * kGroupLanes; }
  // Of a group's sums, float32 [dim][lane], which are transposed by sixteens.
  static int64_t sums_size(int64_t dim) { return ceil_div(dim, 16) * 16 * kGroupLanes; }

  // ---- packing ----

  // n rows as elements of the arithmetic, zeros up to padded(dim); at(r) is null for a row of zeros.
  template <class At>
  static void gather(const At& at, int64_t n, int dtype, int64_t dim, E* dst, int64_t ld) {
    const int64_t wide = padded(dim);
    const bool same = dtype == Product<A>::kElement;
    for (int64_t r = 0; r < n; ++r, dst += ld) {
      const char* row = at(r);
      char* to = reinterpret_cast<char*>(dst);
      if (row == nullptr) {
        __builtin_memset(to, 0, wide * sizeof(E));
      } else if (same) {
        const int64_t bytes = dim * sizeof(E);
        int64_t i = 0;
        for (; i + 64 <= bytes; i += 64) copy_bytes(to + i, row + i, 64);
        if (i < bytes) copy_bytes(to + i, row + i, bytes - i);
        if (dim < wide) __builtin_memset(to + bytes, 0, (wide - dim) * sizeof(E));
      } else {
        with_dtype(
            dtype, PF_BODY(int D) {
              int64_t i = 0;
              for (; i < dim; i += kLanes) A::store_row(dst + i, load_part<D>(row, i, dim));
              if (i < wide) __builtin_memset(to + i * sizeof(E), 0, (wide - i) * sizeof(E));
            });
      }
    }
  }

  // kGroupLanes gathered rows as the lanes of a panel whose steps run over dim.
  static void pack_lanes(const E* rows, int64_t dim, E* panel) {
    const int64_t words = padded(dim) / kStep;
    const float* from = reinterpret_cast<const float*>(rows);  // a step is a word, whatever it holds
    for (int64_t lane = 0; lane < kGroupLanes; lane += 16)
      for (int64_t step = 0; step * kStep < dim; step += 16)
        steps_to_lanes(from + lane * words + step, words, reinterpret_cast<float*>(panel + step * kPanelStep) + lane,
                       kPanelStep * sizeof(E) / sizeof(float));
  }

  // n gathered rows as steps, lanes running over dim: [group of lanes, `group` apart][step, `step` apart][lane].
  static void pack_steps(const E* rows, int64_t ld, int64_t n, int64_t dim, E* dst, int64_t group, int64_t step) {
    for (int64_t r = 0; r < n; r += kStep, dst += step)
      for (int64_t i = 0; i < dim; i += kGroupLanes)
        if constexpr (kStep == 2)
          A::interleave(rows + r * ld + i, rows + (r + 1) * ld + i, dst + i / kGroupLanes * group);
        else
          copy_bytes(dst + i / kGroupLanes * group, rows + r * ld + i, kGroupLanes * sizeof(E));
  }

  // Of gathered keys, the matrix [dim][key] whose product with weights sums over keys: keys as steps; for instructions
  // on tiles, rows of dim with keys side by side, kRow apart. `column(packed, j)` is where key j begins.
  static void pack_columns(const E* rows, int64_t ld, int64_t n, int64_t dim, E* dst) {
    if constexpr (kTiles) {
      constexpr int64_t kKeys = 32;
      alignas(64) E pairs[kKeys / 2][2 * kGroupLanes];
      alignas(64) float square[16 * 16];  // words: pairs of keys
      for (int64_t j = 0; j < n; j += kKeys, rows += kKeys * ld, dst += kKeys)
        for (int64_t d = 0; d < dim; d += kGroupLanes) {
          for (int64_t p = 0; p < kKeys / 2; ++p)
            A::interleave(rows + 2 * p * ld + d, rows + (2 * p + 1) * ld + d, pairs[p]);
          for (int64_t half = 0; half < kGroupLanes; half += 16) {
            V::transpose16(reinterpret_cast<const float*>(pairs[0]) + half, kGroupLanes, square);
            for (int64_t i = 0; i < 16; ++i) copy_bytes(dst + (d + half + i) * kRow, square + i * 16, 64);
          }
        }
    } else {
      pack_steps(rows, ld, n, dim, dst, kPanelStep, padded(dim) * kStep);
    }
  }
  static int64_t columns_size(int64_t dim) { return padded(dim) * (kTiles ? kRow : kTileKeys); }
  template <class Elem>
  static Elem* column(Elem* packed, int64_t j, int64_t dim) {
    return packed + (kTiles ? j : j * padded(dim));
  }

  // ---- products ----

  // c[r][lane] = sum over steps of x[r] * panel: times *factor (kNew), or added to c, times factor[lane] if there is
  // one.
  template <int MR, int64_t kStride, bool kNew>
  static void micro(const E* x, int64_t x_step, const E* panel, int64_t steps, float* c, int64_t ldc,
                    const float* factor) {
    F acc[MR][kVecs];
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[r][v] = kNew ? V::zero() : V::load(c + r * ldc + v * kLanes);
    if (!kNew && factor != nullptr)
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) acc[r][v] = V::mul(acc[r][v], V::load(factor + v * kLanes));
    for (int64_t s = 0; s < steps; ++s, x += x_step, panel += kPanelStep) {
      typename A::W w[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) w[v] = A::load(panel + v * kLanes * kStep);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        const typename A::X xb = A::broadcast(x + r * kStride);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) acc[r][v] = A::fma(acc[r][v], w[v], xb);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v)
        V::store(c + r * ldc + v * kLanes, kNew ? V::mul(acc[r][v], V::set1(*factor)) : acc[r][v]);
  }

  template <int64_t kStride, bool kNew>
  static void multiply(const E* x, int64_t x_step, int64_t rows, const E* panel, int64_t steps, float* c, int64_t ldc,
                       const float* factor) {
    if constexpr (kTiles) {
      const auto times = [&](const auto& by) {
        for (int64_t r = 0; r < rows; ++r)
          for (int v = 0; v < kVecs; ++v) {
            float* at = c + r * ldc + v * kLanes;
            V::store(at, V::mul(V::load(at), by(v)));
          }
      };
      if (kNew) __builtin_memset(c, 0, rows * ldc * sizeof(float));
      if (!kNew && factor != nullptr) times([&](int v) { return V::load(factor + v * kLanes); });
      Product<A>::template multiply_tiles<kGroupTiles>(x, kStride, rows, panel, steps * kStep, {}, c, ldc);
      if (kNew && *factor != 1.0f) times([&](int) { return V::set1(*factor); });
    } else {
      Product<A>::row_blocks(rows, [&](int64_t r0, int n) {
        pick(
            n, []<int R>() { return &micro<R, kStride, kNew>; }, MakeInts<V::kMicroRows>{})(
            x + r0 * kStride, x_step, panel, steps, c + r0 * ldc, ldc, factor);
      });
    }
  }

  // c [dim][lane] = c * factor, if there is one, + columns * panel, over n keys.
  static void multiply_columns(const E* columns, int64_t dim, const E* panel, int64_t n, float* c,
                               const float* factor) {
    if constexpr (kTiles)
      multiply<kRow, false>(columns, kStep, dim, panel, n / kStep, c, kGroupLanes, factor);
    else
      multiply<kStep, false>(columns, padded(dim) * kStep, dim, panel, n / kStep, c, kGroupLanes, factor);
  }

  // ---- which keys there are, and who sees them ----

  struct Unit {
    const AttentionArgs& g;
    int64_t b, kv_head, group, rows, slot, prefix, keys;
    float first = 0.0f;  // the place of the first visible key

    Unit(const AttentionArgs& g, int64_t b, int64_t kv_head)
        : g(g),
          b(b),
          kv_head(kv_head),
          group(g.heads / g.kv_heads),
          rows(g.tokens * group),
          slot(g.prefix_slot(b)),
          prefix(g.prefix_keys(slot)),
          keys(prefix + g.length) {
      for (int64_t s = 0; s < g.length && prefix > 0; ++s)
        if (place(s) <= kShown) {
          first = place(s);
          break;
        }
    }

    float place(int64_t s) const {
      return static_cast<float>(g.positions == nullptr ? s - (g.length - g.tokens) : g.positions[b * g.length + s]);
    }
    // Of key j, compared with the upper and the lower bound. A prefix lies before everything, whatever its place is for
    // a window.
    float above(int64_t j) const { return j < prefix ? kLeast : place(j - prefix); }
    float below(int64_t j) const { return j < prefix ? first - static_cast<float>(prefix - j) : place(j - prefix); }
    // Row r of a tensor [batch, heads, tokens, dim] of queries.
    const char* query(const void* base, const int64_t* strides, int64_t r) const {
      return static_cast<const char*>(base) +
             (b * strides[0] + (kv_head * group + r % group) * strides[1] + r / group * strides[2]) *
                 dtype_size(g.dtype);
    }
    const char* key(const void* tokens, const int64_t* strides, const void* of_prefix, const int64_t* prefix_strides,
                    int64_t j) const {
      const int size = dtype_size(g.dtype);
      if (j < prefix)
        return static_cast<const char*>(of_prefix) +
               (slot * prefix_strides[0] + kv_head * prefix_strides[1] + j * prefix_strides[2]) * size;
      return static_cast<const char*>(tokens) +
             (b * strides[0] + kv_head * strides[1] + (j - prefix) * strides[2]) * size;
    }
  };

  static constexpr float kShown = kHiddenKey / 2 - 32;  // the last place that is shown, of those that float32 has

  // The bounds of rows [r0, r0 + n): a key is seen whose place is at most `upper` and more than `lower`.
  struct Bounds {
    float upper_most, upper_least, lower_most, lower_least;
    void set(const Unit& u, int64_t r0, int64_t n) {
      const float first = static_cast<float>(r0 / u.group), last = static_cast<float>((r0 + n - 1) / u.group);
      const float window = static_cast<float>(u.g.window);
      upper_least = u.g.causal ? first : kShown;
      upper_most = u.g.causal ? last : kShown;
      lower_least = u.g.window > 0 ? first - window : kLeast;
      lower_most = u.g.window > 0 ? last - window : kLeast;
    }
    // Whether none of the rows sees any of the keys [j0, j0 + n), as far as two of them tell: where places are in
    // order.
    bool miss(const Unit& u, int64_t j0, int64_t n) const {
      return u.g.positions == nullptr && (u.above(j0) > upper_most || u.below(j0 + n - 1) <= lower_least);
    }
  };

  // The same by lane, rows from `end` on as the last one.
  static void lane_bounds(const Unit& u, int64_t r0, int64_t end, float* upper, float* lower) {
    for (int64_t i = 0; i < kGroupLanes; ++i) {
      const float token = static_cast<float>(min64(r0 + i, end - 1) / u.group);
      upper[i] = u.g.causal ? token : kShown;
      lower[i] = u.g.window > 0 ? token - static_cast<float>(u.g.window) : kLeast;
    }
  }

  // The places of a tile's keys.
  struct Places {
    alignas(64) float above[kTileKeys], below[kTileKeys];

    void set(const Unit& u, int64_t j0, int64_t n) {
      for (int64_t i = 0; i < kTileKeys; ++i) {
        above[i] = i < n ? u.above(j0 + i) : -kLeast;
        below[i] = i < n ? u.below(j0 + i) : -kLeast;
      }
    }
    bool seen(int64_t i, const Bounds& by) const { return above[i] <= by.upper_most && below[i] > by.lower_least; }
    // Keys [lo, hi) that any of the rows sees, in whole steps.
    void range(const Bounds& by, int64_t& lo, int64_t& hi) const {
      while (lo < hi && !seen(lo, by)) ++lo;
      while (hi > lo && !seen(hi - 1, by)) --hi;
      lo = lo / kStep * kStep;
      hi = ceil_div(hi, kStep) * kStep;
    }
    bool all_seen(int64_t lo, int64_t hi, const Bounds& by) const {
      bool all = true;
      for (int64_t i = lo; i < hi; ++i) all &= above[i] <= by.upper_least && below[i] > by.lower_most;
      return all;
    }
    // The scores of key i with lanes from v * kLanes on, -infinity where it is not seen.
    F masked(F score, int64_t i, const float* upper, const float* lower, bool window) const {
      const F low = V::set1(-__builtin_inff());
      score = V::where_le(V::set1(above[i]), V::load(upper), score, low);
      return window ? V::where_le(V::set1(below[i]), V::load(lower), low, score) : score;
    }
  };

  // [dim][lane] of one group to the rows of a tensor of queries, times `scale`.
  static void store_rows(const Unit& u, const float* columns, int64_t r0, int64_t end, float scale, void* out,
                         const int64_t* strides) {
    alignas(64) float square[16 * 16];
    const int64_t dim = u.g.dim;
    const int size = dtype_size(u.g.dtype);
    const F by = V::set1(scale);
    for (int64_t d = 0; d < dim; d += 16)
      for (int64_t lane = 0; lane < min64(kGroupLanes, end - r0); lane += 16) {
        V::transpose16(columns + d * kGroupLanes + lane, kGroupLanes, square);
        for (int i = 0; i < 16 * 16; i += kLanes) V::store(square + i, V::mul(V::load(square + i), by));
        for (int64_t i = 0; i < min64(16, end - r0 - lane); ++i)
          from_float(square + i * 16, const_cast<char*>(u.query(out, strides, r0 + lane + i)) + d * size, u.g.dtype,
                     min64(16, dim - d));
      }
  }

  // ---- forward ----

  static int64_t forward_blocks(const AttentionArgs& g) {
    return ceil_div(g.tokens * (g.heads / g.kv_heads), kQueryRows);
  }

  static void forward(const AttentionArgs& g, int64_t unit) {
    [[maybe_unused]] const typename A::Tiles held;
    const int64_t heads = g.batch * g.kv_heads;
    const int64_t block = g.causal ? forward_blocks(g) - 1 - unit / heads : unit / heads;  // the longest first
    const Unit u(g, unit % heads / g.kv_heads, unit % g.kv_heads);
    const int64_t row0 = block * kQueryRows, row1 = min64(u.rows, row0 + kQueryRows);
    const int64_t groups = ceil_div(row1 - row0, kGroupLanes), wide = padded(g.dim);
    const int64_t panel = wide * kGroupLanes, sums = sums_size(g.dim), steps = ceil_div(g.dim, kStep);
    constexpr int64_t kMost = kQueryRows / kGroupLanes;
    Memory m(0, kMost * panel * sizeof(E) + kMost * sums * 4 + kMost * kGroupLanes * 16 +
                    (kTileKeys * (kRow + wide) + columns_size(g.dim)) * sizeof(E) +
                    kTileKeys * kGroupLanes * (4 + sizeof(E)) + 4096);
    E* q = m.take<E>(kMost * panel);
    float* out = m.take<float>(kMost * sums);
    float *most = m.take<float>(kMost * kGroupLanes), *sum = m.take<float>(kMost * kGroupLanes);
    float *upper = m.take<float>(kMost * kGroupLanes), *lower = m.take<float>(kMost * kGroupLanes);
    E *keys = m.take<E>(kTileKeys * kRow), *values = m.take<E>(columns_size(g.dim));
    E* rows = m.take<E>(kTileKeys * wide);
    float* scores = m.take<float>(kTileKeys * kGroupLanes);
    E* weights = m.take<E>(kTileKeys * kGroupLanes);
    Bounds bounds[kMost], all;
    all.set(u, row0, row1 - row0);

    for (int64_t i = 0; i < groups; ++i) {
      const int64_t r0 = row0 + i * kGroupLanes, n = min64(kGroupLanes, row1 - r0);
      gather([&](int64_t r) { return r < n ? u.query(g.q, g.q_strides, r0 + r) : nullptr; }, kGroupLanes, g.dtype,
             g.dim, rows, wide);
      pack_lanes(rows, g.dim, q + i * panel);
      bounds[i].set(u, r0, n);
      lane_bounds(u, r0, row1, upper + i * kGroupLanes, lower + i * kGroupLanes);
    }
    __builtin_memset(out, 0, groups * sums * sizeof(float));
    for (int64_t i = 0; i < groups * kGroupLanes; ++i) most[i] = kLeast, sum[i] = 0.0f;

    const float scale = g.scale * 1.44269504f;
    Places places;
    for (int64_t j0 = 0; j0 < u.keys; j0 += kTileKeys) {
      const int64_t n = min64(kTileKeys, u.keys - j0);
      if (all.miss(u, j0, n)) continue;
      places.set(u, j0, n);
      int64_t first = 0, end = n;
      places.range(all, first, end);
      if (first >= end) continue;
      const auto at = [&](const void* tokens, const int64_t* strides, const void* prefix, const int64_t* of_prefix) {
        return [&u, j0, first, n, tokens, strides, prefix, of_prefix](int64_t i) -> const char* {
          return first + i < n ? u.key(tokens, strides, prefix, of_prefix, j0 + first + i) : nullptr;
        };
      };
      gather(at(g.k, g.k_strides, g.prefix_k, g.prefix_k_strides), end - first, g.dtype, g.dim, keys + first * kRow,
             kRow);
      gather(at(g.v, g.v_strides, g.prefix_v, g.prefix_v_strides), end - first, g.dtype, g.dim, rows, wide);
      pack_columns(rows, wide, end - first, g.dim, column(values, first, g.dim));
      for (int64_t i = 0; i < groups; ++i) {
        int64_t lo = first, hi = end;
        places.range(bounds[i], lo, hi);
        if (lo >= hi) continue;
        multiply<kRow, true>(keys + lo * kRow, kStep, hi - lo, q + i * panel, steps, scores, kGroupLanes, &scale);
        alignas(64) float factor[kGroupLanes];
        softmax(places, lo, hi, places.all_seen(lo, hi, bounds[i]), g.window > 0, upper + i * kGroupLanes,
                lower + i * kGroupLanes, scores, most + i * kGroupLanes, sum + i * kGroupLanes, factor, weights);
        multiply_columns(column(values, lo, g.dim), g.dim, weights, hi - lo, out + i * sums, factor);
      }
    }

    float* lse = g.lse == nullptr ? nullptr : g.lse + (u.b * g.kv_heads + u.kv_head) * u.rows;
    for (int64_t i = 0; i < groups; ++i) {
      float* columns = out + i * sums;
      alignas(64) float inverse[kGroupLanes];
      for (int64_t lane = 0; lane < kGroupLanes; ++lane) {
        const float total = sum[i * kGroupLanes + lane];
        const int64_t r = row0 + i * kGroupLanes + lane;
        inverse[lane] = total == 0.0f ? 0.0f : 1.0f / total;
        if (lse != nullptr && r < row1)
          lse[r] = total == 0.0f ? __builtin_inff() : most[i * kGroupLanes + lane] + __builtin_log2f(total);
      }
      for (int64_t d = 0; d < g.dim; ++d)
        for (int v = 0; v < kVecs; ++v) {
          float* at = columns + d * kGroupLanes + v * kLanes;
          V::store(at, V::mul(V::load(at), V::load(inverse + v * kLanes)));
        }
      store_rows(u, columns, row0 + i * kGroupLanes, row1, 1.0f, g.out, g.out_strides);
    }
  }

  // Scores of keys [lo, hi) into weights as a panel; brings the running maximum and sum up to date. `factor` is what
  // sums so far must be multiplied with.
  static void softmax(const Places& places, int64_t lo, int64_t hi, bool all_seen, bool window, const float* upper,
                      const float* lower, float* scores, float* most, float* sum, float* factor, E* weights) {
    F peak[kVecs], before[kVecs], total[kVecs], shift[kVecs];
    for (int v = 0; v < kVecs; ++v) peak[v] = V::load(most + v * kLanes);
    for (int64_t j = lo; j < hi; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        float* at = scores + (j - lo) * kGroupLanes + v * kLanes;
        F s = V::load(at);
        if (!all_seen) {
          s = places.masked(s, j, upper + v * kLanes, lower + v * kLanes, window);
          V::store(at, s);
        }
        peak[v] = V::max(s, peak[v]);  // of a NaN and a number, the number
      }
    for (int v = 0; v < kVecs; ++v) {
      shift[v] = negative(peak[v]);
      const F f = exp2<kStep>(V::add(V::load(most + v * kLanes), shift[v]));
      V::store(factor + v * kLanes, f);
      before[v] = V::mul(V::load(sum + v * kLanes), f);
      total[v] = V::zero();  // added at the end: to a long sum, each would lose its last bits
      V::store(most + v * kLanes, peak[v]);
    }
    for (int64_t j = 0; j < hi - lo; j += kStep)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        F p[kStep];
        for (int s = 0; s < kStep; ++s) {
          p[s] = exp2<kStep>(V::add(V::load(scores + (j + s) * kGroupLanes + v * kLanes), shift[v]));
          total[v] = V::add(total[v], p[s]);
        }
        A::store_steps(weights + j * kGroupLanes + v * kLanes * kStep, p);
      }
    for (int v = 0; v < kVecs; ++v) V::store(sum + v * kLanes, V::add(before[v], total[v]));
  }

  // ---- backward ----

  // What all tiles of keys read of the queries of one batch row and head of keys, a group after the other.
  struct Queries {
    E *q, *dout;                         // panels
    E *q_steps, *dout_steps;             // the same rows as steps
    float *lse, *delta, *upper, *lower;  // of each row

    Queries(Memory& m, const AttentionArgs& g) {
      const int64_t lanes = query_groups(g) * kGroupLanes, side = lanes * padded(g.dim);
      for (E** of : {&q, &dout, &q_steps, &dout_steps}) *of = m.take<E>(side);
      for (float** of : {&lse, &delta, &upper, &lower}) *of = m.take<float>(lanes);
    }
  };

  // Bytes of Queries, a multiple of 64.
  static int64_t queries_size(const AttentionArgs& g) {
    const int64_t lanes = query_groups(g) * kGroupLanes;
    return ceil_div(lanes * padded(g.dim) * sizeof(E), 64) * 256 + ceil_div(lanes * 4, 64) * 256;
  }

  // Fills group i of `to`; `rows` is room for one.
  static void pack_group(const AttentionBackwardArgs& a, const Unit& u, int64_t i, E* rows, const Queries& to) {
    const AttentionArgs& g = a.forward;
    const int64_t lanes = query_groups(g) * kGroupLanes, wide = padded(g.dim), panel = wide * kGroupLanes;
    const int64_t r0 = i * kGroupLanes, n = min64(kGroupLanes, u.rows - r0);
    const auto at = [&](const void* base, const int64_t* strides) {
      return [&u, base, strides, r0, n](int64_t r) { return r < n ? u.query(base, strides, r0 + r) : nullptr; };
    };
    gather(at(g.q, g.q_strides), kGroupLanes, g.dtype, g.dim, rows, wide);
    pack_lanes(rows, g.dim, to.q + i * panel);
    pack_steps(rows, wide, kGroupLanes, g.dim, to.q_steps + i * kGroupLanes * kGroupLanes, lanes * kGroupLanes,
               kPanelStep);
    gather(at(a.dout, a.dout_strides), kGroupLanes, g.dtype, g.dim, rows, wide);
    pack_lanes(rows, g.dim, to.dout + i * panel);
    pack_steps(rows, wide, kGroupLanes, g.dim, to.dout_steps + i * kGroupLanes * kGroupLanes, lanes * kGroupLanes,
               kPanelStep);
    const float* row_lse = g.lse + (u.b * g.kv_heads + u.kv_head) * u.rows + r0;
    for (int64_t r = 0; r < kGroupLanes; ++r) {
      // Rows that are not there, like those that see nothing, have weights of zero.
      to.lse[r0 + r] = r < n ? row_lse[r] : __builtin_inff();
      if (g.out == nullptr) continue;
      to.delta[r0 + r] =
          r < n ? dot(u.query(g.out, g.out_strides, r0 + r), u.query(a.dout, a.dout_strides, r0 + r), g.dtype, g.dim)
                : 0.0f;
    }
    lane_bounds(u, r0, u.rows, to.upper + r0, to.lower + r0);
  }

  // Group `unit` of all batch rows and heads of keys.
  static void pack(const AttentionBackwardArgs& a, int64_t unit) {
    const AttentionArgs& g = a.forward;
    const int64_t groups = query_groups(g), head = unit / groups;
    Memory rows(0, kGroupLanes * padded(g.dim) * sizeof(E)), packed(a.packed + head * queries_size(g));
    pack_group(a, Unit(g, head / g.kv_heads, head % g.kv_heads), unit % groups,
               rows.take<E>(kGroupLanes * padded(g.dim)), Queries(packed, g));
  }

  // Stores the gradients of keys [j0, j0 + n) and their values, which lie padded(dim) apart.
  static void store_keys(const AttentionBackwardArgs& a, const Unit& u, int64_t j0, int64_t n, const float* dk,
                         const float* dv) {
    const AttentionArgs& g = a.forward;
    const int64_t wide = padded(g.dim);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t j = j0 + i;
      if (j < u.prefix) {
        const int64_t row = ((u.b * g.kv_heads + u.kv_head) * g.prefix_length + j) * g.dim;
        store_scaled<kFloat32>(dk + i * wide, g.scale, a.prefix_dk + row, g.dim);
        store_scaled<kFloat32>(dv + i * wide, 1.0f, a.prefix_dv + row, g.dim);
      } else {
        const int64_t row = ((u.b * g.length + j - u.prefix) * g.kv_heads + u.kv_head) * g.dim;
        with_dtype(
            g.dtype, PF_BODY(int D) {
              constexpr int kSize = dtype_size(D);
              store_scaled<D>(dk + i * wide, g.scale, static_cast<char*>(a.dk) + row * kSize, g.dim);
              store_scaled<D>(dv + i * wide, 1.0f, static_cast<char*>(a.dv) + row * kSize, g.dim);
            });
      }
    }
  }

  // A unit is one chunk of the keys of one batch row and head of keys; what it adds to the queries' gradient is a part.
  static void backward(const AttentionBackwardArgs& a, int64_t unit) {
    [[maybe_unused]] const typename A::Tiles held;
    const AttentionArgs& g = a.forward;
    const int64_t heads = g.batch * g.kv_heads, chunk = a.chunks - 1 - unit / heads, head = unit % heads;
    const Unit u(g, head / g.kv_heads, head % g.kv_heads);
    const int64_t groups = ceil_div(u.rows, kGroupLanes), wide = padded(g.dim), sums = sums_size(g.dim);
    const int64_t panel = wide * kGroupLanes, steps = ceil_div(g.dim, kStep), lanes = groups * kGroupLanes;
    const int64_t tiles = ceil_div(u.keys, kTileKeys);
    const int64_t tile0 = tiles * chunk / a.chunks, tile1 = tiles * (chunk + 1) / a.chunks;
    const bool alone = a.chunks == 1, packs = a.packed == nullptr;
    const int64_t dq_size = groups * sums, bytes = queries_size(g);
    Memory m(0, (kTileKeys * (4 * kRow + wide + kGroupLanes) + columns_size(g.dim)) * sizeof(E) +
                    ((alone ? dq_size : 0) + 2 * kTileKeys * (wide + kGroupLanes)) * 4 + (packs ? bytes : 0) + 8192);
    Memory packed(packs ? m.take<char>(bytes) : a.packed + head * bytes);
    const Queries queries(packed, g);
    E* rows = m.take<E>(kTileKeys * wide);
    E *keys = m.take<E>(kTileKeys * kRow), *values = m.take<E>(kTileKeys * kRow);
    E* key_columns = m.take<E>(columns_size(g.dim));
    E *weights = m.take<E>(kTileKeys * kRow), *dscores = m.take<E>(kTileKeys * kRow);
    E* dscore_steps = m.take<E>(kTileKeys * kGroupLanes);
    float* scores = m.take<float>(kTileKeys * kGroupLanes);
    float* dweights = m.take<float>(kTileKeys * kGroupLanes);
    float *dk = m.take<float>(kTileKeys * wide), *dv = m.take<float>(kTileKeys * wide);
    float* dq = alone ? m.take<float>(dq_size) : a.dq_parts + (chunk * heads + head) * dq_size;
    __builtin_memset(dq, 0, dq_size * sizeof(float));

    for (int64_t i = 0; packs && i < groups; ++i) pack_group(a, u, i, rows, queries);

    const float scale = g.scale * 1.44269504f, one = 1.0f;
    Places places;
    for (int64_t tile = tile0; tile < tile1; ++tile) {
      const int64_t j0 = tile * kTileKeys, n = min64(kTileKeys, u.keys - j0);
      places.set(u, j0, n);
      const auto at = [&](const void* tokens, const int64_t* strides, const void* prefix, const int64_t* of_prefix) {
        return [&u, j0, n, tokens, strides, prefix, of_prefix](int64_t i) -> const char* {
          return i < n ? u.key(tokens, strides, prefix, of_prefix, j0 + i) : nullptr;
        };
      };
      const int64_t end = ceil_div(n, kStep) * kStep;
      gather(at(g.k, g.k_strides, g.prefix_k, g.prefix_k_strides), end, g.dtype, g.dim, keys, kRow);
      gather(at(g.v, g.v_strides, g.prefix_v, g.prefix_v_strides), end, g.dtype, g.dim, values, kRow);
      pack_columns(keys, kRow, end, g.dim, key_columns);
      __builtin_memset(dk, 0, end * wide * sizeof(float));
      __builtin_memset(dv, 0, end * wide * sizeof(float));
      for (int64_t super = 0; super < groups; super += kSuper) {
        const int64_t count = min64(kSuper, groups - super);
        int64_t lo[kSuper], hi[kSuper], least = end, most = 0;
        for (int64_t s = 0; s < count; ++s) {
          const int64_t i = super + s, r0 = i * kGroupLanes;
          Bounds bounds;
          bounds.set(u, r0, min64(kGroupLanes, u.rows - r0));
          lo[s] = 0, hi[s] = bounds.miss(u, j0, n) ? 0 : n;
          places.range(bounds, lo[s], hi[s]);
          if (lo[s] >= hi[s]) continue;
          least = min64(least, lo[s]);
          most = hi[s] > most ? hi[s] : most;
          const int64_t seen = hi[s] - lo[s];
          multiply<kRow, true>(keys + lo[s] * kRow, kStep, seen, queries.q + i * panel, steps, scores, kGroupLanes,
                               &scale);
          multiply<kRow, true>(values + lo[s] * kRow, kStep, seen, queries.dout + i * panel, steps, dweights,
                               kGroupLanes, &one);
          const bool all_seen = places.all_seen(lo[s], hi[s], bounds);
          softmax(places, lo[s], hi[s], all_seen, g.window > 0, queries.upper + r0, queries.lower + r0,
                  queries.lse + r0, scores);
          if (g.out == nullptr) weigh(scores, dweights, hi[s] - lo[s], queries.delta + r0);
          score_gradients(lo[s], hi[s], scores, dweights, queries.delta + r0, weights + s * kGroupLanes,
                          dscores + s * kGroupLanes, dscore_steps);
          multiply_columns(column(key_columns, lo[s], g.dim), g.dim, dscore_steps, seen, dq + i * sums, nullptr);
        }
        for (int64_t s = 0; s < count; ++s)
          for (int64_t j = least; j < most; ++j)
            if (j < lo[s] || j >= hi[s]) {
              __builtin_memset(weights + j * kRow + s * kGroupLanes, 0, kGroupLanes * sizeof(E));
              __builtin_memset(dscores + j * kRow + s * kGroupLanes, 0, kGroupLanes * sizeof(E));
            }
        if (least >= most) continue;
        key_blocks(most - least, [&](int64_t k0, int nk) {
          k0 += least;
          int64_t from = 0, to = count;  // groups that see any of these keys
          while (from < to && (lo[from] >= k0 + nk || hi[from] <= k0)) ++from;
          while (to > from && (lo[to - 1] >= k0 + nk || hi[to - 1] <= k0)) --to;
          const int64_t contraction = (to - from) * kGroupLanes / kStep;
          for (int64_t d = 0; d < g.dim; d += kGroupLanes) {
            const int64_t at = d * lanes + (super + from) * kGroupLanes * kGroupLanes;
            const int64_t x = k0 * kRow + from * kGroupLanes, c = k0 * wide + d;
            multiply<kRow, false>(weights + x, kStep, nk, queries.dout_steps + at, contraction, dv + c, wide, nullptr);
            multiply<kRow, false>(dscores + x, kStep, nk, queries.q_steps + at, contraction, dk + c, wide, nullptr);
          }
        });
      }
      store_keys(a, u, j0, n, dk, dv);
    }
    for (int64_t i = 0; alone && i < groups; ++i)
      store_rows(u, dq + i * sums, i * kGroupLanes, u.rows, g.scale, a.dq, g.out_strides);
  }

  // Runs `body(first key, keys)` over [0, n) in blocks that a product takes at once.
  template <class Body>
  static void key_blocks(int64_t n, const Body& body) {
    if constexpr (kTiles) {
      constexpr int64_t kKeys = 2 * A::Tiles::kRows;
      for (int64_t j = 0; j < n; j += kKeys) body(j, static_cast<int>(min64(kKeys, n - j)));
    } else {
      Product<A>::row_blocks(n, body);
    }
  }

  static float dot(const char* x, const char* y, int dtype, int64_t n) {
    F sum = V::zero();
    with_dtype(
        dtype, PF_BODY(int D) {
          for (int64_t i = 0; i < n; i += kLanes) sum = V::fma(load_part<D>(x, i, n), load_part<D>(y, i, n), sum);
        });
    return V::reduce(sum);
  }

  template <int D>
  static void store_scaled(const float* src, float scale, void* dst, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes)
      store_part<D>(static_cast<char*>(dst), i, n, V::mul(V::load(src + i), V::set1(scale)));
  }

  // Scores of keys [lo, hi) into weights, in their place.
  static void softmax(const Places& places, int64_t lo, int64_t hi, bool all_seen, bool window, const float* upper,
                      const float* lower, const float* lse, float* scores) {
    F minus_lse[kVecs];
    for (int v = 0; v < kVecs; ++v) minus_lse[v] = negative(V::load(lse + v * kLanes));
    for (int64_t j = lo; j < hi; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        float* at = scores + (j - lo) * kGroupLanes + v * kLanes;
        F score = V::load(at);
        if (!all_seen) score = places.masked(score, j, upper + v * kLanes, lower + v * kLanes, window);
        V::store(at, exp2<kStep>(V::add(score, minus_lse[v])));
      }
  }

  // The mean of the weights' gradients, by the weights of n keys that are all there are: what the product of a query's
  // result and the gradient of that comes to. The weights sum to 1 but for their rounding, which matters where one key
  // has nearly all; those of a query that sees nothing, to 0.
  static void weigh(const float* weights, const float* dweights, int64_t n, float* delta) {
    F sum[kVecs], total[kVecs];
    for (int v = 0; v < kVecs; ++v) sum[v] = V::zero(), total[v] = V::set1(1e-30f);
    for (int64_t j = 0; j < n; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        const int64_t at = j * kGroupLanes + v * kLanes;
        const F weight = V::load(weights + at);
        sum[v] = V::fma(weight, V::load(dweights + at), sum[v]);
        total[v] = V::add(total[v], weight);
      }
    for (int v = 0; v < kVecs; ++v) V::store(delta + v * kLanes, V::div(sum[v], total[v]));
  }

  // Weights of keys [lo, hi) and the gradients of those, as rows to broadcast from: the weights, and the gradients of
  // the scores; the latter as a panel too.
  static void score_gradients(int64_t lo, int64_t hi, const float* from, const float* dweights, const float* delta,
                              E* weights, E* dscores, E* dscore_steps) {
    F minus_delta[kVecs];
    for (int v = 0; v < kVecs; ++v) minus_delta[v] = negative(V::load(delta + v * kLanes));
    for (int64_t j = lo; j < hi; j += kStep) {
      F p[kStep][kVecs], d[kStep][kVecs];
#pragma GCC unroll 2
      for (int s = 0; s < kStep; ++s)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
          const int64_t at = (j + s - lo) * kGroupLanes + v * kLanes;
          p[s][v] = V::load(from + at);
          d[s][v] = V::mul(p[s][v], V::add(V::load(dweights + at), minus_delta[v]));
        }
#pragma GCC unroll 2
      for (int s = 0; s < kStep; ++s) {
        A::store_lanes(weights + (j + s) * kRow, p[s]);
        A::store_lanes(dscores + (j + s) * kRow, d[s]);
      }
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        F column[kStep];
        for (int s = 0; s < kStep; ++s) column[s] = d[s][v];
        A::store_steps(dscore_steps + (j - lo) * kGroupLanes + v * kLanes * kStep, column);
      }
    }
  }

  // The queries' gradient from its parts, group `unit` of all batch rows and heads of keys.
  static void sum_parts(const AttentionBackwardArgs& a, int64_t unit) {
    const AttentionArgs& g = a.forward;
    const int64_t groups = query_groups(g), head = unit / groups, i = unit % groups, heads = g.batch * g.kv_heads;
    const Unit u(g, head / g.kv_heads, head % g.kv_heads);
    const int64_t size = sums_size(g.dim);
    float* sum = a.dq_parts + unit * size;
    for (int64_t chunk = 1; chunk < a.chunks; ++chunk) {
      const float* part = a.dq_parts + (chunk * heads * groups + unit) * size;
      for (int64_t at = 0; at < size; at += kLanes) V::store(sum + at, V::add(V::load(sum + at), V::load(part + at)));
    }
    store_rows(u, sum, i * kGroupLanes, u.rows, g.scale, a.dq, g.out_strides);
  }

  static int64_t query_groups(const AttentionArgs& g) {
    return ceil_div(g.tokens * (g.heads / g.kv_heads), kGroupLanes);
  }
  static int64_t packed_size(const AttentionArgs& g) { return g.batch * g.kv_heads * queries_size(g); }
  static int64_t part_size(const AttentionArgs& g) { return g.batch * g.kv_heads * query_groups(g) * sums_size(g.dim); }
  static int64_t most_chunks(const AttentionArgs& g) { return ceil_div(g.prefix_length + g.length, kTileKeys); }

  static AttentionKernels table() {
    return {forward_blocks, forward, most_chunks, packed_size, part_size, query_groups, pack, backward, sum_parts};
  }
};
