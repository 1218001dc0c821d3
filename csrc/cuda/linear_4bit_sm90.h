// What linear_4bit.cu calls on GPUs of compute capability 9.0; arguments as in api.h.
#pragma once
#include "api.h"

#ifdef __cplusplus
extern "C" {
#endif

// The most rows that pf_linear_4bit_sm90 takes for this weight and dtype on the current device; 0: none at all.
int64_t pf_linear_4bit_sm90_most_rows(const PfWeight* w, int32_t dtype);
// Whether it takes these rows of x and y, whose alignment matters.
int32_t pf_linear_4bit_sm90_takes(const PfWeight* w, const void* x, int64_t ldx, const void* y, int64_t m,
                                  int32_t dtype);
// s: m * rank floats of device memory, in any state.
int32_t pf_linear_4bit_sm90(const PfWeight* w, const void* x, int64_t ldx, const void* bias, int32_t bias_dtype,
                            const PfLora* lora, void* y, int64_t m, int32_t dtype, float* s, void* stream);

#ifdef __cplusplus
}
#endif
