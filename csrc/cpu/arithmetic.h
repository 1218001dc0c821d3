// The arithmetics of products, over the vocabulary `V`. Included by algorithm.h first.

inline void copy_bytes(void* dst, const void* src, int64_t n) { __builtin_memcpy(dst, src, n); }

// Instructions that multiply matrices of several rows (amx.h), where there are any.
struct NoTiles {
  static constexpr int kRows = 1, kColumns = 1;
};

// Arithmetic in float32: one column a step.
struct F32 {
  using Elem = float;
  static constexpr int kStep = 1;
  using Tiles = NoTiles;
  using W = V::F;
  using Table = V::T;
  static Table table(const Weight& w) { return V::table(kTables[w.format]); }
  // That the table's values are multiplied with.
  static float factor(const Weight&) { return 1.0f; }
  template <int I>
  static W decode(const Table& t, V::C codes) {
    return V::decode<I>(t, codes);
  }
  static W load(const Elem* p) { return V::load(p); }
  static void store(Elem* p, W w) { V::store(p, w); }
  static void store_steps(Elem* dst, const V::F* columns) { store(dst, columns[0]); }
  // Steps of columns that are finite, infinite or the product of what `clean` returns, decoded beside products.
  static W steps(const V::F* columns) { return columns[0]; }
  static V::F clean(V::F v) { return v; }
  using X = V::F;
  static X broadcast(const Elem* x) { return V::set1(*x); }
  using Sum = V::F;
  static Sum zero() { return V::zero(); }
  static Sum fma(Sum acc, W w, X x) { return V::fma(w, x, acc); }
  static void store_row(Elem* dst, V::F v) { V::store(dst, v); }
  // A group's lanes side by side.
  static void store_lanes(Elem* dst, const V::F* lanes) {
    for (int v = 0; v < V::kGroupVecs; ++v) V::store(dst + v * V::kLanes, lanes[v]);
  }
  // kLanes pairs of bf16, as the steps that they are, `stride` elements apart.
  static void store_pairs(Elem* dst, const uint16_t* pairs, int64_t stride) {
    V::store(dst, V::first_of_pairs(pairs));
    V::store(dst + stride, V::second_of_pairs(pairs));
  }
  // Products with such pairs: two columns of x.
  struct Pairs {
    V::F first, second;
  };
  static Pairs load_pairs(const uint16_t* p) { return {V::first_of_pairs(p), V::second_of_pairs(p)}; }
  static V::F fma_pairs(V::F acc, const Pairs& w, const Elem* x) {
    return V::fma(w.second, V::set1(x[1]), V::fma(w.first, V::set1(x[0]), acc));
  }
};

#ifdef PF_BF16
// Arithmetic in pairs of bf16, accumulated in float32: two columns a step.
struct BF16 {
  using Elem = uint16_t;
  static constexpr int kStep = 2;
#ifdef PF_TILES
  using Tiles = AmxTiles;
#else
  using Tiles = NoTiles;
#endif
  using W = V::Pair;
  using Table = V::PairTable;
  static Table table(const Weight& w) { return V::pair_table(kBf16Tables[w.format]); }
  static float factor(const Weight& w) { return kBf16Factors[w.format]; }
  template <int I>
  static W decode(const Table& t, V::C codes) {
    return V::decode_pair<I>(t, codes);
  }
  static W load(const Elem* p) { return V::load_pair(p); }
  static void store(Elem* p, W w) { V::store_raw_pair(p, w); }
  static void store_steps(Elem* dst, const V::F* columns) { store(dst, V::pair(columns[0], columns[1])); }
  static W steps(const V::F* columns) { return V::pair_beside_products(columns[0], columns[1]); }
  static V::F clean(V::F v) { return V::default_nan(v); }
  using X = V::Pair;
  static X broadcast(const Elem* x) { return V::broadcast_pair(x); }
  using Sum = V::F;
  static Sum zero() { return V::zero(); }
  static Sum fma(Sum acc, W w, X x) { return V::fma_pair(acc, w, x); }
  // Of a segment, where its scales multiply the sum.
  static constexpr bool kTakesZeros = false;
  static V::F value(Sum acc, const Elem*, int64_t) { return acc; }
  static void store_row(Elem* dst, V::F v) { V::store_factor(dst, v); }
  static void store_lanes(Elem* dst, const V::F* lanes) { V::store_two(dst, lanes[0], lanes[1]); }
  static V::F rounded_pairs(V::F even, V::F odd) { return V::bf16_pairs(even, odd); }
  static void interleave(const void* even, const void* odd, Elem* dst) { V::interleave_rows(even, odd, dst); }
  static void store_pairs(Elem* dst, const uint16_t* pairs, int64_t) { copy_bytes(dst, pairs, V::kLanes * 4); }
  static W load_pairs(const uint16_t* p) { return load(p); }
  static V::F fma_pairs(V::F acc, W w, const Elem* x) { return fma(acc, w, broadcast(x)); }
};
#endif

#ifdef PF_WORDS
// Arithmetic in 16-bit integers (words.h), for x that is bf16: two columns a step. After the columns of a row's block
// come the scales of its units, then what these add up to.
struct Int16 {
  using Elem = int16_t;
  static constexpr int kStep = 2;
  using Tiles = NoTiles;
  using W = V::Bytes;
  using Words = V::Words;
  using Table = Words::Table;
  static Table table(const Weight& w) { return Words::table(w); }
  template <int I>
  static W decode(const Table& t, V::C codes) {
    return Words::template columns<I>(t, codes);
  }
  static W load(const Elem* p) { return V::load_bytes(p); }
  static void store(Elem* p, W w) { V::store_bytes(p, w); }
  using X = V::Bytes;
  static X broadcast(const Elem* x) { return V::broadcast_lane(x); }
  using Sum = V::WordSums;
  static Sum zero() { return V::word_zero(); }
  static Sum fma(Sum acc, W w, X x) { return V::add_word_products(acc, w, x); }
  static constexpr bool kTakesZeros = true;
  static constexpr int kMostUnits = 8;
  static V::F value(Sum acc, const Elem* end_of_row, int64_t unit) {
    return V::mul(V::word_values(acc), V::set1(reinterpret_cast<const float*>(end_of_row)[unit]));
  }
  static V::F sum_of_x(const Elem* end_of_row, int64_t unit) {
    return V::set1(reinterpret_cast<const float*>(end_of_row)[kMostUnits + unit]);
  }
};
#endif

constexpr int kLanes = V::kLanes;
constexpr int kTileVecs = kTile / kLanes;
constexpr int kGroupTiles = V::kGroupVecs / kTileVecs;
constexpr int kGroupLanes = V::kGroupVecs * kLanes;
// Few rows stream codes and scales once, slower than memory delivers them: prefetched this far ahead (bytes), across
// the end of a tile, the time becomes the larger of arithmetic and memory, not their sum. Codes come into the
// second-level cache, which has more requests under way than the first (4096 x 4096, 2 rows: 418 us instead of 529 on
// Zen 4); on Zen 5 into the first, which has as many (4096 x 14336, one row: 775 us instead of 890). The B of the
// branch is prefetched by tiles: a tile's is short, and no hardware sees it coming.
constexpr int64_t kTilesAhead = 8;
#ifdef PF_BF16X2
constexpr int64_t kCodesAhead = 24576, kRowsAhead = 4096, kFewTilesAhead = 2, kLocality = 3;
#else
constexpr int64_t kCodesAhead = 16384, kRowsAhead = 16384, kFewTilesAhead = kTilesAhead, kLocality = 2;
#endif
constexpr int64_t kScalesAhead = 1024;
PF_INLINE void prefetch_stream(const void* at) { __builtin_prefetch(at, 0, kLocality); }

// Calls body.operator()<I>() for each I, everything inlined.
#define PF_BODY(index) [&]<index>() __attribute__((always_inline))
template <class Body, int... I>
PF_INLINE void each(IntList<I...>, const Body& body) {
  (body.template operator()<I>(), ...);
}

// That for `n` of the functions that Of::operator()<1>(), <2>(), .. return.
template <class Of, int... I>
PF_INLINE auto pick(int n, Of, IntList<I...>) {
  static constexpr decltype(Of{}.template operator()<1>()) kFunctions[] = {Of{}.template operator()<I + 1>()...};
  return kFunctions[n - 1];
}

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
