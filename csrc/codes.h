// The values of the 4-bit codes, for the kernels of CPUs and of GPUs. pyfastpeft/formats/codes.py has them once more,
// as the reference that the kernels are held to.
#pragma once

// clang-format off
// Dettmers et al. 2023 (QLoRA), appendix E.
#define PF_NF4_VALUES \
  -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, \
  -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, \
  0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f
// In bit-pattern order, already divided by 12.
#define PF_FP4_VALUES \
  0.0f, 0.0625f / 12, 8.0f / 12, 12.0f / 12, 4.0f / 12, 6.0f / 12, 2.0f / 12, 3.0f / 12, 0.0f, -0.0625f / 12, \
  -8.0f / 12, -12.0f / 12, -4.0f / 12, -6.0f / 12, -2.0f / 12, -3.0f / 12
// The code itself.
#define PF_INT4_VALUES 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
// By pf::Format.
#define PF_VALUES {PF_NF4_VALUES}, {PF_FP4_VALUES}, {PF_INT4_VALUES}

// NF4 in bf16. Four values are not the nearest but their other neighbours: of the nearest most are too large, and where
// x has a mean that adds up, with the root of the columns (1.9e-2 at 2048). Of all such choices, the least mean error
// over weights distributed normally or evenly, in blocks of 32 to 4096 (8e-6 of their deviation). FP4's errors cancel.
#define PF_NF4_BF16_VALUES \
  -1.0f, -0.6953125f, -0.52734375f, -0.39453125f, -0.28515625f, -0.1845703125f, -0.09130859375f, 0.0f, \
  0.0791015625f, 0.1611328125f, 0.24609375f, 0.33984375f, 0.44140625f, 0.5625f, 0.72265625f, 1.0f
// clang-format on
