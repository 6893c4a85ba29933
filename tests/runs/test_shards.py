"""The lines of many ranks become one file exactly, whatever ranks were killed, restarted or missing."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from rada_fast.runs import lines, shards
from rada_fast.runs.contents import is_made_by, name_of_rank, names_in
from rada_fast.runs.progress import Counts
from rada_fast.runs.shards import own_file
from rada_fast.system.ranks import Ranks

IMAGES = "images.jsonl"


def record(number: int) -> dict[str, object]:
    return {"id": f"{number:05}.png", "label": number % 7, "status": "ok"}


def run_killed(folder: Path, draw: random.Random, left: list[int], ranks: int) -> set[int]:
    """Do what a group of ranks does until it is killed, and return the images whose lines were written whole.

    Some ranks never start, some write a part of their share, and of some the last line is cut off.
    """
    written = set()
    for rank in range(ranks):
        if draw.random() < 0.2:
            continue
        share = Ranks(rank, ranks).share(left)
        part = share[: draw.randint(0, len(share))]
        path = folder / name_of_rank(IMAGES, rank)
        for number in part:
            lines.append(path, record(number))
        written |= set(part)
        if part and draw.random() < 0.5:
            content = path.read_bytes()
            whole = len(json.dumps(record(part[-1]))) + 1
            path.write_bytes(content[: len(content) - draw.randint(1, whole)])
            written -= {part[-1]}
    return written


def merge_killed(folder: Path, draw: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merge, but be killed before one of the files is removed; then what was merged is there twice."""
    removals = draw.randint(0, 3)

    def remove(path: Path) -> None:
        nonlocal removals
        if removals == 0:
            raise KeyboardInterrupt
        removals -= 1
        path.unlink()

    with monkeypatch.context() as patch:
        patch.setattr(shards.files, "remove", remove)
        try:
            shards.merge(folder)
        except KeyboardInterrupt:
            return


@pytest.mark.parametrize("seed", range(40))
def test_any_numbers_of_ranks_that_are_killed_lose_and_double_nothing(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    total, done = draw.randint(0, 400), set[int]()
    for attempt in range(6):
        if draw.random() < 0.5:
            merge_killed(tmp_path, draw, monkeypatch)
        shards.merge(tmp_path)
        found = lines.read(tmp_path / IMAGES)
        assert sorted(str(one["id"]) for one in found) == [record(number)["id"] for number in sorted(done)]
        assert names_in(tmp_path) in ([], [IMAGES])
        left = [number for number in range(total) if number not in done]
        ranks = 64 if attempt == 0 else draw.choice([1, 2, 3, 8, 63, 64])
        if ranks == 1:  # a process alone writes into the file itself
            for number in left[: draw.randint(0, len(left))]:
                lines.append(tmp_path / own_file(IMAGES, Ranks()), record(number))
                done.add(number)
        else:
            done |= run_killed(tmp_path, draw, left, ranks)


def test_the_files_of_ranks_belong_to_the_run() -> None:
    own = name_of_rank(IMAGES, 3)
    assert own == own_file(IMAGES, Ranks(3, 64)) == "images.rank-0003.jsonl"
    assert is_made_by(own, "ttt")
    assert is_made_by(f"{own}.damaged", "ttt")
    assert is_made_by(name_of_rank("run.lock", 12345), "ttt")
    assert not is_made_by("images.rank-3.jsonl", "ttt")
    assert not is_made_by("notes.rank-0003.jsonl", "ttt")
    assert not is_made_by(name_of_rank("predictions.jsonl", 3), "ttt")


def test_counts_of_a_process_alone_are_its_own() -> None:
    assert shards.shared_counts(Ranks()) is None
    assert shards.SharedCounts(Ranks())(Counts(3, 5)) == Counts(3, 5)
