"""Replay the adaptation of a group of episodes from a CUDA graph.

A group takes hundreds of launches, and the host needs longer to queue them than a GPU to execute them. In a graph they
are queued by one call, without autograd, memory management or any wait for the device.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from rada_fast import _env
from rada_fast.engine.groups import EpisodeGroup, EpisodeRule, GroupLogits
from rada_fast.system.memory import is_lack_of_memory

KEPT_GRAPHS = 4
"""The most graphs that a process keeps. Each keeps about BUDGETS["cuda"] bytes of the device's memory."""

REMEMBERED_GROUPS = 256
"""The most kinds of groups of which a process remembers that it has met them."""


class GroupInputs(NamedTuple):
    """Hold what decides the results of a group: views (E, V, D), text (K, D), s () and the adapter's parameters."""

    views: Tensor
    text_features: Tensor
    logit_scale: Tensor
    initial: dict[str, Tensor]

    def tensors(self) -> list[Tensor]:
        """Return all tensors, in an order that the adapter's structure decides."""
        return [self.views, self.text_features, self.logit_scale, *self.initial.values()]


Result = TypeVar("Result")


class Recording(Generic[Result]):
    """Record the launches of a call in a CUDA graph, and replay them.

    call: reads and writes the same memory whenever it is called, and returns tensors on the device.
    """

    def __init__(self, call: Callable[[], Result], device: torch.device) -> None:
        # What the call keeps belongs to the graph, whose launches hold only its addresses.
        self._device, self._call = device, call
        self._graph = torch.cuda.CUDAGraph()
        self._last_use = torch.cuda.Event()
        with torch.cuda.device(device):
            before, side = torch.cuda.current_stream(), torch.cuda.Stream()
            try:
                side.wait_stream(before)
                with torch.cuda.stream(side):
                    # This compiles and loads all kernels and allocates what the call keeps; a capture allows neither.
                    call()
                before.wait_stream(side)
                # The products get a workspace of the graph's own. Without this they would share one with whatever else
                # runs on that stream while the graph is replayed on another.
                torch._C._cuda_clearCublasWorkspaces()
                # Other threads may load data meanwhile, which the default mode would forbid them.
                with torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
                    self._result = call()
            finally:
                # A capture that fails may leave its stream as the current one.
                torch.cuda.set_stream(before)
                torch._C._cuda_clearCublasWorkspaces()
            self._last_use.record(before)

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """Let the current stream wait for the last use of the recording, and the next use for what is queued inside.

        Uses from different streams would otherwise overwrite each other's memory.
        """
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._last_use)
            yield
            self._last_use.record(stream)

    def replay(self) -> Result:
        """Queue the launches on the current stream. Returns the call's result, which the next replay overwrites."""
        self._graph.replay()
        return self._result

    def wait(self) -> None:
        """Wait until the device no longer uses the recording's memory."""
        self._last_use.synchronize()


class GroupGraph:
    """Adapt groups of episodes of one kind, see kind_of, by a recording that reads copies of their inputs."""

    def __init__(self, inputs: GroupInputs, rule: EpisodeRule) -> None:
        views, text_features, logit_scale = (
            torch.empty_like(value) for value in (inputs.views, inputs.text_features, inputs.logit_scale)
        )
        initial = {name: torch.empty_like(value) for name, value in inputs.initial.items()}
        self._inputs = GroupInputs(views, text_features, logit_scale, initial)
        self._copy(inputs)
        group = EpisodeGroup(initial, rule, len(views))
        self._recording = Recording(lambda: group(views, text_features, logit_scale), views.device)

    def _copy(self, inputs: GroupInputs) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self._inputs.tensors(), inputs.tensors())

    def __call__(self, inputs: GroupInputs) -> GroupLogits:
        """Return the logits (E, K) of a group's original views."""
        with self._recording.in_order():
            self._copy(inputs)
            # One launch copies both results out of the graph's memory.
            return GroupLogits(*torch.stack(self._recording.replay()).unbind())

    def close(self) -> None:
        """Wait for the last group, after which the memory may be freed."""
        self._recording.wait()


def kind_of(inputs: GroupInputs, rule: EpisodeRule) -> Hashable:
    """Return everything but the inputs' values that decides what a group's launches are."""
    matmul = torch.backends.cuda.matmul
    return (
        rule,
        tuple(inputs.initial),
        tuple((value.device, value.dtype, value.shape) for value in inputs.tensors()),
        # These are the settings of the products, and of their tiles.
        _env.tiles_from_table(),
        _env.float32_products(),
        getattr(matmul, "fp32_precision", None) or torch.get_float32_matmul_precision(),
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
    )


def usable(device: torch.device) -> bool:
    """Return whether groups on a device may be replayed from graphs here.

    Wherever something looks at every launch or changes it, all launches are made.
    """
    return (
        device.type == "cuda"
        and _env.uses_graphs()
        and not torch.compiler.is_compiling()
        and not _env.is_capturing()
        and not torch.is_autocast_enabled("cuda")
        and not torch.is_anomaly_enabled()
        and not torch.get_deterministic_debug_mode()
        and not torch._C._len_torch_dispatch_stack()
        and not _has_saved_tensor_hooks()
    )


def _has_saved_tensor_hooks() -> bool:
    """Return whether hooks change the tensors that are kept for backward passes, such as those of save_on_cpu."""
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("graphs are not used with hooks"):
            return False
    except RuntimeError:
        return True


class GraphCache:
    """Keep the graphs of the kinds of groups that were adapted last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._graphs: OrderedDict[Hashable, GroupGraph] = OrderedDict()
        self._met: OrderedDict[Hashable, str] = OrderedDict()

    def adapt(self, inputs: GroupInputs, rule: EpisodeRule) -> GroupLogits | None:
        """Return the logits (E, K) of a group's original views, or None where all launches have to be made.

        The first group of a kind is not recorded: most groups that make up the rest of the images are met only once.
        """
        kind = kind_of(inputs, rule)
        with self._lock:
            if kind not in self._graphs:
                if self._met.get(kind) != "once":
                    self._note(kind, self._met.get(kind, "once"))
                    return None
                try:
                    self._make_room()
                    self._graphs[kind] = GroupGraph(inputs, rule)
                except Exception as error:
                    if is_lack_of_memory(error) and len(inputs.views) > 1:
                        raise  # a smaller group may find room; see episodes.py
                    self._note(kind, "fails")
                    warnings.warn(
                        "episodes could not be recorded in a CUDA graph, and are adapted without one, more slowly: "
                        f"{type(error).__name__}: {error}",
                        RuntimeWarning,
                        stacklevel=2,
                    )
                    return None
            self._graphs.move_to_end(kind)
            return self._graphs[kind](inputs)

    def _note(self, kind: Hashable, state: str) -> None:
        """Remember that a kind of group was met once, or that recording it fails."""
        self._met[kind] = state
        self._met.move_to_end(kind)
        if len(self._met) > REMEMBERED_GROUPS:
            self._met.popitem(last=False)

    def _make_room(self) -> None:
        """Drop the graphs that were used the longest ago until another one may be kept."""
        while len(self._graphs) >= KEPT_GRAPHS:
            _, graph = self._graphs.popitem(last=False)
            graph.close()

    def clear(self) -> None:
        """Forget everything, and free the memory of all graphs."""
        with self._lock:
            for graph in self._graphs.values():
                graph.close()
            self._graphs.clear()
            self._met.clear()


GRAPHS = GraphCache()
"""The graphs of this process."""
