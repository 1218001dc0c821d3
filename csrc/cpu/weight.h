// What the kernels are told: matrices as they lie in memory, and the packed weight.
//
// A packed weight W [N, K] (K a multiple of 32) is a row of tiles of 16 output rows. Within a tile, columns come in
// groups of 8, 64 bytes a group: sixteen 32-bit lanes, one an output row, each with the codes of 8 columns:
//
//   bits  0..3   4..7   8..11  12..15  16..19  20..23  24..27  28..31
//   col   0      2      4      6       1       3       5       7
//
// so that one shift by 4i leaves, in the 16-bit halves of every lane, the codes of columns 2i and 2i+1: the pair that a
// bf16 dot product wants side by side, and that a table lookup (which ignores high index bits) needs no mask for.
// Scales lie as [tile][segment][16], one a row and segment of `segment` columns; rows past N are codes 0 with scale 0.
#pragma once
#include <cstdint>
#include <utility>

// Shared helpers are inlined in each instruction set's file: a shared copy could be the one a newer CPU needs.
#define PF_INLINE inline __attribute__((always_inline))

namespace pf {

constexpr int kTile = 16;         // output rows of a tile
constexpr int kGroupColumns = 8;  // columns in 64 bytes of codes

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum Format : int { kNF4 = 0, kFP4 = 1, kINT4 = 2 };

PF_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
PF_INLINE constexpr int dtype_size(int dtype) { return dtype == kFloat32 ? 4 : 2; }

// A row-major matrix; `ld` is the distance of rows in elements. Or, `packed`, bf16 in tiles of 16 rows: [tile][column
// pair][row][2], rows and columns that are missing zero, cols even (the factors of an adapter, ready for the products).
struct Matrix {
  const void* data = nullptr;
  int dtype = kFloat32;
  int64_t rows = 0, cols = 0, ld = 0;
  bool packed = false;

  PF_INLINE const char* row(int64_t r) const { return static_cast<const char*>(data) + r * ld * dtype_size(dtype); }
  // Packed: the pairs of a tile, from an even column on.
  PF_INLINE const uint16_t* pairs(int64_t tile, int64_t col) const {
    return static_cast<const uint16_t*>(data) + (tile * cols + col) * kTile;
  }
};

// Broadcast-side operand of a product: rows in the arithmetic's element type, in blocks of `kBlock` columns:
// [block][row][row stride]. See panels.h.
struct PackedRows {
  const void* data = nullptr;
  int64_t rows = 0, cols = 0;
};

struct Weight {
  const uint8_t* codes;   // [tiles][K / 8][64]
  const float* scale;     // [tiles][segments][16], or null when double-quantized
  const uint8_t* scale8;  // the same in 8 bits, or null
  const float* scale2;    // second-level scales, one for 256 blocks
  float offset;           // mean of the scales
  const float* zero;      // [tiles][segments][16], or null
  int format;
  int64_t n, k, segment, blocksize;

  PF_INLINE int64_t tiles() const { return ceil_div(n, kTile); }
  // Segments are powers of two, and kernels ask where divisions would show.
  PF_INLINE int64_t segment_of(int64_t col) const { return col >> __builtin_ctzll(segment); }
  PF_INLINE int64_t segments() const { return segment_of(k); }
};

// Compile-time lists of integers.
template <int... I>
using IntList = std::integer_sequence<int, I...>;
template <int N>
using MakeInts = std::make_integer_sequence<int, N>;

// Code tables, in dispatch.cpp.
extern const float kTables[3][16];
extern const float kBf16Tables[3][16], kBf16Factors[3];  // the values times a factor, where products are in bf16
extern const float kWordSteps[3];                        // a value times this, rounded, fits 14 bits
extern float kDynamicMap[256];

}  // namespace pf
