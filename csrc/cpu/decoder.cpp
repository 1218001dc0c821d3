#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention_forward.h"
#include "dispatch.h"

namespace pf {
namespace {

// The most numbers that a bottleneck has for a row, before or behind it or inside.
int64_t widest_bottleneck(const Decoder& d) {
  int64_t widest = 0;
  for (const DecoderLayer& layer : d.layers)
    for (const DecoderLinear& linear : layer.linear)
      for (const DecoderBottleneck& b : linear.bottlenecks) widest = std::max({widest, b.up.rows, b.up.cols});
  return widest;
}

void activate(Activation activation, float* x, int64_t n) {
  const auto each = [&](const auto& function) { std::transform(x, x + n, x, function); };
  if (activation == kGelu) each([](float v) { return 0.5f * v * (1.0f + std::erf(v * 0.70710678f)); });
  if (activation == kRelu) each([](float v) { return v < 0.0f ? 0.0f : v; });
  if (activation == kSilu) each([](float v) { return v / (1.0f + std::exp(-v)); });
  if (activation == kTanh) each([](float v) { return std::tanh(v); });
}

// One pass of all tokens through the layers: the steps of a layer, and the memory that they share.
class Pass {
 public:
  Pass(const Decoder& d, const DecoderInput& in, ParallelFor parallel)
      : d_(d),
        in_(in),
        parallel_(parallel),
        m_(in.batch * in.tokens),
        size_(dtype_size(d.dtype)),
        q_stride_(d.joined ? q_width() + 2 * kv_width() : q_width()),
        kv_stride_(d.joined ? q_stride_ : kv_width()),
        gate_stride_(d.joined ? 2 * d.intermediate : d.intermediate) {
    const int64_t places = in.mask == nullptr ? 0 : in.batch * in.mask_length, widest = widest_bottleneck(d);
    const int64_t widths = 3 * (d.hidden + d.intermediate) + 2 * (q_width() + kv_width()) + widest;
    const int64_t floats = 2 * m_ * widest + places;
    Memory memory(kSlotDecoder, m_ * widths * size_ + floats * sizeof(float) + 1024);
    const auto take = [&](int64_t width) { return memory.take<char>(m_ * width * size_); };
    stream_ = take(d.hidden);
    normed_ = take(d.hidden);
    added_ = take(d.hidden);
    q_ = take(q_stride_);
    attended_ = take(q_width());
    key_ = d.joined ? q_ + q_width() * size_ : take(kv_width());
    value_ = d.joined ? key_ + kv_width() * size_ : take(kv_width());
    gate_ = take(gate_stride_);
    up_ = d.joined ? gate_ + d.intermediate * size_ : take(d.intermediate);
    activated_ = d.joined ? take(d.intermediate) : gate_;
    narrow_ = take(widest);
    update_ = memory.take<float>(m_ * widest);
    updates_ = memory.take<float>(m_ * widest);
    positions_ = in.mask == nullptr ? nullptr : memory.take<int32_t>(places);
  }

  void operator()(void* y) {
    std::memcpy(stream_, in_.x, m_ * d_.hidden * size_);
    bool adds = false;
    for (const DecoderLayer& layer : d_.layers) {
      norm(adds, layer.input_norm, normed_);
      attend(layer);
      norm(true, layer.post_norm, normed_);
      gated_mlp(layer);
      adds = true;
    }
    norm(adds, d_.norm, y);
  }

 private:
  int64_t q_width() const { return d_.heads * d_.dim; }
  int64_t kv_width() const { return d_.kv_heads * d_.dim; }
  Matrix matrix(const void* data, int64_t rows, int64_t cols) const { return {data, d_.dtype, rows, cols, cols}; }

  // body(begin, end) over [0, rows), of which each takes the time in which so many elements of a cache are read.
  template <class Body>
  void share(int64_t rows, int64_t work, const Body& body) const {
    run(parallel_, rows, cache_grain(work), body);
  }

  // ---- a layer's halves: from `normed` to `added` ----

  void attend(const DecoderLayer& layer) {
    project(layer.linear[kQ], normed_, q_);
    if (!d_.joined) {
      project(layer.linear[kK], normed_, key_);
      project(layer.linear[kV], normed_, value_);
    }
    norm_in_place(q_, m_ * d_.heads, d_.dim, layer.q_norm);
    norm_in_place(key_, m_ * d_.kv_heads, d_.dim, layer.k_norm);
    if (layer.angles >= 0) {
      rotate(q_, d_.heads, q_stride_, in_.angles[layer.angles]);
      rotate(key_, d_.kv_heads, kv_stride_, in_.angles[layer.angles]);
    }
    append(key_, layer.past, layer.keys, layer.key_strides);
    append(value_, layer.past, layer.values, layer.value_strides);
    place(layer.past);
    attention(layer);
    project(layer.linear[kO], attended_, added_);
    norm_in_place(added_, m_, d_.hidden, layer.attended_norm);
    multiply();
  }

  void gated_mlp(const DecoderLayer& layer) {
    project(layer.linear[kGate], normed_, gate_);
    if (!d_.joined) project(layer.linear[kUp], normed_, up_);
    const Matrix gates{gate_, d_.dtype, m_, d_.intermediate, gate_stride_},
        ups{up_, d_.dtype, m_, d_.intermediate, gate_stride_};
    share(m_, d_.intermediate * 16,
          [&](int64_t r0, int64_t r1) { (d_.gemma ? k_.geglu : k_.swiglu)(gates, ups, activated_, r0, r1); });
    project(layer.linear[kDown], activated_, added_);
    norm_in_place(added_, m_, d_.hidden, layer.mlp_norm);
    multiply();
  }

  // ---- their steps ----

  // stream += added, where there is something to add; out = norm(stream).
  void norm(bool adds, const void* weight, void* out) {
    RmsNormArgs args{matrix(adds ? added_ : stream_, m_, d_.hidden), {}, weight, d_.eps, stream_, out, d_.gemma};
    if (adds) args.residual = matrix(stream_, m_, d_.hidden);
    share(m_, d_.hidden * 4, [&](int64_t r0, int64_t r1) { k_.rms_norm(args, r0, r1); });
  }

  void norm_in_place(char* x, int64_t rows, int64_t cols, const void* weight) {
    if (weight == nullptr) return;
    const RmsNormArgs args{matrix(x, rows, cols), {}, weight, d_.eps, nullptr, x, d_.gemma};
    share(rows, cols * 4, [&](int64_t r0, int64_t r1) { k_.rms_norm(args, r0, r1); });
  }

  void project(const DecoderLinear& linear, const void* from, char* to) {
    if (linear.dense.data != nullptr)
      dense_forward(linear.dense, matrix(from, m_, linear.dense.cols), linear.bias, linear.branch, to, d_.dtype,
                    parallel_);
    else if (linear.int8)
      linear_forward_int8(linear.w, matrix(from, m_, linear.w.k), linear.bias, linear.branch, to, d_.dtype, parallel_);
    else
      linear_forward(linear.w, matrix(from, m_, linear.w.k), linear.bias, linear.branch, to, d_.dtype, nullptr,
                     parallel_);
    add_bottlenecks(linear.bottlenecks, to);
  }

  // y += what its bottlenecks make of it, rounded wherever the module rounds.
  void add_bottlenecks(const std::vector<DecoderBottleneck>& bottlenecks, char* y) {
    if (bottlenecks.empty()) return;
    const int64_t n = bottlenecks[0].up.rows;
    std::fill_n(updates_, m_ * n, 0.0f);
    for (const DecoderBottleneck& b : bottlenecks) {
      const int64_t inner = b.down.rows, groups = b.uses.size();
      dense_forward(b.down, matrix(y, m_, n), b.down_bias, {}, narrow_, d_.dtype, parallel_);
      k_.to_float(narrow_, d_.dtype, update_, m_ * inner);
      activate(b.activation, update_, m_ * inner);
      k_.from_float(update_, narrow_, d_.dtype, m_ * inner);
      dense_forward(b.up, matrix(narrow_, m_, inner), b.up_bias, {}, update_, kFloat32, parallel_);
      for (int64_t r = 0; r < m_; ++r)
        for (int64_t i = r * n, end = groups == 0 || b.uses[r * groups / m_] != 0 ? i + n : i; i < end; ++i)
          updates_[i] += update_[i];
    }
    k_.from_float(updates_, narrow_, d_.dtype, m_ * n);
    k_.to_float(narrow_, d_.dtype, updates_, m_ * n);
    k_.to_float(y, d_.dtype, update_, m_ * n);
    for (int64_t i = 0; i < m_ * n; ++i) update_[i] += updates_[i];
    k_.from_float(update_, y, d_.dtype, m_ * n);
  }

  // added *= the stack's multiplier
  void multiply() {
    constexpr int64_t kPart = 128;
    float part[kPart];
    for (int64_t i = 0, all = d_.multiplier == 1.0f ? 0 : m_ * d_.hidden; i < all; i += kPart) {
      const int64_t n = std::min(kPart, all - i);
      k_.to_float(added_ + i * size_, d_.dtype, part, n);
      for (int64_t j = 0; j < n; ++j) part[j] *= d_.multiplier;
      k_.from_float(part, added_ + i * size_, d_.dtype, n);
    }
  }

  void rotate(char* x, int64_t heads, int64_t stride, const DecoderAngles& angles) {
    const RopeArgs args{.x = x,
                        .dtype = d_.dtype,
                        .tokens = in_.tokens,
                        .heads = heads,
                        .dim = in_.turned,
                        .strides = {in_.tokens * stride, d_.dim, stride},
                        .cos = angles.cos,
                        .sin = angles.sin,
                        .angle_stride = angles.stride,
                        .y = x,
                        .y_strides = {stride, d_.dim}};
    share(m_, heads * in_.turned * 16, [&](int64_t r0, int64_t r1) { k_.rope(args, r0, r1); });
  }

  // The heads of all tokens behind those in the cache.
  void append(const char* rows, int64_t past, void* cache, const int64_t* strides) const {
    for (int64_t b = 0; b < in_.batch; ++b)
      for (int64_t t = 0; t < in_.tokens; ++t, rows += kv_stride_ * size_)
        for (int64_t h = 0; h < d_.kv_heads; ++h)
          std::memcpy(static_cast<char*>(cache) + (b * strides[0] + h * strides[1] + (past + t) * strides[2]) * size_,
                      rows + h * d_.dim * size_, d_.dim * size_);
  }

  // The places of a layer's keys, of which `past` lay in the cache before.
  void place(int64_t past) {
    if (in_.mask == nullptr || past == placed_) return;
    placed_ = past;
    const int64_t length = past + in_.tokens;
    for (int64_t b = 0; b < in_.batch; ++b) {
      const uint8_t* seen = in_.mask + (b + 1) * in_.mask_length - length;
      for (int64_t i = 0; i < length; ++i)
        positions_[b * length + i] = static_cast<int32_t>(i - past) + (seen[i] == 0 ? kHiddenKey : 0);
    }
  }

  // Attention of the queries to the layer's prefix and cache.
  void attention(const DecoderLayer& layer) {
    const int64_t q_strides[] = {in_.tokens * q_stride_, d_.dim, q_stride_},
                  strides[] = {in_.tokens * q_width(), d_.dim, q_width()};
    AttentionArgs a{};
    a.q = q_;
    a.k = layer.keys;
    a.v = layer.values;
    a.dtype = d_.dtype;
    a.batch = in_.batch;
    a.heads = d_.heads;
    a.kv_heads = d_.kv_heads;
    a.tokens = in_.tokens;
    a.length = layer.past + in_.tokens;
    a.dim = d_.dim;
    std::copy_n(q_strides, 3, a.q_strides);
    std::copy_n(layer.key_strides, 3, a.k_strides);
    std::copy_n(layer.value_strides, 3, a.v_strides);
    if (in_.prefix_length > 0) {
      a.prefix_k = layer.prefix_keys;
      a.prefix_v = layer.prefix_values;
      a.prefix_length = in_.prefix_length;
      a.prefix_index = in_.prefix_index;
      a.prefix_lengths = in_.prefix_lengths;
      std::copy_n(layer.prefix_key_strides, 3, a.prefix_k_strides);
      std::copy_n(layer.prefix_value_strides, 3, a.prefix_v_strides);
    }
    a.positions = positions_;
    a.causal = true;
    a.window = layer.window;
    a.scale = d_.scale;
    a.out = attended_;
    std::copy_n(strides, 3, a.out_strides);
    attention_forward(a, parallel_);
  }

  const Decoder& d_;
  const DecoderInput& in_;
  const ParallelFor parallel_;
  const Kernels& k_ = *kernels();
  const int64_t m_, size_;                            // tokens of all rows; bytes of an element
  const int64_t q_stride_, kv_stride_, gate_stride_;  // elements from one token's to the next
  char *stream_, *normed_, *added_, *q_, *attended_, *key_, *value_, *gate_, *up_, *activated_;
  char* narrow_;  // inside a bottleneck, or what it adds
  float *update_, *updates_;
  int32_t* positions_;   // of keys; null: all are seen, or
  int64_t placed_ = -1;  // those of a layer with so many keys before
};

}  // namespace

void decoder_forward(const Decoder& d, const DecoderInput& in, void* y, ParallelFor parallel) {
  Pass(d, in, parallel)(y);
}

}  // namespace pf
