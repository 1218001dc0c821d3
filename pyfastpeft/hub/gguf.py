"""GGUF files: tensors memory-mapped, Q4_0 and Q4_1 taken over in 4 bits as they are, the rest decoded."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, dequantize

from ..formats import Packed4bit

_Q4_0, _Q4_1 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1
_Q4_BLOCK = 32
# Bytes of the fixed-size metadata types; strings (8) and arrays (9) carry their length.
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


class GgufFile:
    """A GGUF file, its header checked against its size before anything is read.

    Attributes:
        path: where it lies.
        architecture: ``general.architecture``.
        names: the tensors' names, in file order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no GGUF file, or truncated, or its header contradicts itself; the file is named.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no file {self.path}")
        try:
            _Header(np.memmap(self.path, mode="r")).check()
            reader = GGUFReader(self.path)
            self.architecture = str(reader.fields["general.architecture"].contents())
        except (ValueError, KeyError, IndexError, TypeError, OverflowError, struct.error) as error:
            raise ValueError(f"{self.path} is not a valid GGUF file (truncated or damaged?): {error}") from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.names = tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape in torch's order (GGUF's own is reversed)."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def is_4bit(self, name: str) -> bool:
        """Whether :meth:`packed` can take the tensor over: it is Q4_0 or Q4_1."""
        return self._tensors[name].tensor_type in (_Q4_0, _Q4_1)

    def packed(self, name: str, row_order: np.ndarray | None = None) -> Packed4bit:
        """A Q4_0 or Q4_1 matrix as INT4 with blocks of 32, exactly: ``value = code * scale + zero``.

        Args:
            row_order: int [rows]; row i of the result is row ``row_order[i]`` of the file's.

        Returns:
            Packed4bit in the ``rows`` layout, original dtype float32.
        """
        tensor = self._tensors[name]
        shape = self.shape(name)
        if not self.is_4bit(name):
            raise ValueError(f"{self.path}: {name} is {tensor.tensor_type.name}; only Q4_0 and Q4_1 stay in 4 bits")
        data = tensor.data if row_order is None else tensor.data[row_order]
        blocks = torch.from_numpy(np.array(data)).view(-1, GGML_QUANT_SIZES[tensor.tensor_type][1])
        halves = blocks[:, :-16].contiguous().view(torch.float16).float()
        scale = halves[:, 0].clone()
        # Q4_0 is d * (code - 8); both products are exact in float32.
        zero = halves[:, 1].clone() if tensor.tensor_type == _Q4_1 else -8 * scale
        quants = blocks[:, -16:]
        # A block's low nibbles are its first 16 elements, its high nibbles the others.
        codes = torch.cat([quants & 15, quants >> 4], dim=1)
        packed = (codes[:, ::2] << 4 | codes[:, 1::2]).reshape(-1, 1)
        return Packed4bit(packed, scale, zero, None, torch.Size(shape), torch.float32, "int4", _Q4_BLOCK)

    def dequantized(self, name: str) -> np.ndarray:
        """The tensor in full precision, float32 in torch's order of dimensions, decoded by gguf itself."""
        tensor = self._tensors[name]
        try:
            return dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise ValueError(f"{self.path}: {name} cannot be decoded: {error}") from error


class _Header:
    """Walks a header so that no count or offset in it reaches beyond the file (gguf's own reader trusts them)."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.at = data, 0

    def check(self) -> None:
        if bytes(self.take(4)) != b"GGUF":
            raise ValueError("it does not start with GGUF")
        version, tensors, fields = self.unpack("<IQQ")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}; 2 and 3 can be read")
        alignment = 32
        for _ in range(fields):
            key = self.string()
            (kind,) = self.unpack("<I")
            start = self.at
            self.value(kind)
            if key == b"general.alignment" and kind == 4:
                (alignment,) = struct.unpack("<I", self.data[start : self.at])
        infos = [self.tensor() for _ in range(tensors)]
        if alignment == 0:
            raise ValueError("its alignment is 0")
        start = -(-self.at // alignment) * alignment
        for name, end in infos:
            if start + end > len(self.data):
                raise ValueError(f"tensor {name} ends at byte {start + end}; the file has {len(self.data)}")

    def take(self, count: int) -> np.ndarray:
        if count > len(self.data) - self.at:
            raise ValueError(f"its header asks for {count} bytes at {self.at}; the file has {len(self.data)}")
        self.at += count
        return self.data[self.at - count : self.at]

    def unpack(self, layout: str) -> tuple[int, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def string(self) -> bytes:
        (length,) = self.unpack("<Q")
        return bytes(self.take(length))

    def value(self, kind: int) -> None:
        if kind in _SCALAR_BYTES:
            self.take(_SCALAR_BYTES[kind])
        elif kind == _STRING:
            self.string()
        elif kind == _ARRAY:
            element, count = self.unpack("<IQ")
            if element in _SCALAR_BYTES:
                self.take(_SCALAR_BYTES[element] * count)
            elif element == _STRING:
                for _ in range(count):
                    self.string()
            else:
                raise ValueError(f"an array of metadata has elements of type {element}")
        else:
            raise ValueError(f"a field of metadata has type {kind}")

    def tensor(self) -> tuple[str, int]:
        """(name, first byte after the data, counted from the start of the data)."""
        name = self.string().decode()
        (dims,) = self.unpack("<I")
        if dims > 4:
            raise ValueError(f"tensor {name} has {dims} dimensions")
        shape = self.unpack(f"<{dims}Q")
        kind, offset = self.unpack("<IQ")
        block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        elements = 1
        for size in shape:
            elements *= size
        if dims and shape[0] % block:
            raise ValueError(f"tensor {name} has rows of {shape[0]} elements, which is not a multiple of {block}")
        return name, offset + elements // block * nbytes
