"""The build finds nvcc, makes code for the right devices, and says why it leaves the CUDA kernels out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rada_fast import _env
from rada_fast.errors import UserError
from rada_fast.extension import build, cuda_toolkit, libraries
from rada_fast.extension.cuda_toolkit import Toolkit, asked_toolkit, find_nvcc, find_toolkit

VARIABLES = ("USE_CUDA", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(_env, "device_capabilities", lambda: [])


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let the machine have no nvcc."""
    monkeypatch.setattr(cuda_toolkit, "CONVENTIONAL", tmp_path / "cuda")
    monkeypatch.setattr(cuda_toolkit, "_wheels", lambda: [])
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def toolkit() -> Toolkit:
    found = find_toolkit()
    if isinstance(found, str):
        pytest.skip(f"no CUDA kernels: {found}")
    return found


def compiler(folder: Path, *, version: str = "V13.0.88", knows: str = "sm_80 sm_90 sm_100", here: str = "") -> Path:
    """Write a fake toolkit that answers what the build asks. here: where the script says that its compiler is."""
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(
        f'#!/bin/sh\ncase "$1" in\n--dryrun) echo "#$ _HERE_={here or nvcc.parent}" >&2;;\n'
        f"--version) echo 'release, {version}';;\n--list-gpu-code) echo {knows};;\nesac\n"
    )
    nvcc.chmod(0o755)
    for path in ("include/cuda_runtime.h", "lib64/libcudart_static.a"):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).touch()
    return nvcc


@pytest.fixture
def cuda_13(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let PyTorch be built with CUDA 13.0 and new enough for the kernels' registration."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "__version__", "2.10.0+cu130")


@pytest.mark.usefixtures("nowhere", "cuda_13")
def test_toolkits_are_searched_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_nvcc() is None
    assert find_toolkit() == "nvcc was not found (CUDA_HOME names its toolkit)"
    wheel = compiler(tmp_path / "nvidia" / "cu13")
    monkeypatch.setattr(cuda_toolkit, "_wheels", lambda: [tmp_path / "nvidia" / "cu13"])
    assert find_nvcc() == wheel
    on_path = compiler(tmp_path / "elsewhere")
    monkeypatch.setenv("PATH", f"{on_path.parent}:/bin")
    assert find_nvcc() == on_path
    conventional = compiler(tmp_path / "cuda")
    assert find_nvcc() == conventional
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "elsewhere"))
    assert find_nvcc() == on_path
    # A toolkit that the user named and that does not exist is an error; no other is used instead.
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "missing"))
    assert find_toolkit() == f"no nvcc in CUDA_HOME={tmp_path / 'missing'}"


@pytest.mark.usefixtures("nowhere")
def test_a_script_on_the_path_is_asked_where_its_compiler_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = compiler(tmp_path / "real")
    script = compiler(tmp_path / "script", here=str(real.parent))
    monkeypatch.setenv("PATH", str(script.parent))
    assert find_nvcc() == real
    script.write_text("#!/bin/sh\nexit 1\n")
    assert find_nvcc() is None


@pytest.mark.usefixtures("nowhere", "cuda_13")
def test_device_code_follows_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(tmp_path / "cuda")
    default = find_toolkit()
    assert isinstance(default, Toolkit)
    assert str(default) == "sm_80, sm_90, sm_100, PTX 100 by nvcc 13.0.88"
    assert "-gencode=arch=compute_100,code=compute_100" in default.flags
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 8.0;8.6+PTX,9.0a")
    listed = find_toolkit()
    assert isinstance(listed, Toolkit)
    assert (listed.targets, listed.ptx) == (("80", "86", "90a"), ("86",))
    assert listed.note == "not 7.5: the kernels need 8.0"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0;7.5+PTX")
    assert find_toolkit() == "TORCH_CUDA_ARCH_LIST=7.0;7.5+PTX names none from 8.0, which the kernels need"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Ampere")
    assert find_toolkit() == "TORCH_CUDA_ARCH_LIST must list capabilities as in '8.0;9.0+PTX', got 'Ampere'"


@pytest.mark.usefixtures("nowhere", "cuda_13")
def test_a_build_makes_code_for_the_devices_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = compiler(tmp_path / "cuda")
    nothing = "no CUDA device is here (USE_CUDA=1 or TORCH_CUDA_ARCH_LIST builds them all the same)"
    assert asked_toolkit() == nothing
    assert str(find_toolkit()).startswith("sm_80, sm_90, sm_100"), "other commands compile for any device"
    monkeypatch.setenv("USE_CUDA", "1")
    assert str(asked_toolkit()).startswith("sm_80, sm_90, sm_100, PTX 100 by")
    monkeypatch.delenv("USE_CUDA")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert str(asked_toolkit()).startswith("sm_90 by")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")

    for devices, made in (
        ([90], "sm_90 by nvcc 13.0.88"),
        ([75, 80, 90], "sm_80, sm_90 by nvcc 13.0.88 (not sm_75: the kernels need 8.0)"),
        # For a device that this compiler does not know, it makes its newest PTX that the device runs.
        ([103], "sm_100, PTX 100 by nvcc 13.0.88"),
        ([80, 120], "sm_80, PTX 100 by nvcc 13.0.88"),
        ([86], "sm_80, PTX 80 by nvcc 13.0.88"),
        ([75], "the kernels need compute capability 8.0 or newer, the devices here are sm_75"),
    ):
        monkeypatch.setattr(_env, "device_capabilities", lambda devices=devices: devices)
        assert str(asked_toolkit()) == made
    monkeypatch.setattr(_env, "device_capabilities", lambda: [80])
    compiler_knows_nothing_new = nvcc.read_text().replace("sm_80 sm_90 sm_100", "sm_75")
    nvcc.write_text(compiler_knows_nothing_new)
    assert asked_toolkit() == f"{nvcc} compiles for none of sm_80"


@pytest.mark.usefixtures("nowhere", "cuda_13")
def test_an_older_compiler_makes_what_it_knows(tmp_path: Path) -> None:
    compiler(tmp_path / "cuda", knows="sm_75 sm_80 sm_90")
    found = find_toolkit()
    assert isinstance(found, Toolkit)
    assert str(found) == "sm_80, sm_90, PTX 90 by nvcc 13.0.88 (not sm_100: this nvcc does not know it)"


@pytest.mark.usefixtures("nowhere", "cuda_13")
def test_a_toolkit_that_does_not_fit_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = compiler(tmp_path / "cuda", version="V12.8.93")
    assert find_toolkit() == f"{nvcc} is of CUDA 12.8.93, PyTorch of 13.0"
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu130")
    assert find_toolkit() == "the CUDA kernels need PyTorch 2.10 or newer, this is 2.9.1+cu130"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert find_toolkit() == "this PyTorch is built without CUDA"
    monkeypatch.setenv("USE_CUDA", "0")
    assert find_toolkit() == "USE_CUDA=0"
    monkeypatch.setenv("USE_CUDA", "yes")
    with pytest.raises(UserError, match="USE_CUDA must be 0 or 1, got 'yes'"):
        find_toolkit()


def test_the_build_says_what_it_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    if libraries.find_library() is None:
        pytest.skip("the extension is not built")
    said: list[str] = []
    monkeypatch.setenv("USE_CUDA", "0")
    build.build(echo=said.append)
    assert len(said) == 1
    library = libraries.find_library(cuda=True)
    before = library and f"CUDA kernels as built before, for {libraries.build_note(library)}"
    assert (before or "no CUDA kernels: USE_CUDA=0") in said[0]
    monkeypatch.setenv("USE_CUDA", "1")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match="USE_CUDA=1 asks for CUDA kernels, which cannot be built: this PyTorch"):
        build.build(echo=said.append)


def test_broken_kernels_leave_the_rest_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / libraries.CUDA_LIBRARY
    broken.write_bytes(b"no library")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "__version__", "2.10.0+cu130")
    monkeypatch.setattr(libraries, "search", lambda cuda=False: (broken, []))
    assert "the CUDA kernels do not load" in str(libraries._load_cuda(None))
    needs = "the CUDA kernels need the rest of the extension: it is not built"
    assert libraries._load_cuda("it is not built") == needs
    monkeypatch.setattr(libraries, "search", lambda cuda=False: (None, []))
    assert "run `rada-fast build` where nvcc and a device are found" in str(libraries._load_cuda(None))
    monkeypatch.setattr(libraries, "search", lambda cuda=False: (None, ["the library is damaged"]))
    assert libraries._load_cuda(None) == "the library is damaged; run `rada-fast build`"


def test_an_older_pytorch_goes_without_the_cuda_kernels_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries.load()  # otherwise the first load would record its outcome in the replaced list
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch, "__version__", "2.8.0+cu128")
    monkeypatch.setattr(libraries, "_cuda_outcome", [libraries._load_cuda(None)])
    needs = "the CUDA kernels need PyTorch 2.10 or newer, this is 2.8.0+cu128"
    assert libraries.describe()["CUDA kernels"] == needs


def test_the_library_is_named_after_its_own_sources(tmp_path: Path) -> None:
    keys = []
    for count, path in enumerate(("ops.cpp", "cpu/one.cpp", "cuda/one.cu", "cuda/one.h")):
        folder = tmp_path / str(count)
        for name in ("ops.cpp", "cpu/one.cpp", "cuda/one.cu", "cuda/one.h"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("changed" if name == path else "same")
        keys.append((libraries._sources_key(folder), libraries._sources_key(folder, cuda=True)))
    changes = [(cpu != keys[0][0], cuda != keys[0][1]) for cpu, cuda in keys]
    assert len({cpu for cpu, _ in keys[2:]}) == 1, "CUDA sources do not change the CPU library"
    assert changes[1] == (True, True)
    assert keys[2][1] != keys[3][1]


def test_the_cuda_library_loads_without_a_device() -> None:
    if libraries.search(cuda=True) == (None, []):
        pytest.skip(f"no CUDA library: {libraries.load_cuda()}")
    assert libraries.load_cuda() is None
    facts = libraries.describe()
    assert facts["CUDA kernels"] == "usable"
    assert facts["CUDA device code"].startswith("sm_")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("rada_fast::device_architecture", "CUDA")


def test_kernels_are_found_by_name_and_do_not_spill(toolkit: Toolkit) -> None:
    folder = libraries.source_dir()
    assert folder is not None
    (found,) = cuda_toolkit.kernel_resources(toolkit, folder / "cuda" / "device_code.cu", 80)
    assert (found.kernel, found.threads, found.spills) == ("device_architecture", 32, 0)
    assert found.registers > 0


@pytest.mark.gpu
def test_a_device_runs_the_code_made_for_it() -> None:
    if libraries.load_cuda() is not None:
        pytest.skip(f"no CUDA kernels: {libraries.load_cuda()}")
    architecture = int(torch.ops.rada_fast.device_architecture(torch.empty(0, device="cuda")))
    major, minor = torch.cuda.get_device_capability()
    assert 800 <= architecture <= 100 * major + 10 * minor
