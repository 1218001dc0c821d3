// The 4-bit codes as the kernels see them.
#pragma once
#include <type_traits>

#include "codes.h"
#include "api.h"
#include "device.cuh"

namespace pf {

static __constant__ const float kValues[3][16] = {PF_VALUES};
static __constant__ const float kBf16Values[3][16] = {PF_BF16_VALUES};
static __constant__ const float kBf16ValueFactors[3] = {PF_BF16_FACTORS};
// What products of T take for the values of a format's codes: these times a factor.
template <class T>
PF_DEVICE const float* product_values(int format) {
  return std::is_same_v<T, bf16> ? kBf16Values[format] : kValues[format];
}
template <class T>
PF_DEVICE float product_factor(int format) {
  return std::is_same_v<T, bf16> ? kBf16ValueFactors[format] : 1.0f;
}

// What is loaded for the scale of a block; `scale_of` makes it a number. In two halves, so that loads can be early.
struct RawScale {
  float scale;  // of the second level when double-quantized
  uint32_t code;
};
PF_DEVICE RawScale load_scale(const PfWeight& w, int64_t block) {
  const bool nested = w.scale == nullptr;
  const float* scale = nested ? w.absmax2 : w.scale;
  return {__ldg(scale + (block >> (nested ? 8 : 0))), nested ? __ldg(w.scale8 + block) : 0u};
}
// Rounded as the CPU rounds it: no fused multiply-add.
PF_DEVICE float scale_of(const RawScale& raw, const float* dynamic_map, float offset) {
  return dynamic_map == nullptr ? raw.scale : __fadd_rn(__fmul_rn(dynamic_map[raw.code], raw.scale), offset);
}

PF_DEVICE uint32_t code_at(const uint8_t* codes, int64_t element) {
  const uint32_t byte = __ldg(codes + element / 2);
  return element % 2 ? byte & 15 : byte >> 4;
}

// The value of a code in its block, rounded as the CPU rounds it.
PF_DEVICE float decoded(float value, float scale, float zero, bool has_zero) {
  const float v = __fmul_rn(value, scale);
  return has_zero ? __fadd_rn(v, zero) : v;
}

}  // namespace pf
