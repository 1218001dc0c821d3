// Holds every instruction set of this build against float64, and its formats against the generic kernels bit for bit.
// The bounds are those of products in float32: instructions for bfloat16, which round weights, would exceed them.
// No torch: it cross-compiles, and runs under an emulator. Prints what differs; exits with the number of failures.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cpu/attention_forward.h"
#include "cpu/dispatch.h"
#include "cpu/layout.h"
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

// Few rows of bf16 may be multiplied as integers of 16 bits; one is left out for its large column.
void check_bf16(const pf::Kernels& k, const Packed& w, std::vector<float> x, int64_t m, const std::string& what) {
  const int64_t n = w.weight.n, columns = w.weight.k;
  x[columns - 1] = 1e6f;
  std::vector<char> half(x.size() * 2);
  k.from_float(x.data(), half.data(), pf::kBFloat16, x.size());
  k.to_float(half.data(), pf::kBFloat16, x.data(), x.size());
  std::vector<float> y(m * n), bias(n);
  pf::Matrix rows = matrix(x, m, columns);
  rows.data = half.data();
  rows.dtype = pf::kBFloat16;
  pf::linear_forward(w.weight, rows, bias.data(), {}, y.data(), pf::kFloat32, nullptr, serial);
  std::vector<double> y64 = product(doubles(x), false, doubles(w.dense), true, m, columns, n);
  expect(error(y.data(), y64) < 5e-4, "y of bf16, " + what);
  y64.erase(y64.begin(), y64.begin() + n);
  expect(m == 1 || error(y.data() + n, y64) < 5e-4, "rows of bf16 after the first, " + what);
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

  std::vector<float> y(m * n), s(m * r + 1), dx(m * columns), da(r * columns), db(n * r);
  pf::linear_forward(w.weight, matrix(x, m, columns), bias.data(), branch, y.data(), pf::kFloat32, s.data(), serial);
  pf::BranchTraining training{};
  if (r > 0) training = {matrix(x, m, columns), matrix(s, m, r), da.data(), db.data()};
  pf::linear_backward(w.weight, matrix(dy, m, n), branch, training, dx.data(), serial);
  expect(error(y.data(), y64) < 1e-5, "y, " + what);
  pf::linear_forward_int8(w.weight, matrix(x, m, columns), bias.data(), branch, y.data(), pf::kFloat32, serial);
  expect(error(y.data(), y64) < 1.2e-2, "y in int8, " + what);  // 7e-3 and the scatter of few values
  if (r == 0) check_bf16(k, w, x, m, what);
  expect(error(dx.data(), dx64) < 1e-5, "dx, " + what);
  if (r == 0) return;
  const double typical = 0.1 * std::sqrt(columns);  // of a dot product of x and A
  expect(error(s.data(), s64, typical) < 1e-5, "s, " + what);
  expect(error(da.data(), product(ds64, true, doubles(x), false, r, m, columns)) < 1e-5, "dA, " + what);
  expect(error(db.data(), product(doubles(dy), true, scaled(s64), false, n, m, r), typical * std::sqrt(m)) < 1e-5,
         "dB, " + what);
}

void check_norm(const pf::Kernels& k, int64_t rows, int64_t n) {
  const std::string what = std::string(k.name) + " norm of " + std::to_string(rows) + " x " + std::to_string(n);
  const std::vector<float> x = normal(rows * n), residual = normal(rows * n), weight = normal(n), dy = normal(rows * n);
  std::vector<float> sum(rows * n), y(rows * n), y_one(rows * n), dx(rows * n), inverse(rows), dweight(n);
  k.rms_norm({matrix(x, rows, n), matrix(residual, rows, n), weight.data(), 1e-5f, sum.data(), y.data()}, 0, rows);
  k.rms_norm({matrix(sum, rows, n), {}, weight.data(), 1e-5f, nullptr, y_one.data(), true}, 0, rows);
  const pf::RmsNormBackwardArgs backward{matrix(dy, rows, n), matrix(sum, rows, n), weight.data(), 1e-5f,
                                         dx.data(),           inverse.data()};
  k.rms_norm_backward(backward, 0, rows);
  k.rms_norm_weight_backward(backward, dweight.data(), 0, n);
  std::vector<double> y64(rows * n), one64(rows * n), dx64(rows * n), dweight64(n);
  for (int64_t r = 0; r < rows; ++r) {
    double square = 0, dot = 0;
    const auto h = [&](int64_t i) { return static_cast<double>(sum[r * n + i]); };
    const auto d = [&](int64_t i) { return static_cast<double>(dy[r * n + i]) * weight[i]; };
    for (int64_t i = 0; i < n; ++i) {
      square += h(i) * h(i);
      dot += d(i) * h(i);
    }
    const double scale = 1 / std::sqrt(square / n + 1e-5);
    for (int64_t i = 0; i < n; ++i) {
      y64[r * n + i] = h(i) * scale * weight[i];
      one64[r * n + i] = h(i) * scale * (1.0 + weight[i]);
      dx64[r * n + i] = scale * d(i) - h(i) * dot * scale * scale * scale / n;
      dweight64[i] += dy[r * n + i] * h(i) * scale;
    }
  }
  expect(error(y.data(), y64) < 1e-6 && error(y_one.data(), one64) < 1e-6, "y, " + what);
  expect(error(dx.data(), dx64, 1) < 1e-5, "dx, " + what);
  expect(error(dweight.data(), dweight64, 1) < 1e-5, "dweight, " + what);
}

void check_gates(const pf::Kernels& k, int64_t rows, int64_t n) {
  const std::string what = std::string(k.name) + " gates of " + std::to_string(n);
  const std::vector<float> gate = normal(rows * n, 5.0f), up = normal(rows * n), dy = normal(rows * n);
  std::vector<float> y(rows * n), y_gelu(rows * n), dgate(rows * n), dup(rows * n);
  const pf::Matrix g = matrix(gate, rows, n), u = matrix(up, rows, n);
  k.swiglu(g, u, y.data(), 0, rows);
  k.geglu(g, u, y_gelu.data(), 0, rows);
  k.swiglu_backward(matrix(dy, rows, n), g, u, dgate.data(), dup.data(), 0, rows);
  std::vector<double> y64, gelu64, dgate64, dup64;
  for (int64_t i = 0; i < rows * n; ++i) {
    const double v = gate[i], cube = 0.044715 * v * v * v;
    gelu64.push_back(0.5 * v * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (v + cube))) * up[i]);
    const double s = 1 / (1 + std::exp(-static_cast<double>(gate[i]))), silu = gate[i] * s;
    y64.push_back(silu * up[i]);
    dup64.push_back(silu * dy[i]);
    dgate64.push_back(static_cast<double>(dy[i]) * up[i] * (s + silu * (1 - s)));
  }
  expect(error(y_gelu.data(), gelu64) < 1e-6, what + ", GELU");
  expect(error(y.data(), y64) < 1e-6 && error(dgate.data(), dgate64) < 1e-6 && error(dup.data(), dup64) < 1e-6, what);
}

// Queries of two tokens, rotated, over a cache whose first key is hidden from the second batch row, alone and behind a
// prefix that both rows share; then the gradients.
void check_attention(const pf::Kernels& k, int64_t dim) {
  const std::string what = std::string(k.name) + " attention, dim " + std::to_string(dim);
  const int64_t batch = 2, tokens = 2, heads = 6, kv_heads = 2, length = 21, group = heads / kv_heads;
  const std::vector<float> x = normal(batch * tokens * heads * dim), angle = normal(tokens * dim);
  const std::vector<float> keys = normal(batch * kv_heads * length * dim), values = normal(keys.size());
  std::vector<float> cos, sin, q(x.size()), out(x.size());
  for (float a : angle) {
    cos.push_back(std::cos(a));
    sin.push_back(std::sin(a));
  }
  const int64_t token = heads * dim;
  k.rope({x.data(),
          pf::kFloat32,
          tokens,
          heads,
          dim,
          {tokens * token, dim, token},
          cos.data(),
          sin.data(),
          0,
          false,
          q.data(),
          {token, dim}},
         0, batch * tokens);
  std::vector<int32_t> positions(batch * length);
  for (int64_t i = 0; i < batch * length; ++i) positions[i] = static_cast<int32_t>(i % length - (length - tokens));
  positions[length] += pf::kHiddenKey;
  pf::AttentionArgs args{q.data(), keys.data(), values.data(), pf::kFloat32, batch,
                         heads,    kv_heads,    tokens,        length,       dim};
  for (int64_t* strides : {args.k_strides, args.v_strides}) {
    strides[0] = kv_heads * length * dim;
    strides[1] = length * dim;
    strides[2] = dim;
  }
  for (int64_t* strides : {args.q_strides, args.out_strides}) {
    strides[0] = tokens * token;
    strides[1] = dim;
    strides[2] = token;
  }
  args.scale = 0.3f;
  args.causal = true;
  args.positions = positions.data();
  args.out = out.data();
  std::vector<float> lse(batch * heads * tokens), by_lanes(x.size());
  k.attend(args, {}, 0, batch * kv_heads);

  const int64_t shared = 5;  // keys of a prefix
  const std::vector<float> prefix_k = normal(kv_heads * shared * dim), prefix_v = normal(kv_heads * shared * dim);
  args.out = by_lanes.data();
  args.lse = lse.data();
  args.prefix_k = prefix_k.data();
  args.prefix_v = prefix_v.data();
  args.slots = 1;
  args.prefix_length = shared;
  for (int64_t* strides : {args.prefix_k_strides, args.prefix_v_strides}) {
    strides[1] = shared * dim;
    strides[2] = dim;
  }
  const pf::AttentionKernels& lanes = k.attention_f32;
  for (int64_t unit = 0; unit < lanes.forward_blocks(args) * batch * kv_heads; ++unit) lanes.forward(args, unit);
  const std::vector<float> dout = normal(x.size());
  std::vector<float> dq(x.size()), dk(keys.size()), dv(keys.size());
  std::vector<float> prefix_dk(batch * prefix_k.size()), prefix_dv(prefix_dk.size());
  pf::AttentionBackwardArgs back{
      args, dout.data(), {}, dq.data(), dk.data(), dv.data(), prefix_dk.data(), prefix_dv.data()};
  std::copy_n(args.out_strides, 3, back.dout_strides);
  back.chunks = std::min<int64_t>(2, lanes.most_chunks(args));
  std::vector<float> parts(back.chunks * lanes.part_size(args));
  back.dq_parts = parts.data();
  for (int64_t unit = 0; unit < back.chunks * batch * kv_heads; ++unit) lanes.backward(back, unit);
  if (back.chunks > 1)
    for (int64_t unit = 0; unit < batch * kv_heads * lanes.query_groups(args); ++unit) lanes.sum_parts(back, unit);

  std::vector<double> q64(q.size());
  for (int64_t row = 0; row < batch * tokens * heads; ++row)
    for (int64_t i = 0; i < dim; ++i) {
      const int64_t at = row / heads % tokens * dim + i, half = dim / 2;
      const double other = i < half ? -x[row * dim + i + half] : x[row * dim + i - half];
      q64[row * dim + i] = static_cast<double>(x[row * dim + i]) * cos[at] + other * sin[at];
    }
  expect(error(q.data(), q64) < 1e-6, "rope, " + what);
  for (const int64_t ahead : {int64_t{0}, shared}) {
    std::vector<double> out64(x.size()), dq64(x.size()), dk64(keys.size()), dv64(keys.size());
    std::vector<double> prefix_dk64(prefix_dk.size()), prefix_dv64(prefix_dv.size());
    for (int64_t row = 0; row < batch * tokens * heads; ++row) {
      const int64_t b = row / heads / tokens, t = row / heads % tokens, kv_head = row % heads / group;
      const int64_t seen = ahead + length - tokens + t + 1 - b, at = row * dim;
      // Key s of those seen: its element 0, and in the gradients.
      const auto key = [&](const std::vector<float>& tokens_, const std::vector<float>& prefix, int64_t s) {
        return s < ahead ? &prefix[(kv_head * shared + s) * dim]
                         : &tokens_[((b * kv_heads + kv_head) * length + b + s - ahead) * dim];
      };
      const auto gradient = [&](std::vector<double>& tokens_, std::vector<double>& prefix, int64_t s) {
        return s < ahead ? &prefix[((b * kv_heads + kv_head) * shared + s) * dim]
                         : &tokens_[((b * length + b + s - ahead) * kv_heads + kv_head) * dim];
      };
      std::vector<double> weight(seen);
      double total = 0, delta = 0;
      for (int64_t s = 0; s < seen; ++s) {
        const float* to = key(keys, prefix_k, s);
        double score = 0;
        for (int64_t i = 0; i < dim; ++i) score += q64[at + i] * to[i];
        total += weight[s] = std::exp(args.scale * score);
      }
      for (int64_t s = 0; s < seen; ++s)
        for (int64_t i = 0; i < dim; ++i) out64[at + i] += weight[s] / total * key(values, prefix_v, s)[i];
      for (int64_t i = 0; i < dim; ++i) delta += dout[at + i] * out64[at + i];
      for (int64_t s = 0; s < seen; ++s) {
        const float *to = key(keys, prefix_k, s), *value = key(values, prefix_v, s);
        double *to_dk = gradient(dk64, prefix_dk64, s), *to_dv = gradient(dv64, prefix_dv64, s);
        double pull = -delta;
        for (int64_t i = 0; i < dim; ++i) pull += static_cast<double>(dout[at + i]) * value[i];
        pull *= args.scale * weight[s] / total;
        for (int64_t i = 0; i < dim; ++i) {
          dq64[at + i] += pull * to[i];
          to_dk[i] += pull * q64[at + i];
          to_dv[i] += weight[s] / total * dout[at + i];
        }
      }
    }
    if (ahead == 0) {
      expect(error(out.data(), out64) < 1e-5, what);
      continue;
    }
    expect(error(by_lanes.data(), out64) < 1e-5, "queries as lanes, " + what);
    expect(error(dq.data(), dq64) < 1e-5, "dq, " + what);
    expect(error(dk.data(), dk64) < 1e-5 && error(dv.data(), dv64) < 1e-5, "dk and dv, " + what);
    expect(error(prefix_dk.data(), prefix_dk64) < 1e-5 && error(prefix_dv.data(), prefix_dv64) < 1e-5,
           "of the prefix, " + what);
  }
}

// Whatever has a NaN or an infinity in its sums has a NaN in its result.
void check_not_finite(const pf::Kernels& k) {
  const float nan = std::nanf(""), inf = INFINITY;
  const int64_t dim = 16;
  for (const float poison : {nan, inf, 3e38f})
    for (const int64_t tokens : {2, 16})
      for (const bool in_query : {false, true}) {
        std::vector<float> q(tokens * dim, 1.0f), keys = q, values = normal(tokens * dim), out(tokens * dim);
        (in_query ? q : keys)[(in_query ? tokens - 1 : 0) * dim + 3] = poison;
        if (!in_query) q[(tokens - 1) * dim + 3] = 100;
        if (in_query) keys[3] = 100;
        pf::AttentionArgs g{};
        g.q = q.data(), g.k = keys.data(), g.v = values.data(), g.out = out.data(), g.dtype = pf::kFloat32;
        g.batch = g.heads = g.kv_heads = 1, g.tokens = g.length = tokens, g.dim = dim;
        for (int64_t* strides : {g.q_strides, g.k_strides, g.v_strides, g.out_strides})
          strides[0] = tokens * dim, strides[1] = strides[2] = dim;
        g.causal = true, g.scale = 1;
        pf::attention_forward(g, serial);
        expect(std::isnan(out[(tokens - 1) * dim]),
               std::string("attention to ") + std::to_string(poison) + ", " + k.name);
      }
  std::vector<float> logits = normal(19);
  logits[2] = nan;
  const int64_t label = 4;
  float loss = 0;
  k.cross_entropy({logits.data(), pf::kFloat32, 19, 19, 19, 0, &label, &loss}, 0, 1);
  expect(std::isnan(loss) && std::isnan(logits[0]) && std::isnan(logits[4]), std::string("cross-entropy, ") + k.name);
}

}  // namespace

int main() {
  pf::set_isa("generic");
  const pf::Kernels generic = *pf::kernels();
  for (const std::string& name : pf::available_isas()) {
    pf::set_isa(name.c_str());
    const pf::Kernels& k = *pf::kernels();
    check_formats(k, generic);
    for (int format = 0; format < 3; ++format)
      for (int64_t m : {1, 3, 16, 17, 70})
        for (int64_t r : {0, 1, 17}) {
          check_linear(k, format, 64, 33, 96, m, r);
          check_linear(k, format, 32, 64, 160, m, r);
        }
    for (int64_t n : {19, 64, 131}) {
      check_norm(k, 5, n);
      check_gates(k, 3, n);
    }
    for (int64_t dim : {2, 34, 64}) check_attention(k, dim);
    check_not_finite(k);
    std::printf("checked %s\n", name.c_str());
  }
  return failures > 100 ? 100 : failures;
}
