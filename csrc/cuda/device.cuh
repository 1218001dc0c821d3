// The device's vocabulary: every PTX instruction of the project is a small function here. Kernels include this and
// nothing else of CUDA, so that tests can put a CPU in its place.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <tuple>

#include "cpu/weight.h"

#define PF_DEVICE __device__ __forceinline__
#define PF_GRID_CONSTANT __grid_constant__
#define PF_HOST_DEVICE __host__ __device__ __forceinline__

namespace pf {

using bf16 = __nv_bfloat16;
using f16 = __half;

PF_HOST_DEVICE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- elements

template <typename T>
inline constexpr int kDType = kFloat32;
template <>
inline constexpr int kDType<bf16> = kBFloat16;
template <>
inline constexpr int kDType<f16> = kFloat16;

template <typename T>
PF_DEVICE float to_float(T v);
template <>
PF_DEVICE float to_float(float v) {
  return v;
}
template <>
PF_DEVICE float to_float(bf16 v) {
  return __bfloat162float(v);
}
template <>
PF_DEVICE float to_float(f16 v) {
  return __half2float(v);
}
template <typename T>
PF_DEVICE T from_float(float v);
template <>
PF_DEVICE float from_float(float v) {
  return v;
}
template <>
PF_DEVICE bf16 from_float(float v) {
  return __float2bfloat16_rn(v);
}
template <>
PF_DEVICE f16 from_float(float v) {
  return __float2half_rn(v);
}

// Two elements in a word, the first in its low half.
template <typename T>
PF_DEVICE uint32_t pack(float first, float second);
template <>
PF_DEVICE uint32_t pack<bf16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
PF_DEVICE uint32_t pack<f16>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <typename T>
PF_DEVICE float2 unpack(uint32_t pair);
template <>
PF_DEVICE float2 unpack<bf16>(uint32_t pair) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
}
template <>
PF_DEVICE float2 unpack<f16>(uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

// ---- shared memory

// All of the block's dynamic shared memory.
PF_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}
PF_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ---- asynchronous copies

// For what is read once: such lines leave L2 first.
PF_DEVICE uint64_t evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// 16 bytes from global to shared memory, both addresses multiples of 16. The rest of the 128-byte line is asked for
// too.
PF_DEVICE void cp_async16(void* shared, const void* global, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "l"(policy)
               : "memory");
}
// The same for what other blocks read too.
PF_DEVICE void cp_async16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
// Ends a group of copies.
PF_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the last N groups of this thread have landed.
template <int N>
PF_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
// Asks for a line in L2.
PF_DEVICE void prefetch_l2(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// ---- tensor cores

// Four 8 x 8 matrices of 16-bit elements. Lane 8 i + r gives the address of row r of matrix i (16 bytes); word i of
// lane 4 r + c receives bytes 4 c to 4 c + 3 of that row.
PF_DEVICE void ldmatrix_x4(uint32_t (&out)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(shared))
               : "memory");
}
// d [16 x 8] += a [16 x 16] * b [16 x 8] in float32. Of lane 4 g + t: d rows g, g, g + 8, g + 8 and columns 2 t, 2 t +
// 1; a rows g, g + 8, g, g + 8, the first two with columns 2 t, 2 t + 1 and the others with those + 8; b column g, rows
// likewise.
template <typename T>
PF_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
PF_DEVICE void mma<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
PF_DEVICE void mma<f16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- between blocks

// Counts one up and returns what was there. What this thread has seen or written, and what its block had before a
// barrier, comes before; what it and its block do after a barrier comes after.
PF_DEVICE uint32_t arrive(uint32_t* counter) {
  uint32_t before;
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
  return before;
}
PF_DEVICE uint32_t load_acquire(const uint32_t* counter) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}
// For a loop that waits.
PF_DEVICE void pause() { __nanosleep(64); }
PF_DEVICE void store_relaxed(uint32_t* counter, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

// ---- on the host

inline int current_device() {
  int device = 0;
  cudaGetDevice(&device);
  return device;
}
inline int device_attribute(cudaDeviceAttr attribute) {
  int value = 0;
  cudaDeviceGetAttribute(&value, attribute, current_device());
  return value;
}
// Allows blocks of `kernel` that much dynamic shared memory, if the device has it; else its launch is an error.
//
// What is allowed holds for all launches of the kernel on a device, those of other threads and of graphs too. So it is
// not what this one needs, but all that there is: none of the kernels has static shared memory.
inline cudaError_t allow_shared_memory(const void* kernel, int bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}
// `kernel`, allowed the shared memory that it needs.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, void* stream,
                   const Arguments&... arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (const cudaError_t status = allow_shared_memory(function, shared_bytes)) return status;
  cudaGetLastError();  // what a call before left is not this launch's
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
}

// Calls that follow one another: those of a stream, by its number, which no other has, not even one that gets its
// handle when it is gone; or what a graph records of a stream, by the capture's number.
using Sequence = std::tuple<int, unsigned long long, unsigned long long>;  // device, stream, capture or 0
// That of the next call on `stream`, and the graph that records it, or null. False where there is none to be known.
inline bool sequence_of(void* stream, Sequence* sequence, void** graph) {
  const auto s = static_cast<cudaStream_t>(stream);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long number = reinterpret_cast<uintptr_t>(stream), capture = 0;
  cudaGraph_t recording = nullptr;
  cudaError_t error = cudaStreamGetCaptureInfo(s, &status, &capture, &recording);
  if (error == cudaSuccess && status == cudaStreamCaptureStatusNone) {
    capture = 0, recording = nullptr;
    error = cudaStreamGetId(s, &number);
  }
  if (error != cudaSuccess) cudaGetLastError();  // or the next launch would report it
  *sequence = {current_device(), number, capture};
  *graph = recording;
  return error == cudaSuccess && (recording != nullptr || status == cudaStreamCaptureStatusNone);
}
inline cudaError_t set_to_zero(void* memory, size_t bytes, void* stream) {
  return cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream));
}
// While it lives this thread may do what is forbidden otherwise while it or another captures (torch's allocator does
// the same).
class Relaxed {
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;

 public:
  Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  Relaxed(const Relaxed&) = delete;
};
// Calls gone(what) once neither `graph`, which is being recorded, nor what was made of it is there or runs; from any
// thread. False: it is not noticed, and `gone` was called or will be.
inline bool when_gone(void* graph, void (*gone)(void*), void* what) {
  const Relaxed relaxed;
  cudaUserObject_t object = nullptr;
  cudaError_t error = cudaUserObjectCreate(&object, what, gone, 1, cudaUserObjectNoDestructorSync);
  if (error != cudaSuccess) {
    gone(what);
  } else {
    error = cudaGraphRetainUserObject(static_cast<cudaGraph_t>(graph), object, 1, cudaGraphUserObjectMove);
    if (error != cudaSuccess) cudaUserObjectRelease(object, 1);
  }
  if (error != cudaSuccess) cudaGetLastError();
  return error == cudaSuccess;
}
// New memory of the current device that begins as `values` and is never freed; null where there is none.
//
// It does not come from torch: while torch.compile warms a graph up, what torch's allocator gives is from the graph's
// pool, and must be gone or accounted for at the end. It may be made while a graph is captured: what is copied goes by
// a stream of its own, so that no graph records it and it waits for none.
inline cudaError_t keep(void** memory, const void* values, size_t bytes) {
  const Relaxed relaxed;
  void* made = nullptr;
  cudaStream_t stream = nullptr;
  cudaError_t error = cudaMalloc(&made, bytes);
  if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (error == cudaSuccess) error = cudaMemcpyAsync(made, values, bytes, cudaMemcpyHostToDevice, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  if (stream != nullptr) cudaStreamDestroy(stream);
  if (error != cudaSuccess) {
    if (made != nullptr) cudaFree(made);
    made = nullptr;
    cudaGetLastError();  // or the next launch would report it
  }
  *memory = made;
  return error;
}

}  // namespace pf
