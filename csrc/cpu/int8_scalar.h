// Vocabulary of the int8-activation tier in plain C++, four lanes.

struct B : ByUnit<V> {
  static constexpr int kGroupVecs = 4;
  static constexpr int kMicroRows = 2;
  static constexpr int64_t kFewRows = 4;
  static constexpr int kOffset = 0;
  struct I {
    int32_t lane[4];
  };
  struct W {
    int8_t lane[4][4];
  };
  using C = W;
  using X = const int8_t*;
  using Table = const int8_t*;

  static I set1(int32_t v) { return {{v, v, v, v}}; }
  static V::F to_float(I v) {
    const float lanes[4] = {static_cast<float>(v.lane[0]), static_cast<float>(v.lane[1]), static_cast<float>(v.lane[2]),
                            static_cast<float>(v.lane[3])};
    return V::load(lanes);
  }
  static Table table(const int8_t* codes) { return codes; }
  static W load(const uint8_t* p) {
    W w;
    __builtin_memcpy(&w, p, sizeof(w));
    return w;
  }
  static void store(uint8_t* p, const W& w) { __builtin_memcpy(p, &w, sizeof(w)); }
  static C load_codes(const uint8_t* p) { return load(p); }
  template <int S>
  static W decode(Table t, const C& codes) {
    W w;
    for (int l = 0; l < 4; ++l)
      for (int i = 0; i < 4; ++i) w.lane[l][i] = t[codes.lane[l][i] >> 4 * S & 15];
    return w;
  }
  static X broadcast(const int8_t* p) { return p; }
  static I dot(I acc, const W& w, X x) {
    for (int l = 0; l < 4; ++l)
      for (int i = 0; i < 4; ++i) acc.lane[l] += w.lane[l][i] * x[i];
    return acc;
  }

  static float absmax(const float* v, int64_t n) {
    uint32_t most = 0;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t bits = float_to_bits(v[i]) & 0x7FFFFFFF;
      most = bits > most ? bits : most;
    }
    return bits_to_float(most);
  }
  static int32_t quantize(const float* v, int64_t n, float inverse, int8_t* out) {
    static constexpr int kOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7};  // where a column goes
    int32_t sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t q = inverse == 0.0f ? 0 : static_cast<int32_t>(__builtin_nearbyintf(v[i] * inverse));
      out[i / 8 * 8 + kOrder[i % 8]] = static_cast<int8_t>(q);
      sum += q;
    }
    return sum;
  }
};
