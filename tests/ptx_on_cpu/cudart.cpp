// In the place of CUDA's runtime (13) beneath host code that nvcc compiled: launches run translated PTX at once, on one
// imagined device.
#include <cuda_runtime_api.h>

#include "runtime.h"

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
                               cudaStream_t) try {
  const std::string& name = names().at(function);
  const auto kernel = ptx::kernels().find(name);
  if (kernel == ptx::kernels().end()) ptx::fail("it was not translated");
  std::string parameters;
  for (size_t i = 0; i < kernel->second.parameters.size(); ++i) {
    const auto [offset, bytes] = kernel->second.parameters[i];
    parameters.resize(offset);
    parameters.append(static_cast<const char*>(arguments[i]), bytes);
  }
  ptx::launch(kernel->second, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared, parameters.data(), seed);
  return cudaSuccess;
} catch (const std::exception& e) {
  fault = names()[function] + ": " + e.what();
  return cudaErrorLaunchFailure;
}

// Hopper's kernel for many rows asks for these; nothing here has so many.
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) {
  fault = "a launch in clusters, which cudart.cpp does not know";
  return cudaErrorNotSupported;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void**, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult*) {
  fault = "a function of the driver, which cudart.cpp does not know";
  return cudaErrorNotSupported;
}

cudaError_t cudaGetLastError() { return fault.empty() ? cudaSuccess : cudaErrorLaunchFailure; }
const char* cudaGetErrorString(cudaError_t) { return fault.c_str(); }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
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
      *value = (capability == 80 ? 163 : 227) << 10;
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

// The device, and the order of warps of what follows; forgets a fault.
__attribute__((visibility("default"))) void ptx_device(int sm, int multiprocessors, uint32_t order) {
  capability = sm, processors = multiprocessors, seed = order;
  fault.clear();
}
}
