#include "api.h"
#include "device.cuh"

const char* pf_cuda_error(int32_t status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }
int32_t pf_cuda_version(void) { return CUDART_VERSION; }
