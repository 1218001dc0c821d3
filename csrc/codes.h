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

// What products in bf16 take where scales multiply their sums: the values times a factor, in bf16; what is summed or
// its scales are divided by it. With 3/4 FP4's are exact. NF4's roundings would add up where x has a mean, with the root
// of the columns, if they had one: of all factors, with each value rounded up or down, these have the least error of y
// over 8192 columns of x with a mean as large as its deviation, for weights that are normal, uniform, Laplace, Student's
// t, with outliers or pruned, in blocks of 32 to 4096. Their mean error is 6e-6 of the weights' deviation in the median
// and 7e-5 at most, their root mean square 2.7e-3 at most (without a factor at best 1e-4, 2e-4 and 4.8e-3).
#define PF_NF4_BF16_VALUES \
  -1.0234375f, -0.71484375f, -0.5390625f, -0.404296875f, -0.291015625f, -0.1884765625f, -0.09326171875f, 0.0f, \
  0.08154296875f, 0.1640625f, 0.251953125f, 0.345703125f, 0.451171875f, 0.578125f, 0.7421875f, 1.0234375f
#define PF_FP4_BF16_VALUES \
  0.0f, 0.0625f / 16, 8.0f / 16, 12.0f / 16, 4.0f / 16, 6.0f / 16, 2.0f / 16, 3.0f / 16, 0.0f, -0.0625f / 16, \
  -8.0f / 16, -12.0f / 16, -4.0f / 16, -6.0f / 16, -2.0f / 16, -3.0f / 16
// By pf::Format.
#define PF_BF16_VALUES {PF_NF4_BF16_VALUES}, {PF_FP4_BF16_VALUES}, {PF_INT4_VALUES}
#define PF_BF16_FACTORS 1.0243f, 0.75f, 1.0f
// clang-format on
