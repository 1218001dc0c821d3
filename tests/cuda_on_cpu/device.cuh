// csrc/cuda/device.cuh for a CPU: the same functions, and what kernels use of CUDA itself.
#pragma once
#include <stdint.h>

#include <cmath>
#include <tuple>

#include "cpu/weight.h"
#include "emulator.h"

#define __global__ static
#define __constant__
#define __host__
#define __device__
#define __launch_bounds__(...)
#define PF_DEVICE inline
#define PF_HOST_DEVICE inline
#define PF_GRID_CONSTANT

// ---- CUDA

struct Index {
  int64_t x;
};
#define threadIdx (Index{emulator::current->index})
#define blockIdx (Index{emulator::current->block->index})

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

using std::fmaf, std::min;
template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
inline int __ffs(int v) { return __builtin_ffs(v); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __float2int_rn(float v) { return static_cast<int>(std::nearbyint(v)); }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return out;
}
inline void __syncthreads() { emulator::barrier(); }
template <typename T>
T __shfl_xor_sync(uint32_t, T value, int mask) {
  struct Operands {
    T in, out;
  } mine{value, value};
  emulator::collective(1, mine, [mask](Operands** lanes) {
    for (int i = 0; i < 32; ++i) lanes[i]->out = lanes[i ^ mask]->in;
  });
  return mine.out;
}

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline const char* cudaGetErrorString(cudaError_t status) { return status == cudaSuccess ? "no error" : "an error"; }
#define CUDART_VERSION 0
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
};

// ---- device.cuh

namespace pf {

#include "cpu/scalar.h"

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
template <typename T>
inline constexpr int kDType = kFloat32;
template <>
inline constexpr int kDType<bf16> = kBFloat16;
template <>
inline constexpr int kDType<f16> = kFloat16;

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) { return bf16_to_float(v.bits); }
inline float to_float(f16 v) { return f16_to_float(v.bits); }
template <typename T>
T from_float(float v);
template <>
inline float from_float(float v) {
  return v;
}
template <>
inline bf16 from_float(float v) {
  return {float_to_bf16(v)};
}
template <>
inline f16 from_float(float v) {
  return {float_to_f16(v)};
}
template <typename T>
uint32_t pack(float first, float second) {
  return from_float<T>(first).bits | static_cast<uint32_t>(from_float<T>(second).bits) << 16;
}
template <typename T>
float2 unpack(uint32_t pair) {
  return {to_float(T{static_cast<uint16_t>(pair)}), to_float(T{static_cast<uint16_t>(pair >> 16)})};
}

inline unsigned char* shared_memory() { return emulator::current->block->memory.get(); }

inline uint64_t evict_first() { return 0; }
inline void cp_async16(void* shared, const void* global, uint64_t = 0) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16 != 0)
    emulator::fail("cp.async at a misaligned address");
  std::memset(shared, 0xFF, 16);
  emulator::current->open.push_back({shared, global});
}
inline void cp_async_commit() {
  emulator::current->groups.push_back(std::move(emulator::current->open));
  emulator::current->open.clear();
}
template <int N>
void cp_async_wait() {
  for (auto& groups = emulator::current->groups; groups.size() > N; groups.pop_front())
    for (const emulator::Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
}
inline void prefetch_l2(const void*) {}

inline void ldmatrix_x4(uint32_t (&out)[4], const void* shared) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) emulator::fail("ldmatrix at a misaligned address");
  struct Operands {
    const uint32_t* row;
    uint32_t* out;
  } mine{static_cast<const uint32_t*>(shared), out};
  emulator::collective(2, mine, [](Operands** lanes) {
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int i = 0; i < 32; ++i) lanes[i]->out[matrix] = lanes[matrix * 8 + i / 4]->row[i % 4];
  });
}
template <typename T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } mine{d, a, {b0, b1}};
  emulator::collective(3, mine, [](Operands** lanes) {
    float a[16][16], b[16][8];
    for (int i = 0; i < 32; ++i)
      for (int word = 0; word < 4; ++word) {
        const int g = i / 4, k = i % 4 * 2 + word / 2 * 8;
        const float2 pair = unpack<T>(lanes[i]->a[word]);
        a[g + word % 2 * 8][k] = pair.x, a[g + word % 2 * 8][k + 1] = pair.y;
        if (word % 2 != 0) continue;
        const float2 x = unpack<T>(lanes[i]->b[word / 2]);
        b[k][g] = x.x, b[k + 1][g] = x.y;
      }
    for (int i = 0; i < 32; ++i)
      for (int e = 0; e < 4; ++e)
        for (int k = 0; k < 16; ++k) lanes[i]->d[e] += a[i / 4 + e / 2 * 8][k] * b[k][i % 4 * 2 + e % 2];
  });
}

inline uint32_t arrive(uint32_t* counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_ACQ_REL); }
inline uint32_t load_acquire(const uint32_t* counter) { return __atomic_load_n(counter, __ATOMIC_ACQUIRE); }
inline void store_relaxed(uint32_t* counter, uint32_t value) { __atomic_store_n(counter, value, __ATOMIC_RELAXED); }
inline void pause() { emulator::yield(); }

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, void*,
                   const Arguments&... arguments) {
  emulator::run(blocks, threads, shared_bytes, [&] { kernel(arguments...); });
  return cudaSuccess;
}
inline int current_device() { return 0; }
using Sequence = std::tuple<int, unsigned long long, unsigned long long>;
inline bool sequence_of(void*, Sequence* sequence, void** graph) {
  const int64_t stream = emulator::settings.stream;
  *sequence = {0, stream < 0 ? 0 : stream, stream < 0 ? -stream : 0};
  *graph = stream < 0 ? &emulator::settings : nullptr;
  return stream != -1;
}
inline bool when_gone(void*, void (*)(void*), void*) { return true; }
inline cudaError_t set_to_zero(void* memory, size_t bytes, void*) {
  std::memset(memory, 0, bytes);
  emulator::zeroed = {static_cast<unsigned char*>(memory), bytes};
  return cudaSuccess;
}
inline cudaError_t keep(void** memory, const void* values, size_t bytes) {
  const auto* from = static_cast<const unsigned char*>(values);
  emulator::kept.push_back({std::vector(from, from + bytes), std::make_unique<unsigned char[]>(bytes)});
  *memory = emulator::kept.back().memory.get();
  std::memcpy(*memory, values, bytes);
  return cudaSuccess;
}
inline int device_attribute(cudaDeviceAttr attribute) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      return emulator::settings.multiprocessors;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return emulator::settings.shared_bytes;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return emulator::settings.shared_bytes - 1024;
    case cudaDevAttrComputeCapabilityMajor:
      return emulator::settings.capability;
  }
  return 0;
}

}  // namespace pf
