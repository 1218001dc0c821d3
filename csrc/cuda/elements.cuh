// Eight elements at a time, of any dtype and wherever they lie: with 16-byte accesses where they can be.
#pragma once
#include "device.cuh"

namespace pf {

PF_HOST_DEVICE int element_size(int dtype) { return dtype == kFloat32 ? 4 : 2; }
PF_HOST_DEVICE bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

PF_DEVICE float load_element(const void* p, int dtype, int64_t at) {
  if (dtype == kFloat32) return __ldg(static_cast<const float*>(p) + at);
  if (dtype == kBFloat16) return to_float(__ldg(static_cast<const bf16*>(p) + at));
  return to_float(__ldg(static_cast<const f16*>(p) + at));
}

// Eight as they are loaded, so that several can be under way.
template <typename T>
struct Raw8 {
  uint4 words = {};
};
template <>
struct Raw8<float> {
  float4 low = {}, high = {};
};
template <typename T>
PF_DEVICE Raw8<T> load_raw8(const T* p) {
  return {__ldg(reinterpret_cast<const uint4*>(p))};
}
template <>
PF_DEVICE Raw8<float> load_raw8(const float* p) {
  return {__ldg(reinterpret_cast<const float4*>(p)), __ldg(reinterpret_cast<const float4*>(p) + 1)};
}
PF_DEVICE void to_floats(const Raw8<float>& raw, float (&v)[8]) {
  const float4 &a = raw.low, &b = raw.high;
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}
template <typename T>
PF_DEVICE void to_floats(const Raw8<T>& raw, float (&v)[8]) {
  const uint4& words = raw.words;
  const float2 a = unpack<T>(words.x), b = unpack<T>(words.y), c = unpack<T>(words.z), d = unpack<T>(words.w);
  v[0] = a.x, v[1] = a.y, v[2] = b.x, v[3] = b.y, v[4] = c.x, v[5] = c.y, v[6] = d.x, v[7] = d.y;
}

// Element `at` and the seven after it, `stride` apart; zero from the `count`th on.
PF_DEVICE void load8(const void* p, int dtype, int64_t at, int64_t stride, int64_t count, float (&v)[8]) {
  const char* first = static_cast<const char*>(p) + at * element_size(dtype);
  if (stride == 1 && count >= 8 && aligned16(first)) {
    if (dtype == kFloat32) return to_floats(load_raw8(reinterpret_cast<const float*>(first)), v);
    if (dtype == kBFloat16) return to_floats(load_raw8(reinterpret_cast<const bf16*>(first)), v);
    return to_floats(load_raw8(reinterpret_cast<const f16*>(first)), v);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = i < count ? load_element(p, dtype, at + i * stride) : 0.0f;
}

PF_DEVICE void store8(float* p, const float (&v)[8]) {
  reinterpret_cast<float4*>(p)[0] = make_float4(v[0], v[1], v[2], v[3]);
  reinterpret_cast<float4*>(p)[1] = make_float4(v[4], v[5], v[6], v[7]);
}
template <typename T>
PF_DEVICE uint4 pack8(const float (&v)[8]) {
  return make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7]));
}
// Rounded to T; what is T already stays.
template <typename T, typename From>
PF_DEVICE uint4 pack8(const Raw8<From>& raw) {
  if constexpr (kDType<T> == kDType<From>) {
    return raw.words;
  } else {
    float v[8];
    to_floats(raw, v);
    return pack8<T>(v);
  }
}
template <typename T>
PF_DEVICE void store8(T* p, const float (&v)[8]) {
  *reinterpret_cast<uint4*>(p) = pack8<T>(v);
}

}  // namespace pf
