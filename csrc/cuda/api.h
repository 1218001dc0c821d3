// The CUDA kernels as a C ABI without torch. Every pointer inside an argument is a device pointer; every call is
// asynchronous on `stream` (a cudaStream_t) of the current device, reads nothing back, and returns 0 or a cudaError_t
// (see pf_cuda_error). All that is kept from call to call is 32 KB a stream or graph and the map of pf_dynamic_map,
// made by the first call that needs them (see `keep` in device.cuh). Enumerations are those of csrc/cpu/weight.h.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// W [n, k] in storage order (bitsandbytes' own): codes of the flattened matrix, two to a byte, the high nibble first;
// one scale a block of `blocksize` consecutive elements, so that a block may straddle rows.
typedef struct {
  const uint8_t* codes;      // [ceil(n * k / 2)]
  const float* scale;        // [blocks], or null when double-quantized
  const uint8_t* scale8;     // [blocks] when double-quantized, else null
  const float* zero;         // [blocks] (INT4), or null
  const float* absmax2;      // [ceil(blocks / 256)] when double-quantized
  const float* offset;       // [1] likewise
  const float* dynamic_map;  // [256] likewise
  int64_t n, k;
  int32_t blocksize, format;
} PfWeight;

// Adds ((x * A^T) o scaling) * B^T. Slots hold adapters of one rank; a row whose slot is outside [0, slots) has none.
typedef struct {
  const void* a;            // [slots, rank, k], elements of a row side by side
  const void* b;            // [slots, n, rank]
  const float* scaling;     // [slots], or null
  const float* rank_scale;  // [rank], or null; multiplies scaling
  const int64_t* rows;      // [m] slot of each row of x, or null: all rows have slot 0
  float factor;             // likewise
  int32_t a_dtype, b_dtype;
  int64_t rank, slots;
  int64_t a_slot_stride, a_stride;                   // in elements
  int64_t b_slot_stride, b_stride, b_column_stride;  // in elements
} PfLora;

// The most rows that pf_linear_4bit takes for this weight and dtype on the current device; 0: none at all.
int64_t pf_linear_4bit_most_rows(const PfWeight* w, int32_t dtype);
// Bytes of device memory that pf_linear_4bit needs as `workspace`: in any state, and done with when the call is.
int64_t pf_linear_4bit_workspace(const PfWeight* w, const PfLora* lora, int64_t m);
// y [m, n] = x [m, k] * W^T + bias + branch. x: rows ldx elements apart, of `dtype` (bf16 or fp16), as y; bias [n] of
// bias_dtype, or null; lora null: no branch. Any alignment; K % 64 == 0 with codes and rows of x at multiples of 16
// bytes is the fast case.
int32_t pf_linear_4bit(const PfWeight* w, const void* x, int64_t ldx, const void* bias, int32_t bias_dtype,
                       const PfLora* lora, void* y, int64_t m, int32_t dtype, void* workspace, void* stream);
// Rows [row0, row0 + rows) of W as `dtype` into out [rows, k].
int32_t pf_dequantize_4bit(const PfWeight* w, int64_t row0, int64_t rows, void* out, int32_t dtype, void* stream);
// The inverse for `count` elements of `dtype`, contiguous: codes [ceil(count / 2)], scale [blocks], zero [blocks]
// (INT4).
int32_t pf_quantize_4bit(const void* src, int32_t dtype, int64_t count, int32_t format, int32_t blocksize,
                         uint8_t* codes, float* scale, float* zero, void* stream);
// The 8-bit code of double-quantized scales on the current device: the first call there copies `values` [256], and may
// do so while a graph is captured.
int32_t pf_dynamic_map(const float* values, const float** map);
// What went wrong, in words.
const char* pf_cuda_error(int32_t status);
// CUDA's version of the toolkit that built this, as 13000 for 13.0.
int32_t pf_cuda_version(void);
// The compute capabilities that it was built for, as "8.0 9.0a". Others from 8.0 on compile 8.0's PTX, but for 9.0,
// which has kernels of its own.
const char* pf_cuda_architectures(void);

#ifdef __cplusplus
}
#endif
