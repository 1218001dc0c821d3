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
  return {.element = Many::kElement,
          .group_lanes = kGroupLanes,
          .block = Many::kBlock,
          .stride = Many::kStride,
          .few_rows = Many::kFewRows,
          .few_rows_of_zeros = Many::kFewRowsOfZeros,
          .late_rows = Many::kLateRows,
          .tiles = Many::kHasTiles,
          .packed_rows_bytes = Many::packed_rows_bytes,
          .panels_bytes = Many::panels_bytes,
          .pack_rows = Many::pack_rows,
          .pack_rows_t = Many::pack_rows_t,
          .pack_panels_t = Many::pack_panels_t,
          .pack_panels = Many::pack_panels,
          .gemv = Few::gemv,
          .dots_packed = Few::dots_packed,
          .prefetch_b = prefetch_first_b,
          .to_steps = Few::to_steps,
          .gemm = Many::gemm,
          .dx = Many::dx,
          .dense = Few::dense,
          .rows_times_t = Many::rows_times_t,
          .logits = Many::logits,
          .rows_times_panels = Many::rows_times_panels,
          .rows_times = Many::rows_times};
}

Kernels make_kernels(const char* name) {
  Kernels kernels{};
  kernels.name = name;
  kernels.lanes = kLanes;
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
  kernels.swiglu = gated<Silu>;
  kernels.geglu = gated<Gelu>;
  kernels.swiglu_backward = swiglu_backward;
  kernels.rope = rope;
  kernels.cross_entropy = cross_entropy;
  kernels.sum_rows = sum_rows;
  kernels.attend = attend;
  return kernels;
}
