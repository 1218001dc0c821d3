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

// Blocks from `first_block` on. kWhole: all are there, and addresses allow eight elements, and eight codes, at a time.
template <typename T, int kFormat, bool kWhole>
__global__ void __launch_bounds__(kThreads, 4)
    quantize_kernel(const T* src, int64_t count, int64_t first_block, int blocksize, uint8_t* codes, float* scale,
                    float* zero) {
  float* midpoints = reinterpret_cast<float*>(shared_memory());  // [rank][lane]
  const int lane = threadIdx.x % 32, lanes = blocksize < 256 ? blocksize / 8 : 32;
  if constexpr (kFormat != kINT4)
    for (int i = threadIdx.x; i < 15 * 32; i += kThreads) midpoints[i] = kCodebooks[kFormat].midpoints[i / 32];
  __syncthreads();
  const int64_t block = first_block + (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / lanes;
  const int64_t at = block * blocksize;
  const int64_t size = kWhole ? blocksize : min64(blocksize, count - at);  // 0 or less past the last
  const int first = lane % lanes * 8, step = lanes * 8;
  const auto load = [&](int c, float (&u)[8]) {
    if constexpr (kWhole)
      to_floats(load_raw8(src + at + c), u);
    else
      load8(src, kDType<T>, at + c, 1, size - c, u);
  };

  float v[8];  // of the first round
  float most = 0.0f, low = INFINITY, high = -INFINITY;
  int nan = 0, c = first;
  load(first, v);
  do {
    float u[8];
    if (c != first) load(c, u);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (c == first) u[i] = v[i];
      if (c + i >= size) continue;
      most = fmaxf(most, fabsf(u[i]));
      low = fminf(low, u[i]);
      high = fmaxf(high, u[i]);
      nan |= u[i] != u[i];
    }
  } while ((c += step) < blocksize);
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
  if (kFormat == kINT4) by = spread > 0.0f ? __fdiv_rn(1.0f, spread) : 0.0f;
  const auto code_of = [&](float value) -> uint32_t {
    if constexpr (kFormat == kINT4) {
      const float code = __fmul_rn(__fsub_rn(value, low), by);
      return __float2int_rn(code > 0.0f ? (code < 15.0f ? code : 15.0f) : 0.0f);
    } else {
      const float scaled = tail ? __fdiv_rn(value, by) : __fmul_rn(value, by);
      int rank = 0;  // a NaN takes the last
#pragma unroll
      for (int half = 8; half > 0; half /= 2)
        if (!(scaled <= midpoints[(rank + half - 1) * 32 + lane])) rank += half;
      return (kCodebooks[kFormat].order >> 4 * rank) & 15;
    }
  };
  if (!kWhole && first >= size) return;
  c = first;
  do {
    float u[8];
    if (c != first) load(c, u);
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t pad = kFormat == kNF4 ? 7 : 0;
      const uint32_t code = kWhole || c + i < size ? code_of(c == first ? v[i] : u[i]) : pad;
      word |= code << 4 * (i ^ 1);
    }
    uint8_t* out = codes + (at + c) / 2;
    if (kWhole || (c + 8 <= size && reinterpret_cast<uintptr_t>(out) % 4 == 0)) {
      *reinterpret_cast<uint32_t*>(out) = word;
    } else {
      for (int i = 0; i < 4 && c + 2 * i < size; ++i) out[i] = static_cast<uint8_t>(word >> 8 * i);
    }
  } while ((c += step) < size);
  if (first != 0) return;
  if (kFormat == kINT4) zero[block] = low;
  scale[block] = kFormat == kINT4 ? spread : tail ? least : most;
}

template <typename T, int kFormat>
cudaError_t run(const T* src, int64_t count, int blocksize, uint8_t* codes, float* scale, float* zero, void* stream) {
  const int64_t at_once = kThreads / min64(blocksize / 8, 32), blocks = ceil_div(count, blocksize);
  const bool aligned = aligned16(src) && reinterpret_cast<uintptr_t>(codes) % 4 == 0;
  const int64_t whole = aligned ? count / (blocksize * at_once) : 0, rest = ceil_div(blocks, at_once) - whole;
  const auto start = [&](auto kernel, int64_t grid, int64_t first_block) {
    return launch(kernel, grid, kThreads, 15 * 32 * 4, stream, src, count, first_block, blocksize, codes, scale, zero);
  };
  if (whole > 0)
    if (const cudaError_t status = start(quantize_kernel<T, kFormat, true>, whole, int64_t{0})) return status;
  return rest > 0 ? start(quantize_kernel<T, kFormat, false>, rest, whole * at_once) : cudaSuccess;
}

template <typename T>
cudaError_t run(const void* from, int64_t count, int format, int blocksize, uint8_t* codes, float* scale, float* zero,
                void* stream) {
  const T* src = static_cast<const T*>(from);
  if (format == kNF4) return run<T, kNF4>(src, count, blocksize, codes, scale, zero, stream);
  if (format == kFP4) return run<T, kFP4>(src, count, blocksize, codes, scale, zero, stream);
  return run<T, kINT4>(src, count, blocksize, codes, scale, zero, stream);
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
