"""Report what is installed and which backends are usable, with a small numeric self-test; or check data."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import normalize

from rada_fast import _env
from rada_fast.config.method import AdapterConfig
from rada_fast.config.tools import DoctorOptions
from rada_fast.data.inspection import PartReport, inspect
from rada_fast.errors import BackendUnavailableError, UserError
from rada_fast.extension import libraries
from rada_fast.models.class_names import class_names_of
from rada_fast.modules import RationalAdapter
from rada_fast.ops import BACKENDS, backends, rational_adapter, resolve_backend
from rada_fast.runs.machine import versions
from rada_fast.runs.progress import progress
from rada_fast.system.notices import one_line
from rada_fast.system.terminal import print_json

SELF_TEST_BOUND = 1e-4
"""The relative error of float32 logits may be as large as this, about 100 times what rounding gives at this size."""

SHOWN_NAMES = 8
"""As many names of classes are shown."""


def run_doctor(config: DoctorOptions) -> int:
    """Print the report.

    Returns 0, or 1 where a backend fails the self-test, the chosen one is not usable, or something is wrong with data.
    """
    if config.data:
        return _report_on_data(config)
    report = examine()
    if config.json:
        print_json(report)
    else:
        _show("versions", report["versions"])
        _show("machine", report["machine"])
        _show("backends", report["backends"])
        _show("C++ extension", report["extension"])
        _show("self-test: relative error of float32 logits against float64", report["self_test"])
        print(f"auto takes: {report['auto']}")
        if report["in_force"] != report["auto"]:
            print(f"in force by RADA_FAST_BACKEND: {report['in_force']}")
    failed = [name for name, error in report["self_test"].items() if not _is_small(error)]
    if failed and not config.json:
        print(f"self-test failed: {', '.join(failed)}")
    return 1 if failed or report["in_force"] not in BACKENDS else 0


def _report_on_data(config: DoctorOptions) -> int:
    """Inspect data and print what was found. Returns 1 where something is wrong with them, otherwise 0."""
    found: dict[str, list[PartReport]] = {}
    for spec in config.data:
        with progress(f"decode pictures of {spec}", None) as advance:
            found[spec] = inspect(
                spec,
                all_files=config.all_files,
                names_of=lambda source: class_names_of(source, None, prompts=True),
                advance=advance,
            )
    wrong = any(report.faults for reports in found.values() for report in reports)
    if config.json:
        print_json({spec: [report.values() for report in reports] for spec, reports in found.items()})
        return 1 if wrong else 0
    for spec, reports in found.items():
        print(spec)
        for report in reports:
            for line in _lines_of(report):
                print(f"  {report.part:<5}  {line}")
        print()
    print("something is wrong with the data: see the lines that begin with WRONG" if wrong else "nothing is wrong")
    return 1 if wrong else 0


def _lines_of(report: PartReport) -> list[str]:
    """Return what was found in a part of data, a line for each thing."""
    lines = []
    if report.where:
        each = ""
        if report.each is not None:
            fewest, most = report.each
            each = f", {fewest} of each class" if fewest == most else f", {fewest} to {most} of each class"
        lines += [one_line(report.where), f"{report.images} images, {report.classes} classes{each}"]
        if report.names:
            more = ", ..." if len(report.names) > SHOWN_NAMES else ""
            lines.append(one_line(f"names: {', '.join(report.names[:SHOWN_NAMES])}{more}"))
        if report.decoded:
            lines.append(f"{report.decoded} pictures tried")
    lines += [f"note: {one_line(message)}" for message in report.warnings]
    return lines + [f"WRONG: {one_line(message)}" for message in report.faults]


def _show(title: str, facts: dict[str, Any]) -> None:
    """Print one line for each fact, never cut or wrapped, because people copy paths and reasons."""
    width = max(map(len, facts), default=0)
    print(title)
    for name, value in facts.items():
        print(f"  {name:<{width}}  {'-' if value is None else value}")
    print()


def _is_small(error: str) -> bool:
    try:
        return float(error) <= SELF_TEST_BOUND
    except ValueError:  # the text says why there is no number
        return False


def _value_or_reason(function: Callable[[], object]) -> str:
    """Return what a function returns, as text, or the message of its error."""
    try:
        return str(function())
    except (UserError, BackendUnavailableError) as error:
        return str(error)


def examine() -> dict[str, Any]:
    """Return the whole report as plain values."""
    return {
        "versions": versions(),
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "cpu_capability": _env.cpu_capability(),
            "cuda": _env.cuda_device_name() if _env.has_cuda() else "no device",
            "cuda_build": _env.cuda_version() or "none",
            "cache": _value_or_reason(_env.cache_dir),
        },
        "backends": backends(),
        "extension": libraries.describe(),
        "auto": resolve_backend("auto"),
        "in_force": _value_or_reason(resolve_backend),
        "self_test": self_test(),
    }


def self_test() -> dict[str, str]:
    """Return the relative error of every usable backend's logits on a small problem, or how it failed."""
    generator = torch.Generator().manual_seed(0)
    adapter = RationalAdapter(AdapterConfig.official(64)).double()
    for parameter in adapter.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    image = normalize(torch.randn(3, 64, generator=generator, dtype=torch.float64), dim=-1)
    text = normalize(torch.randn(17, 64, generator=generator, dtype=torch.float64), dim=-1)
    adapter = adapter.float().double()
    # All backends are compared with the reference in float64, whatever backend RADA_FAST_BACKEND names.
    with torch.no_grad():
        exact = rational_adapter(
            image.float().double(), text.float().double(), 100.0, dict(adapter.named_parameters()), adapter.config,
            backend="reference",
        ).logits  # fmt: skip
    adapter = adapter.float()
    device = "cuda" if _env.has_cuda() else "cpu"
    errors = {}
    for name in BACKENDS:
        if backends()[name] != "usable":
            continue
        own = "cpu" if name == "cpu" else device
        try:
            parameters = {key: value.detach().to(own) for key, value in adapter.named_parameters()}
            with torch.no_grad():
                logits = rational_adapter(
                    image.float().to(own), text.float().to(own), 100.0, parameters, adapter.config, backend=name
                ).logits
            errors[name] = f"{float((logits.cpu() - exact).norm() / exact.norm()):.1e}"
        except Exception as error:  # whatever a driver or a compiler raises, the other backends are still tried
            errors[name] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return errors
