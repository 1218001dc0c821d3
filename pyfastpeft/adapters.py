"""The bank: which adapters a model holds, which are active, and which row of a batch uses which.

Layers do not look anything up when they run: whatever changes here is pushed into each layer's plan beforehand. So
exchanging the active adapter writes one reference a layer, builds nothing, and leaves compiled code valid.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .caching import registered
from .ops.tracing import is_compiling, is_repeated

if TYPE_CHECKING:
    from .nn.lora_layer import LoraLayer
    from .nn.modules_to_save import ModulesToSave
    from .nn.trainable_tokens import TokenRows

BASE = "__base__"
"""In ``adapter_names``: no adapter."""
CARRIED = "_pyfastpeft_adapters"
"""The attribute of a base model that holds the configurations of the adapters it carries."""


class Prefix(NamedTuple):
    """Keys and values that a layer's queries see before those of their own row.

    ``k`` and ``v`` are [slots, kv heads, length, dim]; ``index`` [batch] int64 names each row's slot (-1: none), None
    the first slot for all; ``lengths`` [slots] int64 where slots are padded at the end.
    """

    k: Tensor
    v: Tensor
    index: Tensor | None = None
    lengths: Tensor | None = None


Names = str | Sequence[str]
"""What one row uses: a name, ``"__base__"``, or several names at once."""


def in_order(names: Collection[str]) -> tuple[str, ...]:
    """``names`` in their order, those of a set in the alphabet's: soft prompts lie in it, in every process alike."""
    return tuple(sorted(names, key=str) if isinstance(names, (set, frozenset)) else names)


class Rows:
    """The adapters of each row of a batch.

    A layer may see more rows than the batch has, batch-major: the positions of a sequence, the beams of a row. Each
    row of the batch then stands for equally many consecutive rows.

    Args:
        adapter_names: for each row of the batch a name in ``known``, ``"__base__"``, or a list of names.
        known: the model's adapters.
        since: :attr:`AdapterBank.changes` when these were known: the adapters are those that had the names then.

    Attributes:
        of_row: for each row its adapters, in the order given: several soft prompts lie in it.
        names: all adapters in use, in the order of ``known``.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(self, adapter_names: Sequence[Names], known: Sequence[str], since: int | None = None) -> None:
        several = (list, tuple, set, frozenset)
        wanted = [in_order(names) if isinstance(names, several) else (names,) for names in adapter_names]
        used = set().union(*wanted)
        unknown = sorted((n for n in used if n != BASE and n not in known), key=str)
        if unknown:
            raise ValueError(f"adapter_names holds {unknown}; the adapters of this model are {list(known)}")
        self.of_row = tuple(tuple(dict.fromkeys(n for n in row if n != BASE)) for row in wanted)
        self._alike = len(set(map(frozenset, self.of_row))) == 1
        self.names = tuple(n for n in known if n in used)
        self._uses = torch.tensor([[n in row for n in self.names] for row in wanted], dtype=torch.bool, device="cpu")
        self._masks: dict[tuple, Tensor] = {}
        self.since = since

    @property
    def mixes(self) -> bool:
        """Whether a layer keeps the rows apart; else it does what it does while their adapters are active.

        What is recorded does so always: it serves any choice.
        """
        return is_repeated() or not self._alike

    def mask(
        self, names: tuple[str, ...], rows: int, device: torch.device, ranks: tuple[int, ...] | None = None
    ) -> Tensor:
        """Float32 [rows, sum(ranks)]: one in the columns of the row's adapters, zero elsewhere.

        Args:
            ranks: how many columns each of ``names`` has; default: one.
        """
        key = (names, ranks, rows, device)
        found = self._masks.get(key)
        if found is None:
            batch = len(self.of_row)
            if rows % batch:
                raise ValueError(
                    f"adapter_names has {batch} names; it must have one a row, and a layer saw {rows} rows"
                )
            columns = names if ranks is None else [n for n, r in zip(names, ranks, strict=True) for _ in range(r)]
            slots = [self.names.index(n) for n in columns]
            chosen = self._uses[:, slots].repeat_interleave(rows // batch, dim=0)
            found = self._masks[key] = chosen.to(device, torch.float32)
        return found

    def of_rows(self, which: Sequence[int]) -> Rows:
        """The mode of a batch each of whose rows uses what row ``which`` of this one's does."""
        return Rows([self.of_row[row] for row in which], self.names, self.since)

    def check_lead(self, x: Tensor, dims: int) -> None:
        """Check that the first dimension of ``x`` is the batch, where rows use different adapters.

        Args:
            dims: how many dimensions ``x`` has at least if batch and positions are not flattened into one.

        Raises:
            ValueError: it counts something else, and which row of the batch uses it is not known.
        """
        if not self._alike and x.dim() >= dims and x.shape[0] % len(self.of_row):
            raise ValueError(
                f"adapter_names has {len(self.of_row)} names; it must have one a row, and a layer saw an input of "
                f"shape {tuple(x.shape)}, which does not begin with rows of the batch: all must use the same adapters"
            )

    def differing(self, names: Collection[str]) -> list[str]:
        """Those of the adapters ``names`` that some rows use and others do not."""
        use = {name: [name in row for row in self.of_row] for name in self.names if name in names}
        return [name for name, rows in use.items() if any(rows) and not all(rows)]


NO_ROWS = Rows((), ())
"""The mode in which every layer is the base model's."""


class _Mode(threading.local):
    """Per-thread state, so that concurrent requests can each choose their adapters.

    Fields are set on the instance because torch.compile does not guard class attributes of a ``threading.local``.

    Args:
        blocks: those of :meth:`AdapterBank.disabling` that are open, in any thread.
    """

    def __init__(self, blocks: list[object]) -> None:
        self.blocks = blocks
        self.began_in = blocks[-1] if blocks else None
        self.rows: Rows | None = None
        self.run: Any = None
        self.reach = 0

    def __reduce__(self) -> tuple:
        return _Mode, ([],)


class Parts(nn.ModuleDict):
    """Modules by adapter name, to which the layers' plans refer.

    Args:
        exchanged: called when a user puts another module (a dropout, a head) in the place of one.
    """

    def __init__(self, exchanged: Callable[[], None]) -> None:
        super().__init__()
        self._exchanged = exchanged

    def add_module(self, name: str, module: nn.Module | None) -> None:
        exchanges = name in self
        super().add_module(name, module)
        if exchanges:
            self._exchanged()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in vars(self).get("_modules", ()):
            self._exchanged()

    def _get_name(self) -> str:
        return nn.ModuleDict.__name__


class Holder(Protocol):
    """What depends on which adapters are active."""

    _plan: Any
    """What :meth:`plan` gave for the adapters that are active now."""

    def plan(self, active: tuple[str, ...]) -> Any:
        """What to do while ``active`` are the adapters; called once for a set of names."""


class AdapterBank:
    """The adapters of one model and the layers that carry them.

    Attributes:
        layers: path in the base model → layer with LoRA.
        wrappers: path → module kept in a trainable copy an adapter (``modules_to_save``).
        tokens: path of an embedding → the rows of it that adapters train (``trainable_token_indices``).
        others: what other methods have in the model and want a plan for; the keys are the methods' own.
        chosen: names of the active adapters, disabled or not.
        disabled: whether they are all out of use.
        frozen: names of the adapters that are for inference, active or not.
        prompts: adapter name → the parameters of a soft prompt.
        mode: None: every row uses the active adapters; else the rows' own choice. Each thread has its own; one that
            begins while another is ``disabling`` begins without adapters.
        run: what soft prompts have worked out for the forward that is running. Each thread has its own.
        reach: the sequence length for which soft prompts are being worked out, where their keys depend on it (rotary
            embeddings that change with the length); else 0. A tensor while code is compiled. Each thread has its own.
        kept: what soft prompts keep from one forward to the next; forgotten whenever the structure changes.
        version: grows whenever a layer may have another plan or other values of its parameters.
        thaws: grows whenever an adapter ceases to be for inference, or to be, so that copies of it may become old.
        changes: grows whenever an adapter is taken up or released.
    """

    def __init__(self) -> None:
        self.layers: dict[str, LoraLayer] = {}
        self.wrappers: dict[str, ModulesToSave] = {}
        self.tokens: dict[str, TokenRows] = {}
        self.others: dict[str, Holder] = {}
        self.prompts = nn.ModuleDict()
        self.chosen: tuple[str, ...] = ()
        self.disabled = False
        self.frozen: frozenset[str] = frozenset()
        self._mode = _Mode([])
        self._layouts: dict[str, Any] = {}
        self.kept: dict[Any, Any] = {}
        self.version = 0
        self.thaws = 0
        self.changes = 0
        self._plans: dict[tuple[str, ...], list] = {}
        self._find: dict[str, Callable[[], list[nn.Parameter]]] = {}
        self._trainable: dict[str, list[nn.Parameter]] = {}
        self._stale: set[str] = set()  # whose parameters may be other objects than those in _trainable
        self._registered = registered()
        self._training: set[str] = set()
        self._undecided: set[str] = set()  # of whose parameters `requires_grad` is not known to be right
        self._let: set[str] = set()  # for which :meth:`let_train` was called
        self._held: dict[str, int] = {}  # by name: the change by which it was taken up

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"kept": {}}  # it is known by where this object's own tensors are

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the adapters in use."""
        return () if self.disabled else self.chosen

    @property
    def enabled(self) -> bool:
        """Whether the active adapters are in use in the calling thread."""
        return not self.disabled and self.mode is not NO_ROWS

    @property
    def held_back(self) -> bool:
        """Whether the calling thread itself has set all adapters aside, those that rows choose too."""
        return self._mode.rows is NO_ROWS

    @property
    def mergeable(self) -> list[LoraLayer | TokenRows]:
        """All that adapters can be merged into."""
        return [*self.layers.values(), *self.tokens.values()]

    @property
    def mode(self) -> Rows | None:
        mode = self._mode
        rows = mode.rows
        if rows is None:
            return NO_ROWS if mode.began_in is not None and mode.began_in in mode.blocks else None
        if not is_compiling() and rows.since != self.changes:
            gone = [name for name in rows.names if not self.holds(name, rows.since)]
            if gone:
                raise RuntimeError(f"adapters {gone} were deleted while a request that chose them by adapter_names ran")
        return rows

    def holds(self, name: str, since: int | None) -> bool:
        """Whether the adapter ``name`` is here, and has been since that change."""
        held = self._held.get(name)
        return held is not None and (since is None or held <= since)

    @property
    def run(self) -> Any:
        return self._mode.run

    @run.setter
    def run(self, run: Any) -> None:
        self._mode.run = run

    @property
    def reach(self) -> int | Tensor:
        return self._mode.reach

    def check_unmerged(self, name: str) -> None:
        """Whether the adapter ``name`` is in no base weight.

        Raises:
            ValueError: it is merged.
        """
        if any(name in layer.merged_adapters for layer in self.mergeable):
            raise ValueError(f"adapter {name!r} is merged; call unmerge_adapter() first")

    def parameters(self, name: str) -> list[nn.Parameter]:
        """Those that train with ``name``."""
        if not is_compiling():
            self._look()
            if name in self._stale:
                self._trainable[name] = self._find[name]()
                self._stale.discard(name)
        return self._trainable[name]

    @property
    def layouts(self) -> dict[str, Any]:
        """What a hot-swap works out once about an adapter; forgotten whenever the structure changes."""
        self._look()
        return self._layouts

    def _look(self) -> None:
        if self._registered != (now := registered()):  # a user may have put a parameter in the place of another
            self._registered = now
            self._stale.update(self._find)
            self._layouts.clear()

    def hold(self, name: str, find: Callable[[], list[nn.Parameter]]) -> None:
        """Take up an adapter: the parameters that ``find`` gives train while it is active and not for inference."""
        self._find[name], self._trainable[name] = find, find()
        self.changes += 1
        self._held[name] = self.changes
        self._undecided.add(name)

    def release(self, name: str) -> None:
        """Undo :meth:`hold`, if that was done; the parameters are frozen."""
        if name not in self._find:
            return
        for parameter in self.parameters(name):
            parameter.requires_grad_(False)
        self.thaws += 1  # another may have its name afterwards
        self.changes += 1
        del self._find[name], self._trainable[name], self._held[name]
        self._training.discard(name)
        self._undecided.discard(name)

    def vacate(self) -> None:
        """Forget all adapters, whose layers are out of the model. Copies of modules that stay in it go on training."""
        self.changes += 1
        for held in (self._find, self._trainable, self._held, self._training, self._undecided, self._let):
            held.clear()
        self.chosen = ()
        self.forget()

    def let_train(self, name: str, trains: bool) -> None:
        """Let the parameters of ``name`` train, or not, whether it is active or not, until :meth:`decide`."""
        for parameter in self.parameters(name):
            parameter.requires_grad_(trains)
        self._let.add(name)

    def prepare(self, active: tuple[str, ...]) -> list:
        """Each layer's plan for these adapters; built once, then exchanged by reference."""
        plans = self._plans.get(active)
        if plans is None:
            holders = [*self.mergeable, *self.wrappers.values(), *self.others.values()]
            plans = self._plans[active] = [(h, h.plan(active)) for h in holders]
        return plans

    def activate(self, chosen: tuple[str, ...]) -> None:
        """Make ``chosen`` the active adapters.

        Adapters train while they are in use and not for inference. That is set for those that are new and for those
        whose use begins or ends; in the others, parameters that a user has frozen stay frozen.
        """
        self._push(() if self.disabled else chosen)
        self.chosen = chosen
        training = set(self.active) - self.frozen
        for name in (training ^ self._training) | self._undecided:
            for parameter in self.parameters(name):
                parameter.requires_grad = name in training
        self._training = training
        self._undecided.clear()

    def freeze(self, names: frozenset[str]) -> None:
        """Let the adapters ``names`` be those for inference."""
        if names == self.frozen:
            return
        if any(name in self._find for name in self.frozen - names):  # what is written to it from now on leaves no trace
            self.thaws += 1
            self.kept.clear()
            for layer in self.layers.values():
                layer.forget()
        self.frozen = names

    def decide(self) -> None:
        """Let the next :meth:`activate` set anew what trains, also where users have frozen or unfrozen parameters."""
        self._undecided |= (self._training | self._let) & self._find.keys()
        self._let.clear()

    def refresh(self) -> None:
        """Rebuild every plan: a layer's adapters, their scaling or whether they are merged have changed."""
        self.forget()
        self._push(self.active)

    def refresh_one(self, holder: Holder) -> None:
        """:meth:`refresh` where only ``holder`` has changed."""
        self.forget()
        # Past nn.Module.__setattr__, to which a plan may be one more submodule.
        holder.__dict__["_plan"] = holder.plan(self.active)

    def forget(self) -> None:
        """Layers or parameters may have been exchanged: work everything out again when it is next needed."""
        self.version += 1
        self._stale.update(self._find)
        self._plans.clear()
        self._layouts.clear()
        self.kept.clear()

    def _push(self, active: tuple[str, ...]) -> None:
        self.version += 1
        for holder, plan in self.prepare(active):
            # Past nn.Module.__setattr__, which costs more than all else here.
            holder.__dict__["_plan"] = plan

    def using(self, mode: Rows | None) -> AbstractContextManager[None]:
        """Run with ``mode`` in force."""
        return self._having("rows", mode)

    @contextmanager
    def disabling(self) -> Iterator[None]:
        """Let threads that begin in the meantime, as one does that streams an answer, begin without adapters."""
        block = object()
        self._mode.blocks.append(block)
        try:
            yield
        finally:
            self._mode.blocks.remove(block)

    def running(self, run: Any) -> AbstractContextManager[None]:
        """With ``run`` as what soft prompts have worked out."""
        return self._having("run", run)

    def reaching(self, reach: int | Tensor) -> AbstractContextManager[None]:
        """With ``reach`` for soft prompts to be worked out."""
        return self._having("reach", reach)

    @contextmanager
    def _having(self, name: str, value: Any) -> Iterator[None]:
        before = getattr(self._mode, name)
        setattr(self._mode, name, value)
        try:
            yield
        finally:
            setattr(self._mode, name, before)
