"""One process at a time uses a run's folder. It spares the files of others and survives torn and damaged ones."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rada_fast.config.options import RunOptions
from rada_fast.errors import UserError
from rada_fast.runs import lock, machine
from rada_fast.runs.folder import Inputs, RunFolder
from rada_fast.system import files, notices

IDENTITY = {"command": "eft", "options": {"run": {"seed": 0}, "episode": {"lr": 1e-3}}}
OTHER = {"command": "eft", "options": {"run": {"seed": 0}, "episode": {"lr": 2e-3}}}


def options(path: Path, **changes: bool) -> RunOptions:
    return RunOptions(output=str(path / "run"), **changes)


def begin(path: Path, identity: dict[str, Any] = IDENTITY, inputs: Inputs | None = None, **changes: bool) -> RunFolder:
    return RunFolder(options(path, **changes), identity, inputs)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_same_run_goes_on(tmp_path: Path) -> None:
    with begin(tmp_path) as folder:
        assert not folder.resumed
        folder.append("images.jsonl", {"id": "a"})
    with begin(tmp_path) as again:
        assert again.resumed
        assert again.read_lines("images.jsonl") == [{"id": "a"}]


def test_another_run_is_refused_and_overwritten_on_request(tmp_path: Path) -> None:
    with begin(tmp_path) as folder:
        folder.append("images.jsonl", {"id": "a"})
    with pytest.raises(UserError, match=r"holds another run's results \(differing: --lr 0.001 there, 0.002 here\)"):
        begin(tmp_path, OTHER)
    with pytest.raises(UserError, match=r"the results of another command \(eft there, fft here\)"):
        begin(tmp_path, {**OTHER, "command": "fft"})
    with begin(tmp_path, OTHER, overwrite=True) as folder:
        assert folder.read_lines("images.jsonl") == []
    with begin(tmp_path, OTHER) as folder:
        assert folder.resumed


def test_another_version_or_backend_is_refused_and_says_so(tmp_path: Path) -> None:
    code = {"code": "0.1", "arithmetic": {"backend": "cpu", "float32_products": None}}
    begin(tmp_path, IDENTITY | code).close()
    other = {"code": "0.2", "arithmetic": {"backend": "reference", "float32_products": "tf32"}}
    message = (
        r"\(differing: backend cpu there, reference here; code 0.1 there, 0.2 here; "
        r"float32 products as usual there, tf32 here\)"
    )
    with pytest.raises(UserError, match=message):
        begin(tmp_path, IDENTITY | other)


def test_other_versions_and_machines_are_listed_and_mentioned_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made_by(torch: str) -> None:
        monkeypatch.setattr(machine, "made_by", lambda: {"torch": torch, "processor": "a"})

    def listed() -> list[str]:
        return [one["torch"] for one in json.loads((tmp_path / "run" / "run.json").read_text())["made_by"]]

    made_by("2.13")
    inputs = Inputs({"test": {"a": "1"}})
    begin(tmp_path, inputs=inputs).close()
    made_by("2.14")
    with notices.collecting():
        begin(tmp_path, inputs=Inputs({"test": {"a": "2"}})).close()
        begin(tmp_path, inputs=inputs).close()
        (line,) = notices.so_far()
    assert "was begun with other versions or on another machine" in line
    assert line.endswith("in their last digits: torch 2.13 there, 2.14 here")
    assert listed() == ["2.13", "2.14"]
    made_by("2.13")
    with begin(tmp_path, inputs=inputs) as folder:
        assert folder.stored_inputs == inputs.parts  # those of the lines, not those of the run in between
        folder.write_summary({})
    made_by("2.15")
    with notices.collecting():
        begin(tmp_path, inputs=inputs).close()  # a finished run: nothing is computed
        assert notices.so_far() == []
    assert listed() == ["2.13", "2.14"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "name", ["precious.txt", "images.jsonl", "run.json", "run.lock", ".hidden", "state.pt.mine", "cats/1.png"]
)
def test_files_that_no_run_made_are_neither_removed_nor_joined(tmp_path: Path, name: str, overwrite: bool) -> None:
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(UserError, match="output") as refused:
        begin(tmp_path, overwrite=overwrite)
    assert name.partition("/")[0] in str(refused.value)
    assert path.read_text() == "mine"
    assert len(names(tmp_path / "run")) == 1


def test_pipes_and_links_with_names_of_results_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    lock = tmp_path / "run" / "run.lock"
    lock.symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match=r"holds run\.lock, which is a link"):
        begin(tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"
    lock.unlink()
    os.mkfifo(lock)
    with pytest.raises(UserError, match=r"holds a run\.lock"):
        begin(tmp_path)
    lock.unlink()
    os.mkfifo(tmp_path / "run" / "run.json")
    with pytest.raises(UserError, match=r"holds a run\.json that no run"):
        begin(tmp_path)
    (tmp_path / "run" / "run.json").unlink()
    begin(tmp_path).close()
    os.mkfifo(tmp_path / "run" / "summary.json")
    with begin(tmp_path) as folder:
        assert folder.finished_summary({}) is None


def test_overwriting_is_refused_where_files_were_added_later(tmp_path: Path) -> None:
    with begin(tmp_path) as folder:
        folder.append("images.jsonl", {"id": "a"})
        (folder.path / "notes.txt").write_text("mine")
    begin(tmp_path).close()  # going on removes nothing
    with pytest.raises(UserError, match=r"holds notes\.txt; give another"):
        begin(tmp_path, OTHER, overwrite=True)
    assert names(tmp_path / "run") == ["images.jsonl", "notes.txt", "run.json", "run.lock"]


def test_overwriting_removes_files_of_that_kind_of_run_only(tmp_path: Path) -> None:
    begin(tmp_path, {"command": "ttt"}).close()
    (tmp_path / "run" / "adapter.safetensors").write_text("no ttt run made this")
    with pytest.raises(UserError, match=r"adapter\.safetensors"):
        begin(tmp_path, OTHER, overwrite=True)


def test_results_among_the_data_are_refused(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "link").symlink_to(data)
    for output in (data, data / "results", tmp_path / "link" / "a" / "b"):
        with pytest.raises(UserError, match="must lie outside of the data folder"):
            RunFolder(RunOptions(output=str(output)), IDENTITY, data=[data])
    assert names(data) == []


def test_a_run_does_not_overwrite_what_it_reads(tmp_path: Path) -> None:
    with begin(tmp_path) as folder:
        folder.save_tensors("adapter.safetensors", {"a": torch.zeros(1)})
    output = tmp_path / "run"
    for given in (output, output / "adapter.safetensors"):
        with pytest.raises(UserError, match=r"cannot be overwritten by a run that reads .*run"):
            RunFolder(options(tmp_path, overwrite=True), OTHER, option_paths=[tmp_path, given])
    assert "adapter.safetensors" in names(output)


def test_changed_inputs_are_named(tmp_path: Path) -> None:
    def inputs(**files: str) -> Inputs:
        return Inputs({"train": files, "test": {"x": str(len(files))}}, frozenset({"train"}))

    begin(tmp_path, inputs=inputs(a="1", b="1", c="1")).close()
    with pytest.raises(UserError, match=r"differing: train, added: d; removed: b; replaced: a\)"):
        begin(tmp_path, inputs=inputs(a="2", c="1", d="1"))
    many = {f"n{index}": "1" for index in range(9)}
    with pytest.raises(UserError, match=r"added: n0, n1, n2 and 6 more; removed: a, b, c\)"):
        begin(tmp_path, inputs=inputs(**many))
    with begin(tmp_path, inputs=inputs(**many), overwrite=True) as folder:
        assert not folder.resumed


def test_a_summary_depends_on_the_inputs_and_the_images_covered(tmp_path: Path) -> None:
    def inputs(stamp: str) -> Inputs:
        return Inputs({"train": {"a": "1"}, "test": {"x": stamp}}, frozenset({"train"}))

    with begin(tmp_path, inputs=inputs("1")) as folder:
        folder.write_summary({"speed": 7, "run": folder.digest({"limit": None})})
    with begin(tmp_path, inputs=inputs("1")) as folder:
        assert folder.finished_summary({"limit": 3}) is None
        summary = folder.finished_summary({"limit": None})
        assert summary is not None
        assert summary["speed"] == 7
    with begin(tmp_path, inputs=inputs("2")) as folder:
        assert folder.finished_summary({"limit": None}) is None
        folder.accept_inputs()
        assert "summary.json" not in names(folder.path)


def test_a_second_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    with begin(tmp_path), pytest.raises(UserError, match=rf"is in use by another run \(process {os.getpid()} on"):
        begin(tmp_path)
    begin(tmp_path).close()


def test_neither_a_killed_process_nor_its_children_keep_the_lock(tmp_path: Path) -> None:
    program = f"""
import os, sys, time
from pathlib import Path
from rada_fast.runs.lock import FolderLock
lock = FolderLock(Path({str(tmp_path / "run.lock")!r}))
if os.fork() == 0:
    print("locked", flush=True)  # printed by the child, which has given up the lock
    time.sleep(60)  # a worker that its parent leaves behind
    os._exit(0)
time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=rf"process {other.pid} on"):
            lock.FolderLock(tmp_path / "run.lock")
        other.kill()
        other.wait()
        lock.FolderLock(tmp_path / "run.lock").release()
        os.killpg(other.pid, signal.SIGKILL)


def test_a_file_system_without_locks_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with notices.collecting(), begin(tmp_path):
        assert any("file system without locks (Operation not supported)" in line for line in notices.so_far())


def test_only_files_that_a_killed_process_left_are_cleaned_up(tmp_path: Path) -> None:
    begin(tmp_path).close()
    ours = [".state.pt.123-0123abcd.partial", ".run.json.9-0123abcd.partial", ".trace.json.gz.9-0123abcd.partial.gz"]
    theirs = [".vacation.jpg.123-0123abcd.partial", ".state.pt.swp"]
    for name in ours + theirs:
        (tmp_path / "run" / name).write_text("")
    begin(tmp_path).close()
    assert names(tmp_path / "run") == sorted([*theirs, "run.json", "run.lock"])
    # This run was killed before it could write run.json.
    (tmp_path / "run2").mkdir()
    for name in (".run.json.9-0123abcd.partial", "run.lock"):
        (tmp_path / "run2" / name).write_text("")
    RunFolder(RunOptions(output=str(tmp_path / "run2")), IDENTITY).close()
    assert names(tmp_path / "run2") == ["run.json", "run.lock"]


def test_a_torn_last_line_is_dropped_and_overwritten(tmp_path: Path) -> None:
    with begin(tmp_path) as folder:
        path = folder.path / "images.jsonl"
        for torn in (b'{"id": "c', b'{"id": "c"}', b"\xff\xfe", b"\0\0\0\n", b"\0\0\n\0\0"):
            path.write_bytes(b'{"id": "a"}\n{"id": "b"}\n' + torn)
            assert [record["id"] for record in folder.read_lines("images.jsonl")] == ["a", "b"]
            folder.append("images.jsonl", {"id": "d"})
            assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "b", "d"]


def test_a_damaged_line_loses_no_other_line(tmp_path: Path) -> None:
    with notices.collecting(), begin(tmp_path) as folder:
        path = folder.path / "images.jsonl"
        content = b'{"id": "a"}\n{"id": "b\n[1]\n{"id": "c"}\n'
        path.write_bytes(content)
        assert [record["id"] for record in folder.read_lines("images.jsonl")] == ["a", "c"]
        assert path.read_text() == '{"id": "a"}\n{"id": "c"}\n'
        assert (folder.path / "images.jsonl.damaged").read_bytes() == content
        assert "has 2 damaged lines; it was kept as images.jsonl.damaged" in notices.so_far()[0]


def save(folder: RunFolder, *epochs: int) -> None:
    for epoch in epochs:
        folder.save_state("state.pt", {"epoch": epoch, "weights": {"a": torch.full((1000,), float(epoch))}})


def load(folder: RunFolder) -> int | None:
    """Return the epoch of the state that is loaded."""
    loaded: list[int] = []

    def use(state: dict[str, Any]) -> None:
        weights: Tensor = state["weights"]["a"]
        assert bool((weights == state["epoch"]).all())
        loaded.append(state["epoch"])

    return loaded[0] if folder.load_state("state.pt", use) else None


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def fill_with_something_else(path: Path) -> None:
    torch.save({"something": "else"}, path)


def fill_with_code(path: Path) -> None:
    torch.save({"epoch": 3, "weights": Code()}, path)


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("executed",))


def test_the_last_state_is_loaded_and_the_one_before_kept(tmp_path: Path) -> None:
    with begin(tmp_path) as folder:
        assert load(folder) is None
        save(folder, 1, 2, 3)
        assert load(folder) == 3
        assert names(folder.path) == ["run.json", "run.lock", "state-previous.pt", "state.pt"]


@pytest.mark.parametrize("damage", [halve, flip_a_bit, empty, fill_with_something_else, fill_with_code])
def test_a_damaged_state_is_set_aside_and_the_last_good_one_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    with notices.collecting(), begin(tmp_path) as folder:
        save(folder, 1, 2)
        damage(folder.path / "state.pt")
        assert load(folder) == 1
        (line,) = notices.so_far()
        assert "state.pt is damaged (" in line
        assert "was set aside as state.pt.damaged" in line
        save(folder, 2)
        assert load(folder) == 2
        # With both generations damaged, the training begins again, and the files are kept for whoever wants to look.
        damage(folder.path / "state.pt")
        damage(folder.path / "state-previous.pt")
        assert load(folder) is None
        assert [name for name in names(folder.path) if "damaged" in name] == [
            "state-previous.pt.damaged", "state.pt.damaged", "state.pt.damaged-2",
        ]  # fmt: skip
    assert not (tmp_path / "executed").exists()


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="must be a folder, it is a file"):
        begin(tmp_path)


def test_nan_is_never_written_as_json(tmp_path: Path) -> None:
    with begin(tmp_path) as folder, pytest.raises(ValueError, match="JSON compliant"):
        folder.append("images.jsonl", {"entropy": float("nan")})


def write_everything(folder: RunFolder) -> dict[str, Callable[[], object]]:
    """Return every kind of write that a run makes, each of 100 kB or more."""
    many = torch.zeros(100_000)
    return {
        "images.jsonl": lambda: folder.append("images.jsonl", {"id": "x" * 200_000}),
        "epochs.jsonl": lambda: folder.write_lines("epochs.jsonl", [{"id": "x" * 200_000}]),
        "state.pt": lambda: folder.save_state("state.pt", {"a": many}),
        "adapter.safetensors": lambda: folder.save_tensors("adapter.safetensors", {"a": many}),
        "summary.json": lambda: folder.write_summary({"a": "x" * 200_000}),
    }


def test_files_have_the_permissions_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with begin(tmp_path) as folder:
            for write in write_everything(folder).values():
                write()
    finally:
        os.umask(before)
    assert {name: stat.S_IMODE((tmp_path / "run" / name).stat().st_mode) for name in names(tmp_path / "run")} == (
        dict.fromkeys(names(tmp_path / "run"), 0o640)
    )


def test_a_full_disk_is_one_error_and_leaves_every_file_as_it_was(tmp_path: Path) -> None:
    """The writes are in a process of their own, whose files cannot grow past 50 kB."""
    program = f"""
import json, resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from tests.runs.test_folder import begin, names, write_everything
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with begin(Path({str(tmp_path)!r})) as folder:
    folder.append("images.jsonl", {{"id": "a"}})
    folder.save_state("state.pt", {{"a": 1}})
    before = {{name: (folder.path / name).read_bytes() for name in names(folder.path)}}
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    for name, write in write_everything(folder).items():
        try:
            write()
        except OSError as error:
            assert error.errno == 27 and error.filename == str(folder.path / name), (name, error)
        else:
            raise AssertionError(name)
    assert {{name: (folder.path / name).read_bytes() for name in names(folder.path)}} == before
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    files.write_text(path, "old")

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_text(path, "new")
    assert names(tmp_path) == ["a.json"]
    assert path.read_text() == "old"
