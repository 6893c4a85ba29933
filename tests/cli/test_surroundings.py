"""Commands work, or fail in one line, with closed or full streams, without a home folder, and on any error."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from rada_fast import _env, cli, ops
from rada_fast.runs.progress import progress
from rada_fast.system.terminal import PlainConsole, finite, print_json, table

COMMAND = [sys.executable, "-m", "rada_fast"]


def test_a_closed_pipe_ends_a_command_quietly() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*COMMAND, "ttt", "--help"], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_full_disk_under_standard_output_is_reported() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*COMMAND, "--help"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("rada-fast: ")
    assert "No space left on device" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_run_without_standard_streams_is_complete(inputs: Path, tmp_path: Path) -> None:
    arguments = f"ttt --data imagefolder:{inputs}/pictures --views 2 --steps 1 --output out"
    shell = f"{sys.executable} -m rada_fast {arguments} <&- >&- 2>&-"
    assert subprocess.run(shell, shell=True, cwd=tmp_path).returncode == 0
    lines = (tmp_path / "out" / "images.jsonl").read_text().splitlines()
    assert len([json.loads(line) for line in lines]) == 4
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["images"] == 4


def failing_with(error: BaseException) -> Any:
    def run(config: Any) -> int:
        raise error

    return lambda command: run


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyError("x"), 70, "a fault of rada-fast itself, please report it with what RADA_FAST_TRACEBACK=1 adds: KeyError"),
        (RuntimeError("two\nlines"), 70, "RuntimeError: two lines"),
        (ZeroDivisionError(), 70, "ZeroDivisionError"),
        (MemoryError(), 1, "the memory does not suffice: out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), 1, "the memory does not suffice"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), 1, "the memory does not suffice"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), 1, "the memory does not suffice: libtorch"),
        (ModuleNotFoundError("No module named 'triton'"), 1, "this installation is incomplete: No module named 'triton'"),
        (OSError(28, "No space left on device", "/x/y"), 1, "No space left on device: '/x/y'; to go on: rada-fast"),
        (BrokenPipeError(32, "Broken pipe"), 1, "Broken pipe"),
        (KeyboardInterrupt(), 130, "interrupted; to go on: rada-fast "),
    ],
)  # fmt: skip
def test_every_error_becomes_one_line_and_a_status(
    error: BaseException, status: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.Command, "load", failing_with(error))
    assert cli.main(["doctor"]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("rada-fast: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_the_traceback_is_shown_on_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli.Command, "load", failing_with(KeyError("x")))
    monkeypatch.setenv("RADA_FAST_TRACEBACK", "1")
    assert cli.main(["doctor"]) == 70
    message = capsys.readouterr().err
    assert "Traceback (most recent call last)" in message
    assert "in run\n" in message


def test_the_variable_accepts_every_backend_of_the_ops() -> None:
    assert set(_env.BACKEND_NAMES) == {"auto", *ops.BACKENDS}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("suffix", [".toml", ".json", ""])
def test_options_files_in_any_unicode_encoding_are_read(tmp_path: Path, encoding: str, suffix: str) -> None:
    text = '{"steps": 7, "data": "imagefolder:é"}' if suffix == ".json" else 'steps = 7\r\ndata = "imagefolder:é"\r\n'
    mark = b"\xff\xfe" if encoding == "utf-16-le" else b""
    (tmp_path / f"options{suffix}").write_bytes(mark + text.encode(encoding))
    config = cli.parse("ttt", ["--options", str(tmp_path / f"options{suffix}")])
    assert (config.episode.steps, config.data) == (7, "imagefolder:é")


def test_the_home_folder_is_expanded_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "o.toml").write_text("")
    command = """
        --train imagefolder:~/a --test features:~/b --options ~/o.toml --output ~/c --adapter ~/d --classes ~/e
        --templates ~/f --text-features features:~/g --pretrained ~/h
    """
    config = cli.parse("eft", command.split())
    assert (config.train, config.test) == (f"imagefolder:{tmp_path}/a", f"features:{tmp_path}/b")
    assert (config.run.output, config.adapter.adapter) == (f"{tmp_path}/c", f"{tmp_path}/d")
    assert (config.text.classes, config.text.templates) == (f"{tmp_path}/e", (f"{tmp_path}/f",))
    assert (config.text.text_features, config.model.pretrained) == (f"features:{tmp_path}/g", f"{tmp_path}/h")
    config = cli.parse("fft", ["--train", "x:a~b", "--test", "imagefolder:~/a", "imagefolder:b"])
    assert (config.train, config.test) == ("x:a~b", (f"imagefolder:{tmp_path}/a", "imagefolder:b"))


def test_names_that_look_like_markup_are_printed_unchanged(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "x [v2] y[/b] :smile: \udcff"
    command = ["ttt", "--data", f"imagefolder:{inputs}/pictures", "--views", "1", "--steps", "0", "--output", name]
    assert cli.main(command) == 0
    assert f"results in {name.replace(chr(0xDCFF), chr(92) + 'udcff')}\n" in capsys.readouterr().out
    PlainConsole().print(table("[red]title[/blue] :smile:", [("[/]", "a [link=x]b" + "c" * 200), ("b", None)]))
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("[red]title[/blue] :smile:", "[/]", "a [link=x]b" + "c" * 200))


def test_json_output_holds_no_infinity_or_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": (-float("inf"),), "d": "x"}, indent=None)
    assert capsys.readouterr().out == '{"a": null, "b": [null, 1.5], "c": [null], "d": "x"}\n'
    assert finite(True) is True


def test_libraries_get_a_cache_folder_without_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRITON_CACHE_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, "own")
    monkeypatch.setenv("RADA_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    _env.place_other_caches()
    assert os.environ["HOME"] == str(tmp_path)

    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(_env.Path, "home", unknown)
    _env.place_other_caches()
    assert os.environ["HOME"] == str(tmp_path / "cache" / "home")
    assert _env.cache_dir() == tmp_path / "cache"
    assert os.environ["TRITON_CACHE_DIR"] == "own"
    monkeypatch.delenv("MPLCONFIGDIR")
    _env.place_other_caches()
    assert os.environ["MPLCONFIGDIR"] == str(tmp_path / "cache" / "matplotlib")


def test_a_backend_that_fails_the_self_test_is_reported_beside_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rada_fast import doctor

    right = doctor.rational_adapter

    def adapter(*arguments: Any, backend: str, **options: Any) -> Any:
        if backend == "literal":
            raise RuntimeError("no kernel image\nis available")
        return right(*arguments, backend=backend, **options)

    monkeypatch.setattr(doctor, "rational_adapter", adapter)
    assert cli.main(["doctor", "--json"]) == 1
    tested = json.loads(capsys.readouterr().out)["self_test"]
    assert tested["literal"] == "failed: RuntimeError: no kernel image is available"
    assert float(tested["reference"]) < 1e-5


def test_doctor_reports_a_chosen_backend_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RADA_FAST_BACKEND", "cuda")
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "in force by RADA_FAST_BACKEND: backend 'cuda' cannot be used: " in shown
    assert "self-test" in shown


def test_a_deleted_current_folder_is_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert cli.main(["doctor"]) == 2
    assert "does not exist any more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("ttt --data imagefolder:{0}/pictures", "--data {0}/pictures cannot be read: Permission denied"),
        ("ttt --data x --adapter {0}/narrow.safetensors", "--adapter {0}/narrow.safetensors cannot be read"),
        ("ttt --data x --pretrained {0}/empty", "--pretrained {0}/empty cannot be read"),
        ("ttt --data x --text-features classifier:{0}/empty", "--text-features {0}/empty cannot be read"),
        ("ttt --options {0}/type.toml", "--options file {0}/type.toml cannot be read"),
        ("ttt --data x --output {0}/new/folder", "--output {0}/new/folder cannot be written"),
    ],
)
def test_missing_permissions_are_reported_in_one_line(
    inputs: Path, command: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The tests may run as the superuser, who may read and write everything.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert cli.main(command.format(inputs).split()) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"rada-fast: {expected.format(inputs)}")
    assert message.count("\n") == 1


def test_progress_on_a_terminal_prints_names_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("COLUMNS", "200")
    with progress("test [v2] of a[/b] :smile:", 2) as advance:
        advance(2, note="[/red]")
    assert "test [v2] of a[/b] :smile:" in shown.getvalue()
    assert "[/red]" in shown.getvalue()
    monkeypatch.setattr(sys, "stderr", None)
    with progress("nobody reads this", 2) as advance:
        advance(2)


@pytest.mark.skipif(
    os.getuid() != 0 or shutil.which("setpriv") is None, reason="only the superuser can become a user who is not listed"
)
def test_doctor_works_for_an_unknown_user_without_a_home_folder() -> None:
    user = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups"]
    if subprocess.run([*user, "test", "-r", str(Path(cli.__file__))]).returncode or not os.access("/tmp", os.W_OK):
        pytest.skip("the checkout is not readable for others")
    if subprocess.run([*user, sys.executable, "-c", ""], capture_output=True).returncode:
        pytest.skip("Python is not readable for others")
    unset = ("HOME", "XDG_CACHE_HOME", "RADA_FAST_CACHE")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        done = subprocess.run(
            [*user, *COMMAND, "doctor", "--json"],
            cwd=folder,
            env=environment | {"TMPDIR": folder},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)["machine"]["cache"].startswith(folder)
        assert not (Path(folder) / "~").exists()
