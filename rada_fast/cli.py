"""The command line: arguments to one frozen configuration to one loop. PyTorch is imported once a loop starts."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rada_fast import __version__, notices
from rada_fast.config import (
    BuildConfig,
    DemoConfig,
    DoctorConfig,
    EfficientConfig,
    FullConfig,
    KernelsConfig,
    SimulateConfig,
    TestTimeConfig,
)
from rada_fast.errors import BackendUnavailableError, UserError

COMMANDS: dict[str, tuple[type, str]] = {
    "demo": (DemoConfig, "see the method work on the small CLIP that is shipped, in about two minutes"),
    "ttt": (TestTimeConfig, "test-time training: adapt to every test image by itself"),
    "eft": (EfficientConfig, "efficient fine-tuning: train the adapter, encoders frozen"),
    "fft": (FullConfig, "full fine-tuning: adapter and classifier, then everything"),
    "build": (BuildConfig, "compile the C++ extension, once for this PyTorch"),
    "kernels": (KernelsConfig, "what the GPU kernels compile to: registers, spills, shared memory, occupancy"),
    "bench": (SimulateConfig, "'bench simulate': counts of the Triton kernels in a PTX simulator"),
    "doctor": (DoctorConfig, "what is installed, which backends are usable, and a self-test"),
}

HELP = """usage: rada-fast COMMAND [--options FILE] [OPTIONS]

Rational Adaptation (RAda, arXiv:2507.15480) of vision-language models: one attention layer over the classes, at the
very end, learns a mask over the product of image and text features.

commands:
{commands}

Begin with 'rada-fast demo'. 'rada-fast COMMAND --help' explains a command's options and shows an example.
--options FILE reads options from TOML or JSON (steps = 3, test = ["imagefolder:a", "imagefolder:b"]); the command
line wins over the file. 'rada-fast --version' prints the version.

exit status: 0 done; 1 the system failed (a full disk, say); 2 something given cannot be used (one line says what);
3 more images unreadable than allowed; 130 interrupted. After 1 and 130 the same command goes on where it stopped.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        listing = "\n".join(f"  {name:8} {text}" for name, (_, text) in COMMANDS.items())
        print(HELP.format(commands=listing), end="")
        return 0
    if arguments[0] in ("-V", "--version", "version"):
        print(f"rada-fast {__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        return _fail(f"unknown command {command!r}; the commands are {', '.join(COMMANDS)}")
    if command == "bench":
        if rest[:1] != ["simulate"] and not {"-h", "--help"} & set(rest):
            return _fail("bench needs what to run: 'rada-fast bench simulate'")
        rest = [option for option in rest if option != "simulate"]
    try:
        config = parse(command, rest)
        with notices.collecting():
            return _runner(command)(config)
    except (UserError, BackendUnavailableError) as error:
        return _fail(str(error))
    except OSError as error:
        # A disk that fills, a folder that goes away: what was finished is kept, and the same command goes on from it.
        print(f"rada-fast: {error}; start the same command again to go on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nrada-fast: interrupted; start the same command again to go on", file=sys.stderr)
        return 130


def parse(command: str, arguments: Sequence[str]) -> Any:
    """The configuration of a command from its options, those of an options file first.

    Raises UserError where a value is out of range, SystemExit 2 where an option is unknown or missing.
    """
    import tyro

    config_type = COMMANDS[command][0]
    arguments = _with_options_file(list(arguments))

    def read(*, console_outputs: bool) -> Any:
        return tyro.cli(
            config_type,
            prog=f"rada-fast {command}",
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes,),
            console_outputs=console_outputs,
        )

    try:
        return read(console_outputs=False)
    except SystemExit as end:
        # A value that a configuration refused: its own line says more than the parser's box around it.
        if (refused := _user_error_behind(end)) is not None:
            raise refused from None
    return read(console_outputs=True)


def _user_error_behind(error: BaseException | None) -> UserError | None:
    """The first UserError in what led to an exception."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def _with_options_file(arguments: list[str]) -> list[str]:
    """Replace --options FILE by the file's options, put before all others so that those win."""
    given: list[str] = []
    from_file: list[str] = []
    while arguments:
        argument = arguments.pop(0)
        if argument == "--options" or argument.startswith("--options="):
            if argument == "--options" and not arguments:
                raise UserError("--options needs a file")
            path = Path(argument.partition("=")[2] or arguments.pop(0))
            from_file += _options_of(path)
        else:
            given.append(argument)
    return from_file + given


def _options_of(path: Path) -> list[str]:
    """An options file as command-line arguments."""
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise UserError(f"options file {path} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"options file {path} is neither TOML nor JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"options file {path} must hold a table of options, got {type(values).__name__}")
    arguments: list[str] = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list):
            arguments += [flag, *map(str, value)]
        elif isinstance(value, dict):
            raise UserError(f"options file {path} must be flat: {name} is a table")
        else:
            arguments += [flag, str(value)]
    return arguments


def _runner(command: str) -> Callable[[Any], int]:
    """The function that runs a command and returns the exit status; importing it imports PyTorch."""
    if command == "demo":
        from rada_fast.demo import run_demo

        return run_demo
    if command == "doctor":
        from rada_fast.doctor import run_doctor

        return run_doctor
    if command == "kernels":
        from rada_fast.kernel_report import run_kernels

        return run_kernels
    if command == "bench":
        from rada_fast.kernel_counts import run_simulate

        return run_simulate
    if command == "build":
        from rada_fast.extension import build

        return lambda config: 0 if build(jobs=config.jobs, timeout=config.timeout, force=config.force) else 1
    from rada_fast.loops.efficient import run_efficient
    from rada_fast.loops.full import run_full
    from rada_fast.loops.report import show
    from rada_fast.loops.test_time import run_test_time

    loops: dict[str, Callable[[Any], dict[str, Any]]] = {"ttt": run_test_time, "eft": run_efficient, "fft": run_full}
    return lambda config: show(loops[command](config), config.run)


def _fail(message: str) -> int:
    print(f"rada-fast: {message}", file=sys.stderr)
    return 2
