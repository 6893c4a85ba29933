"""A build records what it compiled, a damaged library is not loaded, and the next build repairs it.

No compiler runs: a small script stands for ninja and "links" a text file.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from rada_fast import _env
from rada_fast.errors import UserError
from rada_fast.extension import build, cuda_toolkit, libraries

NINJA = """#!/bin/sh
# ninja -C FOLDER -j N -k 0 [-t clean | TARGET]
echo "$@" >> {log}
{first}
[ "$7" = -t ] || echo "the library" > "$2/rada_fast_ops.so"
"""


class Workshop:
    """Workshop is a folder for builds with a fake ninja and its log."""

    def __init__(self, folder: Path) -> None:
        self.place, self.log, self.bin = folder / "place", folder / "log", folder / "bin"
        self.said: list[str] = []
        self.bin.mkdir()
        self.ninja()

    def ninja(self, first: str = "") -> None:
        (self.bin / "ninja").write_text(NINJA.format(log=self.log, first=first))
        (self.bin / "ninja").chmod(0o755)

    def build(self) -> Path:
        self.said.clear()
        return build.build(echo=self.said.append, jobs=1)

    @property
    def library(self) -> Path:
        return libraries.library_in(self.place)

    @property
    def runs(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    if libraries.source_dir() is None or not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no sources, or no C++ compiler")
    made = Workshop(tmp_path)
    monkeypatch.setenv("PATH", f"{made.bin}:/usr/local/bin:/usr/bin:/bin")
    monkeypatch.setenv("USE_CUDA", "0")
    monkeypatch.setattr(libraries, "library_folders", lambda: [made.place])
    monkeypatch.setattr(libraries, "carried_library", lambda cuda=False: tmp_path / "carried" / libraries.LIBRARY)
    return made


def test_a_build_records_what_it_made_and_a_second_one_compiles_nothing(workshop: Workshop) -> None:
    assert workshop.build() == workshop.library == libraries.find_library()
    recorded = libraries.hash_file(workshop.library)
    done = subprocess.run(["sha256sum", "-c", recorded.name], cwd=recorded.parent, capture_output=True, check=False)
    assert done.returncode == 0, "the record is sha256sum's own"
    assert not (workshop.place / "objects" / libraries.LIBRARY).exists(), "a second copy would be trusted unseen"
    assert workshop.build() == workshop.library
    assert "up to date" in workshop.said[0]
    assert len(workshop.runs) == 1


def _truncate(library: Path) -> None:
    library.write_bytes(library.read_bytes()[:3])


def _forget(library: Path) -> None:
    libraries.hash_file(library).unlink()


def _replace_by_folder(library: Path) -> None:
    library.unlink()
    library.mkdir()
    (library / "precious").touch()


def _dangle(library: Path) -> None:
    library.unlink()
    library.symlink_to("nowhere")


def _replace_by_pipe(library: Path) -> None:
    library.unlink()
    os.mkfifo(library)


DAMAGES = {
    "truncated": (_truncate, "is damaged: its SHA-256 is not the recorded one"),
    "empty": (lambda library: library.write_bytes(b""), "is damaged: its SHA-256 is not the recorded one"),
    "no record": (_forget, "the recorded SHA-256 of "),
    "empty record": (lambda library: libraries.hash_file(library).write_bytes(b""), "is damaged"),
    "odd record": (lambda library: libraries.hash_file(library).write_bytes(b"\xff\x00 \n"), "is damaged"),
    "a folder": (_replace_by_folder, "is a folder"),
    "a pipe": (_replace_by_pipe, "is neither a file nor a folder"),
    "a dangling link": (_dangle, "cannot be read (No such file or directory)"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_library_is_reported_and_built_again(
    name: str, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, words = DAMAGES[name]
    library = workshop.build()
    damage(library)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail(f"{path} was loaded"))
    reason = str(libraries._load())
    assert words in reason
    assert str(library) in reason
    assert reason.endswith("; run `rada-fast build`")
    assert "\n" not in reason
    assert workshop.build() == library
    assert any(words in line and line.endswith("it is made again") for line in workshop.said)
    assert libraries.fault_of(library) is None
    if name == "a folder":
        (aside,) = library.parent.glob("*.aside0")
        assert (aside / "precious").exists(), "nothing that a build did not make is removed"


def test_an_unreadable_library_is_reported(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    library = workshop.build()

    def refuse(self: Path, *arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    assert libraries.fault_of(library) == f"{library} cannot be read (Permission denied)"


def test_a_wheels_library_is_checked_and_replaces_a_damaged_one(workshop: Workshop) -> None:
    library, carried = workshop.build(), libraries.carried_library()
    shutil.copytree(library.parent, carried.parent)
    _truncate(library)
    found, faults = libraries.search()
    assert found == carried
    assert len(faults) == 1
    _truncate(carried)
    found, faults = libraries.search()
    assert found is None
    assert len(faults) == 2


def test_a_library_of_any_user_is_found_in_the_checkout_and_in_the_cache(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [tmp_path / "checkout", tmp_path / "cache"]
    monkeypatch.setattr(libraries, "library_folders", lambda: both)
    # Another user has built in the checkout, to which this user cannot write.
    monkeypatch.setattr(_env, "is_writable", lambda folder: folder != both[0])
    assert libraries.build_folder() == both[1]
    library = workshop.build()
    assert library == libraries.library_in(both[1])
    other = libraries.library_in(both[0])
    shutil.move(library.parent, other.parent)
    assert libraries.find_library() == other
    assert workshop.build() == other
    assert "up to date" in workshop.said[0]
    _truncate(other)
    assert workshop.build() == library, "what cannot be mended there is made here"
    assert libraries.find_library() == library


def test_libraries_are_searched_in_the_checkout_and_in_the_caches() -> None:
    if libraries.source_dir() != libraries.PACKAGE.parent / "csrc":
        pytest.skip("not a checkout")
    checkout, *caches = libraries.library_folders()
    assert checkout.is_relative_to(libraries.PACKAGE.parent / "build")
    assert [place.parent.parent for place in caches] == _env.cache_dirs()


def test_objects_that_no_longer_link_are_compiled_again(workshop: Workshop, tmp_path: Path) -> None:
    mended = tmp_path / "mended"
    workshop.ninja(
        f'if [ "$7" = -t ]; then touch {mended}; elif [ ! -e {mended} ]; then'
        ' echo "FAILED: [code=1] $2/rada_fast_ops.so"; exit 1; fi'
    )
    workshop.build()
    assert [run.endswith("-t clean") for run in workshop.runs] == [False, True, False]
    assert libraries.find_library() is not None


def test_a_full_disk_is_reported_in_one_line(workshop: Workshop) -> None:
    workshop.ninja('echo "FAILED: x.o"; echo "fatal error: error writing to x.s: No space left on device"; exit 1')
    with pytest.raises(UserError, match=r"cannot be built in .*place: fatal error: .*No space left on device$"):
        workshop.build()
    assert libraries.find_library() is None


def test_a_full_disk_for_our_own_files_is_reported_in_one_line(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, *arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"cannot be built in .*place: No space left on device \(.*build\.ninja\)$"):
        workshop.build()


@pytest.mark.parametrize("in_the_way", ["objects", "lock"])
def test_a_file_in_the_way_is_reported_in_one_line(in_the_way: str, workshop: Workshop) -> None:
    workshop.place.mkdir()
    blocked = workshop.place / in_the_way
    blocked.mkdir() if in_the_way == "lock" else blocked.touch()
    with pytest.raises(UserError, match=r"^the extension cannot be built in .*place: .*$"):
        workshop.build()


def test_a_build_waits_for_another_and_gives_up(workshop: Workshop) -> None:
    workshop.place.mkdir()
    with (workshop.place / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"another build holds .*lock for more than 0 s"):
            build.build(timeout=0.1, echo=lambda line: None)
    # A lock file that a dead process left locks nothing.
    workshop.build()


def test_a_build_works_on_a_file_system_without_locks(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: object, how: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    workshop.build()


def test_without_a_compiler_the_build_says_so(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler and found none \(no-such-compiler\)"):
        workshop.build()


def test_a_cuda_library_with_more_device_code_serves(tmp_path: Path) -> None:
    toolkit = cuda_toolkit.Toolkit(tmp_path, "13.0.88", (), tmp_path, ("90",), ())
    library = tmp_path / libraries.CUDA_LIBRARY
    for said, serves in (
        ("sm_80, sm_90, sm_100, PTX 100 by nvcc 13.0.88 (a note)", True),
        ("sm_80 by nvcc 13.0.88", False),
        ("sm_90 by nvcc 12.8.93", False),
        ("", False),
    ):
        library.with_suffix(".txt").write_text(f"{said}\n")
        assert build._is_current(library, toolkit) is serves, said
