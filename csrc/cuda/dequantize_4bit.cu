// Rows of W as float32, bf16 or fp16: see pf_dequantize_4bit in api.h. Bit for bit what the CPU gives.
//
// Per element half a byte of codes (and 1/16 of scales) is read and 2 or 4 bytes are written, each once. A thread takes
// eight elements at a time, so that a warp writes 512 bytes in a row; its four groups are loaded before the first is
// written. Values are looked up in shared memory, a table a lane (bank = lane).
#include "codes.cuh"
#include "elements.cuh"

namespace pf {
namespace {

constexpr int kThreads = 256, kGroups = 4;

// Elements [i, i + 8), as far as they are there, one by one.
template <typename T, bool kZero>
PF_DEVICE void dequantize_some(const PfWeight& w, int64_t first, int64_t i, int64_t count, const float* values,
                               const float* dynamic_map, float offset, T* out) {
  const int block_bits = __ffs(w.blocksize) - 1;
#pragma unroll 1
  for (int64_t end = min64(i + 8, count); i < end; ++i) {
    const int64_t at = first + i, block = at >> block_bits;
    const float scale = scale_of(load_scale(w, block), dynamic_map, offset);
    const float zero = kZero ? __ldg(w.zero + block) : 0.0f;
    out[i] = from_float<T>(decoded(values[code_at(w.codes, at) * 32], scale, zero, kZero));
  }
}

// kZero: blocks have a zero point.
template <typename T, bool kZero>
__global__ void __launch_bounds__(kThreads, 4)
    dequantize_kernel(const PF_GRID_CONSTANT PfWeight w, int64_t first, int64_t count, T* out) {
  float* table = reinterpret_cast<float*>(shared_memory());  // [code][lane]
  for (int i = threadIdx.x; i < 16 * 32; i += kThreads) table[i] = kValues[w.format][i / 32];
  __syncthreads();
  const float* values = table + threadIdx.x % 32;
  const float offset = w.scale != nullptr ? 0.0f : __ldg(w.offset);
  const float* dynamic_map = w.scale != nullptr ? nullptr : w.dynamic_map;
  const int64_t block_start = static_cast<int64_t>(blockIdx.x) * kGroups * kThreads * 8;
  const int64_t start = block_start + threadIdx.x * 8;

  const bool words = first % 8 == 0 && reinterpret_cast<uintptr_t>(w.codes) % 4 == 0 && aligned16(out);
  if (!words || block_start + kGroups * kThreads * 8 > count) {
    for (int j = 0; j < kGroups; ++j)
      dequantize_some<T, kZero>(w, first, start + j * kThreads * 8, count, values, dynamic_map, offset, out);
    return;
  }
  uint32_t codes[kGroups];  // of elements 0 to 7 from the lowest nibble of the lowest byte, neighbours swapped
  RawScale raw[kGroups];
  float zero[kGroups] = {};
  const int block_bits = __ffs(w.blocksize) - 1;
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    const int64_t at = first + start + j * kThreads * 8;
    codes[j] = __ldg(reinterpret_cast<const uint32_t*>(w.codes + at / 2));
    raw[j] = load_scale(w, at >> block_bits);
    if (kZero) zero[j] = __ldg(w.zero + (at >> block_bits));
  }
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    const float scale = scale_of(raw[j], dynamic_map, offset);
    float v[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int shift = 4 * (e ^ 1) - 7;  // a code's values are 2^7 bytes
      const uint32_t at = (shift < 0 ? codes[j] << -shift : codes[j] >> shift) & 15u << 7;
      const float value = *reinterpret_cast<const float*>(reinterpret_cast<const char*>(values) + at);
      v[e] = decoded(value, scale, zero[j], kZero);
    }
    store8(out + start + j * kThreads * 8, v);
  }
}

template <typename T>
cudaError_t run(const PfWeight& w, int64_t first, int64_t count, void* out, void* stream) {
  const int64_t blocks = ceil_div(count, kGroups * kThreads * 8);
  const auto kernel = w.zero == nullptr ? dequantize_kernel<T, false> : dequantize_kernel<T, true>;
  return launch(kernel, blocks, kThreads, 16 * 32 * 4, stream, w, first, count, static_cast<T*>(out));
}

}  // namespace
}  // namespace pf

using namespace pf;

int32_t pf_dequantize_4bit(const PfWeight* w, int64_t row0, int64_t rows, void* out, int32_t dtype, void* stream) {
  const int64_t first = row0 * w->k, count = rows * w->k;
  if (count == 0) return cudaSuccess;
  if (dtype == kFloat32) return run<float>(*w, first, count, out, stream);
  if (dtype == kBFloat16) return run<bf16>(*w, first, count, out, stream);
  if (dtype == kFloat16) return run<f16>(*w, first, count, out, stream);
  return cudaErrorInvalidValue;
}
