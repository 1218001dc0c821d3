"""ggml, through the libraries that llama-cpp-python installs: Q4_0, Q4_K and IQ4_NL.

Weights lie in the buffer type CPU_REPACK, where llama.cpp puts them; ``ggml_q4_K_tiled`` leaves them as a file has
them, which is what ggml's tiled product of many rows works on. Activations become int8 in both.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
import weakref
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..registry import Layer, Problem, Unavailable, contender

F32 = 0


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class _Ggml:
    """The few functions of ggml's C interface that a matrix product takes."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("llama_cpp")
        folder = Path(spec.submodule_search_locations[0]) / "lib"
        try:
            base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
            cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
        except OSError as error:
            raise Unavailable(f"no shared ggml libraries in llama_cpp: {error}") from error

        def function(library: ctypes.CDLL, name: str, result: object, *arguments: object) -> ctypes._CFuncPtr:
            found = getattr(library, name)
            found.restype, found.argtypes = result, arguments
            return found

        p = c_void_p
        self.init = function(base, "ggml_init", p, _InitParams)
        self.new_matrix = function(base, "ggml_new_tensor_2d", p, p, c_int, c_int64, c_int64)
        self.mul_mat = function(base, "ggml_mul_mat", p, p, p, p)
        self.new_graph = function(base, "ggml_new_graph_custom", p, p, c_size_t, c_bool)
        self.expand = function(base, "ggml_build_forward_expand", None, p, p)
        self.row_size = function(base, "ggml_row_size", c_size_t, c_int, c_int64)
        self.quantize = function(base, "ggml_quantize_chunk", c_size_t, c_int, p, p, c_int64, c_int64, c_int64, p)
        self.allocate = function(base, "ggml_backend_alloc_ctx_tensors_from_buft", p, p, p)
        self.place = function(base, "ggml_backend_tensor_alloc", c_int, p, p, p)
        self.set = function(base, "ggml_backend_tensor_set", None, p, p, c_size_t, c_size_t)
        self.buffer_at = function(base, "ggml_backend_cpu_buffer_from_ptr", p, p, c_size_t)
        self.free_buffer = function(base, "ggml_backend_buffer_free", None, p)
        self.free = function(base, "ggml_free", None, p)
        self.compute = function(base, "ggml_backend_graph_compute", c_int, p, p)
        self.set_threads = function(cpu, "ggml_backend_cpu_set_n_threads", None, p, c_int)
        # The log goes nowhere: repacking reports every tensor.
        self._silent = ctypes.CFUNCTYPE(None, c_int, c_char_p, p)(lambda level, text, data: None)
        function(base, "ggml_log_set", None, p, p)(self._silent, None)
        self.backend = function(cpu, "ggml_backend_cpu_init", p)()
        self.plain = function(base, "ggml_backend_cpu_buffer_type", p)()
        registry = function(cpu, "ggml_backend_cpu_reg", p)()
        device = function(base, "ggml_backend_reg_dev_get", p, p, c_size_t)(registry, 0)
        address = function(base, "ggml_backend_reg_get_proc_address", p, p, c_char_p)
        extra = address(registry, b"ggml_backend_dev_get_extra_bufts")
        name = function(base, "ggml_backend_buft_name", c_char_p, p)
        found = ctypes.CFUNCTYPE(POINTER(p), p)(extra)(device) if extra else [None]  # ends with a null
        extras = list(itertools.takewhile(bool, (found[i] for i in itertools.count())))
        self.repack = next((extra for extra in extras if name(extra) == b"CPU_REPACK"), self.plain)

    def context(self) -> int:
        return self.init(_InitParams(1 << 16, None, True))


@functools.cache
def _ggml() -> _Ggml:
    return _Ggml()


def quantize(dense: Tensor, kind: int) -> np.ndarray:
    """A float32 matrix [N, K] in ggml's type ``kind``: bytes [N, bytes of a row]."""
    g, (n, k) = _ggml(), dense.shape
    raw = np.empty((n, g.row_size(kind, k)), np.uint8)
    g.quantize(kind, dense.contiguous().data_ptr(), raw.ctypes.data, 0, n, k, None)
    return raw


class _Product:
    """y = x · Wᵀ for one weight; the graph is rebuilt when x is another tensor."""

    def __init__(self, raw: np.ndarray, kind: int, k: int, n: int, buffer_type: int, threads: int) -> None:
        self._ggml = g = _ggml()
        self._n, self._threads = n, threads
        context = g.context()
        self._w = g.new_matrix(context, kind, k, n)
        buffer = g.allocate(context, buffer_type)
        g.set(self._w, raw.ctypes.data, 0, raw.nbytes)
        weakref.finalize(self, self._release, g, context, [buffer])
        self._bound: tuple | None = None
        self._forget = lambda: None

    @staticmethod
    def _release(g: _Ggml, context: int, buffers: list[int]) -> None:
        for buffer in buffers:
            g.free_buffer(buffer)
        g.free(context)

    def _bind(self, x: Tensor) -> None:
        """A graph whose ends lie where torch has them."""
        self._forget()
        g, y = self._ggml, torch.empty(len(x), self._n)
        context = g.context()
        end = g.new_matrix(context, F32, x.shape[1], len(x))
        product = g.mul_mat(context, self._w, end)
        buffers = [g.buffer_at(t.data_ptr(), t.nbytes) for t in (x, y)]
        for tensor, buffer, memory in zip((end, product), buffers, (x, y), strict=True):
            g.place(buffer, tensor, memory.data_ptr())
        graph = g.new_graph(context, 8, False)
        g.expand(graph, product)
        self._bound = (x.data_ptr(), len(x), graph, y)
        self._forget = weakref.finalize(self, self._release, g, context, buffers)

    def __call__(self, x: Tensor) -> Tensor:
        if self._bound is None or self._bound[:2] != (x.data_ptr(), len(x)):
            self._bind(x)
        self._ggml.set_threads(self._ggml.backend, self._threads)
        self._ggml.compute(self._ggml.backend, self._bound[2])
        return self._bound[3]


def _layer(p: Problem, kind: str, tiled: bool) -> Layer:
    import gguf

    quantization = gguf.GGMLQuantizationType[kind.upper()]
    block, _ = gguf.GGML_QUANT_SIZES[quantization]
    if p.k % block:
        raise Unavailable(f"K must be a multiple of {block}")
    g = _ggml()
    raw = p.weight.once(("ggml", kind), lambda: quantize(p.weight.dense, quantization))
    product = _Product(raw, quantization, p.k, p.n, g.plain if tiled else g.repack, p.threads)
    return Layer(product, raw.nbytes, lambda: torch.from_numpy(gguf.quants.dequantize(raw, quantization)).double())


_WHAT = {"requires": ("llama_cpp",), "dtypes": ("fp32",), "tier": "int8"}
for _kind in ("q4_0", "q4_K", "iq4_nl"):
    contender(f"ggml_{_kind}", "ggml", **_WHAT)(functools.partial(_layer, kind=_kind, tiled=False))
contender("ggml_q4_K_tiled", "ggml", **_WHAT)(functools.partial(_layer, kind="q4_K", tiled=True))
