// Few rows' decoding by instructions that look a byte up for each byte of 128 bits (AVX2, NEON): 16 codes at once where
// float32 has 4. Included by the vocabularies that use it, in their namespaces.
//
// 128 bits of codes are 4 rows of 8 columns: the low nibbles are columns 0 4 1 5 of every row, byte by byte, the high
// ones 2 6 3 7. Two planes of bytes interleave to 16-bit values of two rows, four planes to 32-bit values of one; lanes
// are columns.
#include "words.h"

template <class V, int N>
struct BytePlanes {
  struct Table {
    typename V::Bytes plane[N];
  };

  template <class Value>
  static Table planes(const Value* values) {
    Table t;
    for (int p = 0; p < N; ++p) {
      alignas(16) uint8_t bytes[16];
      for (int i = 0; i < 16; ++i) bytes[i] = static_cast<uint8_t>(values[i] >> 8 * p);
      t.plane[p] = V::broadcast_bytes(bytes);
    }
    return t;
  }

  // Planes p and p + 1 of the low or the high nibbles, of the first or the last two rows of every 128 bits.
  template <bool kHighNibbles, bool kLastRows>
  static typename V::Bytes pairs(const Table& t, typename V::C codes, int p) {
    const auto index = V::template nibbles<kHighNibbles>(codes);
    return V::template interleave<8, kLastRows>(V::look_up(t.plane[p], index), V::look_up(t.plane[p + 1], index));
  }

  // The columns of each group of 8 in the order of the nibbles.
  static FewColumns<float> ordered(const GemvArgs& g, int slot) {
    const float* x = static_cast<const float*>(g.x);
    float* out = static_cast<float*>(scratch(slot, g.rows * g.w.k * sizeof(float)));
    for (int64_t r = 0; r < g.rows; ++r)
      for (int64_t c = 0; c < g.w.k; c += 8) V::order_columns(x + r * g.ldx + c, out + r * g.w.k + c);
    return {out, g.w.k};
  }
};

template <class V>
struct FloatPlanes : BytePlanes<V, 4> {
  using Planes = BytePlanes<V, 4>;
  using typename Planes::Table;
  using Elem = float;
  using F = typename V::F;
  using Sum = F;
  static constexpr int kUnits = 8;  // the rows of 128 bits, of the low nibbles and of the high ones
  static constexpr int kMostRows = V::kGemvRows;
  static constexpr int parts(int) { return 4; }
  static int64_t unit(const Weight& w) { return w.segment; }
  static Table table(const Weight& w) {
    uint32_t bits[16];
    for (int i = 0; i < 16; ++i) bits[i] = float_to_bits(kTables[w.format][i]);
    return Planes::planes(bits);
  }
  template <int S>
  static F weights(const Table& t, typename V::C codes) {
    const auto low = Planes::template pairs<(S >= 4), S % 4 / 2>(t, codes, 0);
    const auto high = Planes::template pairs<(S >= 4), S % 4 / 2>(t, codes, 2);
    return V::as_floats(V::template interleave<16, S % 2>(low, high));
  }
  template <int S>
  static F operand(const float* x) {
    return V::broadcast_four(x + S / 4 * 4);
  }
  static F zero() { return V::zero(); }
  static F fma(F acc, F w, F x) { return V::fma(w, x, acc); }
  template <int>
  static F join(const F* part, const FewColumns<float>&, int64_t, int64_t) {
    return V::pair_sums(V::pair_sums(part[0], part[1]), V::pair_sums(part[2], part[3]));
  }
  static FewColumns<float> arrange(const GemvArgs& g) { return Planes::ordered(g, 1); }
};

// In 16-bit integers, for x that is bf16: twice as many products an instruction.
template <class V>
struct WordPlanes : BytePlanes<V, 2>, WordColumns<V> {
  using Planes = BytePlanes<V, 2>;
  using typename Planes::Table;
  using Sum = typename V::WordSums;
  static constexpr int kUnits = 4;
  static constexpr int kMostRows = V::kWordRows;
  static constexpr int parts(int) { return 2; }
  static Table table(const Weight& w) {
    int16_t values[16];
    word_table<V>(w.format, values);
    return Planes::planes(values);
  }
  template <int S>
  static typename V::Bytes weights(const Table& t, typename V::C codes) {
    return Planes::template pairs<(S >= 2), S % 2>(t, codes, 0);
  }
  template <int S>
  static typename V::Bytes operand(const int16_t* x) {
    return V::broadcast_four(x + S / 2 * 4);
  }
  static Sum zero() { return V::word_zero(); }
  static Sum fma(Sum acc, typename V::Bytes w, typename V::Bytes x) { return V::add_word_products(acc, w, x); }
  template <int>
  static typename V::F join(const Sum* part, const FewColumns<int16_t>& x, int64_t row, int64_t unit) {
    return V::mul(V::word_rows(part[0], part[1]), V::set1(x.scale[row * x.ld_scale + unit]));
  }
  // What many rows decode: the two columns S of the same order, side by side for every row.
  template <int S>
  static typename V::Bytes columns(const Table& t, typename V::C codes) {
    return V::template every_second<S % 2>(weights<S / 2 * 2>(t, codes), weights<S / 2 * 2 + 1>(t, codes));
  }
  static void order(float* x) { V::order_columns(x, x); }
  static FewColumns<int16_t> arrange(const GemvArgs& g) {
    const FewColumns<float> x = Planes::ordered(g, 0);
    GemvArgs args = g;
    args.x = x.data;
    args.ldx = x.ld;
    return WordColumns<V>::arrange(args);
  }
};
