// A stack of decoder layers for any number of rows: norm, projections, rotary embeddings, attention over a cache, a
// gated MLP, each layer in place on one residual stream. No torch in it; threads come from the caller.
#pragma once
#include <span>
#include <vector>

#include "linear.h"

namespace pf {

enum Activation { kGelu, kRelu, kSilu, kTanh, kActivations };

// up(activation(down(y))), which is added to a layer's output y [rows, N]. Several do not lie side by side as LoRA's
// do: each stays where it trains, in a dtype of its own, and what it holds reaches no row that does not use it.
struct DecoderBottleneck {
  Matrix down, up;  // [R, N], [N, R]
  const float *down_bias, *up_bias;
  Activation activation;
  std::span<const int64_t> uses;  // of equally many rows each, 0: not by these; or none: by all
};

struct DecoderLinear {
  Weight w;
  Matrix dense;  // instead of w where its data is not null: [N, K] in full precision
  const float* bias = nullptr;
  Branch branch;
  bool int8 = false;  // the tier of linear_forward_int8
  std::vector<DecoderBottleneck> bottlenecks = {};
};

enum Projection { kQ, kK, kV, kO, kGate, kUp, kDown, kProjections };

// Vectors in the stack's dtype; of q_norm and k_norm [dim], attended_norm and mlp_norm [hidden] are null where queries
// and keys, or what attention and MLP add to the stream, are not normed.
struct DecoderLayer {
  DecoderLinear linear[kProjections];
  const void *input_norm, *post_norm, *q_norm, *k_norm, *attended_norm, *mlp_norm;
  int64_t angles;  // which turn its queries and keys; -1: none
  int64_t window;  // as in AttentionArgs; not beside a prefix, of which it would have to show all
  // The cache: [batch, kv_heads, at least past + tokens, dim], the last dimension contiguous. The new keys and values
  // are written behind the `past` ones.
  void *keys, *values;
  int64_t key_strides[3], value_strides[3];
  int64_t past;
  // [slots, kv_heads, prefix_length, dim], the last dimension contiguous: seen before the row's own.
  const void *prefix_keys, *prefix_values;
  int64_t prefix_key_strides[3], prefix_value_strides[3];
};

struct Decoder {
  int dtype;
  int64_t hidden, heads, kv_heads, dim, intermediate;
  float eps, scale;
  float multiplier;  // of what attention and MLP add to the stream
  bool joined;       // kQ projects to queries, keys and values, kGate to gate and up; there is no kK, kV and kUp
  bool gemma;        // norms scale by 1 + weight (RmsNormArgs::from_one), the gate goes through GELU
  const void* norm;  // [hidden], the last one
  std::vector<DecoderLayer> layers;
};

struct DecoderAngles {
  const void *cos, *sin;
  int64_t stride;  // as in RopeArgs
};

struct DecoderInput {
  const void* x;  // [batch, tokens, hidden]
  std::vector<DecoderAngles> angles;
  int64_t turned;       // so many elements of each head
  const uint8_t* mask;  // [batch, mask_length], 0: hidden; or null. Its last columns are those of a layer's keys
  int64_t mask_length;
  int64_t batch, tokens;
  int64_t prefix_length;          // 0: none
  const int64_t* prefix_index;    // [batch] the slot of each row, -1: none; or null: all rows share slot 0
  const int64_t* prefix_lengths;  // [slots] or null
};

// y [batch, tokens, hidden].
void decoder_forward(const Decoder& d, const DecoderInput& in, void* y, ParallelFor parallel);

}  // namespace pf
