#include "linear.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "../spin.h"
#include "dispatch.h"

namespace pf {
namespace {

// Whether OpenMP's threads sleep between two parallel regions; by default they spin for a while.
bool threads_sleep() {
  const char *policy = std::getenv("OMP_WAIT_POLICY"), *spins = std::getenv("GOMP_SPINCOUNT");
  return spins != nullptr ? std::strtoll(spins, nullptr, 10) == 0 : policy != nullptr && (*policy | 32) == 'p';
}

// Multiply-adds, of vectors of 16 lanes, that waking a thread pays for: it was seen to cost up to 55 us where it
// sleeps, 3 where it spins.
const int64_t kThreadWork = int64_t{1} << (threads_sleep() ? 22 : 19);
constexpr int64_t kUnit = 32;  // columns or lanes a chunk of work is a multiple of

// Multiply-adds in a third of the time in which an element is copied, or rounded to 8 bits: a pass that does nothing
// else must pay for waking a thread by itself.
constexpr int64_t kPacking = 12, kQuantizing = 20;

// Narrower vectors take longer for as many (AVX2, 16 rows over 4 bits, 576 to 576: 133 us, not 170).
int64_t grain_of(int64_t work_per_item) {
  return kThreadWork / (kernels()->lanes < 16 ? 2 : 1) / std::max<int64_t>(work_per_item, 1);
}

// body(begin, end) over [0, n) in chunks that begin at multiples of `unit`; `work` is an item's, in multiply-adds.
template <class Body>
void run_units(ParallelFor parallel, int64_t n, int64_t unit, int64_t work, const Body& body) {
  run(parallel, ceil_div(n, unit), grain_of(unit * work),
      [&](int64_t u0, int64_t u1) { body(u0 * unit, std::min(u1 * unit, n)); });
}

// body(row0, row1, begin, end) over rows > 0 and [0, n) alike, in parts that begin at multiples of kUnit and of `unit`:
// even chunks of at most `most` rows, so that few units are enough work for many threads. `work` is that of an item and
// all rows.
template <class Body>
void run_parts(ParallelFor parallel, int64_t rows, int64_t most, int64_t n, int64_t unit, int64_t work,
               const Body& body) {
  const int64_t chunk = ceil_div(ceil_div(rows, ceil_div(rows, most)), kUnit) * kUnit;
  const int64_t chunks = ceil_div(rows, chunk), units = ceil_div(n, unit);
  run(parallel, chunks * units, grain_of(unit * work / chunks), [&](int64_t i, int64_t end) {
    while (i < end) {
      const int64_t row0 = i / units * chunk, u0 = i % units, u1 = std::min(units, u0 + end - i);
      body(row0, std::min(rows, row0 + chunk), u0 * unit, std::min(u1 * unit, n));
      i += u1 - u0;
    }
  });
}

const Arithmetic& arithmetic_for(const Kernels& k, int dtype) {
  return dtype == kBFloat16 && k.bf16.gemv != nullptr ? k.bf16 : k.f32;
}

// Of the kernels that decode in registers: bf16 products pay where they take no longer than those of float32.
const Arithmetic& few_rows_arithmetic(const Kernels& k, int dtype) {
  return k.slow_bf16 ? k.f32 : arithmetic_for(k, dtype);
}

// scaling * row_scale, as [R] (ld 0) or [rows, R] (ld R).
const float* branch_factor(const Branch& branch, int64_t rows, int64_t rank) {
  const int64_t count = branch.row_scale_ld == 0 ? rank : rows * rank;
  float* factor = static_cast<float*>(scratch(kSlotFactor, std::max<int64_t>(count, 1) * sizeof(float)));
  for (int64_t i = 0; i < count; ++i)
    factor[i] = branch.row_scale == nullptr ? branch.scaling : branch.scaling * branch.row_scale[i];
  return factor;
}

// s * factor of one element. Where rows choose, a zero leaves out what s is: that of an adapter which the row does not
// use, and which may not be finite.
float scaled_by(float s, float factor, const Branch& branch) {
  const float product = s * factor;  // before it is chosen: such loops become vectors
  return branch.row_scale_ld != 0 && factor == 0.0f ? 0.0f : product;
}

// Rows [r0, r1) of out [rows, R] = s * factor; in place if need be.
void times_factor(const float* s, const float* factor, const Branch& branch, int64_t r0, int64_t r1, float* out) {
  const int64_t rank = branch.rank(), ld = branch.row_scale_ld;
  for (int64_t r = r0; r < r1; ++r)
    for (int64_t i = 0; i < rank; ++i) out[r * rank + i] = scaled_by(s[r * rank + i], factor[r * ld + i], branch);
}

PackedRows pack_rows(const Arithmetic& arith, const Matrix& m, const Dropout& dropout, Slot slot,
                     ParallelFor parallel) {
  void* out = scratch(slot, arith.packed_rows_bytes(m.rows, m.cols));
  run(parallel, m.rows, grain_of(m.cols * kPacking),
      [&](int64_t r0, int64_t r1) { arith.pack_rows(m, dropout, out, r0, r1); });
  return {out, m.rows, m.cols};
}

// Which elements survive, without 1 / (1 - p): the survivors stay exact in bf16, and the constant is applied in
// float32.
Dropout mask_only(Dropout d) {
  d.scale = 1.0f;
  return d;
}

// `m` as panels whose lanes are its rows, or its columns.
const void* pack_panels(const Arithmetic& arith, const Matrix& m, bool of_rows, Slot slot, ParallelFor parallel) {
  const auto pack = of_rows ? arith.pack_panels_t : arith.pack_panels;
  const int64_t lanes = of_rows ? m.rows : m.cols, contraction = of_rows ? m.cols : m.rows, group = arith.group_lanes;
  void* out = scratch(slot, arith.panels_bytes(lanes, contraction));
  run(parallel, ceil_div(lanes, group), grain_of(contraction * group * 4),
      [&](int64_t g0, int64_t g1) { pack(m, out, g0, g1); });
  return out;
}

// Few rows of x in the arithmetic's element type, and in float32 where that is needed.
struct FewRows {
  const void* x;
  int64_t ldx;
  const float* xf;
  int64_t ldxf;
};

FewRows few_rows(const Kernels& k, const Arithmetic& arith, const Matrix& x, bool floats) {
  FewRows few{x.data, x.ld, static_cast<const float*>(x.data), x.ld};
  const bool converts = &arith == &k.f32 && x.dtype != kFloat32;
  if (x.dtype != kFloat32 && (converts || floats)) {
    float* out = static_cast<float*>(scratch(kSlotX, x.rows * x.cols * sizeof(float)));
    for (int64_t r = 0; r < x.rows; ++r) k.to_float(x.row(r), x.dtype, out + r * x.cols, x.cols);
    few.xf = out;
    few.ldxf = x.cols;
  }
  if (converts) {
    few.x = few.xf;
    few.ldx = few.ldxf;
  }
  return few;
}

constexpr int64_t kMostSplitRows = 64;  // of which threads share the columns; more they share as rows
constexpr int64_t kReading = 20;        // multiply-adds in the time that an element of A takes to arrive

// Tiles of a packed A.
int64_t tiles_of(const Branch& branch) { return ceil_div(branch.rank(), kTile); }

// s [rows, R] = dropout(x) A^T, in parts that threads take as they come. The sums do not depend on who took what.
class BranchSums {
 public:
  // Of rows as they lie, without dropout.
  BranchSums(const Kernels& k, const Arithmetic& arith, const FewRows& few, int64_t rows, const Branch& branch)
      : arith_(arith), branch_(branch), count_(rows * branch.rank()), kernels_(&k), few_(few) {
    args_.x = few.x;
    args_.ldx = few.ldx;
    args_.rows = rows;
    // A part of a packed A is a range of columns: of one tile, in the order of memory, or, where it is used more often
    // than that counts, of four. Else it is a range of rows.
    if (branch.a.packed) {
      together_ = rows > arith.few_rows ? 4 : 1;
      split(branch.a.cols, 256, true);
      parts_ = summands_ * ceil_div(tiles_of(branch), together_);
    } else {
      split(branch.a.rows, 4, false);
    }
  }

  // Of up to kMostSplitRows rows, packed.
  BranchSums(const Arithmetic& arith, const PackedRows& dropped, const Branch& branch)
      : arith_(arith), branch_(branch), count_(dropped.rows * branch.rank()), dropped_(dropped) {
    split(dropped.cols, arith.block, true);
  }

  // Computes parts until none is left, and waits for those that other threads are at. `next` is read afterwards.
  void finish(const void* next) {
    for (int64_t part; (part = taken_.fetch_add(1, std::memory_order_relaxed)) < parts_;) {
      try {
        compute(part, next);
      } catch (...) {  // no memory: the region hands that on, and nobody waits for parts that do not come
        done_.fetch_add(parts_, std::memory_order_release);
        throw;
      }
      done_.fetch_add(1, std::memory_order_release);
    }
    for (int spins = 0; done_.load(std::memory_order_acquire) < parts_; ++spins) relax(spins);
  }

  // Everything, for a caller that has no other work for the threads.
  void finish(ParallelFor parallel) {
    const int64_t work = (count_ + branch_.rank() * kReading) * step_;
    run(parallel, parts_, grain_of(work), [&](int64_t, int64_t) { finish(branch_.a.data); });
  }

  // After `finish`: out [rows, R] = s.
  void store(float* out) const {
    std::memcpy(out, sums_, count_ * sizeof(float));
    for (int64_t p = 1; p < summands_; ++p)
      for (int64_t i = 0; i < count_; ++i) out[i] += sums_[p * count_ + i];
    if (branch_.dropout.threshold != 0)
      for (int64_t i = 0; i < count_; ++i) out[i] *= branch_.dropout.scale;
  }

 private:
  void split(int64_t size, int64_t unit, bool adds) {
    constexpr int64_t kMostParts = 8;
    size_ = size;
    step_ = ceil_div(size, kMostParts * unit) * unit;
    parts_ = ceil_div(size, step_);
    summands_ = adds ? parts_ : 1;
    sums_ = static_cast<float*>(scratch(kSlotDs, summands_ * count_ * sizeof(float)));
  }

  void compute(int64_t part, const void* next) {
    const bool tiled = kernels_ != nullptr && branch_.a.packed;
    const int64_t group = tiled ? part / summands_ : 0, summand = part - group * summands_;
    const int64_t begin = summand * step_, end = std::min(begin + step_, size_);
    if (kernels_ == nullptr)
      arith_.rows_times_t(dropped_, branch_.a, sums_ + summand * count_, 0, dropped_.rows, begin, end);
    else if (tiled)
      arith_.dots_packed(args_, branch_.a, group * together_, std::min((group + 1) * together_, tiles_of(branch_)),
                         begin, end, next, sums_ + summand * count_);
    else
      kernels_->dots(few_.xf, few_.ldxf, args_.rows, branch_.a, sums_, begin, end);
  }

  const Arithmetic& arith_;
  const Branch& branch_;
  int64_t count_, size_, step_, parts_, summands_;
  float* sums_;
  int64_t together_ = 1;
  const Kernels* kernels_ = nullptr;  // of rows as they lie
  FewRows few_{};
  GemvArgs args_{};
  PackedRows dropped_{};  // of others
  std::atomic<int64_t> taken_{0}, done_{0};
};

// dropout(x) packed, but for its scale; x packed is given.
PackedRows pack_dropped(const Arithmetic& arith, const Matrix& x, const PackedRows& packed, const Dropout& dropout,
                        ParallelFor parallel) {
  if (dropout.threshold == 0) return packed;
  return pack_rows(arith, x, mask_only(dropout), kSlotDropped, parallel);
}

// Whether a packed A takes x as it lies: packing x for it alone takes as long as multiplying by 16 ranks.
bool as_it_lies(const Arithmetic& arith, const Matrix& x, const Branch& branch) {
  return branch.a.packed && x.dtype == arith.element && !arith.tiles && branch.dropout.threshold == 0;
}

constexpr int64_t kPair = 2;  // tiles that stay together, as a group

// A product of `depth` multiply-adds for each element.
void many_rows_product(const Arithmetic& arith, const GemmArgs& args, int64_t depth, ParallelFor parallel) {
  const int64_t rows = args.x.rows, most = args.words.data == nullptr ? kRowChunk : kWordRows;
  run_parts(parallel, rows, most, args.w.tiles(), kPair, kTile * depth * rows,
            [&](int64_t r0, int64_t r1, int64_t t0, int64_t t1) { arith.gemm(args, r0, r1, t0, t1); });
}

bool is_few(const Arithmetic& arith, const Weight& w, const Matrix& x, const Branch& branch) {
  return x.rows <= (w.zero == nullptr ? arith.few_rows : arith.few_rows_of_zeros) && branch.dropout.threshold == 0;
}

// s [rows, R] = dropout(x) A^T of more rows than share their columns, and s * factor packed. A thread does everything
// for its rows, `of_rows(r0, r1)` first, which packs them where s needs that: waking it takes as long as some of it.
// s may be null.
template <class OfRows>
PackedRows pack_many_sums(const Arithmetic& arith, const Matrix& x, const PackedRows& dropped, const Branch& branch,
                          float* s, ParallelFor parallel, const OfRows& of_rows) {
  constexpr int64_t kTogether = 12;  // which rows meet in a kernel must not depend on the number of threads
  const int64_t rows = x.rows, rank = branch.rank();
  if (s == nullptr) s = static_cast<float*>(scratch(kSlotDs, rows * rank * sizeof(float)));
  const float* factor = branch_factor(branch, rows, rank);
  float* scaled = static_cast<float*>(scratch(kSlotDy, rows * rank * sizeof(float)));
  void* packed = scratch(kSlotS, arith.packed_rows_bytes(rows, rank));
  run_units(parallel, rows, kTogether, x.cols * (rank + 4), [&](int64_t r0, int64_t r1) {
    of_rows(r0, r1);
    if (as_it_lies(arith, x, branch)) {
      GemvArgs own{};
      own.x = x.row(r0);
      own.ldx = x.ld;
      own.rows = r1 - r0;
      arith.dots_packed(own, branch.a, 0, tiles_of(branch), 0, branch.a.cols, branch.a.data, s + r0 * rank);
    } else {
      arith.rows_times_t(dropped, branch.a, s, r0, r1, 0, dropped.cols);
      if (branch.dropout.threshold != 0)
        for (int64_t i = r0 * rank; i < r1 * rank; ++i) s[i] *= branch.dropout.scale;
    }
    times_factor(s, factor, branch, r0, r1, scaled);
    arith.pack_rows({scaled, kFloat32, rows, rank, rank}, {}, packed, r0, r1);
  });
  return {packed, rows, rank};
}

// The same of sums that are finished, by and for the calling thread.
PackedRows pack_sums(const Arithmetic& arith, const BranchSums& sums, const float* factor, const Branch& branch,
                     int64_t rows) {
  const int64_t rank = branch.rank();
  float* scaled = static_cast<float*>(scratch(kSlotDy, rows * rank * sizeof(float)));
  void* packed = scratch(kSlotS, arith.packed_rows_bytes(rows, rank));
  sums.store(scaled);
  times_factor(scaled, factor, branch, 0, rows, scaled);
  arith.pack_rows({scaled, kFloat32, rows, rank, rank}, {}, packed, 0, rows);
  return {packed, rows, rank};
}

// s [rows, R] = dropout(x) A^T for any rows, by all threads, and s * factor packed.
PackedRows branch_sums(const Kernels& k, const Arithmetic& arith, const Matrix& x, const Branch& branch, float* s,
                       ParallelFor parallel) {
  const int64_t rows = x.rows;
  const auto all = [&](BranchSums&& sums) {
    sums.finish(parallel);
    if (s != nullptr) sums.store(s);
    return pack_sums(arith, sums, branch_factor(branch, rows, branch.rank()), branch, rows);
  };
  if (rows <= arith.few_rows && branch.dropout.threshold == 0)
    return all(BranchSums(k, arith, few_rows(k, arith, x, !branch.a.packed), rows, branch));
  if (rows <= kMostSplitRows)
    return all(BranchSums(arith, pack_rows(arith, x, mask_only(branch.dropout), kSlotX, parallel), branch));
  void* dropped = scratch(kSlotX, arith.packed_rows_bytes(rows, x.cols));
  return pack_many_sums(arith, x, {dropped, rows, x.cols}, branch, s, parallel, [&](int64_t r0, int64_t r1) {
    arith.pack_rows(x, mask_only(branch.dropout), dropped, r0, r1);
  });
}

// ds^T [R, rows] = ((dy B) * factor)^T of dy as panels.
float* branch_gradient(const Arithmetic& arith, const Matrix& dy, const void* panels, const Branch& branch,
                       ParallelFor parallel) {
  const int64_t rank = branch.rank(), rows = dy.rows, ld = branch.row_scale_ld, group = arith.group_lanes;
  float* ds = static_cast<float*>(scratch(kSlotDs, rank * rows * sizeof(float)));
  void* bt = scratch(kSlotX, arith.packed_rows_bytes(rank, dy.cols));
  const float* factor = branch_factor(branch, rows, rank);
  arith.pack_rows_t(branch.b, bt);
  run(parallel, ceil_div(rows, group), grain_of(group * dy.cols * rank), [&](int64_t g0, int64_t g1) {
    arith.rows_times_panels({bt, rank, dy.cols}, panels, rows, ds, g0, g1);
    for (int64_t i = 0; i < rank; ++i)
      for (int64_t r = g0 * group; r < std::min(g1 * group, rows); ++r)
        ds[i * rows + r] = scaled_by(ds[i * rows + r], factor[r * ld + i], branch);
  });
  return ds;
}

// x times p as Arithmetic's rows_times has it, of which a lane takes `work` multiply-adds.
void rows_times(const Arithmetic& arith, const PackedRows& x, const Matrix& p, const Dropout& dropout, float* out,
                bool transposed, int64_t work, ParallelFor parallel) {
  run_units(parallel, p.cols, arith.group_lanes, work,
            [&](int64_t c0, int64_t c1) { arith.rows_times(x, p, dropout, out, transposed, c0, c1); });
}

// dx, of which a column takes `work` multiply-adds.
void many_rows_dx(const Arithmetic& arith, const DxArgs& args, int64_t work, ParallelFor parallel) {
  run_parts(parallel, args.rows, kRowChunk, args.cols, kUnit, work,
            [&](int64_t r0, int64_t r1, int64_t k0, int64_t k1) { arith.dx(args, r0, r1, k0, k1); });
}

// dx of linear_backward.
void input_gradient(const Arithmetic& arith, const Weight& w, const void* panels, const Matrix& dy,
                    const Branch& branch, const float* ds, void* dx, ParallelFor parallel) {
  const int64_t rank = branch.rank(), rows = dy.rows;
  const void* branch_panels =
      rank > 0 ? pack_panels(arith, {ds, kFloat32, rank, rows, rows}, false, kSlotS, parallel) : nullptr;
  const DxArgs args{w, panels, branch_panels, branch.a, rows, branch.dropout, dx, dy.dtype, w.k};
  many_rows_dx(arith, args, (w.n + rank) * rows, parallel);
}

// da and db of linear_backward.
void adapter_gradient(const Arithmetic& arith, const Matrix& dy, const Branch& branch, const float* ds,
                      const BranchTraining& training, ParallelFor parallel) {
  const int64_t rank = branch.rank(), rows = dy.rows;
  const int64_t work = rows * (rank + 4);
  if (training.da != nullptr) {
    const PackedRows dst = pack_rows(arith, {ds, kFloat32, rank, rows, rows}, {}, kSlotDropped, parallel);
    rows_times(arith, dst, training.x, mask_only(branch.dropout), training.da, false, work, parallel);
    if (branch.dropout.threshold != 0)
      for (int64_t i = 0; i < rank * training.x.cols; ++i) training.da[i] *= branch.dropout.scale;
  }
  if (training.db == nullptr) return;
  float* scaled = static_cast<float*>(scratch(kSlotX, rows * rank * sizeof(float)));
  void* st = scratch(kSlotS, arith.packed_rows_bytes(rank, rows));
  times_factor(static_cast<const float*>(training.s.data), branch_factor(branch, rows, rank), branch, 0, rows, scaled);
  arith.pack_rows_t({scaled, kFloat32, rows, rank, rank}, st);
  rows_times(arith, {st, rank, rows}, dy, {}, training.db, true, work, parallel);
}

// Whether x may be infinite, or become so in sums with codes and with zeros where it would not with the weight itself.
bool is_too_large(const float* x, int64_t n) {
  constexpr float kMost = 1e30f;
  int large = 0;
  for (int64_t i = 0; i < n; ++i) large |= std::fabs(x[i]) > kMost;
  return large != 0;
}

// Returns the rows that may be wrong, a bit each: codes and zeros multiply x apart, and what is infinite of the one may
// meet its opposite of the other.
uint32_t few_rows_forward(const Kernels& k, const Weight& w, const Matrix& x, const float* bias, const Branch& branch,
                          void* y, int y_dtype, float* s, ParallelFor parallel) {
  const Arithmetic& arith = few_rows_arithmetic(k, x.dtype);
  const int64_t rank = branch.rank(), grain = grain_of(kTile * w.k * ((x.rows + 3) / 4));
  const FewRows few = few_rows(k, arith, x, (rank > 0 && !branch.a.packed) || w.zero != nullptr);
  GemvArgs args{w, few.x, x.dtype, few.ldx, x.rows, nullptr, bias, nullptr, branch.b, y, y_dtype};
  uint32_t wrong = 0;
  if (w.zero != nullptr) {
    float* sums = static_cast<float*>(scratch(kSlotDropped, x.rows * w.segments() * sizeof(float)));
    for (int64_t r = 0; r < x.rows; ++r) {
      const float* row = few.xf + r * few.ldxf;
      k.segment_sums(row, w.segment, w.segments(), sums + r * w.segments());
      wrong |= uint32_t{is_too_large(row, x.cols)} << r;
    }
    args.xsum = sums;
  }
  if (rank == 0) {
    run(parallel, w.tiles(), grain, [&](int64_t t0, int64_t t1) { arith.gemv(args, t0, t1); });
    return wrong;
  }
  // One region for both: whoever comes to his tiles takes parts of s first.
  BranchSums sums(k, arith, few, x.rows, branch);
  const float* factor = branch_factor(branch, x.rows, rank);
  run(parallel, w.tiles(), grain, [&](int64_t t0, int64_t t1) {
    const int64_t count = x.rows * rank;
    float* scaled = static_cast<float*>(scratch(kSlotS, 2 * (count + x.rows) * sizeof(float)));
    arith.prefetch_b(branch.b, t0);
    sums.finish(w.codes + t0 * w.k * (kTile / 2));
    sums.store(scaled);
    times_factor(scaled, factor, branch, 0, x.rows, scaled);
    arith.to_steps(scaled, x.rows, rank, scaled + count);
    GemvArgs own = args;
    own.s = scaled + count;
    arith.gemv(own, t0, t1);
  });
  if (s != nullptr) sums.store(s);
  return wrong;
}

// x in 16-bit integers, where there are products of these that are faster than float32's.
class Words {
 public:
  Words(const Kernels& k, const Arithmetic& arith, const Weight& w, const Matrix& x) : kernels_(k), w_(w), x_(x) {
    constexpr int64_t kFewRows = 4;  // up to here decoding in registers is faster
    if (x.dtype != kBFloat16 || &arith != &k.f32 || k.pack_words == nullptr || x.rows <= kFewRows) return;
    const int64_t bytes = k.word_rows_bytes(x.rows, x.cols);
    data_ = static_cast<uint8_t*>(scratch(kSlotWords, bytes + x.rows));
    left_out_ = data_ + bytes;
  }

  bool any() const { return data_ != nullptr; }
  void pack(int64_t r0, int64_t r1) const {
    if (any()) kernels_.pack_words(x_, w_, data_, left_out_, r0, r1);
  }
  void pack(ParallelFor parallel) const {
    if (!any()) return;
    run(parallel, x_.rows, grain_of(x_.cols * kQuantizing), [&](int64_t r0, int64_t r1) { pack(r0, r1); });
  }

  // What a product takes, after packing.
  WordRows rows() const {
    const bool all = !any() || std::count(left_out_, left_out_ + x_.rows, 1) == 0;
    return {data_, all ? nullptr : left_out_};
  }

 private:
  const Kernels& kernels_;
  const Weight& w_;
  const Matrix& x_;
  uint8_t *data_ = nullptr, *left_out_ = nullptr;
};

void many_rows_forward(const Arithmetic& arith, const Words& words, const Weight& w, const Matrix& x, const float* bias,
                       const Branch& branch, void* y, int y_dtype, float* s, ParallelFor parallel) {
  const int64_t rank = branch.rank(), rows = x.rows;
  const bool late = w.zero == nullptr && rows <= arith.late_rows;
  GemmArgs args{w, late, {nullptr, rows, x.cols}, {}, branch.b, bias, y, y_dtype};
  if (rank > 0 && rows > kMostSplitRows) {
    const auto room = [&](Slot slot) { return scratch(slot, arith.packed_rows_bytes(rows, x.cols)); };
    void *own = room(kSlotX), *dropped = branch.dropout.threshold == 0 ? own : room(kSlotDropped);
    args.x = {own, rows, x.cols};
    args.s = pack_many_sums(arith, x, {dropped, rows, x.cols}, branch, s, parallel, [&](int64_t r0, int64_t r1) {
      arith.pack_rows(x, {}, own, r0, r1);
      if (dropped != own) arith.pack_rows(x, mask_only(branch.dropout), dropped, r0, r1);
      words.pack(r0, r1);
    });
    args.words = words.rows();
    return many_rows_product(arith, args, w.k, parallel);
  }
  words.pack(parallel);
  args.words = words.rows();
  if (rank > 0 || !words.any() || args.words.left_out != nullptr) args.x = pack_rows(arith, x, {}, kSlotX, parallel);
  if (rank == 0) return many_rows_product(arith, args, w.k, parallel);
  const PackedRows dropped = pack_dropped(arith, x, args.x, branch.dropout, parallel);
  // One region for both, as with few rows.
  BranchSums sums(arith, dropped, branch);
  const float* factor = branch_factor(branch, rows, rank);
  run_units(parallel, w.tiles(), kPair, kTile * w.k * rows, [&](int64_t t0, int64_t t1) {
    GemmArgs own = args;
    sums.finish(branch.a.data);
    own.s = pack_sums(arith, sums, factor, branch, rows);
    arith.gemm(own, 0, rows, t0, t1);
  });
  if (s != nullptr) sums.store(s);
}

}  // namespace

int64_t thread_work() { return kThreadWork; }

void linear_forward(const Weight& w, const Matrix& x, const float* bias, const Branch& branch, void* y, int y_dtype,
                    float* s, ParallelFor parallel) {
  if (x.rows == 0 || w.n == 0) return;
  const Kernels& k = *kernels();
  const Arithmetic& arith = arithmetic_for(k, x.dtype);
  const Words words(k, arith, w, x);
  if (words.any() || !is_few(arith, w, x, branch))
    return many_rows_forward(arith, words, w, x, bias, branch, y, y_dtype, s, parallel);
  const uint32_t wrong = few_rows_forward(k, w, x, bias, branch, y, y_dtype, s, parallel);
  for (int64_t r = 0; wrong >> r != 0; ++r) {
    if ((wrong >> r & 1) == 0) continue;
    const Matrix row{x.row(r), x.dtype, 1, x.cols, x.ld};
    Branch own = branch;
    own.row_scale += r * own.row_scale_ld;
    many_rows_forward(arith, Words(k, arith, w, row), w, row, bias, own,
                      static_cast<char*>(y) + r * w.n * dtype_size(y_dtype), y_dtype,
                      s == nullptr ? nullptr : s + r * branch.rank(), parallel);
  }
}

void lora_forward(const Matrix& base, const Matrix& x, const Branch& branch, void* y, float* s, ParallelFor parallel) {
  const int64_t rows = x.rows, rank = branch.rank();
  if (rows == 0 || base.cols == 0) return;
  const Kernels& k = *kernels();
  const Arithmetic& arith = arithmetic_for(k, x.dtype);
  GemmArgs args{.x = {nullptr, rows, 0},
                .s = branch_sums(k, arith, x, branch, s, parallel),
                .lora_b = branch.b,
                .y = y,
                .y_dtype = base.dtype};
  args.w.n = base.cols;
  args.base = base;
  many_rows_product(arith, args, rank + kReading, parallel);
}

namespace {

void many_rows_dense(const Matrix& w, const Matrix& x, const float* bias, const Branch& branch, void* y, int y_dtype,
                     ParallelFor parallel) {
  // A branch alone, with x for its s.
  const Arithmetic& arith = arithmetic_for(*kernels(), x.dtype);
  GemmArgs args{.x = {nullptr, x.rows, 0},
                .s = pack_rows(arith, x, {}, kSlotX, parallel),
                .lora_b = w,
                .bias = bias,
                .y = y,
                .y_dtype = y_dtype};
  args.w.n = w.rows;
  many_rows_product(arith, args, w.cols, parallel);
  if (branch.rank() > 0) lora_forward({y, y_dtype, x.rows, w.rows, w.rows}, x, branch, y, nullptr, parallel);
}

}  // namespace

void dense_backward(const Matrix& w, const Matrix& dy, void* dx, ParallelFor parallel) {
  // Up to here the weight's columns make better lanes than rows of dy, which leave some empty; beyond it their sums
  // leave the core's cache (576 to 1536, Zen 4: 20 rows in 0.62 ms instead of 0.89, 512 as long or longer).
  constexpr int64_t kMostRows = 128;
  if (dy.rows == 0) return;
  const Arithmetic& arith = arithmetic_for(*kernels(), dy.dtype);
  if (dy.dtype == kFloat32 && dy.rows <= kMostRows) {
    const PackedRows packed = pack_rows(arith, dy, {}, kSlotDy, parallel);
    return rows_times(arith, packed, w, {}, static_cast<float*>(dx), false, w.rows * dy.rows, parallel);
  }
  const DxArgs args{.ds = pack_panels(arith, dy, true, kSlotDy, parallel),
                    .lora_a = w,
                    .rows = dy.rows,
                    .dx = dx,
                    .dx_dtype = dy.dtype,
                    .cols = w.cols};
  many_rows_dx(arith, args, w.rows * dy.rows, parallel);
}

void dense_forward(const Matrix& w, const Matrix& x, const float* bias, const Branch& branch, void* y, int y_dtype,
                   ParallelFor parallel) {
  if (x.rows == 0 || w.rows == 0) return;
  if (x.rows > kTile) return many_rows_dense(w, x, bias, branch, y, y_dtype, parallel);
  const Kernels& k = *kernels();
  const Arithmetic& arith = arithmetic_for(k, x.dtype);
  const int64_t lanes = arith.group_lanes, groups = ceil_div(w.rows, lanes);
  const int64_t grain = grain_of(lanes * w.cols * ((x.rows + 3) / 4));
  const FewRows few = few_rows(k, arith, x, true);
  const DenseArgs args{w, x, few.xf, few.ldxf, {}, branch.b, bias, y, y_dtype};
  if (branch.rank() == 0)
    return run(parallel, groups, grain, [&](int64_t g0, int64_t g1) { arith.dense(args, g0, g1); });
  BranchSums sums(k, arith, few, x.rows, branch);
  const float* factor = branch_factor(branch, x.rows, branch.rank());
  run(parallel, groups, grain, [&](int64_t g0, int64_t g1) {
    DenseArgs own = args;
    sums.finish(w.row(g0 * lanes));
    own.s = pack_sums(arith, sums, factor, branch, x.rows);
    arith.dense(own, g0, g1);
  });
}

void linear_forward_int8(const Weight& w, const Matrix& x, const float* bias, const Branch& branch, void* y,
                         int y_dtype, ParallelFor parallel) {
  if (x.rows == 0 || w.n == 0) return;
  const Kernels &active = *kernels(), &k = active.of_int8 == nullptr ? active : *active.of_int8;
  const Arithmetic& arith = arithmetic_for(k, x.dtype);
  // Instructions on tiles beat rounding (4096 x 4096, 16 rows: 1.3 ms instead of 1.5, 256 rows: 6.7 instead of 16), and
  // so do products of 16-bit integers where those of 8 bits take three instructions (AVX2, 512 rows: 114 ms instead of
  // 130).
  const bool beats_bf16 = x.rows > k.int8.exact_rows && (x.rows <= 10 || !arith.tiles);
  const bool beats_words = k.pack_words == nullptr || x.rows <= k.int8.most_rows;
  if (x.dtype == kBFloat16 && !(&arith == &k.bf16 ? beats_bf16 : beats_words))
    return linear_forward(w, x, bias, branch, y, y_dtype, nullptr, parallel);
  const int64_t rank = branch.rank(), rows = x.rows;
  const int64_t blocks = ceil_div(x.cols, kByteBlock);
  const float shift = k.int8.shift(w);
  ByteRow* bytes = static_cast<ByteRow*>(scratch(kSlotDropped, blocks * rows * sizeof(ByteRow)));
  Int8Args args{w, bytes, rows, bias, {}, &arith == &k.bf16, branch.b, y, y_dtype};
  const auto of_parts = [&](const auto& body) {
    run_parts(parallel, rows, k.int8.row_chunk, w.tiles(), k.int8.group_tiles, kTile * w.k * ((rows + 7) / 8), body);
  };
  const auto product = [&](int64_t r0, int64_t r1, int64_t t0, int64_t t1) { k.int8.product(args, r0, r1, t0, t1); };
  const bool plain = as_it_lies(arith, x, branch);
  if (rank > 0 && rows > kMostSplitRows) {
    void* dropped = plain ? nullptr : scratch(kSlotX, arith.packed_rows_bytes(rows, x.cols));
    args.s = pack_many_sums(arith, x, {dropped, rows, x.cols}, branch, nullptr, parallel, [&](int64_t r0, int64_t r1) {
      k.int8.quantize(x, w, shift, bytes, r0, r1);
      if (!plain) arith.pack_rows(x, mask_only(branch.dropout), dropped, r0, r1);
    });
    return of_parts(product);
  }
  run(parallel, rows, grain_of(x.cols * kQuantizing),
      [&](int64_t r0, int64_t r1) { k.int8.quantize(x, w, shift, bytes, r0, r1); });
  if (rank == 0) return of_parts(product);
  const bool few = is_few(arith, w, x, branch) || plain;
  const PackedRows dropped = few ? PackedRows{} : pack_rows(arith, x, mask_only(branch.dropout), kSlotX, parallel);
  // One region for both, as in linear_forward.
  BranchSums sums = few ? BranchSums(k, arith, few_rows(k, arith, x, !branch.a.packed), rows, branch)
                        : BranchSums(arith, dropped, branch);
  const float* factor = branch_factor(branch, rows, rank);
  of_parts([&](int64_t r0, int64_t r1, int64_t t0, int64_t t1) {
    Int8Args own = args;
    arith.prefetch_b(branch.b, t0);
    sums.finish(w.codes + t0 * w.k * (kTile / 2));
    own.s = pack_sums(arith, sums, factor, branch, rows);
    k.int8.product(own, r0, r1, t0, t1);
  });
}

void linear_backward(const Weight& w, const Matrix& dy, const Branch& branch, const BranchTraining& training, void* dx,
                     ParallelFor parallel) {
  const Arithmetic& arith = arithmetic_for(*kernels(), dy.dtype);
  const void* panels = pack_panels(arith, dy, true, kSlotDy, parallel);
  const float* ds = branch.rank() > 0 ? branch_gradient(arith, dy, panels, branch, parallel) : nullptr;
  if (dx != nullptr) input_gradient(arith, w, panels, dy, branch, ds, dx, parallel);
  adapter_gradient(arith, dy, branch, ds, training, parallel);
}

namespace {

// Rows of a chunk of logits: of fewer, reading the weight takes the time; more only take memory.
int64_t head_rows(const Arithmetic& arith, const HeadLoss& g) {
  constexpr int64_t kBytes = 16 << 20, kFewest = 64;
  const int64_t most = kBytes / (dtype_size(arith.element) * (g.w.rows + g.w.rows / 8)), lanes = arith.group_lanes;
  return std::min(g.hidden.rows, std::max(kFewest, most / lanes * lanes));
}

}  // namespace

int64_t head_chunk_bytes(const HeadLoss& g) {
  const Arithmetic& arith = arithmetic_for(*kernels(), g.hidden.dtype);
  return arith.packed_rows_bytes(head_rows(arith, g), g.w.rows);
}

void head_loss(const HeadLoss& g, ParallelFor parallel) {
  const Kernels& k = *kernels();
  const Arithmetic& arith = arithmetic_for(k, g.hidden.dtype);
  const int64_t classes = g.w.rows, width = g.w.cols, size = dtype_size(g.hidden.dtype), step = head_rows(arith, g);
  for (int64_t row0 = 0; row0 < g.hidden.rows; row0 += step) {
    const int64_t rows = std::min(step, g.hidden.rows - row0);
    const Matrix hidden{g.hidden.row(row0), g.hidden.dtype, rows, width, g.hidden.ld};
    const void* panels = pack_panels(arith, hidden, true, kSlotDy, parallel);
    run_units(parallel, classes, kLogits, width * rows,
              [&](int64_t c0, int64_t c1) { arith.logits(g.w, panels, rows, g.chunk, c0, c1); });
    const CrossEntropyArgs losses{.logits = g.chunk,
                                  .dtype = arith.element,
                                  .cols = classes,
                                  .ld = arith.stride,
                                  .block = arith.block,
                                  .block_stride = rows * arith.stride,
                                  .labels = g.labels + row0,
                                  .losses = g.losses + row0};
    run(parallel, rows, grain_of(classes * 8), [&](int64_t r0, int64_t r1) { k.cross_entropy(losses, r0, r1); });
    if (g.dhidden == nullptr) continue;
    float* sums = static_cast<float*>(scratch(kSlotDs, rows * width * sizeof(float)));
    rows_times(arith, {g.chunk, rows, classes}, g.w, {}, sums, false, classes * rows, parallel);
    run(parallel, rows, grain_of(width * 4), [&](int64_t r0, int64_t r1) {
      k.from_float(sums + r0 * width, static_cast<char*>(g.dhidden) + (row0 + r0) * width * size, g.hidden.dtype,
                   (r1 - r0) * width);
    });
  }
}

}  // namespace pf
