// The int8-activation tier: y = x * W^T with x rounded to 8 bits a row and unit of columns, W decoded to 8 bits.
//
// With x ~ scale * q and w ~ absmax * (c - shift) / step, a unit contributes absmax * scale / step * (sum of c q -
// shift * sum of q): one integer dot product, whose sum starts at the second term, one conversion and two float
// operations. All the rest is integer. The shift is the weight's own: its values' rounding, which does not cancel out
// by itself, adds up where x has a mean (x = relu: 8 % of y with outliers in the weight, and the more the longer the
// rows).
#pragma once
#include "weight.h"

namespace pf {

// A format's 16 values in 8 bits: code / step, |code| <= 127.
struct ByteTable {
  int8_t code[16];
  float step;
};
extern const ByteTable kByteTables[3];

constexpr int kByteBlock = 512;              // columns of a ByteRow
constexpr int kByteUnits = kByteBlock / 32;  // units in it at most

// A block of columns of one row of x. Columns lie, eight at a time, in the order that a shift of the weight's codes
// leaves them in (see weight.h): 0 4 1 5, then 2 6 3 7.
struct ByteRow {
  int8_t x[kByteBlock];
  float scale[kByteUnits];    // of a unit, over the table's step
  int32_t start[kByteUnits];  // what a unit's integer sum starts at
  float sum[kByteUnits];      // sum of x over a unit, after rounding
};

struct Int8Args {
  Weight w;
  const ByteRow* x;  // [blocks][rows]
  int64_t rows;
  const float* bias;  // [N] or null
  PackedRows s;       // [rows, R] scaled; data null without a branch
  bool s_is_bf16;     // its arithmetic
  Matrix lora_b;      // [N, R]
  void* y;            // [rows, N]
  int y_dtype;
};

// The part of the tier that an instruction set provides.
struct Int8 {
  int64_t group_tiles;  // tiles that are computed together
  int64_t row_chunk;    // at most so many rows share what product decodes: it takes no more
  int64_t exact_rows;   // up to here the exact product of bf16 takes no longer: reading the weight takes the time
  int64_t most_rows;    // from here on that of bf16 as 16-bit integers takes no longer, where there is one
  float (*shift)(const Weight& w);
  void (*quantize)(const Matrix& x, const Weight& w, float shift, ByteRow* out, int64_t row0, int64_t row1);
  // Rows [row0, row1) of tiles [tile0, tile1).
  void (*product)(const Int8Args&, int64_t row0, int64_t row1, int64_t tile0, int64_t tile1);
};

// Columns that share a scale of x: 64, and 32 where the weight's 8 bits leave less room for error, because the values
// of longer blocks crowd around zero.
PF_INLINE int64_t byte_unit(const Weight& w) {
  return w.segment % 64 == 0 && (w.format == kINT4 || w.blocksize == 64) ? 64 : 32;
}

// For an instruction set's vocabulary B over V whose reductions come to numbers one by one.
template <class V>
struct ByUnit {
  static constexpr int64_t kExactRows = 0, kMostRows = INT64_MAX;
  static void join_max(const float* of, float* out) { __builtin_memcpy(out, of, kByteUnits * sizeof(float)); }
  static void join_sum(const int32_t* of, int32_t* out) { __builtin_memcpy(out, of, kByteUnits * sizeof(int32_t)); }
  static void join_sum(const typename V::F* of, float* out) {
    for (int u = 0; u < kByteUnits; ++u) out[u] = V::reduce(of[u]);
  }
};

}  // namespace pf
