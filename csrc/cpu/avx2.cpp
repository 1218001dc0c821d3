// AVX2 with FMA and F16C.
#include <immintrin.h>

#include "kernels.h"
#define PF_WORDS

namespace pf::avx2 {
#include "scalar.h"

#include "byte_planes.h"

struct V {
  static constexpr int kLanes = 8;
  static constexpr int kGroupVecs = 2;  // 6 x 2 accumulators, 2 vectors of weights, 1 broadcast: 15 of 16 registers
  static constexpr int kMicroRows = 6;
  static constexpr int kDecodingRows = 0;
  static constexpr int kFloatBlock = 256;
  static constexpr int kFewRows = 4;
  static constexpr int kGemvRows = 2;
  static constexpr int gemv_parts(int rows) { return rows == 1 ? 2 : 1; }
  using F = __m256;
  using C = __m256i;
  struct T {
    __m256 low, high;
  };

  static F zero() { return _mm256_setzero_ps(); }
  static F set1(float v) { return _mm256_set1_ps(v); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  // x where a <= b, else y.
  static F where_le(F a, F b, F x, F y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LE_OQ)); }
  // 2^n for n in [-127, 128] (0 and infinity at the ends), given n + 1.5 * 2^23: n is in the low bits.
  static F pow2(F shifted) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(0x3F800000)));
  }
  static bool any_nan(F a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)) != 0; }
  static float reduce(F a) {
    alignas(32) float v[8];
    _mm256_store_ps(v, a);
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
  }
  static float reduce_min(F a) {
    alignas(32) float v[8];
    _mm256_store_ps(v, a);
    float least = v[0];
    for (float f : v) least = f < least ? f : least;
    return least;
  }
  static float reduce_max(F a) {
    alignas(32) float v[8];
    _mm256_store_ps(v, a);
    float most = v[0];
    for (float f : v) most = f > most ? f : most;
    return most;
  }

  static F load_bf16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static F first_of_pairs(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 16));
  }
  static F second_of_pairs(const uint16_t* p) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(~0xFFFF)));
  }
  static F load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static void store_f16(uint16_t* p, F v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store_bf16(uint16_t* p, F v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }

  static T table(const float* t) { return {_mm256_loadu_ps(t), _mm256_loadu_ps(t + 8)}; }
  static C load_codes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  // vpermps reads three bits of an index; bit 3, moved to the sign, chooses the half of the table.
  static F lookup(const T& t, __m256i index, __m256i sign) {
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, index), _mm256_permutevar8x32_ps(t.high, index),
                            _mm256_castsi256_ps(sign));
  }
  template <int K>
  static F decode(const T& t, C codes) {
    constexpr int kShift = K % 2 * 16 + K / 2 * 4;
    return lookup(t, _mm256_srli_epi32(codes, kShift), _mm256_slli_epi32(codes, 28 - kShift));
  }
  static F decode_bytes(const T& t, const uint8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    const __m128i bytes = _mm_cvtsi32_si128(four);
    const __m256i index = _mm256_cvtepu8_epi32(_mm_unpacklo_epi8(_mm_srli_epi16(bytes, 4), bytes));
    return lookup(t, index, _mm256_slli_epi32(index, 28));
  }

  static void store_words(int16_t* p, F v) {
    const __m256i values = _mm256_cvtps_epi32(v);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(values, values), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(words));
  }

  using Bytes = __m256i;
  using Floats = FloatPlanes<V>;
  using Words = WordPlanes<V>;
  static constexpr int kWordRows = 4;
  static Bytes broadcast_bytes(const uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
  }
  template <bool kHigh>
  static Bytes nibbles(C codes) {
    return _mm256_and_si256(kHigh ? _mm256_srli_epi16(codes, 4) : codes, _mm256_set1_epi8(15));
  }
  static Bytes look_up(Bytes plane, Bytes index) { return _mm256_shuffle_epi8(plane, index); }
  template <int kBits, bool kHigh>
  static Bytes interleave(Bytes a, Bytes b) {
    if constexpr (kBits == 8) return kHigh ? _mm256_unpackhi_epi8(a, b) : _mm256_unpacklo_epi8(a, b);
    return kHigh ? _mm256_unpackhi_epi16(a, b) : _mm256_unpacklo_epi16(a, b);
  }
  static F as_floats(Bytes v) { return _mm256_castsi256_ps(v); }
  static F broadcast_four(const float* p) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)); }
  static Bytes broadcast_four(const int16_t* p) {
    int64_t four;
    __builtin_memcpy(&four, p, 8);
    return _mm256_set1_epi64x(four);
  }
  static void order_columns(const float* in, float* out) {
    store(out, _mm256_permutevar8x32_ps(load(in), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
  }
  static F pair_sums(F a, F b) { return _mm256_hadd_ps(a, b); }
  using WordSums = __m256i;
  static WordSums word_zero() { return _mm256_setzero_si256(); }
  static WordSums add_word_products(WordSums acc, Bytes w, Bytes x) {
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(w, x));
    asm("" : "+x"(acc));  // sums of integers are put in another order else, and theirs into memory
    return acc;
  }
  static F word_rows(WordSums a, WordSums b) { return _mm256_cvtepi32_ps(_mm256_hadd_epi32(a, b)); }

  // What Int16 (arithmetic.h) also needs.
  static Bytes load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store_bytes(void* p, Bytes v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  // Four bytes in every lane.
  static Bytes broadcast_lane(const void* p) {
    int32_t lane;
    __builtin_memcpy(&lane, p, 4);
    return _mm256_set1_epi32(lane);
  }
  // Of 32-bit lanes every second one, from the first or the second on.
  template <int kFrom>
  static Bytes every_second(Bytes a, Bytes b) {
    return _mm256_castps_si256(_mm256_shuffle_ps(as_floats(a), as_floats(b), kFrom == 0 ? 0x88 : 0xDD));
  }
  static F word_values(WordSums sums) { return _mm256_cvtepi32_ps(sums); }

  static void lookup_bytes(const float* table, const uint8_t* index, int64_t n, float* out) {
    scalar_lookup_bytes(table, index, n, out);
  }

  static void transpose16(const float* in, int64_t ld, float* out) {
    for (int i = 0; i < 16; i += 8)
      for (int j = 0; j < 16; j += 8) transpose8(in + i * ld + j, ld, out + j * 16 + i);
  }
  static void transpose8(const float* in, int64_t ld, float* out) {
    __m256 r[8], t[8];
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(in + i * ld);
    for (int i = 0; i < 8; i += 4) {
      const __m256 a = _mm256_unpacklo_ps(r[i], r[i + 1]), b = _mm256_unpackhi_ps(r[i], r[i + 1]);
      const __m256 c = _mm256_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
      t[i] = _mm256_shuffle_ps(a, c, 0x44);
      t[i + 1] = _mm256_shuffle_ps(a, c, 0xEE);
      t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
      t[i + 3] = _mm256_shuffle_ps(b, d, 0xEE);
    }
    for (int i = 0; i < 4; ++i) {
      _mm256_storeu_ps(out + i * 16, _mm256_permute2f128_ps(t[i], t[i + 4], 0x20));
      _mm256_storeu_ps(out + (i + 4) * 16, _mm256_permute2f128_ps(t[i], t[i + 4], 0x31));
    }
  }

  struct Search {
    const float* midpoints;
    const int32_t* order;
    Search(const float* mid, const int32_t* ord) : midpoints(mid), order(ord) {}
    void codes(F v, uint8_t* out) const {
      __m256i rank = _mm256_setzero_si256();
      for (int i = 0; i < 15; ++i)
        rank = _mm256_sub_epi32(rank, _mm256_castps_si256(_mm256_cmp_ps(v, set1(midpoints[i]), _CMP_NLE_UQ)));
      alignas(32) int32_t ranks[8];
      _mm256_store_si256(reinterpret_cast<__m256i*>(ranks), rank);
      for (int i = 0; i < 8; ++i) out[i] = static_cast<uint8_t>(order[ranks[i]]);
    }
  };

  static void round_codes(const float* values, int64_t n, float low, float inverse, uint8_t* out) {
    for (int64_t i = 0; i < n; i += 8) {
      F v = mul(_mm256_sub_ps(load(values + i), set1(low)), set1(inverse));
      v = min(max(v, zero()), set1(15.0f));
      alignas(32) int32_t codes[8];
      _mm256_store_si256(reinterpret_cast<__m256i*>(codes), _mm256_cvtps_epi32(v));
      for (int j = 0; j < 8; ++j) out[i + j] = static_cast<uint8_t>(codes[j]);
    }
  }
};

#include "algorithm.h"

// The int8-activation tier without VNNI: 16-bit sums of two products, the sign of the weight moved to x because the
// instruction takes one side unsigned. 2 * 127 * 127 fits.
struct B : ByUnit<V> {
  static constexpr int kGroupVecs = 2;  // 4 x 2 sums, 2 vectors of weights and their absolute values, 3 more: 15 of 16
  static constexpr int kMicroRows = 4;
  static constexpr int64_t kFewRows = 8, kMostRows = 8;
  static constexpr int kOffset = 0;
  using I = __m256i;
  using C = __m256i;
  using W = __m256i;
  using X = __m256i;
  using Table = __m256i;

  static I set1(int32_t v) { return _mm256_set1_epi32(v); }
  static V::F to_float(I v) { return _mm256_cvtepi32_ps(v); }
  static Table table(const int8_t* codes) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  }
  static C load_codes(const uint8_t* p) { return V::load_codes(p); }
  template <int S>
  static W decode(Table t, C codes) {
    return _mm256_shuffle_epi8(t, _mm256_and_si256(_mm256_srli_epi32(codes, 4 * S), _mm256_set1_epi8(15)));
  }
  static W load(const uint8_t* p) { return V::load_codes(p); }
  static void store(uint8_t* p, W w) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), w); }
  static X broadcast(const int8_t* p) { return V::broadcast_lane(p); }
  static I dot(I acc, W w, X x) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }

  static float absmax(const float* v, int64_t n) {
    __m256i most = _mm256_setzero_si256();
    for (int64_t i = 0; i < n; i += 8) most = _mm256_max_epi32(most, _mm256_castps_si256(V::abs(V::load(v + i))));
    alignas(32) int32_t bits[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(bits), most);
    for (int i = 1; i < 8; ++i) bits[0] = bits[i] > bits[0] ? bits[i] : bits[0];
    float absmax;
    __builtin_memcpy(&absmax, bits, 4);
    return absmax;
  }
  static int32_t quantize(const float* v, int64_t n, float inverse, int8_t* out) {
    const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    __m256i sum = _mm256_setzero_si256();
    for (int64_t i = 0; i < n; i += 16) {
      const __m256i a = _mm256_cvtps_epi32(V::mul(V::load(v + i), V::set1(inverse)));
      const __m256i b = _mm256_cvtps_epi32(V::mul(V::load(v + i + 8), V::set1(inverse)));
      sum = _mm256_add_epi32(sum, _mm256_add_epi32(a, b));
      const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xD8);
      const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm_shuffle_epi8(bytes, order));
    }
    alignas(32) int32_t sums[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(sums), sum);
    for (int i = 1; i < 8; ++i) sums[0] += sums[i];
    return sums[0];
  }
};

#include "int8_algorithm.h"
}  // namespace pf::avx2

namespace pf {
Kernels avx2_kernels() {
  Kernels kernels = avx2::make_kernels("avx2");
  kernels.int8 = avx2::int8_table();
  return kernels;
}
}  // namespace pf
