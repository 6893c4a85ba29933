"""The cache folder suits every kind of user, and the types that a processor multiplies follow its instructions."""

from __future__ import annotations

import os
import platform
import pwd
import sys
import tempfile
from pathlib import Path

import pytest
import torch  # noqa: F401 (the test of the waits needs it to be loaded)

from rada_fast import _env
from rada_fast.errors import UserError


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Unset the user's variables, make an empty temporary folder, and return where a private cache would be in it."""
    for name in ("RADA_FAST_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder / f"rada_fast-{os.getuid()}"


def _nobody(user: int) -> None:
    raise KeyError(f"getpwuid(): uid not found: {user}")


def test_a_user_with_a_home_folder_has_the_cache_there(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _env.cache_dir() == tmp_path / ".cache" / "rada_fast"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert _env.cache_dir() == tmp_path / "xdg" / "rada_fast"
    monkeypatch.setenv("RADA_FAST_CACHE", "~/own")
    assert _env.cache_dir() == tmp_path / "own"
    assert _env.cache_dirs() == [tmp_path / "own"]


def test_a_user_without_a_home_folder_has_a_private_cache(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pwd, "getpwuid", _nobody)
    assert _env.cache_dirs() == []
    assert _env.cache_dir() == temporary
    assert temporary.stat().st_mode & 0o777 == 0o700
    assert _env.cache_dir() == temporary
    assert _env.cache_dirs() == [temporary]


def test_a_home_folder_that_is_not_writable_is_not_used(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This is what docker --user gives to a user whom the image does not know.
    monkeypatch.setenv("HOME", "/")
    monkeypatch.setattr(os, "access", lambda path, mode: not Path(path).is_relative_to("/.cache") and path != Path("/"))
    assert _env.cache_dir() == temporary
    assert _env.cache_dirs() == [Path("/.cache/rada_fast"), temporary], "earlier files are still useful"
    monkeypatch.setenv("HOME", "")
    assert _env.cache_dir() == temporary


def test_a_private_folder_that_others_can_write_to_is_refused(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pwd, "getpwuid", _nobody)
    temporary.mkdir()
    temporary.chmod(0o777)
    message = f"the cache folder {temporary} must be yours and not writable for others"
    with pytest.raises(UserError, match=message):
        _env.cache_dir()
    assert _env.cache_dirs() == []
    temporary.rmdir()
    (tmp_path / "elsewhere").mkdir()
    temporary.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=message):
        _env.cache_dir()


def test_a_cache_of_an_unknown_user_is_refused_in_one_line(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RADA_FAST_CACHE", "~no-such-user/cache")
    with pytest.raises(UserError, match=r"^RADA_FAST_CACHE must name a folder, got '~no-such-user/cache': .*$"):
        _env.cache_dir()


AVX2 = frozenset({"avx2", "fma"})
SKYLAKE = AVX2 | {"avx512f", "avx512bw"}
ZEN4 = SKYLAKE | {"avx512_bf16"}
SAPPHIRE_RAPIDS = ZEN4 | {"amx_bf16", "avx512_fp16"}
ARM = frozenset({"fp", "asimd"})


@pytest.mark.parametrize(
    ("machine", "flags", "capability", "onednn", "bfloat16", "float16"),
    [
        ("x86_64", AVX2, "AVX2", None, False, False),
        ("x86_64", SKYLAKE, "AVX512", None, False, False),
        ("x86_64", ZEN4, "AVX512", None, True, False),
        ("x86_64", SAPPHIRE_RAPIDS, "AVX512", None, True, True),
        # A variable restricts these to an older instruction set.
        ("x86_64", ZEN4, "AVX2", None, False, False),
        ("x86_64", ZEN4, "AVX512", "AVX2", False, False),
        ("x86_64", ZEN4, "AVX512", "avx512_core", False, False),
        ("x86_64", ZEN4, "AVX512", "AVX512_CORE_BF16", True, False),
        ("x86_64", SAPPHIRE_RAPIDS, "AVX512", "AVX512_CORE_BF16", True, False),
        ("x86_64", SAPPHIRE_RAPIDS, "AVX512", "AVX512_CORE_AMX", True, True),
        ("x86_64", SAPPHIRE_RAPIDS, "AVX512", "ALL", True, True),
        ("aarch64", ARM, "DEFAULT", None, False, False),
        ("aarch64", ARM | {"asimdhp"}, "DEFAULT", None, False, True),
        ("aarch64", ARM | {"asimdhp", "bf16"}, "SVE256", None, True, True),
        # This system gives no list of instruction sets.
        ("x86_64", frozenset(), "AVX512", None, False, False),
    ],
)
def test_native_products_follow_the_instruction_sets(
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    flags: frozenset[str],
    capability: str,
    onednn: str | None,
    bfloat16: bool,
    float16: bool,
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(_env, "_processor_flags", lambda: flags)
    monkeypatch.setattr(_env, "cpu_capability", lambda: capability)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    if onednn:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", onednn)
    assert _env.has_native_products("bfloat16") == bfloat16
    assert _env.has_native_products("float16") == float16
    assert _env.has_native_products("float32")
    assert _env.has_native_products("float64")


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 avx512_bf16\nbugs : none\n", {"fpu", "avx2", "avx512_bf16"}),
        ("processor : 0\nFeatures\t: fp asimd bf16\n", {"fp", "asimd", "bf16"}),
        ("cpu : 0\n", set()),
    ],
)
def test_instruction_sets_are_read_from_the_system(monkeypatch: pytest.MonkeyPatch, text: str, flags: set[str]) -> None:
    monkeypatch.setattr(_env.Path, "read_text", lambda *_: text)
    assert _env._processor_flags.__wrapped__() == flags


def test_the_profiler_is_quiet_unless_the_user_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KINETO_LOG_LEVEL", raising=False)
    monkeypatch.delitem(sys.modules, "torch")
    _env.quiet_profiler()
    assert os.environ["KINETO_LOG_LEVEL"] == "99"
    monkeypatch.setenv("KINETO_LOG_LEVEL", "0")
    _env.quiet_profiler()
    assert os.environ["KINETO_LOG_LEVEL"] == "0"


def test_threads_wait_shortly_unless_the_user_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    for name in names:
        monkeypatch.setenv(name, "")
    _env.shorten_waits()
    assert os.environ["GOMP_SPINCOUNT"] == "", "a library that is loaded does not read the variable any more"
    monkeypatch.delitem(sys.modules, "torch")
    _env.shorten_waits()
    assert os.environ["GOMP_SPINCOUNT"] == "1000"
    for name, value in zip(names, ("active", "300000"), strict=True):
        with monkeypatch.context() as patch:
            patch.setenv("GOMP_SPINCOUNT", "")
            patch.setenv(name, value)
            _env.shorten_waits()
            assert os.environ["GOMP_SPINCOUNT"] == (value if name == "GOMP_SPINCOUNT" else "")
