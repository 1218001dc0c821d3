// The int8-activation tier, written once over an instruction set's vocabulary. Include after algorithm.h; `B` provides
// kGroupVecs, kMicroRows, kFewRows (see byte_product), kExactRows and kMostRows (see Int8), kOffset (added to a
// weight's 8 bits), and of vectors of lanes I (32-bit sums), W (four columns of the weight in 8 bits) and C (the codes
// of eight); X (four columns of a row of x, for all lanes), Table (the codes' values) and the functions used below.

constexpr int kByteGroupTiles = B::kGroupVecs / kTileVecs;
constexpr int kByteLanes = B::kGroupVecs * kLanes;
constexpr int64_t kByteRows = 512;             // whose results stay in cache together
constexpr int kPartGroups = 128 / kByteLanes;  // groups that read a block of x while it is in L2

// Squared distance of kUnit values times `inverse` from integers, lane by lane.
template <int kUnit>
PF_INLINE V::F rounding_error(const float* values, float inverse) {
  const V::F by = V::set1(inverse), shift = V::set1(0x1.8p23f), back = V::set1(-0x1.8p23f), minus = V::set1(-1.0f);
  V::F sum = V::zero();
  each(
      MakeInts<kUnit / kLanes>{}, PF_BODY(int I) {
        const V::F v = V::mul(V::load(values + I * kLanes), by);
        const V::F off = V::fma(v, minus, V::add(V::add(v, shift), back));
        sum = V::fma(off, off, sum);
      });
  return sum;
}

// of(u) for each unit u; `join` reduces the lanes of all their results at once.
template <class Of, class Join, class T>
PF_INLINE void each_unit(int64_t units, const Of& of, const Join& join, T* out) {
  decltype(of(0)) lanes[kByteUnits];
  for (int64_t u = 0; u < units; ++u) lanes[u] = of(u);
  for (int64_t u = units; u < kByteUnits; ++u) lanes[u] = decltype(of(0)){};
  join(lanes, out);
}

// The shift with which the rounding of w's values cancels out, by a part of them that is large enough for what is left
// to hide behind that of each value. They lie an odd number of units apart, as patterns in weights repeat after powers
// of two. Rows that only fill up a tile have no scale, and do not count.
inline float mean_error(const Weight& w) {
  constexpr float kScale = 200.0f;  // no value is off by more than 127 of these
  constexpr int64_t kFewest = 8, kMost = 64;
  const ByteTable& table = kByteTables[w.format];
  alignas(64) int8_t errors[16], ones[4] = {1, 1, 1, 1};
  for (int c = 0; c < 16; ++c)
    errors[c] = static_cast<int8_t>(
        __builtin_rintf((static_cast<float>(table.code[c]) - table.step * kTables[w.format][c]) * kScale));
  const B::Table of = B::table(errors);
  const B::X one = B::broadcast(ones);
  const int64_t unit = byte_unit(w), of_tile = w.k / unit, units = w.tiles() * of_tile;
  const int64_t part = min64(units / 32, kMost), count = min64(units, part < kFewest ? kFewest : part);
  const int64_t apart = (units / count - 1) | 1;
  const V::F offset = V::set1(static_cast<float>(-B::kOffset * unit));
  alignas(64) float decoded[kTile];
  V::F sum = V::zero(), weights = V::zero();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t tile = i * apart / of_tile, col = i * apart % of_tile * unit;
    const uint8_t* codes = w.codes + (tile * w.k + col) * (kTile / 2);
    const float* scale = tile_scales(w, tile, w.segment_of(col), 1, decoded);
    for (int v = 0; v < kTileVecs; ++v) {
      B::I low = B::set1(0), high = B::set1(0);
      for (int64_t line = 0; line < unit / kGroupColumns; ++line) {
        const B::C held = B::load_codes(codes + line * 64 + v * kLanes * 4);
        low = B::dot(low, B::template decode<0>(of, held), one);
        high = B::dot(high, B::template decode<1>(of, held), one);
      }
      const V::F absmax = V::load(scale + v * kLanes);
      sum = V::fma(V::add(V::add(B::to_float(low), B::to_float(high)), offset), absmax, sum);
      weights = V::add(weights, absmax);
    }
  }
  const float shift = V::reduce(sum) / (V::reduce(weights) * static_cast<float>(unit) * kScale);
  return shift >= -1.0f && shift <= 1.0f ? shift : 0.0f;  // not where there are only zeros, or a NaN
}

// One row's block of columns in 8 bits. Of two scales a unit takes the one with the smaller error. In passes over all
// units: one unit's steps each wait for the one before.
template <int kUnit>
void quantize_row(const float* values, int64_t units, float step, float shift, ByteRow& row) {
  constexpr float kTop = 127.0f, kLower = 126.0f;
  alignas(64) float absmax[kByteUnits], by_top[kByteUnits], by_lower[kByteUnits], top[kByteUnits], lower[kByteUnits];
  alignas(64) float gain[kByteUnits], totals[kByteUnits], start[kByteUnits];
  alignas(64) int32_t sums[kByteUnits];
  const auto max = [](const auto* lanes, float* out) { B::join_max(lanes, out); };
  const auto sum = [](const auto* lanes, auto* out) { B::join_sum(lanes, out); };
  const auto by_lanes = [](const auto& body) __attribute__((always_inline)) {
    for (int u = 0; u < kByteUnits; u += kLanes) body(u);
  };
  const V::F one = V::set1(1.0f), zero = V::zero();

  each_unit(units, [&](int64_t u) { return B::absmax(values + u * kUnit, kUnit); }, max, absmax);
  by_lanes([&](int u) {
    const V::F most = V::load(absmax + u), inverse = V::where_le(V::set1(1e-36f), most, V::div(one, most), zero);
    V::store(by_top + u, V::mul(inverse, V::set1(kTop)));
    V::store(by_lower + u, V::mul(inverse, V::set1(kLower)));
  });
  each_unit(units, [&](int64_t u) { return rounding_error<kUnit>(values + u * kUnit, by_top[u]); }, sum, top);
  each_unit(units, [&](int64_t u) { return rounding_error<kUnit>(values + u * kUnit, by_lower[u]); }, sum, lower);
  by_lanes([&](int u) {
    const V::F a = V::mul(V::load(top + u), V::set1(kLower * kLower));
    const V::F b = V::mul(V::load(lower + u), V::set1(kTop * kTop));
    V::store(gain + u, V::where_le(a, b, V::load(by_top + u), V::load(by_lower + u)));
  });
  each_unit(
      units, [&](int64_t u) { return B::quantize(values + u * kUnit, kUnit, gain[u], row.x + u * kUnit); }, sum, sums);
  for (int u = 0; u < kByteUnits; ++u) totals[u] = static_cast<float>(sums[u]);
  by_lanes([&](int u) {
    const V::F by = V::load(gain + u), total = V::load(totals + u), nearest = V::set1(0x1.8p23f);
    // NaN stays, and infinity.
    const V::F nothing = V::mul(V::load(absmax + u), zero), scaled = V::div(one, V::mul(by, V::set1(step)));
    const V::F scale = V::where_le(by, zero, nothing, scaled);
    const V::F rounded = V::add(V::add(V::mul(total, V::set1(shift)), nearest), V::set1(-0x1.8p23f));
    V::store(row.scale + u, scale);
    V::store(row.sum + u, V::mul(scale, total));
    V::store(start + u, V::fma(total, V::set1(-B::kOffset), V::mul(rounded, V::set1(-1.0f))));
  });
  // By way of 64 bits: beside an infinity it is large, and means nothing.
  for (int u = 0; u < kByteUnits; ++u) row.start[u] = static_cast<int32_t>(static_cast<int64_t>(start[u]));
}

inline void quantize_bytes(const Matrix& x, const Weight& w, float shift, ByteRow* out, int64_t row0, int64_t row1) {
  const int64_t unit = byte_unit(w);
  alignas(64) float converted[kByteBlock];
  for (int64_t r = row0; r < row1; ++r)
    for (int64_t col0 = 0; col0 < x.cols; col0 += kByteBlock) {
      const int64_t n = min64(kByteBlock, x.cols - col0);
      const char* from = x.row(r) + col0 * dtype_size(x.dtype);
      // Several passes over little defeat the hardware's prefetching: prefetch what comes next.
      for (int64_t i = 0; i < kByteBlock * 4; i += 64) __builtin_prefetch(from + kByteBlock * 4 + i);
      if (x.dtype != kFloat32) to_float(from, x.dtype, converted, n);
      const float* values = x.dtype == kFloat32 ? reinterpret_cast<const float*>(from) : converted;
      const auto quantize = unit == 64 ? quantize_row<64> : quantize_row<32>;
      quantize(values, n / unit, kByteTables[w.format].step, shift, out[col0 / kByteBlock * x.rows + r]);
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

// What is prefetched meanwhile: codes that come after this block, and the next rows of x.
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

// Rows in even blocks of at most kMicroRows: the first from the codes, the others from the panel that it makes.
inline void byte_rows(const ByteRow* x, int64_t rows, const Codes& codes, uint8_t* panel, Ahead ahead,
                      const float* const* scales, int shift, int64_t unit, int64_t units, float* c) {
  const int64_t blocks = ceil_div(rows, B::kMicroRows);
  uint8_t* const before = panel - kGroupColumns * kByteLanes;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t r0 = rows * i / blocks, r1 = rows * (i + 1) / blocks;
    ahead.x = reinterpret_cast<const char*>(x + r1);
    const auto add = [&]<class Source>(const Source& source) {
      pick(
          static_cast<int>(r1 - r0), []<int R>() { return &byte_micro<R, Source>; }, MakeInts<B::kMicroRows>{})(
          x + r0, source, ahead, scales, shift, unit, units, c + r0 * kByteLanes);
    };
    if (blocks == 1)
      add(codes);
    else if (i == 0)
      add(MakingPanel{codes, before});
    else
      add(Panel{before});
  }
}

// The part of y that is computed together: rows [row0, row0 + rows) and the tiles before `end` of some groups. Where a
// group lacks a tile, the last one is taken again, and nothing of that is stored.
struct Part {
  const Int8Args& g;
  int64_t row0, rows, tile0, end, groups;
  int64_t apart;  // from one tile of a group to the next
  float* c;       // [group][row][lane]

  int64_t place(int64_t group, int t) const { return tile0 + group * kByteGroupTiles + t * apart; }
  int64_t tile(int64_t group, int t) const { return min64(place(group, t), end - 1); }
  float* sums(int64_t group) const { return c + group * rows * kByteLanes; }
};

// c[r][lane] += s[r] * B^T for MR rows and one group, whose tiles have a panel each.
template <class A, int MR>
void branch_micro(const typename A::Elem* s, const typename A::Elem* const* panels, int64_t steps, float* c) {
  constexpr MakeInts<MR> rows{};
  constexpr MakeInts<B::kGroupVecs> vecs{};
  V::F sums[MR][B::kGroupVecs];
  each(rows, PF_BODY(int R) { each(vecs, PF_BODY(int U) { sums[R][U] = V::load(c + R * kByteLanes + U * kLanes); }); });
  for (int64_t i = 0; i < steps; ++i, s += A::kStep) {
    typename A::W w[B::kGroupVecs];
    each(
        vecs, PF_BODY(int U) {
          w[U] = A::load(panels[U / kTileVecs] + (i * kTileVecs + U % kTileVecs) * kLanes * A::kStep);
        });
    each(
        rows, PF_BODY(int R) {
          const typename A::X own = A::broadcast(s + R * Product<A>::kStride);
          each(vecs, PF_BODY(int U) { sums[R][U] = A::fma(sums[R][U], w[U], own); });
        });
  }
  each(rows, PF_BODY(int R) { each(vecs, PF_BODY(int U) { V::store(c + R * kByteLanes + U * kLanes, sums[R][U]); }); });
}

// Adds the branch, in the arithmetic A that made g.s. `made` has room for a block of B of one group. Where there are
// instructions on tiles, the caller holds them.
template <class A>
void add_branch(const Part& part, void* made) {
  using Exact = Product<A>;
  using E = typename A::Elem;
  const Int8Args& g = part.g;
  for (int64_t i = 0; i < part.groups; ++i)
    for (int64_t col0 = 0; col0 < g.s.cols; col0 += Exact::kBlock) {
      const int64_t n = min64(Exact::kBlock, g.s.cols - col0);
      const E *panels[kByteGroupTiles],
          *s = Exact::packed_block(g.s, col0 / Exact::kBlock) + part.row0 * Exact::kStride;
      for (int t = 0; t < kByteGroupTiles; ++t)
        panels[t] =
            Exact::tile_panel(g.lora_b, part.tile(i, t), col0, n, static_cast<E*>(made) + t * Exact::kBlock * kTile);
      if constexpr (Exact::kHasTiles) {
        for (int t = 0; t < kByteGroupTiles; ++t)
          Exact::multiply(s, part.rows, panels[t], n, 1, part.sums(i) + t * kTile, kByteLanes);
      } else {
        Exact::row_blocks(
            part.rows,
            [&](int64_t r, int rows) {
              pick(
                  rows, []<int R>() { return &branch_micro<A, R>; }, MakeInts<B::kMicroRows>{})(
                  s + r * Exact::kStride, panels, ceil_div(n, A::kStep), part.sums(i) + r * kByteLanes);
            },
            B::kMicroRows);
      }
    }
}

// Sums start at the bias and the branch.
inline void open_sums(const Part& part, void* made) {
  const Int8Args& g = part.g;
  for (int64_t i = 0; i < part.groups; ++i) {
    alignas(64) float bias[kByteLanes] = {};
    for (int t = 0; g.bias != nullptr && t < kByteGroupTiles; ++t) {
      const int64_t n0 = part.tile(i, t) * kTile;
      copy_bytes(bias + t * kTile, g.bias + n0, min64(kTile, g.w.n - n0) * sizeof(float));
    }
    for (int64_t r = 0; r < part.rows; ++r) copy_bytes(part.sums(i) + r * kByteLanes, bias, sizeof(bias));
  }
  if (g.s.data == nullptr) return;
#ifdef PF_BF16
  if (g.s_is_bf16) return add_branch<BF16>(part, made);
#endif
  add_branch<F32>(part, made);
}

// What all blocks have in common.
struct Plan {
  B::Table table;
  int64_t next;            // from a tile to the one that follows it
  int64_t tiles, columns;  // how far ahead codes and scales are prefetched
  int64_t b_lines;         // of a tile of B that are prefetched with a block
};

// Adds the columns of one ByteRow block, from col0 on. `panel` has room for one group decoded.
inline void multiply_block(const Part& part, const Plan& plan, int64_t col0, uint8_t* panel) {
  const Weight& w = part.g.w;
  const int64_t n = min64(kByteBlock, w.k - col0), unit = byte_unit(w), units = n >> __builtin_ctzll(unit);
  const int64_t seg0 = w.segment_of(col0), segs = w.segment_of(n - 1) + 1;
  const int shift = __builtin_ctzll(w.segment) - __builtin_ctzll(unit);
  const ByteRow* x = part.g.x + col0 / kByteBlock * part.g.rows + part.row0;
  const bool wraps = col0 + plan.columns >= w.k;
  const int64_t tiles_later = plan.tiles + (wraps ? plan.next : 0);
  const int64_t later = col0 + plan.columns - (wraps ? w.k : 0);
  alignas(64) float decoded[kByteGroupTiles][kByteUnits * kTile];
  for (int64_t i = 0; i < part.groups; ++i) {
    Codes codes;
    Ahead ahead;
    codes.table = plan.table;
    const float* scales[kByteGroupTiles];
    float* c = part.sums(i);
    for (int t = 0; t < kByteGroupTiles; ++t) {
      const int64_t tile = part.tile(i, t), tile_ahead = tile + tiles_later;
      codes.codes[t] = w.codes + (tile * w.k + col0) * (kTile / 2);
      ahead.codes[t] = w.codes + (tile_ahead * w.k + later) * (kTile / 2);
      prefetch_scales(w, tile_ahead, later, n);
      prefetch_b_lines(part.g.lora_b, tile + kTilesAhead, col0 / kByteBlock * plan.b_lines, plan.b_lines);
      scales[t] = tile_scales(w, tile, seg0, segs, decoded[t]);
      if (w.zero != nullptr)
        outer(x->sum, sizeof(ByteRow) / sizeof(float), w.zero + (tile * w.segments() + seg0) * kTile, units, shift,
              part.rows, c + t * kTile);
    }
    byte_rows(x, part.rows, codes, panel, ahead, scales, shift, unit, units, c);
  }
}

// Row by row, in strips of columns: of groups, or of their tiles where these lie apart.
inline void store_sums(const Part& part) {
  const Int8Args& g = part.g;
  const bool whole = part.apart == 1;
  const int64_t strip = whole ? kByteLanes : kTile, step = whole ? kByteLanes : part.apart * kTile;
  const int64_t sum_step = whole ? part.rows * kByteLanes : kTile, size = dtype_size(g.y_dtype), bytes = step * size;
  const int64_t col0 = part.tile0 * kTile, end = min64(part.end * kTile, g.w.n);
  for (int64_t r = 0; r < part.rows; ++r) {
    const float* sums = part.c + r * kByteLanes;
    char* y = static_cast<char*>(g.y) + ((part.row0 + r) * g.w.n + col0) * size;
    for (int64_t left = end - col0; left > 0; left -= step, sums += sum_step, y += bytes)
      from_float(sums, y, g.y_dtype, min64(strip, left));
  }
}

// Rows [row0, row1) of tiles [tile0, tile1) of y, tile0 at the head of a group.
inline void byte_product(const Int8Args& g, int64_t row0, int64_t row1, int64_t tile0, int64_t tile1) {
  // Few rows read the codes in as many streams as a group has tiles, each through its share of the tiles to the end:
  // memory delivers long streams faster (4096 x 4096, 4 rows: 256 us instead of 266).
  const bool few = g.rows <= B::kFewRows;
  const int64_t groups = few ? 1 : kPartGroups, count = tile1 - tile0;
  const int64_t apart = few ? ceil_div(count, kByteGroupTiles) : 1, next = few ? 1 : groups * kByteGroupTiles;
  const int64_t ahead = few ? kCodesAhead / (kTile / 2) : kByteBlock;
  const Plan plan{B::table(kByteTables[g.w.format].code), next, ahead / g.w.k * next, ahead % g.w.k,
                  ceil_div(b_lines(g.lora_b), ceil_div(g.w.k, kByteBlock))};
  const int64_t rows = row1 - row0;
  float* c = static_cast<float*>(scratch(0, groups * kByteLanes * rows * sizeof(float)));
  constexpr int64_t kPanelBytes = kByteBlock * kByteLanes;
  uint8_t* panel = static_cast<uint8_t*>(scratch(1, kPanelBytes + Product<F32>::kBlock * kByteLanes * sizeof(float)));
#ifdef PF_BF16
  [[maybe_unused]] const BF16::Tiles held;  // for the branch: holding them anew for each part shows
#endif
  for (int64_t t0 = tile0; t0 < tile0 + (few ? apart : count); t0 += next) {
    const int64_t end = few ? tile1 : min64(tile1, t0 + next);
    const Part part{g, row0, rows, t0, end, few ? 1 : ceil_div(end - t0, kByteGroupTiles), apart, c};
    open_sums(part, panel + kPanelBytes);
    for (int64_t col0 = 0; col0 < g.w.k; col0 += kByteBlock) multiply_block(part, plan, col0, panel);
    store_sums(part);
  }
}

inline Int8 int8_table() {
  return {kByteGroupTiles, kByteRows, B::kExactRows, B::kMostRows, mean_error, quantize_bytes, byte_product};
}
