"""The command line: it reads the arguments into one frozen configuration, and runs one command with it.

PyTorch is imported only when a command starts, so that help and the refusal of an option come at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import io
import os
import re
import select
import sys
import time
import traceback
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rada_fast import _env
from rada_fast._version import __version__
from rada_fast.config.arguments import check_file_kind, name_option, paths_of, read, shortened
from rada_fast.config.bench import PARTS
from rada_fast.config.commands import EFTOptions, FFTOptions, TTTOptions
from rada_fast.config.inference import EvalOptions, FeaturesOptions, InspectOptions, PredictOptions
from rada_fast.config.measuring import MeasuringOptions
from rada_fast.config.tools import (
    BuildOptions,
    DemoOptions,
    DoctorOptions,
    KernelsOptions,
    ReportOptions,
    StatusOptions,
)
from rada_fast.errors import BackendUnavailableError, UserError
from rada_fast.system import invocation, memory, notices, ranks, termination
from rada_fast.system.notices import one_line


@dataclass(frozen=True)
class Command:
    """One command of the program.

    options: the class of its configuration; or one for each part of the command, by the word that names the part.
    function: the function that runs it, as MODULE:FUNCTION.
    summary: the line about it in the list of commands.
    ranks: whether several processes, started by torchrun, can run it together.
    """

    options: type | Mapping[str, type]
    function: str
    summary: str
    ranks: bool = False

    @property
    def parts(self) -> Mapping[str, type]:
        """Return the parts of the command by name, or nothing for a command without parts."""
        return {} if isinstance(self.options, type) else self.options

    def load(self) -> Callable[[Any], Any]:
        """Import the function that runs the command. Most of these import PyTorch, which takes seconds."""
        module, _, function = self.function.partition(":")
        run: Callable[[Any], Any] = getattr(importlib.import_module(module), function)
        return run


COMMANDS = {
    "demo": Command(
        DemoOptions,
        "rada_fast.demo:run_demo",
        "see the method work on the small CLIP that is shipped, in about a minute",
    ),
    "ttt": Command(
        TTTOptions,
        "rada_fast.loops.ttt:run_ttt",
        "test-time training: adapt to every test image by itself",
        ranks=True,
    ),
    "eft": Command(
        EFTOptions,
        "rada_fast.loops.sweep:run_eft_runs",
        "efficient fine-tuning: train the adapter, encoders frozen",
        ranks=True,
    ),
    "fft": Command(
        FFTOptions,
        "rada_fast.loops.fft:run_fft",
        "full fine-tuning: adapter and classifier, then everything",
        ranks=True,
    ),
    "eval": Command(
        EvalOptions,
        "rada_fast.loops.evaluation:run_eval",
        "evaluate a trained adapter on one or more sets of images",
        ranks=True,
    ),
    "inspect": Command(
        InspectOptions,
        "rada_fast.loops.inspection:run_inspect",
        "see what an adapter changes: its mask, heat maps, t-SNE, classes, calibration, on one page",
    ),
    "predict": Command(
        PredictOptions,
        "rada_fast.loops.prediction:run_predict",
        "give images without labels the names of classes",
        ranks=True,
    ),
    "features": Command(
        FeaturesOptions, "rada_fast.loops.extraction:run_features", "encode images once, into a file of features"
    ),
    "report": Command(
        ReportOptions,
        "rada_fast.reports.command:run_report",
        "tables of finished runs: sets, classes, seeds, base and new, calibration, two runs compared",
    ),
    "status": Command(
        StatusOptions,
        "rada_fast.reports.watching:run_status",
        "how runs stand: done and left, rate, time left, accuracy so far, and how an interrupted one goes on",
    ),
    "build": Command(
        BuildOptions, "rada_fast.extension.build:run_build", "compile the C++ extension, once for this PyTorch"
    ),
    "kernels": Command(
        KernelsOptions,
        "rada_fast.bench.compiled:run_kernels",
        "what the GPU kernels compile to: registers, spills, shared memory, occupancy",
    ),
    "bench": Command(
        PARTS,
        "rada_fast.bench.command:run_bench",
        f"measure a part on this machine: {', '.join(PARTS)}",
    ),
    "doctor": Command(
        DoctorOptions,
        "rada_fast.doctor:run_doctor",
        "what is installed, which backends are usable, and a self-test; or whether data are as published",
    ),
}

HELP = """usage: rada-fast COMMAND [--options FILE] [OPTIONS]

Rational Adaptation (RAda, arXiv:2507.15480) of vision-language models: one attention layer over the classes, at the
very end, learns a mask over the product of image and text features.

commands:
{commands}

Begin with 'rada-fast demo'. 'rada-fast COMMAND --help' explains a command's options and shows an example.
'torchrun --nproc-per-node 8 -m rada_fast COMMAND ...' runs ttt, eft, fft, eval or predict in eight processes.
--options FILE reads options from TOML or JSON (steps = 3, test = ["imagefolder:a", "imagefolder:b"]); the command
line wins over the file. 'rada-fast --version' prints the version.

exit status: 0 done; 1 the system failed (a full disk, say), or doctor found a fault; 2 an option, a file or a variable
cannot be used (one line says which); 3 more images are unreadable than allowed; 70 a fault of this program
(RADA_FAST_TRACEBACK=1 shows where); 129 the terminal hung up; 130 interrupted; 141 nobody reads the output; 143
terminated. After 1, and from 70 on, the same command goes on where it stopped.
"""

LOST_WAIT = 0.05
"""The seconds to wait for the end of a rank that does not answer any more. torchrun ends the others after 0.1 s."""
FAILED, REFUSED, INTERNAL_ERROR, INTERRUPTED, BROKEN_PIPE = 1, 2, 70, 130, 141
"""The exit statuses. 70 is EX_SOFTWARE of sysexits.h; a shell reports 128 + N for a process that signal N has ended."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status."""
    _ready_standard_streams()
    of_process = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    invocation.remember(arguments, of_process=of_process)
    original_showwarning = warnings.showwarning
    # A warning of another library becomes one line, as every other message, without its place in the source.
    warnings.showwarning = lambda message, *_, **__: notices.warn(str(message))
    try:
        status = _run_with_status(lambda: _run_in_group(arguments))
        # The rest of the output is written here, so that a full disk or a closed pipe is still reported.
        return status if status == BROKEN_PIPE else max(status, _run_with_status(_flush_output))
    finally:
        warnings.showwarning = original_showwarning


def _run_in_group(arguments: list[str]) -> int:
    """Run a command, together with the other processes if torchrun has started several. Returns the exit status."""
    _env.shorten_waits()
    _env.quiet_profiler()
    with ranks.joined() as group:
        run = termination.raising_terminated()(_run_command)
        if not group.several:
            return run(arguments)
        # What ends one process must reach the others before it leaves their group.
        return _run_with_status(lambda: run(arguments))


def _flush_output() -> int:
    sys.stdout.flush()
    return 0


def _run_with_status(action: Callable[[], int]) -> int:
    """Run an action and return its exit status. An exception becomes a line on standard error and a status."""
    try:
        return action()
    except (UserError, BackendUnavailableError) as error:
        return _fail(str(error), REFUSED)
    except ranks.OtherRankError as error:
        return error.status
    except termination.Terminated as end:
        return _fail(f"{_lost_ranks() or end}; {_how_to_go_on()}", end.status)
    except KeyboardInterrupt:
        return _fail(f"interrupted; {_how_to_go_on()}", INTERRUPTED)
    except BrokenPipeError as error:
        if not _output_pipe_is_closed():
            return _fail(f"{error}; {_how_to_go_on()}", FAILED)
        # Like other commands whose output is read by 'head', end without a message, and write nothing more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return BROKEN_PIPE
    except OSError as error:
        # The disk may be full, or a folder removed. The finished work is kept, and the same command resumes it.
        return _fail(f"{error}; {_how_to_go_on()}", FAILED)
    except ImportError as error:
        if _is_lack_of_memory(error):
            return _fail(f"the memory does not suffice: {_joined(error)}; {_how_to_go_on()}", FAILED)
        return _fail(f"this installation is incomplete: {error}", FAILED)
    except Exception as error:
        if ranks.current().several and ranks.is_lost_connection(error):
            reason = _lost_ranks(LOST_WAIT) or f"another rank has ended or cannot be reached ({_reason_of(error)})"
            return _fail(f"{reason}; {_how_to_go_on()}", FAILED)
        if _is_lack_of_memory(error):
            return _fail(f"the memory does not suffice: {_joined(error) or 'out of memory'}; {_how_to_go_on()}", FAILED)
        if isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error):
            reason = (
                "the system ended a process that reads images, for want of memory perhaps (fewer --workers need less)"
            )
            return _fail(f"{reason}: {_joined(error)}; {_how_to_go_on()}", FAILED)
        advice = "please report it with what RADA_FAST_TRACEBACK=1 adds"
        return _fail(f"a fault of rada-fast itself, {advice}: {type(error).__name__}: {_joined(error)}", INTERNAL_ERROR)


def _how_to_go_on() -> str:
    """Return the end of a message: the command that goes on with what was finished."""
    command = invocation.command_line()
    # A message stands on one line, in which other characters would be replaced by escape sequences.
    if command is None or not command.isprintable():
        return "start the same command again to go on"
    return f"to go on: {command}"


def _lost_ranks(wait: float = 0.0) -> str:
    """Name the other processes of the group that have ended without a word, or return an empty text.

    wait: for how many seconds to look again. The connections of a process that is killed are closed shortly before the
        system counts it as ended.
    """
    end = time.monotonic() + wait
    while not (lost := ranks.current().lost()) and time.monotonic() < end:
        time.sleep(0.005)
    return f"rank {', '.join(map(str, lost))} of {ranks.current().count} was killed or has crashed" if lost else ""


def _joined(error: Exception) -> str:
    """Return the beginning of the message of an error, on one line."""
    return " ".join(str(error).split())[:500]


def _reason_of(error: Exception) -> str:
    """Return what the library that connects the ranks says of a failure, without places in its source and advice."""
    return re.sub(r"\[?/\S+:\d+\]?:? *", "", _joined(error)).partition(". This is typically")[0]


def _is_lack_of_memory(error: Exception) -> bool:
    """Return whether an error says that the memory is exhausted, also that for another library."""
    text = str(error)
    unmapped = isinstance(error, ImportError) and ("failed to map segment" in text or "annot allocate memory" in text)
    return unmapped or memory.is_lack_of_memory(error)


def _output_pipe_is_closed() -> bool:
    """Return whether standard output is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _ready_standard_streams() -> None:
    """Open standard streams that are closed, and let them write characters that their encoding lacks as escapes.

    Otherwise the next file to be opened would get the descriptor of a closed stream, and with it the text that is
    written to that stream.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 (it stays open until the process ends)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _fail(message: str, status: int) -> int:
    """Print on one line why a command ended, or leave that to the rank that has failed first. Returns the status."""
    if not ranks.current().fail(status, f"rada-fast: {one_line(message)}"):
        return status
    # If standard error cannot be written, the status alone tells the reason.
    with suppress(OSError, ValueError):
        if _env.show_traceback():
            traceback.print_exc()
        # The ranks other than the first print nothing else, and nothing to sys.stderr.
        stream = sys.__stderr__ if ranks.current().several else sys.stderr
        print(f"rada-fast: {one_line(message)}", file=stream, flush=True)
    return status


def _run_command(arguments: list[str]) -> int:
    """Run the command that a command line names. Returns the exit status, and raises an exception if it fails."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        listing = "\n".join(f"  {name:8} {command.summary}" for name, command in COMMANDS.items())
        print(HELP.format(commands=listing), end="")
        return 0
    if arguments[0] in ("-V", "--version", "version"):
        print(f"rada-fast {__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        raise UserError(_unknown_command(command))
    if ranks.current().several and not COMMANDS[command].ranks:
        able = [name for name, each in COMMANDS.items() if each.ranks]
        advice = f"only {', '.join(able)} can be split" if able else "no command can be split yet"
        raise UserError(f"{command} runs in one process, start it without torchrun ({advice})")
    if {"-h", "--help", "help"} & set(rest[:1]) or {"-h", "--help"} & set(rest):
        return _help(command, rest)
    config = parse(command, rest)
    check_paths(config)
    _env.check_variables(building=command == "build")
    try:
        Path.cwd()
    except FileNotFoundError:  # without this folder, libraries of PyTorch end the process
        raise UserError("the folder that this was started in does not exist any more; start it in another") from None
    _env.place_other_caches()
    _env.shorten_waits()
    memory.keep_freed_memory()
    try:
        with notices.collecting(hold=True):
            with termination.deferred():
                run = COMMANDS[command].load()
            result = run(config)
            # A command with a run returns the summary of it, all others their exit status.
            return result if isinstance(result, int) else _show(result, config)
    except UserError as error:
        raise UserError(name_option(str(error), config)) from error


def _unknown_command(command: str) -> str:
    close = difflib.get_close_matches(command, COMMANDS, n=1)
    advice = f"did you mean {close[0]}? " if close else ""
    return f"unknown command {shortened(command)}; {advice}the commands are {', '.join(COMMANDS)}"


def _help(command: str, arguments: Sequence[str]) -> int:
    """Print the options of a command. tyro reads their descriptions from the source of the configuration.

    arguments: the arguments after the command, which may name a part of it. Without one, the parts are listed.
    """
    import tyro

    parts = COMMANDS[command].parts
    if parts and not parts.keys() & set(arguments[:1]):
        print(_parts_help(command, parts), end="")
        return 0
    options, name = _options_of_part(command, arguments)
    _join_lines_of_help(options)
    try:
        tyro.cli(options, prog=f"rada-fast {name}", args=["--help"], config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _join_lines_of_help(options: type) -> None:
    """Let tyro wrap the descriptions of a configuration anew. It would keep the line breaks of indented lines."""
    try:
        from tyro._docstrings import parse_docstring_from_object
    except ImportError:  # another version of tyro may have it elsewhere, and only the line breaks stay
        return
    for group in (options, *typing.get_type_hints(options).values()):
        if isinstance(group, type) and dataclasses.is_dataclass(group):
            for base in group.__mro__[:-1]:  # without object
                descriptions = parse_docstring_from_object(base)  # tyro keeps this dictionary
                descriptions |= {name: " ".join(text.split()) for name, text in descriptions.items()}


def parse(command: str, arguments: Sequence[str]) -> Any:
    """Read the configuration of a command from its options. They override the values in an options file.

    Raises UserError if an option is unknown or missing, or its value cannot be used.
    """
    options, name = _options_of_part(command, arguments)
    return read(options, name, arguments[1:] if COMMANDS[command].parts else arguments)


def _options_of_part(command: str, arguments: Sequence[str]) -> tuple[type, str]:
    """Return the class of a command's configuration, or of that of the part that the first argument names.

    The command's name comes with it, and that of the part.
    """
    options = COMMANDS[command].options
    if isinstance(options, type):
        return options, command
    if not arguments or arguments[0] not in options:
        found = f", got {shortened(arguments[0])}" if arguments else ""
        close = difflib.get_close_matches(arguments[0], options, n=1) if arguments else []
        advice = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"{command} must be followed by one of {', '.join(options)}{found}{advice}")
    return options[arguments[0]], f"{command} {arguments[0]}"


def _parts_help(command: str, parts: Mapping[str, type]) -> str:
    """Return the help of a command with parts: a line for each, and its example."""
    lines = [f"usage: rada-fast {command} {{{','.join(parts)}}} [OPTIONS]", ""]
    for name, options in parts.items():
        about, _, example = " ".join((options.__doc__ or "").split()).partition("Example: ")
        lines += [f"{name}: {about.split('. ')[0].rstrip(' .')}.", f"    {example}", ""]
    lines.append(f"'rada-fast {command} {next(iter(parts))} --help' explains the options of a part.")
    return "\n".join(lines) + "\n"


def check_paths(config: Any) -> None:
    """Check the paths of a configuration before anything is loaded.

    Raises UserError if a path is of a kind that its option can never use, or if the system does not allow the check.
    A path that does not exist is refused later, by the function that reads it.
    """
    found = [(option, Path(value)) for option, value in paths_of(config)]
    for option, path in found:
        check_file_kind(option, path, pipes=option == "--classes")
    measuring = getattr(config, "measuring", None)
    for option, path in found:
        if option == "--output":
            # The command bench takes a picture's file, too.
            check_output(path.parent if isinstance(measuring, MeasuringOptions) and path.suffix == ".png" else path)


def check_output(path: Path) -> None:
    """Raise UserError if the output folder cannot be created or written to."""
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"--output {path} must be a folder, but {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--output {path} cannot be written: {existing} gives no permission to write, or is read-only")


def _show(summary: dict[str, Any], config: Any) -> int:
    """Print the summary of a run. Returns the exit status."""
    from rada_fast.reports.summary import show

    return show(summary, config.run)
