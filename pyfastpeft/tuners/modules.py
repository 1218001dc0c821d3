"""Walking a model that may have wrappers of adapters in it, and putting modules into it and back."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Collection, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from ..adapters import Parts
from ..nn.bottleneck import BottleneckLayer
from ..nn.ends import HEADS, base_of, input_embedding, output_head
from ..nn.linear4bit import Linear4bit
from ..nn.lora_layer import LoraLayer
from ..nn.modules_to_save import ModulesToSave
from ..nn.rows_elsewhere import dims_elsewhere
from ..nn.trainable_tokens import TrainableTokens
from ..nn.weight_reads import passes_by
from .base import PeftConfig

WRAPPERS = (LoraLayer, ModulesToSave, TrainableTokens, BottleneckLayer)
"""What adapters put around modules."""


def ends_with(path: str, names: list[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def is_named(path: str, names: list[str] | str) -> bool:
    """Whether ``path`` ends with one of ``names``, or is matched whole by the regular expression that they are."""
    return re.fullmatch(names, path) is not None if isinstance(names, str) else ends_with(path, names)


def modules_of(model: nn.Module, repeated: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the base model's own modules: a wrapped one is given as its wrapper, and not looked into.

    A bottleneck is no wrapper here: what stands before it is given in its place. One module at several paths is given
    with the first alone, unless ``repeated``.
    """
    seen: set[int] = set()

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module._modules.items():
            if child is not None and (repeated or id(child) not in seen):
                seen.add(id(child))
                child_path = f"{path}.{name}" if path else name
                child = child.base_layer if isinstance(child, BottleneckLayer) else child
                yield child_path, child
                if not isinstance(child, (LoraLayer, ModulesToSave, TrainableTokens)):
                    yield from walk(child, child_path)

    yield from walk(model, "")


def names_of(paths: Collection[str], model: nn.Module) -> list[str] | str:
    """``target_modules`` that mean the modules at ``paths``, and none that only ends as one of them."""
    names = sorted(paths)
    if any(ends_with(path, names) for path, _ in modules_of(model) if path not in paths):
        return "|".join(map(re.escape, names))
    return names


def plain_modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(path, module, the wrapper right around it or itself) of the base model, as if no adapter were in it."""
    seen: set[int] = set()

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module, nn.Module]]:
        for name, child in module._modules.items():
            around = plain = child
            while isinstance(plain, WRAPPERS):
                around, plain = plain, plain.original_module if isinstance(plain, ModulesToSave) else plain.base_layer
            if plain is not None and id(plain) not in seen:
                seen.add(id(plain))
                child_path = f"{path}.{name}" if path else name
                yield child_path, plain, around
                yield from walk(plain, child_path)

    yield "", model, model
    yield from walk(model, "")


def parameters_of(plain: nn.Module, around: nn.Module) -> dict[str, nn.Parameter]:
    """Those of a module of :func:`plain_modules_of`, without what is merged into them."""
    merges = isinstance(around, (LoraLayer, TrainableTokens))
    return around.base_parameters() if merges else dict(plain.named_parameters(recurse=False))


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Let ``module`` stand at ``path`` in ``model``; where a bottleneck stands, before it."""
    parent, _, attribute = path.rpartition(".")
    holder = model.get_submodule(parent)
    if isinstance(holder, nn.TransformerEncoderLayer) and isinstance(module, WRAPPERS):
        module.register_forward_pre_hook(_is_called)
    if isinstance(module, WRAPPERS) and (dims := dims_elsewhere(model, path)) is not None:
        module.register_forward_pre_hook(partial(_check_rows, path=path, dims=dims))
    if isinstance(getattr(holder, attribute), BottleneckLayer):
        holder, attribute = getattr(holder, attribute), "base_layer"
    setattr(holder, attribute, module)
    set_packing(model, path)


def _is_called(module: nn.Module, args: tuple) -> None:
    """Does nothing: torch's encoder layers, which in evaluation read weights past modules, call those with hooks."""


def _check_rows(wrapper: nn.Module, args: tuple, path: str, dims: int) -> None:
    """Check that all rows use the same adapters in ``wrapper``, where what it is called with does not begin with rows
    (:func:`dims_elsewhere`)."""
    mode = wrapper.bank.mode
    if mode is None or (dims and not (args and args[0].dim() == dims)):
        return
    if differing := mode.differing(_adapters_in(wrapper)):
        raise ValueError(
            f"adapter_names has {differing} for some rows and not for others; {path!r} is called with what does not "
            "begin with the rows of the batch, so of the adapters there all rows must use the same; give the whole "
            "batch one with set_adapter"
        )


def _adapters_in(wrapper: nn.Module) -> set[str]:
    """The adapters that have something in ``wrapper``."""
    if isinstance(wrapper, TrainableTokens):
        return set(wrapper.rows.indices)
    return {name for part in wrapper.children() if isinstance(part, Parts) for name in part}


_PACKS = "_packs_without_adapters"
"""Where an encoder has its own ``use_nested_tensor`` meanwhile."""


def set_packing(model: nn.Module, path: str) -> None:
    """Let torch's encoders around ``path`` pack padded rows into nested tensors where no adapter, which takes none, is
    in them."""
    names = path.split(".")
    for encoder in (model.get_submodule(".".join(names[:i])) for i in range(len(names))):
        if not isinstance(encoder, nn.TransformerEncoder):
            continue
        if any(isinstance(module, WRAPPERS) for module in encoder.modules()):
            vars(encoder).setdefault(_PACKS, encoder.use_nested_tensor)
            encoder.use_nested_tensor = False
        elif _PACKS in vars(encoder):
            encoder.use_nested_tensor = vars(encoder).pop(_PACKS)


def standing(model: nn.Module, path: str) -> nn.Module | None:
    """What stands at ``path``, a bottleneck as well: a user may have put something else there since."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def at(model: nn.Module, path: str) -> nn.Module | None:
    """What stands where :func:`put` puts something."""
    there = standing(model, path)
    return there.base_layer if isinstance(there, BottleneckLayer) else there


def put_back(model: nn.Module, path: str, wrapper: nn.Module, module: nn.Module) -> None:
    """Let ``module`` stand at ``path`` again, if ``wrapper`` still does."""
    if at(model, path) is wrapper:
        put(model, path, module)


def inside_of(path: str, others: Iterable[str]) -> bool:
    """Whether ``path`` is one of ``others``, or inside one."""
    return any(path == other or path.startswith(f"{other}.") for other in others)


def ends_of(model: nn.Module) -> list[nn.Module]:
    """The input embedding and the output head, as far as there are any."""
    return [end for end in (input_embedding(model), output_head(model)) if end is not None]


def says_tied(model: nn.Module) -> bool:
    """Whether the model's configuration says that its output head has the weight of the input embedding."""
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


def tied_ends(model: nn.Module) -> list[nn.Module]:
    """Both ends where they share one weight, without what adapters put around them; else none."""
    ends = [base_of(end) for end in ends_of(model)]
    weights = [getattr(end, "weight", None) for end in ends]
    return ends if len(ends) == 2 and weights[0] is not None and weights[0] is weights[1] else []


def find_saved(config: PeftConfig, model: nn.Module) -> dict[str, nn.Module]:
    """Path → module for every module of ``modules_to_save``.

    As in PEFT a path need only end so: DistilBERT's ``pre_classifier`` belongs to its ``classifier``. What lies inside
    another of them is trained with that one.
    """
    wanted = tuple(config.modules_to_save or ())
    found: dict[str, nn.Module] = {}
    for path, module in modules_of(model):
        if path.endswith(wanted) and not inside_of(path, found):
            found[path] = module
    return found


def inside_saved(model: nn.Module) -> dict[str, str]:
    """Path → path of the wrapper it lies in, for what is inside modules that adapters train whole."""
    wrappers = {path: m for path, m in modules_of(model) if isinstance(m, ModulesToSave)}
    return {
        f"{path}.{inner}": path
        for path, wrapper in wrappers.items()
        for inner, _ in wrapper.original_module.named_modules()
        if inner
    }


def hint(asked: list[str] | str, model: nn.Module, paths: Iterable[str]) -> str:
    """A sentence for an error message: what may have been meant by ``asked``, which matches no module of ``model``.

    Args:
        asked: names, or one regular expression.
        paths: of the modules that could be meant.
    """
    for path, outer in inside_saved(model).items():
        if is_named(path, asked):
            return f"{path!r} lies in {outer!r}, which modules_to_save of an adapter holds"
    if isinstance(asked, str) and any(path.endswith(f".{asked}") for path, _ in modules_of(model)):
        return f"A string is one regular expression for whole paths; give [{asked!r}] for the modules of that name"
    names = sorted({path.rpartition(".")[2] for path in paths})
    close: list[str] = []
    for name in [asked] if isinstance(asked, str) else asked:
        close += difflib.get_close_matches(name.rpartition(".")[2], names, n=3, cutoff=0.5)
    if close:
        return f"Close matches: {', '.join(dict.fromkeys(close))}"
    return f"Names that can be given: {', '.join(names)}"


def unmatched(names: list[str] | str, paths: Collection[str]) -> list[str]:
    """Those of ``names`` that none of ``paths`` ends with; of a regular expression there are none."""
    return [] if isinstance(names, str) else [n for n in names if not any(ends_with(path, [n]) for path in paths)]


def no_target(asked: list[str] | str, model: nn.Module, paths: Iterable[str]) -> ValueError:
    """What to raise where ``asked``, of ``target_modules``, is no module of ``model``; arguments as of :func:`hint`."""
    said = f"target_modules {asked!r} matches no module of {type(model).__name__}"
    return ValueError(f"{said}. {hint(asked, model, paths)}")


def check_called(model: nn.Module, targets: Iterable[str], advice: str) -> None:
    """Whether the layers at ``targets`` are all called, so that what is put around them has an effect.

    Raises:
        ValueError: one is not (:func:`passes_by`); ``advice`` says what to do.
    """
    for path in targets:
        if passes_by(model, path):
            holder = type(model.get_submodule(path.rpartition(".")[0])).__name__
            raise ValueError(
                f"target_modules matches {path!r}, whose weight {holder} reads without calling the layer in its place, "
                f"so that an adapter there has no effect; {advice}"
            )


def unmatched_saved(config: PeftConfig, model: nn.Module) -> str | None:
    """Says which names in ``modules_to_save`` no module has; a head that the task adds need not exist."""
    saved, added = find_saved(config, model), HEADS.get(config.task_type, [])
    paths = [path for path, _ in modules_of(model)]
    paths += [path for path, outer in inside_saved(model).items() if outer in saved]
    missing = [n for n in config.modules_to_save or () if n not in added and not any(p.endswith(n) for p in paths)]
    if not missing:
        return None
    named = [path for path in paths if not path.rpartition(".")[2].isdigit()]
    return f"modules_to_save {missing} match no module of {type(model).__name__}. {hint(missing, model, named)}"


def trainable_copy(module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy whose every parameter can train: 4-bit layers in it become full precision, in ``dtype`` (None: the one
    each was quantized from)."""
    if isinstance(module, Linear4bit):
        return module.to_linear(dtype)
    # It goes by the model's configuration, which may be given another attention later.
    configs = {id(m.config): m.config for m in module.modules() if "config" in vars(m)}
    module = copy.deepcopy(module, configs)
    for path, child in list(module.named_modules()):
        if isinstance(child, Linear4bit):
            put(module, path, child.to_linear(dtype))
    return module


def trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict that :func:`trainable_copy` would have, without making it."""
    state = {}
    for path, child in module.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(child, Linear4bit):
            state[f"{prefix}weight"] = torch.empty(child.out_features, child.in_features, device="meta")
            if child.bias is not None:
                state[f"{prefix}bias"] = child.bias
        else:
            child._save_to_state_dict(state, prefix, keep_vars=True)
    return state


def dense_dtype(model: nn.Module) -> torch.dtype | None:
    """What the 4-bit layers of ``model`` are to become, so that they go with the rest: its dtype now, as transformers
    defines it and as if no adapter were in it. None where it has no such thing: each layer's own."""
    if not hasattr(type(model), "dtype"):
        return None
    parameters = (p for _, plain, around in plain_modules_of(model) for p in parameters_of(plain, around).values())
    return next((p.dtype for p in parameters if p.is_floating_point()), None)


@torch.inference_mode(False)  # what comes out may be trained later
@torch.no_grad()
def dequantize_model(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Replace every :class:`Linear4bit` of ``model`` by its layer in full precision and forget the quantization.

    Args:
        dtype: of all parameters. Default: each one's own, and of a 4-bit weight :func:`dense_dtype`.
    """
    dense = dense_dtype(model) if dtype is None else dtype
    for path, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            put(model, path, module.to_linear(dense))
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    if getattr(model, "hf_quantizer", None) is not None:
        if hasattr(model.hf_quantizer, "transpose_back"):
            model.hf_quantizer.transpose_back(model)
        model.hf_quantizer = None
        model.is_quantized = False
        for name in ("quantization_method", "is_loaded_in_4bit"):  # a model of bitsandbytes' takes no other dtype
            vars(model).pop(name, None)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
