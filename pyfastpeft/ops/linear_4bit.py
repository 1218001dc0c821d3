"""``linear_4bit``: y = x · dequant(W)ᵀ + bias + ((dropout(x) · Aᵀ) ∘ scale) · Bᵀ, W packed in 4 bits, one operator.

Forward saves x where A trains and S = dropout(x) · Aᵀ [M, R] in float32 where B does; the dropout mask is a hash of a
seed and the element's position, recomputed where it is needed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..formats import Packed4bit
from ..formats.handles import BranchHandle
from ..formats.packed import FLOATS, Operands
from . import cuda_kernels, mixed, reference, triton_kernels
from . import slabs as slabs  # registers its operators
from .autocast import autocast_dtype
from .backends import Backend, as_rows, choose, native
from .checks import check_dropout, check_factor, check_floats, check_tensor, is_among
from .memory import Arena
from .tracing import followed, forward_mode, is_compiling, recorded, traced

_FLOATS = "float32, bfloat16 or float16"


class Lora(NamedTuple):
    """The LoRA branch of a linear: adds ``((dropout(x) · aᵀ) ∘ scaling) · bᵀ``.

    Attributes:
        a: [R, K], float32, bfloat16 or float16.
        b: [N, R], likewise.
        scaling: a number, or a tensor [] or [R]; or [rows, R] where each row of x has its own (several adapters,
            stacked along R, are then mixed in one batch: zero switches one off for a row, whatever it holds). A
            constant.
        dropout: probability with which an element of x is dropped on its way into ``a``, below 1.
    """

    a: Tensor
    b: Tensor
    scaling: float | Tensor = 1.0
    dropout: float = 0.0


class PackedLora(NamedTuple):
    """A LoRA branch for inference, from :func:`pack_lora`: A and B also in bf16, in the order the kernels read.

    Used where x is bfloat16 and nothing is recorded for autograd; elsewhere ``a`` and ``b`` are.

    Attributes:
        a, b, scaling: as in :class:`Lora`.
        a_pairs, b_pairs: bfloat16 [ceil(rows / 16), ceil(columns / 2), 16, 2] of A and of B.
        shape: (N, K).
        handle: by which compiled inference names the pairs.
    """

    a: Tensor
    b: Tensor
    scaling: float | Tensor
    a_pairs: Tensor
    b_pairs: Tensor
    shape: tuple[int, int]
    handle: BranchHandle

    def __reduce__(self) -> tuple:
        return pack_lora, self[:3]


def pack_lora(a: Tensor, b: Tensor, scaling: float | Tensor = 1.0) -> PackedLora:
    """Prepare an adapter for inference on the CPU; a copy, so pack again after ``a`` or ``b`` changed.

    Args:
        a: [R, K].   b: [N, R].   scaling: as in :class:`Lora`.

    Raises:
        TypeError: ``a`` or ``b`` is no tensor, ``scaling`` neither a number nor a tensor.
        ValueError: ``a`` or ``b`` of another shape or dtype, or not on the CPU.
    """
    check_factor("lora scaling", scaling)
    for name, t in (("a", a), ("b", b)):
        check_tensor(f"lora {name}", t)
        if t.dim() != 2 or t.dtype not in FLOATS or t.device.type != "cpu":
            what = f"{t.dtype} of shape {tuple(t.shape)} on {t.device}"
            raise ValueError(f"lora {name} is {what}; it must be a floating-point matrix on the CPU")
    if a.shape[0] < 1 or a.shape[0] != b.shape[1]:
        raise ValueError(f"lora A is {tuple(a.shape)}, B {tuple(b.shape)}; they must be [r, K] and [N, r], r >= 1")
    pairs = [_in_pairs(t, _ARENA.empty(_pairs_shape(t), torch.bfloat16)) for t in (a, b)]
    shape = b.shape[0], a.shape[1]
    handle = BranchHandle(torch.ops.pyfastpeft.hold_branch.default(*pairs, *shape))
    return PackedLora(a, b, scaling, *pairs, shape, handle)


def repack_lora(packed: PackedLora | None, a: Tensor, b: Tensor) -> PackedLora:
    """:func:`pack_lora`, into the memory of ``packed`` where that is of these shapes: a third of the time.

    Whoever has ``packed`` computes with ``a`` and ``b`` from then on.
    """
    if packed is None or packed.shape != (len(b), a.shape[1]) or packed.a.shape != a.shape:
        return pack_lora(a, b)
    with _REPACKING:  # who comes last must have read last: another thread may be here with what a and b were before
        _in_pairs(a, packed.a_pairs)
        _in_pairs(b, packed.b_pairs)
    return packed._replace(a=a, b=b)


def _pairs_shape(t: Tensor) -> tuple[int, int, int, int]:
    rows, columns = t.shape
    return (rows + 15) // 16, (columns + 1) // 2, 16, 2


def of_pairs(row_scale: Tensor, rank: int) -> Tensor:
    """The factors [..., R] of A and B in pairs, whose rank is made even."""
    return pad(row_scale, (0, 1)) if rank % 2 else row_scale


def _in_pairs(t: Tensor, out: Tensor) -> Tensor:
    torch.ops.pyfastpeft.pack_pairs.default(t.detach(), out)
    return out


_ARENA, _REPACKING = Arena(), threading.Lock()


class BankView(NamedTuple):
    """Adapters in numbered slots, chosen row by row: for callers of the operator. (Models take stacked adapters, a
    :class:`Lora` whose ``scaling`` is [rows, R], as a row may use several.)

    Attributes:
        a: [slots, r, K].   b: [slots, N, r].   scaling: [slots], constants.
        rows: int64 [rows of x], the slot of each row; -1 is the base model alone. (On a GPU so is any number that is
            no slot's.)
    """

    a: Tensor
    b: Tensor
    scaling: Tensor
    rows: Tensor

    def stacked(self) -> Lora:
        """The slots side by side along R, each row of x scaled by its own slot's scaling and by zero elsewhere."""
        slots, r, k = self.a.shape
        chosen = self.rows.unsqueeze(1) == torch.arange(slots, device=self.rows.device)
        scale = mixed.zero_unless(chosen, self.scaling.float()).repeat_interleave(r, dim=1)
        return Lora(self.a.reshape(slots * r, k), self.b.transpose(0, 1).reshape(-1, slots * r), scale)


class Branch(NamedTuple):
    """A LoRA branch as the operators take it, in the order of their schemas.

    Attributes:
        a, b: as in :class:`Lora`; None without a branch.
        row_scale: float32 [R], or [rows, R] where the rows of x choose among adapters; None: all ones.
        scaling: multiplies S beside ``row_scale``.
        seed: int64 [1], of the dropout mask; None without dropout.
        dropout: as in :class:`Lora`.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    row_scale: Tensor | None = None
    scaling: float = 1.0
    seed: Tensor | None = None
    dropout: float = 0.0


_NO_BRANCH = Branch()
_OF_BANK = tuple(f"{name} of the bank" for name in BankView._fields)
AnyLora = Lora | PackedLora | BankView | tuple
_HELD = torch.ops.pyfastpeft.linear_4bit_held.default
# The longest block whose values 8 bits hold to the int8 tier's error: those of longer ones crowd around zero.
_INT8_BLOCKSIZE = 256


def linear_4bit(
    x: Tensor,
    w: Packed4bit,
    bias: Tensor | None = None,
    lora: AnyLora | None = None,
    compute: str | None = None,
) -> Tensor:
    """Linear layer with 4-bit weights and the LoRA branch in the same pass.

    Args:
        x: [..., K], float32, bfloat16 or float16, any strides.
        w: packed weight of shape (N, K), on x's device.
        bias: [N] or None.
        lora: None, ``(A [r, K], B [N, r], scaling)``, a :class:`Lora`, a :class:`PackedLora`, or a :class:`BankView`
            with one slot number a row of x (rows counted over all leading dimensions).
        compute: None for the exact product; ``"int8"`` allows x and the weight to be rounded to 8 bits on their way
            into it (relative error about 7e-3 where x and the weight are spread normally, up to 1.5e-2 of a single row
            of a small K, a few times that where single columns are far larger than the rest; the LoRA branch and the
            bias stay exact), for inference only. Where there is no such kernel (blocks longer than 256, other devices),
            or nothing to gain by it (in bfloat16, up to two or three rows on CPUs with bf16 products, more than ten on
            those with AMX, more than eight on those with AVX2 alone), the product is exact.

    Returns:
        [..., N] in x's dtype. Products accumulate in float32. Differentiable in x, bias, A and B.

    Raises:
        TypeError, ValueError: the argument at fault, what it was and what it must be.
    """
    if not torch.is_grad_enabled() and not forward_mode():
        y = _inference(x, w, bias, lora, compute)
        if y is not None:
            return y
    n, k = _check(x, w, bias)
    if compute is not None:
        check_compute(compute)
    dtype = autocast_dtype(w.device)
    if dtype is not None:
        x = x.to(dtype)
    x2 = x if x.dim() == 2 else as_rows(x)
    if isinstance(lora, BankView):
        _check_bank(lora, x2, n, k)
        if not needs_grad(x, bias, lora):
            kernels = _WITH_SLOTS.get(choose(w, x2.shape[0], x2.dtype, infers=True))
            if kernels is not None:
                y = kernels.forward_slots(x2, w, bias, *lora)
                return y if x.dim() == 2 else y.view(*x.shape[:-1], n)
        lora = lora.stacked()
    a = b = row_scale = seed = None
    scaling, dropout = 1.0, 0.0
    if lora is not None:
        if type(lora) is PackedLora:
            a, b, scaling = lora.a, lora.b, lora.scaling
        else:
            a, b, scaling, dropout = _as_lora(lora)
        # What pack_lora has looked at needs no second look, only whether it belongs here.
        if type(lora) is not PackedLora or isinstance(scaling, Tensor) or lora.shape != w.shape:
            _check_lora(x2, a, b, scaling, dropout, n, k)
        if isinstance(scaling, Tensor):
            row_scale, scaling = (scaling if scaling.dim() else scaling.expand(len(a))).float().contiguous(), 1.0
        if dropout > 0.0:
            seed = reference.new_seed(x.device)
    records = needs_grad(x, bias, lora)
    same_for_all = row_scale is None or row_scale.dim() == 1
    backend = choose(w, x2.shape[0], x2.dtype, infers=not records and same_for_all, drops=seed is not None)
    weight = w.rows().operands if backend in _OPERATORS else w.operands
    packed = w if backend in _IN_PYTHON else None
    if records:
        if compute is not None:
            raise ValueError(f"compute is {compute!r}, for inference only; x, bias or lora requires a gradient here")
        y = _Linear4bit.apply(x2, bias, a, b, row_scale, scaling, seed, dropout, backend, packed, *weight)[0]
    else:
        branch = _NO_BRANCH if lora is None else Branch(a, b, row_scale, scaling, seed, dropout)
        in_pairs = backend is Backend.NATIVE and type(lora) is PackedLora and x.dtype is torch.bfloat16
        pairs = (lora.a_pairs, lora.b_pairs) if in_pairs else None
        y = _forward(x2, branch, pairs, backend, weight, packed, bias, takes_int8(w, compute))[0]
    return y if x.dim() == 2 else y.view(*x.shape[:-1], n)


def _inference(
    x: Tensor, w: Packed4bit, bias: Tensor | None, lora: AnyLora | None, compute: str | None
) -> Tensor | None:
    """The shortest way to the kernels; None where this is not a call for it, or there is an error to be found."""
    if type(x) is not Tensor or type(w) is not Packed4bit or compute not in (None, "int8"):
        return None
    if traced() or torch.is_autocast_enabled("cpu"):
        return None
    branch, scaling, row_scale = 0, 1.0, None
    if lora is not None:
        if type(lora) is not PackedLora or x.dtype is not torch.bfloat16:
            return None
        branch, scaling = lora.handle.number, lora.scaling
        if isinstance(scaling, Tensor):
            if scaling.device != x.device or scaling.dim() == 0:
                return None
            row_scale, scaling = of_pairs(scaling.float().contiguous(), len(lora.a)), 1.0
    if not native(w):
        return None
    int8 = compute is not None and takes_int8(w, compute)
    try:
        return _HELD(x, w.handle.number, bias, branch, scaling, row_scale, int8)
    except RuntimeError:  # the long way says what it is, or deals with it
        return None


def needs_grad(x: Tensor, bias: Tensor | None, lora: AnyLora | None) -> bool:
    """Whether ``linear_4bit`` of these is recorded for autograd."""
    return recorded(x, bias, *(() if lora is None else lora[:2]))


def takes_int8(w: Packed4bit, compute: str | None) -> bool:
    """Whether ``compute`` brings a product with ``w`` into the int8 tier."""
    return compute == "int8" and w.blocksize <= _INT8_BLOCKSIZE and native(w)


def check_compute(compute: str | None) -> str | None:
    if not is_among(compute, (None, "int8")):
        raise ValueError(f"compute is {compute!r}; it must be None (the exact product) or 'int8'")
    return compute


def check_compute_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"compute_dtype is {dtype!r}; it must be None, float32, bfloat16 or float16")
    return dtype


def _check(x: Tensor, w: Packed4bit, bias: Tensor | None) -> tuple[int, int]:
    if not isinstance(w, Packed4bit):
        raise TypeError(f"w is a {type(w).__name__}; it must be a Packed4bit (see quantize_4bit)")
    if len(w.shape) != 2:
        raise ValueError(f"w has shape {tuple(w.shape)}; it must be a matrix (N, K)")
    n, k = w.shape
    check_floats("x", x)
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be K = {k}, as w is {(n, k)}")
    if x.device != w.device:
        raise ValueError(f"x is on {x.device}; it must be on the device of w, {w.device}")
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(f"bias is a {type(bias).__name__}; it must be a tensor or None")
    if bias is not None and (bias.shape != (n,) or bias.dtype not in FLOATS):
        given = f"{bias.dtype} of shape {tuple(bias.shape)}"
        raise ValueError(f"bias is {given}; it must be float32, bfloat16 or float16 of shape ({n},)")
    if bias is not None and bias.device != x.device:
        raise ValueError(f"bias is on {bias.device}; it must be on x's device, {x.device}")
    return n, k


def _as_lora(lora: Lora | tuple) -> tuple[Tensor, Tensor, float | Tensor, float]:
    """The fields of a :class:`Lora`."""
    if isinstance(lora, Lora):
        return lora
    if not isinstance(lora, tuple) or len(lora) != 3:
        raise TypeError(f"lora is {type(lora).__name__}; it must be None, (A, B, scaling), a Lora or a BankView")
    return *lora, 0.0


def _check_bank(bank: BankView, x: Tensor, n: int, k: int) -> None:
    for name, t in zip(_OF_BANK, bank, strict=True):
        check_tensor(name, t)
    if bank.a.dim() != 3 or len(bank.a) < 1:
        raise ValueError(
            f"a of the bank has shape {tuple(bank.a.shape)}; it must be [slots, r, K], K = {k}, with a slot at least"
        )
    slots, r = bank.a.shape[:2]
    shapes = {"a": (slots, r, k), "b": (slots, n, r), "scaling": (slots,), "rows": (x.shape[0],)}
    for name, shape in shapes.items():
        t = getattr(bank, name)
        if t.shape != shape:
            raise ValueError(f"{name} of the bank has shape {tuple(t.shape)}; it must be {shape}")
        if t.device != x.device:
            raise ValueError(f"{name} of the bank is on {t.device}; it must be on x's device, {x.device}")
    if bank.rows.dtype != torch.int64:
        raise ValueError(f"rows of the bank are {bank.rows.dtype}; they must be int64")
    # Looking at them on a GPU would wait for it; there other numbers are as -1.
    if bank.rows.is_cpu and not followed() and bank.rows.numel() > 0:
        least, most = (int(v) for v in bank.rows.aminmax())
        if least < -1 or most >= slots:
            raise ValueError(f"rows of the bank lie in [{least}, {most}]; they must lie in [-1, {slots - 1}]")
    if bank.a.dtype not in FLOATS or bank.b.dtype not in FLOATS or r < 1:
        what = f"are {bank.a.dtype} and {bank.b.dtype} of rank {r}"
        raise ValueError(f"a and b of the bank {what}; they must be {_FLOATS}, of rank 1 at least")
    _check_constant("scaling of the bank", bank.scaling)


def _check_lora(x: Tensor, a: Tensor, b: Tensor, scaling: float | Tensor, dropout: float, n: int, k: int) -> None:
    check_tensor("lora A", a)
    check_tensor("lora B", b)
    if a.dim() != 2 or a.shape[0] < 1 or a.shape[1] != k or a.dtype not in FLOATS:
        raise ValueError(f"lora A is {a.dtype} of shape {tuple(a.shape)}; it must be {_FLOATS} (r >= 1, K = {k})")
    r = a.shape[0]
    if b.shape != (n, r) or b.dtype not in FLOATS:
        raise ValueError(f"lora B is {b.dtype} of shape {tuple(b.shape)}; it must be {_FLOATS} (N = {n}, r = {r})")
    if a.device != x.device or b.device != x.device:
        raise ValueError(f"lora A is on {a.device}, B on {b.device}; both must be on x's device, {x.device}")
    check_factor("lora scaling", scaling)
    check_dropout("lora dropout", dropout)
    # Chained: Dynamo answers `in` wrongly where sizes are symbolic.
    if isinstance(scaling, Tensor) and scaling.dim() and scaling.shape != (r,) and scaling.shape != (x.shape[0], r):
        raise ValueError(
            f"lora scaling has shape {tuple(scaling.shape)}; it must be a number, ({r},) or ({x.shape[0]}, {r})"
        )
    if isinstance(scaling, Tensor) and scaling.device != x.device:
        raise ValueError(f"lora scaling is on {scaling.device}; it must be on x's device, {x.device}")
    if isinstance(scaling, Tensor):
        _check_constant("lora scaling", scaling)


def _check_constant(name: str, scaling: Tensor) -> None:
    if recorded(scaling):
        raise ValueError(
            f"{name} requires a gradient, and linear_4bit has none for it; multiply A or B by it, or compute the "
            "branch in torch and add it to the layer's output"
        )


_IN_PYTHON = {Backend.REFERENCE: reference, Backend.CUDA: cuda_kernels}
# For GPUs, written in Python: forward and backward.
_OPERATORS = {
    Backend.SLABS: (
        torch.ops.pyfastpeft.linear_4bit_slabs.default,
        torch.ops.pyfastpeft.linear_4bit_slabs_backward.default,
    ),
    Backend.TRITON: (
        torch.ops.pyfastpeft.linear_4bit_triton.default,
        torch.ops.pyfastpeft.linear_4bit_triton_backward.default,
    ),
}
_WITH_SLOTS = {Backend.TRITON: triton_kernels, Backend.CUDA: cuda_kernels}


def _mixes(branch: Branch) -> bool:
    """Whether the rows of x choose among adapters."""
    return branch.row_scale is not None and branch.row_scale.dim() == 2


def _with_finite_columns(branch: Branch, dtype: torch.dtype) -> Branch:
    a, b, row_scale, *rest = branch
    return Branch(*mixed.finite_columns(a, b, row_scale, dtype), *rest)


def _forward(x: Tensor, branch: Branch, pairs: tuple[Tensor, Tensor] | None, *base: object) -> tuple[Tensor, Tensor]:
    """:func:`_product`, of which what one adapter holds reaches no row of others."""
    if _mixes(branch):
        if mixed.tells(x):
            y, s = _product(x, branch, pairs, *base)
            if mixed.is_finite(y[:1]):
                return y, s
        branch = _with_finite_columns(branch, x.dtype)
        if pairs is not None:
            pairs = tuple(
                _in_pairs(t, torch.empty(_pairs_shape(t), dtype=torch.bfloat16)) for t in (branch.a, branch.b)
            )
    return _product(x, branch, pairs, *base)


def _product(
    x: Tensor,
    branch: Branch,
    pairs: tuple[Tensor, Tensor] | None,
    backend: Backend,
    weight: tuple,
    packed: Packed4bit | None,
    bias: Tensor | None,
    int8: bool = False,
) -> tuple[Tensor, Tensor]:
    """(y, S), S [M, 0] in the ``int8`` tier.

    Args:
        pairs: A and B in bf16, as the native kernels read them.
        weight: the fields of :class:`Operands`, as operators take them.
        packed: the weight itself, for the backends in ``_IN_PYTHON``.
    """
    if backend in _IN_PYTHON:
        return _IN_PYTHON[backend].forward(x, packed, bias, *branch)
    if backend in _OPERATORS:
        return _OPERATORS[backend][0](x, *weight, bias, *branch)
    if pairs is not None:
        a, _, row_scale, *rest = branch
        branch = (*pairs, None if row_scale is None else of_pairs(row_scale, len(a)), *rest)
    return torch.ops.pyfastpeft.linear_4bit.default(x, *weight, bias, *branch, int8)


class _Linear4bit(torch.autograd.Function):
    """(y, S): S is an output so that what is saved of it has a gradient itself, without x."""

    @staticmethod
    def forward(ctx, x, bias, a, b, row_scale, scaling, seed, dropout, backend, packed, *weight):  # noqa: ANN001
        branch = Branch(a, b, row_scale, scaling, seed, dropout)
        y, s = _forward(x, branch, None, backend, weight, packed, bias)
        # Where rows choose, x also says which of them are not finite.
        trains_a, trains_b = (a is not None and t.requires_grad for t in (a, b))
        kept = x if trains_a or (trains_b and _mixes(branch)) else None, s if trains_b else None
        codes, scale, zero, absmax2, offset, *numbers = weight
        ctx.save_for_backward(*kept, a, b, row_scale, seed, codes, scale, zero, absmax2, offset)
        bias_dtype = None if bias is None else bias.dtype
        ctx.rest = (scaling, dropout, backend, packed, numbers, x.shape[1], x.dtype, bias_dtype)
        if not is_compiling():
            ctx.set_materialize_grads(False)
        return y, s

    @staticmethod
    def backward(ctx, dy, ds):  # noqa: ANN001
        if dy is None and ds is None:  # what is behind y gives it no gradient
            return (None,) * len(ctx.needs_input_grad)
        x, s, a, b, row_scale, seed, *tensors = ctx.saved_tensors
        scaling, dropout, backend, packed, numbers, k, x_dtype, bias_dtype = ctx.rest
        need_x, need_bias, *needs_lora = ctx.needs_input_grad[:4]
        branch, needs = Branch(a, b, row_scale, scaling, seed, dropout), (need_x, *needs_lora)
        weight = (*tensors, *numbers)
        if is_compiling():
            ds = None
        elif ds is not None or torch.is_grad_enabled():  # differentiated again
            if packed is None:
                layout = "tiles" if backend is Backend.NATIVE else "rows"
                packed = Packed4bit.of_operands(Operands(*weight), k, layout)
            dy = b.new_zeros(len(ds), len(b), dtype=x_dtype) if dy is None else dy
            backend = Backend.REFERENCE
        dbias = dy.sum(0, dtype=torch.float32).to(bias_dtype) if need_bias else None
        gradients = partial(_gradients, backend, weight, packed, k, needs, ds)
        if _mixes(branch):
            gradients = partial(_isolated, gradients)
        grads = gradients(dy.to(x_dtype), x, s, branch)
        return *grads[:1], dbias, *grads[1:], *([None] * (len(ctx.needs_input_grad) - 4))


def _isolated(
    gradients: Callable[..., tuple], dy: Tensor, x: Tensor | None, s: Tensor | None, branch: Branch
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``gradients``, of which what one adapter or row holds reaches no other's."""
    if mixed.tells(dy):
        dx, da, db = gradients(dy, x, s, branch)
        if mixed.is_finite(None if dx is None else dx[:1], da, db):
            return dx, da, db
    a, b, factor, *rest = _with_finite_columns(branch, dy.dtype)
    if x is not None:
        # S as it was, before its columns were: here it is left out where its factor is zero.
        bad, factor, dy, x = mixed.finite_rows(factor, dy, x)
        s = None if s is None else s.masked_fill(bad | (factor == 0), 0)
    dx, da, db = gradients(dy, x, s, Branch(a, b, factor, *rest))
    return dx if x is None or dx is None else dx.masked_fill(bad, torch.nan), da, db


def _gradients(
    backend: Backend,
    weight: tuple,
    packed: Packed4bit | None,
    k: int,
    needs: tuple[bool, bool, bool],
    ds: Tensor | None,
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    branch: Branch,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dA, dB), None where not in ``needs``.

    Args:
        ds: the gradient of S itself, for the reference alone.
        x: where A trains, and where rows choose and B does.
        s: the S of ``_forward``, where B trains.
    """
    if backend is Backend.REFERENCE:
        return reference.backward(dy, x, s, packed, *branch, *needs, ds)
    if backend in _OPERATORS:
        found = _OPERATORS[backend][1](dy, x, s, *weight, k, *branch, *needs)
        return tuple(grad if needed else None for grad, needed in zip(found, needs, strict=True))
    need_x, need_a, need_b = needs
    wanted = x if need_a else None, s if need_b else None
    dx, da, db = torch.ops.pyfastpeft.linear_4bit_backward.default(dy, *wanted, *weight, *branch, need_x)
    da, db = da.to(branch.a.dtype) if need_a else None, db.to(branch.b.dtype) if need_b else None
    return dx if need_x else None, da, db
