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
  template <int R, int L, class Ahead>
  static void add(const uint16_t* x, int64_t ldx, int64_t rows, const uint16_t* panel, int64_t steps, Ahead& ahead,
                  float* c, int64_t ldc) {
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
        ahead.next_step();
      }
      // In turns, so that sums wait for each other less (10 % of all time where these are in the second-level cache).
      // The last ones are loaded again, for nothing.
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

  // The same for up to 16 rows, where the sums of each of `segments` segments, of `steps` steps, are to be multiplied
  // by its scales: [segment][16] for each tile of lanes, `scale_stride` floats apart. All of x's 16 rows are read.
  template <int L, class Ahead>
  static void add_scaled(const uint16_t* x, int64_t ldx, int64_t rows, const uint16_t* panel, int64_t steps,
                         int64_t segments, const float* scales, int64_t scale_stride, Ahead& ahead, float* c,
                         int64_t ldc) {
    constexpr int64_t kLine = L * 64;
    alignas(64) float sums[2][2][kRows][L * 16];  // of two pairs of segments
    // Two segments at a time, whose sums wait for each other less, while those before them are scaled: what a tile
    // stored is long on its way to a vector.
    for (int64_t segment = 0; segment < segments; segment += 2) {
      const bool two = segment + 1 < segments;
      const uint16_t *x2 = x + steps * kColumns, *panel2 = panel + steps * L * 16 * kColumns;
      asm volatile("" ::: "memory");
      _tile_zero(0);
      if constexpr (L == 2) _tile_zero(1);
      _tile_zero(2);
      if constexpr (L == 2) _tile_zero(3);
      for (int64_t s = 0; s < steps; ++s, x += kColumns, panel += L * 16 * kColumns) {
        _tile_loadd(4, x, ldx * 2);
        _tile_loadd(6, panel, kLine);
        if constexpr (L == 2) _tile_loadd(7, panel + 32, kLine);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (L == 2) _tile_dpbf16ps(1, 4, 7);
        ahead.next_step();
        if (!two) continue;
        _tile_loadd(5, x2, ldx * 2);
        _tile_loadd(6, panel2, kLine);
        if constexpr (L == 2) _tile_loadd(7, panel2 + 32, kLine);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (L == 2) _tile_dpbf16ps(3, 5, 7);
        ahead.next_step();
        x2 += kColumns, panel2 += L * 16 * kColumns;
      }
      x = x2, panel = panel2;
      if (segment > 0) scale_two<L>(sums[segment / 2 % 2 ^ 1], rows, scales, scale_stride, true, c, ldc), scales += 32;
      auto& own = sums[segment / 2 % 2];
      _tile_stored(0, own[0], kLine);
      if constexpr (L == 2) _tile_stored(1, own[0][0] + 16, kLine);
      _tile_stored(2, own[1], kLine);
      if constexpr (L == 2) _tile_stored(3, own[1][0] + 16, kLine);
      asm volatile("" ::: "memory");
    }
    scale_two<L>(sums[(segments + 1) / 2 % 2 ^ 1], rows, scales, scale_stride, segments % 2 == 0, c, ldc);
  }

 private:
  // c += the sums of two segments times their scales; without `two` the second one's, zeros, are left out.
  template <int L>
  static void scale_two(const float (*sums)[kRows][L * 16], int64_t rows, const float* scales, int64_t scale_stride,
                        bool two, float* c, int64_t ldc) {
    __m512 first[L], second[L];
    for (int l = 0; l < L; ++l) {
      first[l] = _mm512_loadu_ps(scales + l * scale_stride);
      second[l] = two ? _mm512_loadu_ps(scales + l * scale_stride + 16) : _mm512_setzero_ps();
    }
    for (int64_t r = 0; r < rows; ++r, c += ldc)
      for (int l = 0; l < L; ++l) {
        __m512 sum = _mm512_loadu_ps(c + l * 16);
        sum = _mm512_fmadd_ps(_mm512_load_ps(sums[0][r] + l * 16), first[l], sum);
        sum = _mm512_fmadd_ps(_mm512_load_ps(sums[1][r] + l * 16), second[l], sum);
        _mm512_storeu_ps(c + l * 16, sum);
      }
  }
};
