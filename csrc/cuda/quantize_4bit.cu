// float32, bf16 or fp16 to 4-bit codes: see pf_quantize_4bit in api.h. Bit for bit what the CPU gives: no fused
// multiply-add, division where it divides.
//
// Per element 2 or 4 bytes are read and half a byte is written. A lane takes eight elements at a time and 4 to 32 lanes
// a block, so that a block of up to 256 is read once; longer ones are read twice, the second time from the cache.
#include "codes.cuh"
#include "elements.cuh"

namespace pf {
namespace {

constexpr int kThreads = 256;

// The values of a format in order: the midpoints between neighbours, and the code of each, four bits a rank.
struct Codebook {
  float midpoints[15] = {};
  uint64_t order = 0;
};
constexpr float kNf4[16] = {PF_NF4_VALUES};
constexpr float kFp4[16] = {PF_FP4_VALUES};
constexpr Codebook codebook(const float (&values)[16]) {
  Codebook book;
  float ordered[16] = {};
  for (int i = 0; i < 16; ++i) {
    int rank = 0;  // FP4 holds 0 twice: equal values keep their order
    for (int j = 0; j < 16; ++j) rank += values[j] < values[i] || (values[j] == values[i] && j < i);
    ordered[rank] = values[i];
    book.order |= static_cast<uint64_t>(i) << 4 * rank;
  }
  for (int i = 0; i < 15; ++i) book.midpoints[i] = (ordered[i] + ordered[i + 1]) / 2;
  return book;
}
static __constant__ const Codebook kCodebooks[2] = {codebook(kNf4), codebook(kFp4)};

template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    quantize_kernel(const T* src, int64_t count, int format, int blocksize, uint8_t* codes, float* scale, float* zero) {
  float* midpoints = reinterpret_cast<float*>(shared_memory());  // [rank][lane]
  const int lane = threadIdx.x % 32, lanes = blocksize < 256 ? blocksize / 8 : 32;
  if (format != kINT4)
    for (int i = threadIdx.x; i < 15 * 32; i += kThreads) midpoints[i] = kCodebooks[format].midpoints[i / 32];
  __syncthreads();
  const int64_t block = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / lanes;
  const int64_t at = block * blocksize, size = min64(blocksize, count - at);  // 0 or less past the last
  const int first = lane % lanes * 8, step = lanes * 8;

  float v[8];  // of the first round
  float most = 0.0f, low = INFINITY, high = -INFINITY;
  int nan = 0;
  load8(src, kDType<T>, at + first, 1, size - first, v);
  for (int c = first; c < blocksize; c += step) {
    float u[8];
    if (c != first) load8(src, kDType<T>, at + c, 1, size - c, u);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (c == first) u[i] = v[i];
      if (c + i >= size) continue;
      most = fmaxf(most, fabsf(u[i]));
      low = fminf(low, u[i]);
      high = fmaxf(high, u[i]);
      nan |= u[i] != u[i];
    }
  }
  for (int other = 1; other < lanes; other *= 2) {
    most = fmaxf(most, __shfl_xor_sync(~0u, most, other));
    low = fminf(low, __shfl_xor_sync(~0u, low, other));
    high = fmaxf(high, __shfl_xor_sync(~0u, high, other));
    nan |= __shfl_xor_sync(~0u, nan, other);
  }
  if (nan) most = low = high = NAN;

  // code = round((v - low) * by), or the rank of v * by or v / by
  const bool tail = size < blocksize;
  const float least = most < 1e-38f ? 1e-38f : most;
  const float spread = __fdiv_rn(__fsub_rn(high, low), 15.0f);
  float by = tail ? least : __fdiv_rn(1.0f, least);
  if (format == kINT4) by = spread > 0.0f ? __fdiv_rn(1.0f, spread) : 0.0f;
  const auto code_of = [&](float value) -> uint32_t {
    if (format == kINT4) {
      const float code = __fmul_rn(__fsub_rn(value, low), by);
      return __float2int_rn(code > 0.0f ? (code < 15.0f ? code : 15.0f) : 0.0f);
    }
    const float scaled = tail ? __fdiv_rn(value, by) : __fmul_rn(value, by);
    int rank = 0;  // a NaN takes the last
#pragma unroll
    for (int half = 8; half > 0; half /= 2)
      if (!(scaled <= midpoints[(rank + half - 1) * 32 + lane])) rank += half;
    return (kCodebooks[format].order >> 4 * rank) & 15;
  };
  for (int c = first; c < size; c += step) {
    float u[8];
    if (c != first) load8(src, kDType<T>, at + c, 1, size - c, u);
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t pad = format == kNF4 ? 7 : 0;
      const uint32_t code = c + i < size ? code_of(c == first ? v[i] : u[i]) : pad;
      word |= code << 4 * (i ^ 1);
    }
    uint8_t* out = codes + (at + c) / 2;
    if (c + 8 <= size && reinterpret_cast<uintptr_t>(out) % 4 == 0) {
      *reinterpret_cast<uint32_t*>(out) = word;
    } else {
      for (int i = 0; i < 4 && c + 2 * i < size; ++i) out[i] = static_cast<uint8_t>(word >> 8 * i);
    }
  }
  if (first != 0 || size <= 0) return;
  if (format == kINT4) zero[block] = low;
  scale[block] = format == kINT4 ? spread : tail ? least : most;
}

template <typename T>
cudaError_t run(const void* src, int64_t count, int format, int blocksize, uint8_t* codes, float* scale, float* zero,
                void* stream) {
  const int64_t blocks = (count + blocksize - 1) / blocksize, at_once = kThreads / min64(blocksize / 8, 32);
  return launch(quantize_kernel<T>, (blocks + at_once - 1) / at_once, kThreads, 15 * 32 * 4, stream,
                static_cast<const T*>(src), count, format, blocksize, codes, scale, zero);
}

}  // namespace
}  // namespace pf

using namespace pf;

int32_t pf_quantize_4bit(const void* src, int32_t dtype, int64_t count, int32_t format, int32_t blocksize,
                         uint8_t* codes, float* scale, float* zero, void* stream) {
  if (count == 0) return cudaSuccess;
  if (dtype == kFloat32) return run<float>(src, count, format, blocksize, codes, scale, zero, stream);
  if (dtype == kBFloat16) return run<bf16>(src, count, format, blocksize, codes, scale, zero, stream);
  if (dtype == kFloat16) return run<f16>(src, count, format, blocksize, codes, scale, zero, stream);
  return cudaErrorInvalidValue;
}
