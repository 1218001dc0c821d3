// The operator on the CPU: which kernels, in which order, split how. No torch in it; threads come from the caller.
#pragma once
#include "kernels.h"

namespace pf {

// Runs body(ctx, begin, end) over [0, n) in chunks of at least `grain`.
using ParallelFor = void (*)(int64_t n, int64_t grain, void* ctx, void (*body)(void*, int64_t, int64_t));

// body(begin, end) over [0, n) in such chunks.
template <class Body>
void run(ParallelFor parallel, int64_t n, int64_t grain, const Body& body) {
  parallel(n, grain > 1 ? grain : 1, const_cast<Body*>(&body),
           [](void* ctx, int64_t b, int64_t e) { (*static_cast<const Body*>(ctx))(b, e); });
}

// Multiply-adds that a thread must get before waking another one pays.
int64_t thread_work();

// The LoRA branch: ((dropout(x) A^T) * factor) B^T, factor = scaling * row_scale.
struct Branch {
  Matrix a;                          // [R, K]; data null without a branch
  Matrix b;                          // [N, R]
  const float* row_scale = nullptr;  // [rows, R] or [R]
  int64_t row_scale_ld = 0;          // R, or 0 for one row shared by all
  float scaling = 1.0f;
  Dropout dropout;

  int64_t rank() const { return a.data == nullptr ? 0 : a.rows; }
};

// y [x.rows, N] in y_dtype; s [x.rows, R] float32 = dropout(x) A^T, null where nobody wants it.
void linear_forward(const Weight& w, const Matrix& x, const float* bias, const Branch& branch, void* y, int y_dtype,
                    float* s, ParallelFor parallel);
// The same y with x rounded to 8 bits on its way into W; the branch is exact.
void linear_forward_int8(const Weight& w, const Matrix& x, const float* bias, const Branch& branch, void* y,
                         int y_dtype, ParallelFor parallel);
// The same as linear_forward for a weight [N, K] in full precision, without dropout, and dx [rows, K] = dy W in dy's
// dtype. Of more than kTile rows the branch is added to a product that is rounded.
void dense_forward(const Matrix& w, const Matrix& x, const float* bias, const Branch& branch, void* y, int y_dtype,
                   ParallelFor parallel);
void dense_backward(const Matrix& w, const Matrix& dy, void* dx, ParallelFor parallel);
// y [x.rows, N] = base + the branch, in base's dtype; s [x.rows, R] as above.
void lora_forward(const Matrix& base, const Matrix& x, const Branch& branch, void* y, float* s, ParallelFor parallel);

// Of a branch that trains: what the forward pass had, and the gradients that it gets, float32; null where not wanted.
struct BranchTraining {
  Matrix x, s;
  float* da;  // [R, K] = ds^T dropout(x), ds = (dy B) * factor
  float* db;  // [N, R] = dy^T (s * factor)
};

// dx [rows, K] in dy's dtype, null where not wanted, and the gradients of the branch; neither rows nor columns of dy
// none. w may have no rows: of the branch alone.
void linear_backward(const Weight& w, const Matrix& dy, const Branch& branch, const BranchTraining& training, void* dx,
                     ParallelFor parallel);

// The cross-entropies of an output head's logits hidden w^T, of which a chunk of rows is in memory at a time.
struct HeadLoss {
  Matrix w, hidden;       // [classes, H], [rows, H]
  const int64_t* labels;  // [rows], each below classes
  float* losses;          // [rows]
  void* dhidden;          // [rows, H] in the dtype of hidden, of the sum of the losses; or null
  void* chunk;            // head_chunk_bytes
};
int64_t head_chunk_bytes(const HeadLoss& g);
void head_loss(const HeadLoss& g, ParallelFor parallel);

}  // namespace pf
