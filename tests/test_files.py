"""Files are written whole or not at all, and damaged ones are refused with one clear error."""

from __future__ import annotations

import json
import os
import signal
import stat
import struct
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open

from pyfastpeft.hub.files import (
    atomic_write,
    load_safetensors,
    read_json,
    save_safetensors,
    write_text,
)


def container(header: dict | bytes, data: bytes = b"") -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + data


def tensor(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


HOSTILE = {
    "empty": b"",
    "shorter_than_its_length_field": b"\0\0\0",
    "huge_header": struct.pack("<Q", 2**62) + b"{}",
    "header_longer_than_the_file": struct.pack("<Q", 1000) + b"{}",
    "header_not_json": container(b"\xff\xfe{"),
    "header_not_an_object": container(b"[1, 2]"),
    "offsets_beyond_the_end": container(tensor([2], 0, 8), b"\0" * 4),
    "offsets_backwards": container(tensor([2], 8, 0), b"\0" * 8),
    "offsets_do_not_fit_the_shape": container(tensor([3], 0, 8), b"\0" * 8),
    "size_overflows": container(tensor([2**40, 2**40], 0, 8), b"\0" * 8),
    "size_of_nothing_overflows": container(tensor([0, 2**63], 0, 0)),
    "unknown_dtype": container(tensor([2], 0, 8, "F99"), b"\0" * 8),
    "data_left_over": container(tensor([2], 0, 8), b"\0" * 12),
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94.",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_safetensors_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.safetensors is not a valid safetensors file"):
        load_safetensors(path)


def test_a_safetensors_file_cut_anywhere_is_refused(tmp_path):
    whole = tmp_path / "whole"
    save_safetensors({"a": torch.randn(5, 7), "b": torch.arange(3)}, whole)
    raw = whole.read_bytes()
    cut = tmp_path / "cut"
    for length in range(len(raw)):
        cut.write_bytes(raw[:length])
        with pytest.raises(ValueError, match="cut is not a valid"):
            load_safetensors(cut)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("room", [0.5, 1.5])  # in units of the file, which is mapped twice
def test_memory_that_runs_out_is_not_a_damaged_file(tmp_path, room):
    size = 2**26
    save_safetensors({"a": torch.zeros(size // 4)}, tmp_path / "weights")
    code = f"""
import resource, sys
from pyfastpeft.hub.files import load_safetensors
load_safetensors(sys.argv[1])
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + int({room} * {size}),) * 2)
load_safetensors(sys.argv[1])
"""
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "weights"], capture_output=True, text=True)
    assert run.returncode == 1
    assert "allocate memory" in run.stderr and "damaged" not in run.stderr


def as_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_tensors_come_back_bit_for_bit_whatever_their_strides(tmp_path):
    tensors = {
        "transposed": torch.randn(4, 6).t(),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "bf16": torch.randn(3, 5, dtype=torch.bfloat16)[:, ::2],
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    save_safetensors(tensors, tmp_path / "x")
    back = load_safetensors(tmp_path / "x")
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        assert back[key].dtype == value.dtype
        assert back[key].shape == value.shape
        assert torch.equal(as_bytes(back[key]), as_bytes(value)), key
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensors_that_share_memory_are_refused_and_the_old_file_stays(tmp_path):
    save_safetensors({"a": torch.ones(2)}, tmp_path / "x")
    before = (tmp_path / "x").read_bytes()
    shared = torch.zeros(4)
    with pytest.raises(ValueError, match="x cannot hold these tensors"):
        save_safetensors({"a": shared, "b": shared}, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == before
    assert os.listdir(tmp_path) == ["x"]


def test_an_error_while_writing_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    write_text("old", tmp_path / "x")
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "x") as aside:
        aside.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "x").read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("syncs_folders", [True, False])
def test_a_file_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch, syncs_folders):
    steps, replace, files = [], os.replace, len(os.listdir("/proc/self/fd"))

    def sync(fd):
        steps.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        if steps[-1] == "folder" and not syncs_folders:
            raise OSError("not on this file system")

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", lambda *paths: (steps.append("name"), replace(*paths)))
    write_text("new", tmp_path / "x")
    assert steps == ["file", "name", "folder"]
    assert (tmp_path / "x").read_text() == "new"
    assert len(os.listdir("/proc/self/fd")) == files


FULL_DISK = """
import resource, sys, torch
from pyfastpeft.hub.files import save_safetensors, write_text
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for save in (lambda path: save_safetensors({"a": torch.randn(3000)}, path), lambda path: write_text("a" * 9000, path)):
    try:
        save(sys.argv[1])
        sys.exit(4)
    except OSError as error:
        if sys.argv[1] not in str(error):
            sys.exit(3)
"""

KILLED = """
import sys, time
from pyfastpeft.hub.files import atomic_write
with atomic_write(sys.argv[1]) as aside:
    aside.write_text("half")
    print("half", flush=True)
    time.sleep(60)
"""


def test_a_disk_that_fills_up_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "x"
    save_safetensors({"a": torch.ones(2)}, path)
    before = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], env=os.environ | {"PYTHONPATH": _root()})
    assert done.returncode == 0
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x"]


def test_a_kill_in_the_middle_of_a_save_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "x"
    write_text("old", path)
    command = [sys.executable, "-c", KILLED, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": _root()})
    assert process.stdout.readline() == b"half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.read_text() == "old"


def _root() -> str:
    import pyfastpeft

    return os.path.dirname(os.path.dirname(pyfastpeft.__file__))


def test_a_reader_sees_the_old_file_or_the_new_one_and_nothing_between(tmp_path):
    path = tmp_path / "x"
    write_text("0" * 100_000, path)
    script = (
        "import sys\nfrom pyfastpeft.hub.files import write_text\n"
        "for i in range(60): write_text(str(i % 10) * 100_000, sys.argv[1])"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, str(path)], env=os.environ | {"PYTHONPATH": _root()})
    while writer.poll() is None:
        text = path.read_text()
        assert text == text[0] * 100_000
        time.sleep(0.001)
    assert writer.returncode == 0
    assert path.read_text() == "9" * 100_000


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b'"text"', b"[" * 100_000, b"1" * 5_000])
def test_damaged_json_is_refused_by_name(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("read", [read_json, load_safetensors])
def test_a_file_that_is_not_there_is_named(tmp_path, read):
    (tmp_path / "a_folder").mkdir()
    for name in ("nothing_here", "a_folder"):
        with pytest.raises(FileNotFoundError, match=name):
            read(tmp_path / name)
