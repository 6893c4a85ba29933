"""Programs that draw the course of a run: TensorBoard and Weights & Biases. No run needs them.

They are imported only where the option --log names them, and get what the files of the run hold anyway.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from rada_fast.errors import UserError

SINKS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
"""The module that each sink imports. A sink writes into a folder of its own name in the folder of the run."""
PROJECT = "rada-fast"
"""The project of the runs at Weights & Biases."""


class Sink(Protocol):
    """A sink gets the numbers of a run as they come."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take numbers by name. step: the number of the epoch that they belong to."""

    def close(self) -> None:
        """Write everything that has not been written."""


class TensorBoardSink:
    """Event files for TensorBoard."""

    def __init__(self, module: Any, folder: Path) -> None:
        self._writer = module.SummaryWriter(log_dir=str(folder / "tensorboard"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A run at Weights & Biases. The same run of this program goes on as the same run there."""

    def __init__(self, module: Any, folder: Path, identity: Mapping[str, Any]) -> None:
        (folder / "wandb").mkdir(exist_ok=True)
        everything = json.dumps([str(folder.resolve()), identity], sort_keys=True)
        id = hashlib.sha256(everything.encode()).hexdigest()[:32]
        self._run = module.init(
            project=PROJECT, name=folder.name, id=id, resume="allow", dir=str(folder), config=dict(identity["options"])
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def import_sink(name: str) -> Any:
    """Import the module of a sink. Raises UserError if it is not installed."""
    try:
        return importlib.import_module(SINKS[name])
    except ImportError as error:
        raise UserError(f"log {name} needs the package {name}: pip install {name} ({error})") from None


def open_sinks(names: Sequence[str], folder: Path, identity: Mapping[str, Any]) -> list[Sink]:
    """Open the sinks that the option --log names.

    names: the names of the sinks.
    folder: the folder of the run.
    identity: the identity of the run, which Weights & Biases shows as its configuration.

    Raises UserError if the package of a sink is not installed.
    """
    modules = {name: import_sink(name) for name in names}
    sinks: list[Sink] = []
    for name, module in modules.items():
        sinks.append(TensorBoardSink(module, folder) if name == "tensorboard" else WandbSink(module, folder, identity))
    return sinks


def log_to(sinks: Iterable[Sink], group: str, record: Mapping[str, Any], step: int) -> None:
    """Give all numbers of a record to sinks, those of nested records too, by names that begin with a group.

    step: the number of the epoch that they belong to.
    """
    values = dict(_numbers(record, group))
    for sink in sinks:
        sink.log(values, step)


def _numbers(record: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}/{name}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}/{name}", float(value)


def remove_events(folder: Path) -> None:
    """Remove the event files of a run that is overwritten. Weights & Biases keeps runs apart by itself.

    folder: the folder of a sink. Other files in it are left alone.
    """
    for path in folder.glob("events.out.tfevents.*"):
        path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()
