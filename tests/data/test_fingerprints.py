"""Links that lead nowhere have a stamp too."""

from __future__ import annotations

from pathlib import Path

from rada_fast.data.fingerprints import file_stamp


def test_a_dangling_link_has_a_stamp(tmp_path: Path) -> None:
    (tmp_path / "x.png").symlink_to(tmp_path / "nowhere")
    assert file_stamp(tmp_path / "x.png") == "missing"
