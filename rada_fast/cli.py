"""The command line: it reads arguments into one frozen configuration and runs one command with it.

PyTorch is imported only when a command starts, so that help and refusals come at once.
"""

from __future__ import annotations

import difflib
import importlib
import io
import os
import select
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rada_fast import _env
from rada_fast._version import __version__
from rada_fast.config.arguments import check_file_kind, name_option, paths_of, read, shortened
from rada_fast.config.commands import EFTOptions, FFTOptions, TTTOptions
from rada_fast.config.tools import BuildOptions, DemoOptions, DoctorOptions, KernelsOptions
from rada_fast.errors import BackendUnavailableError, UserError
from rada_fast.system import notices, termination
from rada_fast.system.notices import one_line


@dataclass(frozen=True)
class Command:
    """One command of the program.

    options: the class of its configuration; place: the function that runs it, as MODULE:FUNCTION; summary: the line
    about it in the list of commands.
    """

    options: type
    place: str
    summary: str

    def load(self) -> Callable[[Any], Any]:
        """Import the function that runs the command. Most of these import PyTorch, which takes seconds."""
        module, _, function = self.place.partition(":")
        run: Callable[[Any], Any] = getattr(importlib.import_module(module), function)
        return run


COMMANDS = {
    "demo": Command(
        DemoOptions,
        "rada_fast.demo:run_demo",
        "see the method work on the small CLIP that is shipped, in about two minutes",
    ),
    "ttt": Command(
        TTTOptions, "rada_fast.loops.ttt:run_ttt", "test-time training: adapt to every test image by itself"
    ),
    "eft": Command(
        EFTOptions, "rada_fast.loops.eft:run_eft", "efficient fine-tuning: train the adapter, encoders frozen"
    ),
    "fft": Command(
        FFTOptions, "rada_fast.loops.fft:run_fft", "full fine-tuning: adapter and classifier, then everything"
    ),
    "build": Command(
        BuildOptions, "rada_fast.extension.build:run_build", "compile the C++ extension, once for this PyTorch"
    ),
    "kernels": Command(
        KernelsOptions,
        "rada_fast.bench.compiled:run_kernels",
        "what the GPU kernels compile to: registers, spills, shared memory, occupancy",
    ),
    "doctor": Command(
        DoctorOptions,
        "rada_fast.doctor:run_doctor",
        "what is installed, which backends are usable, and a self-test",
    ),
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
3 more images unreadable than allowed; 70 a fault of this program (RADA_FAST_TRACEBACK=1 shows where); 129 the terminal
hung up; 130 interrupted; 141 nobody reads the output; 143 terminated. After 1, 70 and those above the same command goes
on where it stopped.
"""

DONE_NOT, REFUSED, OWN_FAULT, INTERRUPTED, READER_GONE = 1, 2, 70, 130, 141
"""Exit statuses; 70 is what sysexits.h calls a fault of the software, 128 + N is a shell's for signal N."""
GO_ON = "start the same command again to go on"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status."""
    _ready_standard_streams()
    given = list(sys.argv[1:] if arguments is None else arguments)
    shown_by_python = warnings.showwarning
    # What other libraries warn of is a line as everything else is, without the place in their source.
    warnings.showwarning = lambda message, *_, **__: notices.warn(str(message))
    try:
        status = _guarded(lambda: termination.raising_terminated()(_command)(given))
        # What is still held back is written here, where a full disk or a reader that has gone can be told.
        return status if status == READER_GONE else max(status, _guarded(_flush_output))
    finally:
        warnings.showwarning = shown_by_python


def _flush_output() -> int:
    sys.stdout.flush()
    return 0


def _guarded(action: Callable[[], int]) -> int:
    """The status of an action; whatever it raises becomes one line and a status."""
    try:
        return action()
    except (UserError, BackendUnavailableError) as error:
        return _fail(str(error), REFUSED)
    except termination.Terminated as end:
        return _fail(f"{end}; {GO_ON}", end.status)
    except KeyboardInterrupt:
        return _fail(f"interrupted; {GO_ON}", INTERRUPTED)
    except BrokenPipeError as error:
        if not _reader_is_gone():
            return _fail(f"{error}; {GO_ON}", DONE_NOT)
        # As other commands do when 'head' has seen enough: say nothing, and let nothing more be written at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return READER_GONE
    except OSError as error:
        # A disk that fills, a folder that goes away: what was finished is kept, and the same command goes on from it.
        return _fail(f"{error}; {GO_ON}", DONE_NOT)
    except ImportError as error:
        if _is_lack_of_memory(error):
            return _fail(f"the memory does not suffice: {_joined(error)}; {GO_ON}", DONE_NOT)
        return _fail(f"this installation is incomplete: {error}", DONE_NOT)
    except Exception as error:
        if _is_lack_of_memory(error):
            return _fail(f"the memory does not suffice: {_joined(error) or 'out of memory'}; {GO_ON}", DONE_NOT)
        if isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error):
            reason = (
                "the system ended a process that reads images, for want of memory perhaps (fewer --workers need less)"
            )
            return _fail(f"{reason}: {_joined(error)}; {GO_ON}", DONE_NOT)
        advice = "please report it with what RADA_FAST_TRACEBACK=1 adds"
        return _fail(f"a fault of rada-fast itself, {advice}: {type(error).__name__}: {_joined(error)}", OWN_FAULT)


def _joined(error: Exception) -> str:
    """The beginning of what an error says, its lines joined."""
    return " ".join(str(error).split())[:500]


def _is_lack_of_memory(error: Exception) -> bool:
    """Whether an error says that no more memory was to be had, of the processor or of a GPU."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text))
        or (isinstance(error, ImportError) and ("failed to map segment" in text or "annot allocate memory" in text))
    )


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    asked = select.poll()
    asked.register(1, 0)
    return any(event & select.POLLERR for _, event in asked.poll(0))


def _ready_standard_streams() -> None:
    """Open the standard streams that were closed by whoever started this, and let every text be written to them.

    A file opened later would get a closed stream's number, and with it whatever is written to that stream.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 (a descriptor; open to the end)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _fail(message: str, status: int) -> int:
    """Say why a command ended, in one line. Returns the status."""
    # Without a standard error that takes it, the status says what there is to say.
    with suppress(OSError, ValueError):
        if _env.show_traceback():
            traceback.print_exc()
        print(f"rada-fast: {one_line(message)}", file=sys.stderr, flush=True)
    return status


def _command(arguments: list[str]) -> int:
    """Do what a command line asks for. Returns the exit status; whatever goes wrong is raised."""
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
    if {"-h", "--help", "help"} & set(rest[:1]) or {"-h", "--help"} & set(rest):
        return _help(command)
    config = parse(command, rest)
    check_paths(config)
    _env.check_variables(building=command == "build")
    try:
        Path.cwd()
    except FileNotFoundError:  # PyTorch's own libraries would end the process
        raise UserError("the folder that this was started in does not exist any more; start it in another") from None
    _env.place_other_caches()
    try:
        with notices.collecting(hold=True):
            with termination.deferred():
                run = COMMANDS[command].load()
            result = run(config)
            # A loop returns the summary of its run, every other command its exit status.
            return result if isinstance(result, int) else _show(result, config)
    except UserError as error:
        raise UserError(name_option(str(error), config)) from error


def _unknown_command(command: str) -> str:
    close = difflib.get_close_matches(command, COMMANDS, n=1)
    advice = f"did you mean {close[0]}? " if close else ""
    return f"unknown command {shortened(command)}; {advice}the commands are {', '.join(COMMANDS)}"


def _help(command: str) -> int:
    """Print a command's options; tyro reads what they mean from the configuration's own source."""
    import tyro

    try:
        tyro.cli(
            COMMANDS[command].options, prog=f"rada-fast {command}", args=["--help"], config=(tyro.conf.OmitArgPrefixes,)
        )
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def parse(command: str, arguments: Sequence[str]) -> Any:
    """The configuration of a command from its options, those of an options file first.

    Raises UserError where an option is unknown or missing, or its value cannot be used.
    """
    return read(COMMANDS[command].options, command, arguments)


def check_paths(config: Any) -> None:
    """Look at the paths of a configuration before anything is loaded.

    Raises UserError where one is of a kind that can never be what its option wants, or where the system does not let
    it be looked at. What is not there is for its reader to refuse, who knows what it should hold.
    """
    found = [(option, Path(value)) for option, value in paths_of(config)]
    for option, path in found:
        check_file_kind(option, path, pipes=option == "--classes")
    for option, path in found:
        if option == "--output":
            check_output(path)


def check_output(path: Path) -> None:
    """Raise UserError where a folder cannot be made or written in."""
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UserError(f"--output {path} must be a folder, {place} is none")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"--output {path} cannot be written: {place} gives no permission to write, or is read-only")


def _show(summary: dict[str, Any], config: Any) -> int:
    """Print the summary of a run. Returns the exit status."""
    from rada_fast.reports.summary import show

    return show(summary, config.run)
