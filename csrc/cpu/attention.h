// Attention of few queries over a cache of keys and values, over the vocabulary `V`. Included by algorithm.h, after
// elementwise.h.

// Sums over the keys [key0, length) of weights[row][key] * v[key], columns [col0, col0 + 2 vectors), for MB rows; times
// the row's factor, and added to the row of `others` [MB, dim] where there is one.
template <int D, int MB>
PF_INLINE void weighted_values(const float* weights, int64_t ldw, const char* v, int64_t ldv, int64_t key0,
                               int64_t length, int64_t col0, int64_t dim, const float* factor, const float* others,
                               char* const* out) {
  constexpr MakeInts<MB> rows{};
  constexpr MakeInts<2> vecs{};
  V::F acc[MB][2];
  each(rows, PF_BODY(int M) { each(vecs, PF_BODY(int U) { acc[M][U] = V::zero(); }); });
  for (int64_t key = key0; key < length; ++key)
    each(
        vecs, PF_BODY(int U) {
          if (col0 + U * kLanes >= dim) return;
          const V::F value = load_part<D>(v + key * ldv, col0 + U * kLanes, dim);
          each(rows, PF_BODY(int M) { acc[M][U] = V::fma(value, V::set1(weights[M * ldw + key]), acc[M][U]); });
        });
  each(
      rows, PF_BODY(int M) {
        each(
            vecs, PF_BODY(int U) {
              const int64_t col = col0 + U * kLanes;
              if (col >= dim) return;
              V::F sum = V::mul(acc[M][U], V::set1(factor[M]));
              if (others != nullptr)
                sum = V::add(sum, load_part<kFloat32>(reinterpret_cast<const char*>(others + M * dim), col, dim));
              store_part<D>(out[M], col, dim, sum);
            });
      });
}

// Scores of keys [key0, end) into exp(score - their maximum), zero for hidden and later keys; returns their sum, and
// the maximum (of nothing: -inf) in *peak.
inline float softmax_row(float* scores, int64_t key0, int64_t end, int64_t padded, const uint8_t* mask, float* peak) {
  const float lowest = -__builtin_inff();
  int64_t first = key0 / kLanes * kLanes;
  for (int64_t i = first; i < key0; ++i) scores[i] = lowest;
  for (int64_t i = end; i < padded; ++i) scores[i] = lowest;
  if (mask != nullptr)
    for (int64_t i = key0; i < end; ++i)
      if (mask[i] == 0) scores[i] = lowest;
  V::F most = V::set1(lowest);
  for (int64_t i = first; i < padded; i += kLanes) most = V::max(most, V::load(scores + i));
  *peak = V::reduce_max(most);
  const V::F shift = V::set1(*peak == lowest ? 0.0f : -*peak);
  V::F sum = V::zero();
  for (int64_t i = first; i < padded; i += kLanes) {
    const V::F weight = exp(V::add(V::load(scores + i), shift));
    V::store(scores + i, weight);
    sum = V::add(sum, weight);
  }
  return V::reduce(sum);
}

PF_INLINE float exp_of(float x) { return V::reduce_max(exp(V::set1(x))); }

// Joins what a row got from its own keys, whose exp(score - peak) sum to `sum`, with its results from other keys, of
// which the first is `other`: shares [dim] is what those contribute. Returns the factor of the own keys' weights.
template <int D>
float join(const AttendArgs& g, const char* other, const float* lse, float sum, float peak, float* shares) {
  constexpr float kLn2 = 0.69314718f, kNothing = __builtin_inff();
  float most = sum == 0.0f ? -kNothing : peak;
  for (int64_t i = 0; i < g.others; ++i) {
    const float log = lse[i * g.other_lse_strides[2]];
    if (log != kNothing && log * kLn2 > most) most = log * kLn2;
  }
  const auto weight = [&](float log) { return log == kNothing ? 0.0f : exp_of(log * kLn2 - most); };
  const float own = sum == 0.0f ? 0.0f : exp_of(peak - most);
  float total = sum * own;
  for (int64_t i = 0; i < g.others; ++i) total += weight(lse[i * g.other_lse_strides[2]]);
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  for (int64_t i = 0; i < g.others; ++i) {
    const V::F share = V::set1(weight(lse[i * g.other_lse_strides[2]]) * inverse);
    const char* row = other + i * g.other_stride * dtype_size(D);
    for (int64_t col = 0; col < g.dim; col += kLanes) {
      char* to = reinterpret_cast<char*>(shares);
      const V::F before = i == 0 ? V::zero() : load_part<kFloat32>(to, col, g.dim);
      store_part<kFloat32>(to, col, g.dim, V::fma(load_part<D>(row, col, g.dim), share, before));
    }
  }
  return own * inverse;
}

// A unit is one head of keys of one batch row, with the queries of all heads that share it. A query that sees no key
// gets zeros.
void attend(const AttendArgs& g, int64_t unit0, int64_t unit1) {
  const int64_t group = g.heads / g.kv_heads, rows = g.tokens * group;
  const int64_t padded = ceil_div(g.length, kTile) * kTile;
  const int size = dtype_size(g.dtype);
  float* scores = static_cast<float*>(scratch(0, (rows * (padded + 2 * g.dim + 1)) * sizeof(float)));
  float *q = scores + rows * padded, *shares = q + rows * g.dim, *factor = shares + rows * g.dim;
  with_dtype(
      g.dtype, PF_BODY(int D) {
        for (int64_t unit = unit0; unit < unit1; ++unit) {
          const int64_t b = unit / g.kv_heads, kv_head = unit % g.kv_heads;
          const uint8_t* mask = g.mask == nullptr ? nullptr : g.mask + b * g.length;
          int64_t key0 = 0;
          if (mask != nullptr)
            while (key0 < g.length - 1 && mask[key0] == 0) ++key0;
          const auto at = [&](int64_t row) {  // row: token-major
            return (((b * g.tokens + row / group) * g.kv_heads + kv_head) * group + row % group) * g.dim * size;
          };
          const V::F scale = V::set1(g.scale);
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t i = 0; i < g.dim; i += kLanes) {
              const V::F scaled = V::mul(load_part<D>(static_cast<const char*>(g.q) + at(r), i, g.dim), scale);
              store_part<kFloat32>(reinterpret_cast<char*>(q + r * g.dim), i, g.dim, scaled);
            }
          const auto head = [&](const void* base, const int64_t* strides) {
            return static_cast<const char*>(base) + (b * strides[0] + kv_head * strides[1]) * size;
          };
          // `dots` places row r of its output r * keys.rows further.
          const Matrix keys{head(g.k, g.k_strides), D, padded, g.dim, g.k_strides[2]};
          dots(q, g.dim, rows, keys, scores, key0, g.length);
          for (int64_t r = 0; r < rows; ++r) {
            const int64_t end = g.length - g.tokens + r / group + 1;
            float peak;
            const float sum = softmax_row(scores + r * padded, key0, end, padded, mask, &peak);
            if (g.others > 0) {
              const float* lse = g.other_lse + b * g.other_lse_strides[0] + kv_head * g.other_lse_strides[1] + r;
              factor[r] = join<D>(g, static_cast<const char*>(g.other) + at(r), lse, sum, peak, shares + r * g.dim);
            } else {
              factor[r] = sum == 0.0f ? 0.0f : 1.0f / sum;
            }
          }
          const char* values = head(g.v, g.v_strides);
          const int64_t ldv = g.v_strides[2] * size;
          for (int64_t col = 0; col < g.dim; col += 2 * kLanes) {
            int64_t r = 0;
            const auto step = [&]<int MB>() {
              char* out[MB];
              for (int m = 0; m < MB; ++m) out[m] = static_cast<char*>(g.out) + at(r + m);
              weighted_values<D, MB>(scores + r * padded, padded, values, ldv, key0, g.length, col, g.dim, factor + r,
                                     g.others > 0 ? shares + r * g.dim : nullptr, out);
              r += MB;
            };
            while (r + 4 <= rows) step.template operator()<4>();
            while (r + 2 <= rows) step.template operator()<2>();
            while (r < rows) step.template operator()<1>();
          }
        }
      });
}
