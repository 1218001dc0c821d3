// The operators over csrc/cuda's C ABI for tensors on the CPU, over kernels that are its definition in double
// precision: what is tested is all that lies between the operators and the ABI. Built by test_cuda_operators.py, with
// the tables.
#include "cuda_operands.h"

#include <cstring>

const float pf::kTables[3][16] = {PF_TABLES};
float pf::kDynamicMap[256] = {PF_DYNAMIC_MAP};

namespace {

double element(const void* p, int dtype, int64_t at) {
  if (dtype == pf::kFloat32) return static_cast<const float*>(p)[at];
  const uint16_t half = static_cast<const uint16_t*>(p)[at];
  if (dtype == pf::kBFloat16) return __builtin_bit_cast(float, uint32_t{half} << 16);
  return static_cast<double>(__builtin_bit_cast(_Float16, half));
}

void store(void* p, int dtype, int64_t at, double value) {
  const float v = static_cast<float>(value);
  if (dtype == pf::kFloat32) {
    static_cast<float*>(p)[at] = v;
  } else if (dtype == pf::kFloat16) {
    static_cast<uint16_t*>(p)[at] = __builtin_bit_cast(uint16_t, static_cast<_Float16>(v));
  } else {
    const uint32_t bits = __builtin_bit_cast(uint32_t, v);
    static_cast<uint16_t*>(p)[at] = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

double weight_at(const PfWeight* w, int64_t row, int64_t column) {
  const int64_t at = row * w->k + column, block = at / w->blocksize;
  const int code = at % 2 == 0 ? w->codes[at / 2] >> 4 : w->codes[at / 2] & 15;
  const double scale =
      w->scale != nullptr ? w->scale[block] : w->dynamic_map[w->scale8[block]] * w->absmax2[block / 256] + *w->offset;
  return pf::kTables[w->format][code] * scale + (w->zero != nullptr ? w->zero[block] : 0.0);
}

constexpr int64_t kMostRows = 24;

int64_t most_rows(const PfWeight*, int32_t dtype) { return dtype == pf::kFloat32 ? 0 : kMostRows; }
int64_t workspace_bytes(const PfWeight*, const PfLora*, int64_t m) { return m > 4 ? 64 * m : 0; }

int32_t linear(const PfWeight* w, const void* x, int64_t ldx, const void* bias, int32_t bias_dtype, const PfLora* lora,
               void* y, int64_t m, int32_t dtype, void* workspace, void*) {
  if (const int64_t bytes = workspace_bytes(w, lora, m); bytes > 0) std::memset(workspace, 0xFF, bytes);
  for (int64_t r = 0; r < m; ++r) {
    const int64_t slot = lora == nullptr ? -1 : lora->rows == nullptr ? 0 : lora->rows[r];
    std::vector<double> s;
    if (slot >= 0 && slot < lora->slots)
      for (int64_t j = 0; j < lora->rank; ++j) {
        double sum = 0;
        for (int64_t c = 0; c < w->k; ++c)
          sum += element(x, dtype, r * ldx + c) *
                 element(lora->a, lora->a_dtype, slot * lora->a_slot_stride + j * lora->a_stride + c);
        s.push_back(sum * lora->factor * (lora->scaling != nullptr ? lora->scaling[slot] : 1) *
                    (lora->rank_scale != nullptr ? lora->rank_scale[j] : 1));
      }
    for (int64_t n = 0; n < w->n; ++n) {
      double sum = bias != nullptr ? element(bias, bias_dtype, n) : 0;
      for (int64_t c = 0; c < w->k; ++c) sum += element(x, dtype, r * ldx + c) * weight_at(w, n, c);
      for (size_t j = 0; j < s.size(); ++j)
        sum += s[j] * element(lora->b, lora->b_dtype,
                              slot * lora->b_slot_stride + n * lora->b_stride + j * lora->b_column_stride);
      store(y, dtype, r * w->n + n, sum);
    }
  }
  return 0;
}

int32_t dequantize(const PfWeight* w, int64_t row0, int64_t rows, void* out, int32_t dtype, void*) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < w->k; ++c) store(out, dtype, r * w->k + c, weight_at(w, row0 + r, c));
  return 0;
}

int32_t dynamic_map(const float* values, const float** map) { return *map = values, 0; }

const char* words(int32_t) { return "?"; }

struct Place {
  pf::cuda::Kernels kernels{most_rows,   workspace_bytes, linear,  dequantize, nullptr,
                            dynamic_map, words,           nullptr, nullptr};
  void* stream = nullptr;

  explicit Place(const pf::cuda::Tensor&) {}
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CPU, m) {
  m.impl("linear_4bit_cuda", TORCH_BOX(&pf::cuda::Operators<Place>::linear_4bit));
  m.impl("dequantize_rows", TORCH_BOX(&pf::cuda::Operators<Place>::dequantize_rows));
}
