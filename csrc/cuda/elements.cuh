// Eight elements at a time, of any dtype and wherever they lie: with 16-byte accesses where they can be.
#pragma once
#include "device.cuh"

namespace pf {

PF_DEVICE int element_size(int dtype) { return dtype == kFloat32 ? 4 : 2; }
PF_DEVICE bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

PF_DEVICE float load_element(const void* p, int dtype, int64_t at) {
  if (dtype == kFloat32) return __ldg(static_cast<const float*>(p) + at);
  if (dtype == kBFloat16) return to_float(__ldg(static_cast<const bf16*>(p) + at));
  return to_float(__ldg(static_cast<const f16*>(p) + at));
}

PF_DEVICE void load8_whole(const float* p, float (&v)[8]) {
  const float4 a = __ldg(reinterpret_cast<const float4*>(p)), b = __ldg(reinterpret_cast<const float4*>(p) + 1);
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}
template <typename T>
PF_DEVICE void load8_whole(const T* p, float (&v)[8]) {
  const uint4 words = __ldg(reinterpret_cast<const uint4*>(p));
  const float2 a = unpack<T>(words.x), b = unpack<T>(words.y), c = unpack<T>(words.z), d = unpack<T>(words.w);
  v[0] = a.x, v[1] = a.y, v[2] = b.x, v[3] = b.y, v[4] = c.x, v[5] = c.y, v[6] = d.x, v[7] = d.y;
}

// Element `at` and the seven after it, `stride` apart; zero from the `count`th on.
PF_DEVICE void load8(const void* p, int dtype, int64_t at, int64_t stride, int64_t count, float (&v)[8]) {
  const char* first = static_cast<const char*>(p) + at * element_size(dtype);
  if (stride == 1 && count >= 8 && aligned16(first)) {
    if (dtype == kFloat32) return load8_whole(reinterpret_cast<const float*>(first), v);
    if (dtype == kBFloat16) return load8_whole(reinterpret_cast<const bf16*>(first), v);
    return load8_whole(reinterpret_cast<const f16*>(first), v);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = i < count ? load_element(p, dtype, at + i * stride) : 0.0f;
}

PF_DEVICE void store8_whole(float* p, const float (&v)[8]) {
  reinterpret_cast<float4*>(p)[0] = make_float4(v[0], v[1], v[2], v[3]);
  reinterpret_cast<float4*>(p)[1] = make_float4(v[4], v[5], v[6], v[7]);
}
template <typename T>
PF_DEVICE uint4 pack8(const float (&v)[8]) {
  return make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7]));
}
template <typename T>
PF_DEVICE void store8_whole(T* p, const float (&v)[8]) {
  *reinterpret_cast<uint4*>(p) = pack8<T>(v);
}

// The first `count` of eight elements, side by side.
template <typename T>
PF_DEVICE void store8(T* p, int64_t count, const float (&v)[8]) {
  if (count >= 8 && aligned16(p)) return store8_whole(p, v);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < count) p[i] = from_float<T>(v[i]);
}

}  // namespace pf
