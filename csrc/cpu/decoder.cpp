#include "decoder.h"

#include <algorithm>
#include <cstring>

#include "attention_forward.h"
#include "dispatch.h"

namespace pf {
namespace {

void append(const char* rows, const DecoderInput& in, const Decoder& d, void* cache, const int64_t* strides) {
  const int64_t size = dtype_size(d.dtype);
  for (int64_t b = 0; b < in.batch; ++b)
    for (int64_t t = 0; t < in.tokens; ++t)
      for (int64_t h = 0; h < d.kv_heads; ++h, rows += d.dim * size)
        std::memcpy(static_cast<char*>(cache) + (b * strides[0] + h * strides[1] + (in.past + t) * strides[2]) * size,
                    rows, d.dim * size);
}

// Attention of the queries to the layer's prefix and cache.
void attention(const Decoder& d, const DecoderLayer& layer, const DecoderInput& in, const void* q,
               const int32_t* positions, void* out, ParallelFor parallel) {
  const int64_t width = d.heads * d.dim, strides[] = {in.tokens * width, d.dim, width};
  AttentionArgs a{};
  a.q = q;
  a.k = layer.keys;
  a.v = layer.values;
  a.dtype = d.dtype;
  a.batch = in.batch;
  a.heads = d.heads;
  a.kv_heads = d.kv_heads;
  a.tokens = in.tokens;
  a.length = in.past + in.tokens;
  a.dim = d.dim;
  std::copy_n(strides, 3, a.q_strides);
  std::copy_n(layer.key_strides, 3, a.k_strides);
  std::copy_n(layer.value_strides, 3, a.v_strides);
  if (in.prefix_length > 0) {
    a.prefix_k = layer.prefix_keys;
    a.prefix_v = layer.prefix_values;
    a.prefix_length = in.prefix_length;
    a.prefix_index = in.prefix_index;
    a.prefix_lengths = in.prefix_lengths;
    std::copy_n(layer.prefix_key_strides, 3, a.prefix_k_strides);
    std::copy_n(layer.prefix_value_strides, 3, a.prefix_v_strides);
  }
  a.positions = positions;
  a.causal = true;
  a.scale = d.scale;
  a.out = out;
  std::copy_n(strides, 3, a.out_strides);
  attention_forward(a, parallel);
}

}  // namespace

void decoder_forward(const Decoder& d, const DecoderInput& in, void* y, ParallelFor parallel) {
  const Kernels& k = *kernels();
  const int64_t m = in.batch * in.tokens, size = dtype_size(d.dtype);
  const int64_t q_width = d.heads * d.dim, kv_width = d.kv_heads * d.dim;
  const int64_t places = in.mask == nullptr ? 0 : in.batch * (in.past + in.tokens);
  const int64_t widths = 3 * d.hidden + 2 * (q_width + kv_width + d.intermediate);
  Memory memory(kSlotDecoder, m * widths * size + places * sizeof(int32_t) + 1024);
  const auto take = [&](int64_t width) { return memory.take<char>(m * width * size); };
  char *stream = take(d.hidden), *normed = take(d.hidden), *added = take(d.hidden);
  char *q = take(q_width), *attended = take(q_width), *key = take(kv_width), *value = take(kv_width);
  char *gate = take(d.intermediate), *up = take(d.intermediate);
  int32_t* positions = nullptr;
  if (in.mask != nullptr) {
    positions = memory.take<int32_t>(places);
    for (int64_t i = 0; i < places; ++i)
      positions[i] = static_cast<int32_t>(i % (in.past + in.tokens) - in.past) + (in.mask[i] == 0 ? kHiddenKey : 0);
  }

  const auto rows_of = [&](const void* data, int64_t rows, int64_t cols) {
    return Matrix{data, d.dtype, rows, cols, cols};
  };
  const auto project = [&](const DecoderLinear& linear, const void* from, void* to) {
    if (linear.dense.data != nullptr)
      return dense_forward(linear.dense, rows_of(from, m, linear.dense.cols), linear.bias, linear.branch, to, d.dtype,
                           parallel);
    if (linear.int8)
      return linear_forward_int8(linear.w, rows_of(from, m, linear.w.k), linear.bias, linear.branch, to, d.dtype,
                                 parallel);
    linear_forward(linear.w, rows_of(from, m, linear.w.k), linear.bias, linear.branch, to, d.dtype, nullptr, parallel);
  };
  // stream += added, where there is something to add; out = norm(stream).
  const auto norm = [&](bool adds, const void* weight, void* out) {
    RmsNormArgs args{rows_of(adds ? added : stream, m, d.hidden), {}, weight, d.eps, stream, out};
    if (adds) args.residual = rows_of(stream, m, d.hidden);
    k.rms_norm(args, 0, m);
  };
  const auto head_norm = [&](char* x, int64_t heads, const void* weight) {
    if (weight != nullptr) k.rms_norm({rows_of(x, m * heads, d.dim), {}, weight, d.eps, nullptr, x}, 0, m * heads);
  };
  const auto rotate = [&](char* x, int64_t heads) {
    const int64_t token = heads * d.dim;
    k.rope({x,
            d.dtype,
            in.tokens,
            heads,
            d.dim,
            {in.tokens * token, d.dim, token},
            in.cos,
            in.sin,
            in.angle_stride,
            false,
            x},
           0, m);
  };

  std::memcpy(stream, in.x, m * d.hidden * size);
  bool adds = false;
  for (const DecoderLayer& layer : d.layers) {
    norm(adds, layer.input_norm, normed);
    project(layer.linear[kQ], normed, q);
    project(layer.linear[kK], normed, key);
    project(layer.linear[kV], normed, value);
    head_norm(q, d.heads, layer.q_norm);
    head_norm(key, d.kv_heads, layer.k_norm);
    rotate(q, d.heads);
    rotate(key, d.kv_heads);
    append(key, in, d, layer.keys, layer.key_strides);
    append(value, in, d, layer.values, layer.value_strides);
    attention(d, layer, in, q, positions, attended, parallel);
    project(layer.linear[kO], attended, added);
    norm(true, layer.post_norm, normed);
    project(layer.linear[kGate], normed, gate);
    project(layer.linear[kUp], normed, up);
    const Matrix gates = rows_of(gate, m, d.intermediate), ups = rows_of(up, m, d.intermediate);
    run(parallel, m, cache_grain(d.intermediate * 16),
        [&](int64_t r0, int64_t r1) { k.swiglu(gates, ups, gate, r0, r1); });
    project(layer.linear[kDown], gate, added);
    adds = true;
  }
  norm(adds, d.norm, y);
}

}  // namespace pf
