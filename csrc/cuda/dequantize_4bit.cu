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

template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    dequantize_kernel(const PF_GRID_CONSTANT PfWeight w, int64_t first, int64_t count, T* out) {
  float* values = reinterpret_cast<float*>(shared_memory());  // [code][lane]
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x; i < 16 * 32; i += kThreads) values[i] = kValues[w.format][i / 32];
  __syncthreads();
  const float offset = w.scale != nullptr ? 0.0f : __ldg(w.offset);
  const float* dynamic_map = w.scale != nullptr ? nullptr : w.dynamic_map;
  const bool words = first % 8 == 0 && reinterpret_cast<uintptr_t>(w.codes) % 4 == 0;
  const int block_bits = __ffs(w.blocksize) - 1;

  const int64_t start = (static_cast<int64_t>(blockIdx.x) * kGroups * kThreads + threadIdx.x) * 8;
  uint32_t codes[kGroups] = {};  // of elements 0 to 7 from the lowest nibble of the lowest byte, neighbours swapped
  RawScale raw[kGroups] = {};
  float zero[kGroups] = {};
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    const int64_t i = start + j * kThreads * 8, at = first + i;
    if (!words || i + 8 > count) continue;
    codes[j] = __ldg(reinterpret_cast<const uint32_t*>(w.codes + at / 2));
    raw[j] = load_scale(w, at >> block_bits);
    zero[j] = w.zero == nullptr ? 0.0f : __ldg(w.zero + (at >> block_bits));
  }
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    const int64_t i = start + j * kThreads * 8, at = first + i;
    if (i >= count) break;
    float v[8];
    if (words && i + 8 <= count) {
      const float scale = scale_of(raw[j], dynamic_map, offset);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const uint32_t code = (codes[j] >> 4 * (e ^ 1)) & 15;
        v[e] = decoded(values[code * 32 + lane], scale, zero[j], w.zero != nullptr);
      }
    } else {
      for (int e = 0; e < 8; ++e) {
        v[e] = 0.0f;
        if (i + e >= count) continue;
        const int64_t block = (at + e) >> block_bits;
        const float scale = scale_of(load_scale(w, block), dynamic_map, offset);
        const float z = w.zero == nullptr ? 0.0f : __ldg(w.zero + block);
        v[e] = decoded(values[code_at(w.codes, at + e) * 32 + lane], scale, z, w.zero != nullptr);
      }
    }
    store8(out + i, count - i, v);
  }
}

template <typename T>
cudaError_t run(const PfWeight& w, int64_t first, int64_t count, void* out, void* stream) {
  const int64_t blocks = (count + kGroups * kThreads * 8 - 1) / (kGroups * kThreads * 8);
  return launch(dequantize_kernel<T>, blocks, kThreads, 16 * 32 * 4, stream, w, first, count, static_cast<T*>(out));
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
