"""Tiles by measurement, with a clock of the test's own in the place of a GPU's."""

from __future__ import annotations

import json
import warnings
from typing import NamedTuple

import pytest
import torch

from pyfastpeft.ops import tuning

CPU = torch.device("cpu")
pytest.importorskip("triton")


class Cut(NamedTuple):
    columns: int
    depth: int


def around(cut):
    return [Cut(cut.columns // 2, cut.depth), Cut(cut.columns, cut.depth * 2)]


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """What each cut takes, changed by the test; the cuts that were timed, in order."""
    times, timed = {}, []

    def seconds(run):
        timed.append(run.args[0])
        return times.get(run.args[0], 1.0)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "_ENABLED", True)
    monkeypatch.setattr(tuning, "seconds", seconds)
    tuning._found.cache_clear()
    yield times, timed
    tuning._found.cache_clear()


def pick(kernel="a kernel"):
    return tuning.tuned((kernel, torch.bfloat16, 16, 32), CPU, Cut(64, 64), around, lambda cut: None)


def test_without_being_asked_for_it_times_nothing(clock, monkeypatch):
    monkeypatch.setattr(tuning, "_ENABLED", False)
    assert pick() == Cut(64, 64)
    assert not clock[1] and not tuning.path().exists()


def test_the_fastest_is_taken_and_timed_once(clock):
    times, timed = clock
    times[Cut(64, 128)] = 0.5
    assert pick() == pick() == Cut(64, 128)
    assert timed == [Cut(64, 64), Cut(32, 64), Cut(64, 128)]
    times[Cut(32, 64)] = 0.25
    assert pick("another") == Cut(32, 64)


def test_the_formula_stays_where_nothing_is_faster(clock):
    assert pick() == Cut(64, 64)


def test_a_later_process_finds_it_in_the_file_and_adds_to_it(clock):
    times, timed = clock
    times[Cut(32, 64)] = 0.5
    pick()
    held = json.loads(tuning.path().read_text())
    held["another GPU"] = {"a kernel": [1, 1]}
    tuning.path().write_text(json.dumps(held))
    pick("another")
    tuning._found.cache_clear()
    timed.clear()
    assert pick() == pick("another") == Cut(32, 64)
    assert not timed
    assert json.loads(tuning.path().read_text())["another GPU"] == held["another GPU"]


@pytest.mark.parametrize("text", ["{", "[]", '{"cpu": 3}', '{"cpu": {"a": ["64", 64]}}', '{"cpu": {"a": 5}}', "\udcff"])
def test_a_broken_file_is_ignored_with_a_warning_and_replaced(clock, text):
    tuning.path().parent.mkdir()
    tuning.path().write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.warns(UserWarning, match=r"tiles\.json is ignored"):
        assert pick() == Cut(64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuning._found.cache_clear()
        assert pick() == Cut(64, 64)


def test_tiles_of_another_version_are_found_anew(clock):
    pick()
    held = json.loads(tuning.path().read_text())
    tuning.path().write_text(json.dumps({place: {call: [64] for call in calls} for place, calls in held.items()}))
    tuning._found.cache_clear()
    assert pick() == Cut(64, 64)
    assert json.loads(tuning.path().read_text()) == held


def test_what_cannot_be_kept_still_serves(clock, monkeypatch):
    def full(text, path):
        raise OSError("No space left on device")

    monkeypatch.setattr(tuning, "write_text", full)
    clock[0][Cut(32, 64)] = 0.5
    with pytest.warns(UserWarning, match="could not be kept"):
        assert pick() == Cut(32, 64)
    assert pick() == Cut(32, 64)


def test_kernels_that_do_not_fit_are_passed_over(monkeypatch):
    from triton.runtime.errors import OutOfResources

    def run():
        raise OutOfResources(2**20, 2**17, "shared memory")

    monkeypatch.setattr("triton.testing.do_bench", lambda run, **how: run())
    assert tuning.seconds(run) == float("inf")
