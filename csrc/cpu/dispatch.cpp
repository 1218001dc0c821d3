#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../codes.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace pf {

extern const float kTables[3][16] = {PF_VALUES};
extern const float kBf16Tables[3][16] = {PF_BF16_VALUES};
extern const float kBf16Factors[3] = {PF_BF16_FACTORS};

// NF4: of all steps up to 2^13, that with the least error (3.6e-5). FP4 and INT4: exact.
extern const float kWordSteps[3] = {7854.0f, 8064.0f, 546.0f};

// NF4: of all steps with 8 bits, that with the least error over normally distributed weights in blocks of 64 (3.3e-3),
// where the mean error is taken off. FP4: all but the smallest value are exact.
extern const ByteTable kByteTables[3] = {
    {{-124, -86, -65, -49, -35, -23, -11, 0, 10, 20, 31, 42, 55, 70, 90, 124}, 124.12f},
    {{0, 1, 80, 120, 40, 60, 20, 30, 0, -1, -80, -120, -40, -60, -20, -30}, 120.0f},
    {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, 1.0f},
};

float kDynamicMap[256];  // set from Python, which owns the table: see set_dynamic_map in ops.cpp

Kernels generic_kernels();
#if defined(__x86_64__)
Kernels avx2_kernels();
Kernels avx512_kernels();
Kernels avx512_bf16_kernels();
Kernels avx512_bf16x2_kernels();
Kernels avx512_amx_kernels();
Int8 avx512_int8();
Int8 avx512_bf16_int8();
Int8 avx512_bf16x2_int8();
Int8 avx512_amx_int8();
#elif defined(__aarch64__)
Kernels neon_kernels();
Int8 neon_int8();
Int8 neon_dotprod_int8();
#endif

namespace {

#if defined(__x86_64__)
// Whether the CPU has AMX with bf16 and the system lets this process use it, for which it must be asked once.
bool allows_tiles() {
#if defined(__linux__)
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTile) && (d & kBf16) &&
         syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

// Or a later one of AMD's: family 1Ah and up.
bool is_zen5() {
  unsigned a, b, c, d;
  return __builtin_cpu_is("amd") && __get_cpuid(1, &a, &b, &c, &d) && (a >> 8 & 0xF) + (a >> 20 & 0xFF) >= 0x1A;
}
#endif

#if defined(__aarch64__)
bool has_dot_products() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  return true;  // Apple's
#endif
}
#endif

struct Registry {
  std::vector<Kernels> kernels;  // best first
  std::atomic<const Kernels*> active{nullptr};
#if defined(__x86_64__)
  Kernels avx2_of_int8{};  // for AVX-512 without VNNI
#endif

  const Kernels* find(const char* name) const {
    for (const Kernels& k : kernels)
      if (std::strcmp(k.name, name) == 0) return &k;
    return nullptr;
  }

  Registry() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512f = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool avx512 = avx512f && __builtin_cpu_supports("avx512vnni");
    const auto with_int8 = [](Kernels k, Int8 (*vnni)()) {
      k.int8 = vnni();
      return k;
    };
    // Every CPU with bf16 products has VNNI.
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    if (bf16 && allows_tiles()) kernels.push_back(with_int8(avx512_amx_kernels(), avx512_amx_int8));
    // Intel's vdpbf16ps takes two cycles for what two float32 multiply-adds do in one, or four products of integers.
    const bool slow_bf16 = __builtin_cpu_is("intel");
    if (avx512 && slow_bf16) kernels.push_back(with_int8(avx512_kernels(), avx512_int8));
    if (bf16) {
      const Kernels one = with_int8(avx512_bf16_kernels(), avx512_bf16_int8);
      const Kernels two = with_int8(avx512_bf16x2_kernels(), avx512_bf16x2_int8);
      kernels.push_back(is_zen5() ? two : one);
      kernels.push_back(is_zen5() ? one : two);
    }
    if (avx512 && !slow_bf16) kernels.push_back(with_int8(avx512_kernels(), avx512_int8));
    if (avx512f) {
      // Without VNNI there are no products of 16-bit integers, and those of 8 bits are AVX2's.
      Kernels k = avx512_kernels();
      k.name = "avx512f";
      avx2_of_int8 = avx2_kernels();
      k.pack_words = avx2_of_int8.pack_words = nullptr;
      k.of_int8 = &avx2_of_int8;
      kernels.push_back(k);
    }
    for (Kernels& k : kernels) {
      k.slow_bf16 = slow_bf16;
      // MKL knows AVX-512 on Intel's CPUs only (Zen 5, 576 x 1536, 672 rows: 105 GFLOP/s, these 215).
      k.outruns_mkl = __builtin_cpu_is("amd");
    }
    if (avx2) kernels.push_back(avx2_kernels());
#elif defined(__aarch64__)
    Kernels neon = neon_kernels();
    neon.int8 = has_dot_products() ? neon_dotprod_int8() : neon_int8();
    kernels.push_back(neon);
#endif
    kernels.push_back(generic_kernels());
    const char* forced = std::getenv("PYFASTPEFT_CPU_ISA");
    active = forced == nullptr || *forced == 0 ? &kernels[0] : find(forced);
  }
};

Registry& registry() {
  static Registry r;
  return r;
}

struct Buffer {
  void* data = nullptr;
  int64_t size = 0;
  int wide = 0;  // how many uses in a row needed little of it

  ~Buffer() { std::free(data); }
};

}  // namespace

std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
#define PF_FEATURE(name) \
  if (__builtin_cpu_supports(name)) found.emplace_back(name)
  PF_FEATURE("avx2");
  PF_FEATURE("fma");
  PF_FEATURE("f16c");
  PF_FEATURE("avx512f");
  PF_FEATURE("avx512bw");
  PF_FEATURE("avx512vl");
  PF_FEATURE("avx512dq");
  PF_FEATURE("avx512vnni");
  PF_FEATURE("avx512bf16");
#undef PF_FEATURE
  if (allows_tiles()) found.emplace_back("amx_bf16");
#elif defined(__aarch64__)
  found.emplace_back("neon");
  if (has_dot_products()) found.emplace_back("asimddp");
#endif
  return found;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels& k : registry().kernels) names.emplace_back(k.name);
  return names;
}
const Kernels* kernels() { return registry().active.load(std::memory_order_relaxed); }

bool set_isa(const char* name) {
  const Kernels* found = registry().find(name);
  if (found != nullptr) registry().active.store(found);
  return found != nullptr;
}

// A slot only grows, so that a step of training takes no fresh pages, until what one long input needed is seen to be
// needed no longer.
void* scratch(int slot, int64_t bytes) {
  constexpr int64_t kLarge = int64_t{32} << 20, kLittle = 8;
  constexpr int kUses = 256;
  thread_local Buffer buffers[kSlots];
  Buffer& s = buffers[slot];
  s.wide = s.size > kLarge && bytes <= s.size / kLittle ? s.wide + 1 : 0;
  if (s.size >= bytes && s.wide < kUses) return s.data;
  std::free(s.data);
  s.size = (bytes + 4095) / 4096 * 4096;
  s.data = std::aligned_alloc(4096, s.size);
  s.wide = 0;
  if (s.data == nullptr) {
    s.size = 0;
    throw std::runtime_error("not enough memory: beside its tensors an operator needs " + std::to_string(bytes) +
                             " bytes more");
  }
  return s.data;
}

}  // namespace pf
