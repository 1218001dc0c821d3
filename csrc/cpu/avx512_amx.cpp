// AVX-512 with bf16 products, and AMX for many rows.
#include <immintrin.h>

#include "kernels.h"
#define PF_BF16
#define PF_TILES

namespace pf::avx512_amx {
#include "avx512.h"
#include "amx.h"
#include "algorithm.h"
#include "avx512_int8.h"
#include "int8_algorithm.h"
}  // namespace pf::avx512_amx

namespace pf {
Kernels avx512_amx_kernels() { return avx512_amx::make_kernels("avx512_amx"); }
Int8 avx512_amx_int8() { return avx512_amx::int8_table(); }
}  // namespace pf
