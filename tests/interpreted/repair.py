"""Makes Triton's interpreter right about bfloat16, and lets it run the inline PTX of these kernels.

As it ships (3.6 to 3.9), the interpreter keeps bfloat16 as uint16 and computes with those bits, truncates where it
converts float32, loses denormals, and before 3.9 has no constants of it. Import this after setting TRITON_INTERPRET=1.
"""

from __future__ import annotations

import functools
import re

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle


def widened(t):
    """A bfloat16 handle as float32; any other as it is."""
    if t.dtype.scalar != tl.bfloat16:
        return t
    return Handle((t.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def rounded(values):
    """float32 to the bits of bfloat16, to nearest even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, np.uint16(0x7FFF), nearest)


def prmt(a, b, selector):
    """PTX's byte permutation, in its default mode."""
    source = b.astype(np.uint64) << 32 | a
    out = np.zeros_like(selector)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = source >> (nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        out |= np.where(nibble & np.uint32(8), sign, byte).astype(np.uint32) << np.uint32(8 * i)
    return out


def lop3(a, b, c, table):
    out = np.zeros_like(a)
    for i in range(8):
        if int(table[0]) >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


INSTRUCTIONS = {
    "mov": lambda a: a,
    "and": lambda a, b: a & b,
    "mul.lo": lambda a, b: a * b,
    "mul.hi": lambda a, b: (a.astype(np.uint64) * b >> np.uint64(32)).astype(np.uint32),
    "prmt": prmt,
    "lop3": lop3,
}


def run_ptx(text, operands, outputs):
    """The registers $0 to $outputs-1 after the PTX ``text``, the next ones being ``operands`` (uint32 [n] each)."""
    registers = {f"${outputs + i}": operand for i, operand in enumerate(operands)}
    for statement in text.strip("{ }").split(";"):
        if not statement.strip() or statement.strip().startswith(".reg"):
            continue
        name, listed = re.fullmatch(r"\s*([\w.]+)\.[bu]32 (.+)", statement).groups()
        into, *given = listed.split(", ")
        values = [registers[g] if g in registers else np.full_like(operands[0], int(g, 0)) for g in given]
        registers[into] = INSTRUCTIONS[name](*values)
    return [registers[f"${i}"] for i in range(outputs)]


_dot, _cast, _binary = Builder.create_dot, Builder.cast_impl, Builder.binary_op
_patch_tensor = interpreter._patch_lang_tensor


def dot(self, a, b, d, *rest):
    return _dot(self, widened(a), widened(b), d, *rest)


def cast(self, src, dst):
    if src.dtype.scalar == tl.float32 and dst.scalar == tl.bfloat16:
        return Handle(rounded(src.data), tl.bfloat16)
    if src.dtype.scalar == tl.bfloat16 and dst.scalar == tl.float32:
        return widened(src)
    return _cast(self, src if dst.scalar.is_floating() else widened(src), dst)


def binary(self, a, b, operation):
    if a.dtype.scalar != tl.bfloat16:
        return _binary(self, a, b, operation)
    out = _binary(self, widened(a), widened(b), operation)
    return out if out.data.dtype == np.bool_ else Handle(rounded(out.data), tl.bfloat16)


def constant(self, value):
    return Handle(rounded([value]), tl.bfloat16)


def inline_asm(self, text, constraints, values, types, pure, pack):
    """A statement that takes words and gives words; with ``pack`` 4 one for each of four bytes."""
    inputs, outputs = (constraints.split(",").count(what) for what in ("r", "=r"))
    assert len(values) == inputs and len(constraints.split(",")) == inputs + outputs == inputs + pack * len(types)
    words = [np.ascontiguousarray(v.data).reshape(-1).view(np.uint32) for v in values]
    out = run_ptx(text, words, outputs)
    if pack == 4:
        out = [np.stack(out, axis=1)]
    shape = values[0].data.shape
    out = [
        Handle(o.reshape(shape).view(interpreter._get_np_dtype(t)), t.scalar) for o, t in zip(out, types, strict=True)
    ]
    # Stands for the builder's operation, which is asked for its results.
    return type("Result", (), {"get_result": lambda self, i: out[i]})()


def patch_tensor(tensor, scope):
    _patch_tensor(tensor, scope)
    # A scalar is an array of one element, which NumPy 2.4 no longer takes for a number.
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


# A kernel patches triton.language for its time. What functions patch beside it (triton.language.core, for Triton's own)
# stays so, and was sought anew at every call, for a third of the time.
patch_for = functools.cache(interpreter._patch_lang)

# Every operation makes the types and shapes of its operands and result anew and checks them, which these remember.
_block, _tensor, _numpy_type = tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype
blocks, tensors, numpy_types = {}, {}, {}


def block(self, element_ty, shape):
    key = (element_ty.name, *shape)
    if key not in blocks:
        _block(self, element_ty, shape)
        blocks[key] = vars(self).copy()
    vars(self).update(blocks[key])


def tensor(self, handle, type):
    if type.name not in tensors:
        _tensor(self, None, type)
        tensors[type.name] = vars(self).copy()
    vars(self).update(tensors[type.name], handle=handle)


def numpy_type(type):
    name = type.scalar.name
    if name not in numpy_types:
        numpy_types[name] = _numpy_type(type)
    return numpy_types[name]


def call(self, *args, **kwargs):
    patch_for(self.fn)
    return self.rewrite()(*args, **kwargs)


interpreter.InterpretedFunction.__call__ = call
interpreter._patch_lang_tensor = patch_tensor
interpreter._get_np_dtype = numpy_type
tl.block_type.__init__, tl.tensor.__init__ = block, tensor
Builder.create_dot, Builder.cast_impl, Builder.binary_op = dot, cast, binary
Builder.create_inline_asm, Builder.get_bf16 = inline_asm, constant
