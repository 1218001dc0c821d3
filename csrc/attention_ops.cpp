// Attention with a prefix: schemas and CPU implementations.
#include <algorithm>
#include <atomic>
#include <tuple>

#include "cpu/attention_forward.h"
#include "tensors.h"
#include "threads.h"

namespace {

using namespace pf::tensors;

// body(unit) for every unit, the first ones first, by all threads as they come free.
template <class Body>
void each_unit(int64_t units, const Body& body) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) body(unit);
  };
  pf::parallel_for(std::min<int64_t>(torch::stable::get_num_threads(), units), 1, work);
}

// A ParallelFor of such units, `grain` items each.
void as_they_come(int64_t n, int64_t grain, void* ctx, void (*body)(void*, int64_t, int64_t)) {
  each_unit(pf::ceil_div(n, grain), [&](int64_t unit) { body(ctx, unit * grain, std::min(n, (unit + 1) * grain)); });
}

// `t` [a, b, c, dim], its last dimension contiguous.
const void* rows_of(Tensor& t, int64_t* strides) {
  if (t.size(3) > 1 && t.stride(3) != 1) t = torch::stable::contiguous(t);
  for (int i = 0; i < 3; ++i) strides[i] = t.stride(i);
  return t.const_data_ptr();
}

void check_shape(const Tensor& t, int64_t a, int64_t b, int64_t c, int64_t d, int dtype, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == a && t.size(1) == b && t.size(2) == c && t.size(3) == d &&
                      dtype_of(t, name) == dtype,
                  name, " must be [", a, ", ", b, ", ", c, ", ", d, "] in the dtype of q");
}

// A tensor [batch, tokens, heads, dim] seen as [batch, heads, tokens, dim].
void set_transposed(const pf::AttentionArgs& g, int64_t heads, int64_t tokens, int64_t* strides) {
  strides[0] = tokens * heads * g.dim;
  strides[1] = g.dim;
  strides[2] = heads * g.dim;
}

// Tensors of a call, made contiguous where they must be, and what kernels are told of them.
struct Call {
  Tensor q, k, v;
  OptTensor prefix_k, prefix_v, index, lengths, positions;
  pf::AttentionArgs args{};

  Call(Tensor q_, Tensor k_, Tensor v_, OptTensor pk, OptTensor pv, OptTensor index_, OptTensor lengths_,
       OptTensor positions_, bool causal, double scale, int64_t window)
      : q(q_), k(k_), v(v_), prefix_k(pk), prefix_v(pv), index(index_), lengths(lengths_), positions(positions_) {
    kernels();
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "q and k must be [batch, heads, tokens, head size]");
    args.dtype = dtype_of(q, "q");
    args.batch = q.size(0);
    args.heads = q.size(1);
    args.tokens = q.size(2);
    args.dim = q.size(3);
    args.kv_heads = k.size(1);
    args.length = k.size(2);
    STD_TORCH_CHECK(
        args.dim >= 1 && args.dim <= pf::kMostHeadSize && args.kv_heads >= 1 && args.heads % args.kv_heads == 0,
        "the head size must be 1 to ", pf::kMostHeadSize, ", the number of heads a multiple of those of k");
    check_shape(k, args.batch, args.kv_heads, args.length, args.dim, args.dtype, "k");
    check_shape(v, args.batch, args.kv_heads, args.length, args.dim, args.dtype, "v");
    args.q = rows_of(q, args.q_strides);
    args.k = rows_of(k, args.k_strides);
    args.v = rows_of(v, args.v_strides);
    if (prefix_k.has_value()) {
      STD_TORCH_CHECK(prefix_v.has_value() && prefix_k->dim() == 4, "prefix_k must be [n, heads, P, head size]");
      args.slots = prefix_k->size(0);
      args.prefix_length = prefix_k->size(2);
      check_shape(*prefix_k, args.slots, args.kv_heads, args.prefix_length, args.dim, args.dtype, "prefix_k");
      check_shape(*prefix_v, args.slots, args.kv_heads, args.prefix_length, args.dim, args.dtype, "prefix_v");
      args.prefix_k = rows_of(*prefix_k, args.prefix_k_strides);
      args.prefix_v = rows_of(*prefix_v, args.prefix_v_strides);
      const PrefixRows chosen = prefix_rows(index, lengths, args.batch, args.slots, args.prefix_length);
      args.prefix_index = chosen.index;
      args.prefix_lengths = chosen.lengths;
    }
    if (positions.has_value()) {
      positions = torch::stable::contiguous(*positions);
      STD_TORCH_CHECK(positions->scalar_type() == ScalarType::Int && positions->dim() == 2 &&
                          positions->size(0) == args.batch && positions->size(1) == args.length,
                      "positions must be int32 [", args.batch, ", ", args.length, "]");
      // Those of no keys have no address in torch, which would mean here that they are not given.
      static const int32_t none = 0;
      args.positions = positions->numel() > 0 ? positions->const_data_ptr<int32_t>() : &none;
    }
    STD_TORCH_CHECK(!causal || positions.has_value() || args.length >= args.tokens, "k has ", args.length,
                    " keys; causal attention needs at least the ", args.tokens, " of the queries");
    args.causal = causal;
    args.window = std::min(window, pf::kMostWindow);
    args.scale = static_cast<float>(scale);
  }
};

std::tuple<Tensor, Tensor> prefix_attention(Tensor q, Tensor k, Tensor v, OptTensor prefix_k, OptTensor prefix_v,
                                            OptTensor index, OptTensor lengths, OptTensor positions, bool causal,
                                            double scale, int64_t window, bool need_lse) {
  Call call(q, k, v, prefix_k, prefix_v, index, lengths, positions, causal, scale, window);
  pf::AttentionArgs& g = call.args;
  Tensor out = torch::stable::new_empty(q, {g.batch, g.tokens, g.heads, g.dim});
  const int64_t queries = g.tokens * (g.heads / g.kv_heads);
  Tensor lse = new_matrix(need_lse ? g.batch * g.kv_heads : 0, queries, pf::kFloat32);
  g.out = out.mutable_data_ptr();
  set_transposed(g, g.heads, g.tokens, g.out_strides);
  if (need_lse) g.lse = static_cast<float*>(lse.mutable_data_ptr());
  pf::attention_forward(g, as_they_come);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prefix_attention_backward(
    Tensor dout, Tensor q, Tensor k, Tensor v, OptTensor prefix_k, OptTensor prefix_v, OptTensor index,
    OptTensor lengths, OptTensor positions, bool causal, double scale, int64_t window, OptTensor out, Tensor lse) {
  Call call(q, k, v, prefix_k, prefix_v, index, lengths, positions, causal, scale, window);
  pf::AttentionBackwardArgs a{};
  pf::AttentionArgs& g = a.forward = call.args;
  const pf::AttentionKernels& kernel = kernels().attention(g.dtype);
  check_shape(dout, g.batch, g.heads, g.tokens, g.dim, g.dtype, "dout");
  const bool many = kernel.most_chunks(g) > 1;  // with few, out is not read: gradients are the same with and without it
  STD_TORCH_CHECK(out.has_value() || !many, "out must be the forward's where keys are many");
  if (out.has_value()) check_shape(*out, g.batch, g.tokens, g.heads, g.dim, g.dtype, "out");
  STD_TORCH_CHECK((!out.has_value() || out->is_contiguous()) && lse.is_contiguous() &&
                      lse.scalar_type() == ScalarType::Float && lse.numel() == g.batch * g.heads * g.tokens,
                  "out and lse must be the forward's");
  g.out = many ? const_cast<void*>(out->const_data_ptr()) : nullptr;
  g.lse = const_cast<float*>(lse.const_data_ptr<float>());
  set_transposed(g, g.heads, g.tokens, g.out_strides);
  a.dout = rows_of(dout, a.dout_strides);
  Tensor dq = torch::stable::new_empty(q, {g.batch, g.tokens, g.heads, g.dim});
  Tensor dk = torch::stable::new_empty(q, {g.batch, g.length, g.kv_heads, g.dim});
  Tensor dv = torch::stable::new_empty(q, {g.batch, g.length, g.kv_heads, g.dim});
  a.dq = dq.mutable_data_ptr();
  a.dk = dk.mutable_data_ptr();
  a.dv = dv.mutable_data_ptr();
  // Of each row; summed in the order of the rows.
  Tensor row_dk = torch::stable::new_empty(q, {g.batch, g.kv_heads, g.prefix_length, g.dim}, ScalarType::Float);
  Tensor row_dv = torch::stable::new_empty(q, {g.batch, g.kv_heads, g.prefix_length, g.dim}, ScalarType::Float);
  a.prefix_dk = static_cast<float*>(row_dk.mutable_data_ptr());
  a.prefix_dv = static_cast<float*>(row_dv.mutable_data_ptr());

  const int64_t heads = g.batch * g.kv_heads, threads = torch::stable::get_num_threads();
  // Several units a thread, so that none has to wait long for the last one; each with work for longer than it takes to
  // wake a thread, and to add its part. Two where the parts take much memory.
  constexpr int64_t kPairs = int64_t{1} << 17;       // of a query and a key
  constexpr int64_t kPartFloats = int64_t{1} << 24;  // of all parts
  const int64_t pairs = g.tokens * (g.heads / g.kv_heads) * (g.prefix_length + g.length);
  const int64_t size = kernel.part_size(g);
  a.chunks = 1;
  if (threads > 1 && size > 0) {
    const int64_t units = std::max(2 * threads, std::min(4 * threads, kPartFloats / size * heads));
    a.chunks = std::max<int64_t>(1, std::min({pf::ceil_div(units, heads), kernel.most_chunks(g), pairs / kPairs}));
  }
  const bool several = a.chunks > 1, shared = several && heads < threads;
  Tensor parts = new_matrix(several ? a.chunks : 0, size, pf::kFloat32);
  Tensor packed = torch::stable::new_empty(q, {shared ? kernel.packed_size(g) : 0}, ScalarType::Byte);
  a.dq_parts = static_cast<float*>(parts.mutable_data_ptr());
  a.packed = shared ? static_cast<char*>(packed.mutable_data_ptr()) : nullptr;
  const int64_t groups = heads * kernel.query_groups(g);
  if (shared) each_unit(groups, [&](int64_t unit) { kernel.pack(a, unit); });
  each_unit(a.chunks * heads, [&](int64_t unit) { kernel.backward(a, unit); });
  if (several) each_unit(groups, [&](int64_t unit) { kernel.sum_parts(a, unit); });

  Tensor prefix_dk = torch::stable::new_zeros(q, {g.slots, g.kv_heads, g.prefix_length, g.dim}, ScalarType::Float);
  Tensor prefix_dv = torch::stable::new_zeros(q, {g.slots, g.kv_heads, g.prefix_length, g.dim}, ScalarType::Float);
  if (g.slots > 0) {
    const int64_t row = g.prefix_length * g.dim;
    float *to_k = static_cast<float*>(prefix_dk.mutable_data_ptr()),
          *to_v = static_cast<float*>(prefix_dv.mutable_data_ptr());
    pf::run(as_they_come, g.kv_heads, pf::cache_grain(g.batch * row), [&](int64_t head0, int64_t head1) {
      for (int64_t b = 0; b < g.batch; ++b) {
        const int64_t slot = g.prefix_slot(b), n = g.prefix_keys(slot) * g.dim;
        for (int64_t head = head0; head < head1; ++head) {
          const int64_t to = (slot * g.kv_heads + head) * row, from = (b * g.kv_heads + head) * row;
          for (int64_t i = 0; i < n; ++i) to_k[to + i] += a.prefix_dk[from + i];
          for (int64_t i = 0; i < n; ++i) to_v[to + i] += a.prefix_dv[from + i];
        }
      }
    });
  }
  return {dq, dk, dv, prefix_dk, prefix_dv};
}

}  // namespace

#define PF_ATTENTION                                                                                                 \
  "Tensor q, Tensor k, Tensor v, Tensor? prefix_k, Tensor? prefix_v, Tensor? prefix_index, Tensor? prefix_lengths, " \
  "Tensor? positions, bool causal, float scale, int window"

STABLE_TORCH_LIBRARY_FRAGMENT(pyfastpeft, m) {
  m.def("prefix_attention(" PF_ATTENTION ", bool need_lse) -> (Tensor, Tensor)");
  m.def("prefix_attention_backward(Tensor dout, " PF_ATTENTION
        ", Tensor? out, Tensor lse) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CPU, m) {
  m.impl("prefix_attention", TORCH_BOX(&prefix_attention));
  m.impl("prefix_attention_backward", TORCH_BOX(&prefix_attention_backward));
}
