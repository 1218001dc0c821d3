// Vocabulary of the int8-activation tier in AVX-512, for CPUs that also have VNNI. Its one instruction is written as it
// is: no compiler flag is needed for it, and GCC copies the sums around where it comes from an intrinsic.

struct B {
  static constexpr int kGroupVecs = 2;  // 6 x 2 sums of both kinds, 2 of weights, 1 broadcast, table, mask: 29 of 32
  static constexpr int kMicroRows = 6;
  static constexpr int64_t kFewRows = 16, kMostRows = INT64_MAX;
#ifdef PF_BF16X2
  static constexpr int64_t kExactRows = 3;
#else
  static constexpr int64_t kExactRows = 2;
#endif
  static constexpr int kOffset = 128;  // vpdpbusd takes the weight unsigned
  using I = __m512i;
  using C = __m512i;
  using W = __m512i;
  using X = __m512i;
  using Table = __m512i;

  static I set1(int32_t v) { return _mm512_set1_epi32(v); }
  static V::F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  static Table table(const int8_t* codes) {
    const __m128i t = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)), _mm_set1_epi8(-128));
    return _mm512_broadcast_i32x4(t);
  }
  static C load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  template <int S>
  static W decode(Table t, C codes) {
    return _mm512_shuffle_epi8(t, _mm512_and_si512(_mm512_srli_epi32(codes, 4 * S), _mm512_set1_epi8(15)));
  }
  static W load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void store(uint8_t* p, W w) { _mm512_storeu_si512(p, w); }
  static X broadcast(const int8_t* p) { return V::broadcast_lane(p); }
  static I dot(I acc, W w, X x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
    return acc;
  }

  // NaN or infinite where a value is: as integers, absolute values order like numbers, and these come last.
  static V::F absmax(const float* v, int64_t n) {
    __m512i most = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += 16)
      most = _mm512_max_epi32(most, _mm512_castps_si512(_mm512_abs_ps(_mm512_loadu_ps(v + i))));
    return _mm512_castsi512_ps(most);
  }
  // n values (a multiple of 16) times `inverse`, rounded, in a ByteRow's order; returns their sum.
  static I quantize(const float* v, int64_t n, float inverse, int8_t* out) {
    const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += 16) {
      const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(v + i), _mm512_set1_ps(inverse)));
      sum = _mm512_add_epi32(sum, q);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm_shuffle_epi8(_mm512_cvtepi32_epi8(q), order));
    }
    return sum;
  }

  // Of the lanes of 16 such vectors each.
  static void join_max(const V::F* lanes, float* out) {
    V::store(out, V::join16(lanes, [](V::F a, V::F b) {
               return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
             }));
  }
  static void join_sum(const V::F* lanes, float* out) { V::store(out, V::join16(lanes, V::add)); }
  static void join_sum(const I* lanes, int32_t* out) {
    const V::F sums = V::join16(reinterpret_cast<const V::F*>(lanes), [](V::F a, V::F b) {
      return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
    });
    _mm512_storeu_si512(out, _mm512_castps_si512(sums));
  }
};
