#include "layout.h"

#include <algorithm>
#include <cstring>

namespace pf {
namespace {

// Of each half of v the nibbles at bits 0, 8, 16, 24 gathered into its lower 16 bits.
inline uint64_t gather_nibbles(uint64_t v) {
  v &= 0x0F0F0F0F0F0F0F0F;
  v = (v | v >> 4) & 0x00FF00FF00FF00FF;
  return (v | v >> 8) & 0x0000FFFF0000FFFF;
}
inline uint64_t spread_nibbles(uint64_t v) {
  v &= 0x0000FFFF0000FFFF;
  v = (v | v << 8) & 0x00FF00FF00FF00FF;
  return (v | v << 4) & 0x0F0F0F0F0F0F0F0F;
}

// Groups of columns that are converted together; K is a multiple of their columns.
constexpr int64_t kGroups = 2;

}  // namespace

void pack_tiles(const uint8_t* rows, int64_t n, int64_t k, uint8_t* tiles, int64_t tile0, int64_t tile1) {
  for (int64_t tile = tile0; tile < tile1; ++tile) {
    const int64_t row0 = tile * kTile, count = std::min<int64_t>(kTile, n - row0);
    const uint8_t* from = rows + row0 * k / 2;
    uint8_t* to = tiles + tile * k * (kTile / 2);
    for (int64_t group = 0; group < k / kGroupColumns; group += kGroups) {
      uint32_t lanes[kGroups][kTile] = {};
      for (int64_t lane = 0; lane < count; ++lane) {
        uint64_t v;
        std::memcpy(&v, from + lane * k / 2 + group * 4, sizeof(v));
        v = gather_nibbles(v >> 4) | gather_nibbles(v) << 16;
        lanes[0][lane] = static_cast<uint32_t>(v);
        lanes[1][lane] = static_cast<uint32_t>(v >> 32);
      }
      std::memcpy(to, lanes, sizeof(lanes));
      to += sizeof(lanes);
    }
  }
}

void unpack_tiles(const uint8_t* tiles, int64_t n, int64_t k, uint8_t* rows, int64_t tile0, int64_t tile1) {
  for (int64_t tile = tile0; tile < tile1; ++tile) {
    const int64_t row0 = tile * kTile, count = std::min<int64_t>(kTile, n - row0);
    const uint8_t* from = tiles + tile * k * (kTile / 2);
    uint8_t* to = rows + row0 * k / 2;
    for (int64_t group = 0; group < k / kGroupColumns; group += kGroups) {
      uint32_t lanes[kGroups][kTile];
      std::memcpy(lanes, from, sizeof(lanes));
      from += sizeof(lanes);
      for (int64_t lane = 0; lane < count; ++lane) {
        uint64_t v = lanes[0][lane] | uint64_t{lanes[1][lane]} << 32;
        v = spread_nibbles(v) << 4 | spread_nibbles(v >> 16);
        std::memcpy(to + lane * k / 2 + group * 4, &v, sizeof(v));
      }
    }
  }
}

namespace {

template <class T>
void pack_scales_as(const T* blocks, const Weight& w, T* tiles, int64_t tile0, int64_t tile1) {
  const int64_t segments = w.segments();
  const int step = __builtin_ctzll(w.segment_of(w.blocksize));
  for (int64_t tile = tile0; tile < tile1; ++tile) {
    T* to = tiles + tile * segments * kTile;
    for (int64_t lane = 0; lane < kTile; ++lane) {
      const int64_t row = tile * kTile + lane;
      for (int64_t s = 0; s < segments; ++s)
        to[s * kTile + lane] = row < w.n ? blocks[(row * segments + s) >> step] : T{};
    }
  }
}

// Walks from block to block: a division each took most of the time.
template <class T>
void unpack_scales_as(const T* tiles, const Weight& w, T* blocks, int64_t block0, int64_t block1) {
  const int64_t segments = w.segments(), step = w.segment_of(w.blocksize);
  int64_t row = block0 * step / segments, segment = block0 * step % segments;
  for (int64_t block = block0; block < block1; ++block) {
    blocks[block] = tiles[(row / kTile * segments + segment) * kTile + row % kTile];
    for (segment += step; segment >= segments; segment -= segments) ++row;
  }
}

}  // namespace

void pack_scales(const void* blocks, int size, const Weight& w, void* tiles, int64_t tile0, int64_t tile1) {
  if (size == 1)
    return pack_scales_as(static_cast<const uint8_t*>(blocks), w, static_cast<uint8_t*>(tiles), tile0, tile1);
  pack_scales_as(static_cast<const uint32_t*>(blocks), w, static_cast<uint32_t*>(tiles), tile0, tile1);
}

void unpack_scales(const void* tiles, int size, const Weight& w, void* blocks, int64_t block0, int64_t block1) {
  if (size == 1)
    return unpack_scales_as(static_cast<const uint8_t*>(tiles), w, static_cast<uint8_t*>(blocks), block0, block1);
  unpack_scales_as(static_cast<const uint32_t*>(tiles), w, static_cast<uint32_t*>(blocks), block0, block1);
}

}  // namespace pf
