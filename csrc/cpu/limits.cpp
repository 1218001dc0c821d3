#include "limits.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "../memory.h"
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace pf {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kBuffer =
    int64_t{512} << 20;         // what a last-level cache keeps of it from the pass before counts little
constexpr int kChains = 16;     // independent accumulators: more than latency times throughput
constexpr int kFewChains = 12;  // where there are 16 registers, which must hold the constant too
constexpr int kRepeats = 9;     // the best one counts: a limit is what undisturbed code reaches
constexpr int64_t kMultiplyAdds = int64_t{3} << 23;  // a multiple of both; a few milliseconds

// Seconds that `work(thread)` takes with all threads starting together; the best of kRepeats.
double best_seconds(int threads, const std::function<void(int)>& work) {
  double best = 1e30;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    std::atomic<int> ready{0};
    std::atomic<bool> go{false};
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t)
      others.emplace_back([&, t] {
        ++ready;
        while (!go) std::this_thread::yield();
        work(t);
      });
    while (ready < threads - 1) std::this_thread::yield();
    const auto start = Clock::now();
    go = true;
    work(0);
    for (std::thread& other : others) other.join();
    best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
  }
  return best;
}

// Kept out of line: the caller knows nothing of their instruction sets.
#define PF_KERNEL __attribute__((noinline))
#define PF_TARGET(isa) __attribute__((noinline, target(isa)))
#if defined(__x86_64__)
#define PF_REGISTER "v"
#elif defined(__aarch64__)
#define PF_REGISTER "w"
#else
#define PF_REGISTER "m"
#endif

// The same step of all accumulators, kMultiplyAdds times in all; the compiler sees them changed after every step, so
// that none is hoisted, merged or dropped. They are never addressed: they must stay in registers.
#define PF_CHAINS(kChains, Vector, zero, step)                              \
  Vector sum[kChains];                                                      \
  _Pragma("GCC unroll 16") for (int c = 0; c < kChains; ++c) sum[c] = zero; \
  for (int64_t i = 0; i < kMultiplyAdds / kChains; ++i) {                   \
    _Pragma("GCC unroll 16") for (int c = 0; c < kChains; ++c) {            \
      sum[c] = step;                                                        \
      asm("" : "+" PF_REGISTER(sum[c]));                                    \
    }                                                                       \
  }                                                                         \
  _Pragma("GCC unroll 16") for (int c = 0; c < kChains; ++c) asm volatile("" ::PF_REGISTER(sum[c]))

// XOR of [from, to), kReads registers at a time.
#define PF_READ(Vector, zero, kReads, load)                                                                           \
  Vector sum[kReads];                                                                                                 \
  _Pragma("GCC unroll 8") for (int c = 0; c < kReads; ++c) sum[c] = zero;                                             \
  for (const Vector* p = reinterpret_cast<const Vector*>(from); p < reinterpret_cast<const Vector*>(to); p += kReads) \
    _Pragma("GCC unroll 8") for (int c = 0; c < kReads; ++c) sum[c] ^= load(p + c);                                   \
  _Pragma("GCC unroll 8") for (int c = 0; c < kReads; ++c) asm volatile("" ::PF_REGISTER(sum[c]))

// Registers that every machine of this architecture has.
typedef float Float4 __attribute__((vector_size(16)));
typedef long long Long2 __attribute__((vector_size(16)));

PF_KERNEL void read_generic(const char* from, const char* to) { PF_READ(Long2, Long2{}, 4, *); }

PF_KERNEL void fma_generic() {
#if defined(__aarch64__)
  const Float4 a = vdupq_n_f32(0.5f);
  PF_CHAINS(kChains, Float4, Float4{}, vfmaq_f32(sum[c], a, a));
#else
  const Float4 a = {0.5f, 0.5f, 0.5f, 0.5f};
  PF_CHAINS(kFewChains, Float4, Float4{}, sum[c] * a + a);
#endif
}

#if defined(__x86_64__)
PF_TARGET("avx2") void read_avx2(const char* from, const char* to) {
  PF_READ(__m256i, _mm256_setzero_si256(), 8, _mm256_load_si256);
}

PF_TARGET("avx512f") void read_avx512(const char* from, const char* to) {
  PF_READ(__m512i, _mm512_setzero_si512(), 4, _mm512_load_si512);
}

PF_TARGET("avx2,fma") void fma_avx2() {
  const __m256 a = _mm256_set1_ps(0.5f);
  PF_CHAINS(kFewChains, __m256, _mm256_setzero_ps(), _mm256_fmadd_ps(a, a, sum[c]));
}

PF_TARGET("avx512f") void fma_avx512() {
  const __m512 a = _mm512_set1_ps(0.5f);
  PF_CHAINS(kChains, __m512, _mm512_setzero_ps(), _mm512_fmadd_ps(a, a, sum[c]));
}

PF_TARGET("avx512f,avx512bw,avx512bf16") void dpbf16() {
  const __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f00);
  PF_CHAINS(kChains, __m512, _mm512_setzero_ps(), _mm512_dpbf16_ps(sum[c], a, a));
}

PF_TARGET("avx512f,avx512bw,avx512vnni") void dpbusd() {
  const __m512i a = _mm512_set1_epi8(1);
  PF_CHAINS(kChains, __m512i, _mm512_setzero_si512(), _mm512_dpbusd_epi32(sum[c], a, a));
}
#endif

struct Instructions {
  void (*read)(const char*, const char*) = read_generic;
  void (*fp32)() = fma_generic;
  int64_t fp32_lanes = 4;
  void (*bf16)() = nullptr;
  void (*int8)() = nullptr;

  Instructions() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      read = read_avx2, fp32 = fma_avx2, fp32_lanes = 8;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw")) return;
    read = read_avx512, fp32 = fma_avx512, fp32_lanes = 16;
    if (__builtin_cpu_supports("avx512bf16")) bf16 = dpbf16;
    if (__builtin_cpu_supports("avx512vnni")) int8 = dpbusd;
#endif
  }
};

}  // namespace

Limits measure_limits(int threads) {
  const Instructions best;
  const int64_t part = kBuffer / threads / 4096 * 4096;
  std::unique_ptr<char, void (*)(void*)> buffer(static_cast<char*>(std::aligned_alloc(1 << 21, kBuffer)), std::free);
  if (buffer == nullptr) throw std::bad_alloc();
  advise_huge_pages(buffer.get(), kBuffer);
  std::fill_n(buffer.get(), kBuffer, 1);

  const double read =
      best_seconds(threads, [&](int t) { best.read(buffer.get() + t * part, buffer.get() + (t + 1) * part); });
  const auto rate = [&](void (*work)(), int64_t multiplications) {
    if (work == nullptr) return -1.0;
    const double seconds = best_seconds(threads, [&](int) { work(); });
    return 2e-9 * threads * kMultiplyAdds * multiplications / seconds;
  };
  return {1e-9 * threads * part / read, rate(best.fp32, best.fp32_lanes), rate(best.bf16, 32), rate(best.int8, 64)};
}

}  // namespace pf
