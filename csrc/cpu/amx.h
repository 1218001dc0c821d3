// Products in AMX tiles. Included by avx512_amx.cpp before algorithm.h.
//
// A step multiplies 16 rows by 32 columns of bf16 (rows of PackedRows as they lie) with 16 pairs of columns by 16 lanes
// (a panel as it lies: a step of its group is a row of the tiles beside each other) and adds to 16 x 16 sums in
// float32.

// The calling thread's tiles, from construction on.
struct AmxTiles {
  static constexpr int kRows = 16, kColumns = 32;

  AmxTiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } all_whole;
    _tile_loadconfig(&all_whole);
  }
  ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles&) = delete;

  // c [R * 16 rows][L * 16 lanes] += x * panel over `steps` steps. `ldx` and `ldc` in elements.
  template <int R, int L>
  static void add(const uint16_t* x, int64_t ldx, const uint16_t* panel, int64_t steps, float* c, int64_t ldc) {
    constexpr int64_t kLine = 64, kStepBytes = L * kLine;
    asm volatile("" ::: "memory");  // the intrinsics that load do not say that they read memory
    _tile_loadd(0, c, ldc * 4);
    if constexpr (L == 2) _tile_loadd(1, c + 16, ldc * 4);
    if constexpr (R == 2) _tile_loadd(2, c + 16 * ldc, ldc * 4);
    if constexpr (R == 2 && L == 2) _tile_loadd(3, c + 16 * ldc + 16, ldc * 4);
    for (int64_t s = 0; s < steps; ++s, x += kColumns, panel += L * 16 * kColumns) {
      _tile_loadd(4, x, ldx * 2);
      _tile_loadd(6, panel, kStepBytes);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (L == 2) {
        _tile_loadd(7, panel + 32, kStepBytes);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (R == 2) {
        _tile_loadd(5, x + 16 * ldx, ldx * 2);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (L == 2) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c, ldc * 4);
    if constexpr (L == 2) _tile_stored(1, c + 16, ldc * 4);
    if constexpr (R == 2) _tile_stored(2, c + 16 * ldc, ldc * 4);
    if constexpr (R == 2 && L == 2) _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
  }
};
