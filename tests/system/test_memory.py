"""The process keeps freed memory for the next tensors, without growing; where that is impossible nothing happens."""

from __future__ import annotations

import ctypes
import json
import platform
import subprocess
import sys
from typing import Any

import pytest

from rada_fast import _env
from rada_fast.system import memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is one of glibc's")

PROGRAM = """
import json, resource
from pathlib import Path
import torch
from rada_fast.system.memory import keep_freed_memory

torch.set_num_threads(1)
kept = keep_freed_memory()

def use(mebibytes):
    # As a layer does: a tensor that survives until the next one is there, and others that do not.
    first = torch.ones(mebibytes * 2**18)
    second = first + 1
    del first
    return (second * 2).relu_()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 2**20

def growth(action, numbers, rounds=10):
    # MiB by which the process grows, and pages that it takes, in the second half of its rounds
    for turn in range(2 * rounds):
        if turn == rounds:
            start, before = resident(), faults()
        shift = turn % len(numbers)
        for number in numbers[shift:] + numbers[:shift]:
            action(number)
    return resident() - start, faults() - before

grown, taken = growth(use, [40, 3, 17, 40, 1, 29, 8, 35, 12, 23])

from rada_fast.models.vision_language import load_model

model = load_model("embedded")
by_encoding, _ = growth(lambda number: model.image_features(torch.zeros(number, 3, 48, 48)), [1, 30, 7, 52, 3, 16], 4)
found = {"kept": kept, "again": keep_freed_memory(), "taken": taken, "grown": grown, "by encoding": by_encoding}
print(json.dumps(found))
"""


def run(**variables: str) -> dict[str, Any]:
    """Return what the program above reports in a process of its own, whose allocator nothing has changed."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=_env.with_variables(**variables), capture_output=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_freed_memory_is_not_paged_in_again_and_does_not_grow() -> None:
    kept = run()
    assert kept["kept"] is True
    assert kept["again"] is True
    # Without the setting these are more than 700,000. A tensor whose place is taken by another may need 20,000.
    assert kept["taken"] < 60_000
    # Another order of sizes may need room for one more tensor, of 40 MiB at the most. A kept MiB in each of the
    # 100 uses would be 100 MiB.
    assert kept["grown"] <= 40
    assert kept["by encoding"] <= 8


@pytest.mark.parametrize(
    "variables",
    [
        {"RADA_FAST_KEEP_MEMORY": "0"},
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"},
    ],
)
def test_the_user_decides(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert not _env.keeps_freed_memory()
    assert not memory.keep_freed_memory.__wrapped__()
    monkeypatch.setenv("RADA_FAST_KEEP_MEMORY", "1")
    assert _env.keeps_freed_memory()


@pytest.mark.parametrize("libc", [object(), None])
def test_another_c_library_is_left_alone(libc: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_library(name: None) -> object:
        if libc is None:
            raise TypeError("LoadLibrary() argument 1 must be str, not None")
        return libc

    monkeypatch.setattr(ctypes, "CDLL", open_library)
    assert not memory.keep_freed_memory.__wrapped__()


def test_room_is_asked_for_and_given_back() -> None:
    assert memory.has_room(2**20)
    assert not memory.has_room(2**62)
