// The interface of an instruction set: a table of kernels. Kernels do no threading and no dispatch; each computes the
// part of the output it is asked for, so the caller decides how work is split.
#pragma once
#include "int8.h"
#include "weight.h"

namespace pf {

// The dropout of the LoRA branch: element (row, column) survives when a hash of its place and `seed` is at least
// `threshold` (= p * 2^32). Off when threshold is 0.
struct Dropout {
  uint64_t seed = 0;
  uint32_t threshold = 0;
  float scale = 1.0f;  // 1 / (1 - p)
};

struct GemvArgs {  // y[m, tile rows] for rows <= 16
  Weight w;
  const void* x;  // [rows, K] in the arithmetic's element type, contiguous columns
  int x_dtype;    // what it was before
  int64_t ldx, rows;
  const float* xsum;  // [rows, segments] sums of x over each segment, or null (formats without a zero)
  const float* bias;  // [N] or null
  const void* s;      // [rows, R] scaled, in the arithmetic's element type, rows padded to an even length; or null
  Matrix lora_b;      // [N, R]
  void* y;            // [rows, N]
  int y_dtype;
};

// Rows of x as 16-bit integers.
struct WordRows {
  const void* data = nullptr;
  const uint8_t* left_out = nullptr;  // [rows] those that this way does not serve, or null: none
};

struct GemmArgs {  // y = x * W^T + s * B^T + (base or bias)
  Weight w;        // K may be 0
  bool late;       // scales multiply the sums: not where the weight has zeros
  PackedRows x, s;
  Matrix lora_b;  // [N, R]; data null without a branch
  const float* bias;
  void* y;  // [rows, N]
  int y_dtype;
  Matrix base;          // [rows, N], or data null
  WordRows words = {};  // x once more, or data null; then x serves the rows that it leaves out
};

struct DenseArgs {  // y [rows, N] = x * W^T + s * B^T + bias for up to kTile rows and a weight [N, K] in full precision
  Matrix w, x;
  const float* xf;  // x in float32
  int64_t ldxf;
  PackedRows s;
  Matrix lora_b;  // [N, R]; data null without a branch
  const float* bias;
  void* y;
  int y_dtype;
};

// Few rows of x as one of the ways of decoding (few_rows.h) reads them.
template <class Elem>
struct FewColumns {
  const Elem* data;
  int64_t ld;
  const float* scale = nullptr;  // [rows, units of columns], of the ways that scale x
  int64_t ld_scale = 0;
  uint32_t left_out = 0;  // bits: rows that this way does not serve; their results mean nothing
};

struct DxArgs {    // dx = dy * W + ds * A
  Weight w;        // N may be 0
  const void* dy;  // panels of dy, from pack_panels_t: lanes are rows, contraction over N
  const void* ds;  // panels of ds: lanes are rows, contraction over R; null without a branch
  Matrix lora_a;   // [R, K]
  int64_t rows;
  Dropout dropout;  // applied to the branch's part
  void* dx;         // [rows, K]
  int dx_dtype;
  int64_t cols;  // K
};

// The matrices of the three below share a dtype and a shape; results are contiguous.
struct RmsNormArgs {   // sum = x + residual (sum = x without one); y = sum / sqrt(mean(sum^2) + eps) * weight
  Matrix x, residual;  // residual's data may be null
  const void* weight;  // [cols]
  float eps;
  void *sum, *y;
  bool from_one = false;  // 1 + weight takes the place of weight, and only the product is rounded, as Gemma's
};

struct RmsNormBackwardArgs {  // x is the forward's sum
  Matrix dy, x;
  const void* weight;
  float eps;
  void* dx;
  float* inverse;  // [rows] 1 / sqrt(mean(x^2) + eps), for the weight's gradient
};

struct RopeArgs {
  const void* x;  // [batch, heads, tokens, dim], the last dimension contiguous
  int dtype;
  int64_t tokens, heads, dim;
  int64_t strides[3];     // of batch, heads and tokens, in elements
  const void *cos, *sin;  // [batch or 1, tokens, dim]
  int64_t angle_stride;   // tokens, or 0 where all rows share the angles
  bool transposed;        // the gradient
  void* y;                // [batch, tokens, heads, dim], the last dimension contiguous
  int64_t y_strides[2];   // of tokens, counted over the batch, and heads
};

struct CrossEntropyArgs {
  void* logits;  // [rows, cols], rows ld elements apart; become their gradient
  int dtype;
  int64_t cols, ld;
  int64_t block, block_stride;  // so many columns lie side by side, and so many elements from there to the next ones
  const int64_t* labels;        // [rows], each below cols
  float* losses;                // [rows]
};

struct SumRowsArgs {  // y[r] = the sum of x's rows first[r], next[first[r]], and so on until one is below 0
  Matrix x;
  const int64_t *first, *next;
  void* y;  // [any, x.cols]
};

constexpr int32_t kHiddenKey = 1 << 30;  // is added to the place of a key that nobody sees; from half of it on, none is
constexpr int64_t kMostWindow = 1 << 30;  // beyond any place of a key, and far from overflow
constexpr int64_t kMostHeadSize = 256;

struct AttentionArgs {
  const void *q, *k, *v;  // [batch, heads, tokens, dim]; k, v [batch, kv_heads, length, dim]; dim contiguous
  int dtype;
  int64_t batch, heads, kv_heads, tokens, length, dim;
  int64_t q_strides[3], k_strides[3], v_strides[3];  // of batch, heads and tokens, in elements
  const void *prefix_k, *prefix_v;                   // [slots, kv_heads, prefix_length, dim], or null
  int64_t slots, prefix_length;
  int64_t prefix_k_strides[3], prefix_v_strides[3];
  const int64_t* prefix_index;    // [batch] or null: slot 0
  const int64_t* prefix_lengths;  // [slots] or null
  const int32_t* positions;       // [batch, length] the keys' places, counted from the first query's; or null: the last
                                  // `tokens` are the queries' own
  bool causal;
  int64_t window;  // 0: none
  float scale;
  void* out;               // [batch, heads, tokens, dim]
  int64_t out_strides[3];  // of batch, heads and tokens
  float* lse;              // [batch, kv_heads, tokens, heads / kv_heads] log2 of the sum of 2^(score * log2 e)

  // Of the prefix that a row sees, -1 where it has none.
  PF_INLINE int64_t prefix_slot(int64_t row) const {
    return prefix_k == nullptr ? -1 : prefix_index == nullptr ? 0 : prefix_index[row];
  }
  PF_INLINE int64_t prefix_keys(int64_t slot) const {
    return slot < 0 ? 0 : prefix_lengths == nullptr ? prefix_length : prefix_lengths[slot];
  }
};

// Results of the same queries from other keys, to be joined to those at hand.
struct OtherKeys {
  int64_t results = 0;
  const void* out = nullptr;   // with the strides of the result
  int64_t out_stride = 0;      // from one to the next, in elements
  const float* lse = nullptr;  // rows [tokens, heads / kv_heads] are contiguous
  int64_t lse_strides[3];      // of batch, kv_heads and results
};

struct AttentionBackwardArgs {
  AttentionArgs forward;  // its `out` may be null where most_chunks is 1
  const void* dout;       // [batch, heads, tokens, dim], dim contiguous
  int64_t dout_strides[3];
  void *dq, *dk, *dv;            // dq as out; dk, dv [batch, length, kv_heads, dim]
  float *prefix_dk, *prefix_dv;  // [batch, kv_heads, prefix_length, dim], of each row's own prefix
  // Into how many units the keys of one batch row and head are split. With more than one, `dq_parts` holds chunks *
  // part_size floats, and sum_parts makes dq of them.
  int64_t chunks;
  float* dq_parts;
  char* packed;  // packed_size bytes, which pack has filled; or null: each unit packs its queries by itself
};

// Attention with a prefix in one arithmetic.
struct AttentionKernels {
  int64_t (*forward_blocks)(const AttentionArgs&);
  void (*forward)(const AttentionArgs&, int64_t unit);  // units: forward_blocks * batch * kv_heads
  int64_t (*most_chunks)(const AttentionArgs&);
  int64_t (*packed_size)(const AttentionArgs&);
  int64_t (*part_size)(const AttentionArgs&);
  int64_t (*query_groups)(const AttentionArgs&);
  // Units: batch * kv_heads * query_groups, but of backward chunks * batch * kv_heads.
  void (*pack)(const AttentionBackwardArgs&, int64_t unit);
  void (*backward)(const AttentionBackwardArgs&, int64_t unit);
  void (*sum_parts)(const AttentionBackwardArgs&, int64_t unit);
};

constexpr int64_t kLogits = 64;  // that are computed together
// At most so many rows share what gemm and dx make of the weight, and their float32 results a cache: more share what
// decoding and packing cost (512 rows on Zen 5: 1.045 times dense bf16, not 1.012; dx of dense float32 on Zen 4: 0.97
// of the time, on Zen 3 0.96).
constexpr int64_t kRowChunk = 512;
constexpr int64_t kWordRows = 256;  // the same where x is in integers

// One arithmetic: float32 FMA, or bf16 pairs into float32.
struct Arithmetic {
  int element;                // dtype
  int64_t group_lanes;        // lanes of a panel
  int64_t block, stride;      // columns of a block of PackedRows, elements from one row of it to the next
  int64_t few_rows;           // up to here gemv is faster than gemm
  int64_t few_rows_of_zeros;  // the same where the weight has zeros
  int64_t late_rows;          // up to here scales cost less on the sums than on the weights
  bool tiles;                 // gemm has instructions that multiply tiles of rows
  int64_t (*packed_rows_bytes)(int64_t rows, int64_t cols);
  int64_t (*panels_bytes)(int64_t lanes, int64_t contraction);
  // Rows [row0, row1) of `src` into PackedRows of `src.rows` rows.
  void (*pack_rows)(const Matrix& src, const Dropout&, void* dst, int64_t row0, int64_t row1);
  // The transpose of `src` into PackedRows: its columns become rows.
  void (*pack_rows_t)(const Matrix& src, void* dst);
  // Vector-side operand with lanes = rows of `src` (contraction contiguous): lane groups [group0, group1).
  void (*pack_panels_t)(const Matrix& src, void* dst, int64_t group0, int64_t group1);
  // The same with lanes = columns of `src` (contraction along the rows).
  void (*pack_panels)(const Matrix& src, void* dst, int64_t group0, int64_t group1);
  void (*gemv)(const GemvArgs&, int64_t tile0, int64_t tile1);
  // Rows of x (as GemvArgs has them) times tiles [tile0, tile1) of a packed matrix over its columns [col0, col1), both
  // even: the tiles' part of out [rows, p.rows]. `next` is what the caller reads after p.
  void (*dots_packed)(const GemvArgs& x, const Matrix& p, int64_t tile0, int64_t tile1, int64_t col0, int64_t col1,
                      const void* next, float* out);
  // Prefetches what gemv reads first of the branch's B.
  void (*prefetch_b)(const Matrix& b, int64_t tile0);
  // Float32 [rows, cols] to the element type, rows of odd length padded with a zero.
  void (*to_steps)(const float* src, int64_t rows, int64_t cols, void* dst);
  // Rows [row0, row1) of tiles [tile0, tile1), or of columns [col0, col1), where row0 is a multiple of the lanes.
  void (*gemm)(const GemmArgs&, int64_t row0, int64_t row1, int64_t tile0, int64_t tile1);
  void (*dx)(const DxArgs&, int64_t row0, int64_t row1, int64_t col0, int64_t col1);
  void (*dense)(const DenseArgs&, int64_t group0, int64_t group1);  // groups of group_lanes rows of W
  // out [rows, lanes] float32 = x * p^T for a matrix p [lanes, contraction]: rows [row0, row1), over the contraction
  // from `begin`, the beginning of a block, to `end`.
  void (*rows_times_t)(const PackedRows& x, const Matrix& p, float* out, int64_t row0, int64_t row1, int64_t begin,
                       int64_t end);
  // Rows [row0, row1) of w times panels of `rows` lanes, transposed: columns of PackedRows `out` of `rows` rows. row0
  // is a multiple of kLogits.
  void (*logits)(const Matrix& w, const void* panels, int64_t rows, void* out, int64_t row0, int64_t row1);
  // out [rows, lanes] float32 = x * p for panels p: lane groups [group0, group1).
  void (*rows_times_panels)(const PackedRows& x, const void* panels, int64_t lanes, float* out, int64_t group0,
                            int64_t group1);
  // out [rows, lanes] float32 = x * p for a plain matrix p [contraction, lanes]: lanes [lane0, lane1), optionally
  // stored transposed as [lanes, rows], with dropout on p.
  void (*rows_times)(const PackedRows& x, const Matrix& p, const Dropout&, float* out, bool transposed, int64_t lane0,
                     int64_t lane1);
};

struct Kernels {
  const char* name;
  int64_t lanes;  // of a vector of float32
  Arithmetic f32;
  Arithmetic bf16;                                 // gemv null where the instruction set has no bf16 products
  bool slow_bf16;                                  // a bf16 product takes longer than two of float32
  bool outruns_mkl;                                // in products of float32 of many rows
  AttentionKernels attention_f32, attention_bf16;  // forward null where there are no bf16 products
  PF_INLINE const AttentionKernels& attention(int dtype) const {
    return dtype == kBFloat16 && attention_bf16.forward != nullptr ? attention_bf16 : attention_f32;
  }
  Int8 int8;
  const Kernels* of_int8 = nullptr;  // whose tier of 8 bits serves instead; what it reads lies as these lay it out
  // Rows [row0, row1) of bf16 into WordRows of `src.rows` rows; null where f32.gemm has no faster products for these.
  void (*pack_words)(const Matrix& src, const Weight& w, void* dst, uint8_t* left_out, int64_t row0, int64_t row1);
  int64_t (*word_rows_bytes)(int64_t rows, int64_t cols);
  // s[m, r] = x[m] . a[r] for few rows; x float32 [rows, K].
  void (*dots)(const float* x, int64_t ldx, int64_t rows, const Matrix& a, float* s, int64_t r0, int64_t r1);
  void (*to_float)(const void* src, int dtype, float* dst, int64_t n);
  // Tiles [tile0, tile1) of a packed matrix.
  void (*pack_pairs)(const Matrix& src, uint16_t* dst, int64_t tile0, int64_t tile1);
  void (*from_float)(const float* src, char* dst, int dtype, int64_t n);
  void (*segment_sums)(const float* x, int64_t segment, int64_t segments, float* out);
  // Blocks [block0, block1) of a flat tensor of n elements.
  void (*quantize)(const void* src, int dtype, int64_t n, int format, int64_t blocksize, uint8_t* codes, float* scale,
                   float* zero, int64_t block0, int64_t block1);
  void (*dequantize)(const uint8_t* codes, const float* scale, const float* zero, int64_t n, int format,
                     int64_t blocksize, void* dst, int dtype, int64_t block0, int64_t block1);
  // Parts of a decoder layer: elementwise.h.
  void (*rms_norm)(const RmsNormArgs&, int64_t row0, int64_t row1);
  void (*rms_norm_backward)(const RmsNormBackwardArgs&, int64_t row0, int64_t row1);
  void (*rms_norm_weight_backward)(const RmsNormBackwardArgs&, float* dweight, int64_t col0, int64_t col1);
  void (*swiglu)(const Matrix& gate, const Matrix& up, void* y, int64_t row0, int64_t row1);
  void (*geglu)(const Matrix& gate, const Matrix& up, void* y, int64_t row0, int64_t row1);
  void (*swiglu_backward)(const Matrix& dy, const Matrix& gate, const Matrix& up, void* dgate, void* dup, int64_t row0,
                          int64_t row1);
  void (*rope)(const RopeArgs&, int64_t token0, int64_t token1);  // tokens counted over the batch
  void (*cross_entropy)(const CrossEntropyArgs&, int64_t row0, int64_t row1);
  void (*sum_rows)(const SumRowsArgs&, int64_t row0, int64_t row1);
  // Attention for few queries, at the speed of reading the keys: those of the prefix where there is one, else the
  // tokens. Units are batch rows times kv_heads. lse may be null.
  void (*attend)(const AttentionArgs&, const OtherKeys&, int64_t unit0, int64_t unit1);
};

// Scratch of the calling thread, 64-byte aligned, until its next call for that slot; `slot` keeps concurrent uses
// apart: 0 and 1 those within a kernel, a Slot those around kernels.
void* scratch(int slot, int64_t bytes);
enum Slot {
  kSlotX = 2,
  kSlotDropped,
  kSlotS,
  kSlotFactor,
  kSlotDy,
  kSlotDs,
  kSlotWords,
  kSlotDecoder,
  kSlotAttend,
  kSlots
};

// Hands out aligned parts of a scratch, which must have room for 63 bytes more a part.
struct Memory {
  char* next;

  PF_INLINE Memory(int slot, int64_t bytes) : next(static_cast<char*>(scratch(slot, bytes))) {}
  PF_INLINE explicit Memory(char* bytes) : next(bytes) {}
  template <class T>
  PF_INLINE T* take(int64_t n) {
    T* taken = reinterpret_cast<T*>(next);
    next += (n * sizeof(T) + 63) / 64 * 64;
    return taken;
  }
};

}  // namespace pf
