// What a decoder layer does between its linear layers: schemas and CPU implementations.
#include <tuple>

#include "operands.h"
#include "team.h"

namespace {

using namespace pf::tensors;

// How many rows are worth waking a thread for, where an element takes the time of 32 multiply-adds.
int64_t row_grain(int64_t cols) { return pf::thread_work() / 32 / (cols + 1) + 1; }

// `t` as a matrix of the dtype and shape of `like`.
pf::Matrix matching(Tensor& t, const pf::Matrix& like, const char* name) {
  const pf::Matrix m = matrix(t, name);
  STD_TORCH_CHECK(m.dtype == like.dtype && m.rows == like.rows && m.cols == like.cols, name,
                  " must have the dtype of the other matrix and its shape, (", like.rows, ", ", like.cols, ")");
  return m;
}

const void* norm_weight(Tensor& weight, const pf::Matrix& x) {
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == x.cols && dtype_of(weight, "weight") == x.dtype,
                  "weight must be [", x.cols, "] in the dtype of x");
  weight = torch::stable::contiguous(weight);
  return weight.const_data_ptr();
}

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  const pf::Kernels& k = kernels();
  pf::RmsNormArgs args{.x = matrix(x, "x"), .eps = static_cast<float>(eps)};
  args.weight = norm_weight(weight, args.x);
  Tensor y = new_passing_matrix(args.x.rows, args.x.cols, args.x.dtype);
  args.y = y.mutable_data_ptr();
  pf::parallel_for(args.x.rows, row_grain(args.x.cols), [&](int64_t r0, int64_t r1) { k.rms_norm(args, r0, r1); });
  return y;
}

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor dy, Tensor x, Tensor weight, double eps, bool need_weight) {
  const pf::Kernels& k = kernels();
  const pf::Matrix xm = matrix(x, "x");
  Tensor dx = new_matrix(xm.rows, xm.cols, xm.dtype);
  Tensor inverse = new_matrix(1, xm.rows, pf::kFloat32);
  Tensor dweight = new_matrix(need_weight ? 1 : 0, xm.cols, pf::kFloat32);
  pf::RmsNormBackwardArgs args{.dy = matching(dy, xm, "dy"),
                               .x = xm,
                               .weight = norm_weight(weight, xm),
                               .eps = static_cast<float>(eps),
                               .dx = dx.mutable_data_ptr(),
                               .inverse = static_cast<float*>(inverse.mutable_data_ptr())};
  pf::parallel_for(xm.rows, row_grain(xm.cols), [&](int64_t r0, int64_t r1) { k.rms_norm_backward(args, r0, r1); });
  if (need_weight) {
    constexpr int64_t kColumns = 128;
    float* out = static_cast<float*>(dweight.mutable_data_ptr());
    pf::parallel_for(pf::ceil_div(xm.cols, kColumns), row_grain(xm.rows * kColumns), [&](int64_t u0, int64_t u1) {
      k.rms_norm_weight_backward(args, out, u0 * kColumns, u1 * kColumns < xm.cols ? u1 * kColumns : xm.cols);
    });
  }
  return {dx, dweight};
}

Tensor swiglu(Tensor gate, Tensor up) {
  const pf::Kernels& k = kernels();
  const pf::Matrix g = matrix(gate, "gate"), u = matching(up, g, "up");
  Tensor y = new_matrix(g.rows, g.cols, g.dtype);
  void* out = y.mutable_data_ptr();
  pf::parallel_for(g.rows, row_grain(g.cols * 4), [&](int64_t r0, int64_t r1) { k.swiglu(g, u, out, r0, r1); });
  return y;
}

std::tuple<Tensor, Tensor> swiglu_backward(Tensor dy, Tensor gate, Tensor up) {
  const pf::Kernels& k = kernels();
  const pf::Matrix g = matrix(gate, "gate"), u = matching(up, g, "up"), d = matching(dy, g, "dy");
  Tensor dgate = new_matrix(g.rows, g.cols, g.dtype), dup = new_matrix(g.rows, g.cols, g.dtype);
  void *dg = dgate.mutable_data_ptr(), *du = dup.mutable_data_ptr();
  pf::parallel_for(g.rows, row_grain(g.cols * 4),
                   [&](int64_t r0, int64_t r1) { k.swiglu_backward(d, g, u, dg, du, r0, r1); });
  return {dgate, dup};
}

Tensor rotated(const pf::Kernels& k, Tensor x, const Tensor& cos, const Tensor& sin, bool transposed,
               const char* name) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(3) % 2 == 0, name, " must be [batch, heads, tokens, dim], dim even");
  if (x.size(3) > 1 && x.stride(3) != 1) x = torch::stable::contiguous(x);
  const int64_t batch = x.size(0), heads = x.size(1), tokens = x.size(2), dim = x.size(3);
  const int dtype = dtype_of(x, name);
  const int64_t angles = angle_stride(cos, sin, batch, tokens, dim, dtype, name);
  Tensor y = new_matrix(batch * tokens, heads * dim, dtype);
  const pf::RopeArgs args{.x = x.const_data_ptr(),
                          .dtype = dtype,
                          .tokens = tokens,
                          .heads = heads,
                          .dim = dim,
                          .strides = {x.stride(0), x.stride(1), x.stride(2)},
                          .cos = cos.const_data_ptr(),
                          .sin = sin.const_data_ptr(),
                          .angle_stride = angles,
                          .transposed = transposed,
                          .y = y.mutable_data_ptr(),
                          .y_strides = {heads * dim, dim}};
  pf::parallel_for(batch * tokens, row_grain(heads * dim), [&](int64_t t0, int64_t t1) { k.rope(args, t0, t1); });
  return y;
}

std::tuple<Tensor, Tensor> rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool transposed) {
  const pf::Kernels& kernel = kernels();
  cos = torch::stable::contiguous(cos);
  sin = torch::stable::contiguous(sin);
  return {rotated(kernel, q, cos, sin, transposed, "q"), rotated(kernel, k, cos, sin, transposed, "k")};
}

// The labels of `rows` rows, each checked; `labels` becomes what holds them.
const int64_t* labels_of(Tensor& labels, int64_t rows, int64_t classes) {
  labels = torch::stable::contiguous(labels);
  STD_TORCH_CHECK(labels.dim() == 1 && labels.size(0) == rows && labels.scalar_type() == ScalarType::Long,
                  "labels must be int64 [", rows, "]");
  const int64_t* label = labels.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < rows; ++r)
    STD_TORCH_CHECK(label[r] >= 0 && label[r] < classes, "label ", label[r], " must lie in [0, ", classes, ")");
  return label;
}

Tensor cross_entropy_(Tensor logits, Tensor labels) {
  const pf::Kernels& k = kernels();
  const void* given = logits.const_data_ptr();
  const pf::Matrix x = matrix(logits, "logits");
  STD_TORCH_CHECK(x.data == given && x.ld >= x.cols,
                  "logits must have contiguous columns and rows that do not overlap: they become the gradient");
  const int64_t* label = labels_of(labels, x.rows, x.cols);
  Tensor losses = torch::stable::new_empty(logits, {x.rows}, ScalarType::Float);
  const pf::CrossEntropyArgs args{.logits = logits.mutable_data_ptr(),
                                  .dtype = x.dtype,
                                  .cols = x.cols,
                                  .ld = x.ld,
                                  .block = x.cols,
                                  .labels = label,
                                  .losses = static_cast<float*>(losses.mutable_data_ptr())};
  pf::parallel_for(x.rows, row_grain(x.cols * 8), [&](int64_t r0, int64_t r1) { k.cross_entropy(args, r0, r1); });
  return losses;
}

// The losses [rows], and the gradient of their sum in hidden (empty where it is not wanted).
std::tuple<Tensor, Tensor> head_cross_entropy(Tensor hidden, Tensor weight, Tensor labels, bool differentiates) {
  kernels();
  pf::HeadLoss g{matrix(weight, "weight"), matrix(hidden, "hidden")};
  STD_TORCH_CHECK(g.w.cols == g.hidden.cols && g.w.dtype == g.hidden.dtype, "weight must be [classes, ", g.hidden.cols,
                  "] in the dtype of hidden");
  g.labels = labels_of(labels, g.hidden.rows, g.w.rows);
  Tensor losses = torch::stable::new_empty(hidden, {g.hidden.rows}, ScalarType::Float);
  Tensor dhidden = new_matrix(differentiates ? g.hidden.rows : 0, g.w.cols, g.hidden.dtype);
  if (g.hidden.rows == 0) return {losses, dhidden};
  Tensor chunk = torch::stable::new_empty(hidden, {pf::head_chunk_bytes(g)}, ScalarType::Byte);
  g.losses = static_cast<float*>(losses.mutable_data_ptr());
  g.dhidden = differentiates ? dhidden.mutable_data_ptr() : nullptr;
  g.chunk = chunk.mutable_data_ptr();
  pf::with_threads_for(g.hidden.rows, g.w.rows * g.w.cols, [&](pf::ParallelFor threads) { pf::head_loss(g, threads); });
  return {losses, dhidden};
}

// x W^T + bias, summed in float32.
Tensor dense_linear(Tensor x, Tensor weight, OptTensor bias) {
  kernels();
  const pf::Matrix xm = matrix(x, "x"), w = matrix(weight, "weight");
  STD_TORCH_CHECK(xm.cols == w.cols && xm.dtype == w.dtype, "weight must be [N, ", xm.cols, "] in the dtype of x");
  const Bias added(bias, w.rows);
  Tensor y = new_matrix(xm.rows, w.rows, xm.dtype);
  void* out = y.mutable_data_ptr();
  pf::with_threads_for(xm.rows, w.rows * w.cols, [&](pf::ParallelFor threads) {
    pf::dense_forward(w, xm, added.data, {}, out, xm.dtype, threads);
  });
  return y;
}

// dy W.
Tensor dense_linear_backward(Tensor dy, Tensor weight) {
  kernels();
  const pf::Matrix dym = matrix(dy, "dy"), w = matrix(weight, "weight");
  STD_TORCH_CHECK(dym.cols == w.rows && dym.dtype == w.dtype, "weight must be [", dym.cols, ", K] in the dtype of dy");
  Tensor dx = new_matrix(dym.rows, w.cols, dym.dtype);
  void* out = dx.mutable_data_ptr();
  pf::with_threads_for(dym.rows, w.rows * w.cols,
                       [&](pf::ParallelFor threads) { pf::dense_backward(w, dym, out, threads); });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyfastpeft, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, float eps, bool need_weight) -> (Tensor, Tensor)");
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)");
  m.def("dense_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("dense_linear_backward(Tensor dy, Tensor weight) -> Tensor");
  m.def("rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool transposed) -> (Tensor, Tensor)");
  m.def("cross_entropy_(Tensor(a!) logits, Tensor labels) -> Tensor");
  m.def("head_cross_entropy(Tensor hidden, Tensor weight, Tensor labels, bool differentiates) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("cross_entropy_", TORCH_BOX(&cross_entropy_));
  m.impl("head_cross_entropy", TORCH_BOX(&head_cross_entropy));
  m.impl("dense_linear", TORCH_BOX(&dense_linear));
  m.impl("dense_linear_backward", TORCH_BOX(&dense_linear_backward));
}
