// What all kernels with a LoRA branch ask of it.
#pragma once
#include "api.h"
#include "device.cuh"

namespace pf {

// Slot of row m of x; -1: none.
PF_DEVICE int slot_of(const PfLora& lora, int64_t m) {
  const int64_t slot = lora.rows == nullptr ? 0 : __ldg(lora.rows + m);
  return slot >= 0 && slot < lora.slots ? static_cast<int>(slot) : -1;
}

}  // namespace pf
