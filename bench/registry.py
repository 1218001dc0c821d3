"""What is measured: contenders by name, each preparing one linear layer in its own way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from . import harness

Name, Made = TypeVar("Name"), TypeVar("Made")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


class Unavailable(Exception):
    """Why a contender cannot run here, or not on this problem."""


def why(error: Exception) -> str:
    """What to say of a contender that raised ``error``."""
    return str(error) if isinstance(error, Unavailable) else f"{type(error).__name__}: {str(error)[:160]}"


def ready(
    requires: dict[Name, Iterable[str]], make: Callable[[Name], Made]
) -> tuple[dict[Name, Made], dict[Name, str]]:
    """What ``make`` makes of each name whose packages are installed, and why it made nothing of the others."""
    made, absent = {}, {}
    for name, packages in requires.items():
        if reason := harness.missing(*packages):
            absent[name] = reason
            continue
        try:
            made[name] = make(name)
        except Exception as error:
            absent[name] = why(error)
    return made, absent


class Weight:
    """One weight [N, K] in full precision, and what contenders make of it once."""

    def __init__(self, k: int, n: int) -> None:
        self.k, self.n = k, n
        self._made: dict[object, object] = {}
        self.dense = torch.randn(n, k, generator=torch.Generator().manual_seed(1)) * 0.03

    def once(self, key: object, make: Callable[[], object]) -> object:
        """``make()``, remembered under ``key``."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def int4(self, block: int) -> tuple[Tensor, Tensor]:
        """Symmetric int4: codes uint8 [N, K] around 8 and scales float32 [N, K / block], exact in float16 and bf16."""

        def make() -> tuple[Tensor, Tensor]:
            blocks = self.dense.view(self.n, -1, block)
            scale = (blocks.abs().amax(-1) / 7.5).bfloat16().half().float()
            codes = (blocks / scale[..., None] + 8).round_().clamp_(0, 15).to(torch.uint8)
            return codes.view(self.n, self.k), scale

        return self.once(("int4", block), make)

    def int4_dequantized(self, block: int) -> Tensor:
        codes, scale = self.int4(block)
        return ((codes.double().view(self.n, -1, block) - 8) * scale.double()[..., None]).view(self.n, self.k)


@dataclass(frozen=True)
class Problem:
    """A layer to prepare: the weight, what x is, and what stands over the weight.

    Attributes:
        dtype: of x.
        rank: of the LoRA branch; 0 is the base layer alone.
        adapters: how many of that rank one batch mixes, row i taking adapter i % adapters.
        train: whether gradients to x and the adapters are wanted.
        threads: torch's number of threads, which peers with pools of their own must use too.
        copy: which of the copies of the weight this is. Cases of one contender's weight, with a branch or without,
            share them: where a copy lies in memory can cost more than a branch.
    """

    weight: Weight
    dtype: torch.dtype
    rank: int = 0
    adapters: int = 1
    train: bool = False
    threads: int = 1
    copy: int = 0

    scaling: ClassVar[float] = 2.0
    """Of the branch."""

    @property
    def k(self) -> int:
        return self.weight.k

    @property
    def n(self) -> int:
        return self.weight.n

    @property
    def a(self) -> Tensor:
        """[rank, K]; the adapters of a batch are equal, so that there is one answer, and lie apart in memory."""
        g = torch.Generator().manual_seed(2)
        return self.weight.once(("a", self.rank), lambda: torch.randn(self.rank, self.k, generator=g) * self.k**-0.5)

    @property
    def b(self) -> Tensor:
        """[N, rank]"""
        g = torch.Generator().manual_seed(3)
        return self.weight.once(("b", self.rank), lambda: torch.randn(self.n, self.rank, generator=g) * 0.03)

    def adapted(self, base: Tensor) -> Tensor:
        """The float64 weight ``base`` with the adapter merged."""
        return base + self.scaling * self.b.double() @ self.a.double() if self.rank else base


@dataclass
class Layer:
    """A contender ready to be called.

    Attributes:
        call: x [M, K] to y [M, N].
        nbytes: weight bytes that a call reads, adapters not counted.
        weight: the weight [N, K] really used, in float64, adapters included.
        trained: the parameters of the adapter, of which training wants gradients.
    """

    call: Callable[[Tensor], Tensor]
    nbytes: int
    weight: Callable[[], Tensor]
    trained: tuple[Tensor, ...] = ()

    def gradients(self, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        """Of x and ``trained``, forward and backward; kept nowhere, so that no call adds to another's."""
        return torch.autograd.grad(self.call(x), (x, *self.trained), dy)


@dataclass(frozen=True)
class Contender:
    """An entry of the registry.

    Attributes:
        prepare: makes a layer with weights of its own; called once for every copy of the weights.
        package: what it measures: ``"ours"`` or a package's name.
        requires: packages to be installed.
        dtypes: of x that it takes.
        tier: ``"exact"`` or ``"int8"``: what the activations become inside.
        lora: whether it has a LoRA branch.
        over: for what exists with a branch only, the contender whose layer the branch is over.
        trains: whether it differentiates.
    """

    prepare: Callable[[Problem], Layer]
    package: str
    requires: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = tuple(DTYPES)
    tier: str = "exact"
    lora: bool = False
    over: str = ""
    trains: bool = False

    def missing(self) -> str:
        """The packages that are absent here, as a reason; empty where all are installed."""
        return harness.missing(*self.requires)

    def unfit(self, dtypes: Iterable[str], ranks: Iterable[int], train: bool) -> str:
        """Why it has no such layer; empty where it has one."""
        if train and not self.trains:
            return "no gradients"
        if not any(self.lora if rank else not self.over for rank in ranks):
            return "a LoRA branch only" if self.over else "no LoRA branch"
        return "" if set(dtypes) & set(self.dtypes) else f"x in {' or '.join(self.dtypes)} only"


REGISTRY: dict[str, Contender] = {}


def contender(name: str, package: str, **what: object) -> Callable[[Callable[..., Layer]], Callable[..., Layer]]:
    """Register ``prepare(problem) -> Layer`` under ``name``; see :class:`Contender` for the rest."""

    def register(prepare: Callable[[Problem], Layer]) -> Callable[[Problem], Layer]:
        REGISTRY[name] = Contender(prepare, package, **what)
        return prepare

    return register


@dataclass(frozen=True)
class Case:
    """A contender with its problem's settings: one line of a result."""

    name: str
    dtype: str
    rank: int = 0
    adapters: int = 1

    @property
    def label(self) -> str:
        branch = f" r{self.rank}" if self.rank else ""
        return f"{self.name} {self.dtype}{branch}{f' ×{self.adapters}' if self.adapters > 1 else ''}"


@dataclass
class Selection:
    """The cases of a run, and the contenders that it leaves out with the reason."""

    cases: list[Case] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)


def select(
    names: Iterable[str], dtypes: Iterable[str], ranks: Iterable[int] = (0,), adapters: Iterable[int] = (1,),
    train: bool = False,
) -> Selection:  # fmt: skip
    """Every meaningful combination, in the registry's order; a contender that has none is named."""
    chosen = Selection()
    for name in names:
        entry = REGISTRY[name]
        if reason := entry.missing() or entry.unfit(dtypes, ranks, train):
            chosen.absent[name] = reason
            continue
        for dtype in dtypes:
            if dtype in entry.dtypes:
                for rank in ranks:
                    if entry.lora if rank else not entry.over:
                        chosen.cases += [Case(name, dtype, rank, n) for n in (adapters if rank else (1,))]
    return chosen
