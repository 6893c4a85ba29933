"""The CUDA toolkit of the build: where nvcc is, which device code it makes, and what resources the kernels use.

Nothing here raises because CUDA is absent: a function returns the reason as a text instead of its result.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from rada_fast import _env

DEFAULT_TARGETS = (80, 90, 100)
"""The compute capabilities to build for without a device: A100, H100, B200; PTX of the last serves later devices."""
MIN_TARGET = 80
MIN_TORCH = (2, 10)
"""The first PyTorch with the stable ABI that the glue is compiled against. It runs on all later ones."""
CONVENTIONAL = Path("/usr/local/cuda")


@dataclass(frozen=True)
class Toolkit:
    """The tools that compile the CUDA kernels, and the devices they compile for.

    nvcc: the path of the compiler.
    version: the version of nvcc.
    include: the folders of headers, the preferred one first.
    runtime: the folder of libcudart_static.a.
    targets: the compute capabilities to compile for.
    ptx: the compute capabilities whose PTX is included.
    note: a remark about devices that are left out, with the reason.
    """

    nvcc: Path
    version: str
    include: tuple[Path, ...]
    runtime: Path
    targets: tuple[str, ...]
    ptx: tuple[str, ...]
    note: str = ""

    def __str__(self) -> str:
        return f"{self.device_code} by nvcc {self.version}" + (f" ({self.note})" if self.note else "")

    @property
    def device_code(self) -> str:
        return ", ".join([f"sm_{name}" for name in self.targets] + [f"PTX {name}" for name in self.ptx])

    @property
    def flags(self) -> tuple[str, ...]:
        """The options of nvcc for the device code and the headers."""
        code = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in self.targets]
        code += [f"-gencode=arch=compute_{name},code=compute_{name}" for name in self.ptx]
        return (*code, *(f"-isystem={folder}" for folder in self.include))


def _output_of(nvcc: Path, *arguments: str) -> str:
    """Run nvcc and return its output on both streams, or an empty text if it does not run."""
    try:
        done = subprocess.run([str(nvcc), *arguments], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr if done.returncode == 0 else ""


def _wheels() -> list[Path]:
    """Return the folders of the installed nvidia packages, which contain include, lib and, for the compiler, bin."""
    spec = importlib.util.find_spec("nvidia") if _env.has_module("nvidia") else None
    roots = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    return sorted((folder for root in roots for folder in root.glob("*") if folder.is_dir()), reverse=True)


def _candidates() -> Iterator[Path]:
    if home := _env.cuda_home():
        # A user who names a toolkit wants that one, and an error if it is not there.
        yield home / "bin" / "nvcc"
        return
    yield CONVENTIONAL / "bin" / "nvcc"
    if found := shutil.which("nvcc"):
        yield Path(found)
    for folder in _wheels():
        yield folder / "bin" / "nvcc"


def find_nvcc() -> Path | None:
    """Find nvcc in CUDA_HOME, in the conventional place, on PATH, or in the nvidia-cuda-nvcc wheel; or return None.

    A command on PATH may be a script that starts a compiler elsewhere, so each candidate prints its true place.
    """
    for candidate in _candidates():
        if not candidate.is_file():
            continue
        place = re.search(
            r"^#\$ _HERE_=(.+)$", _output_of(candidate, "--dryrun", "-x", "cu", "/dev/null"), re.MULTILINE
        )
        if place and (Path(place[1]) / "nvcc").is_file():
            return Path(place[1]) / "nvcc"
    return None


class Targets(NamedTuple):
    """The devices to compile for: as device code, as PTX, and a note about those that are left out."""

    targets: tuple[str, ...]
    ptx: tuple[str, ...]
    note: str


def _targets_for(nvcc: Path, devices: list[int]) -> Targets | str:
    """Choose the targets for the devices of this machine. A device that nvcc does not know yet gets the newest PTX.

    Returns the reason instead if there are none.
    """
    words = ", ".join(f"sm_{device}" for device in devices)
    served = [device for device in devices if device >= MIN_TARGET]
    if not served:
        return f"the kernels need compute capability 8.0 or newer, the devices here are {words}"
    able = {int(number) for number in re.findall(r"sm_(\d+)\b", _output_of(nvcc, "--list-gpu-code"))}
    known = [device for device in served if device in able or not able]
    newest = max((target for target in able if MIN_TARGET <= target <= served[-1]), default=0)
    needs_ptx = known != served
    if needs_ptx and not newest:
        return f"{nvcc} compiles for none of {words}"
    old = [f"sm_{device}" for device in devices if device < MIN_TARGET]
    targets = known or [newest]
    return Targets(
        tuple(map(str, targets)),
        (str(newest),) if needs_ptx else (),
        f"not {', '.join(old)}: the kernels need 8.0" if old else "",
    )


def _wanted_targets(nvcc: Path) -> Targets | str:
    """Choose the targets of a build, or return the reason why there are none."""
    listed = _env.cuda_arch_list()
    if listed is None and (devices := _env.device_capabilities()):
        return _targets_for(nvcc, devices)
    if listed is None:
        able = _output_of(nvcc, "--list-gpu-code").split()
        targets = [str(target) for target in DEFAULT_TARGETS if not able or f"sm_{target}" in able]
        missing = [f"sm_{target}" for target in DEFAULT_TARGETS if str(target) not in targets]
        if not targets:
            return f"{nvcc} compiles for none of {', '.join(missing)}"
        return Targets(
            tuple(targets),
            (targets[-1],),
            f"not {', '.join(missing)}: this nvcc does not know it" if missing else "",
        )
    targets, ptx, old = [], [], []
    for entry in re.split(r"[;,\s]+", listed.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            return f"TORCH_CUDA_ARCH_LIST must list capabilities as in '8.0;9.0+PTX', got {entry!r}"
        if int(match[1] + match[2]) < MIN_TARGET:
            old.append(entry)
            continue
        name = match[1] + match[2] + match[3]
        targets += [name] if name not in targets else []
        ptx += [name] if match[4] and name not in ptx else []
    if not targets:
        return f"TORCH_CUDA_ARCH_LIST={listed} names none from 8.0, which the kernels need"
    return Targets(tuple(targets), tuple(ptx), f"not {', '.join(old)}: the kernels need 8.0" if old else "")


def torch_refusal() -> str | None:
    """Return why the installed PyTorch cannot use the CUDA kernels, or None if it can."""
    if _env.cuda_version() is None:
        return "this PyTorch is built without CUDA"
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < MIN_TORCH:
        return f"the CUDA kernels need PyTorch {'.'.join(map(str, MIN_TORCH))} or newer, this is {torch.__version__}"
    return None


def asked_toolkit() -> Toolkit | str:
    """Return the toolkit with which a build compiles the CUDA kernels, or the reason why it leaves them out.

    They take minutes to compile and are useless without a device, so on such a machine they are built on request only.
    """
    found = find_toolkit()
    if isinstance(found, str) or _env.use_cuda() or _env.cuda_arch_list() or _env.device_capabilities():
        return found
    return "no CUDA device is here (USE_CUDA=1 or TORCH_CUDA_ARCH_LIST builds them all the same)"


def find_toolkit() -> Toolkit | str:
    """Find the toolkit that can compile CUDA kernels on this machine, or return the reason why none can."""
    if _env.use_cuda() is False:
        return "USE_CUDA=0"
    if refusal := torch_refusal():
        return refusal
    nvcc = find_nvcc()
    if nvcc is None:
        home = _env.cuda_home()
        return f"no nvcc in CUDA_HOME={home}" if home else "nvcc was not found (CUDA_HOME names its toolkit)"
    version = re.search(r"\bV(\d+\.\d+\.\d+)", _output_of(nvcc, "--version"))
    if version is None:
        return f"{nvcc} does not say its version"
    # The runtime is linked into the library. A newer one than PyTorch's could need a newer driver than PyTorch does.
    if version[1].split(".")[0] != str(_env.cuda_version()).split(".")[0]:
        return f"{nvcc} is of CUDA {version[1]}, PyTorch of {_env.cuda_version()}"
    roots = [nvcc.parent.parent, *(folder for folder in _wheels() if folder != nvcc.parent.parent)]
    include = tuple(root / "include" for root in roots if (root / "include" / "cuda_runtime.h").is_file())
    runtimes = [root / name for root in roots for name in ("lib64", "lib")]
    runtime = next((folder for folder in runtimes if (folder / "libcudart_static.a").is_file()), None)
    if not include or runtime is None:
        return f"{nvcc} has no {'libcudart_static.a' if include else 'cuda_runtime.h'} with it"
    wanted = _wanted_targets(nvcc)
    return wanted if isinstance(wanted, str) else Toolkit(nvcc, version[1], include, runtime, *wanted)


@dataclass(frozen=True)
class Resources:
    """The resources of one kernel on one target, as ptxas reports them.

    kernel: the name of the kernel.
    threads: the number of threads in a block, from __launch_bounds__, or 1024 without it.
    registers: the number of registers of a thread.
    spills: the bytes that are stored to and loaded from local memory because registers are missing.
    shared: the bytes of shared memory that are known when the kernel is compiled (a launch may ask for more).
    tensor_instructions: the number of tensor-core instructions in the PTX of the kernel.
    """

    kernel: str
    threads: int
    registers: int
    spills: int
    shared: int
    tensor_instructions: int


def _demangled(name: str) -> str:
    """Return the name of a kernel without its arguments. PyTorch has loaded the library that does this."""
    try:
        demangle = ctypes.CDLL("libstdc++.so.6")["__cxa_demangle"]
    except (OSError, AttributeError):
        return name
    demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    demangled = demangle(name.encode(), None, None, ctypes.byref(status))
    if status.value or not demangled:
        return name
    text = ctypes.string_at(demangled).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(demangled))
    text = text.replace("(anonymous namespace)::", "").replace("rada_fast::", "").removeprefix("void ")
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and not depth and at:
            return text[:at]
    return text


def kernel_resources(toolkit: Toolkit, source: Path, target: int) -> list[Resources]:
    """Compile one source for one target and read the resources of each of its kernels. This needs no device."""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        include = [f"-isystem={place}" for place in toolkit.include]
        options = ["-std=c++17", "-O3", "-DNDEBUG", *include]
        command = [str(toolkit.nvcc), "-ptx", f"-arch=compute_{target}", *options, str(source), "-o", str(ptx)]
        subprocess.run(command, check=True, capture_output=True)
        text = ptx.read_text(encoding="utf-8")
        command = [str(toolkit.nvcc.parent / "ptxas"), "-v", f"-arch=sm_{target}", str(ptx), "-o", f"{ptx}.cubin"]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    bodies = {match[1]: match[0] for match in re.finditer(r"\.entry (\w+)\(.*?^}", text, re.MULTILINE | re.DOTALL)}
    found = []
    for part in re.split(r"Compiling entry function '", report)[1:]:
        name = part.split("'")[0]
        body = bodies[name]
        bound = re.search(r"\.maxntid (\d+)(?:, (\d+))?(?:, (\d+))?", body)
        threads = 1
        for size in bound.groups() if bound else ("1024",):
            threads *= int(size or 1)
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        assert registers
        found.append(
            Resources(
                _demangled(name),
                threads,
                int(registers[1]),
                sum(int(size) for size in re.findall(r"(\d+) bytes spill", part)),
                int(shared[1]) if shared else 0,
                len(re.findall(r"\b(?:mma\.sync|wmma\.mma|wgmma\.mma_async|tcgen05\.mma)", body)),
            )
        )
    return sorted(found, key=lambda one: one.kernel)
