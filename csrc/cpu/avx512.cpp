// AVX-512 without bf16 products.
#include <immintrin.h>

#include "kernels.h"

namespace pf::avx512 {
#include "avx512.h"
#include "algorithm.h"
}  // namespace pf::avx512

namespace pf {
Kernels avx512_kernels() { return avx512::make_kernels("avx512"); }
}  // namespace pf
