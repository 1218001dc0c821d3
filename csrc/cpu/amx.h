// Products in AMX tiles. Included by avx512_amx.cpp before algorithm.h.
//
// A step multiplies 16 rows by 32 columns of bf16 (PackedRows as they lie) with 16 pairs of columns by 16 lanes (a
// panel as it lies: its steps are the rows of L tiles side by side) and adds to 16 x 16 sums in float32. An instruction
// takes 16 cycles, so two row tiles by two lane tiles, which need four loads of 8 cycles for four instructions, can
// keep it busy.

// The calling thread's tiles, while this lives: 0 to 3 are sums, 4 and 5 rows, 6 and 7 of a panel.
struct AmxTiles {
  static constexpr int kRows = 16, kColumns = 32;

  AmxTiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } whole;
    _tile_loadconfig(&whole);
  }
  ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles&) = delete;

  // The first `columns` columns of a tile's rows, and zeros after them.
  static void copy_columns(const uint16_t* x, int64_t ldx, int64_t columns, uint16_t* out) {
    const __mmask32 mask = (__mmask32{1} << columns) - 1;
    for (int r = 0; r < kRows; ++r) _mm512_store_si512(out + r * kColumns, _mm512_maskz_loadu_epi16(mask, x + r * ldx));
  }

  // c [rows][L * 16 lanes] += x * panel over `steps` steps, R tiles of rows at a time; rows a multiple of R * 16, ldx
  // and ldc in elements.
  template <int R, int L>
  static void add(const uint16_t* x, int64_t ldx, int64_t rows, const uint16_t* panel, int64_t steps, float* c,
                  int64_t ldc) {
    constexpr int64_t kLine = L * 64;
    const int64_t row = ldx * 2, line = ldc * 4;
    asm volatile("" ::: "memory");  // the intrinsics that load do not say that they read memory
    _tile_loadd(0, c, line);
    if constexpr (L == 2) _tile_loadd(1, c + 16, line);
    if constexpr (R == 2) _tile_loadd(2, c + 16 * ldc, line);
    if constexpr (R == 2 && L == 2) _tile_loadd(3, c + 16 * ldc + 16, line);
    for (int64_t r = 0; r < rows; r += R * kRows, x += R * kRows * ldx) {
      const uint16_t *xs = x, *w = panel;
      for (int64_t s = 0; s < steps; ++s, xs += kColumns, w += L * 16 * kColumns) {
        _tile_loadd(4, xs, row);
        _tile_loadd(6, w, kLine);
        if constexpr (L == 2) _tile_loadd(7, w + 32, kLine);
        if constexpr (R == 2) _tile_loadd(5, xs + 16 * ldx, row);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (L == 2) _tile_dpbf16ps(1, 4, 7);
        if constexpr (R == 2) _tile_dpbf16ps(2, 5, 6);
        if constexpr (R == 2 && L == 2) _tile_dpbf16ps(3, 5, 7);
      }
      // In turns: sums wait for each other less (10 % of all time where they are in the second-level cache). The last
      // ones are loaded again, for nothing.
      float* next = r + R * kRows < rows ? c + R * 16 * ldc : c;
      _tile_stored(0, c, line);
      _tile_loadd(0, next, line);
      if constexpr (L == 2) {
        _tile_stored(1, c + 16, line);
        _tile_loadd(1, next + 16, line);
      }
      if constexpr (R == 2) {
        _tile_stored(2, c + 16 * ldc, line);
        _tile_loadd(2, next + 16 * ldc, line);
      }
      if constexpr (R == 2 && L == 2) {
        _tile_stored(3, c + 16 * ldc + 16, line);
        _tile_loadd(3, next + 16 * ldc + 16, line);
      }
      c = next;
    }
  }
};
