"""Where the cache is, for every kind of user."""

from __future__ import annotations

import os
import pwd
import tempfile
from pathlib import Path

import pytest

from rada_fast import _env
from rada_fast.errors import UserError


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without any variable, and an empty temporary folder."""
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


def test_a_user_without_a_home_folder_has_a_private_one(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pwd, "getpwuid", _nobody)
    assert _env.cache_dirs() == []
    assert _env.cache_dir() == temporary
    assert temporary.stat().st_mode & 0o777 == 0o700
    assert _env.cache_dir() == temporary
    assert _env.cache_dirs() == [temporary]


def test_a_home_folder_that_is_not_writable_is_no_home(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What docker --user gives to a user whom the image does not know.
    monkeypatch.setenv("HOME", "/")
    monkeypatch.setattr(os, "access", lambda path, mode: not Path(path).is_relative_to("/.cache") and path != Path("/"))
    assert _env.cache_dir() == temporary
    assert _env.cache_dirs() == [Path("/.cache/rada_fast"), temporary], "what was made there earlier is of use"
    monkeypatch.setenv("HOME", "")
    assert _env.cache_dir() == temporary


def test_a_private_folder_that_others_can_write_to_is_refused(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pwd, "getpwuid", _nobody)
    temporary.mkdir()
    temporary.chmod(0o777)
    words = f"the cache folder {temporary} can be written to by others; RADA_FAST_CACHE names another"
    with pytest.raises(UserError, match=words):
        _env.cache_dir()
    assert _env.cache_dirs() == []
    temporary.rmdir()
    (tmp_path / "elsewhere").mkdir()
    temporary.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=words):
        _env.cache_dir()


def test_the_cache_of_a_user_who_does_not_exist_is_one_line(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RADA_FAST_CACHE", "~no-such-user/cache")
    with pytest.raises(UserError, match=r"^RADA_FAST_CACHE must name a folder, got '~no-such-user/cache': .*$"):
        _env.cache_dir()
