// What this machine can do at most, measured: the roofs that the benchmark holds a kernel's speed against.
#pragma once

namespace pf {

// GFLOP/s or Gop/s with one multiply-add counted as two, GB/s for reads; negative where this CPU lacks the instruction.
struct Limits {
  double read_gb_s;
  double fp32_gflop_s;
  double bf16_gflop_s;
  double int8_gop_s;
};

// Measured with `threads` threads of its own at the same time, for about a second. Throws std::bad_alloc.
Limits measure_limits(int threads);

}  // namespace pf
