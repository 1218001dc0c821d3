#include "decoder.h"

#include <algorithm>
#include <cstring>

#include "dispatch.h"

namespace pf {
namespace {

constexpr int64_t kThreadWork = int64_t{1} << 17;  // elements of a cache, below which one thread is faster

template <class Body>
void run(ParallelFor parallel, int64_t n, int64_t work_per_item, const Body& body) {
  parallel(n, std::max<int64_t>(kThreadWork / std::max<int64_t>(work_per_item, 1), 1), const_cast<Body*>(&body),
           [](void* ctx, int64_t b, int64_t e) { (*static_cast<const Body*>(ctx))(b, e); });
}

// The buffers of one call, side by side in the thread's scratch.
struct Buffers {
  char* next;
  char* take(int64_t bytes) {
    char* taken = next;
    next += aligned(bytes);
    return taken;
  }
  static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }
};

void append(const char* rows, const DecoderInput& in, const Decoder& d, void* cache, const int64_t* strides) {
  const int64_t size = dtype_size(d.dtype);
  for (int64_t b = 0; b < in.batch; ++b)
    for (int64_t t = 0; t < in.tokens; ++t)
      for (int64_t h = 0; h < d.kv_heads; ++h, rows += d.dim * size)
        std::memcpy(static_cast<char*>(cache) + (b * strides[0] + h * strides[1] + (in.past + t) * strides[2]) * size,
                    rows, d.dim * size);
}

// In how many results attention to the prefix comes: a shared one in two, that two threads have equal parts.
int64_t prefix_pieces(const DecoderInput& in) {
  if (in.prefix_length == 0) return 0;
  return in.prefix_index == nullptr && in.prefix_length % 2 == 0 && in.prefix_length >= 128 ? 2 : 1;
}

// Attention of the queries in `args` to the layer's prefix, into `out` and `lse`, to be joined to what follows. Where
// the rows share a prefix, their queries are one row of a batch: it is read once.
void attend_prefix(const Kernels& k, const Decoder& d, const DecoderLayer& layer, const DecoderInput& in,
                   int64_t pieces, char* out, float* lse, AttendArgs& args, ParallelFor parallel) {
  const int64_t m = in.batch * in.tokens, width = d.heads * d.dim, group = d.heads / d.kv_heads;
  const bool shared = in.prefix_index == nullptr;
  AttentionArgs a{};
  a.q = args.q;
  a.dtype = d.dtype;
  a.heads = d.heads;
  a.kv_heads = d.kv_heads;
  a.dim = d.dim;
  a.scale = d.scale;
  a.out = out;
  a.lse = lse;
  const int64_t batch_stride = shared ? 0 : in.tokens * width;
  const int64_t q_strides[] = {batch_stride, d.dim, width},
                out_strides[] = {shared ? m * width : batch_stride, d.dim, width};
  std::copy_n(q_strides, 3, a.q_strides);
  std::copy_n(out_strides, 3, a.out_strides);
  if (shared) {
    a.batch = pieces;
    a.tokens = m;
    a.length = in.prefix_length / pieces;
    a.k = layer.prefix_keys;
    a.v = layer.prefix_values;
    std::copy_n(layer.prefix_key_strides, 3, a.k_strides);
    std::copy_n(layer.prefix_value_strides, 3, a.v_strides);
    a.k_strides[0] = a.length * a.k_strides[2];
    a.v_strides[0] = a.length * a.v_strides[2];
  } else {
    a.batch = in.batch;
    a.tokens = in.tokens;
    a.prefix_k = layer.prefix_keys;
    a.prefix_v = layer.prefix_values;
    a.prefix_length = in.prefix_length;
    a.prefix_index = in.prefix_index;
    a.prefix_lengths = in.prefix_lengths;
    std::copy_n(layer.prefix_key_strides, 3, a.prefix_k_strides);
    std::copy_n(layer.prefix_value_strides, 3, a.prefix_v_strides);
  }
  const AttentionKernels& kernel =
      d.dtype == kBFloat16 && k.attention_bf16.forward != nullptr ? k.attention_bf16 : k.attention_f32;
  const int64_t units = kernel.forward_blocks(a) * a.batch * a.kv_heads;
  run(parallel, units, in.prefix_length / pieces * d.dim * a.tokens * group, [&](int64_t u0, int64_t u1) {
    for (int64_t unit = u0; unit < u1; ++unit) kernel.forward(a, unit);
  });
  args.others = pieces;
  args.other = out;
  args.other_stride = m * width;
  args.other_lse = lse;
  const int64_t row = in.tokens * group;
  const int64_t lse_strides[] = {shared ? row : d.kv_heads * row, shared ? m * group : row, m * d.heads};
  std::copy_n(lse_strides, 3, args.other_lse_strides);
}

}  // namespace

void decoder_forward(const Decoder& d, const DecoderInput& in, void* y, ParallelFor parallel) {
  const Kernels& k = *kernels();
  const int64_t m = in.batch * in.tokens, size = dtype_size(d.dtype);
  const int64_t q_width = d.heads * d.dim, kv_width = d.kv_heads * d.dim;
  int64_t rank = 0;
  for (const DecoderLayer& layer : d.layers)
    for (const DecoderLinear& linear : layer.linear) rank = std::max(rank, linear.branch.rank());
  const int64_t widths[] = {d.hidden, d.hidden, d.hidden,       q_width,       q_width,
                            kv_width, kv_width, d.intermediate, d.intermediate};
  int64_t bytes = Buffers::aligned(m * rank * sizeof(float));
  for (int64_t width : widths) bytes += Buffers::aligned(m * width * size);
  const int64_t pieces = prefix_pieces(in);
  bytes += Buffers::aligned(pieces * m * q_width * size) + Buffers::aligned(pieces * m * d.heads * sizeof(float));
  Buffers buffers{static_cast<char*>(scratch(kDecoderScratch, bytes))};
  const auto take = [&](int64_t width) { return buffers.take(m * width * size); };
  char *stream = take(d.hidden), *normed = take(d.hidden), *added = take(d.hidden);
  char *q = take(q_width), *attended = take(q_width), *key = take(kv_width), *value = take(kv_width);
  char *gate = take(d.intermediate), *up = take(d.intermediate);
  float* s = reinterpret_cast<float*>(buffers.take(m * rank * sizeof(float)));
  char* of_prefix = buffers.take(pieces * m * q_width * size);
  float* of_prefix_lse = reinterpret_cast<float*>(buffers.take(pieces * m * d.heads * sizeof(float)));

  const auto rows_of = [&](const void* data, int64_t rows, int64_t cols) {
    return Matrix{data, d.dtype, rows, cols, cols};
  };
  const auto project = [&](const DecoderLinear& linear, const void* from, void* to) {
    if (linear.int8)
      return linear_forward_int8(linear.w, rows_of(from, m, linear.w.k), linear.bias, linear.branch, to, d.dtype,
                                 parallel);
    linear_forward(linear.w, rows_of(from, m, linear.w.k), linear.bias, linear.branch, to, d.dtype, s, parallel);
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
    AttendArgs args{q,     layer.keys,          layer.values, d.dtype, in.tokens, d.heads, d.kv_heads,
                    d.dim, in.past + in.tokens, {},           {},      d.scale,   in.mask, attended};
    std::copy_n(layer.key_strides, 3, args.k_strides);
    std::copy_n(layer.value_strides, 3, args.v_strides);
    if (pieces > 0) attend_prefix(k, d, layer, in, pieces, of_prefix, of_prefix_lse, args, parallel);
    run(parallel, in.batch * d.kv_heads, args.length * d.dim * in.tokens * (d.heads / d.kv_heads),
        [&](int64_t u0, int64_t u1) { k.attend(args, u0, u1); });
    project(layer.linear[kO], attended, added);
    norm(true, layer.post_norm, normed);
    project(layer.linear[kGate], normed, gate);
    project(layer.linear[kUp], normed, up);
    const Matrix gates = rows_of(gate, m, d.intermediate), ups = rows_of(up, m, d.intermediate);
    run(parallel, m, d.intermediate * 16, [&](int64_t r0, int64_t r1) { k.swiglu(gates, ups, gate, r0, r1); });
    project(layer.linear[kDown], gate, added);
    adds = true;
  }
  norm(adds, d.norm, y);
}

}  // namespace pf
