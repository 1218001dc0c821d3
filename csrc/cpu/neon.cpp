// AArch64 Advanced SIMD.
#include <arm_neon.h>

#include "kernels.h"

namespace pf::neon {
#include "scalar.h"

#include "byte_planes.h"

struct V {
  static constexpr int kLanes = 4;
  static constexpr int kGroupVecs = 4;  // 6 x 4 accumulators, 4 vectors of weights, 1 broadcast: 29 of 32 registers
  static constexpr int kMicroRows = 6;
  static constexpr int kDecodingRows = 0;
  static constexpr int kFloatBlock = 128;
  static constexpr int kFewRows = 16;
  static constexpr int kGemvRows = 4;
  static constexpr int gemv_parts(int) { return 1; }
  using F = float32x4_t;
  using C = uint32x4_t;
  using T = uint8x16x4_t;

  static F zero() { return vdupq_n_f32(0.0f); }
  static F set1(float v) { return vdupq_n_f32(v); }
  static F load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, F v) { vst1q_f32(p, v); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F div(F a, F b) { return vdivq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  // Of a NaN and a number, the second, as everywhere; this instruction set's own would be the number.
  static F min(F a, F b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
  static F max(F a, F b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static F abs(F a) { return vabsq_f32(a); }
  // x where a <= b, else y.
  static F where_le(F a, F b, F x, F y) { return vbslq_f32(vcleq_f32(a, b), x, y); }
  // 2^n for n in [-127, 128] (0 and infinity at the ends), given n + 1.5 * 2^23: n is in the low bits.
  static F pow2(F shifted) {
    const uint32x4_t exponent = vshlq_n_u32(vreinterpretq_u32_f32(shifted), 23);
    return vreinterpretq_f32_u32(vaddq_u32(exponent, vdupq_n_u32(0x3F800000)));
  }
  static bool any_nan(F a) { return vminvq_u32(vceqq_f32(a, a)) == 0; }
  static float reduce(F a) { return vaddvq_f32(a); }
  static float reduce_min(F a) { return vminnmvq_f32(a); }
  static float reduce_max(F a) { return vmaxnmvq_f32(a); }

  static F load_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
  static F first_of_pairs(const uint16_t* p) {
    return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u16(vld1q_u16(p)), 16));
  }
  static F second_of_pairs(const uint16_t* p) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_u16(vld1q_u16(p)), vdupq_n_u32(0xFFFF0000)));
  }
  static F load_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static void store_f16(uint16_t* p, F v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
  static void store_bf16(uint16_t* p, F v) {
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    vst1_u16(p, vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16));
  }

  static T table(const float* t) { return vld1q_u8_x4(reinterpret_cast<const uint8_t*>(t)); }
  static C load_codes(const uint8_t* p) { return vld1q_u32(reinterpret_cast<const uint32_t*>(p)); }
  // A lookup of bytes: code c of a lane becomes the byte indices 4c .. 4c + 3 of the table.
  static F lookup(const T& t, uint32x4_t index) {
    const uint32x4_t bytes = vmlaq_n_u32(vdupq_n_u32(0x03020100), index, 0x04040404);
    return vreinterpretq_f32_u8(vqtbl4q_u8(t, vreinterpretq_u8_u32(bytes)));
  }
  template <int K>
  static F decode(const T& t, C codes) {
    constexpr int kShift = K % 2 * 16 + K / 2 * 4;
    uint32x4_t shifted = codes;
    if constexpr (kShift > 0) shifted = vshrq_n_u32(codes, kShift);
    return lookup(t, vandq_u32(shifted, vdupq_n_u32(15)));
  }
  static F decode_bytes(const T& t, const uint8_t* p) {
    const uint32_t index[4] = {static_cast<uint32_t>(p[0] >> 4), static_cast<uint32_t>(p[0] & 15),
                               static_cast<uint32_t>(p[1] >> 4), static_cast<uint32_t>(p[1] & 15)};
    return lookup(t, vld1q_u32(index));
  }

  static void store_words(int16_t* p, F v) { vst1_s16(p, vqmovn_s32(vcvtnq_s32_f32(v))); }

  using Bytes = uint8x16_t;
  using Floats = FloatPlanes<V>;
  using Words = WordPlanes<V>;
  static constexpr int kWordRows = 4;
  static Bytes broadcast_bytes(const uint8_t* p) { return vld1q_u8(p); }
  template <bool kHigh>
  static Bytes nibbles(C codes) {
    const uint8x16_t bytes = vreinterpretq_u8_u32(codes);
    return kHigh ? vshrq_n_u8(bytes, 4) : vandq_u8(bytes, vdupq_n_u8(15));
  }
  static Bytes look_up(Bytes plane, Bytes index) { return vqtbl1q_u8(plane, index); }
  template <int kBits, bool kHigh>
  static Bytes interleave(Bytes a, Bytes b) {
    if constexpr (kBits == 8) return kHigh ? vzip2q_u8(a, b) : vzip1q_u8(a, b);
    const uint16x8_t c = vreinterpretq_u16_u8(a), d = vreinterpretq_u16_u8(b);
    return vreinterpretq_u8_u16(kHigh ? vzip2q_u16(c, d) : vzip1q_u16(c, d));
  }
  static F as_floats(Bytes v) { return vreinterpretq_f32_u8(v); }
  static F broadcast_four(const float* p) { return load(p); }
  static Bytes broadcast_four(const int16_t* p) {
    int64_t four;
    __builtin_memcpy(&four, p, 8);
    return vreinterpretq_u8_s64(vdupq_n_s64(four));
  }
  static void order_columns(const float* in, float* out) {
    const F a = load(in), b = load(in + 4);
    store(out, vzip1q_f32(a, b));
    store(out + 4, vzip2q_f32(a, b));
  }
  static F pair_sums(F a, F b) { return vpaddq_f32(a, b); }
  struct WordSums {  // of two rows
    int32x4_t first, second;
  };
  static WordSums word_zero() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
  static WordSums add_word_products(WordSums acc, Bytes w, Bytes x) {
    const int16x8_t a = vreinterpretq_s16_u8(w), b = vreinterpretq_s16_u8(x);
    return {vmlal_s16(acc.first, vget_low_s16(a), vget_low_s16(b)), vmlal_high_s16(acc.second, a, b)};
  }
  static F word_rows(WordSums a, WordSums b) {
    return vcvtq_f32_s32(vpaddq_s32(vpaddq_s32(a.first, a.second), vpaddq_s32(b.first, b.second)));
  }

  static void lookup_bytes(const float* table, const uint8_t* index, int64_t n, float* out) {
    scalar_lookup_bytes(table, index, n, out);
  }
  static void transpose16(const float* in, int64_t ld, float* out) { scalar_transpose16(in, ld, out); }

  struct Search {
    const float* midpoints;
    const int32_t* order;
    Search(const float* mid, const int32_t* ord) : midpoints(mid), order(ord) {}
    void codes(F v, uint8_t* out) const {
      uint32x4_t rank = vdupq_n_u32(15);
      for (int i = 0; i < 15; ++i) rank = vaddq_u32(rank, vcleq_f32(v, set1(midpoints[i])));
      uint32_t ranks[4];
      vst1q_u32(ranks, rank);
      for (int i = 0; i < 4; ++i) out[i] = static_cast<uint8_t>(order[ranks[i]]);
    }
  };
  static void round_codes(const float* values, int64_t n, float low, float inverse, uint8_t* out) {
    scalar_round_codes(values, n, low, inverse, out);
  }
};

#include "algorithm.h"

namespace plain {
#include "neon_int8.h"

#include "int8_algorithm.h"
}  // namespace plain

#define PF_DOTPROD
namespace dotprod {
#include "neon_int8.h"

#include "int8_algorithm.h"
}  // namespace dotprod
}  // namespace pf::neon

namespace pf {
Kernels neon_kernels() { return neon::make_kernels("neon"); }
Int8 neon_int8() { return neon::plain::int8_table(); }
Int8 neon_dotprod_int8() { return neon::dotprod::int8_table(); }
}  // namespace pf
