"""Tables of numbers stay readable on a terminal of any width."""

from __future__ import annotations

import pytest
from rich import box
from rich.table import Table

from rada_fast.system.terminal import FILE_WIDTH, PlainConsole


def printed(width: int, capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", overflow="fold")
    for number in range(8):
        table.add_column(f"ms {number}", justify="right", overflow="fold")
    for name in ("zero-shot", "rada_fast"):
        table.add_row(name, *(f"{number}.12345" for number in range(8)))
    console = PlainConsole()
    console.width = width
    console.print_figures(table)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    return [line.split() for line in lines if line.strip(" ─")]


def test_a_wide_table_of_figures_is_printed_in_parts_and_no_number_is_folded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = printed(FILE_WIDTH, capsys)
    assert len(whole) == 3
    assert whole[1] == ["zero-shot", *(f"{number}.12345" for number in range(8))]
    for width in (80, 40, 22):
        lines = printed(width, capsys)
        assert len(lines) > 3
        assert len(lines) % 3 == 0
        for place, name in ((1, "zero-shot"), (2, "rada_fast")):
            parts = lines[place::3]
            assert {part[0] for part in parts} == {name}
            assert [cell for part in parts for cell in part[1:]] == whole[place][1:]
