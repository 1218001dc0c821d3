// Operators over the CUDA kernels: what is checked before a launch, and how tensors become the kernels' arguments.
// Nothing here is CUDA itself: the kernels come as a table, the stream and the current device from `Place`, so that the
// tests run the same code over kernels for the CPU. Nothing of torch's outlives a call, as it may belong to the pool of
// a graph; what is kept from call to call the kernels' library keeps.
#pragma once
#include <vector>

#include "cuda/api.h"
#include "operands.h"

namespace pf::cuda {

using namespace pf::tensors;

// The functions of csrc/cuda/api.h.
struct Kernels {
  decltype(&pf_linear_4bit_most_rows) most_rows;
  decltype(&pf_linear_4bit_workspace) workspace;
  decltype(&pf_linear_4bit) linear;
  decltype(&pf_dequantize_4bit) dequantize;
  decltype(&pf_quantize_4bit) quantize;
  decltype(&pf_dynamic_map) dynamic_map;
  decltype(&pf_cuda_error) error;
  decltype(&pf_cuda_version) version;
  decltype(&pf_cuda_architectures) architectures;

  void check(int32_t status, const char* operation) const {
    STD_TORCH_CHECK(status == 0, operation, ": ", error(status), " (CUDA error ", status, ")");
  }
};

// The new tensor that `fn` returns. The stable ABI passes on that an allocation failed, not why.
template <class Fn>
Tensor allocated(const char* what, Fn fn) {
  try {
    return fn();
  } catch (const std::exception& e) {
    STD_TORCH_CHECK(false, "CUDA out of memory. ", what, " could not be allocated: ", e.what());
  }
}

inline void check_device(const Tensor& t, const Tensor& codes, const char* name) {
  STD_TORCH_CHECK(t.device() == codes.device(), name, " is on another device than the weight, number ",
                  codes.get_device_index());
}

// Of a tensor beside the codes, its elements side by side.
inline void check_dense(const Tensor& t, const Tensor& codes, ScalarType dtype, int64_t count, const char* name,
                        const char* must_be) {
  check_device(t, codes, name);
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.is_contiguous() && t.numel() == count, name, " must be contiguous ",
                  must_be);
}

// W [n, k] in the rows layout, checked.
inline PfWeight weight(const Kernels& kernels, const Tensor& codes, const Tensor& scale, const OptTensor& zero,
                       const OptTensor& absmax2, const OptTensor& offset, int64_t format, int64_t n, int64_t k,
                       int64_t blocksize) {
  check_format(format, blocksize);
  STD_TORCH_CHECK(n >= 0 && k >= 0, "n is ", n, ", k ", k, "; neither may be negative");
  const int64_t blocks = pf::ceil_div(n * k, blocksize);
  check_dense(codes, codes, ScalarType::Byte, (n * k + 1) / 2, "codes", "uint8 [(N K + 1) / 2] in the rows layout");
  check_zero(zero, format);
  PfWeight w{};
  w.codes = codes.const_data_ptr<uint8_t>();
  w.n = n;
  w.k = k;
  w.blocksize = static_cast<int32_t>(blocksize);
  w.format = static_cast<int32_t>(format);
  if (absmax2.has_value()) {
    STD_TORCH_CHECK(offset.has_value(), "double-quantized scales need their second-level scales and offset");
    check_dense(scale, codes, ScalarType::Byte, blocks, "scale", "uint8, one a block, when double-quantized");
    check_dense(*absmax2, codes, ScalarType::Float, (blocks + 255) / 256, "absmax2", "float32, one for 256 blocks");
    check_dense(*offset, codes, ScalarType::Float, 1, "offset", "float32, one number");
    w.scale8 = scale.const_data_ptr<uint8_t>();
    w.absmax2 = absmax2->const_data_ptr<float>();
    w.offset = offset->const_data_ptr<float>();
    kernels.check(kernels.dynamic_map(pf::kDynamicMap, &w.dynamic_map), "the map of double-quantized scales");
  } else {
    check_dense(scale, codes, ScalarType::Float, blocks, "scale", "float32, one a block");
    w.scale = scale.const_data_ptr<float>();
  }
  if (zero.has_value()) {
    check_dense(*zero, codes, ScalarType::Float, blocks, "zero", "float32, one a block");
    w.zero = zero->const_data_ptr<float>();
  }
  return w;
}

// The LoRA branch over W, checked; keeps its tensors alive.
struct LoraArguments {
  Tensor a, b;
  PfLora lora{};

  LoraArguments(const Tensor& codes, const PfWeight& w, int64_t m, const OptTensor& given_a, const OptTensor& given_b,
                const OptTensor& scaling, const OptTensor& rank_scale, const OptTensor& slots, double factor) {
    STD_TORCH_CHECK(given_b.has_value(), "lora A needs lora B");
    a = *given_a;
    b = *given_b;
    check_device(a, codes, "lora A");
    check_device(b, codes, "lora B");
    STD_TORCH_CHECK(a.dim() == 3 && b.dim() == 3 && a.size(0) == b.size(0) && a.size(1) == b.size(2) &&
                        a.size(2) == w.k && b.size(1) == w.n && a.size(1) > 0,
                    "lora A must be [slots, R, K = ", w.k, "] and lora B [slots, N = ", w.n, ", R], R >= 1");
    if (a.stride(2) != 1 && a.size(2) > 1) a = torch::stable::contiguous(a);
    lora.a = a.const_data_ptr();
    lora.b = b.const_data_ptr();
    lora.a_dtype = dtype_of(a, "lora A");
    lora.b_dtype = dtype_of(b, "lora B");
    lora.slots = a.size(0);
    lora.rank = a.size(1);
    lora.a_slot_stride = a.stride(0);
    lora.a_stride = a.stride(1);
    lora.b_slot_stride = b.stride(0);
    lora.b_stride = b.stride(1);
    lora.b_column_stride = b.stride(2);
    lora.factor = static_cast<float>(factor);
    if (scaling.has_value()) {
      check_dense(*scaling, codes, ScalarType::Float, lora.slots, "scaling", "float32 [slots]");
      lora.scaling = scaling->const_data_ptr<float>();
    }
    if (rank_scale.has_value()) {
      check_dense(*rank_scale, codes, ScalarType::Float, lora.rank, "rank_scale", "float32 [R]");
      lora.rank_scale = rank_scale->const_data_ptr<float>();
    }
    if (slots.has_value()) {
      check_dense(*slots, codes, ScalarType::Long, m, "slots", "int64, one a row of x");
      lora.rows = slots->const_data_ptr<int64_t>();
    }
  }
};

// `Place(tensor)`: on the device of `tensor`, with `kernels` and `stream`.
template <class Place>
struct Operators {
  static void linear_4bit(Tensor x, Tensor codes, Tensor scale, OptTensor zero, OptTensor absmax2, OptTensor offset,
                          int64_t format, int64_t n, int64_t blocksize, OptTensor bias, OptTensor lora_a,
                          OptTensor lora_b, OptTensor scaling, OptTensor rank_scale, OptTensor slots, double factor,
                          Tensor y) {
    const Place place(codes);
    check_device(x, codes, "x");
    STD_TORCH_CHECK(x.dim() == 2, "x must be a matrix");
    const int64_t m = x.size(0), k = x.size(1);
    const PfWeight w = weight(place.kernels, codes, scale, zero, absmax2, offset, format, n, k, blocksize);
    const int dtype = dtype_of(x, "x");
    const int64_t most = place.kernels.most_rows(&w, dtype);
    const bool aligned = reinterpret_cast<uintptr_t>(w.codes) % 16 == 0;
    STD_TORCH_CHECK(m <= most, "x has ", m, " rows; the kernels take at most ", most, " for this weight and dtype",
                    aligned ? "" : ", as the codes do not begin at a multiple of 16 bytes");
    check_dense(y, codes, x.scalar_type(), m * n, "y", "[M, N] in x's dtype");
    if (bias.has_value()) {
      STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n, "bias must be [N]");
      check_device(*bias, codes, "bias");
      bias = torch::stable::contiguous(*bias);
    }
    if (m == 0 || n == 0) return;
    make_columns_contiguous(x);
    std::optional<LoraArguments> lora;
    if (lora_a.has_value()) lora.emplace(codes, w, m, lora_a, lora_b, scaling, rank_scale, slots, factor);
    const PfLora* branch = lora.has_value() ? &lora->lora : nullptr;
    Tensor workspace;
    if (const int64_t bytes = place.kernels.workspace(&w, branch, m); bytes > 0)
      workspace = allocated("The workspace of linear_4bit",
                            [&] { return torch::stable::new_empty(codes, {bytes}, ScalarType::Byte); });
    place.kernels.check(
        place.kernels.linear(&w, x.const_data_ptr(), m > 1 ? x.stride(0) : k,
                             bias.has_value() ? bias->const_data_ptr() : nullptr,
                             bias.has_value() ? dtype_of(*bias, "bias") : 0, branch, y.mutable_data_ptr(), m, dtype,
                             workspace.defined() ? workspace.mutable_data_ptr() : nullptr, place.stream),
        "linear_4bit");
  }

  static void dequantize_rows(Tensor codes, Tensor scale, OptTensor zero, OptTensor absmax2, OptTensor offset,
                              int64_t format, int64_t n, int64_t blocksize, int64_t k, int64_t row0, Tensor out) {
    const Place place(codes);
    const PfWeight w = weight(place.kernels, codes, scale, zero, absmax2, offset, format, n, k, blocksize);
    check_device(out, codes, "out");
    STD_TORCH_CHECK(out.dim() == 2 && out.size(1) == k && out.is_contiguous(), "out must be contiguous [rows, K = ", k,
                    "]");
    const int64_t rows = out.size(0);
    STD_TORCH_CHECK(row0 >= 0 && row0 + rows <= n, "rows [", row0, ", ", row0 + rows, ") must lie in [0, N = ", n, ")");
    if (rows * k == 0) return;
    place.kernels.check(
        place.kernels.dequantize(&w, row0, rows, out.mutable_data_ptr(), dtype_of(out, "out"), place.stream),
        "dequantize_4bit");
  }

  static Tensor dequantize_4bit(Tensor codes, Tensor scale, OptTensor zero, int64_t format, int64_t blocksize,
                                std::vector<int64_t> shape, ScalarType dtype) {
    const Place place(codes);
    const int64_t count = element_count(shape);
    const int64_t n = shape.empty() || count == 0 ? 1 : shape[0];
    const PfWeight w = weight(place.kernels, codes, scale, zero, {}, {}, format, n, count / n, blocksize);
    Tensor out =
        allocated("The tensor of dequantize_4bit", [&] { return torch::stable::new_empty(codes, shape, dtype); });
    const int to = dtype_of(out, "dtype");
    if (count > 0)
      place.kernels.check(place.kernels.dequantize(&w, 0, n, out.mutable_data_ptr(), to, place.stream),
                          "dequantize_4bit");
    return out;
  }

  static std::tuple<Tensor, Tensor, Tensor> quantize_4bit(Tensor w, int64_t format, int64_t blocksize) {
    const Place place(w);
    check_format(format, blocksize);
    STD_TORCH_CHECK(w.is_contiguous(), "w must be contiguous");
    const int dtype = dtype_of(w, "w");
    const int64_t count = w.numel(), blocks = pf::ceil_div(count, blocksize);
    const int64_t zeros = format == pf::kINT4 ? blocks : 0;
    const auto make = [&](const char* what, std::vector<int64_t> sizes, ScalarType type) {
      return allocated(what, [&] { return torch::stable::new_empty(w, sizes, type); });
    };
    Tensor codes = make("The codes of quantize_4bit", {(count + 1) / 2, 1}, ScalarType::Byte);
    Tensor scale = make("The scales of quantize_4bit", {blocks}, ScalarType::Float);
    Tensor zero = make("The zeros of quantize_4bit", {zeros}, ScalarType::Float);
    if (count > 0)
      place.kernels.check(place.kernels.quantize(w.const_data_ptr(), dtype, count, static_cast<int32_t>(format),
                                                 static_cast<int32_t>(blocksize), codes.mutable_data_ptr<uint8_t>(),
                                                 scale.mutable_data_ptr<float>(),
                                                 zeros > 0 ? zero.mutable_data_ptr<float>() : nullptr, place.stream),
                          "quantize_4bit");
    return {codes, scale, zero};
  }
};

}  // namespace pf::cuda
