#include "api.h"

const char* pf_cuda_architectures(void) { return PF_CUDA_ARCHITECTURES; }
