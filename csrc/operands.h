// The packed weight, the LoRA branch and the bias as operators receive them, checked.
#pragma once
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "cpu/linear.h"
#include "tensors.h"

// A packed weight in an operator's schema.
#define PF_WEIGHT \
  "Tensor codes, Tensor scale, Tensor? zero, Tensor? absmax2, Tensor? offset, int format, int n, int blocksize"

namespace pf::tensors {

inline void check_blocksize(int64_t blocksize) {
  STD_TORCH_CHECK(blocksize >= 32 && blocksize <= 4096 && (blocksize & (blocksize - 1)) == 0,
                  "blocksize must be a power of two, 32 to 4096");
}

inline void check_format(int64_t format, int64_t blocksize) {
  STD_TORCH_CHECK(format >= 0 && format <= 2, "format must be 0 (nf4), 1 (fp4) or 2 (int4)");
  check_blocksize(blocksize);
}

inline void check_zero(const OptTensor& zero, int64_t format) {
  STD_TORCH_CHECK(zero.has_value() == (format == pf::kINT4), "zero belongs to int4, and int4 needs it");
}

inline pf::Weight weight(const Tensor& codes, const Tensor& scale, const OptTensor& zero, const OptTensor& absmax2,
                         const OptTensor& offset, int64_t format, int64_t n, int64_t blocksize) {
  STD_TORCH_CHECK(
      codes.scalar_type() == ScalarType::Byte && codes.dim() == 2 && codes.is_contiguous() &&
          codes.size(0) == pf::ceil_div(n, pf::kTile) && codes.size(1) > 0 && codes.size(1) % (8 * 32) == 0,
      "codes must be contiguous uint8 [ceil(N / 16), 8 K] in the tiles layout, K a positive multiple of 32");
  check_format(format, blocksize);
  pf::Weight w{};
  w.codes = codes.const_data_ptr<uint8_t>();
  w.format = static_cast<int>(format);
  w.n = n;
  w.k = codes.size(1) / 8;
  w.blocksize = blocksize;
  w.segment = std::gcd(w.k, blocksize);
  STD_TORCH_CHECK(scale.is_contiguous() && scale.numel() == w.tiles() * w.segments() * pf::kTile,
                  "scale must be contiguous [ceil(N / 16), segments, 16]");
  if (absmax2.has_value()) {
    STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Byte && offset.has_value() && offset->numel() == 1,
                    "double-quantized scales must be uint8, with their second-level scales and offset");
    STD_TORCH_CHECK(absmax2->is_contiguous() && absmax2->numel() * 256 >= pf::ceil_div(w.n * w.k, blocksize),
                    "absmax2 must be contiguous, one for 256 blocks");
    w.scale8 = scale.const_data_ptr<uint8_t>();
    w.scale2 = absmax2->const_data_ptr<float>();
    w.offset = *offset->const_data_ptr<float>();
  } else {
    w.scale = scale.const_data_ptr<float>();
  }
  check_zero(zero, format);
  if (zero.has_value()) {
    STD_TORCH_CHECK(zero->is_contiguous() && zero->numel() == scale.numel(), "zero must have the shape of scale");
    w.zero = zero->const_data_ptr<float>();
  }
  return w;
}

// A packed weight that was checked once and is used many times.
class HeldWeight {
 public:
  HeldWeight(Tensor codes, Tensor scale, OptTensor zero, OptTensor absmax2, OptTensor offset, int64_t format, int64_t n,
             int64_t blocksize)
      : checked_(pf::tensors::weight(codes, scale, zero, absmax2, offset, format, n, blocksize)),
        codes_(std::move(codes)),
        scale_(std::move(scale)),
        zero_(std::move(zero)),
        absmax2_(std::move(absmax2)) {}

  int64_t n() const { return checked_.n; }
  int64_t k() const { return checked_.k; }

  // Where it lies now: sharing a tensor with another process moves its memory.
  pf::Weight now() const {
    pf::Weight w = checked_;
    w.codes = codes_.const_data_ptr<uint8_t>();
    if (w.scale != nullptr) w.scale = scale_.const_data_ptr<float>();
    if (w.scale8 != nullptr) w.scale8 = scale_.const_data_ptr<uint8_t>();
    if (zero_.has_value()) w.zero = zero_->const_data_ptr<float>();
    if (absmax2_.has_value()) w.scale2 = absmax2_->const_data_ptr<float>();
    return w;
  }

 private:
  pf::Weight checked_;
  Tensor codes_, scale_;
  OptTensor zero_, absmax2_;
};

// A matrix [rows, cols] packed by pack_pairs.
inline pf::Matrix packed_matrix(const Tensor& t, int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::BFloat16 && t.dim() == 4 && t.is_contiguous() &&
                      t.size(0) == pf::ceil_div(rows, pf::kTile) && t.size(1) == cols / 2 && t.size(2) == pf::kTile &&
                      t.size(3) == 2 && cols % 2 == 0,
                  "a packed lora factor must be contiguous bfloat16 [ceil(rows / 16), columns / 2, 16, 2]");
  return {t.const_data_ptr(), pf::kBFloat16, rows, cols, 0, true};
}

// A packed adapter over a weight [n, k] that was checked once and is used many times.
class HeldBranch {
 public:
  HeldBranch(Tensor a, Tensor b, int64_t n, int64_t k) : a_(std::move(a)), b_(std::move(b)) {
    STD_TORCH_CHECK(b_.dim() == 4, "a packed lora factor must have four dimensions");
    const int64_t rank = b_.size(1) * 2;
    checked_.a = packed_matrix(a_, rank, k + k % 2);
    checked_.a.cols = k;  // an odd k is no weight's in tiles
    checked_.b = packed_matrix(b_, n, rank);
  }

  pf::Branch now(double scaling, const pf::Weight& w) const {
    STD_TORCH_CHECK(checked_.a.cols == w.k && checked_.b.rows == w.n, "the branch must be one over this weight");
    pf::Branch branch = checked_;
    branch.a.data = a_.const_data_ptr();
    branch.b.data = b_.const_data_ptr();
    branch.scaling = static_cast<float>(scaling);
    return branch;
  }

 private:
  Tensor a_, b_;
  pf::Branch checked_;
};

inline void set_factor(pf::Branch& branch, const OptTensor& row_scale, double scaling, int64_t rows, int64_t rank,
                       const OptTensor& seed, double dropout) {
  branch.scaling = static_cast<float>(scaling);
  if (row_scale.has_value()) {
    const int64_t dims = row_scale->dim();
    STD_TORCH_CHECK(row_scale->scalar_type() == ScalarType::Float && row_scale->is_contiguous() &&
                        (dims == 1 || (dims == 2 && row_scale->size(0) == rows)) && row_scale->size(dims - 1) == rank,
                    "row_scale must be contiguous float32 [R = ", rank, "] or [rows = ", rows, ", R]");
    branch.row_scale = row_scale->const_data_ptr<float>();
    branch.row_scale_ld = dims == 2 ? rank : 0;
  }
  if (seed.has_value()) {
    STD_TORCH_CHECK(dropout > 0.0 && dropout < 1.0, "dropout must lie in (0, 1)");
    STD_TORCH_CHECK(seed->numel() == 1, "seed must be one number");
    branch.dropout.seed = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
    // Next to 1 it rounds to 2^32, which wrapped would be no dropout at all.
    branch.dropout.threshold = static_cast<uint32_t>(std::min(std::llround(dropout * 4294967296.0), 0xFFFFFFFFLL));
    branch.dropout.scale = static_cast<float>(1.0 / (1.0 - dropout));
  }
}

// Keeps the matrices of a branch alive while the kernels read them.
struct BranchTensors {
  Tensor a, b;
  pf::Branch branch;

  BranchTensors(const OptTensor& lora_a, const OptTensor& lora_b, const OptTensor& row_scale, double scaling,
                int64_t rows, const OptTensor& seed, double dropout, int64_t n, int64_t k) {
    if (!lora_a.has_value()) return;
    STD_TORCH_CHECK(lora_b.has_value(), "lora A needs lora B");
    a = *lora_a;
    b = *lora_b;
    if (a.dim() == 4) {
      const int64_t rank = b.dim() == 4 ? b.size(1) * 2 : 0;
      branch.a = packed_matrix(a, rank, k);
      branch.b = packed_matrix(b, n, rank);
    } else {
      branch.a = matrix(a, "lora A");
      branch.b = matrix(b, "lora B");
    }
    const int64_t rank = branch.a.rows;
    STD_TORCH_CHECK(branch.a.cols == k && branch.b.rows == n && branch.b.cols == rank && rank > 0 && k > 0,
                    "lora A must be [R, K] and lora B [N, R], R and K at least 1");
    set_factor(branch, row_scale, scaling, rows, rank, seed, dropout);
  }
};

// Bias [N] in float32, or null.
struct Bias {
  OptTensor held;
  std::vector<float> converted;
  const float* data = nullptr;

  Bias(const OptTensor& bias, int64_t n) {
    if (!bias.has_value()) return;
    STD_TORCH_CHECK(bias->dim() == 1 && bias->numel() == n, "bias must be [N]");
    held = torch::stable::contiguous(*bias);
    if (held->scalar_type() == ScalarType::Float) {
      data = held->const_data_ptr<float>();
    } else {
      converted.resize(n);
      kernels().to_float(held->const_data_ptr(), dtype_of(*held, "bias"), converted.data(), n);
      data = converted.data();
    }
  }
};

}  // namespace pf::tensors
