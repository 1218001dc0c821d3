"""GGUF files: tensors memory-mapped, Q4_0 and Q4_1 taken over in 4 bits as they are, the rest decoded."""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from ..formats import Packed4bit, get_format
from ..formats.codes import pack_nibbles

_Q4_0, _Q4_1 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1
_Q4_BLOCK = 32
# The fixed-size metadata types as struct knows them; strings (8) and arrays (9) carry their length.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_SCALAR_BYTES = {kind: struct.calcsize(f"<{letter}") for kind, letter in _SCALARS.items()}
_UINT32, _STRING, _ARRAY = 4, 8, 9


class _TensorInfo(NamedTuple):
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    stop: int


class GgufFile:
    """A GGUF file, its header checked against its size before anything is read.

    Attributes:
        path: where it lies.
        architecture: ``general.architecture``.
        names: the tensors' names, in file order.
        metadata: the numbers and strings that describe the model, by the keys' names after ``<architecture>.``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no GGUF file, or truncated, or a part of a split model, or its header contradicts itself; the
            file is named.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no file {self.path}")
        try:
            # A plain array over the mapped pages: memmap's own slices are slow.
            self._data = np.asarray(np.memmap(self.path, mode="r"))
            header = _Header(self._data)
            self.architecture, self._tensors = header.read()
        except (ValueError, KeyError) as error:
            raise ValueError(f"{self.path} is not a valid GGUF file (truncated or damaged?): {error}") from error
        if header.metadata.get("split.count", 1) != 1:
            raise ValueError(
                f"{self.path} is one of the {header.metadata['split.count']} parts of a split model; join them before, "
                "with llama.cpp's llama-gguf-split --merge"
            )
        self.names = tuple(self._tensors)
        prefix = f"{self.architecture}."
        self.metadata = {k.removeprefix(prefix): v for k, v in header.metadata.items() if k.startswith(prefix)}

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape in torch's order (GGUF's own is reversed)."""
        return self._tensors[name].shape

    def is_4bit(self, name: str) -> bool:
        """Whether :meth:`packed` can take the tensor over: it is Q4_0 or Q4_1."""
        return self._tensors[name].kind in (_Q4_0, _Q4_1)

    def _rows(self, name: str) -> np.ndarray:
        """The tensor's bytes, uint8 [..., bytes a row]."""
        info = self._tensors[name]
        return self._data[info.start : info.stop].reshape(*info.shape[:-1], -1)

    def packed(self, name: str, row_order: np.ndarray | None = None) -> Packed4bit:
        """A Q4_0 or Q4_1 matrix as INT4 with blocks of 32, exactly: ``value = code * scale + zero``.

        Args:
            row_order: int [rows]; row i of the result is row ``row_order[i]`` of the file's.

        Returns:
            Packed4bit in the ``rows`` layout, original dtype float32.
        """
        info = self._tensors[name]
        if not self.is_4bit(name):
            raise ValueError(f"{self.path}: {name} is {info.kind.name}; only Q4_0 and Q4_1 stay in 4 bits")
        rows = self._rows(name)
        rows = np.array(rows if row_order is None else rows[row_order])
        blocks = torch.from_numpy(rows).view(-1, GGML_QUANT_SIZES[info.kind][1])
        halves = blocks[:, :-16].contiguous().view(torch.float16).float()
        scale = halves[:, 0].clone()
        # Q4_0 is d * (code - 8); both products are exact in float32.
        zero = halves[:, 1].clone() if info.kind == _Q4_1 else -8 * scale
        quants = blocks[:, -16:]
        # A block's low nibbles are its first 16 elements, its high nibbles the others.
        codes = torch.cat([quants & 15, quants >> 4], dim=1).flatten()
        packed = pack_nibbles(codes, get_format("int4"))
        return Packed4bit(packed, scale, zero, None, torch.Size(info.shape), torch.float32, "int4", _Q4_BLOCK)

    def dequantized(self, name: str) -> np.ndarray:
        """The tensor in full precision, float32 in torch's order of dimensions, decoded by gguf itself."""
        info = self._tensors[name]
        try:
            return dequantize(self._rows(name), info.kind).reshape(info.shape)
        except (NotImplementedError, ValueError) as error:
            raise ValueError(f"{self.path}: {name} cannot be decoded: {error}") from error


def _padded(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment


class _Header:
    """Reads a header, letting no count or offset in it reach beyond the file."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.at = data, 0
        self.metadata: dict[str, int | float | bool | str] = {}

    def read(self) -> tuple[str, dict[str, _TensorInfo]]:
        """The architecture and the table of tensors."""
        if self.take(4) != b"GGUF":
            raise ValueError("it does not start with GGUF")
        version, tensors, fields = self.unpack("<IQQ")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}; 2 and 3 can be read")
        architecture, alignment = None, 32
        for _ in range(fields):
            key = self.string()
            (kind,) = self.unpack("<I")
            if key == b"general.architecture" and kind == _STRING:
                architecture = self.string().decode()
            elif key == b"general.alignment" and kind == _UINT32:
                (alignment,) = self.unpack("<I")
            elif key.startswith((b"general.", b"tokenizer.")):
                self.skip_value(kind)
            elif kind == _STRING:
                self.metadata[key.decode()] = self.string().decode()
            elif kind in _SCALARS:
                (self.metadata[key.decode()],) = self.unpack(f"<{_SCALARS[kind]}")
            else:
                self.skip_value(kind)
        if architecture is None:
            raise ValueError("it names no architecture")
        if alignment == 0:
            raise ValueError("its alignment is 0")
        table = [self.tensor() for _ in range(tensors)]
        start = _padded(self.at, alignment)
        infos = {name: info._replace(start=start + info.start, stop=start + info.stop) for name, info in table}
        if len(infos) != tensors:
            raise ValueError("two of its tensors have one name")
        free = start
        for name, info in infos.items():
            if info.start != free:  # as llama.cpp demands: anywhere else lie the weights of other tensors
                raise ValueError(f"tensor {name} begins at byte {info.start}; it must begin at {free}")
            free = _padded(info.stop, alignment)
            if info.stop > len(self.data):
                raise ValueError(f"tensor {name} ends at byte {info.stop}; the file has {len(self.data)}")
        return architecture, infos

    def advance(self, count: int) -> int:
        """The position before ``count`` bytes, after passing them."""
        if count > len(self.data) - self.at:
            raise ValueError(f"its header asks for {count} bytes at {self.at}; the file has {len(self.data)}")
        self.at += count
        return self.at - count

    def take(self, count: int) -> bytes:
        start = self.advance(count)
        return self.data[start : self.at].tobytes()

    def unpack(self, layout: str) -> tuple[int, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def string(self) -> bytes:
        (length,) = self.unpack("<Q")
        return self.take(length)

    def skip_value(self, kind: int) -> None:
        if kind in _SCALAR_BYTES:
            self.advance(_SCALAR_BYTES[kind])
        elif kind == _STRING:
            self.advance(*self.unpack("<Q"))
        elif kind == _ARRAY:
            element, count = self.unpack("<IQ")
            if element in _SCALAR_BYTES:
                self.advance(_SCALAR_BYTES[element] * count)
            elif element == _STRING:
                for _ in range(count):
                    self.advance(*self.unpack("<Q"))
            else:
                raise ValueError(f"an array of metadata has elements of type {element}")
        else:
            raise ValueError(f"a field of metadata has type {kind}")

    def tensor(self) -> tuple[str, _TensorInfo]:
        """(name, its info with positions counted from the start of the data)."""
        name = self.string().decode()
        (dims,) = self.unpack("<I")
        if not 1 <= dims <= 4:
            raise ValueError(f"tensor {name} has {dims} dimensions; it must have 1 to 4")
        shape = self.unpack(f"<{dims}Q")
        number, offset = self.unpack("<IQ")
        kind = GGMLQuantizationType(number)
        block, nbytes = GGML_QUANT_SIZES[kind]
        if shape[0] % block or 0 in shape:
            raise ValueError(f"tensor {name} has shape {shape}; as {kind.name} its rows must be multiples of {block}")
        return name, _TensorInfo(shape[::-1], kind, offset, offset + math.prod(shape) // block * nbytes)
