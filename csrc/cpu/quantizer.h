// To 4 bits and back, in the `rows` layout. Included by algorithm.h, after elements.h.

// Nibbles of n codes (one a byte), the first in the high half; an odd last one is paired with `pad`.
inline void pack_nibbles(const uint8_t* codes, int64_t n, uint8_t pad, uint8_t* out) {
  for (int64_t i = 0; i < n / 2; ++i) out[i] = static_cast<uint8_t>(codes[2 * i] << 4 | codes[2 * i + 1]);
  if (n % 2) out[n / 2] = static_cast<uint8_t>(codes[n - 1] << 4 | pad);
}

// The quantizer's sorted codebook: 15 midpoints and the code of each rank.
struct Codebook {
  alignas(64) float midpoints[16];
  alignas(64) int32_t order[16];
  explicit Codebook(const float* table) {
    for (int i = 0; i < 16; ++i) {
      int rank = 0;  // FP4 holds 0 and -0: equal values keep their order
      for (int j = 0; j < 16; ++j) rank += table[j] < table[i] || (table[j] == table[i] && j < i);
      order[rank] = i;
    }
    for (int i = 0; i < 15; ++i) midpoints[i] = (table[order[i]] + table[order[i + 1]]) / 2;
    midpoints[15] = __builtin_inff();
  }
};

constexpr int64_t kQuantizeStrip = 4096;

void quantize(const void* src, int dtype, int64_t n, int format, int64_t blocksize, uint8_t* codes, float* scale,
              float* zero, int64_t block0, int64_t block1) {
  const Codebook book(kTables[format]);
  const typename V::Search search(book.midpoints, book.order);
  alignas(64) float values[kQuantizeStrip + 16];
  alignas(64) uint8_t out[kQuantizeStrip + 64];
  for (int64_t block = block0; block < block1; ++block) {
    const int64_t at = block * blocksize, count = min64(blocksize, n - at);
    to_float(static_cast<const char*>(src) + at * dtype_size(dtype), dtype, values, count);
    const int64_t padded = ceil_div(count, kLanes) * kLanes;
    for (int64_t i = count; i < padded; ++i) values[i] = values[count - 1];
    uint8_t pad = 0;
    if (format == kINT4) {
      V::F low = V::load(values), high = low, sum = V::zero();
      for (int64_t i = 0; i < padded; i += kLanes) {
        const V::F v = V::load(values + i);
        low = V::min(low, v);
        high = V::max(high, v);
        sum = V::add(sum, V::mul(v, V::zero()));  // NaN when any value is NaN or infinite
      }
      float lo = V::reduce_min(low), hi = V::reduce_max(high);
      const float poison = V::reduce(sum);
      if (poison != poison)  // a NaN, or an infinity whose sign min and max keep
        for (int64_t i = 0; i < count; ++i)
          if (values[i] != values[i]) lo = hi = values[i];
      const float step = (hi - lo) / 15.0f, inverse = step > 0.0f ? 1.0f / step : 0.0f;
      V::round_codes(values, padded, lo, inverse, out);
      scale[block] = step;
      zero[block] = lo;
    } else {
      V::F most = V::zero();
      bool nan = false;
      for (int64_t i = 0; i < padded; i += kLanes) {
        const V::F v = V::load(values + i);
        most = V::max(most, V::abs(v));
        nan |= V::any_nan(v);
      }
      float absmax = nan ? __builtin_nanf("") : V::reduce_max(most);
      const bool tail = count < blocksize;
      const float least = absmax < 1e-38f ? 1e-38f : absmax;
      if (tail) absmax = least;
      // bitsandbytes divides in the short last block and multiplies by the reciprocal elsewhere.
      const V::F by = V::set1(tail ? least : 1.0f / least);
      for (int64_t i = 0; i < padded; i += kLanes) {
        const V::F v = V::load(values + i);
        search.codes(tail ? V::div(v, by) : V::mul(v, by), out + i);
      }
      scale[block] = absmax;
      pad = format == kNF4 ? 7 : 0;
    }
    pack_nibbles(out, count, pad, codes + at / 2);
  }
}

void dequantize(const uint8_t* codes, const float* scale, const float* zero, int64_t n, int format, int64_t blocksize,
                void* dst, int dtype, int64_t block0, int64_t block1) {
  const V::T table = V::table(kTables[format]);
  const int size = dtype_size(dtype);
  for (int64_t block = block0; block < block1; ++block) {
    const int64_t at = block * blocksize, count = min64(blocksize, n - at);
    const V::F s = V::set1(scale[block]), z = V::set1(zero == nullptr ? 0.0f : zero[block]);
    char* out = static_cast<char*>(dst) + at * size;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      V::F v = V::mul(V::decode_bytes(table, codes + (at + i) / 2), s);
      if (zero != nullptr) v = V::add(v, z);
      with_dtype(dtype, PF_BODY(int D) { store_as<D>(out + i * size, v); });
    }
    for (; i < count; ++i) {
      const int byte = codes[(at + i) / 2];
      float v = kTables[format][i % 2 ? byte & 15 : byte >> 4] * scale[block];
      if (zero != nullptr) v += zero[block];
      from_float(&v, out + i * size, dtype, 1);
    }
  }
}
