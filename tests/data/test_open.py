"""Data are opened by KIND:PATH, and an unknown kind or an empty path is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from rada_fast.data.open import KINDS, open_source
from rada_fast.errors import UserError


def test_an_unknown_kind_is_refused_with_the_list_of_kinds(tmp_path: Path) -> None:
    (tmp_path / "f.npz").write_bytes(b"")
    for spec, hint in (
        (str(tmp_path), rf"did you mean imagefolder:{tmp_path}\?"),
        (str(tmp_path / "f.npz"), rf"did you mean features:{tmp_path}/f\.npz\?"),
        ("imagefoldr:somewhere", r"did you mean imagefolder:somewhere\?"),
        ("photos:somewhere", "data must be KIND:PATH with KIND one of imagefolder:DIR .*, images:DIR .*, features:"),
    ):
        with pytest.raises(UserError, match=hint):
            open_source(spec)


def test_every_kind_describes_its_path() -> None:
    assert all(kind.usage.startswith(f"{name}:") for name, kind in KINDS.items())


@pytest.mark.parametrize("spec", ["imagefolder:", "features:", ""])
def test_a_kind_without_a_path_is_refused(spec: str) -> None:
    with pytest.raises(UserError, match="data must be KIND:PATH"):
        open_source(spec)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_refuses_odd_paths_in_one_error(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in ("a" * 5000, "x/" * 2000, "/dev/null", "~nobody-of-this-name/x", f"{tmp_path}/file", "@val", "é\udcff"):
        with pytest.raises(UserError):
            open_source(f"{kind}:{path}", "train")
