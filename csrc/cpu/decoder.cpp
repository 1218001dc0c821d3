#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention_forward.h"
#include "dispatch.h"

namespace pf {
namespace {

// Rows of a token's heads, `stride` elements apart, behind those in the cache.
void append(const char* rows, int64_t stride, const DecoderInput& in, const Decoder& d, int64_t past, void* cache,
            const int64_t* strides) {
  const int64_t size = dtype_size(d.dtype);
  for (int64_t b = 0; b < in.batch; ++b)
    for (int64_t t = 0; t < in.tokens; ++t, rows += stride * size)
      for (int64_t h = 0; h < d.kv_heads; ++h)
        std::memcpy(static_cast<char*>(cache) + (b * strides[0] + h * strides[1] + (past + t) * strides[2]) * size,
                    rows + h * d.dim * size, d.dim * size);
}

// Attention of the queries to the layer's prefix and cache.
void attention(const Decoder& d, const DecoderLayer& layer, const DecoderInput& in, const void* q, int64_t q_stride,
               const int32_t* positions, void* out, ParallelFor parallel) {
  const int64_t width = d.heads * d.dim, q_strides[] = {in.tokens * q_stride, d.dim, q_stride},
                strides[] = {in.tokens * width, d.dim, width};
  AttentionArgs a{};
  a.q = q;
  a.k = layer.keys;
  a.v = layer.values;
  a.dtype = d.dtype;
  a.batch = in.batch;
  a.heads = d.heads;
  a.kv_heads = d.kv_heads;
  a.tokens = in.tokens;
  a.length = layer.past + in.tokens;
  a.dim = d.dim;
  std::copy_n(q_strides, 3, a.q_strides);
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
  a.window = layer.window;
  a.scale = d.scale;
  a.out = out;
  std::copy_n(strides, 3, a.out_strides);
  attention_forward(a, parallel);
}

void activate(Activation activation, float* x, int64_t n) {
  const auto each = [&](const auto& function) { std::transform(x, x + n, x, function); };
  if (activation == kGelu) each([](float v) { return 0.5f * v * (1.0f + std::erf(v * 0.70710678f)); });
  if (activation == kRelu) each([](float v) { return v < 0.0f ? 0.0f : v; });
  if (activation == kSilu) each([](float v) { return v / (1.0f + std::exp(-v)); });
  if (activation == kTanh) each([](float v) { return std::tanh(v); });
}

}  // namespace

void decoder_forward(const Decoder& d, const DecoderInput& in, void* y, ParallelFor parallel) {
  const Kernels& k = *kernels();
  const int64_t m = in.batch * in.tokens, size = dtype_size(d.dtype);
  const int64_t q_width = d.heads * d.dim, kv_width = d.kv_heads * d.dim;
  const int64_t places = in.mask == nullptr ? 0 : in.batch * in.mask_length;
  // Elements from one token's to the next.
  const int64_t q_stride = d.joined ? q_width + 2 * kv_width : q_width, kv_stride = d.joined ? q_stride : kv_width;
  const int64_t gate_stride = d.joined ? 2 * d.intermediate : d.intermediate;
  const int64_t widths = 3 * (d.hidden + d.intermediate) + 2 * (q_width + kv_width);
  int64_t widest = 0;  // that a bottleneck has
  for (const DecoderLayer& layer : d.layers)
    for (const DecoderLinear& linear : layer.linear)
      for (const DecoderBottleneck& b : linear.bottlenecks) widest = std::max({widest, b.up.rows, b.up.cols});
  const int64_t floats = 3 * m * widest + places;
  Memory memory(kSlotDecoder, m * widths * size + floats * sizeof(float) + 1024);
  const auto take = [&](int64_t width) { return memory.take<char>(m * width * size); };
  char *stream = take(d.hidden), *normed = take(d.hidden), *added = take(d.hidden);
  char *q = take(q_stride), *attended = take(q_width);
  char* key = d.joined ? q + q_width * size : take(kv_width);
  char* value = d.joined ? key + kv_width * size : take(kv_width);
  char* gate = take(gate_stride);
  char* up = d.joined ? gate + d.intermediate * size : take(d.intermediate);
  char* activated = d.joined ? take(d.intermediate) : gate;
  float *update = memory.take<float>(m * widest), *updates = memory.take<float>(m * widest);
  char* narrow = take(widest);
  int32_t* positions = in.mask == nullptr ? nullptr : memory.take<int32_t>(places);
  int64_t placed = -1;  // positions are those of a layer with so many keys before
  const auto place = [&](int64_t past) {
    if (in.mask == nullptr || past == placed) return;
    placed = past;
    const int64_t length = past + in.tokens;
    for (int64_t b = 0; b < in.batch; ++b) {
      const uint8_t* seen = in.mask + (b + 1) * in.mask_length - length;
      for (int64_t i = 0; i < length; ++i)
        positions[b * length + i] = static_cast<int32_t>(i - past) + (seen[i] == 0 ? kHiddenKey : 0);
    }
  };

  const auto rows_of = [&](const void* data, int64_t rows, int64_t cols) {
    return Matrix{data, d.dtype, rows, cols, cols};
  };
  const auto multiply_by = [&](const DecoderLinear& linear, const void* from, void* to) {
    if (linear.dense.data != nullptr)
      return dense_forward(linear.dense, rows_of(from, m, linear.dense.cols), linear.bias, linear.branch, to, d.dtype,
                           parallel);
    if (linear.int8)
      return linear_forward_int8(linear.w, rows_of(from, m, linear.w.k), linear.bias, linear.branch, to, d.dtype,
                                 parallel);
    linear_forward(linear.w, rows_of(from, m, linear.w.k), linear.bias, linear.branch, to, d.dtype, nullptr, parallel);
  };
  // y += what its bottlenecks make of it, rounded wherever the module rounds.
  const auto add_bottlenecks = [&](const std::vector<DecoderBottleneck>& bottlenecks, char* y) {
    if (bottlenecks.empty()) return;
    const int64_t n = bottlenecks[0].up.rows;
    std::fill_n(updates, m * n, 0.0f);
    for (const DecoderBottleneck& b : bottlenecks) {
      const int64_t inner = b.down.rows, groups = b.uses.size();
      dense_forward(b.down, rows_of(y, m, n), b.down_bias, {}, narrow, d.dtype, parallel);
      k.to_float(narrow, d.dtype, update, m * inner);
      activate(b.activation, update, m * inner);
      k.from_float(update, narrow, d.dtype, m * inner);
      dense_forward(b.up, rows_of(narrow, m, inner), b.up_bias, {}, update, kFloat32, parallel);
      for (int64_t r = 0; r < m; ++r)
        for (int64_t i = r * n, end = groups == 0 || b.uses[r * groups / m] != 0 ? i + n : i; i < end; ++i)
          updates[i] += update[i];
    }
    k.from_float(updates, narrow, d.dtype, m * n);
    k.to_float(narrow, d.dtype, updates, m * n);
    k.to_float(y, d.dtype, update, m * n);
    for (int64_t i = 0; i < m * n; ++i) update[i] += updates[i];
    k.from_float(update, y, d.dtype, m * n);
  };
  const auto project = [&](const DecoderLinear& linear, const void* from, char* to) {
    multiply_by(linear, from, to);
    add_bottlenecks(linear.bottlenecks, to);
  };
  // body(begin, end) over [0, rows), of which each takes the time in which so many elements of a cache are read.
  const auto share = [&](int64_t rows, int64_t work, const auto& body) {
    run(parallel, rows, cache_grain(work), body);
  };
  // stream += added, where there is something to add; out = norm(stream).
  const auto norm = [&](bool adds, const void* weight, void* out) {
    RmsNormArgs args{rows_of(adds ? added : stream, m, d.hidden), {}, weight, d.eps, stream, out, d.gemma};
    if (adds) args.residual = rows_of(stream, m, d.hidden);
    share(m, d.hidden * 4, [&](int64_t r0, int64_t r1) { k.rms_norm(args, r0, r1); });
  };
  const auto norm_in_place = [&](char* x, int64_t rows, int64_t cols, const void* weight) {
    if (weight == nullptr) return;
    const RmsNormArgs args{rows_of(x, rows, cols), {}, weight, d.eps, nullptr, x, d.gemma};
    share(rows, cols * 4, [&](int64_t r0, int64_t r1) { k.rms_norm(args, r0, r1); });
  };
  const auto multiply = [&](char* x) {
    constexpr int64_t kPart = 128;
    float part[kPart];
    for (int64_t i = 0, all = d.multiplier == 1.0f ? 0 : m * d.hidden; i < all; i += kPart) {
      const int64_t n = std::min(kPart, all - i);
      k.to_float(x + i * size, d.dtype, part, n);
      for (int64_t j = 0; j < n; ++j) part[j] *= d.multiplier;
      k.from_float(part, x + i * size, d.dtype, n);
    }
  };
  const auto rotate = [&](char* x, int64_t heads, int64_t stride, const DecoderAngles& angles) {
    const RopeArgs args{.x = x,
                        .dtype = d.dtype,
                        .tokens = in.tokens,
                        .heads = heads,
                        .dim = in.turned,
                        .strides = {in.tokens * stride, d.dim, stride},
                        .cos = angles.cos,
                        .sin = angles.sin,
                        .angle_stride = angles.stride,
                        .y = x,
                        .y_strides = {stride, d.dim}};
    share(m, heads * in.turned * 16, [&](int64_t r0, int64_t r1) { k.rope(args, r0, r1); });
  };

  std::memcpy(stream, in.x, m * d.hidden * size);
  bool adds = false;
  for (const DecoderLayer& layer : d.layers) {
    norm(adds, layer.input_norm, normed);
    project(layer.linear[kQ], normed, q);
    if (!d.joined) {
      project(layer.linear[kK], normed, key);
      project(layer.linear[kV], normed, value);
    }
    norm_in_place(q, m * d.heads, d.dim, layer.q_norm);
    norm_in_place(key, m * d.kv_heads, d.dim, layer.k_norm);
    if (layer.angles >= 0) {
      rotate(q, d.heads, q_stride, in.angles[layer.angles]);
      rotate(key, d.kv_heads, kv_stride, in.angles[layer.angles]);
    }
    append(key, kv_stride, in, d, layer.past, layer.keys, layer.key_strides);
    append(value, kv_stride, in, d, layer.past, layer.values, layer.value_strides);
    place(layer.past);
    attention(d, layer, in, q, q_stride, positions, attended, parallel);
    project(layer.linear[kO], attended, added);
    norm_in_place(added, m, d.hidden, layer.attended_norm);
    multiply(added);
    norm(true, layer.post_norm, normed);
    project(layer.linear[kGate], normed, gate);
    if (!d.joined) project(layer.linear[kUp], normed, up);
    const Matrix gates{gate, d.dtype, m, d.intermediate, gate_stride}, ups{up, d.dtype, m, d.intermediate, gate_stride};
    share(m, d.intermediate * 16,
          [&](int64_t r0, int64_t r1) { (d.gemma ? k.geglu : k.swiglu)(gates, ups, activated, r0, r1); });
    project(layer.linear[kDown], activated, added);
    norm_in_place(added, m, d.hidden, layer.mlp_norm);
    multiply(added);
    adds = true;
  }
  norm(adds, d.norm, y);
}

}  // namespace pf
