// AVX-512 without bf16 products.
#include <immintrin.h>

#include "kernels.h"
#define PF_WORDS

namespace pf::avx512 {
#include "avx512.h"
#include "algorithm.h"
#include "avx512_int8.h"
#include "int8_algorithm.h"
}  // namespace pf::avx512

namespace pf {
Kernels avx512_kernels() { return avx512::make_kernels("avx512"); }
Int8 avx512_int8() { return avx512::int8_table(); }
}  // namespace pf
