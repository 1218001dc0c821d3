// Plain C++: vectors of four floats that any compiler can map to what the machine has.
#include "kernels.h"

namespace pf::generic {
#include "scalar.h"

struct V {
  static constexpr int kLanes = 4;
  static constexpr int kGroupVecs = 4;
  static constexpr int kMicroRows = 2;
  static constexpr int kDecodingRows = 0;
  static constexpr int kFloatBlock = 128;
  static constexpr int kFewRows = 16;
  static constexpr int kGemvRows = 1;
  static constexpr int gemv_parts(int) { return 1; }
  using F = float __attribute__((vector_size(16)));
  using C = uint32_t __attribute__((vector_size(16)));
  using T = const float*;

  static F zero() { return F{}; }
  static F set1(float v) { return F{v, v, v, v}; }
  static F load(const float* p) {
    F v;
    __builtin_memcpy(&v, p, 16);
    return v;
  }
  static void store(float* p, F v) { __builtin_memcpy(p, &v, 16); }
  static F add(F a, F b) { return a + b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F min(F a, F b) { return a < b ? a : b; }
  static F max(F a, F b) { return a > b ? a : b; }
  static F abs(F a) { return (F)((C)a & 0x7FFFFFFFu); }
  // x where a <= b, else y.
  static F where_le(F a, F b, F x, F y) { return a <= b ? x : y; }
  // 2^n for n in [-127, 128] (0 and infinity at the ends), given n + 1.5 * 2^23: n is in the low bits.
  static F pow2(F shifted) { return (F)(((C)shifted << 23) + 0x3F800000u); }
  static bool any_nan(F a) { return a[0] != a[0] || a[1] != a[1] || a[2] != a[2] || a[3] != a[3]; }
  static float reduce(F a) { return (a[0] + a[2]) + (a[1] + a[3]); }
  static float reduce_min(F a) {
    const float x = a[0] < a[1] ? a[0] : a[1], y = a[2] < a[3] ? a[2] : a[3];
    return x < y ? x : y;
  }
  static float reduce_max(F a) {
    const float x = a[0] > a[1] ? a[0] : a[1], y = a[2] > a[3] ? a[2] : a[3];
    return x > y ? x : y;
  }

  static F load_bf16(const uint16_t* p) {
    return F{bf16_to_float(p[0]), bf16_to_float(p[1]), bf16_to_float(p[2]), bf16_to_float(p[3])};
  }
  static F first_of_pairs(const uint16_t* p) {
    return F{bf16_to_float(p[0]), bf16_to_float(p[2]), bf16_to_float(p[4]), bf16_to_float(p[6])};
  }
  static F second_of_pairs(const uint16_t* p) { return first_of_pairs(p + 1); }
  static F load_f16(const uint16_t* p) {
    return F{f16_to_float(p[0]), f16_to_float(p[1]), f16_to_float(p[2]), f16_to_float(p[3])};
  }
  static void store_bf16(uint16_t* p, F v) {
    for (int i = 0; i < 4; ++i) p[i] = float_to_bf16(v[i]);
  }
  static void store_f16(uint16_t* p, F v) {
    for (int i = 0; i < 4; ++i) p[i] = float_to_f16(v[i]);
  }

  static T table(const float* t) { return t; }
  static C load_codes(const uint8_t* p) {
    C v;
    __builtin_memcpy(&v, p, 16);
    return v;
  }
  template <int K>
  static F decode(T t, C codes) {
    const C index = codes >> (K % 2 * 16 + K / 2 * 4) & 15;
    return F{t[index[0]], t[index[1]], t[index[2]], t[index[3]]};
  }
  static F decode_bytes(T t, const uint8_t* p) { return F{t[p[0] >> 4], t[p[0] & 15], t[p[1] >> 4], t[p[1] & 15]}; }

  static void lookup_bytes(const float* table, const uint8_t* index, int64_t n, float* out) {
    scalar_lookup_bytes(table, index, n, out);
  }
  static void transpose16(const float* in, int64_t ld, float* out) { scalar_transpose16(in, ld, out); }

  struct Search {
    const float* midpoints;
    const int32_t* order;
    Search(const float* mid, const int32_t* ord) : midpoints(mid), order(ord) {}
    void codes(F v, uint8_t* out) const {
      for (int i = 0; i < 4; ++i) out[i] = static_cast<uint8_t>(order[scalar_rank(v[i], midpoints)]);
    }
  };
  static void round_codes(const float* values, int64_t n, float low, float inverse, uint8_t* out) {
    scalar_round_codes(values, n, low, inverse, out);
  }
};

#include "algorithm.h"
#include "int8_scalar.h"
#include "int8_algorithm.h"
}  // namespace pf::generic

namespace pf {
Kernels generic_kernels() {
  Kernels kernels = generic::make_kernels("generic");
  kernels.int8 = generic::int8_table();
  return kernels;
}
}  // namespace pf
