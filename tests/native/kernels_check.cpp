// Holds every instruction set of this build against float64, and its formats against the generic kernels bit for bit.
// No torch: it cross-compiles, and runs under an emulator. Prints what differs; exits with the number of failures.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/linear.h"

namespace {

std::mt19937 engine(20240);
int failures = 0;

void expect(bool ok, const std::string& what) {
  if (ok) return;
  std::printf("FAILED %s\n", what.c_str());
  ++failures;
}

std::vector<float> normal(int64_t n, float scale = 1.0f) {
  std::normal_distribution<float> d(0.0f, scale);
  std::vector<float> out(n);
  for (float& v : out) v = d(engine);
  return out;
}

// Relative Frobenius error; an expected value that came out small by cancellation counts as `typical`.
double error(const float* got, const std::vector<double>& expected, double typical = 0) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    difference += (got[i] - expected[i]) * (got[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(difference / std::max(norm, expected.size() * typical * typical));
}

void serial(int64_t n, int64_t, void* ctx, void (*body)(void*, int64_t, int64_t)) { body(ctx, 0, n); }

// a [m, k] * b [k, n] in float64; `ta`, `tb`: the argument lies transposed.
std::vector<double> product(const std::vector<double>& a, bool ta, const std::vector<double>& b, bool tb, int64_t m,
                            int64_t k, int64_t n) {
  std::vector<double> out(m * n);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t p = 0; p < k; ++p) {
      const double v = ta ? a[p * m + i] : a[i * k + p];
      for (int64_t j = 0; j < n; ++j) out[i * n + j] += v * (tb ? b[j * k + p] : b[p * n + j]);
    }
  return out;
}

std::vector<double> doubles(const std::vector<float>& v) { return {v.begin(), v.end()}; }

struct Packed {
  std::vector<uint8_t> rows, tiles;
  std::vector<float> scale, zero, scale_tiles, zero_tiles, dense;
  pf::Weight weight{};

  Packed(const pf::Kernels& k, int format, int64_t blocksize, int64_t n, int64_t columns) {
    const int64_t count = n * columns, blocks = (count + blocksize - 1) / blocksize;
    const std::vector<float> w = normal(count, 0.05f);
    rows.resize((count + 1) / 2);
    scale.resize(blocks);
    zero.resize(blocks);
    k.quantize(w.data(), pf::kFloat32, count, format, blocksize, rows.data(), scale.data(), zero.data(), 0, blocks);
    dense.resize(count);
    const float* zeros = format == pf::kINT4 ? zero.data() : nullptr;
    k.dequantize(rows.data(), scale.data(), zeros, count, format, blocksize, dense.data(), pf::kFloat32, 0, blocks);
    weight.format = format;
    weight.n = n;
    weight.k = columns;
    weight.blocksize = blocksize;
    weight.segment = std::gcd(columns, blocksize);
    tiles.resize(weight.tiles() * 8 * columns);
    pf::pack_tiles(rows.data(), n, columns, tiles.data(), 0, weight.tiles());
    std::vector<uint8_t> back(rows.size());
    pf::unpack_tiles(tiles.data(), n, columns, back.data(), 0, weight.tiles());
    expect(back == rows, "codes to tiles and back");
    scale_tiles.resize(weight.tiles() * weight.segments() * pf::kTile);
    zero_tiles.resize(scale_tiles.size());
    pf::pack_scales(scale.data(), 4, weight, scale_tiles.data(), 0, weight.tiles());
    pf::pack_scales(zero.data(), 4, weight, zero_tiles.data(), 0, weight.tiles());
    weight.codes = tiles.data();
    weight.scale = scale_tiles.data();
    weight.zero = zeros == nullptr ? nullptr : zero_tiles.data();
  }
};

pf::Matrix matrix(const std::vector<float>& v, int64_t rows, int64_t cols) {
  return {v.data(), pf::kFloat32, rows, cols, cols};
}

void check_formats(const pf::Kernels& k, const pf::Kernels& generic) {
  for (int format = 0; format < 3; ++format)
    for (int64_t n : {1, 7, 64, 1000, 4097})
      for (int64_t blocksize : {32, 64, 128})
        for (int dtype : {pf::kFloat32, pf::kBFloat16, pf::kFloat16}) {
          const std::string what = std::string(k.name) + " format " + std::to_string(format) + " n " +
                                   std::to_string(n) + " blocksize " + std::to_string(blocksize) + " dtype " +
                                   std::to_string(dtype);
          const int64_t blocks = (n + blocksize - 1) / blocksize;
          const std::vector<float> w = normal(n);
          // 16-bit inputs: the dequantizer's own output is one.
          std::vector<uint8_t> codes[2], source(n * 4);
          std::vector<float> scale[2], zero[2];
          std::vector<uint8_t> out[2];
          for (int pass = 0; pass < 2; ++pass) {
            const pf::Kernels& with = pass == 0 ? generic : k;
            codes[pass].resize((n + 1) / 2);
            scale[pass].resize(blocks);
            zero[pass].resize(blocks);
            out[pass].resize(n * pf::dtype_size(dtype));
            with.quantize(w.data(), pf::kFloat32, n, format, blocksize, codes[pass].data(), scale[pass].data(),
                          zero[pass].data(), 0, blocks);
            with.dequantize(codes[pass].data(), scale[pass].data(), format == pf::kINT4 ? zero[pass].data() : nullptr,
                            n, format, blocksize, out[pass].data(), dtype, 0, blocks);
          }
          expect(codes[0] == codes[1], "codes, " + what);
          expect(scale[0] == scale[1] && (format != pf::kINT4 || zero[0] == zero[1]), "scales, " + what);
          expect(out[0] == out[1], "values, " + what);
          std::vector<uint8_t> again[2];
          for (int pass = 0; pass < 2; ++pass) {
            const pf::Kernels& with = pass == 0 ? generic : k;
            again[pass].resize((n + 1) / 2);
            with.quantize(out[0].data(), dtype, n, format, blocksize, again[pass].data(), scale[pass].data(),
                          zero[pass].data(), 0, blocks);
          }
          expect(again[0] == again[1] && scale[0] == scale[1], "quantized from " + what);
        }
}

void check_linear(const pf::Kernels& k, int format, int64_t blocksize, int64_t n, int64_t columns, int64_t m,
                  int64_t r) {
  const std::string what = std::string(k.name) + " format " + std::to_string(format) + " N " + std::to_string(n) +
                           " K " + std::to_string(columns) + " M " + std::to_string(m) + " R " + std::to_string(r);
  const Packed w(k, format, blocksize, n, columns);
  const std::vector<float> x = normal(m * columns), dy = normal(m * n), bias = normal(n);
  const std::vector<float> a = normal(r * columns, 0.1f), b = normal(n * r), row_scale = normal(m * r);
  const double scaling = 1.5;
  pf::Branch branch;
  if (r > 0) {
    branch.a = matrix(a, r, columns);
    branch.b = matrix(b, n, r);
    branch.row_scale = row_scale.data();
    branch.row_scale_ld = r;
    branch.scaling = static_cast<float>(scaling);
  }
  const auto scaled = [&](std::vector<double> s) {
    for (size_t i = 0; i < s.size(); ++i) s[i] *= scaling * row_scale[i];
    return s;
  };
  const std::vector<double> s64 = product(doubles(x), false, doubles(a), true, m, columns, r);
  const std::vector<double> ds64 = scaled(product(doubles(dy), false, doubles(b), false, m, n, r));
  std::vector<double> y64 = product(doubles(x), false, doubles(w.dense), true, m, columns, n);
  std::vector<double> dx64 = product(doubles(dy), false, doubles(w.dense), false, m, n, columns);
  const std::vector<double> y_branch = product(scaled(s64), false, doubles(b), true, m, r, n);
  const std::vector<double> dx_branch = product(ds64, false, doubles(a), false, m, r, columns);
  for (size_t i = 0; i < y64.size(); ++i) y64[i] += bias[i % n] + (r > 0 ? y_branch[i] : 0);
  for (size_t i = 0; i < dx64.size(); ++i) dx64[i] += r > 0 ? dx_branch[i] : 0;

  std::vector<float> y(m * n), s(m * r + 1), dx(m * columns), ds(m * r + 1), da(r * columns), db(n * r);
  pf::linear_forward(w.weight, matrix(x, m, columns), bias.data(), branch, y.data(), pf::kFloat32, s.data(), serial);
  pf::linear_backward(w.weight, matrix(dy, m, n), branch, dx.data(), ds.data(), serial);
  expect(error(y.data(), y64) < 1e-5, "y, " + what);
  pf::linear_forward_int8(w.weight, matrix(x, m, columns), bias.data(), branch, y.data(), pf::kFloat32, serial);
  expect(error(y.data(), y64) < 1.2e-2, "y in int8, " + what);  // 7e-3 and the scatter of few values
  expect(error(dx.data(), dx64) < 1e-5, "dx, " + what);
  if (r == 0) return;
  pf::lora_backward(matrix(dy, m, n), matrix(x, m, columns), matrix(s, m, r), matrix(ds, m, r), branch, da.data(),
                    db.data(), serial);
  const double typical = 0.1 * std::sqrt(columns);  // of a dot product of x and A
  expect(error(s.data(), s64, typical) < 1e-5, "s, " + what);
  expect(error(da.data(), product(ds64, true, doubles(x), false, r, m, columns)) < 1e-5, "dA, " + what);
  expect(error(db.data(), product(doubles(dy), true, scaled(s64), false, n, m, r), typical * std::sqrt(m)) < 1e-5,
         "dB, " + what);
}

}  // namespace

int main() {
  pf::set_isa("generic");
  const pf::Kernels generic = *pf::kernels();
  for (const char* const* name = pf::available_isas(); *name != nullptr; ++name) {
    pf::set_isa(*name);
    const pf::Kernels& k = *pf::kernels();
    check_formats(k, generic);
    for (int format = 0; format < 3; ++format)
      for (int64_t m : {1, 3, 16, 17, 70})
        for (int64_t r : {0, 1, 17}) {
          check_linear(k, format, 64, 33, 96, m, r);
          check_linear(k, format, 32, 64, 160, m, r);
        }
    std::printf("checked %s\n", *name);
  }
  return failures > 100 ? 100 : failures;
}
