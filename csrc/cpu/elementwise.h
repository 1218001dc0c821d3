// RMSNorm, SwiGLU, rotary embeddings and cross-entropy, both directions, GEGLU and sums of rows, over the vocabulary
// `V`. Included by algorithm.h.
//
// Arithmetic is float32; a value that transformers rounds to the tensors' dtype on the way is rounded here as well, so
// that a model computes the same with these kernels as without them.

// ---- parts of a row -------------------------------------------------------------------------------------------------

// v as the dtype holds it.
template <int D>
PF_INLINE V::F rounded(V::F v) {
  if constexpr (D == kFloat32) return v;
  alignas(64) char held[kLanes * 4];
  store_as<D>(held, v);
  return load_as<D>(held);
}

inline char* row_of(void* data, int dtype, int64_t cols, int64_t row) {
  return static_cast<char*>(data) + row * cols * dtype_size(dtype);
}

// ---- exp ------------------------------------------------------------------------------------------------------------

// e^x to 2e-7 relative; 0 below -88, infinity above 88.5, NaN stays.
PF_INLINE V::F exp(V::F x) {
  // Second operands: where x86's min and max let a NaN through.
  x = V::max(V::set1(-88.0f), V::min(V::set1(88.8f), x));
  const V::F shifted = V::fma(x, V::set1(1.44269504f), V::set1(12582912.0f));  // + 1.5 * 2^23 rounds to an integer
  const V::F n = V::add(shifted, V::set1(-12582912.0f));
  const V::F r = V::fma(n, V::set1(2.12194440e-4f), V::fma(n, V::set1(-0.693359375f), x));
  V::F p = V::set1(1.9875691500e-4f);
  p = V::fma(p, r, V::set1(1.3981999507e-3f));
  p = V::fma(p, r, V::set1(8.3334519073e-3f));
  p = V::fma(p, r, V::set1(4.1665795894e-2f));
  p = V::fma(p, r, V::set1(1.6666665459e-1f));
  p = V::fma(p, r, V::set1(5.0000001201e-1f));
  p = V::add(V::fma(V::mul(r, r), p, r), V::set1(1.0f));
  return V::mul(p, V::pow2(shifted));
}

PF_INLINE V::F sigmoid(V::F x) { return V::div(V::set1(1.0f), V::add(V::set1(1.0f), exp(V::mul(x, V::set1(-1.0f))))); }

// ---- RMSNorm --------------------------------------------------------------------------------------------------------

void rms_norm(const RmsNormArgs& g, int64_t row0, int64_t row1) {
  const int64_t n = g.x.cols;
  with_dtype(
      g.x.dtype, PF_BODY(int D) {
        const char* weight = static_cast<const char*>(g.weight);
        for (int64_t r = row0; r < row1; ++r) {
          const char* x = g.x.row(r);
          V::F square = V::zero();
          if (g.residual.data != nullptr) {
            const char* residual = g.residual.row(r);
            char* sum = row_of(g.sum, D, n, r);
            for (int64_t i = 0; i < n; i += kLanes) {
              const V::F h = rounded<D>(V::add(load_part<D>(x, i, n), load_part<D>(residual, i, n)));
              store_part<D>(sum, i, n, h);
              square = V::fma(h, h, square);
            }
            x = sum;
          } else {
            for (int64_t i = 0; i < n; i += kLanes) {
              const V::F h = load_part<D>(x, i, n);
              square = V::fma(h, h, square);
            }
          }
          const V::F inverse = V::set1(1.0f / __builtin_sqrtf(V::reduce(square) / static_cast<float>(n) + g.eps));
          char* y = row_of(g.y, D, n, r);
          for (int64_t i = 0; i < n; i += kLanes) {
            const V::F unit = V::mul(load_part<D>(x, i, n), inverse), w = load_part<D>(weight, i, n);
            store_part<D>(y, i, n, g.from_one ? V::mul(V::add(V::set1(1.0f), w), unit) : V::mul(w, rounded<D>(unit)));
          }
        }
      });
}

void rms_norm_backward(const RmsNormBackwardArgs& g, int64_t row0, int64_t row1) {
  const int64_t n = g.x.cols;
  with_dtype(
      g.x.dtype, PF_BODY(int D) {
        const char* weight = static_cast<const char*>(g.weight);
        for (int64_t r = row0; r < row1; ++r) {
          const char *x = g.x.row(r), *dy = g.dy.row(r);
          V::F square = V::zero(), dot = V::zero();
          for (int64_t i = 0; i < n; i += kLanes) {
            const V::F h = load_part<D>(x, i, n);
            square = V::fma(h, h, square);
            dot = V::fma(V::mul(load_part<D>(dy, i, n), load_part<D>(weight, i, n)), h, dot);
          }
          const float count = static_cast<float>(n);
          const float inverse = 1.0f / __builtin_sqrtf(V::reduce(square) / count + g.eps);
          g.inverse[r] = inverse;
          const V::F scale = V::set1(inverse), shift = V::set1(-inverse * inverse * inverse * V::reduce(dot) / count);
          char* dx = row_of(g.dx, D, n, r);
          for (int64_t i = 0; i < n; i += kLanes) {
            const V::F own = V::mul(V::mul(load_part<D>(dy, i, n), load_part<D>(weight, i, n)), scale);
            store_part<D>(dx, i, n, V::fma(load_part<D>(x, i, n), shift, own));
          }
        }
      });
}

// dweight [col0, col1) float32.
void rms_norm_weight_backward(const RmsNormBackwardArgs& g, float* dweight, int64_t col0, int64_t col1) {
  with_dtype(
      g.x.dtype, PF_BODY(int D) {
        int64_t i = col0;
        // Whole cache lines of each row at a time.
        const auto step = [&]<int NV>() {
          V::F sum[NV];
          for (V::F& s : sum) s = V::zero();
          for (int64_t r = 0; r < g.x.rows; ++r) {
            const V::F inverse = V::set1(g.inverse[r]);
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) {
              const V::F unit = V::mul(load_part<D>(g.x.row(r), i + v * kLanes, col1), inverse);
              sum[v] = V::fma(load_part<D>(g.dy.row(r), i + v * kLanes, col1), unit, sum[v]);
            }
          }
          for (const V::F& s : sum) {
            store_part<kFloat32>(reinterpret_cast<char*>(dweight), i, col1, s);
            i += kLanes;
          }
        };
        while (i + 8 * kLanes <= col1) step.template operator()<8>();
        while (i < col1) step.template operator()<1>();
      });
}

// ---- SwiGLU and GEGLU -----------------------------------------------------------------------------------------------

struct Silu {
  static PF_INLINE V::F of(V::F x) { return V::mul(x, sigmoid(x)); }
};

struct Gelu {  // by the tanh approximation: x (1 + tanh(u / 2)) / 2 = x sigmoid(u), u = sqrt(8 / pi) (x + 0.044715 x^3)
  static PF_INLINE V::F of(V::F x) {
    const V::F u = V::mul(x, V::fma(V::mul(x, x), V::set1(0.0713548163f), V::set1(1.5957691216f)));
    return V::mul(x, sigmoid(u));
  }
};

template <typename Activation>
void gated(const Matrix& gate, const Matrix& up, void* y, int64_t row0, int64_t row1) {
  const int64_t n = gate.cols;
  with_dtype(
      gate.dtype, PF_BODY(int D) {
        for (int64_t r = row0; r < row1; ++r)
          for (int64_t i = 0; i < n; i += kLanes) {
            const V::F active = rounded<D>(Activation::of(load_part<D>(gate.row(r), i, n)));
            store_part<D>(row_of(y, D, n, r), i, n, V::mul(active, load_part<D>(up.row(r), i, n)));
          }
      });
}

void swiglu_backward(const Matrix& dy, const Matrix& gate, const Matrix& up, void* dgate, void* dup, int64_t row0,
                     int64_t row1) {
  const int64_t n = gate.cols;
  with_dtype(
      gate.dtype, PF_BODY(int D) {
        const V::F one = V::set1(1.0f), minus = V::set1(-1.0f);
        for (int64_t r = row0; r < row1; ++r)
          for (int64_t i = 0; i < n; i += kLanes) {
            const V::F g = load_part<D>(gate.row(r), i, n), d = load_part<D>(dy.row(r), i, n);
            const V::F s = sigmoid(g), silu = V::mul(g, s);
            const V::F slope = V::fma(silu, V::fma(s, minus, one), s);
            store_part<D>(row_of(dup, D, n, r), i, n, V::mul(d, silu));
            store_part<D>(row_of(dgate, D, n, r), i, n, V::mul(V::mul(d, load_part<D>(up.row(r), i, n)), slope));
          }
      });
}

// ---- rotary embeddings ----------------------------------------------------------------------------------------------

// y = x cos + (-x2, x1) sin with x = (x1, x2); transposed: y = x cos + (x2 sin2, -x1 sin1), the gradient.
void rope(const RopeArgs& g, int64_t token0, int64_t token1) {
  const int64_t half = g.dim / 2;
  const int size = dtype_size(g.dtype);
  with_dtype(
      g.dtype, PF_BODY(int D) {
        const V::F sign = V::set1(g.transposed ? -1.0f : 1.0f);
        for (int64_t token = token0; token < token1; ++token) {
          const int64_t b = token / g.tokens, t = token % g.tokens;
          const int64_t at = (b * g.angle_stride + t) * g.dim * size;
          const char *cos = static_cast<const char*>(g.cos) + at, *sin = static_cast<const char*>(g.sin) + at;
          // What multiplies the other half.
          const char *sin1 = g.transposed ? sin + half * size : sin, *sin2 = g.transposed ? sin : sin + half * size;
          for (int64_t h = 0; h < g.heads; ++h) {
            const char* x =
                static_cast<const char*>(g.x) + (b * g.strides[0] + h * g.strides[1] + t * g.strides[2]) * size;
            char* y = static_cast<char*>(g.y) + (token * g.y_strides[0] + h * g.y_strides[1]) * size;
            for (int64_t i = 0; i < half; i += kLanes) {
              const V::F x1 = load_part<D>(x, i, half), x2 = load_part<D>(x + half * size, i, half);
              const V::F cross1 = V::mul(V::mul(x2, load_part<D>(sin1, i, half)), sign);
              const V::F cross2 = V::mul(V::mul(x1, load_part<D>(sin2, i, half)), sign);
              const V::F own1 = rounded<D>(V::mul(x1, load_part<D>(cos, i, half)));
              const V::F own2 = rounded<D>(V::mul(x2, load_part<D>(cos + half * size, i, half)));
              const V::F y1 = V::fma(rounded<D>(cross1), V::set1(-1.0f), own1);
              store_part<D>(y, i, half, y1);
              store_part<D>(y + half * size, i, half, V::add(own2, rounded<D>(cross2)));
            }
          }
        }
      });
}

// ---- cross-entropy --------------------------------------------------------------------------------------------------

// loss = log(sum(e^x)) - x[label]; then x = e^x / sum(e^x), less one at the label.
void cross_entropy(const CrossEntropyArgs& g, int64_t row0, int64_t row1) {
  with_dtype(
      g.dtype, PF_BODY(int D) {
        constexpr int kSize = dtype_size(D);
        constexpr int kSums = 4;
        // Elements from i on, less than a vector of them, and -inf.
        const auto rest = [](const char* x, int64_t i, int64_t n) {
          alignas(64) char part[kLanes * kSize];
          store_as<D>(part, V::set1(-__builtin_inff()));
          copy_bytes(part, x + i * kSize, (n - i) * kSize);
          return load_as<D>(part);
        };
        for (int64_t r = row0; r < row1; ++r) {
          char* row = row_of(g.logits, D, g.ld, r);
          // body(elements, how many, how many of them in whole vectors) for each block.
          const auto blocks = [&](const auto& body) __attribute__((always_inline)) {
            char* x = row;
            for (int64_t col = 0; col < g.cols; col += g.block, x += g.block_stride * kSize) {
              const int64_t n = min64(g.block, g.cols - col);
              body(x, n, n / kLanes * kLanes);
            }
          };
          char* at_label = row + (g.labels[r] / g.block * g.block_stride + g.labels[r] % g.block) * kSize;
          float label;
          to_float(at_label, D, &label, 1);

          V::F most = V::set1(-__builtin_inff());
          blocks([&](const char* x, int64_t n, int64_t whole) {
            for (int64_t i = 0; i < whole; i += kLanes) most = V::max(most, load_as<D>(x + i * kSize));
            if (whole < n) most = V::max(most, rest(x, whole, n));
          });
          const float top = V::reduce_max(most);
          const V::F shift = V::set1(-top);
          V::F sums[kSums] = {V::zero(), V::zero(), V::zero(), V::zero()};
          blocks([&](const char* x, int64_t n, int64_t whole) {
            int64_t i = 0;
            for (; i + kSums * kLanes <= whole; i += kSums * kLanes)
              for (int j = 0; j < kSums; ++j)
                sums[j] = V::add(sums[j], exp(V::add(load_as<D>(x + (i + j * kLanes) * kSize), shift)));
            for (; i < whole; i += kLanes) sums[0] = V::add(sums[0], exp(V::add(load_as<D>(x + i * kSize), shift)));
            if (whole < n) sums[1] = V::add(sums[1], exp(V::add(rest(x, whole, n), shift)));
          });
          const float sum = V::reduce(V::add(V::add(sums[0], sums[1]), V::add(sums[2], sums[3])));

          const V::F inverse = V::set1(1.0f / sum);
          blocks([&](char* x, int64_t n, int64_t whole) {
            for (int64_t i = 0; i < whole; i += kLanes)
              store_as<D>(x + i * kSize, V::mul(exp(V::add(load_as<D>(x + i * kSize), shift)), inverse));
            if (whole < n) store_part<D>(x, whole, n, V::mul(exp(V::add(rest(x, whole, n), shift)), inverse));
          });

          alignas(64) float one[kLanes];
          V::store(one, V::add(V::mul(exp(V::set1(label - top)), inverse), V::set1(-1.0f)));
          store_part<D>(at_label, 0, 1, V::load(one));
          g.losses[r] = __builtin_logf(sum) + (top - label);
        }
      });
}

// ---- sums of rows ---------------------------------------------------------------------------------------------------

void sum_rows(const SumRowsArgs& g, int64_t row0, int64_t row1) {
  const int64_t n = g.x.cols;
  with_dtype(
      g.x.dtype, PF_BODY(int D) {
        for (int64_t r = row0; r < row1; ++r)
          for (int64_t i = 0; i < n; i += kLanes) {
            V::F sum = V::zero();
            for (int64_t from = g.first[r]; from >= 0; from = g.next[from])
              sum = V::add(sum, load_part<D>(g.x.row(from), i, n));
            store_part<D>(row_of(g.y, D, n, r), i, n, sum);
          }
      });
}
