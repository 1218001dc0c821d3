// AVX-512 for CPUs that start two bf16 products in a cycle and read best into the first-level cache: Zen 5.
#include <immintrin.h>

#include "kernels.h"
#define PF_BF16
#define PF_BF16X2

namespace pf::avx512_bf16x2 {
#include "avx512.h"
#include "algorithm.h"
#include "avx512_int8.h"
#include "int8_algorithm.h"
}  // namespace pf::avx512_bf16x2

namespace pf {
Kernels avx512_bf16x2_kernels() { return avx512_bf16x2::make_kernels("avx512_bf16x2"); }
Int8 avx512_bf16x2_int8() { return avx512_bf16x2::int8_table(); }
}  // namespace pf
