// Inference over weights and adapters that are held: they are checked once and named by a handle, so that a call passes
// what changes only. (Each tensor that passes through the dispatcher takes a tenth of a microsecond, and many times
// that where its few cache lines must come from memory, as in a model.)
#include <memory>
#include <vector>

#include "handle_table.h"
#include "operands.h"
#include "threads.h"

namespace {

using namespace pf::tensors;

HandleTable<const HeldWeight> weights;
HandleTable<const HeldBranch> branches;

int64_t hold_weight(Tensor codes, Tensor scale, OptTensor zero, OptTensor absmax2, OptTensor offset, int64_t format,
                    int64_t n, int64_t blocksize) {
  return weights.add(std::make_shared<const HeldWeight>(codes, scale, zero, absmax2, offset, format, n, blocksize));
}

int64_t hold_branch(Tensor a_pairs, Tensor b_pairs, int64_t n, int64_t k) {
  return branches.add(std::make_shared<const HeldBranch>(a_pairs, b_pairs, n, k));
}

// x [.., K] as a matrix of its rows, and y [.., N] for it.
struct Rows {
  Tensor x, y;
  pf::Matrix matrix;

  Rows(const Tensor& given, const pf::Weight& w) : x(given) {
    const int64_t dims = x.dim();
    STD_TORCH_CHECK(dims > 0 && x.size(dims - 1) == w.k, "x must be [.., K = ", w.k, "]");
    const int dtype = dtype_of(x, "x");
    if (dims == 2)
      make_columns_contiguous(x);
    else if (!x.is_contiguous())
      x = torch::stable::contiguous(x);
    std::vector<int64_t> sizes(dims);
    int64_t rows = 1;
    for (int64_t d = 0; d + 1 < dims; ++d) rows *= sizes[d] = x.size(d);
    sizes[dims - 1] = w.n;
    y = new_dense(sizes.data(), dims, dtype);
    matrix = {x.const_data_ptr(), dtype, rows, w.k, dims == 2 && rows > 1 ? x.stride(0) : w.k};
  }
};

// Whether no element has all the bits of its exponent.
template <class T>
bool all_finite(const void* values, int64_t n, T exponent) {
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) finite &= (static_cast<const T*>(values)[i] & exponent) != exponent;
  return finite;
}

// Where the rows of x choose among adapters, a result that is not finite is an error, which the caller deals with. One
// row shows it: see pyfastpeft/ops/mixed.py.
Tensor linear_4bit_held(Tensor x, int64_t weight, OptTensor bias, int64_t branch, double scaling, OptTensor row_scale,
                        bool int8) {
  kernels();
  // Held, as another thread may release them meanwhile.
  const auto held_weight = weights.find(weight, "weight");
  const auto held_branch = branch == 0 ? nullptr : branches.find(branch, "branch");
  const pf::Weight w = held_weight->now();
  pf::Branch lora = branch == 0 ? pf::Branch{} : held_branch->now(scaling, w);
  const Rows rows(x, w);
  if (row_scale.has_value()) set_factor(lora, row_scale, scaling, rows.matrix.rows, lora.rank(), std::nullopt, 0.0);
  const Bias bias_data(bias, w.n);
  void* y = rows.y.mutable_data_ptr();
  if (int8)
    pf::linear_forward_int8(w, rows.matrix, bias_data.data, lora, y, rows.matrix.dtype, pf::parallel);
  else
    pf::linear_forward(w, rows.matrix, bias_data.data, lora, y, rows.matrix.dtype, nullptr, pf::parallel);
  if (lora.row_scale_ld != 0 && rows.matrix.rows > 0) {
    const int dtype = rows.matrix.dtype;
    const bool finite = dtype == pf::kFloat32 ? all_finite<uint32_t>(y, w.n, 0x7F800000)
                                              : all_finite<uint16_t>(y, w.n, dtype == pf::kBFloat16 ? 0x7F80 : 0x7C00);
    STD_TORCH_CHECK(finite, "the result is not finite: rows may have taken something from other rows' adapters");
  }
  return rows.y;
}

}  // namespace

PF_C void pf_free_weight(int64_t handle) { weights.free(handle); }
PF_C void pf_free_branch(int64_t handle) { branches.free(handle); }

STABLE_TORCH_LIBRARY_FRAGMENT(pyfastpeft, m) {
  m.def("hold_weight(" PF_WEIGHT ") -> int");
  m.def("hold_branch(Tensor a_pairs, Tensor b_pairs, int n, int k) -> int");
  m.def(
      "linear_4bit_held(Tensor x, int weight, Tensor? bias, int branch, float scaling, Tensor? row_scale, bool int8) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CPU, m) {
  m.impl("hold_weight", TORCH_BOX(&hold_weight));
  m.impl("hold_branch", TORCH_BOX(&hold_branch));
  m.impl("linear_4bit_held", TORCH_BOX(&linear_4bit_held));
}
