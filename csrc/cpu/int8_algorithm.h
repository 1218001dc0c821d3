// The int8-activation tier, written once over an instruction set's vocabulary. Include after algorithm.h; `B` provides
// kGroupVecs, kMicroRows, kOffset (added to a weight's 8 bits), I (a vector of 32-bit sums), W (four columns of the
// weight in 8 bits, a vector of lanes) and the functions used below.

constexpr int kByteGroupTiles = B::kGroupVecs / kTileVecs;
constexpr int kByteLanes = B::kGroupVecs * kLanes;
constexpr int64_t kByteRows = 512;             // whose results stay in cache together
constexpr int kPartGroups = 128 / kByteLanes;  // groups that read a block of x while it is in L2

// Squared distance of n values times `inverse` from integers.
inline float rounding_error(const float* values, int64_t n, float inverse) {
  const V::F by = V::set1(inverse), shift = V::set1(0x1.8p23f), back = V::set1(-0x1.8p23f), minus = V::set1(-1.0f);
  V::F sum = V::zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    const V::F v = V::mul(V::load(values + i), by);
    const V::F off = V::fma(v, minus, V::add(V::add(v, shift), back));
    sum = V::fma(off, off, sum);
  }
  return V::reduce(sum);
}

// One row's block of columns in 8 bits. Of two scales a unit takes the one with the smaller error. In passes over all
// units: one unit's steps each wait for the one before.
inline void quantize_row(const float* values, int64_t unit, int64_t units, const ByteTable& table, ByteRow& row) {
  constexpr float kTop = 127.0f, kLower = 126.0f;
  float absmax[kByteUnits], gain[kByteUnits];
  int32_t sums[kByteUnits];
  for (int64_t u = 0; u < units; ++u) absmax[u] = B::absmax(values + u * unit, unit);
  for (int64_t u = 0; u < units; ++u) {
    const float inverse = absmax[u] > 1e-36f ? 1.0f / absmax[u] : 0.0f;
    const float top = rounding_error(values + u * unit, unit, kTop * inverse) * (kLower * kLower);
    const float lower = rounding_error(values + u * unit, unit, kLower * inverse) * (kTop * kTop);
    gain[u] = inverse * (lower < top ? kLower : kTop);
  }
  for (int64_t u = 0; u < units; ++u) sums[u] = B::quantize(values + u * unit, unit, gain[u], row.x + u * unit);
  for (int64_t u = 0; u < units; ++u) {
    const float scale = gain[u] == 0.0f ? absmax[u] * 0.0f : 1.0f / (gain[u] * table.step);  // NaN stays, and infinity
    row.scale[u] = scale;
    row.start[u] = -B::kOffset * sums[u] - static_cast<int32_t>(__builtin_rintf(table.shift * sums[u]));
    row.sum[u] = scale * sums[u];
  }
}

inline void quantize_bytes(const Matrix& x, const Weight& w, ByteRow* out, int64_t row0, int64_t row1) {
  const int64_t unit = byte_unit(w);
  alignas(64) float converted[kByteBlock];
  for (int64_t r = row0; r < row1; ++r)
    for (int64_t col0 = 0; col0 < x.cols; col0 += kByteBlock) {
      const int64_t n = min64(kByteBlock, x.cols - col0);
      const char* from = x.row(r) + col0 * dtype_size(x.dtype);
      // Several passes over little defeat the hardware's prefetching: ask for what comes next.
      for (int64_t i = 0; i < kByteBlock * 4; i += 64) __builtin_prefetch(from + kByteBlock * 4 + i);
      if (x.dtype != kFloat32) to_float(from, x.dtype, converted, n);
      const float* values = x.dtype == kFloat32 ? reinterpret_cast<const float*>(from) : converted;
      quantize_row(values, unit, n / unit, kByteTables[w.format], out[col0 / kByteBlock * x.rows + r]);
    }
}

// Where a kernel takes the weight of one group from: the codes themselves, with or without keeping what they decode to
// as a panel, or such a panel. `next` goes to the next eight columns; weight<0> and <1> are the two halves of them, in
// a ByteRow's order.
struct Codes {
  B::Table table;
  const uint8_t* codes[kByteGroupTiles];
  B::C held[B::kGroupVecs];

  PF_INLINE void next() {
    each(
        MakeInts<B::kGroupVecs>{},
        PF_BODY(int U) { held[U] = B::load_codes(codes[U / kTileVecs] + U % kTileVecs * kLanes * 4); });
    each(MakeInts<kByteGroupTiles>{}, PF_BODY(int T) { codes[T] += 64; });
  }
  template <int S, int U>
  PF_INLINE B::W weight() const {
    return B::template decode<S>(table, held[U]);
  }
};

struct MakingPanel {
  Codes from;
  uint8_t* at;  // before the first columns

  PF_INLINE void next() {
    from.next();
    at += 2 * B::kGroupVecs * kLanes * 4;
  }
  template <int S, int U>
  PF_INLINE B::W weight() const {
    const B::W w = from.weight<S, U>();
    B::store(at + (S * B::kGroupVecs + U) * kLanes * 4, w);
    return w;
  }
};

struct Panel {
  const uint8_t* at;  // before the first columns

  PF_INLINE void next() { at += 2 * B::kGroupVecs * kLanes * 4; }
  template <int S, int U>
  PF_INLINE B::W weight() const {
    return B::load(at + (S * B::kGroupVecs + U) * kLanes * 4);
  }
};

// What is asked for meanwhile: codes that come after this block, and the next rows of x.
struct Ahead {
  const uint8_t* codes[kByteGroupTiles];
  const char* x;

  PF_INLINE void step() {
    for (auto& at : codes) {
      prefetch_stream(at);
      at += 64;
    }
    __builtin_prefetch(x);
    x += 64;
  }
};

// c[r][lane] += x[r] * W^T for MR rows and one group, over `units` units. Both sums of a row stay in registers: storing
// the float sums once a unit costs a fifth of the speed.
template <int MR, class Source>
void byte_micro(const ByteRow* x, Source source, Ahead ahead, const float* const* scales, int shift, int64_t unit,
                int64_t units, float* c) {
  constexpr MakeInts<MR> rows{};
  constexpr MakeInts<B::kGroupVecs> vecs{};
  V::F sums[MR][B::kGroupVecs];
  each(rows, PF_BODY(int R) { each(vecs, PF_BODY(int U) { sums[R][U] = V::load(c + R * kByteLanes + U * kLanes); }); });
  const int8_t* at = x->x;
  int64_t u = 0;
  do {
    typename B::I acc[MR][B::kGroupVecs];
    each(
        rows, PF_BODY(int R) {
          const typename B::I start = B::set1(x[R].start[u]);
          each(vecs, PF_BODY(int U) { acc[R][U] = start; });
        });
    const int8_t* const end = at + unit;
    do {
      source.next();
      ahead.step();
      each(
          MakeInts<2>{}, PF_BODY(int S) {
            typename B::W w[B::kGroupVecs];
            each(vecs, PF_BODY(int U) { w[U] = source.template weight<S, U>(); });
            each(
                rows, PF_BODY(int R) {
                  const typename B::X four = B::broadcast(at + R * sizeof(ByteRow) + S * 4);
                  each(vecs, PF_BODY(int U) { acc[R][U] = B::dot(acc[R][U], w[U], four); });
                });
          });
      at += kGroupColumns;
    } while (at != end);
    const int64_t segment = (u >> shift) * kTile;
    each(
        rows, PF_BODY(int R) {
          each(
              vecs, PF_BODY(int U) {
                const V::F scale = V::load(scales[U / kTileVecs] + segment + U % kTileVecs * kLanes);
                sums[R][U] = V::fma(V::mul(B::to_float(acc[R][U]), scale), V::set1(x[R].scale[u]), sums[R][U]);
              });
        });
  } while (++u != units);
  each(rows, PF_BODY(int R) { each(vecs, PF_BODY(int U) { V::store(c + R * kByteLanes + U * kLanes, sums[R][U]); }); });
}

// c[r][lane] += sum over i of s[r][i] * b[i >> shift][lane] for one tile.
template <int MR>
void outer_rows(const float* s, int64_t lds, const float* b, int64_t rank, int shift, float* c) {
  constexpr MakeInts<MR> rows{};
  constexpr MakeInts<kTileVecs> vecs{};
  V::F acc[MR][kTileVecs];
  each(rows, PF_BODY(int R) { each(vecs, PF_BODY(int U) { acc[R][U] = V::load(c + R * kByteLanes + U * kLanes); }); });
  for (int64_t i = 0; i < rank; ++i)
    each(
        vecs, PF_BODY(int U) {
          const V::F value = V::load(b + (i >> shift) * kTile + U * kLanes);
          each(rows, PF_BODY(int R) { acc[R][U] = V::fma(value, V::set1(s[R * lds + i]), acc[R][U]); });
        });
  each(rows, PF_BODY(int R) { each(vecs, PF_BODY(int U) { V::store(c + R * kByteLanes + U * kLanes, acc[R][U]); }); });
}

inline void outer(const float* s, int64_t lds, const float* b, int64_t rank, int shift, int64_t rows, float* c) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) outer_rows<4>(s + r * lds, lds, b, rank, shift, c + r * kByteLanes);
  for (; r < rows; ++r) outer_rows<1>(s + r * lds, lds, b, rank, shift, c + r * kByteLanes);
}

template <class Source>
using ByteMicro = void (*)(const ByteRow*, Source, Ahead, const float* const*, int, int64_t, int64_t, float*);
template <class Source, int... R>
ByteMicro<Source> pick_byte(int rows, IntList<R...>) {
  static constexpr ByteMicro<Source> kMicros[] = {byte_micro<R + 1, Source>...};
  return kMicros[rows - 1];
}

// Rows in even blocks of at most kMicroRows: the first from the codes, the others from the panel that it makes.
inline void byte_rows(const ByteRow* x, int64_t rows, const Codes& codes, uint8_t* panel, Ahead ahead,
                      const float* const* scales, int shift, int64_t unit, int64_t units, float* c) {
  const int64_t blocks = ceil_div(rows, B::kMicroRows);
  uint8_t* const before = panel - kGroupColumns * kByteLanes;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t r0 = rows * i / blocks, r1 = rows * (i + 1) / blocks;
    ahead.x = reinterpret_cast<const char*>(x + r1);
    const auto add = [&]<class Source>(const Source& source) {
      pick_byte<Source>(static_cast<int>(r1 - r0), MakeInts<B::kMicroRows>{})(x + r0, source, ahead, scales, shift,
                                                                              unit, units, c + r0 * kByteLanes);
    };
    if (blocks == 1)
      add(codes);
    else if (i == 0)
      add(MakingPanel{codes, before});
    else
      add(Panel{before});
  }
}

// The part of y that is computed together: rows [row0, row0 + rows), tiles [tile0, tile0 + tiles) in whole groups. A
// last group that lacks tiles takes its last tile again instead, and nothing of that is stored.
struct Part {
  const Int8Args& g;
  int64_t row0, rows, tile0, tiles;
  float* c;  // [group][row][lane]

  int64_t groups() const { return ceil_div(tiles, kByteGroupTiles); }
  int64_t tile(int64_t group, int t) const { return tile0 + min64(group * kByteGroupTiles + t, tiles - 1); }
  float* sums(int64_t group) const { return c + group * rows * kByteLanes; }
};

// Adds the branch, in the arithmetic A that made g.s. `made` has room for a block of B of one tile. Where there are
// instructions on tiles, the caller holds them.
template <class A>
void add_branch(const Part& part, void* made) {
  using Exact = Algorithm<A>;
  const Int8Args& g = part.g;
  for (int64_t i = 0; i < part.groups(); ++i)
    for (int t = 0; t < kByteGroupTiles; ++t)
      for (int64_t col0 = 0; col0 < g.s.cols; col0 += Exact::kBlock) {
        const int64_t n = min64(Exact::kBlock, g.s.cols - col0), tile = part.tile(i, t);
        if (col0 == 0 && tile + kTilesAhead < g.w.tiles()) Exact::prefetch_b(g.lora_b, tile + kTilesAhead);
        const typename Exact::E* panel =
            Exact::tile_panel(g.lora_b, tile, col0, n, static_cast<typename Exact::E*>(made));
        Exact::multiply(Exact::packed_block(g.s, col0 / Exact::kBlock) + part.row0 * Exact::kStride, part.rows, panel,
                        n, 1, part.sums(i) + t * kTile, kByteLanes);
      }
}

// Sums start at the bias and the branch.
inline void open_sums(const Part& part, void* made) {
  const Int8Args& g = part.g;
  for (int64_t i = 0; i < part.groups(); ++i) {
    const int64_t n0 = part.tile(i, 0) * kTile;
    alignas(64) float bias[kByteLanes] = {};
    if (g.bias != nullptr) copy_bytes(bias, g.bias + n0, min64(kByteLanes, g.w.n - n0) * sizeof(float));
    for (int64_t r = 0; r < part.rows; ++r) copy_bytes(part.sums(i) + r * kByteLanes, bias, sizeof(bias));
  }
  if (g.s.data == nullptr) return;
#ifdef PF_BF16
  if (g.s_is_bf16) return add_branch<BF16>(part, made);
#endif
  add_branch<F32>(part, made);
}

// Adds the columns of one ByteRow block, from col0 on; what comes `columns_ahead` later is asked for. `panel` has room
// for one group decoded.
inline void multiply_block(const Part& part, const B::Table& table, int64_t col0, int64_t columns_ahead,
                           uint8_t* panel) {
  const Weight& w = part.g.w;
  const int64_t n = min64(kByteBlock, w.k - col0), unit = byte_unit(w), units = n / unit;
  const int64_t seg0 = col0 / w.segment, segs = ceil_div(n, w.segment);
  const int shift = __builtin_ctzll(w.segment / unit);
  const ByteRow* x = part.g.x + col0 / kByteBlock * part.g.rows + part.row0;
  const int64_t parts_later = (col0 + columns_ahead) / w.k, later = (col0 + columns_ahead) % w.k;
  alignas(64) float decoded[kByteGroupTiles][kByteUnits * kTile];
  for (int64_t i = 0; i < part.groups(); ++i) {
    Codes codes;
    Ahead ahead;
    codes.table = table;
    const float* scales[kByteGroupTiles];
    float* c = part.sums(i);
    for (int t = 0; t < kByteGroupTiles; ++t) {
      const int64_t tile = part.tile(i, t), tile_ahead = tile + parts_later * part.tiles;
      codes.codes[t] = w.codes + (tile * w.k + col0) * (kTile / 2);
      ahead.codes[t] = w.codes + (tile_ahead * w.k + later) * (kTile / 2);
      prefetch_scales(w, tile_ahead, later, n);
      scales[t] = tile_scales(w, tile, seg0, segs, decoded[t]);
      if (w.zero != nullptr)
        outer(x->sum, sizeof(ByteRow) / sizeof(float), w.zero + (tile * w.segments() + seg0) * kTile, units, shift,
              part.rows, c + t * kTile);
    }
    byte_rows(x, part.rows, codes, panel, ahead, scales, shift, unit, units, c);
  }
}

inline void store_sums(const Part& part) {
  const Int8Args& g = part.g;
  const int64_t n0 = part.tile0 * kTile, size = dtype_size(g.y_dtype);
  for (int64_t r = 0; r < part.rows; ++r) {
    char* y = static_cast<char*>(g.y) + ((part.row0 + r) * g.ldy + n0) * size;
    for (int64_t i = 0; i < part.groups(); ++i, y += kByteLanes * size)
      from_float(part.sums(i) + r * kByteLanes, y, g.y_dtype, min64(kByteLanes, g.w.n - n0 - i * kByteLanes));
  }
}

// Tiles [tile0, tile1) of y, tile0 at the head of a group.
inline void byte_product(const Int8Args& g, int64_t tile0, int64_t tile1) {
  const B::Table table = B::table(kByteTables[g.w.format].code);
  const bool few = g.rows <= B::kFewRows;
  const int64_t part_tiles = (few ? 1 : kPartGroups) * kByteGroupTiles, part_rows = min64(g.rows, kByteRows);
  float* c = static_cast<float*>(scratch(0, part_tiles * kTile * part_rows * sizeof(float)));
  constexpr int64_t kPanelBytes = kByteBlock * kByteLanes;
  uint8_t* panel = static_cast<uint8_t*>(scratch(1, kPanelBytes + Algorithm<F32>::kBlock * kTile * sizeof(float)));
#ifdef PF_BF16
  [[maybe_unused]] const BF16::Tiles held;  // for the branch: holding them anew for each part shows
#endif
  for (int64_t row0 = 0; row0 < g.rows; row0 += kByteRows)
    for (int64_t t0 = tile0; t0 < tile1; t0 += part_tiles) {
      const Part part{g, row0, min64(kByteRows, g.rows - row0), t0, min64(part_tiles, tile1 - t0), c};
      open_sums(part, panel + kPanelBytes);
      for (int64_t col0 = 0; col0 < g.w.k; col0 += kByteBlock)
        multiply_block(part, table, col0, few ? kCodesAhead / (kTile / 2) : kByteBlock, panel);
      store_sums(part);
    }
}

inline Int8 int8_table() { return {kByteGroupTiles, quantize_bytes, byte_product}; }
