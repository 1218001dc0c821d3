// AVX-512 with bf16 products.
#include <immintrin.h>

#include "kernels.h"
#define PF_BF16

namespace pf::avx512_bf16 {
#include "avx512.h"
#include "algorithm.h"
#include "avx512_int8.h"
#include "int8_algorithm.h"
}  // namespace pf::avx512_bf16

namespace pf {
Kernels avx512_bf16_kernels() { return avx512_bf16::make_kernels("avx512_bf16"); }
Int8 avx512_bf16_int8() { return avx512_bf16::int8_table(); }
}  // namespace pf
