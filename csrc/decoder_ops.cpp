// The decoder stack as operators. A stack is built once and named by a handle; it holds its tensors, and reads where
// their memory lies at every call. One call then computes a token, without a dispatch or a check a layer.
#include <algorithm>
#include <limits>
#include <memory>
#include <span>
#include <vector>

#include "cpu/decoder.h"
#include "handle_table.h"
#include "operands.h"
#include "team.h"

namespace {

using namespace pf::tensors;

struct HeldBottleneck {
  Tensor down, down_bias, up, up_bias;
  pf::Activation activation;
  std::vector<int64_t> uses;
};

struct HeldLinear {
  int64_t n, k;
  std::shared_ptr<const HeldWeight> weight;  // or
  OptTensor dense;                           // in full precision
  OptTensor bias, lora_a, lora_b;
  double scaling;
  OptTensor row_scale;  // [R], or [groups, R]: one for equally many consecutive rows
  bool int8;
  std::vector<HeldBottleneck> bottlenecks = {};
};

// The projections of a layer in their order.
constexpr pf::Projection kApart[] = {pf::kQ, pf::kK, pf::kV, pf::kO, pf::kGate, pf::kUp, pf::kDown},
                         kJoined[] = {pf::kQ, pf::kO, pf::kGate, pf::kDown};

struct Stack {
  pf::Decoder shape;
  Tensor norm;
  std::vector<Tensor> norms;        // input and post-attention norm of each layer
  std::vector<Tensor> head_norms;   // of queries and keys of each layer, or empty
  std::vector<Tensor> added_norms;  // of what attention and MLP of each layer add to the stream, or empty
  std::vector<int64_t> angles;      // one a layer
  std::vector<int64_t> windows;     // one a layer, 0: none
  std::vector<HeldLinear> linears;  // those of each layer

  std::span<const pf::Projection> projections() const {
    if (shape.joined) return kJoined;
    return kApart;
  }
};

HandleTable<Stack> stacks;

int64_t new_decoder(Tensor norm, std::vector<Tensor> norms, std::vector<Tensor> head_norms,
                    std::vector<Tensor> added_norms, std::vector<int64_t> angles, std::vector<int64_t> windows,
                    int64_t heads, int64_t kv_heads, int64_t dim, double eps, double scale, double multiplier,
                    bool joined, bool gemma) {
  const auto none_or = [](const std::vector<Tensor>& some, size_t n) { return some.empty() || some.size() == n; };
  STD_TORCH_CHECK(norms.size() == 2 * angles.size() && windows.size() == angles.size() &&
                      none_or(head_norms, norms.size()) && none_or(added_norms, norms.size()),
                  "angles and windows must be one a layer, norms two, head_norms and added_norms two or none");
  STD_TORCH_CHECK(!joined || head_norms.empty(), "head_norms must be none where queries, keys and values are joined");
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0 && dim > 0 && dim % 2 == 0 && dim <= pf::kMostHeadSize,
                  "heads must be a multiple of kv_heads, dim even and at most ", pf::kMostHeadSize);
  auto stack = std::make_shared<Stack>();
  stack->shape = {.dtype = dtype_of(norm, "norm"),
                  .hidden = norm.numel(),
                  .heads = heads,
                  .kv_heads = kv_heads,
                  .dim = dim,
                  .eps = static_cast<float>(eps),
                  .scale = static_cast<float>(scale),
                  .multiplier = static_cast<float>(multiplier),
                  .joined = joined,
                  .gemma = gemma};
  stack->norm = norm;
  stack->norms = std::move(norms);
  stack->head_norms = std::move(head_norms);
  stack->added_norms = std::move(added_norms);
  stack->angles = std::move(angles);
  stack->windows = std::move(windows);
  return stacks.add(std::move(stack));
}

void add(int64_t id, HeldLinear linear) {
  const std::shared_ptr<Stack> stack = stacks.find(id, "stack");
  pf::Decoder& d = stack->shape;
  const std::span<const pf::Projection> projections = stack->projections();
  STD_TORCH_CHECK(stack->linears.size() < stack->angles.size() * projections.size(),
                  "the stack has all the projections of its layers already");
  const pf::Projection which = projections[stack->linears.size() % projections.size()];
  const int64_t gates = d.joined ? 2 : 1;
  if (d.intermediate == 0 && which == pf::kGate) d.intermediate = linear.n / gates;
  const int64_t q = d.heads * d.dim, kv = d.kv_heads * d.dim, wide = d.intermediate;
  const int64_t outs[] = {d.joined ? q + 2 * kv : q, kv, kv, d.hidden, gates * wide, wide, d.hidden},
                ins[] = {d.hidden, d.hidden, d.hidden, q, d.hidden, d.hidden, wide};
  STD_TORCH_CHECK(linear.n == outs[which] && linear.k == ins[which], "projection ", static_cast<int>(which),
                  " of a layer is (", linear.n, ", ", linear.k, "); it must be (", outs[which], ", ", ins[which], ")");
  stack->linears.push_back(std::move(linear));
}

void add_decoder_linear(int64_t id, Tensor codes, Tensor scale, OptTensor zero, OptTensor absmax2, OptTensor offset,
                        int64_t format, int64_t n, int64_t blocksize, OptTensor bias, OptTensor lora_a,
                        OptTensor lora_b, double scaling, OptTensor row_scale, bool int8) {
  auto held = std::make_shared<const HeldWeight>(codes, scale, zero, absmax2, offset, format, n, blocksize);
  const int64_t k = held->k();
  add(id, {.n = n,
           .k = k,
           .weight = std::move(held),
           .bias = bias,
           .lora_a = lora_a,
           .lora_b = lora_b,
           .scaling = scaling,
           .row_scale = row_scale,
           .int8 = int8});
}

void add_decoder_dense(int64_t id, Tensor weight, OptTensor bias, OptTensor lora_a, OptTensor lora_b, double scaling,
                       OptTensor row_scale) {
  STD_TORCH_CHECK(weight.dim() == 2 && dtype_of(weight, "weight") == stacks.find(id, "stack")->shape.dtype,
                  "weight must be a matrix in the dtype of the norms");
  add(id, {.n = weight.size(0),
           .k = weight.size(1),
           .dense = weight,
           .bias = bias,
           .lora_a = lora_a,
           .lora_b = lora_b,
           .scaling = scaling,
           .row_scale = row_scale});
}

// Keeps what the kernels read of a bottleneck behind a layer with `n` outputs.
struct BottleneckTensors {
  Tensor down, up;
  Bias down_bias, up_bias;
  pf::DecoderBottleneck bottleneck;

  BottleneckTensors(const HeldBottleneck& held, int64_t n, int64_t rows)
      : down(held.down), up(held.up), down_bias(held.down_bias, held.down.size(0)), up_bias(held.up_bias, n) {
    bottleneck = {matrix(down, "down"), matrix(up, "up"), down_bias.data, up_bias.data, held.activation, held.uses};
    const int64_t inner = bottleneck.down.rows;
    STD_TORCH_CHECK(bottleneck.down.cols == n && bottleneck.up.rows == n && bottleneck.up.cols == inner && inner > 0,
                    "down must be [R, ", n, "] and up [", n, ", R], R at least 1");
    STD_TORCH_CHECK(held.uses.empty() || rows % static_cast<int64_t>(held.uses.size()) == 0, "x has ", rows,
                    " rows; they must be a multiple of the ", held.uses.size(), " of uses");
  }
};

// Behind the linear layer that was added last.
void add_decoder_bottleneck(int64_t id, Tensor down, Tensor down_bias, Tensor up, Tensor up_bias, int64_t activation,
                            std::vector<int64_t> uses) {
  const std::shared_ptr<Stack> stack = stacks.find(id, "stack");
  STD_TORCH_CHECK(!stack->linears.empty(), "a bottleneck needs a linear layer before it");
  STD_TORCH_CHECK(activation >= 0 && activation < pf::kActivations, "activation is ", activation,
                  "; it must be from 0 to ", pf::kActivations - 1);
  HeldLinear& linear = stack->linears.back();
  HeldBottleneck held{down, down_bias, up, up_bias, static_cast<pf::Activation>(activation), std::move(uses)};
  BottleneckTensors(held, linear.n, held.uses.size());
  linear.bottlenecks.push_back(std::move(held));
}

const void* vector_data(const Tensor& t, int64_t n, int dtype, const char* name) {
  STD_TORCH_CHECK(t.numel() == n && t.is_contiguous() && dtype_of(t, name) == dtype, name, " must be contiguous [", n,
                  "] in the dtype of x");
  return t.const_data_ptr();
}

// The strides of keys or values [rows, kv_heads, length, dim]; of a cache, `length` is the least.
void set_strides(const Tensor& t, const pf::Decoder& d, int64_t rows, int64_t length, bool cache, const char* name,
                 int64_t* strides) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == rows && t.size(1) == d.kv_heads &&
                      (cache ? t.size(2) >= length : t.size(2) == length) && t.size(3) == d.dim && t.stride(3) == 1 &&
                      dtype_of(t, name) == d.dtype,
                  name, " must be [", rows, ", ", d.kv_heads, ", ", length, cache ? " or more, " : ", ", d.dim,
                  "] in the dtype of x, its last dimension contiguous");
  for (int i = 0; i < 3; ++i) strides[i] = t.stride(i);
}

// Factors [groups, R] of so many rows.
OptTensor of_rows(const OptTensor& row_scale, int64_t rows) {
  if (!row_scale.has_value() || row_scale->dim() != 2 || row_scale->size(0) == rows) return row_scale;
  const int64_t groups = row_scale->size(0), rank = row_scale->size(1);
  STD_TORCH_CHECK(groups > 0 && rows % groups == 0, "x has ", rows, " rows; they must be a multiple of the ", groups,
                  " of row_scale");
  STD_TORCH_CHECK(row_scale->scalar_type() == ScalarType::Float && row_scale->is_contiguous(),
                  "row_scale must be contiguous float32 [R] or [groups, R]");
  Tensor all = new_matrix(rows, rank, pf::kFloat32);
  const float* from = row_scale->const_data_ptr<float>();
  float* to = all.mutable_data_ptr<float>();
  for (int64_t r = 0; r < rows; ++r, to += rank) std::copy_n(from + r * groups / rows * rank, rank, to);
  return all;
}

// Keeps what the kernels read of a linear layer, for `rows` of x in `dtype`.
struct LinearTensors {
  OptTensor row_scale;
  BranchTensors branch;
  Bias bias;
  OptTensor dense;  // a Tensor would allocate where there is none
  std::vector<BottleneckTensors> bottlenecks;
  pf::DecoderLinear linear;

  LinearTensors(const HeldLinear& held, int64_t rows, int dtype)
      : row_scale(of_rows(held.row_scale, rows)),
        branch(held.lora_a, held.lora_b, row_scale, held.scaling, rows, std::nullopt, 0.0, held.n, held.k),
        bias(held.bias, held.n) {
    linear = {.bias = bias.data, .branch = branch.branch, .int8 = held.int8};
    bottlenecks.reserve(held.bottlenecks.size());  // `bottleneck` points into what a copy would leave behind
    for (const HeldBottleneck& b : held.bottlenecks)
      linear.bottlenecks.push_back(bottlenecks.emplace_back(b, held.n, rows).bottleneck);
    if (held.dense.has_value()) {
      // Unlike a packed weight it may have been cast or replaced since.
      dense = held.dense;
      const pf::Matrix w = linear.dense = matrix(*dense, "weight");
      STD_TORCH_CHECK(w.rows == held.n && w.cols == held.k && w.dtype == dtype, "weight must be [", held.n, ", ",
                      held.k, "] in the dtype of x");
    } else {
      linear.w = held.weight->now();
    }
  }
};

// The vectors by which layer i norms.
void set_norms(const Stack& stack, size_t i, pf::DecoderLayer& layer) {
  const pf::Decoder& d = stack.shape;
  layer.input_norm = vector_data(stack.norms[2 * i], d.hidden, d.dtype, "input norm");
  layer.post_norm = vector_data(stack.norms[2 * i + 1], d.hidden, d.dtype, "post-attention norm");
  layer.q_norm = layer.k_norm = layer.attended_norm = layer.mlp_norm = nullptr;
  if (!stack.head_norms.empty()) {
    layer.q_norm = vector_data(stack.head_norms[2 * i], d.dim, d.dtype, "query norm");
    layer.k_norm = vector_data(stack.head_norms[2 * i + 1], d.dim, d.dtype, "key norm");
  }
  if (!stack.added_norms.empty()) {
    layer.attended_norm = vector_data(stack.added_norms[2 * i], d.hidden, d.dtype, "norm of the attention");
    layer.mlp_norm = vector_data(stack.added_norms[2 * i + 1], d.hidden, d.dtype, "norm of the MLP");
  }
}

Tensor decoder_forward(int64_t id, Tensor x, std::vector<Tensor> cos, std::vector<Tensor> sin, OptTensor mask,
                       std::vector<Tensor> keys, std::vector<Tensor> values, std::vector<int64_t> past,
                       std::vector<Tensor> prefix_keys, std::vector<Tensor> prefix_values, OptTensor prefix_index,
                       OptTensor prefix_lengths) {
  kernels();
  const std::shared_ptr<Stack> stack = stacks.find(id, "stack");
  pf::Decoder d = stack->shape;
  const size_t layers = stack->angles.size();
  const std::span<const pf::Projection> projections = stack->projections();
  STD_TORCH_CHECK(stack->linears.size() == layers * projections.size(), "the stack misses linear layers");
  STD_TORCH_CHECK(x.dim() == 3 && x.size(2) == d.hidden && x.is_contiguous() && dtype_of(x, "x") == d.dtype,
                  "x must be contiguous [batch, tokens, ", d.hidden, "] in the dtype of the norms");
  const int64_t batch = x.size(0), tokens = x.size(1);
  STD_TORCH_CHECK(keys.size() == layers && values.size() == layers && past.size() == layers,
                  "keys, values and past must be one a layer");
  const int64_t most = std::numeric_limits<int64_t>::max() - tokens;
  int64_t longest = tokens;
  for (const int64_t p : past) {
    STD_TORCH_CHECK(p >= 0 && p <= most, "past is ", p, "; it must be from 0 to ", most);
    longest = std::max(longest, p + tokens);
  }
  STD_TORCH_CHECK(cos.size() == sin.size(), "cos and sin must be equally many");
  const int64_t turned = cos.empty() || cos[0].dim() == 0 ? d.dim : cos[0].size(-1);
  STD_TORCH_CHECK(turned <= d.dim && turned % 2 == 0, "cos has ", turned,
                  " columns; it must have an even number up to ", d.dim);
  std::vector<pf::DecoderAngles> angles;
  for (size_t i = 0; i < cos.size(); ++i) {
    const int64_t stride = angle_stride(cos[i], sin[i], batch, tokens, turned, d.dtype, "x");
    angles.push_back({cos[i].const_data_ptr(), sin[i].const_data_ptr(), stride});
  }
  Tensor y = new_matrix(batch * tokens, d.hidden, d.dtype);
  if (batch * tokens == 0) return y;
  if (mask.has_value())
    STD_TORCH_CHECK(mask->dim() == 2 && mask->size(0) == batch && mask->size(1) >= longest && mask->is_contiguous() &&
                        mask->element_size() == 1,
                    "mask must be contiguous bool [", batch, ", ", longest, " or more]");
  STD_TORCH_CHECK(prefix_keys.size() == prefix_values.size() && (prefix_keys.empty() || prefix_keys.size() == layers),
                  "prefix_keys and prefix_values must be one a layer or none");
  const bool has_prefix = !prefix_keys.empty();
  const int64_t slots = has_prefix ? prefix_keys[0].size(0) : 0,
                prefix_length = has_prefix ? prefix_keys[0].size(2) : 0;
  PrefixRows prefix{};
  if (has_prefix) prefix = prefix_rows(prefix_index, prefix_lengths, batch, slots, prefix_length);
  d.norm = vector_data(stack->norm, d.hidden, d.dtype, "norm");
  std::vector<LinearTensors> linears;
  linears.reserve(stack->linears.size());
  d.layers.resize(layers);
  for (size_t i = 0; i < layers; ++i) {
    pf::DecoderLayer& layer = d.layers[i];
    set_norms(*stack, i, layer);
    layer.angles = stack->angles[i];
    STD_TORCH_CHECK(layer.angles >= -1 && layer.angles < static_cast<int64_t>(angles.size()), "layer ", i,
                    " turns by angles ", layer.angles, "; cos and sin are ", angles.size());
    layer.past = past[i];
    layer.window = has_prefix ? 0 : std::min(stack->windows[i], pf::kMostWindow);
    set_strides(keys[i], d, batch, layer.past + tokens, true, "keys", layer.key_strides);
    set_strides(values[i], d, batch, layer.past + tokens, true, "values", layer.value_strides);
    layer.keys = keys[i].mutable_data_ptr();
    layer.values = values[i].mutable_data_ptr();
    if (has_prefix) {
      set_strides(prefix_keys[i], d, slots, prefix_length, false, "prefix_keys", layer.prefix_key_strides);
      set_strides(prefix_values[i], d, slots, prefix_length, false, "prefix_values", layer.prefix_value_strides);
      layer.prefix_keys = prefix_keys[i].const_data_ptr();
      layer.prefix_values = prefix_values[i].const_data_ptr();
    }
    for (const pf::Projection p : projections)
      layer.linear[p] = std::move(linears.emplace_back(stack->linears[linears.size()], batch * tokens, d.dtype).linear);
  }
  const pf::DecoderInput in{.x = x.const_data_ptr(),
                            .angles = std::move(angles),
                            .turned = turned,
                            .mask = mask.has_value() ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr,
                            .mask_length = mask.has_value() ? mask->size(1) : 0,
                            .batch = batch,
                            .tokens = tokens,
                            .prefix_length = prefix_length,
                            .prefix_index = prefix.index,
                            .prefix_lengths = prefix.lengths};
  void* out = y.mutable_data_ptr();
  pf::with_team([&](pf::ParallelFor parallel) { pf::decoder_forward(d, in, out, parallel); });
  return y;
}

}  // namespace

PF_C void pf_free_decoder(int64_t stack) { stacks.free(stack); }

STABLE_TORCH_LIBRARY_FRAGMENT(pyfastpeft, m) {
  m.def(
      "new_decoder(Tensor norm, Tensor[] norms, Tensor[] head_norms, Tensor[] added_norms, int[] angles, "
      "int[] windows, int heads, int kv_heads, int dim, float eps, float scale, float multiplier, bool joined, bool "
      "gemma) -> int");
  m.def("add_decoder_linear(int stack, " PF_WEIGHT
        ", Tensor? bias, Tensor? lora_a, Tensor? lora_b, float scaling, Tensor? row_scale, bool int8) -> ()");
  m.def(
      "add_decoder_dense(int stack, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, float scaling, "
      "Tensor? row_scale) -> ()");
  m.def(
      "add_decoder_bottleneck(int stack, Tensor down, Tensor down_bias, Tensor up, Tensor up_bias, int activation, "
      "int[] uses) -> ()");
  m.def(
      "decoder_forward(int stack, Tensor x, Tensor[] cos, Tensor[] sin, Tensor? mask, Tensor(a!)[] keys, "
      "Tensor(b!)[] values, int[] past, Tensor[] prefix_keys, Tensor[] prefix_values, Tensor? prefix_index, "
      "Tensor? prefix_lengths) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CPU, m) {
  m.impl("new_decoder", TORCH_BOX(&new_decoder));
  m.impl("add_decoder_linear", TORCH_BOX(&add_decoder_linear));
  m.impl("add_decoder_dense", TORCH_BOX(&add_decoder_dense));
  m.impl("add_decoder_bottleneck", TORCH_BOX(&add_decoder_bottleneck));
  m.impl("decoder_forward", TORCH_BOX(&decoder_forward));
}
