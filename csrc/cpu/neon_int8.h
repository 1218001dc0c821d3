// Vocabulary of the int8-activation tier in AArch64 Advanced SIMD, with PF_DOTPROD for CPUs that have sdot. That is
// written as it is: no compiler flag is needed for it.

struct B : ByUnit<V> {
  static constexpr int kGroupVecs = 4;  // 4 x 4 sums, 4 vectors of weights, 1 broadcast, table: 22 of 32 registers
  static constexpr int kMicroRows = 4;
  static constexpr int64_t kFewRows = 8;
  static constexpr int kOffset = 0;
  using I = int32x4_t;
  using C = uint8x16_t;
  using W = int8x16_t;
  using X = int8x16_t;
  using Table = int8x16_t;

  static I set1(int32_t v) { return vdupq_n_s32(v); }
  static V::F to_float(I v) { return vcvtq_f32_s32(v); }
  static Table table(const int8_t* codes) { return vld1q_s8(codes); }
  static C load_codes(const uint8_t* p) { return vld1q_u8(p); }
  template <int S>
  static W decode(Table t, C codes) {
    return vqtbl1q_s8(t, V::nibbles<S == 1>(vreinterpretq_u32_u8(codes)));
  }
  static W load(const uint8_t* p) { return vreinterpretq_s8_u8(vld1q_u8(p)); }
  static void store(uint8_t* p, W w) { vst1q_u8(p, vreinterpretq_u8_s8(w)); }
  static X broadcast(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
  }
  static I dot(I acc, W w, X x) {
#ifdef PF_DOTPROD
    asm(".arch_extension dotprod\n\tsdot %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(w), "w"(x));
    return acc;
#else
    // 2 * 127 * 127 fits 16 bits.
    const int16x8_t pairs = vpaddq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(x)), vmull_high_s8(w, x));
    return vpadalq_s16(acc, pairs);
#endif
  }

  static float absmax(const float* v, int64_t n) {
    uint32x4_t most = vdupq_n_u32(0);
    for (int64_t i = 0; i < n; i += 4) most = vmaxq_u32(most, vreinterpretq_u32_f32(V::abs(V::load(v + i))));
    return bits_to_float(vmaxvq_u32(most));
  }
  static int32_t quantize(const float* v, int64_t n, float inverse, int8_t* out) {
    static constexpr uint8_t kOrder[16] = {0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15};
    const uint8x16_t order = vld1q_u8(kOrder);
    int32x4_t sum = vdupq_n_s32(0);
    for (int64_t i = 0; i < n; i += 16) {
      int16x4_t words[4];
      for (int j = 0; j < 4; ++j) {
        const int32x4_t q = vcvtnq_s32_f32(V::mul(V::load(v + i + 4 * j), V::set1(inverse)));
        sum = vaddq_s32(sum, q);
        words[j] = vmovn_s32(q);
      }
      const int8x8_t low = vmovn_s16(vcombine_s16(words[0], words[1]));
      const int8x8_t high = vmovn_s16(vcombine_s16(words[2], words[3]));
      vst1q_s8(out + i, vqtbl1q_s8(vcombine_s8(low, high), order));
    }
    return vaddvq_s32(sum);
  }
};
