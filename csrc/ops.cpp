// Operator schemas and their CPU implementations, under LibTorch's stable ABI: one binary for torch 2.10 and later.
#include <cstring>
#include <numeric>
#include <tuple>
#include <vector>

#include "cpu/layout.h"
#include "memory.h"
#include "operands.h"
#include "team.h"

namespace {

using namespace pf::tensors;

pf::Matrix input_of(Tensor& x, const pf::Weight& w) {
  const pf::Matrix m = matrix(x, "x");
  STD_TORCH_CHECK(m.cols == w.k, "x has ", m.cols, " columns; it must have K = ", w.k);
  return m;
}

std::tuple<Tensor, Tensor> linear_4bit(Tensor x, Tensor codes, Tensor scale, OptTensor zero, OptTensor absmax2,
                                       OptTensor offset, int64_t format, int64_t n, int64_t blocksize, OptTensor bias,
                                       OptTensor lora_a, OptTensor lora_b, OptTensor row_scale, double scaling,
                                       OptTensor seed, double dropout, bool int8) {
  kernels();
  const pf::Weight w = weight(codes, scale, zero, absmax2, offset, format, n, blocksize);
  const pf::Matrix xm = input_of(x, w);
  const BranchTensors lora(lora_a, lora_b, row_scale, scaling, xm.rows, seed, dropout, w.n, w.k);
  Tensor y = new_matrix(xm.rows, n, xm.dtype);
  Tensor s = new_matrix(xm.rows, int8 ? 0 : lora.branch.rank(), pf::kFloat32);
  const Bias bias_data(bias, n);
  pf::with_threads_for(xm.rows, w.n * w.k, [&](pf::ParallelFor threads) {
    void* out = y.mutable_data_ptr();
    if (int8)
      pf::linear_forward_int8(w, xm, bias_data.data, lora.branch, out, xm.dtype, threads);
    else
      pf::linear_forward(w, xm, bias_data.data, lora.branch, out, xm.dtype, static_cast<float*>(s.mutable_data_ptr()),
                         threads);
  });
  return {y, s};
}

// (dx, dA, dB) of a linear layer; w may have no rows: of the branch alone. x is there where A trains, s where B does.
// What is not wanted is empty.
std::tuple<Tensor, Tensor, Tensor> gradients(const pf::Weight& w, Tensor dy, OptTensor x, OptTensor s, OptTensor lora_a,
                                             OptTensor lora_b, OptTensor row_scale, double scaling, OptTensor seed,
                                             double dropout, bool need_dx) {
  const pf::Matrix dym = matrix(dy, "dy");
  const int64_t rows = dym.rows, n = dym.cols;
  const BranchTensors lora(lora_a, lora_b, row_scale, scaling, rows, seed, dropout, n, w.k);
  const int64_t rank = lora.branch.rank();
  STD_TORCH_CHECK(!lora.branch.a.packed && !lora.branch.b.packed, "lora A and lora B must be matrices");
  STD_TORCH_CHECK(rank > 0 || !(x.has_value() || s.has_value()), "x and s belong to lora A and lora B");
  pf::BranchTraining training{};
  if (x.has_value()) {
    training.x = matrix(*x, "x");
    STD_TORCH_CHECK(training.x.rows == rows && training.x.cols == w.k, "x must be [rows of dy, K]");
  }
  if (s.has_value()) {
    training.s = matrix(*s, "s");
    STD_TORCH_CHECK(
        training.s.dtype == pf::kFloat32 && s->is_contiguous() && training.s.rows == rows && training.s.cols == rank,
        "s must be contiguous float32 [rows of dy, R]");
  }
  Tensor dx = new_matrix(need_dx ? rows : 0, w.k, dym.dtype);
  Tensor da = new_matrix(x.has_value() ? rank : 0, w.k, pf::kFloat32);
  Tensor db = new_matrix(s.has_value() ? n : 0, rank, pf::kFloat32);
  if (x.has_value()) training.da = static_cast<float*>(da.mutable_data_ptr());
  if (s.has_value()) training.db = static_cast<float*>(db.mutable_data_ptr());
  if (rows == 0 || n == 0) {
    for (Tensor* t : {&dx, &da, &db}) torch::stable::zero_(*t);
    return {dx, da, db};
  }
  pf::with_threads_for(rows, w.k * (w.n + rank), [&](pf::ParallelFor threads) {
    pf::linear_backward(w, dym, lora.branch, training, need_dx ? dx.mutable_data_ptr() : nullptr, threads);
  });
  return {dx, da, db};
}

std::tuple<Tensor, Tensor, Tensor> linear_4bit_backward(Tensor dy, OptTensor x, OptTensor s, Tensor codes, Tensor scale,
                                                        OptTensor zero, OptTensor absmax2, OptTensor offset,
                                                        int64_t format, int64_t n, int64_t blocksize, OptTensor lora_a,
                                                        OptTensor lora_b, OptTensor row_scale, double scaling,
                                                        OptTensor seed, double dropout, bool need_dx) {
  kernels();
  const pf::Weight w = weight(codes, scale, zero, absmax2, offset, format, n, blocksize);
  STD_TORCH_CHECK(dy.dim() == 2 && dy.size(1) == n, "dy must be [rows, N], N = ", n);
  return gradients(w, dy, x, s, lora_a, lora_b, row_scale, scaling, seed, dropout, need_dx);
}

// The branch alone, beside a product of somebody else's.
std::tuple<Tensor, Tensor> lora_forward(Tensor base, Tensor x, Tensor lora_a, Tensor lora_b, double scaling,
                                        OptTensor seed, double dropout) {
  kernels();
  const pf::Matrix bm = matrix(base, "base"), xm = matrix(x, "x");
  STD_TORCH_CHECK(bm.rows == xm.rows && bm.dtype == xm.dtype, "base must have the rows of x and its dtype");
  const BranchTensors lora(lora_a, lora_b, std::nullopt, scaling, xm.rows, seed, dropout, bm.cols, xm.cols);
  Tensor y = new_matrix(xm.rows, bm.cols, xm.dtype);
  Tensor s = new_matrix(xm.rows, lora.branch.rank(), pf::kFloat32);
  pf::with_threads_for(xm.rows, lora.branch.rank() * (xm.cols + bm.cols), [&](pf::ParallelFor threads) {
    pf::lora_forward(bm, xm, lora.branch, y.mutable_data_ptr(), static_cast<float*>(s.mutable_data_ptr()), threads);
  });
  return {y, s};
}

std::tuple<Tensor, Tensor, Tensor> lora_backward(Tensor dy, OptTensor x, OptTensor s, Tensor lora_a, Tensor lora_b,
                                                 double scaling, OptTensor seed, double dropout, bool need_dx) {
  kernels();
  STD_TORCH_CHECK(lora_a.dim() == 2, "lora A must be [R, K]");
  pf::Weight none{};
  none.k = lora_a.size(1);
  return gradients(none, dy, x, s, lora_a, lora_b, std::nullopt, scaling, seed, dropout, need_dx);
}

constexpr int64_t kFlatGrain = int64_t{1} << 16;  // elements a thread takes at least

// A factor of an adapter in bf16, in the order in which the forward kernels read it: see Matrix in weight.h.
void pack_pairs(Tensor m, Tensor out) {
  const pf::Kernels& k = kernels();
  const pf::Matrix src = matrix(m, "m");
  packed_matrix(out, src.rows, src.cols + src.cols % 2);
  uint16_t* dst = static_cast<uint16_t*>(out.mutable_data_ptr());
  const int64_t tiles = out.size(0), tile_elements = out.size(1) * pf::kTile * 2;
  const auto body = [&](int64_t t0, int64_t t1) { k.pack_pairs(src, dst, t0, t1); };
  if (tiles > 0) pf::parallel_for(tiles, kFlatGrain / (tile_elements + 1) + 1, body);
}

// `fresh`, a new tensor: of 4096 x 4096 in small pages, touching them takes longer than decoding into them.
Tensor on_large_pages(Tensor fresh) {
  pf::advise_huge_pages(fresh.mutable_data_ptr(), fresh.numel() * static_cast<int64_t>(fresh.element_size()));
  return fresh;
}

std::tuple<Tensor, Tensor, Tensor> quantize_4bit(Tensor w, int64_t format, int64_t blocksize) {
  const pf::Kernels& k = kernels();
  check_format(format, blocksize);
  STD_TORCH_CHECK(w.is_contiguous(), "w must be contiguous");
  const int dtype = dtype_of(w, "w");
  const int64_t n = w.numel(), blocks = pf::ceil_div(n, blocksize);
  Tensor codes = on_large_pages(torch::stable::new_empty(w, {(n + 1) / 2, 1}, ScalarType::Byte));
  Tensor scale = on_large_pages(torch::stable::new_empty(w, {blocks}, ScalarType::Float));
  Tensor zero = on_large_pages(torch::stable::new_empty(w, {format == pf::kINT4 ? blocks : 0}, ScalarType::Float));
  const void* src = w.const_data_ptr();
  uint8_t* out = codes.mutable_data_ptr<uint8_t>();
  float *scales = scale.mutable_data_ptr<float>(), *zeros = zero.mutable_data_ptr<float>();
  const auto body = [&](int64_t b0, int64_t b1) {
    k.quantize(src, dtype, n, static_cast<int>(format), blocksize, out, scales, zeros, b0, b1);
  };
  if (blocks > 0) pf::parallel_for(blocks, kFlatGrain / blocksize + 1, body);
  return {codes, scale, zero};
}

Tensor dequantize_4bit(Tensor codes, Tensor scale, OptTensor zero, int64_t format, int64_t blocksize,
                       std::vector<int64_t> shape, ScalarType dtype) {
  const pf::Kernels& k = kernels();
  check_format(format, blocksize);
  const int64_t n = element_count(shape);
  const int64_t blocks = pf::ceil_div(n, blocksize);
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && codes.is_contiguous() && codes.numel() == (n + 1) / 2,
                  "codes must be contiguous uint8 [(numel + 1) / 2, 1] in the rows layout");
  STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float && scale.is_contiguous() && scale.numel() == blocks,
                  "scale must be contiguous float32, one a block");
  check_zero(zero, format);
  STD_TORCH_CHECK(!zero.has_value() ||
                      (zero->scalar_type() == ScalarType::Float && zero->is_contiguous() && zero->numel() == blocks),
                  "zero must be contiguous float32, one a block");
  Tensor out = on_large_pages(torch::stable::new_empty(codes, shape, dtype));
  const int to = dtype_of(out, "dtype");
  const float* zeros = zero.has_value() ? zero->const_data_ptr<float>() : nullptr;
  const uint8_t* in = codes.const_data_ptr<uint8_t>();
  const float* scales = scale.const_data_ptr<float>();
  void* dst = out.mutable_data_ptr();
  const auto body = [&](int64_t b0, int64_t b1) {
    k.dequantize(in, scales, zeros, n, static_cast<int>(format), blocksize, dst, to, b0, b1);
  };
  if (blocks > 0) pf::parallel_for(blocks, kFlatGrain / blocksize + 1, body);
  return out;
}

void check_matrix(int64_t n, int64_t k) {
  STD_TORCH_CHECK(n > 0 && k > 0 && k % 32 == 0 && n <= kMostElements / k,
                  "the tiles layout needs N > 0, K a multiple of 32 and at most 2^58 elements");
}

Tensor pack_tiles(Tensor codes, int64_t n, int64_t k) {
  check_matrix(n, k);
  STD_TORCH_CHECK(codes.is_contiguous() && codes.numel() == n * k / 2, "codes must be contiguous, N K / 2 bytes");
  const int64_t tiles = pf::ceil_div(n, pf::kTile);
  Tensor out = on_large_pages(torch::stable::new_empty(codes, {tiles, 8 * k}));
  const uint8_t* in = codes.const_data_ptr<uint8_t>();
  uint8_t* dst = out.mutable_data_ptr<uint8_t>();
  pf::parallel_for(tiles, kFlatGrain / (k * pf::kTile) + 1,
                   [&](int64_t t0, int64_t t1) { pf::pack_tiles(in, n, k, dst, t0, t1); });
  pf::move_to_huge_pages(dst, tiles * 8 * k);
  return out;
}

Tensor unpack_tiles(Tensor codes, int64_t n, int64_t k) {
  check_matrix(n, k);
  const int64_t tiles = pf::ceil_div(n, pf::kTile);
  STD_TORCH_CHECK(codes.is_contiguous() && codes.numel() == tiles * 8 * k, "codes must be contiguous [tiles, 8 K]");
  Tensor out = on_large_pages(torch::stable::new_empty(codes, {n * k / 2, 1}));
  const uint8_t* in = codes.const_data_ptr<uint8_t>();
  uint8_t* dst = out.mutable_data_ptr<uint8_t>();
  pf::parallel_for(tiles, kFlatGrain / (k * pf::kTile) + 1,
                   [&](int64_t t0, int64_t t1) { pf::unpack_tiles(in, n, k, dst, t0, t1); });
  return out;
}

pf::Weight scale_layout(const Tensor& scale, int64_t n, int64_t k, int64_t blocksize) {
  check_matrix(n, k);
  check_blocksize(blocksize);
  STD_TORCH_CHECK(scale.is_contiguous() && (scale.element_size() == 1 || scale.element_size() == 4),
                  "scale must be contiguous, of 1 or 4 bytes an element");
  pf::Weight w{};
  w.n = n;
  w.k = k;
  w.blocksize = blocksize;
  w.segment = std::gcd(k, blocksize);
  return w;
}

Tensor pack_scales(Tensor scale, int64_t n, int64_t k, int64_t blocksize) {
  const pf::Weight w = scale_layout(scale, n, k, blocksize);
  STD_TORCH_CHECK(scale.numel() == pf::ceil_div(n * k, blocksize), "scale must hold one element a block");
  Tensor out = on_large_pages(torch::stable::new_empty(scale, {w.tiles(), w.segments(), pf::kTile}));
  const int size = static_cast<int>(scale.element_size());
  const void* in = scale.const_data_ptr();
  void* dst = out.mutable_data_ptr();
  pf::parallel_for(w.tiles(), kFlatGrain / (w.segments() * pf::kTile) + 1,
                   [&](int64_t t0, int64_t t1) { pf::pack_scales(in, size, w, dst, t0, t1); });
  pf::move_to_huge_pages(dst, out.numel() * size);
  return out;
}

Tensor unpack_scales(Tensor scale, int64_t n, int64_t k, int64_t blocksize) {
  const pf::Weight w = scale_layout(scale, n, k, blocksize);
  STD_TORCH_CHECK(scale.numel() == w.tiles() * w.segments() * pf::kTile, "scale must be [tiles, segments, 16]");
  const int64_t blocks = pf::ceil_div(n * k, blocksize);
  Tensor out = on_large_pages(torch::stable::new_empty(scale, {blocks}));
  const int size = static_cast<int>(scale.element_size());
  const void* in = scale.const_data_ptr();
  void* dst = out.mutable_data_ptr();
  pf::parallel_for(blocks, kFlatGrain, [&](int64_t b0, int64_t b1) { pf::unpack_scales(in, size, w, dst, b0, b1); });
  return out;
}

// Gives back the pages of t's memory that belong to a mapped file.
void drop_mapped_pages(Tensor t) {
  STD_TORCH_CHECK(t.is_contiguous(), "t must be contiguous");
  pf::drop_mapped_pages(t.const_data_ptr(), t.numel() * static_cast<int64_t>(t.element_size()));
}

// Where the system can, moves the memory of t, which must be dense, onto large pages.
void large_pages(Tensor t) {
  pf::move_to_huge_pages(t.const_data_ptr(), t.numel() * static_cast<int64_t>(t.element_size()));
}

std::string isa() { return kernels().name; }

bool outruns_mkl() { return kernels().outruns_mkl; }

std::string set_isa(std::string name) {
  STD_TORCH_CHECK(pf::set_isa(name.c_str()), "name is '", name, "'; this machine has no such instruction set");
  return isa();
}

void set_dynamic_map(Tensor map) {
  STD_TORCH_CHECK(map.numel() == 256 && map.is_contiguous() && map.scalar_type() == ScalarType::Float,
                  "map must be contiguous float32 [256]");
  std::memcpy(pf::kDynamicMap, map.const_data_ptr(), sizeof(pf::kDynamicMap));
}

}  // namespace

#define PF_BRANCH "Tensor? lora_a, Tensor? lora_b, Tensor? row_scale, float scaling, Tensor? seed, float dropout"

STABLE_TORCH_LIBRARY(pyfastpeft, m) {
  m.def("linear_4bit(Tensor x, " PF_WEIGHT ", Tensor? bias, " PF_BRANCH ", bool int8) -> (Tensor, Tensor)");
  m.def("linear_4bit_backward(Tensor dy, Tensor? x, Tensor? s, " PF_WEIGHT ", " PF_BRANCH
        ", bool need_dx) -> (Tensor, Tensor, Tensor)");
  m.def(
      "lora_forward(Tensor base, Tensor x, Tensor lora_a, Tensor lora_b, float scaling, Tensor? seed, "
      "float dropout) -> (Tensor, Tensor)");
  m.def(
      "lora_backward(Tensor dy, Tensor? x, Tensor? s, Tensor lora_a, Tensor lora_b, float scaling, Tensor? seed, "
      "float dropout, bool need_dx) -> (Tensor, Tensor, Tensor)");
  m.def("quantize_4bit(Tensor w, int format, int blocksize) -> (Tensor, Tensor, Tensor)");
  m.def(
      "dequantize_4bit(Tensor codes, Tensor scale, Tensor? zero, int format, int blocksize, int[] shape, "
      "ScalarType dtype) -> Tensor");
  m.def("pack_pairs(Tensor m, Tensor(a!) out) -> ()");
  m.def("pack_tiles(Tensor codes, int n, int k) -> Tensor");
  m.def("unpack_tiles(Tensor codes, int n, int k) -> Tensor");
  m.def("pack_scales(Tensor scale, int n, int k, int blocksize) -> Tensor");
  m.def("unpack_scales(Tensor scale, int n, int k, int blocksize) -> Tensor");
  m.def("large_pages(Tensor t) -> ()");
  m.def("drop_mapped_pages(Tensor t) -> ()");
  m.def("set_dynamic_map(Tensor map) -> ()");
  m.def("available_isas() -> str[]");
  m.def("isa() -> str");
  m.def("outruns_mkl() -> bool");
  m.def("set_isa(str name) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CPU, m) {
  m.impl("linear_4bit", TORCH_BOX(&linear_4bit));
  m.impl("linear_4bit_backward", TORCH_BOX(&linear_4bit_backward));
  m.impl("lora_forward", TORCH_BOX(&lora_forward));
  m.impl("lora_backward", TORCH_BOX(&lora_backward));
  m.impl("quantize_4bit", TORCH_BOX(&quantize_4bit));
  m.impl("dequantize_4bit", TORCH_BOX(&dequantize_4bit));
  m.impl("pack_pairs", TORCH_BOX(&pack_pairs));
  m.impl("pack_tiles", TORCH_BOX(&pack_tiles));
  m.impl("unpack_tiles", TORCH_BOX(&unpack_tiles));
  m.impl("pack_scales", TORCH_BOX(&pack_scales));
  m.impl("unpack_scales", TORCH_BOX(&unpack_scales));
  m.impl("large_pages", TORCH_BOX(&large_pages));
  m.impl("drop_mapped_pages", TORCH_BOX(&drop_mapped_pages));
  m.impl("set_dynamic_map", TORCH_BOX(&set_dynamic_map));
}

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CompositeExplicitAutograd, m) {
  m.impl("available_isas", TORCH_BOX(&pf::available_isas));
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("outruns_mkl", TORCH_BOX(&outruns_mkl));
  m.impl("set_isa", TORCH_BOX(&set_isa));
}
