// Vocabulary pieces in plain C++, for the instruction sets that have nothing better.
#pragma once

PF_INLINE float bits_to_float(uint32_t bits) {
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
PF_INLINE uint32_t float_to_bits(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  return bits;
}
PF_INLINE float bf16_to_float(uint16_t h) { return bits_to_float(static_cast<uint32_t>(h) << 16); }
PF_INLINE uint16_t float_to_bf16(float f) {
  const uint32_t bits = float_to_bits(f);
  if (f != f) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
PF_INLINE float f16_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, magnitude = h & 0x7FFF;
  if (magnitude >= 0x7C00) return bits_to_float(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
  // Scaling by 2^112 rebiases the exponent and normalizes subnormals exactly.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}
PF_INLINE uint16_t float_to_f16(float f) {
  const uint32_t bits = float_to_bits(f), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00 | (magnitude >> 13 & 0x3FF));
  if (magnitude >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // rounds beyond 65504
  if (magnitude < 0x38800000)  // subnormal: let the addition of 0.5 round at the right bit
    return static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3F000000));
  return static_cast<uint16_t>(sign | (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13);
}

PF_INLINE void scalar_transpose16(const float* in, int64_t ld, float* out) {
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 16; ++c) out[c * 16 + r] = in[r * ld + c];
}

// Rank of v among sorted midpoints; NaN takes the last.
PF_INLINE int scalar_rank(float v, const float* midpoints) {
  int rank = 0;
  for (int i = 0; i < 15; ++i) rank += !(v <= midpoints[i]);
  return rank;
}

PF_INLINE void scalar_lookup_bytes(const float* table, const uint8_t* index, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = table[index[i]];
}

PF_INLINE void scalar_round_codes(const float* values, int64_t n, float low, float inverse, uint8_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    const float v = (values[i] - low) * inverse;
    const float clamped = v > 0.0f ? (v < 15.0f ? v : 15.0f) : 0.0f;
    out[i] = static_cast<uint8_t>(__builtin_nearbyintf(clamped));
  }
}
