// What operators need of tensors: checked views of their memory, and new ones.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "cpu/dispatch.h"

namespace pf::tensors {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

inline const pf::Kernels& kernels() {
  const pf::Kernels* k = pf::kernels();
  if (k == nullptr) {
    std::string names;
    for (const std::string& name : pf::available_isas()) names += " " + name;
    STD_TORCH_CHECK(false, "PYFASTPEFT_CPU_ISA is '", std::getenv("PYFASTPEFT_CPU_ISA"),
                    "'; on this machine it must be one of:", names);
  }
  return *k;
}

constexpr int64_t kMostElements = int64_t{1} << 58;  // of a tensor: sizes in bytes and with padding are numbers too

inline int64_t element_count(const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (const int64_t d : shape) {
    STD_TORCH_CHECK(d >= 0 && (d == 0 || n <= kMostElements / d), "shape must be sizes, of at most 2^58 elements");
    n *= d;
  }
  return n;
}

inline int dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return pf::kFloat32;
    case ScalarType::BFloat16:
      return pf::kBFloat16;
    case ScalarType::Half:
      return pf::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
}

// A copy takes the place of a matrix whose columns are not contiguous.
inline void make_columns_contiguous(Tensor& t) {
  if (t.size(1) > 1 && t.stride(1) != 1) t = torch::stable::contiguous(t);
}

// A new contiguous tensor on the CPU, straight from the allocator: the dispatcher's way takes three times as long,
// which a call of a few microseconds feels.
inline Tensor new_dense(const int64_t* sizes, int64_t dims, int dtype) {
  const int32_t code = dtype == pf::kFloat32    ? aoti_torch_dtype_float32()
                       : dtype == pf::kBFloat16 ? aoti_torch_dtype_bfloat16()
                                                : aoti_torch_dtype_float16();
  std::vector<int64_t> strides(dims);
  for (int64_t d = dims, stride = 1; d-- > 0; stride *= sizes[d] > 1 ? sizes[d] : 1) strides[d] = stride;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides.data(), code, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor new_matrix(int64_t rows, int64_t cols, int dtype) {
  const int64_t sizes[] = {rows, cols};
  return new_dense(sizes, 2, dtype);
}

// As new_matrix, for what is freed before its neighbours in memory: with room behind it, so that a tensor of its size
// fits into the hole that it leaves. torch asks for more than that, to align what it gets: in 30 layers holes that
// nothing fits into came to as much as all that a training step keeps.
inline Tensor new_passing_matrix(int64_t rows, int64_t cols, int dtype) {
  constexpr int64_t kRoom = 1 << 16, kLeast = 1 << 18;  // bytes
  const int64_t width = pf::dtype_size(dtype), n = rows * cols;
  if (n * width < kLeast) return new_matrix(rows, cols, dtype);
  const int64_t all = n + kRoom / width, sizes[] = {rows, cols}, strides[] = {cols, 1};
  const Tensor roomy = new_dense(&all, 1, dtype);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(roomy.get(), 2, sizes, strides, 0, &handle));
  return Tensor(handle);
}

inline pf::Matrix matrix(Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2, name, " must be a matrix");
  make_columns_contiguous(t);
  return {t.const_data_ptr(), dtype_of(t, name), t.size(0), t.size(1), t.size(0) > 1 ? t.stride(0) : t.size(1)};
}

// The n numbers of an index, each checked; null where there is none.
inline const int64_t* numbers(OptTensor& t, int64_t n, int64_t least, int64_t most, const char* name) {
  if (!t.has_value()) return nullptr;
  t = torch::stable::contiguous(*t);
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Long && t->dim() == 1 && t->size(0) == n, name, " must be int64 [", n,
                  "]");
  const int64_t* data = t->const_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i)
    STD_TORCH_CHECK(data[i] >= least && data[i] <= most, name, " has ", data[i], "; each must lie in [", least, ", ",
                    most, "]");
  return data;
}

// Which of `slots` prefixes each row of a batch has, and how much of its `length` each; null: the first, and all of it.
struct PrefixRows {
  const int64_t *index, *lengths;
};
inline PrefixRows prefix_rows(OptTensor& index, OptTensor& lengths, int64_t batch, int64_t slots, int64_t length) {
  STD_TORCH_CHECK(index.has_value() || slots == 1, "prefix_index must pick one of several prefixes a row");
  return {numbers(index, batch, -1, slots - 1, "prefix_index"), numbers(lengths, slots, 0, length, "prefix_lengths")};
}

// Checks the angles of rotary embeddings; returns the tokens from one row of the batch to the next, 0 where all rows
// share them.
inline int64_t angle_stride(const Tensor& cos, const Tensor& sin, int64_t batch, int64_t tokens, int64_t dim, int dtype,
                            const char* like) {
  for (const Tensor* t : {&cos, &sin})
    STD_TORCH_CHECK(t->dim() == 3 && (t->size(0) == batch || t->size(0) == 1) && t->size(0) == cos.size(0) &&
                        t->size(1) == tokens && t->size(2) == dim && t->is_contiguous() &&
                        dtype_of(*t, t == &cos ? "cos" : "sin") == dtype,
                    "cos and sin must be contiguous [", batch, " or 1, ", tokens, ", ", dim, "] in the dtype of ",
                    like);
  return cos.size(0) == 1 ? 0 : tokens;
}

}  // namespace pf::tensors
