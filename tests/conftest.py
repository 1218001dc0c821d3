"""Settings and fixtures shared by all tests."""

from __future__ import annotations

import os

# Read when the OpenMP runtime and the hub clients start, so set before torch is imported anywhere.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import atexit
import contextlib
import gc
import random
import sys
import zlib

import pytest
import torch

import pyfastpeft  # noqa: F401  (registers the operators)
from pyfastpeft.ops import backends, dense
from pyfastpeft.ops.dense import outruns_torch

ISAS = list(torch.ops.pyfastpeft.available_isas())


def pytest_collection_modifyitems(items):
    """What takes long runs first: the short tests fill up whichever of pytest-xdist's processes is ahead at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported stays, and is looked through by no collection of garbage: that took a quarter of a second, and
    accelerate asks for one wherever it trains."""
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


# What stays frozen is not let go at the end either, which nanobind takes for leaks and lists below the summary. Before
# that pytest looks twice for what the tests left.
atexit.register(gc.unfreeze)


@pytest.fixture
def layers_of_torch(monkeypatch):
    """Dense layers in which torch multiplies, whatever the CPU: what other products are compared with."""
    monkeypatch.setattr(dense, "outruns_torch", lambda dtype: False)


@contextlib.contextmanager
def instruction_set(name):
    chosen = torch.ops.pyfastpeft.isa()
    assert torch.ops.pyfastpeft.set_isa(name) == name
    outruns_torch.cache_clear()
    yield
    torch.ops.pyfastpeft.set_isa(chosen)
    outruns_torch.cache_clear()


@pytest.fixture
def by_threads():
    """``by_threads(compute, *counts)``: the tensors that ``compute()`` gives, to the same bits on as many threads."""

    def same(compute, *counts):
        results = []
        for count in counts:
            torch.set_num_threads(count)
            results.append(compute())
        for other in results[1:]:
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(other, results[0], strict=True))
        return results[0]

    before = torch.get_num_threads()
    yield same
    torch.set_num_threads(before)


@pytest.fixture(params=ISAS)
def isa(request):
    """Run the test once under each instruction set this machine has kernels for."""
    with instruction_set(request.param):
        yield request.param


@pytest.fixture
def plain_torch(monkeypatch):
    """Operators over plain tensors are torch's, so that a comparison with what runs on torch may be of every bit."""
    monkeypatch.setattr(backends, "_FORCED", backends.Backend.REFERENCE)


@pytest.fixture(params=[*ISAS, "cuda"])
def device(request):
    """Run the test once under each instruction set, and once on a GPU: tensors that it makes without saying where are
    made there."""
    if request.param != "cuda":
        with instruction_set(request.param):
            yield torch.device("cpu")
    elif not torch.cuda.is_available():
        pytest.skip("no GPU is here")
    else:
        with torch.device("cuda"):
            yield torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def seed(request):
    """A fresh seed for every test and every run of the suite; PYFASTPEFT_TEST_SEED repeats a run.

    The seed is printed, so pytest shows it beside a failure.
    """
    value = _seed_of(request.node.nodeid)
    print(f"PYFASTPEFT_TEST_SEED={_RUN_SEED} (seed of this test: {value})")
    torch.manual_seed(value)
    with contextlib.suppress(ImportError):  # which torch does without
        import numpy as np

        np.random.seed(value)
    random.seed(value)
    return value


@pytest.fixture(autouse=True)
def fresh_compiler():
    """What a test before compiled, or gave up compiling, is nothing to this one."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


@pytest.fixture(scope="module")
def in_common():
    """``in_common(make, *arguments)``: what ``make`` made of them when a test of the module first asked.

    Its random numbers are fresh in every run of the suite. For references that take longer than the kernels of an
    instruction set, which is all that the tests differ in.
    """
    made = {}

    def get(make, *arguments):
        key = make, arguments
        if key not in made:
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                torch.manual_seed(_seed_of(f"{make.__qualname__}{arguments}"))
                made[key] = make(*arguments)
        return made[key]

    return get


_RUN_SEED = int(os.environ.get("PYFASTPEFT_TEST_SEED", random.SystemRandom().randrange(2**31)))


def _seed_of(name):
    return (_RUN_SEED + zlib.crc32(name.encode())) % 2**32


@pytest.fixture
def interrupted(monkeypatch):
    """``interrupted(owner, name)``: at the end of its first call there this function is interrupted, as by Ctrl-C."""

    def patch(owner, name):
        function, calls = getattr(owner, name), []

        def run(*args, **kwargs):
            result = function(*args, **kwargs)
            calls.append(name)
            if len(calls) == 1:
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(owner, name, run)

    return patch
