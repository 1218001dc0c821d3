// The 4-bit codes as the kernels see them; csrc/cpu/dispatch.cpp and pyfastpeft/formats/codes.py hold the same values.
#pragma once
#include <type_traits>

#include "api.h"
#include "device.cuh"

namespace pf {

// clang-format off
#define PF_NF4_VALUES \
  -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, \
  -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, \
  0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f
#define PF_FP4_VALUES \
  0.0f, 0.0625f / 12, 8.0f / 12, 12.0f / 12, 4.0f / 12, 6.0f / 12, 2.0f / 12, 3.0f / 12, 0.0f, -0.0625f / 12, \
  -8.0f / 12, -12.0f / 12, -4.0f / 12, -6.0f / 12, -2.0f / 12, -3.0f / 12
// clang-format on

static __constant__ const float kValues[3][16] = {
    {PF_NF4_VALUES}, {PF_FP4_VALUES}, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}};
// csrc/cpu/dispatch.cpp says why these are not the nearest.
static __constant__ const float kNf4Bf16Values[16] = {
    -1.0f,         -0.6953125f,   -0.52734375f, -0.39453125f, -0.28515625f, -0.1845703125f, -0.09130859375f, 0.0f,
    0.0791015625f, 0.1611328125f, 0.24609375f,  0.33984375f,  0.44140625f,  0.5625f,        0.72265625f,     1.0f};
// What products of T take for the values of a format's codes.
template <class T>
PF_DEVICE const float* product_values(int format) {
  return std::is_same_v<T, bf16> && format == kNF4 ? kNf4Bf16Values : kValues[format];
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
