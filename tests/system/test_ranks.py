"""Several processes share work, exchange values, sum tensors, and end together; a process alone needs no group."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from rada_fast import _env
from rada_fast.errors import UserError
from rada_fast.system import notices, ranks
from rada_fast.system.ranks import OtherRankError, Ranks
from tests.processes import run_ranks, say, start_ranks, torchrun_variables, wait_for


def test_a_program_alone_is_a_group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for one_process in (False, True):
        if one_process:  # torchrun --nproc-per-node 1
            for name, value in torchrun_variables(0, 1, 1).items():
                monkeypatch.setenv(name, value)
        with ranks.joined() as group:
            assert group == Ranks() == ranks.current()
            assert group.first
            assert not group.several
            assert group.share([3, 4, 5]) == [3, 4, 5]
            assert group.all_gather({"a": 1}) == [{"a": 1}]
            assert group.broadcast((1, 2)) == (1, 2)
            assert group.from_first(lambda: 5) == 5
            group.tell("images", 2)
            assert group.told("images") == []
            assert group.claim("line")
            assert group.lost() == []
            group.barrier()
            ones = torch.ones(2)
            group.all_reduce([ones])
            assert torch.equal(ones, torch.ones(2))
            assert torch.equal(group.all_gather_rows(ones, 2), ones)
            assert torch.equal(group.broadcast_tensor(ones), ones)


@pytest.mark.parametrize("count", [1, 2, 3, 64])
@pytest.mark.parametrize("total", [0, 1, 63, 64, 65, 200])
def test_shares_are_the_items_each_once(count: int, total: int) -> None:
    items = list(range(total))
    shares = [Ranks(rank, count).share(items) for rank in range(count)]
    assert sorted(item for share in shares for item in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"LOCAL_RANK": ""}, "missing: LOCAL_RANK"),
        ({"MASTER_PORT": ""}, "missing: MASTER_PORT"),
        ({"RANK": "two"}, "must be numbers"),
        ({"RANK": "4"}, "contradict"),
        ({"LOCAL_WORLD_SIZE": "9"}, "contradict"),
    ],
)
def test_variables_that_torchrun_would_not_set_are_refused(
    changes: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (torchrun_variables(1, 4, 1) | changes).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message), ranks.joined():
        pass


def test_cores_are_divided_unless_the_user_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(7)), raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert [_env.threads_of_rank(count) for count in (1, 2, 3, 8)] == [7, 3, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert _env.threads_of_rank(2) is None


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_env, "cuda_device_count", lambda: 4)
    assert Ranks(5, 8, 1, 4).cuda_index() == 1
    with pytest.raises(UserError, match="8 processes were started on a machine with 4 GPUs"):
        Ranks(5, 8, 5, 8).cuda_index()
    monkeypatch.setattr(_env, "cuda_device_count", lambda: 1)
    assert Ranks(5, 8, 5, 8).cuda_index() == 0


def exchange() -> None:
    """Use every function of a group, and print what it returns."""
    with ranks.joined() as group:
        own = float(group.rank + 1)
        tensors = [torch.full((2, 2), own), torch.full((3,), own, dtype=torch.float64), torch.tensor(own)]
        group.all_reduce(tensors)
        items = torch.arange(10.0).reshape(5, 2)
        notices.warn("warned of by the first rank alone")
        found = {
            "gathered": group.all_gather([group.rank, "é"]),
            "broadcast": group.broadcast(group.rank + 5),
            "made": group.from_first(lambda: {"rank": group.rank}),
            "sums": [tensor.flatten().tolist() for tensor in tensors],
            "rows": group.all_gather_rows(items[group.rank :: group.count], 5).tolist(),
            "threads": torch.get_num_threads(),
            "claimed": group.claim("line"),
            "current": ranks.current() is group,
        }
        if not group.first:
            group.tell("images", group.rank)
        group.barrier()
        found["told"] = group.told("images")
        found["tensor"] = group.broadcast_tensor(torch.tensor([group.rank, 7])).tolist()
        blocks = [[0, 1], [2, 3], [4]]
        rows = [item for part in group.share(blocks) for item in part]
        found["blocks"] = group.all_gather_rows(items[rows], 5, block=2).tolist()
        print("printed by the first rank alone", flush=True)
        say(json.dumps(found))
    assert not torch.distributed.is_initialized()


def exchange_twice() -> None:
    """Join a second group while the first rank still leaves the first one, which it does slowly here."""
    with pytest.MonkeyPatch.context() as patch, ranks.joined() as group:
        leave = torch.distributed.destroy_process_group
        if group.first:
            patch.setattr(torch.distributed, "destroy_process_group", lambda: (time.sleep(0.5), leave()))
    del group  # as a command does at its end
    with ranks.joined() as again:  # the store still holds what the first group has written
        assert again.all_gather(again.rank) == list(range(again.count))


def test_a_rank_joins_the_next_group_while_another_leaves(tmp_path: Path) -> None:
    run_ranks(2, tmp_path, exchange_twice)


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_exchange_values_and_tensors(count: int, tmp_path: Path) -> None:
    started = run_ranks(count, tmp_path, exchange)
    outputs = [rank.output.read_text().splitlines() for rank in started]
    assert [lines[:-1] for lines in outputs] == [["printed by the first rank alone"]] + [[]] * (count - 1)
    found = [json.loads(lines[-1]) for lines in outputs]
    total = count * (count + 1) / 2
    assert sum(one.pop("claimed") for one in found) == 1
    assert all(one == found[0] for one in found)
    assert found[0]["gathered"] == [[rank, "é"] for rank in range(count)]
    assert found[0]["broadcast"] == 5
    assert found[0]["made"] == {"rank": 0}
    assert found[0]["sums"] == [[total] * 4, [total] * 3, [total]]
    assert found[0]["rows"] == found[0]["blocks"] == torch.arange(10.0).reshape(5, 2).tolist()
    assert found[0]["threads"] == max(1, len(os.sched_getaffinity(0)) // count)
    assert found[0]["told"] == list(range(1, count))
    assert found[0]["tensor"] == [0, 7]
    errors = [rank.errors.read_text() for rank in started]
    assert errors == ["rada-fast: warning: warned of by the first rank alone\n"] + [""] * (count - 1)


def fail_in_the_last() -> int:
    """Let the last rank fail while the others wait for it."""
    try:
        with ranks.joined() as group:
            if group.rank == group.count - 1:
                assert group.fail(3)
                raise ValueError
            group.barrier()
    except OtherRankError as error:
        return error.status + 10
    except ValueError:
        return 3
    return 0


def test_waiting_ranks_end_when_another_has_failed(tmp_path: Path) -> None:
    statuses = [rank.wait() for rank in start_ranks(3, tmp_path, fail_in_the_last)]
    assert statuses == [13, 13, 3]


def wait_until_asked_to_end() -> int:
    """Let the last rank sleep while the other waits for it; if that one is interrupted, it names the ranks lost."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    with ranks.joined() as group:
        say("joined")
        if not group.first:
            time.sleep(60)
        try:
            group.barrier()
        except KeyboardInterrupt:
            say(str(group.lost()))
            group.fail(5)
    return 5


@pytest.mark.skipif(sys.platform != "linux", reason="the ranks' parent must notice the end of a process")
def test_a_waiting_rank_can_be_interrupted_and_knows_who_was_killed(tmp_path: Path) -> None:
    started = start_ranks(2, tmp_path, wait_until_asked_to_end)
    first, last = (rank.process for rank in started)
    wait_for(lambda: all(rank.output.exists() and rank.output.read_text() for rank in started))
    last.kill()
    assert started[1].wait() == -signal.SIGKILL
    assert first.pid is not None
    os.kill(first.pid, signal.SIGINT)
    assert started[0].wait() == 5
    assert started[0].output.read_text() == "joined\n[1]\n"
