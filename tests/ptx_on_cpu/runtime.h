// What functions of translate.py's are written in: threads, warps and blocks, memory that is checked, and instructions
// that are more than an expression.
//
// Which warp is next depends on the seed. That, shared memory and registers that begin as NaN, copies that land only
// when something waits for them, wgmma that reads shared memory as early or as late as it may, and the order of a
// block's warps make a missing wait or barrier a wrong result; a register of a wgmma in flight that another instruction
// touches is an error. Registers are bits: an instruction gives them a type.
#pragma once

#include <algorithm>
#include <array>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define PF_INLINE inline
#include "cpu/scalar.h"

namespace ptx {

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error(what); }

// ---- values --------------------------------------------------------------------------------------------------------

struct F16 {
  uint16_t held;
  F16() = default;
  F16(float v) : held(float_to_f16(v)) {}
  operator float() const { return f16_to_float(held); }
};
struct BF16 {
  uint16_t held;
  BF16() = default;
  BF16(float v) : held(float_to_bf16(v)) {}
  operator float() const { return bf16_to_float(held); }
};
// The tensor cores read the upper 19 bits.
struct TF32 {
  uint32_t held;
  operator float() const { return bits_to_float(held & ~0x1FFFu); }
};
template <class T>
struct Pair {
  T low, high;
};
template <class T>
constexpr bool is_pair = false;
template <class T>
constexpr bool is_pair<Pair<T>> = true;

// The low bytes of a register as T, and T as a register: signed integers are extended.
template <class T>
T as(uint64_t bits) {
  T v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
template <>
inline bool as<bool>(uint64_t bits) {
  return bits != 0;
}
template <class T>
uint64_t bits(T v) {
  if constexpr (std::is_integral_v<T>) return static_cast<uint64_t>(v);
  uint64_t out = 0;
  std::memcpy(&out, &v, sizeof v);
  return out;
}

template <class T, class F>
T each_half(F f, T a, T b = {}, T c = {}) {
  return {f(a.low, b.low, c.low), f(a.high, b.high, c.high)};
}
// Integers wrap: they are computed as uint64_t, whose low bits are theirs.
#define PTX_ARITHMETIC(name, op)                                               \
  template <class T>                                                           \
  T name(T a, T b) {                                                           \
    if constexpr (is_pair<T>)                                                  \
      return each_half([](auto x, auto y, auto) { return name(x, y); }, a, b); \
    else if constexpr (std::is_integral_v<T>)                                  \
      return static_cast<T>(bits(a) op bits(b));                               \
    else                                                                       \
      return a op b;                                                           \
  }
PTX_ARITHMETIC(add, +)
PTX_ARITHMETIC(sub, -)
PTX_ARITHMETIC(mul, *)
#undef PTX_ARITHMETIC

template <class T>
T fma(T a, T b, T c) {
  if constexpr (is_pair<T>)
    return each_half([](auto x, auto y, auto z) { return fma(x, y, z); }, a, b, c);
  else if constexpr (sizeof(T) == 2)
    return T(static_cast<float>(std::fma(double(float(a)), double(float(b)), double(float(c)))));
  else
    return std::fma(a, b, c);
}
template <class T>
T neg(T a) {
  if constexpr (is_pair<T>)
    return each_half([](auto x, auto, auto) { return neg(x); }, a);
  else if constexpr (std::is_integral_v<T>)
    return static_cast<T>(-bits(a));
  else
    return T(-a);
}
template <class T>
T abs(T a) {
  if constexpr (is_pair<T>)
    return each_half([](auto x, auto, auto) { return abs(x); }, a);
  else if constexpr (std::is_integral_v<T>)
    return a < 0 ? neg(a) : a;
  else
    return T(std::fabs(a));
}
// Of a number and NaN the number, as PTX has it without .NaN.
template <class T>
T min(T a, T b) {
  if constexpr (is_pair<T>)
    return each_half([](auto x, auto y, auto) { return min(x, y); }, a, b);
  else if constexpr (std::is_integral_v<T>)
    return b < a ? b : a;
  else
    return T(std::fmin(a, b));
}
template <class T>
T max(T a, T b) {
  if constexpr (is_pair<T>)
    return each_half([](auto x, auto y, auto) { return max(x, y); }, a, b);
  else if constexpr (std::is_integral_v<T>)
    return a < b ? b : a;
  else
    return T(std::fmax(a, b));
}
// With .NaN: NaN beside anything.
template <class T>
T min_or_nan(T a, T b) {
  return a != a || b != b ? T(NAN) : min(a, b);
}
template <class T>
T max_or_nan(T a, T b) {
  return a != a || b != b ? T(NAN) : max(a, b);
}
template <class T>
T div(T a, T b) {
  if constexpr (std::is_integral_v<T>)
    if (b == 0) fail("an integer is divided by zero");
  return T(a / b);
}
template <class T>
T high_product(T a, T b) {
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return static_cast<T>(static_cast<Wide>(a) * static_cast<Wide>(b) >> 8 * sizeof(T));
}
template <class T>
T shl(T a, uint32_t by) {
  return by >= 8 * sizeof(T) ? T(0) : static_cast<T>(bits(a) << by);
}
template <class T>
T shr(T a, uint32_t by) {
  const uint32_t most = 8 * sizeof(T) - 1;
  if (by > most && !std::is_signed_v<T>) return 0;
  return static_cast<T>(a >> std::min(by, most));
}
// The 64 bits high:low shifted, of which a 32-bit word is kept.
inline uint32_t funnel(uint32_t low, uint32_t high, uint32_t by, bool left, bool wraps) {
  by = wraps ? by & 31 : std::min(by, 32u);
  const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  return static_cast<uint32_t>(left ? both << by >> 32 : both >> by);
}
template <class T>
T bfe(T a, uint32_t from, uint32_t count) {
  from &= 255, count &= 255;
  if (count == 0) return 0;
  const int top = 8 * sizeof(T) - 1;
  T out = 0;
  for (int i = 0; i <= top; ++i) {
    const bool inside = i < int(count), sign = std::is_signed_v<T>;
    const int at = inside ? int(from) + i : std::min(int(from + count) - 1, top);
    const bool bit = (inside || sign) && (at <= top ? a >> at & 1 : sign && a < 0);
    out |= static_cast<T>(uint64_t(bit) << i);
  }
  return out;
}
template <class T>
T bfi(T from, T into, uint32_t at, uint32_t count) {
  at &= 255, count &= 255;
  for (uint32_t i = 0; i < count && at + i < 8 * sizeof(T); ++i) {
    const uint64_t bit = uint64_t(1) << (at + i);
    into = static_cast<T>((bits(into) & ~bit) | (bits(from) >> i & 1) << (at + i));
  }
  return into;
}
template <class T>
T reversed(T a) {
  T out = 0;
  for (uint32_t i = 0; i < 8 * sizeof(T); ++i) out |= static_cast<T>((a >> i & 1) << (8 * sizeof(T) - 1 - i));
  return out;
}
// The place of the highest bit that is no copy of the sign, or how far it is from the top; -1: there is none.
template <bool FROM_TOP, class T>
uint32_t bfind(T a) {
  const auto v = static_cast<std::make_unsigned_t<T>>(std::is_signed_v<T> && a < 0 ? ~a : a);
  for (int i = 8 * sizeof(T) - 1; i >= 0; --i)
    if (v >> i & 1) return FROM_TOP ? 8 * sizeof(T) - 1 - i : i;
  return ~0u;
}
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selection) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t chosen = selection >> 4 * i & 15, byte = both >> 8 * (chosen & 7) & 255;
    out |= (chosen & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return out;
}
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, int table) {
  uint32_t out = 0;
  for (int i = 0; i < 8; ++i)
    if (table >> i & 1) out |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return out;
}

enum class Round { nearest, zero, down, up };
// Rounds to an integer, as a double: exact for what float and double hold.
inline double round_to_integer(double v, Round how) {
  switch (how) {
    case Round::nearest:
      return std::nearbyint(v);
    case Round::zero:
      return std::trunc(v);
    case Round::down:
      return std::floor(v);
    default:
      return std::ceil(v);
  }
}
template <class To, class From>
To convert(From v, Round how) {
  if constexpr (std::is_integral_v<From>) {
    return static_cast<To>(v);
  } else if constexpr (std::is_integral_v<To>) {  // saturates; NaN is 0
    const double whole = round_to_integer(static_cast<double>(v), how);
    if (std::isnan(whole)) return 0;
    if (whole >= std::ldexp(1.0, int(8 * sizeof(To)) - std::is_signed_v<To>)) return std::numeric_limits<To>::max();
    if (whole <= static_cast<double>(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
    return static_cast<To>(whole);
  } else {
    return To(static_cast<std::conditional_t<std::is_same_v<From, double>, double, float>>(v));
  }
}
// To TF32, half away from zero.
inline uint32_t round_to_tf32(float v) {
  const uint32_t b = float_to_bits(v);
  return std::isfinite(v) ? (b + 0x1000) & ~0x1FFFu : b;
}

// ---- threads, warps, blocks ----------------------------------------------------------------------------------------

struct Dim3 {
  uint32_t x, y, z;
};

struct Block;

// Bytes that land later; what `filled` does not cover becomes zero.
struct Copy {
  char* to;
  const char* from;
  uint32_t bytes, filled;

  void land(Block& block) const;
};

constexpr int kFinished = INT_MAX;

struct Thread {
  std::vector<uint64_t> registers;
  Dim3 id{};
  uint32_t lane = 0;
  int next = 0;  // basic block
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;

  template <class T>
  T& at(uint32_t i) {
    return reinterpret_cast<T&>(registers[i]);
  }
  uint64_t local(uint32_t i) { return reinterpret_cast<uint64_t>(&registers[i]); }
  void commit() { groups.push_back(std::move(open)), open.clear(); }
  void wait(Block& block, size_t most) {
    for (; groups.size() > most; groups.pop_front())
      for (const Copy& copy : groups.front()) copy.land(block);
  }
};

struct Barrier {
  uint32_t arrived = 0;
  std::vector<struct Warp*> waiting;
};

// A register that some wgmma adds to, or reads A from: what the rules for such registers ask about.
struct MatrixRegister {
  uint64_t sum = 0, operand = 0;  // number of the last group that adds to it, that reads it
  int shape = 0;                  // of what adds to it, until a fence
  bool accessed = false;          // by another instruction since the last fence
};

struct Warp {
  Block* block = nullptr;
  const uint64_t* constants = nullptr;
  uint32_t index = 0;
  std::vector<std::unique_ptr<Thread>> threads;
  uint32_t active = 0;                      // lanes that run the present basic block
  bool waits = false;                       // at a barrier
  bool holds = false;                       // where it let the next grid start
  bool yields = false;                      // for something that another warp does
  const char* doing = "";                   // the present instruction, where it touches memory
  uint32_t cluster_phase = 0;               // in which it arrived at the cluster's barrier
  std::vector<std::function<void()>> open;  // wgmma, in the order of issue
  std::deque<std::vector<std::function<void()>>> groups;
  uint64_t finished_groups = 0;
  std::vector<MatrixRegister> matrix;

  // The basic block that comes next, or kFinished.
  int begin() {
    int lowest = kFinished;
    for (const auto& t : threads) lowest = std::min(lowest, t->next);
    active = 0;
    for (const auto& t : threads) active |= uint32_t(t->next == lowest) << t->lane;
    return lowest;
  }
  bool finished() const {
    return std::all_of(threads.begin(), threads.end(), [](const auto& t) { return t->next == kFinished; });
  }
  uint32_t alive() const {
    uint32_t lanes = 0;
    for (const auto& t : threads) lanes |= uint32_t(t->next != kFinished) << t->lane;
    return lanes;
  }
  void fence() {
    for (MatrixRegister& r : matrix) {
      r.accessed = false;
      if (r.sum <= finished_groups) r.shape = 0;
    }
  }
  // An instruction that is no wgmma reads or writes a matrix register.
  void access(int which, bool writes) {
    MatrixRegister& r = matrix[which];
    if (r.sum > finished_groups) fail("wgmma: a sum is accessed before wgmma.wait_group");
    if (writes && r.operand > finished_groups) fail("wgmma: an operand is written before wgmma.wait_group");
    r.accessed = true;
  }
  // A wgmma begins to use one.
  void use(int which, bool adds, int shape) {
    MatrixRegister& r = matrix[which];
    if (r.accessed) fail("wgmma: a register was accessed after the last wgmma.fence");
    if ((adds ? r.operand : r.sum) > finished_groups) fail("wgmma: a register is both a sum and an operand");
    (adds ? r.sum : r.operand) = finished_groups + groups.size() + 1;
    if (!adds) return;
    if (r.shape != 0 && r.shape != shape) fail("wgmma: a sum of another shape without wgmma.fence");
    r.shape = shape;
  }
  void commit() { groups.push_back(std::move(open)), open.clear(); }
  void wait(size_t most) {
    for (; groups.size() > most; groups.pop_front(), ++finished_groups)
      for (auto& operation : groups.front()) operation();
  }
  void arrive(uint32_t barrier, uint32_t count, bool stays);
  void arrive_in_cluster();
  void wait_in_cluster();
  void let_next_grid_start();
};

// Blocks that read one another's shared memory; null: it ended.
struct Cluster {
  std::vector<Block*> blocks;
  uint32_t arrived = 0, phase = 0;
  std::vector<Warp*> waiting;

  void open_full();
};

struct Range {
  uint64_t begin, end;
};

constexpr uint32_t kSharedBase = 1024;  // as SHARED_BASE in translate.py

// A launch.
struct Grid {
  std::vector<Range> memory;  // what it may touch
  bool holds = true;          // where it lets the next grid start

  virtual ~Grid() = default;
  // What came before in the stream has ended.
  virtual void wait_for_previous() = 0;
};

struct Block {
  Dim3 id{}, size{}, grid{};
  const char* parameters = nullptr;
  uint32_t parameter_bytes = 0;
  uint32_t seed = 0, draws = 0;
  Grid* of = nullptr;
  std::shared_ptr<Cluster> cluster;
  uint32_t rank = 0;  // in the cluster
  bool lets_next_start = false;
  std::vector<char> held;
  char* shared_memory = nullptr;  // aligned as the swizzled layouts of wgmma and TMA want it
  uint32_t shared_bytes = 0;
  std::vector<char> async;  // shared memory as wgmma sees it: without stores that no fence followed. Empty: no wgmma
  std::vector<Range> unfenced;  // of shared memory
  std::vector<std::unique_ptr<Warp>> warps;
  std::map<uint32_t, Barrier> barriers;
  std::deque<std::function<void()>> in_flight;  // bulk copies

  char* shared(uint32_t address, uint32_t bytes) const {
    if (address % bytes != 0)
      fail("shared memory: " + std::to_string(address) + " is not a multiple of " + std::to_string(bytes));
    return shared_span(address, bytes);
  }
  char* shared_span(uint32_t address, uint32_t bytes) const {
    if (address < kSharedBase || address + uint64_t(bytes) > uint64_t(kSharedBase) + shared_bytes)
      fail("shared memory: " + std::to_string(bytes) + " bytes at " + std::to_string(int64_t(address) - kSharedBase) +
           " of " + std::to_string(shared_bytes));
    return shared_memory + (address - kSharedBase);
  }
  char* generic(uint64_t address, uint32_t bytes) const {
    if (address % bytes != 0) fail("memory: an address is not a multiple of " + std::to_string(bytes));
    return generic_span(address, bytes);
  }
  char* generic_span(uint64_t address, uint64_t bytes) const {
    const auto inside = [&](uint64_t begin, uint64_t end) {
      return address >= begin && address < end && bytes <= end - address;
    };
    for (const Block* block : cluster->blocks) {
      if (block == nullptr) continue;
      const uint64_t own = reinterpret_cast<uint64_t>(block->shared_memory);
      if (inside(own, own + shared_bytes)) return reinterpret_cast<char*>(address);
    }
    uint64_t behind = UINT64_MAX;
    for (const Range& r : of->memory) {
      if (inside(r.begin, r.end)) return reinterpret_cast<char*>(address);
      if (address + bytes > r.end) behind = std::min(behind, address + bytes - r.end);
    }
    fail("global memory: " + std::to_string(bytes) + " bytes outside every tensor, the last " + std::to_string(behind) +
         " behind the end of the nearest");
  }
  uint64_t to_generic(uint32_t address) const {
    return reinterpret_cast<uint64_t>(shared_memory) + address - kSharedBase;
  }
  uint32_t to_shared(uint64_t address) const {
    return static_cast<uint32_t>(address - reinterpret_cast<uint64_t>(shared_memory)) + kSharedBase;
  }

  Block& other(uint32_t rank_there) {
    if (rank_there >= cluster->blocks.size()) fail("a block beyond the cluster");
    if (cluster->blocks[rank_there] == nullptr) fail("shared memory of a block that ended");
    return *cluster->blocks[rank_there];
  }
  // Addresses in the shared memory of a cluster have the rank in the upper byte, counted from one; zero: this block's.
  static uint32_t in_cluster(uint32_t address, uint32_t rank_there) { return address | (rank_there + 1) << 24; }
  Block& owner(uint32_t address) { return address >> 24 == 0 ? *this : other((address >> 24) - 1); }
  static uint32_t within(uint32_t address) { return address & 0xFFFFFF; }

  // How far a pointer is into shared memory, if it is.
  bool offset_of(const char* at, uint32_t* offset) const {
    *offset = static_cast<uint32_t>(at - shared_memory);
    return at >= shared_memory && at < shared_memory + shared_bytes;
  }
  // Of stores, which wgmma sees after a fence, and of copies, which it sees at once.
  void wrote(const char* at, uint32_t bytes) {
    uint32_t offset;
    if (async.empty() || !offset_of(at, &offset)) return;
    std::memset(async.data() + offset, 0xFF, bytes);
    unfenced.push_back({offset, offset + bytes});
  }
  void landed(const char* at, uint32_t bytes) {
    uint32_t offset;
    if (!async.empty() && offset_of(at, &offset)) std::memcpy(async.data() + offset, at, bytes);
  }
  void fence_async() {
    for (const auto [begin, end] : unfenced) landed(shared_memory + begin, end - begin);
    unfenced.clear();
  }
  // One of n; with seed 0 always the first.
  uint32_t draw(uint32_t n) { return seed == 0 ? 0 : ((seed + draws++) * 2654435761u >> 16) % n; }
  // Whether what may happen at once or later happens at once: with seed 0 never, with seed 1 always.
  bool at_once() { return seed == 1 || draw(2) == 1; }

  uint32_t alive() const {
    uint32_t threads = 0;
    for (const auto& w : warps) threads += __builtin_popcount(w->alive());
    return threads;
  }
  // Opens barriers whose threads are all there; those that finished count for barriers of the whole block.
  void open_full(uint32_t barrier, uint32_t count) {
    Barrier& b = barriers[barrier];
    if (b.arrived < (count != 0 ? count : alive()) || b.arrived == 0) return;
    for (Warp* w : b.waiting) w->waits = false;
    b = {};
  }
};

inline void Copy::land(Block& block) const {
  std::memcpy(to, from, filled);
  std::memset(to + filled, 0, bytes - filled);
  block.landed(to, bytes);
}

inline void Cluster::open_full() {
  uint32_t alive = 0;
  for (const Block* block : blocks) alive += block == nullptr ? 0 : block->alive();
  if (arrived < alive || arrived == 0) return;
  for (Warp* w : waiting) w->waits = false;
  arrived = 0, phase += 1, waiting.clear();
}
inline void Warp::arrive_in_cluster() {
  Cluster& cluster = *block->cluster;
  cluster.arrived += __builtin_popcount(active), cluster_phase = cluster.phase;
  cluster.open_full();
}
inline void Warp::wait_in_cluster() {
  Cluster& cluster = *block->cluster;
  if (cluster.phase != cluster_phase) return;
  waits = true;
  cluster.waiting.push_back(this);
}
inline void Warp::let_next_grid_start() {
  block->lets_next_start = true;
  waits = holds = block->of->holds;
}
inline void Warp::arrive(uint32_t barrier, uint32_t count, bool stays) {
  if (active != alive()) fail("bar.sync in code where the lanes of a warp diverged");
  Barrier& b = block->barriers[barrier];
  b.arrived += 32;
  if (count == 0) b.arrived += __builtin_popcount(active) - 32;
  waits = stays;
  if (stays) b.waiting.push_back(this);
  block->open_full(barrier, count);
}

template <class T>
T load(const char* at) {
  T v;
  std::memcpy(&v, at, sizeof v);
  return v;
}
template <class T>
void store(char* at, T v) {
  std::memcpy(at, &v, sizeof v);
}
// One thread runs at a time, so a read and a write are together atomic.
template <class T, class F>
T update(char* at, F next) {
  const T old = load<T>(at);
  store<T>(at, next(old));
  return old;
}

// ---- instructions of a warp ----------------------------------------------------------------------------------------
// Operands of lane i are in[i], results out[i]; both are 32-bit registers.

template <int N>
using Lanes = std::array<std::array<uint32_t, N>, 32>;

inline bool in_mask(uint32_t lanes, int lane) { return lanes >> lane & 1; }
inline void need_all(uint32_t active, const char* what) {
  if (active != ~0u) fail(std::string(what) + " without all lanes of its warp");
}

// in: value, second operand, clamp and segment mask; out: value, predicate.
inline void shuffle(uint32_t active, char mode, const Lanes<3>& in, Lanes<2>& out) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!in_mask(active, lane)) continue;
    const int by = in[lane][1] & 31, clamp = in[lane][2] & 31, segment = in[lane][2] >> 8 & 31;
    const int first = lane & segment, last = first | (clamp & ~segment);
    int from = mode == 'i' ? first | (by & ~segment) : mode == 'b' ? lane ^ by : mode == 'd' ? lane + by : lane - by;
    const bool valid = mode == 'u' ? from >= last : from <= last;
    if (!valid) from = lane;
    if (!in_mask(active, from)) fail("shfl.sync from a lane that does not take part");
    out[lane] = {in[from][0], valid};
  }
}

inline uint32_t ballot(uint32_t active, const Lanes<1>& in) {
  uint32_t lanes = 0;
  for (int lane = 0; lane < 32; ++lane) lanes |= uint32_t(in_mask(active, lane) && in[lane][0]) << lane;
  return lanes;
}

// Lane i reads row i % 8 of matrix i / 8 from the address in lane i, and gets two elements of each matrix.
template <int N>
void load_matrices(const Block& block, uint32_t active, bool transposed, const Lanes<1>& in, Lanes<N>& out) {
  need_all(active, "ldmatrix");
  for (int i = 0; i < N; ++i)
    for (int lane = 0; lane < 32; ++lane) {
      const auto element = [&](int row, int column) -> uint32_t {
        return load<uint16_t>(block.shared(in[8 * i + row][0], 16) + 2 * column);
      };
      const int r = lane / 4, c = lane % 4 * 2;
      out[lane][i] = transposed ? element(c, r) | element(c + 1, r) << 16 : element(r, c) | element(r, c + 1) << 16;
    }
}
// in: the address, then N registers.
template <int N>
void store_matrices(Block& block, uint32_t active, bool transposed, const Lanes<N + 1>& in) {
  need_all(active, "stmatrix");
  for (int i = 0; i < N; ++i)
    for (int lane = 0; lane < 32; ++lane)
      for (int half = 0; half < 2; ++half) {
        int row = lane / 4, column = lane % 4 * 2 + half;
        if (transposed) std::swap(row, column);
        char* const at = block.shared(in[8 * i + row][0], 16) + 2 * column;
        store<uint16_t>(at, in[lane][1 + i] >> 16 * half);
        block.wrote(at, 2);
      }
}

// Fragments of mma and wgmma, E the type of A's and B's elements, of which a register holds `per`.
template <class E>
struct Fragment {
  static constexpr int per = 4 / sizeof(E);
  static constexpr int depth = 8 * per;

  static float element(uint32_t held, int i) { return static_cast<float>(as<E>(held >> (i * 8 * sizeof(E) % 32))); }
  // Rows 0 to 15 of A from the four registers of each lane.
  template <class Registers>
  static void unpack_a(const Registers& in, std::array<std::array<float, depth>, 16>& a) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < per; ++j)
          a[lane / 4 + 8 * (i & 1)][(lane % 4 + 4 * (i >> 1)) * per + j] = element(in[lane][i], j);
  }
};
// The row of D within a warp's 16, and the column within eight, of register i (of four) of a lane.
inline int d_row(int lane, int i) { return lane / 4 + 8 * (i >> 1 & 1); }
inline int d_column(int lane, int i) { return lane % 4 * 2 + (i & 1); }

// D [16, 8] = A [16, depth] * B [depth, 8] + C, in float32. in: A (4), B (2), C (4).
template <class E>
void mma(uint32_t active, const Lanes<10>& in, Lanes<4>& out) {
  need_all(active, "mma");
  using F = Fragment<E>;
  std::array<std::array<float, F::depth>, 16> a;
  float b[F::depth][8];
  F::unpack_a(in, a);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < F::per; ++j) b[(lane % 4 + 4 * i) * F::per + j][lane / 4] = F::element(in[lane][4 + i], j);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      float sum = 0;
      for (int k = 0; k < F::depth; ++k) sum += a[d_row(lane, i)][k] * b[k][d_column(lane, i)];
      out[lane][i] = float_to_bits(bits_to_float(in[lane][6 + i]) + sum);
    }
}

// A matrix descriptor of wgmma: core matrices in shared memory, swizzled.
struct Descriptor {
  uint64_t held;

  // Of an element `size` bytes wide at (row, k); `major`: rows lie side by side rather than k.
  uint32_t address(int row, int k, int size, bool major) const {
    const uint32_t start = (held & 0x3FFF) << 4, leading = (held >> 16 & 0x3FFF) << 4,
                   stride = (held >> 32 & 0x3FFF) << 4;
    if (held >> 49 & 7) fail("wgmma: a base offset in a descriptor");
    if (held & 0x3FF1C000C000C000) fail("wgmma: a bit in a descriptor that means nothing");
    const int mode = held >> 62, width = mode == 0 ? 16 : 256 >> mode, per = width / size;
    uint32_t at = start;
    if (!major)
      at += row / 8 * stride + row % 8 * width + k / per * leading + k % per * size;
    else if (mode != 0)
      at += row / per * leading + k / 8 * stride + k % 8 * width + row % per * size;
    else
      at += row / per * stride + k / 8 * leading + k % 8 * width + row % per * size;
    const uint32_t mask = mode == 0 ? 0 : 8 / (1 << (mode - 1)) - 1;
    return at ^ (at >> 7 & mask) << 4;
  }
};

inline uint32_t swizzled_128(uint32_t at) { return at ^ (at >> 7 & 7) << 4; }

// One warp's part, 16 rows, of a warp group's D [64, n] = A [64, depth] * B [depth, n] (+ D). What it takes from shared
// memory it reads when it is issued or when somebody waits for it: each is as early or as late as hardware may.
template <class E, int N>
struct Wgmma {
  using F = Fragment<E>;
  Warp* warp;
  bool a_in_registers, a_major, b_major;
  bool adds = true;
  Lanes<4> a_registers{};
  Descriptor a{}, b{};
  std::array<std::array<uint32_t*, N / 2>, 32> d{};
  std::array<std::array<float, F::depth>, 16> left{};
  std::array<std::array<float, N>, F::depth> right{};

  void read() {
    const Block& block = *warp->block;
    const auto element = [&](Descriptor from, int row, int k, bool major) {
      const char* at = block.shared(from.address(row, k, sizeof(E), major), sizeof(E));
      return static_cast<float>(load<E>(block.async.data() + (at - block.shared_memory)));
    };
    if (a_in_registers)
      F::unpack_a(a_registers, left);
    else
      for (int r = 0; r < 16; ++r)
        for (int k = 0; k < F::depth; ++k) left[r][k] = element(a, warp->index % 4 * 16 + r, k, a_major);
    for (int k = 0; k < F::depth; ++k)
      for (int c = 0; c < N; ++c) right[k][c] = element(b, c, k, b_major);
  }
  void add() const {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < N / 2; ++i) {
        float sum = 0;
        for (int k = 0; k < F::depth; ++k) sum += left[d_row(lane, i)][k] * right[k][i / 4 * 8 + d_column(lane, i)];
        *d[lane][i] = float_to_bits((adds ? bits_to_float(*d[lane][i]) : 0.0f) + sum);
      }
  }
  // Of matrix registers: those of D, then those of A.
  void issue(const uint32_t* registers) {
    for (int i = 0; i < N / 2 + 4 * a_in_registers; ++i) warp->use(registers[i], i < N / 2, N * 64 + F::depth);
    auto held = std::make_shared<Wgmma>(*this);
    const bool early = warp->block->at_once();
    if (early) held->read();
    warp->open.push_back([held, early] {
      if (!early) held->read();
      held->add();
    });
  }
};

// ---- mbarrier, bulk copies -----------------------------------------------------------------------------------------

struct MBarrier {
  int32_t bytes;  // expected and not yet there
  uint16_t pending, count : 15, phase : 1;

  static MBarrier& at(Block& block, uint32_t address) {
    return *reinterpret_cast<MBarrier*>(block.owner(address).shared(Block::within(address), 8));
  }
  void begin(uint32_t arrivals) { *this = {0, uint16_t(arrivals), uint16_t(arrivals), 0}; }
  void change(int arrivals, int more_bytes) {
    if (arrivals > pending) fail("mbarrier: more arrivals than it counts");
    pending -= arrivals, bytes += more_bytes;
    if (pending == 0 && bytes == 0) phase ^= 1, pending = count;
  }
};
static_assert(sizeof(MBarrier) == 8);

// Whether the phase of this parity is over. Where not, one copy lands (any order is legal), and others go on.
inline bool try_wait(Warp& warp, uint32_t address, uint32_t parity) {
  Block& block = *warp.block;
  const auto over = [&] { return MBarrier::at(block, address).phase != (parity & 1); };
  if (!over() && !block.in_flight.empty()) {
    auto landing = block.in_flight.begin() + block.draw(block.in_flight.size());
    (*landing)();
    block.in_flight.erase(landing);
  }
  warp.yields |= !over();
  return over();
}
inline void send(Block& block, uint32_t to, uint32_t bytes, uint32_t barrier, std::function<void(char*)> bring) {
  char* const into = block.shared_span(to, bytes);
  std::memset(into, 0xFF, bytes);
  block.landed(into, bytes);
  block.in_flight.push_back([=, &block] {
    bring(into);
    block.landed(into, bytes);
    MBarrier::at(block, barrier).change(0, -int(bytes));
  });
}
inline void bulk_copy(Block& block, uint32_t to, uint64_t from, uint32_t bytes, uint32_t barrier) {
  if ((to | from | bytes) % 16 != 0) fail("cp.async.bulk: addresses and size must be multiples of 16");
  const char* const source = block.generic_span(from, bytes);
  send(block, to, bytes, barrier, [=](char* into) { std::memcpy(into, source, bytes); });
}
// What cudart.cpp makes of a matrix for TMA; it lies among a kernel's parameters. Boxes have rows of 128 bytes.
struct TensorMap {
  uint64_t mark, base;
  int64_t rows, row_bytes, pitch;
  uint32_t element, box_rows;

  static constexpr uint64_t kMark = 0x70616d2061206d61;
};
// The box at (column, row), swizzled, zero where it leaves the matrix, into each block of `blocks`.
inline void tensor_copy(Block& block, uint32_t to, uint64_t map_at, int32_t column, int32_t row, uint32_t barrier,
                        uint32_t blocks) {
  const uint64_t offset = map_at - reinterpret_cast<uint64_t>(block.parameters);
  if (offset % 64 != 0 || offset + 128 > block.parameter_bytes) fail("cp.async.bulk.tensor: no tensor map is there");
  const auto map = load<TensorMap>(block.parameters + offset);
  if (map.mark != TensorMap::kMark) fail("cp.async.bulk.tensor: no tensor map is there");
  if (to % 128 != 0) fail("cp.async.bulk.tensor: the address must be a multiple of 128");
  if (blocks == 0) fail("cp.async.bulk.tensor: for no block");
  for (uint32_t rank = 0; blocks >> rank != 0; ++rank) {
    if (!in_mask(blocks, rank)) continue;
    send(block.other(rank), to, map.box_rows * 128, barrier, [=, &block](char* into) {
      for (int64_t r = 0; r < map.box_rows; ++r)
        for (int chunk = 0; chunk < 8; ++chunk) {
          char* const there = into - to + swizzled_128(to + r * 128 + chunk * 16);
          const int64_t from = int64_t(column) * map.element + chunk * 16, i = row + r;
          std::memset(there, 0, 16);
          const int64_t begin = std::max<int64_t>(from, 0), end = std::min(from + 16, map.row_bytes);
          if (i < 0 || i >= map.rows || begin >= end) continue;
          std::memcpy(there + (begin - from), block.generic_span(map.base + i * map.pitch + begin, end - begin),
                      end - begin);
        }
    });
  }
}
// The thread's arrival at a barrier once its copies landed: together they are in flight.
inline void arrive_after_copies(Block& block, Thread& t, uint32_t barrier, bool counted) {
  std::vector<Copy> copies = std::move(t.open);
  t.open.clear();
  for (auto& group : t.groups) copies.insert(copies.end(), group.begin(), group.end()), group.clear();
  if (!counted) MBarrier::at(block, barrier).pending += 1;
  block.in_flight.push_back([=, &block] {
    for (const Copy& copy : copies) copy.land(block);
    MBarrier::at(block, barrier).change(1, 0);
  });
}

// Loops over the lanes of `active` that translated code stands in.
#define EACH_LANE                                                                                           \
  for (uint32_t left = active, lane = 0; left != 0 && (lane = __builtin_ctz(left), true); left &= left - 1) \
    if (Thread& t = *w.threads[lane]; true)
// Narrows `active` to the lanes of a predicate.
#define ONLY_LANES(predicate)  \
  const uint32_t all = active; \
  uint32_t active = all;       \
  EACH_LANE if (!(predicate)) active &= ~(1u << lane);

}  // namespace ptx
