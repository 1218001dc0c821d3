// The kernels, written once over the vocabulary `V` of an instruction set (avx512.h, avx2.cpp, neon.cpp, generic.cpp).
//
// V provides kLanes float lanes and: F (a vector of floats), C (a vector of 32-bit lanes of codes), T (a code table in
// registers), load/store/set1/zero/add/mul/fma/max/abs, conversions, code loads and `decode<column>`.
// Include inside the instruction set's own namespace; nothing here may use inline functions of the standard library,
// which a linker could pick from a file compiled for another instruction set.
#include "kernels.h"

#include "arithmetic.h"

#include "elements.h"

#include "panels.h"

#include "product.h"

#include "few_rows.h"

#include "many_rows.h"

#include "quantizer.h"

#include "elementwise.h"

#include "attention.h"

#include "prefix_attention.h"

template <class A>
Arithmetic arithmetic_table() {
  using Few = FewRows<A>;
  using Many = ManyRows<A>;
  return {Many::kElement,      kGroupLanes,       Many::kBlock,
          Many::kStride,       Many::kFewRows,    Many::kFewRowsOfZeros,
          Many::kLateRows,     Many::kHasTiles,   Many::packed_rows_bytes,
          Many::panels_bytes,  Many::pack_rows,   Many::pack_rows_t,
          Many::pack_panels_t, Many::pack_panels, Few::gemv,
          Few::dots_packed,    prefetch_first_b,  Few::to_steps,
          Many::gemm,          Few::dense,        Many::dx,
          Many::rows_times_t,  Many::logits,      Many::rows_times_panels,
          Many::rows_times};
}

Kernels make_kernels(const char* name) {
  Kernels kernels{};
  kernels.name = name;
  kernels.f32 = arithmetic_table<F32>();
#ifdef PF_BF16
  kernels.bf16 = arithmetic_table<BF16>();
  kernels.attention_bf16 = Attention<BF16>::table();
#endif
  kernels.attention_f32 = Attention<F32>::table();
#ifdef PF_WORDS
  kernels.word_rows_bytes = Product<Int16>::packed_rows_bytes;
  kernels.pack_words = pack_words;
#endif
  kernels.dots = dots;
  kernels.to_float = to_float;
  kernels.pack_pairs = pack_pairs;
  kernels.from_float = from_float;
  kernels.segment_sums = segment_sums;
  kernels.quantize = quantize;
  kernels.dequantize = dequantize;
  kernels.rms_norm = rms_norm;
  kernels.rms_norm_backward = rms_norm_backward;
  kernels.rms_norm_weight_backward = rms_norm_weight_backward;
  kernels.swiglu = swiglu;
  kernels.swiglu_backward = swiglu_backward;
  kernels.rope = rope;
  kernels.cross_entropy = cross_entropy;
  kernels.attend = attend;
  return kernels;
}
