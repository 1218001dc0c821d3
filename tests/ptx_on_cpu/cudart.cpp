// In the place of CUDA's runtime (13) beneath host code that nvcc compiled: launches run translated PTX at once, on one
// imagined device. A grid that lets the next one start is held there: the next does without it whatever it may.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <memory>
#include <span>
#include <vector>

#include "machine.h"

namespace {

// Names of the kernels, by what stands for them on the host; the first constructors fill it.
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> all;
  return all;
}
std::string fault;
struct {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
} configuration;
uint32_t seed = 0;
int processors = 4, capability = 80;
std::shared_ptr<ptx::Launch> held;

// The dynamic shared memory that blocks of a kernel are allowed. Other threads and graphs always launch it with as much
// as any launch had: it must never become less.
int most_shared() { return (capability == 80 ? 163 : 227) << 10; }
std::map<const void*, int> allowed;
int allowed_to(const void* function) { return allowed.try_emplace(function, 48 << 10).first->second; }

// The capture that records what is given to the null stream, 0: none; what is told when its graph is gone; the thread's
// mode.
uint64_t capture = 1;
std::vector<std::pair<cudaHostFn_t, void*>> told;
cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
struct Kept {
  std::vector<unsigned char> values;  // that it began as
  std::unique_ptr<unsigned char[]> memory;
};
std::vector<Kept> kept;                 // what was allocated
std::span<const unsigned char> zeroed;  // what was set to zero last

cudaError_t start(const void* function, dim3 grid, dim3 block, size_t shared, uint32_t cluster, bool overlaps,
                  void** arguments) try {
  for (const Kept& k : kept) {
    const auto begin = reinterpret_cast<uint64_t>(k.memory.get());
    ptx::memory.push_back({begin, begin + k.values.size()});
  }
  const std::string& name = names().at(function);
  const auto kernel = ptx::kernels.find(name);
  if (kernel == ptx::kernels.end()) ptx::fail("it was not translated");
  std::string parameters;
  for (size_t i = 0; i < kernel->second.parameters.size(); ++i) {
    const auto [offset, bytes] = kernel->second.parameters[i];
    parameters.resize(offset);
    parameters.append(static_cast<const char*>(arguments[i]), bytes);
  }
  if (cluster > 8 || grid.x % cluster != 0) ptx::fail("a grid that its clusters do not make up");
  if (static_cast<int>(shared) > allowed_to(function)) ptx::fail("more shared memory than its blocks are allowed");
  const auto launched = std::make_shared<ptx::Launch>(
      name, ptx::Dim3{grid.x, grid.y, grid.z}, ptx::Dim3{block.x, block.y, block.z}, static_cast<uint32_t>(shared),
      parameters, seed, cluster, std::exchange(held, nullptr));
  if (!overlaps) launched->wait_for_previous();
  launched->run();
  launched->wait_for_previous();
  if (!launched->ended()) held = launched;
  return cudaSuccess;
} catch (const std::exception& e) {
  fault = names()[function] + ": " + e.what();
  return cudaErrorLaunchFailure;
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  names()[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared;
  *static_cast<cudaStream_t*>(stream) = configuration.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t function, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t) {
  return start(function, grid, block, shared, 1, false, arguments);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  uint32_t cluster = 1;
  bool overlaps = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) cluster = attribute.val.clusterDim.x;
    if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization)
      overlaps = attribute.val.programmaticStreamSerializationAllowed;
  }
  return start(function, config->gridDim, config->blockDim, config->dynamicSmemBytes, cluster, overlaps, arguments);
}

// The driver's part of TMA: matrices, whose boxes have swizzled rows of 128 bytes.
CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* sizes,
                      const cuuint64_t* pitches, const cuuint32_t* box, const cuuint32_t* steps,
                      CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                      CUtensorMapFloatOOBfill fill) {
  const uint32_t element = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : type == CU_TENSOR_MAP_DATA_TYPE_UINT16 ? 2 : 0;
  const uint64_t at = reinterpret_cast<uint64_t>(base);
  const bool known = element != 0 && rank == 2 && steps[0] == 1 && steps[1] == 1 && fill == 0 &&
                     interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  if (!known || box[0] * element != 128 || box[1] == 0 || box[1] > 256 || at % 16 != 0 || pitches[0] % 16 != 0 ||
      sizes[0] == 0 || sizes[1] == 0 || (reinterpret_cast<uint64_t>(map) % 64) != 0)
    return CUDA_ERROR_INVALID_VALUE;
  *map = {};
  const ptx::TensorMap encoded{
      ptx::TensorMap::kMark, at, int64_t(sizes[1]), int64_t(sizes[0] * element), int64_t(pitches[0]), element, box[1]};
  std::memcpy(map, &encoded, sizeof encoded);
  return CUDA_SUCCESS;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult*) {
  if (std::string(name) != "cuTensorMapEncodeTiled") return fault = "a function of the driver", cudaErrorNotSupported;
  *function = reinterpret_cast<void*>(encode_tiled);
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return fault.empty() ? cudaSuccess : cudaErrorLaunchFailure; }
const char* cudaGetErrorString(cudaError_t) { return fault.c_str(); }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  const bool may = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && value <= most_shared();
  if (!may || value < allowed_to(function)) return fault = "its blocks are allowed less", cudaErrorInvalidValue;
  return allowed[function] = value, cudaSuccess;
}

// Some thread always captures a graph in the global mode: who is not in the relaxed mode may not allocate, nor wait.
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* other) {
  std::swap(mode, *other);
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  *status = capture != 0 && stream == nullptr ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return *id = capture, *graph = reinterpret_cast<cudaGraph_t>(&capture), cudaSuccess;
}
cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* what, cudaHostFn_t gone, unsigned, unsigned) {
  if (mode != cudaStreamCaptureModeRelaxed) return cudaErrorStreamCaptureUnsupported;
  told.emplace_back(gone, what);
  return *object = nullptr, cudaSuccess;
}
cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t, unsigned, unsigned flags) {
  const bool moves = flags == cudaGraphUserObjectMove && graph == reinterpret_cast<cudaGraph_t>(&capture);
  return moves && mode == cudaStreamCaptureModeRelaxed ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaUserObjectRelease(cudaUserObject_t, unsigned) { return cudaErrorNotSupported; }
cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  return *id = reinterpret_cast<uintptr_t>(stream), cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  zeroed = {static_cast<const unsigned char*>(std::memset(memory, value, bytes)), bytes};
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** memory, size_t bytes) {
  if (mode != cudaStreamCaptureModeRelaxed) return cudaErrorStreamCaptureUnsupported;
  kept.push_back({std::vector<unsigned char>(bytes), std::make_unique<unsigned char[]>(bytes)});
  *memory = kept.back().memory.get();
  return cudaSuccess;
}
cudaError_t cudaFree(void*) { return cudaErrorNotSupported; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  *stream = reinterpret_cast<cudaStream_t>(&mode);
  return flags == cudaStreamNonBlocking ? cudaSuccess : cudaErrorStreamCaptureImplicit;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  if (mode != cudaStreamCaptureModeRelaxed || stream == nullptr) return cudaErrorStreamCaptureUnsupported;
  std::memcpy(to, from, bytes);
  std::memcpy(kept.back().values.data(), from, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return mode == cudaStreamCaptureModeRelaxed && stream != nullptr ? cudaSuccess : cudaErrorStreamCaptureUnsupported;
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = processors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = capability % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = most_shared();
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = (capability == 80 ? 164 : 228) << 10;
      break;
    default:
      fault = "an attribute of the device that cudart.cpp does not know";
      return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

// Whatever is held goes on to its end. What is counted with must be as it was then.
__attribute__((visibility("default"))) cudaError_t ptx_finish() try {
  if (const auto last = std::exchange(held, nullptr)) last->finish();
  for (const unsigned char byte : std::exchange(zeroed, {}))
    if (byte != 0) return fault = "what was set to zero is not zero again", cudaErrorLaunchFailure;
  for (const Kept& k : kept)
    if (!std::equal(k.values.begin(), k.values.end(), k.memory.get()))
      return fault = "what is kept is not as it was", cudaErrorLaunchFailure;
  if (mode == cudaStreamCaptureModeGlobal) return cudaSuccess;
  return fault = "the thread's mode is another than before", cudaErrorLaunchFailure;
} catch (const std::exception& e) {
  fault = e.what();
  return cudaErrorLaunchFailure;
}
// How many memories there are that are never freed.
__attribute__((visibility("default"))) uint64_t ptx_kept() { return kept.size(); }
// Which capture records from now on; the graphs of earlier ones are gone.
__attribute__((visibility("default"))) void ptx_captures(unsigned number) {
  if (number > capture)
    for (const auto& [gone, what] : std::exchange(told, {})) gone(what);
  capture = number;
}
// The device, and the order of warps of what follows; forgets a fault.
__attribute__((visibility("default"))) void ptx_device(int sm, int multiprocessors, uint32_t order) {
  capability = sm, processors = multiprocessors, seed = order;
  fault.clear(), held = nullptr, zeroed = {};
}
}
