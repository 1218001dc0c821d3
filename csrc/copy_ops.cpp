// Copies of many tensors at once, and of rows of one.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "tensors.h"
#include "threads.h"

namespace {

using namespace pf::tensors;

constexpr int64_t kBytes = int64_t{1} << 22;  // a thread copies at least: it is less before a sleeping one wakes

// memcpy that bypasses the caches: many pieces together are larger than these, and nobody reads them soon.
void stream(char* into, const char* from, int64_t n) {
#if defined(__SSE2__)
  if (reinterpret_cast<uintptr_t>(into) % 16 == 0) {
    for (; n >= 64; n -= 64, into += 64, from += 64)
      for (int i = 0; i < 64; i += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(into + i),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    _mm_sfence();
  }
#endif
  std::memcpy(into, from, n);
}

bool alike(const Tensor& a, const Tensor& b) {
  if (a.scalar_type() != b.scalar_type() || a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d)) return false;
  return a.is_contiguous() && b.is_contiguous();
}

// Whether every pair is contiguous, of one dtype and of one shape; if one is not, nothing is copied.
bool copy_tensors(std::vector<Tensor> into, std::vector<Tensor> from) {
  const size_t count = into.size();
  STD_TORCH_CHECK(from.size() == count, "from has ", from.size(), " tensors; it must have ", count);
  struct Piece {
    char* into;
    const char* from;
    int64_t start, end;  // in bytes of all pieces, one after the other
  };
  std::vector<Piece> pieces;
  pieces.reserve(count);
  int64_t total = 0;
  for (size_t i = 0; i < count; ++i) {
    if (!alike(into[i], from[i])) return false;
    const int64_t size = into[i].numel() * static_cast<int64_t>(into[i].element_size());
    pieces.push_back({static_cast<char*>(into[i].mutable_data_ptr()),
                      static_cast<const char*>(from[i].const_data_ptr()), total, total + size});
    total += size;
  }
  pf::parallel_for(total, kBytes, [&](int64_t at, int64_t end) {
    auto piece =
        std::upper_bound(pieces.begin(), pieces.end(), at, [](int64_t b, const Piece& p) { return b < p.end; });
    for (; at < end; ++piece) {
      const int64_t stop = std::min(end, piece->end);
      stream(piece->into + (at - piece->start), piece->from + (at - piece->start), stop - at);
      at = stop;
    }
  });
  return true;
}

int64_t rows_a_thread(const pf::Matrix& m) { return kBytes / (m.cols * pf::dtype_size(m.dtype) + 1) + 1; }

// Row i is that of x which index[i] says, or zeros where it is -1.
Tensor take_rows(Tensor x, Tensor index) {
  const pf::Matrix m = matrix(x, "x");
  OptTensor held = index;
  const int64_t count = index.numel();
  const int64_t* from = numbers(held, count, -1, m.rows - 1, "index");
  Tensor y = new_matrix(count, m.cols, m.dtype);
  const int64_t bytes = m.cols * pf::dtype_size(m.dtype);
  char* out = static_cast<char*>(y.mutable_data_ptr());
  pf::parallel_for(count, rows_a_thread(m), [&](int64_t r0, int64_t r1) {
    for (int64_t r = r0; r < r1; ++r)
      from[r] < 0 ? std::memset(out + r * bytes, 0, bytes) : std::memcpy(out + r * bytes, m.row(from[r]), bytes);
  });
  return y;
}

// take_rows' gradient in its `rows` rows.
Tensor sum_rows(Tensor x, Tensor index, int64_t rows) {
  const pf::Kernels& k = kernels();
  const pf::Matrix m = matrix(x, "x");
  OptTensor held = index;
  const int64_t* into = numbers(held, m.rows, -1, rows - 1, "index");
  std::vector<int64_t> first(rows, -1), next(m.rows);
  for (int64_t r = m.rows; r-- > 0;)
    if (into[r] >= 0) {
      next[r] = first[into[r]];
      first[into[r]] = r;
    }
  Tensor y = new_matrix(rows, m.cols, m.dtype);
  const pf::SumRowsArgs args{.x = m, .first = first.data(), .next = next.data(), .y = y.mutable_data_ptr()};
  pf::parallel_for(rows, rows_a_thread(m), [&](int64_t r0, int64_t r1) { k.sum_rows(args, r0, r1); });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyfastpeft, m) {
  m.def("copy_tensors(Tensor(a!)[] into, Tensor[] src) -> bool");
  m.def("take_rows(Tensor x, Tensor index) -> Tensor");
  m.def("sum_rows(Tensor x, Tensor index, int rows) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CPU, m) {
  m.impl("copy_tensors", TORCH_BOX(&copy_tensors));
  m.impl("take_rows", TORCH_BOX(&take_rows));
  m.impl("sum_rows", TORCH_BOX(&sum_rows));
}
