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

// Scores of keys [from, to) into exp(score - their maximum), zero for those outside [begin, end) and, where there are
// places, for those whose place is not in (lower, upper]; returns their sum, and the maximum (of nothing: -inf) in
// *peak.
inline float softmax_row(float* scores, int64_t from, int64_t to, int64_t begin, int64_t end, const int32_t* places,
                         int64_t lower, int64_t upper, float* peak) {
  const float lowest = -__builtin_inff();
  const int64_t first = from / kLanes * kLanes, padded = ceil_div(to, kLanes) * kLanes;
  for (int64_t i = first; i < begin; ++i) scores[i] = lowest;
  for (int64_t i = end; i < padded; ++i) scores[i] = lowest;
  if (places != nullptr)
    for (int64_t i = begin; i < end; ++i)
      if (places[i] <= lower || places[i] > upper) scores[i] = lowest;
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

constexpr float kLn2 = 0.69314718f;

PF_INLINE float exp_of(float x) { return V::reduce_max(exp(V::set1(x))); }

// Joins what a row got from its own keys, whose exp(score - peak) sum to `sum`, with its results from other keys, of
// which the first is `other`: shares [dim] is what those contribute. Returns the factor of the own keys' weights.
template <int D>
float join(const OtherKeys& others, int64_t dim, const char* other, const float* lse, float sum, float peak,
           float* shares) {
  constexpr float kNothing = __builtin_inff();
  float most = sum == 0.0f ? -kNothing : peak;
  for (int64_t i = 0; i < others.results; ++i) {
    const float log = lse[i * others.lse_strides[2]];
    if (log != kNothing && log * kLn2 > most) most = log * kLn2;
  }
  const auto weight = [&](float log) { return log == kNothing ? 0.0f : exp_of(log * kLn2 - most); };
  const float own = sum == 0.0f ? 0.0f : exp_of(peak - most);
  float total = sum * own;
  for (int64_t i = 0; i < others.results; ++i) total += weight(lse[i * others.lse_strides[2]]);
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  for (int64_t i = 0; i < others.results; ++i) {
    const V::F share = V::set1(weight(lse[i * others.lse_strides[2]]) * inverse);
    const char* row = other + i * others.out_stride * dtype_size(D);
    for (int64_t col = 0; col < dim; col += kLanes) {
      char* to = reinterpret_cast<char*>(shares);
      const V::F before = i == 0 ? V::zero() : load_part<kFloat32>(to, col, dim);
      store_part<kFloat32>(to, col, dim, V::fma(load_part<D>(row, col, dim), share, before));
    }
  }
  return own * inverse;
}

// A unit is one head of keys of one batch row, with the queries of all heads that share it. A query that sees no key
// gets zeros.
void attend(const AttentionArgs& g, const OtherKeys& others, int64_t unit0, int64_t unit1) {
  const bool of_prefix = g.prefix_k != nullptr;
  const int64_t group = g.heads / g.kv_heads, rows = g.tokens * group;
  const int64_t padded = ceil_div(of_prefix ? g.prefix_length : g.length, kTile) * kTile;
  const int size = dtype_size(g.dtype);
  float* scores = static_cast<float*>(scratch(0, (rows * (padded + 2 * g.dim + 1)) * sizeof(float)));
  float *q = scores + rows * padded, *shares = q + rows * g.dim, *factor = shares + rows * g.dim;
  with_dtype(
      g.dtype, PF_BODY(int D) {
        int64_t from = 0, to = 0, looked_at = -1;  // what any query of a row sees, and the row whose places told it
        for (int64_t unit = unit0; unit < unit1; ++unit) {
          const int64_t b = unit / g.kv_heads, kv_head = unit % g.kv_heads;
          int64_t keys = g.length, block = b;  // which of the blocks of keys and values
          if (of_prefix) {
            block = g.prefix_slot(b);
            keys = g.prefix_keys(block);
          }
          const auto head = [&](const void* base, const int64_t* strides) {
            return static_cast<const char*>(base) + (block * strides[0] + kv_head * strides[1]) * size;
          };
          const int64_t *k_strides = of_prefix ? g.prefix_k_strides : g.k_strides,
                        *v_strides = of_prefix ? g.prefix_v_strides : g.v_strides;
          const char* values = head(of_prefix ? g.prefix_v : g.v, v_strides);
          const auto at = [&](int64_t row, const int64_t* strides) {  // row: token-major
            return (b * strides[0] + (kv_head * group + row % group) * strides[1] + row / group * strides[2]) * size;
          };
          // Where places are not given, the last `tokens` keys are the queries' own.
          const int32_t* places = g.positions == nullptr || of_prefix ? nullptr : g.positions + b * g.length;
          const int64_t past = keys - g.tokens;
          const bool causal = g.causal && !of_prefix, window = g.window > 0 && !of_prefix;
          const auto lower = [&](int64_t token) { return window ? token - g.window : INT64_MIN / 2; };
          const auto upper = [&](int64_t token) { return causal ? token : kHiddenKey / 2 - 1; };
          const auto begin = [&](int64_t token) {
            return places != nullptr || !window ? 0 : past + lower(token) + 1 > 0 ? past + lower(token) + 1 : 0;
          };
          const auto end = [&](int64_t token) { return places == nullptr && causal ? past + token + 1 : keys; };
          if (places == nullptr) {
            from = begin(0), to = end(g.tokens - 1);
          } else if (looked_at != b) {
            looked_at = b, from = 0, to = keys;
            const auto hidden = [&](int64_t i) { return places[i] <= lower(0) || places[i] > upper(g.tokens - 1); };
            while (from < to && hidden(from)) ++from;
            while (to > from && hidden(to - 1)) --to;
          }

          const V::F scale = V::set1(g.scale);
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t i = 0; i < g.dim; i += kLanes) {
              const V::F query = load_part<D>(static_cast<const char*>(g.q) + at(r, g.q_strides), i, g.dim);
              store_part<kFloat32>(reinterpret_cast<char*>(q + r * g.dim), i, g.dim, V::mul(query, scale));
            }
          // `dots` places row r of its output r * rows of the matrix further.
          const Matrix all{head(of_prefix ? g.prefix_k : g.k, k_strides), D, padded, g.dim, k_strides[2]};
          dots(q, g.dim, rows, all, scores, from, to);
          for (int64_t r = 0; r < rows; ++r) {
            const int64_t token = r / group, first = begin(token) > from ? begin(token) : from;
            float peak;
            const float sum = softmax_row(scores + r * padded, from, to, first, min64(end(token), to), places,
                                          lower(token), upper(token), &peak);
            if (g.lse != nullptr)
              g.lse[unit * rows + r] = sum == 0.0f ? __builtin_inff() : peak / kLn2 + __builtin_log2f(sum);
            if (others.results > 0) {
              const float* lse = others.lse + b * others.lse_strides[0] + kv_head * others.lse_strides[1] + r;
              factor[r] = join<D>(others, g.dim, static_cast<const char*>(others.out) + at(r, g.out_strides), lse, sum,
                                  peak, shares + r * g.dim);
            } else {
              factor[r] = sum == 0.0f ? 0.0f : 1.0f / sum;
            }
          }
          const int64_t ldv = v_strides[2] * size;
          for (int64_t col = 0; col < g.dim; col += 2 * kLanes) {
            int64_t r = 0;
            const auto step = [&]<int MB>() {
              char* out[MB];
              for (int m = 0; m < MB; ++m) out[m] = static_cast<char*>(g.out) + at(r + m, g.out_strides);
              weighted_values<D, MB>(scores + r * padded, padded, values, ldv, from, to, col, g.dim, factor + r,
                                     others.results > 0 ? shares + r * g.dim : nullptr, out);
              r += MB;
            };
            while (r + 4 <= rows) step.template operator()<4>();
            while (r + 2 <= rows) step.template operator()<2>();
            while (r < rows) step.template operator()<1>();
          }
        }
      });
}
