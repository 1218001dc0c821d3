#include "attention_forward.h"

#include "dispatch.h"

namespace pf {
namespace {

constexpr int64_t kFewQueries = 8;  // of one head of keys; from here on kernels with queries as lanes are faster

int64_t queries(const AttentionArgs& g) { return g.tokens * (g.heads / g.kv_heads); }

void attend_many(const AttentionArgs& g, ParallelFor parallel) {
  const AttentionKernels& kernel = kernels()->attention(g.dtype);
  const int64_t units = kernel.forward_blocks(g) * g.batch * g.kv_heads;
  run(parallel, units,
      cache_grain((g.prefix_length + g.length) * g.dim * queries(g) * g.batch * g.kv_heads / (units + 1)),
      [&](int64_t u0, int64_t u1) {
        for (int64_t unit = u0; unit < u1; ++unit) kernel.forward(g, unit);
      });
}

// Attention of all queries to the prefix alone, in the thread's scratch.
OtherKeys attend_prefix(const AttentionArgs& g, ParallelFor parallel) {
  // Where the rows share a prefix and lie side by side, their queries are one row of a batch: it is read once.
  const bool shared =
      g.prefix_index == nullptr && (g.batch == 1 || g.tokens == 1 || g.q_strides[0] == g.tokens * g.q_strides[2]);
  // A shared one in two halves, that two threads have equal parts.
  const int64_t pieces = shared && g.prefix_length % 2 == 0 && g.prefix_length >= 128 ? 2 : 1;
  const int64_t rows = queries(g), result = g.batch * g.tokens * g.heads * g.dim;
  const int64_t bytes = pieces * result * dtype_size(g.dtype), logs = pieces * g.batch * g.kv_heads * rows;
  Memory memory(kSlotAttend, bytes + logs * sizeof(float) + 64);
  char* out = memory.take<char>(bytes);
  float* lse = memory.take<float>(logs);
  AttentionArgs a = g;
  a.k = a.v = nullptr;
  a.length = 0;
  a.positions = nullptr;
  a.causal = false;
  a.window = 0;
  a.out = out;
  a.lse = lse;
  if (shared) {
    a.batch = pieces;
    a.tokens = g.batch * g.tokens;
    a.length = g.prefix_length / pieces;
    a.q_strides[0] = 0;
    if (g.tokens == 1) a.q_strides[2] = g.q_strides[0];
    a.out_strides[0] = result;
    a.k = g.prefix_k;
    a.v = g.prefix_v;
    std::copy_n(g.prefix_k_strides, 3, a.k_strides);
    std::copy_n(g.prefix_v_strides, 3, a.v_strides);
    a.k_strides[0] = a.length * a.k_strides[2];
    a.v_strides[0] = a.length * a.v_strides[2];
    a.prefix_k = a.prefix_v = nullptr;
  }
  if (queries(a) <= kFewQueries)
    run(parallel, a.batch * a.kv_heads, cache_grain(g.prefix_length / pieces * g.dim * queries(a)),
        [&](int64_t u0, int64_t u1) { kernels()->attend(a, {}, u0, u1); });
  else
    attend_many(a, parallel);
  return {pieces,
          out,
          result,
          lse,
          {shared ? rows : g.kv_heads * rows, shared ? g.batch * rows : rows, g.batch * g.kv_heads * rows}};
}

// Whether reading the keys is what takes the time, and not arithmetic.
bool few_queries(const AttentionArgs& g) {
  return queries(g) <= kFewQueries && g.lse == nullptr && !(g.prefix_length > 0 && g.window > 0);
}

}  // namespace

void attention_forward(AttentionArgs g, ParallelFor parallel) {
  if (g.prefix_index == nullptr) {  // the one prefix of all rows, of which nothing is padding any more
    g.prefix_length = g.prefix_keys(g.prefix_slot(0));
    g.prefix_lengths = nullptr;
  }
  if (!few_queries(g)) return attend_many(g, parallel);
  OtherKeys prefix;
  if (g.prefix_length > 0) prefix = attend_prefix(g, parallel);
  g.prefix_k = g.prefix_v = nullptr;
  run(parallel, g.batch * g.kv_heads, cache_grain(g.length * g.dim * queries(g)),
      [&](int64_t u0, int64_t u1) { kernels()->attend(g, prefix, u0, u1); });
}

}  // namespace pf
