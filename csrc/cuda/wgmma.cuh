// What sm_90a adds, one instruction a function: barriers in shared memory, tiles that are copied by the tensor memory
// accelerator (TMA), the product of a warpgroup (wgmma), clusters. A kernel that includes this holds no inline PTX.
//
// A tile here is rows of 128 bytes, swizzled: 16-byte chunk c of row r lies at chunk c ^ (r % 8). TMA writes it so and
// wgmma reads it so; a tile begins at a multiple of 1024 bytes.
#pragma once
#include <cuda.h>
#include <type_traits>

#include "device.cuh"

// Whether this is the host's pass or code for sm_90a; others compile kernels of these instructions to nothing.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PF_SM90A 1
#elif __CUDA_ARCH__ == 900
#error "build for sm_90a: a kernel compiled to nothing would run on a Hopper GPU"
#else
#define PF_SM90A 0
#endif

namespace pf {

// All of the block's dynamic shared memory; the swizzle counts from a multiple of 1024 bytes.
PF_DEVICE unsigned char* swizzled_memory() {
  extern __shared__ __align__(1024) unsigned char tiles[];
  return tiles;
}

// v, of which the compiler knows nothing.
PF_DEVICE uint32_t opaque(uint32_t v) {
  asm("" : "+r"(v));
  return v;
}

// ---- barriers in shared memory ----

using Barrier = uint64_t;

// A phase ends after `count` arrivals and when the bytes that were announced have come.
PF_DEVICE void barrier_init(Barrier* b, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count));
}
// Barriers that this thread initialized are seen by the cluster and by TMA; before the cluster_sync that publishes
// them.
PF_DEVICE void barriers_initialized() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

PF_DEVICE void barrier_arrive(Barrier* b, int count = 1) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(count) : "memory");
}
// The same on block `rank` of the cluster, whose barrier lies where `b` lies here. It orders what this block did for
// this block alone (a fence for the cluster would cost more than a step): enough to give buffers back.
PF_DEVICE void barrier_arrive_at(Barrier* b, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(b)),
      "r"(rank)
      : "memory");
}
// Arrives, and announces bytes that TMA will bring.
PF_DEVICE void barrier_expect(Barrier* b, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
}
// Waits for the end of the phase of this parity; a barrier begins in phase 0, the one before it (parity 1) has ended.
PF_DEVICE void barrier_wait(Barrier* b, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred ended;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@!ended bra again;\n}" ::"r"(shared_address(b)),
      "r"(parity)
      : "memory");
}
// Barrier `id` (not 0, which is __syncthreads') among `threads` threads.
PF_DEVICE void named_sync(int id, int threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- TMA ----

using TileMap = CUtensorMap;

// The box of `map` at (column, row), swizzled, zero where it leaves the matrix; its bytes count at `b`.
PF_DEVICE void load_tile(void* tile, const TileMap* map, int column, int row, Barrier* b, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(tile)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(b)), "l"(policy)
      : "memory");
}
// The same into every block of the cluster that has its bit in `blocks`, at its own `tile` and `b`.
PF_DEVICE void load_tile_to(void* tile, const TileMap* map, int column, int row, Barrier* b, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(tile)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(b)), "h"(blocks)
      : "memory");
}
// What this thread stored in shared memory is seen by wgmma once a barrier has followed.
PF_DEVICE void stores_to_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- clusters and grids ----

PF_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
PF_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// Where block `rank` of the cluster has what lies at `p` in this one's shared memory.
template <class T>
PF_DEVICE const T* shared_of(const T* p, uint32_t rank) {
  uint64_t there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(p), "r"(rank));
  return reinterpret_cast<const T*>(there);
}
// The kernel that was launched after this one may begin.
PF_DEVICE void let_next_grid_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
// The kernel before this one has ended, and what it wrote is seen.
PF_DEVICE void wait_for_previous_grid() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Registers that a thread of a kernel begins with.
#define PF_REGISTERS(n) __maxnreg__(n)
// From here on, of a whole warpgroup; all of a block's threads may not have more than they began with.
template <int N>
PF_DEVICE void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
PF_DEVICE void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// ---- wgmma ----

// A tile as an operand whose rows hold the contraction: begin / 16 in bits 0-13, 1024 / 16 bytes from eight rows to the
// next in bits 32-45, the swizzle of 128 bytes in bits 62-63. Along a row, and to tiles beside it, it advances by
// bytes / 16.
PF_DEVICE uint64_t tile_operand(const void* tile) {
  return (shared_address(tile) & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{64} << 32 | uint64_t{1} << 62;
}
// Before the first wgmma that reads registers which were written since the last.
PF_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// The same, and `d` is written before: the compiler may move a constant past a fence that does not name it.
template <int D>
PF_DEVICE void wgmma_fence(float (&d)[D]) {
#pragma unroll
  for (int i = 0; i < D; ++i) asm volatile("" : "+f"(d[i])::"memory");
  wgmma_fence();
}
PF_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All but the last N groups are done: their operands may be overwritten, their sums read.
template <int N>
PF_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

#define PF_0_7 "%0,%1,%2,%3,%4,%5,%6,%7"
#define PF_0_15 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define PF_16_31 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define PF_32_63                                                                                             \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57," \
  "%58,%59,%60,%61,%62,%63"
#define PF_SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PF_SUMS_16(i) PF_SUMS_4(i), PF_SUMS_4(i + 4), PF_SUMS_4(i + 8), PF_SUMS_4(i + 12)
// d += a * b, the 64 rows of a in registers.
#define PF_WGMMA(N, TYPE, SUMS, A0, A1, A2, A3, B, ...)                                                                \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" SUMS "}, {%" #A0 ",%" #A1 ",%" #A2 \
               ",%" #A3 "}, %" #B ", 1, 1, 1, 0;"                                                                      \
               : __VA_ARGS__                                                                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
// The same in tf32, both operands tiles.
#define PF_WGMMA_TF32(N, SUMS, A, B, ...)                                                                       \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k8.f32.tf32.tf32 {" SUMS "}, %" #A ", %" #B ", 1, 1, 1;" \
               : __VA_ARGS__                                                                                    \
               : "l"(a), "l"(b))

// d [64, 2 * D] += a [64, 16] * b^T, b 2 * D rows of a tile, T bf16 or fp16. Warp w of the warpgroup has rows 16 w to
// 16 w + 15. Of lane 4 g + t: a[0] row g, columns 2 t and 2 t + 1, a[1] row g + 8, a[2] and a[3] the same with columns
// 8 on; d[4 j + i] row g + 8 (i / 2), column 8 j + 2 t + i % 2.
template <class T, int D>
PF_DEVICE void wgmma(float (&d)[D], const uint32_t (&a)[4], uint64_t b) {
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  if constexpr (D == 16 && kBf16) PF_WGMMA(32, "bf16", PF_0_15, 16, 17, 18, 19, 20, PF_SUMS_16(0));
  if constexpr (D == 16 && !kBf16) PF_WGMMA(32, "f16", PF_0_15, 16, 17, 18, 19, 20, PF_SUMS_16(0));
  if constexpr (D == 32 && kBf16)
    PF_WGMMA(64, "bf16", PF_0_15 "," PF_16_31, 32, 33, 34, 35, 36, PF_SUMS_16(0), PF_SUMS_16(16));
  if constexpr (D == 32 && !kBf16)
    PF_WGMMA(64, "f16", PF_0_15 "," PF_16_31, 32, 33, 34, 35, 36, PF_SUMS_16(0), PF_SUMS_16(16));
  if constexpr (D == 64 && kBf16)
    PF_WGMMA(128, "bf16", PF_0_15 "," PF_16_31 "," PF_32_63, 64, 65, 66, 67, 68, PF_SUMS_16(0), PF_SUMS_16(16),
             PF_SUMS_16(32), PF_SUMS_16(48));
  if constexpr (D == 64 && !kBf16)
    PF_WGMMA(128, "f16", PF_0_15 "," PF_16_31 "," PF_32_63, 64, 65, 66, 67, 68, PF_SUMS_16(0), PF_SUMS_16(16),
             PF_SUMS_16(32), PF_SUMS_16(48));
}
// d [64, 2 * D] += a [64, 8] * b [2 * D, 8]^T, both in tiles of float32, of which 10 bits of the fraction count.
template <int D>
PF_DEVICE void wgmma_tf32(float (&d)[D], uint64_t a, uint64_t b) {
  if constexpr (D == 8) PF_WGMMA_TF32(16, PF_0_7, 8, 9, PF_SUMS_4(0), PF_SUMS_4(4));
  if constexpr (D == 16) PF_WGMMA_TF32(32, PF_0_15, 16, 17, PF_SUMS_16(0));
  if constexpr (D == 32) PF_WGMMA_TF32(64, PF_0_15 "," PF_16_31, 32, 33, PF_SUMS_16(0), PF_SUMS_16(16));
  if constexpr (D == 64)
    PF_WGMMA_TF32(128, PF_0_15 "," PF_16_31 "," PF_32_63, 64, 65, PF_SUMS_16(0), PF_SUMS_16(16), PF_SUMS_16(32),
                  PF_SUMS_16(48));
}
// The nearest tf32, a tie away from zero: wgmma alone would cut off.
PF_DEVICE float to_tf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return __uint_as_float(bits);
}

// ---- host ----

// A matrix [rows, columns] of elements of `size` bytes (1: bytes, 2: what wgmma takes), rows `pitch` bytes apart, in
// boxes of box_rows times 128 bytes. Base and pitch are multiples of 16.
inline cudaError_t map_tiles(TileMap* map, const void* base, int size, int64_t rows, int64_t columns, int64_t pitch,
                             int box_rows) {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION < 12050  // CUDA 13 has the other alone
    const cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#else
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#endif
    return status == cudaSuccess ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found) : nullptr;
  }();
  if (encode == nullptr) return cudaErrorSymbolNotFound;
  const cuuint64_t dims[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(pitch)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(128 / size), static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  const CUresult status =
      encode(map, size == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 2,
             const_cast<void*>(base), dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// `kernel` in clusters of `cluster` blocks; `overlap`: it may begin once the kernel before lets it.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_clusters(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, int cluster,
                            bool overlap, void* stream, const Arguments&... arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (const cudaError_t status = allow_shared_memory(function, shared_bytes)) return status;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = cluster;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = overlap;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = overlap ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace pf
