// From the order of memory that files have to that of the kernels (see weight.h), and back.
#pragma once
#include "weight.h"

namespace pf {

// Codes between the two layouts.
void pack_tiles(const uint8_t* rows, int64_t n, int64_t k, uint8_t* tiles, int64_t tile0, int64_t tile1);
void unpack_tiles(const uint8_t* tiles, int64_t n, int64_t k, uint8_t* rows, int64_t tile0, int64_t tile1);

// Scales between the two layouts, elements of 1 or 4 bytes: one a block, and one a row and segment.
void pack_scales(const void* blocks, int size, const Weight& w, void* tiles, int64_t tile0, int64_t tile1);
void unpack_scales(const void* tiles, int size, const Weight& w, void* blocks, int64_t block0, int64_t block1);

}  // namespace pf
