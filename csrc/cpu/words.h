// Rows of x that are bf16 as 16-bit integers, against 14-bit weights: what few rows' ways of decoding (Words in
// avx512.h, WordPlanes in byte_planes.h) and the products of many rows (Int16 in arithmetic.h) have alike. Each unit of
// columns has a scale, by which no sum of 32 bits overflows.

template <class V>
void word_table(int format, int16_t* out) {
  for (int i = 0; i < 16; i += V::kLanes)
    V::store_words(out + i, V::mul(V::load(kTables[format] + i), V::set1(kWordSteps[format])));
}

template <class V>
struct WordColumns {
  using Elem = int16_t;
  static int64_t unit(const Weight& w) { return w.segment < 64 ? w.segment : 64; }

  // What rounding does to a row of x, in squares.
  struct Rounding {
    double error = 0, seen = 0;
    bool finite = true;

    // Where it would show to a row of W that has zeros for the large columns: it may do no more than bf16 itself does.
    // A rounding is step / sqrt(12), that of bf16 1.7e-3.
    bool shows() const { return !finite || error > 3e-5 * seen; }
  };

  // A unit of `size` columns as integers; returns what one of them stands for.
  static float round(const float* x, int64_t size, int16_t* words, Rounding& rounding) {
    using F = typename V::F;
    const F zero = V::zero(), one = V::set1(1.0f);
    F most = zero, total = zero;
    for (int64_t c = 0; c < size; c += V::kLanes) {
      const F v = V::abs(V::load(x + c));
      most = V::max(v, most);
      total = V::add(total, v);
    }
    const float largest = V::reduce_max(most), sum = V::reduce(total);
    rounding.finite = rounding.finite && sum <= __FLT_MAX__;
    // 64 columns round up by a half each, times 2^13 of a weight.
    const float step = largest / 32767.0f > sum / 262080.0f ? largest / 32767.0f : sum / 262080.0f;
    const float inverse = step > 1e-30f ? 1.0f / step : 0.0f;
    // Where most columns are coarse, what the large ones leave is theirs alone.
    F squares = zero, coarse_squares = zero, count = zero, coarse = zero;
    for (int64_t c = 0; c < size; c += V::kLanes) {
      const F v = V::load(x + c), steps = V::mul(v, V::set1(inverse)), a = V::abs(steps);
      const F some = V::where_le(V::abs(v), zero, zero, one);
      const F is_coarse = V::where_le(a, V::set1(256.0f), some, zero);
      const F capped = V::min(a, V::set1(4096.0f)), square = V::mul(capped, capped);
      squares = V::add(squares, square);
      coarse_squares = V::fma(is_coarse, square, coarse_squares);
      count = V::add(count, some);
      coarse = V::add(coarse, is_coarse);
      V::store_words(words + c, steps);
    }
    const float coarse_columns = V::reduce(coarse);
    const bool is_coarse = 2 * coarse_columns > V::reduce(count);
    if (is_coarse) rounding.error += double{step} * step * coarse_columns;
    rounding.seen += double{step} * step * V::reduce(is_coarse ? coarse_squares : squares);
    return step;
  }

  static FewColumns<int16_t> arrange(const GemvArgs& g) {
    const int64_t k = g.w.k, size = unit(g.w), units = k / size;
    int16_t* words = static_cast<int16_t*>(scratch(1, g.rows * (k * sizeof(int16_t) + units * sizeof(float))));
    float* scales = reinterpret_cast<float*>(words + g.rows * k);
    FewColumns<int16_t> out{words, k, scales, units};
    for (int64_t r = 0; r < g.rows; ++r) {
      const float* x = static_cast<const float*>(g.x) + r * g.ldx;
      Rounding rounding;
      for (int64_t u = 0; u < units; ++u, x += size, words += size, ++scales)
        *scales = round(x, size, words, rounding) / kWordSteps[g.w.format];
      if (rounding.shows()) out.left_out |= 1u << r;
    }
    return out;
  }
};
