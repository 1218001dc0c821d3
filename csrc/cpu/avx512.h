// AVX-512 vocabulary (F, BW, VL, DQ; with PF_BF16 also BF16). Included by the files avx512*.cpp, each in a namespace
// of its own, after <immintrin.h>.
#include "words.h"

struct V {
  static constexpr int kLanes = 16;
  static constexpr int kGroupVecs = 2;  // 12 x 2 accumulators, 2 vectors of weights, 1 broadcast: 27 of 32 registers
  static constexpr int kMicroRows = 12;
  static constexpr int kDecodingRows = 10;  // leaves registers for what decodes
  static constexpr int kFloatBlock = 128;
  static constexpr int kFewRows = 16;
  static constexpr int kGemvRows = 8;
  static constexpr int gemv_parts(int rows) { return rows >= 8 ? 2 : 4; }
  using F = __m512;
  using C = __m512i;
  using T = __m512;

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float v) { return _mm512_set1_ps(v); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  // x where a <= b, else y.
  static F where_le(F a, F b, F x, F y) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LE_OQ), y, x); }
  // 2^n for n in [-127, 128] (0 and infinity at the ends), given n + 1.5 * 2^23: n is in the low bits.
  static F pow2(F shifted) {
    const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(0x3F800000)));
  }
  static bool any_nan(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) != 0; }
  static float reduce(F a) { return _mm512_reduce_add_ps(a); }
  static float reduce_min(F a) { return _mm512_reduce_min_ps(a); }
  static float reduce_max(F a) { return _mm512_reduce_max_ps(a); }

  static F load_bf16(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  // The first, the second, of 16 pairs of bf16.
  static F first_of_pairs(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
  }
  static F second_of_pairs(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(~0xFFFF)));
  }
  static F load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store_f16(uint16_t* p, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // Round to nearest even in integers: vcvtneps2bf16 would flush subnormals. NaN stays a (quiet) NaN.
  static __m512i bf16_bits(F v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  }
  // Both rounded to bf16, the odd one above the even one in each lane.
  static F bf16_pairs(F even, F odd) {
    const __m512i first = _mm512_srli_epi32(bf16_bits(even), 16);
    return _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xAAAAAAAA, first, bf16_bits(odd)));
  }
  static void store_bf16(uint16_t* p, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_bits(v), 16)));
  }

  static T table(const float* t) { return _mm512_loadu_ps(t); }
  // Kept in a register: gcc may otherwise read them again for each shift, which costs much where they are on their way
  // from memory (2048 x 2048, one row: 149 us instead of 129).
  static C load_codes(const uint8_t* p) {
    C codes = _mm512_loadu_si512(p);
    asm("" : "+v"(codes));
    return codes;
  }
  // vpermps reads only the low four bits of an index.
  template <int K>
  static F decode(T t, C codes) {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(codes, K % 2 * 16 + K / 2 * 4), t);
  }
  // 16 values from 8 bytes, high nibble first.
  static F decode_bytes(T t, const uint8_t* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m128i twice = _mm_unpacklo_epi8(_mm_srli_epi16(bytes, 4), bytes);
    return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(twice), t);
  }

  // out[i] = table[index[i]], 256 entries: in 16-bit halves, 64 entries a permutation. n is a multiple of 16.
  static void lookup_bytes(const float* table, const uint8_t* index, int64_t n, float* out) {
    __m512i low[8], high[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m512i a = _mm512_loadu_si512(table + i * 32), b = _mm512_loadu_si512(table + i * 32 + 16);
      low[i] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(a)), _mm512_cvtepi32_epi16(b), 1);
      high[i] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_srli_epi32(a, 16))),
                                   _mm512_cvtepi32_epi16(_mm512_srli_epi32(b, 16)), 1);
    }
    const auto lookup = [](const __m512i* t, __m512i i, __mmask32 bit6, __mmask32 bit7) {
      const __m512i a = _mm512_mask_blend_epi16(bit6, _mm512_permutex2var_epi16(t[0], i, t[1]),
                                                _mm512_permutex2var_epi16(t[2], i, t[3]));
      const __m512i b = _mm512_mask_blend_epi16(bit6, _mm512_permutex2var_epi16(t[4], i, t[5]),
                                                _mm512_permutex2var_epi16(t[6], i, t[7]));
      return _mm512_mask_blend_epi16(bit7, a, b);
    };
    for (int64_t i = 0; i < n; i += 32) {
      const bool both = n - i >= 32;
      const __m256i bytes = both ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index + i))
                                 : _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(index + i)));
      const __m512i at = _mm512_cvtepu8_epi16(bytes);
      const __mmask32 bit6 = _mm512_test_epi16_mask(at, _mm512_set1_epi16(64));
      const __mmask32 bit7 = _mm512_test_epi16_mask(at, _mm512_set1_epi16(128));
      const __m512i l = lookup(low, at, bit6, bit7), h = lookup(high, at, bit6, bit7);
      const auto join = [](__m256i l, __m256i h) {
        return _mm512_or_si512(_mm512_cvtepu16_epi32(l), _mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
      };
      _mm512_storeu_si512(out + i, join(_mm512_castsi512_si256(l), _mm512_castsi512_si256(h)));
      if (both)
        _mm512_storeu_si512(out + i + 16, join(_mm512_extracti64x4_epi64(l, 1), _mm512_extracti64x4_epi64(h, 1)));
    }
  }

#ifdef PF_BF16
  using Pair = __m512bh;
  using PairTable = __m512i;
  static PairTable pair_table(const float* t) {
    const __m256i half = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(t));
    return _mm512_broadcast_i64x4(half);
  }
  // vpermw reads only the low five bits of an index: the table holds the 16 codes twice, so bit 4 does not matter.
  template <int I>
  static Pair decode_pair(PairTable t, C codes) {
    return (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4 * I), t);
  }
  // A group's 32 columns of two rows, in pairs.
  static void interleave_rows(const void* even, const void* odd, uint16_t* out) {
    const __m512i a = _mm512_loadu_si512(even), b = _mm512_loadu_si512(odd);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i first = _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_or_si512(lanes, _mm512_set1_epi32(32)), 16));
    const __m512i second = _mm512_or_si512(first, _mm512_set1_epi16(16));
    _mm512_storeu_si512(out, _mm512_permutex2var_epi16(a, first, b));
    _mm512_storeu_si512(out + 32, _mm512_permutex2var_epi16(a, second, b));
  }
  static Pair load_pair(const uint16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static void store_raw_pair(uint16_t* p, Pair v) { _mm512_storeu_si512(p, (__m512i)v); }
  static Pair broadcast_pair(const uint16_t* p) {
    int32_t both;
    __builtin_memcpy(&both, p, 4);
    return (__m512bh)_mm512_set1_epi32(both);
  }
  static F fma_pair(F acc, Pair w, Pair x) { return _mm512_dpbf16_ps(acc, w, x); }
  // As bf16 to be multiplied: subnormals become zero here as they would there.
  static void store_factor(uint16_t* p, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
  }
  static void store_two(uint16_t* p, F first, F second) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(second, first));
  }
  // The same where every NaN is the default one: another's bits would run over. Halves are rounded away from zero: in
  // integers, on pipelines that neither products nor permutations use (Zen 5: 12.3 cycles instead of 13.8 of a step of
  // micro_decoding).
  static F default_nan(F v) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), v, _mm512_set1_ps(__builtin_nanf("")));
  }
  static Pair pair_beside_products(F even, F odd) {
    const __m512i half = _mm512_set1_epi32(0x8000);
    const __m512i first = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(even), half), 16);
    const __m512i second = _mm512_add_epi32(_mm512_castps_si512(odd), half);
    return (__m512bh)_mm512_mask_blend_epi16(0xAAAAAAAA, first, second);
  }
  // Lane i of `even` and of `odd` side by side.
  static Pair pair(F even, F odd) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i pairs = _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_or_si512(lanes, _mm512_set1_epi32(16)), 16));
    return (__m512bh)_mm512_permutexvar_epi16(pairs, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
  }
#endif

  using Bytes = __m512i;
  // Four bytes in every lane.
  static Bytes broadcast_lane(const void* p) {
    int32_t lane;
    __builtin_memcpy(&lane, p, 4);
    return _mm512_set1_epi32(lane);
  }
  static void store_words(int16_t* p, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(v)));
  }

  // Few rows' decoding in 16-bit integers, for x that is bf16: vpermw looks 32 codes up at once and vpdpwssd, or
  // vpmaddwd, multiplies as many, where vpermps and the float32 multiply-add have 16; the bf16 product has 32 too, but
  // is slow on some CPUs. Every CPU with bf16 products has VNNI, whose one instruction is written as it is (see
  // avx512_int8.h).
  struct Words : WordColumns<V> {
    struct alignas(4) Elem2 {
      int16_t column[2];
    };
    using Sum = __m512i;
    using Table = __m512i;
    static constexpr int kUnits = 4;
    static constexpr int kMostRows = kGemvRows;
    static constexpr int parts(int rows) { return rows >= 8 ? 1 : rows >= 4 ? 2 : 4; }
    static Table table(const Weight& w) {
      alignas(32) int16_t values[16];
      word_table<V>(w.format, values);
      return _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(values)));
    }
    // As decode_pair.
    template <int S>
    static __m512i weights(const Table& t, C codes) {
      return _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4 * S), t);
    }
    template <int S>
    static const Elem2& operand(const int16_t* x) {
      return *reinterpret_cast<const Elem2*>(x + 2 * S);
    }
    static Sum zero() { return _mm512_setzero_si512(); }
    static Sum fma(Sum acc, __m512i w, const Elem2& x) {
#ifdef PF_BF16
      asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(x));
#else
      acc = _mm512_add_epi32(acc, _mm512_madd_epi16(w, broadcast_lane(&x)));
      asm("" : "+v"(acc));  // sums of integers are put in another order else, and theirs into memory
#endif
      return acc;
    }
    // What many rows decode.
    template <int S>
    static __m512i columns(const Table& t, C codes) {
      return weights<S>(t, codes);
    }
    static void order(float*) {}
    template <int N>
    static F join(const Sum* part, const FewColumns<int16_t>& x, int64_t row, int64_t unit) {
      Sum all = part[0];
      for (int p = 1; p < N; ++p) all = _mm512_add_epi32(all, part[p]);
      return _mm512_mul_ps(_mm512_cvtepi32_ps(all), _mm512_set1_ps(x.scale[row * x.ld_scale + unit]));
    }
  };

#ifdef PF_WORDS
  // What Int16 (arithmetic.h) needs, for CPUs that also have VNNI.
  static Bytes load_bytes(const void* p) { return _mm512_loadu_si512(p); }
  static void store_bytes(void* p, Bytes v) { _mm512_storeu_si512(p, v); }
  using WordSums = __m512i;
  static WordSums word_zero() { return _mm512_setzero_si512(); }
  static WordSums add_word_products(WordSums acc, Bytes w, Bytes x) {
    asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
    return acc;
  }
  static F word_values(WordSums sums) { return _mm512_cvtepi32_ps(sums); }
#endif

  // out[c][r] = in[r][c], 16 by 16, rows of `in` ld apart: 4x4 blocks within 128-bit lanes, then the lanes themselves.
  static void transpose16(const float* in, int64_t ld, float* out) {
    __m512 r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(in + i * ld);
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      const __m512 a = _mm512_unpacklo_ps(r[i], r[i + 1]), b = _mm512_unpackhi_ps(r[i], r[i + 1]);
      const __m512 c = _mm512_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);
      t[i] = _mm512_shuffle_ps(a, c, 0x44);
      t[i + 1] = _mm512_shuffle_ps(a, c, 0xEE);
      t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
      t[i + 3] = _mm512_shuffle_ps(b, d, 0xEE);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512 a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xDD);
      const __m512 c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88),
                   d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xDD);
      _mm512_storeu_ps(out + i * 16, _mm512_shuffle_f32x4(a, c, 0x88));
      _mm512_storeu_ps(out + (i + 8) * 16, _mm512_shuffle_f32x4(a, c, 0xDD));
      _mm512_storeu_ps(out + (i + 4) * 16, _mm512_shuffle_f32x4(b, d, 0x88));
      _mm512_storeu_ps(out + (i + 12) * 16, _mm512_shuffle_f32x4(b, d, 0xDD));
    }
  }

  // The lanes of each of 16 vectors joined by `op`.
  template <class Op>
  static F join16(const F* in, const Op& op) {
    __m512 r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = in[i];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
      r[i] = op(_mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]), _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      r[i] = op(_mm512_shuffle_ps(r[2 * i], r[2 * i + 1], 0x44), _mm512_shuffle_ps(r[2 * i], r[2 * i + 1], 0xEE));
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {  // four vectors to two, two to one
      const __m512 a = i < 2 ? r[2 * i] : r[0], b = i < 2 ? r[2 * i + 1] : r[1];
      r[i < 2 ? i : 0] = op(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
    }
    return r[0];
  }

  // Nearest code by binary search over sorted midpoints; NaN takes the last rank.
  struct Search {
    F midpoints;
    __m512i order;
    Search(const float* mid, const int32_t* ord) : midpoints(_mm512_load_ps(mid)), order(_mm512_load_si512(ord)) {}
    void codes(F v, uint8_t* out) const {
      __m512i rank = _mm512_setzero_si512();
#pragma GCC unroll 4
      for (int step = 8; step > 0; step /= 2) {
        const F mid = _mm512_permutexvar_ps(_mm512_add_epi32(rank, _mm512_set1_epi32(step - 1)), midpoints);
        rank = _mm512_mask_add_epi32(rank, _mm512_cmp_ps_mask(v, mid, _CMP_NLE_UQ), rank, _mm512_set1_epi32(step));
      }
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(_mm512_permutexvar_epi32(rank, order)));
    }
  };

  // Codes round((v - low) * inverse) in 0..15, NaN to 0.
  static void round_codes(const float* values, int64_t n, float low, float inverse, uint8_t* out) {
    for (int64_t i = 0; i < n; i += 16) {
      F v = mul(_mm512_sub_ps(load(values + i), set1(low)), set1(inverse));
      v = min(max(v, zero()), set1(15.0f));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
    }
  }
};
