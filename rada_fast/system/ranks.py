"""The group of processes that torchrun starts: who is who, how they share work, and what they tell each other.

A process of such a group is called a rank. A program that was started alone has a group too, of one rank, for which
every function here does nothing or returns its argument. Code is therefore written once::

    with ranks.joined() as group:
        own = group.share(pictures)
        counts = group.all_gather(len(own))
        if group.first:
            print(sum(counts))

All ranks must call the functions that speak to the others in the same order. Plain values go through the store of
torchrun, and a rank that waits for them can be interrupted. Tensors go through PyTorch's process group: gloo for those
of the processor, NCCL for those of a GPU.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from rada_fast import _env
from rada_fast.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others while none of them finishes anything. Then it ends with an error."""
LONGEST_NAP = 0.05
"""The longest time in seconds between two looks at the store by a rank that waits."""
FAREWELL = timedelta(seconds=10)
"""How long a rank that ends tries to tell the others, and how long the first one waits for those that still read."""

HASTY_FAREWELL = timedelta(seconds=2)
"""How long the first rank waits for the others where the group has failed, so that only one of them says why."""


class OtherRankError(Exception):
    """Another rank has failed and has said why, so that this one ends without a message of its own.

    status: the exit status of the other rank.
    """

    def __init__(self, status: int) -> None:
        super().__init__(f"another rank has failed with status {status}")
        self.status = status


@dataclass
class _Link:
    """What connects a rank to the others.

    store: values by name, which all ranks see; calls: the numbers of the exchanges, the same on every rank.
    told: what this rank has last left for the others, by name.
    failed: whether this rank has told the others that it has failed.
    """

    store: Store
    calls: Iterator[int] = field(default_factory=itertools.count)
    told: dict[str, Any] = field(default_factory=dict)
    failed: bool = False


@dataclass(frozen=True)
class Ranks:
    """A group of ranks, as one of them sees it. Without arguments it is that of a program that was started alone.

    rank, count: the number of this rank, counted from 0, and how many ranks there are.
    local_rank, local_count: the same on this machine alone.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    _link: _Link | None = field(default=None, repr=False, compare=False)

    @property
    def first(self) -> bool:
        """Return whether this is the rank that prints, and that writes what is written once."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Return whether there are other ranks."""
        return self.count > 1

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return every count-th item from the rank-th on. The shares of all ranks together are the items, each once."""
        return items[self.rank :: self.count]

    def cuda_index(self) -> int:
        """Return the index of this rank's GPU. Raises UserError if the machine has fewer GPUs than ranks.

        A launcher may also show each rank a single GPU of its own (CUDA_VISIBLE_DEVICES), which then has the index 0.
        """
        devices = _env.cuda_device_count()
        if devices == 1:
            return 0
        if self.local_count > devices:
            raise UserError(
                f"device cuda: {self.local_count} processes were started on a machine with {devices} GPUs; give "
                f"torchrun --nproc-per-node {devices}"
            )
        return self.local_rank

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self._exchange("barrier", None)

    def all_gather(self, value: Any, waiting: Callable[[], object] | None = None) -> list[Any]:
        """Return the values of all ranks, in the order of the ranks. They must be plain values that JSON can hold.

        waiting: this is called again and again while some ranks have not come here yet.
        """
        return self._exchange("gather", value, waiting)

    def broadcast(self, value: Any) -> Any:
        """Return the first rank's value on every rank. It must be a plain value that JSON can hold, but for a tuple.

        What the other ranks pass is ignored. The first rank does not wait for them.
        """
        if self._link is None:
            return value
        key = f"call {next(self._link.calls)}"
        if self.first:
            self._link.store.set(key, json.dumps(["broadcast", value]))
            return value
        return self._read([key], "broadcast")[0]

    def from_first(self, make: Callable[[], Any]) -> Any:
        """Let the first rank alone call a function, and return its plain result on every rank."""
        return self.broadcast(make() if self.first else None)

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, on every rank, by its sum over the ranks.

        The tensors may be of the processor or of the rank's GPU, and have any floating type; those of the same type
        travel together. On a GPU this may be part of a CUDA graph, if it was called once before the capture.
        """
        if not self.several:
            return
        import torch
        import torch.distributed as dist

        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        with torch.no_grad():
            for same in kinds.values():
                whole = torch.cat([tensor.reshape(-1) for tensor in same])
                dist.all_reduce(whole)
                for tensor, part in zip(same, whole.split([tensor.numel() for tensor in same]), strict=True):
                    tensor.copy_(part.view_as(tensor))

    def broadcast_tensor(self, tensor: Tensor) -> Tensor:
        """Return the first rank's tensor on every rank. The others pass one of the same shape, type and device."""
        if not self.several:
            return tensor
        import torch.distributed as dist

        sent = tensor.detach().clone()
        dist.broadcast(sent, 0)
        return sent

    def all_gather_rows(self, rows: Tensor, total: int, block: int = 1) -> Tensor:
        """Return the rows (total, ...) of all ranks, on the processor, in the order of the items that they belong to.

        rows: a row for each of this rank's items, on the processor.
        total: the number of the items of all ranks.
        block: the ranks have shared the items in blocks of this size: ``share`` was given the list of the blocks.
        """
        if not self.several:
            return rows
        import torch
        import torch.distributed as dist

        # The collective needs equal shapes, so that some ranks send more rows, which nobody reads.
        blocks = -(-total // block)
        most = -(-blocks // self.count)
        sent = rows.new_zeros((most * block, *rows.shape[1:]))
        sent[: len(rows)] = rows
        received = [torch.empty_like(sent) for _ in range(self.count)]
        dist.all_gather(received, sent)
        # Block r of rank k is block r * count + k of all.
        return torch.stack([one.unflatten(0, (most, block)) for one in received], dim=1).flatten(0, 2)[:total]

    def tell(self, name: str, value: Any) -> None:
        """Leave a plain value for the other ranks under a name, in place of the one before. This waits for nobody.

        Ranks that wait see by a new value that the work goes on.
        """
        if self._link is not None and self._link.told.get(name) != value:
            self._link.told[name] = value
            self._link.store.set(f"{name} of {self.rank}", json.dumps(value))
            self._link.store.add("signs of life", 1)

    def told(self, name: str) -> list[Any]:
        """Return the last values that the ranks have left under a name, of those that have left one. It does not wait.

        A program that was started alone is told nothing.
        """
        if self._link is None:
            return []
        keys = [f"{name} of {rank}" for rank in range(self.count)]
        store = self._link.store
        if not store.check(keys):
            keys = [key for key in keys if store.check([key])]
        return [json.loads(value) for value in store.multi_get(keys)] if keys else []

    def claim(self, name: str) -> bool:
        """Return whether this rank is the first to claim a name, which may then do what only one rank shall do."""
        if self._link is None:
            return True
        with suppress(RuntimeError):  # the store can be gone where a group is ended; then every rank speaks for itself
            return self._link.store.add(f"claim {name}", 1) == 1
        return True

    def fail(self, status: int, reason: str = "") -> bool:
        """Tell the other ranks that this one ends with an exit status, and return whether it shall say why.

        Only the first rank that fails says why: the others mostly fail for the same reason, or because of it. torchrun
        shows the reason in its report.
        """
        if self._link is None:
            return True
        self._link.failed = True
        _tell_torchrun(reason or f"exit status {status}")
        with suppress(RuntimeError):
            self._link.store.set_timeout(FAREWELL)
            alone = self.claim("failure")
            if alone:
                self._link.store.set("failure", str(status))
            return alone
        return True

    def lost(self) -> list[int]:
        """Return the ranks on this machine whose processes have ended without a word."""
        if self._link is None:
            return []
        found = []
        with suppress(RuntimeError, ValueError):
            self._link.store.set_timeout(FAREWELL)
            for rank in range(self.count):
                if self._link.store.check([f"process {rank}"]):
                    process, _, node = self._link.store.get(f"process {rank}").decode().partition(" ")
                    if node == platform.node() and not _is_running(int(process)):
                        found.append(rank)
        return found

    def _exchange(self, kind: str, value: Any, waiting: Callable[[], object] | None = None) -> list[Any]:
        if self._link is None:
            return [value]
        call = next(self._link.calls)
        self._link.store.set(f"call {call} of {self.rank}", json.dumps([kind, value]))
        return self._read([f"call {call} of {rank}" for rank in range(self.count)], kind, waiting)

    def _read(self, keys: list[str], kind: str, waiting: Callable[[], object] | None = None) -> list[Any]:
        """Wait until the store has all keys, and return their values."""
        assert self._link is not None
        store = self._link.store
        nap, signs, since = 0.001, -1, time.monotonic()
        while not store.check(keys):
            if store.check(["failure"]):
                raise OtherRankError(int(store.get("failure")))
            time.sleep(nap)
            nap = min(2 * nap, LONGEST_NAP)
            if nap == LONGEST_NAP and (now := store.add("signs of life", 0)) != signs:
                signs, since = now, time.monotonic()
            if waiting is not None:
                waiting()
            if time.monotonic() - since > TIMEOUT.total_seconds():
                self._give_up(store, keys)
        found = [json.loads(value) for value in store.multi_get(keys)]
        if other := {name for name, _ in found} - {kind}:
            raise RuntimeError(f"rank {self.rank} has come to a {kind}, another one to a {', '.join(other)}")
        return [value for _, value in found]

    def _give_up(self, store: Store, keys: list[str]) -> NoReturn:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        raise TimeoutError(f"nothing came from rank {', '.join(map(str, missing))} for {TIMEOUT}")


_current = Ranks()


def current() -> Ranks:
    """Return the group that this process has joined, or that of a program that was started alone."""
    return _current


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the group that torchrun has started, and leave it at the end; a program that was started alone does nothing.

    Every rank waits at the end until all have come there, so that none is ended while another one still works. If the
    block raises an exception, or a rank has called ``fail``, the group is left at once. What the ranks other than the
    first print in Python inside the block goes nowhere. The cores of the machine are divided among its ranks, see
    _env.threads_of_rank.

    Raises UserError if the variables of torchrun cannot be used, or if the ranks do not find each other.
    """
    global _current
    variables = _env.rank_variables()
    if variables is None or _current.several:
        yield _current
        return
    group, link = _join(variables)
    _current, in_order = group, False
    try:
        with ExitStack() as streams:
            if not group.first:
                nowhere = streams.enter_context(Path(os.devnull).open("w"))
                streams.enter_context(redirect_stdout(nowhere))
                streams.enter_context(redirect_stderr(nowhere))
            yield group
        if not link.failed:
            group.barrier()
            in_order = True
    finally:
        _current = Ranks()
        _leave(group, link.store, in_order=in_order)


def _join(variables: _env.RankVariables) -> tuple[Ranks, _Link]:
    global _store
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    threads = _env.threads_of_rank(variables.local_size)
    if threads is not None:
        torch.set_num_threads(threads)
    backend = "cpu:gloo,cuda:nccl" if _env.has_cuda() and dist.is_nccl_available() else "gloo"
    try:
        store, _, _ = next(iter(rendezvous("env://", timeout=TIMEOUT)))
        _store = store
        # A second group in the same process, or a second attempt of torchrun, must not find the values of the first.
        store = PrefixStore(f"rada_fast {next(_groups)}", store)
        dist.init_process_group(
            backend, store=PrefixStore("group", store), rank=variables.rank, world_size=variables.size,
            timeout=TIMEOUT,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"rank {variables.rank} of {variables.size} could not join the others: {reason}") from None
    store.set(f"process {variables.rank}", f"{os.getpid()} {platform.node()}")
    link = _Link(store)
    return Ranks(*variables, _link=link), link


_store: Any = None
"""The store of the group that this process joined last. It outlives the group, because the first rank serves it, and a
rank that is ahead joins the next group there while the first one still leaves this one."""
_groups = itertools.count()
"""The numbers of the groups that this process joins one after the other."""


def _leave(group: Ranks, store: Store, *, in_order: bool) -> None:
    import torch.distributed as dist

    # The store may live in the first rank, which must outlast what the others still read there.
    with suppress(RuntimeError):
        store.set_timeout(FAREWELL)
        store.set(f"left {group.rank}", "")
        if group.first and (in_order or not _env.has_agent_store()):
            end = time.monotonic() + (FAREWELL if in_order else HASTY_FAREWELL).total_seconds()
            while time.monotonic() < end and not store.check([f"left {rank}" for rank in range(group.count)]):
                time.sleep(0.01)
    if not in_order and "nccl" in dist.get_backend_config():
        # NCCL would wait for the ranks that do not come any more.
        with suppress(RuntimeError):
            dist.distributed_c10d._abort_process_group()
        return
    dist.destroy_process_group()


def _tell_torchrun(reason: str) -> None:
    """Write the reason of a failure where torchrun looks for it, in the form of torch.distributed.elastic."""
    path = _env.rank_error_file()
    if path is not None:
        extra = {"py_callstack": reason, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            path.write_text(json.dumps({"message": {"message": reason, "extraInfo": extra}}))


def is_lost_connection(error: Exception) -> bool:
    """Return whether an error of PyTorch says that another rank has ended or cannot be reached."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and bool(_TRANSPORT.search(str(error))))


_TRANSPORT = re.compile(r"gloo|NCCL|Connection (closed|reset)|Broken pipe|ProcessGroup")


def _is_running(process: int) -> bool:
    with suppress(OSError):  # a process that has ended is still listed until its parent has noticed
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
