"""The runner for a borrowed GPU survives crashes, hangs and broken devices, which these tests simulate without one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.device import __main__ as program
from benchmarks.device import plan, runner
from benchmarks.device.plan import PLAN, Step
from benchmarks.device.report import summary
from benchmarks.device.runner import Result, Runner

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = {
    "test_a.py": """
import os, signal, sys, time, types

def test_before(): pass
def test_crash(): os.kill(os.getpid(), signal.SIGSEGV)
def test_after_a_crash(): pass
def test_hang(): time.sleep(60)
def test_failure(): assert 1 == 2, "one is not two"

class Broken:
    def is_initialized(self): return True
    def synchronize(self): raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_breaks_the_device():
    sys.modules["torch"] = types.SimpleNamespace(cuda=Broken())
    raise RuntimeError("CUDA error: an illegal memory access was encountered\\nmore of it")
def test_with_a_device_of_its_own(): assert "torch" not in sys.modules
""",
    "test_b.py": "import missing_module_of_this_test\n",
    "test_c.py": """
import pytest

def test_skipped(): pytest.skip("needs a CUDA device")
def test_last(): pass
""",
}


def step_of(*files: str, test_limit: float = 60, limit: float = 60, name: str = "tests.sample") -> Step:
    ini = str(ROOT / "benchmarks/device/pytest.ini")
    arguments = tuple(ini if part == "benchmarks/device/pytest.ini" else part for part in plan.PYTEST)
    return Step(name, "a sample", (*arguments, *files), limit, test_limit)


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder with the sample tests to run in."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # The samples need no plugins, and loading them takes time in every process.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setattr(runner, "MIN_SECONDS", 0.0)
    for name, text in SAMPLES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_no_test_fails_because_of_another(folder: Path, lines: list[str]) -> None:
    sample_runner = Runner(folder, folder / "out", 60, lines.append)
    (result,) = sample_runner.run([step_of("test_a.py", "test_b.py", "test_c.py", test_limit=2)])
    found = {runner.short(record["test"]).split("::")[-1]: record for record in sample_runner.read("tests.jsonl")}
    assert {name: record["outcome"] for name, record in found.items()} == {
        "test_before": "passed",
        "test_crash": "crashed",
        "test_after_a_crash": "passed",
        "test_hang": "hung",
        "test_failure": "failed",
        "test_breaks_the_device": "failed",
        "test_with_a_device_of_its_own": "passed",
        "test_b.py": "error",
        "test_skipped": "skipped",
        "test_last": "passed",
    }
    assert result.state == "failed"
    assert result.counts == {"passed": 4, "failed": 2, "error": 1, "crashed": 1, "hung": 1, "skipped": 1}
    assert found["test_crash"]["error"] == "killed by SIGSEGV"
    assert "one is not two" in found["test_failure"]["error"]
    assert found["test_breaks_the_device"]["error"].endswith("an illegal memory access was encountered")
    assert "missing_module_of_this_test" in found["test_b.py"]["error"]
    details = (folder / "out" / "failures.txt").read_text()
    assert "assert 1 == 2" in details
    assert "more of it" in details
    text = summary([result], sample_runner.read("tests.jsonl"), [])
    assert "test_a.py::test_crash" in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_several_processes_share_the_tests(folder: Path, lines: list[str]) -> None:
    (folder / "test_e.py").write_text(
        "import os, signal, pytest\n"
        "@pytest.mark.parametrize('number', range(7))\n"
        "def test_process(number):\n"
        "    with open('processes', 'a') as file: file.write(f'{number} {os.getpid()}\\n')\n"
        "    if number == 4: os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    sample_runner = Runner(folder, folder / "out", 60, lines.append, jobs=3)
    (result,) = sample_runner.run([step_of("test_e.py")])
    assert result.counts == {"passed": 6, "crashed": 1}
    ran = [tuple(map(int, line.split())) for line in (folder / "processes").read_text().splitlines()]
    assert sorted(number for number, _ in ran) == list(range(7))
    processes = dict(ran)
    assert processes[0] == processes[3] == processes[6]
    assert len(set(processes.values())) == 3
    assert processes[1] == processes[4]


def test_a_run_that_ran_out_of_time_goes_on(folder: Path, lines: list[str]) -> None:
    (folder / "test_d.py").write_text(
        "import time\nfrom pathlib import Path\n"
        "def test_quick(): Path('count').open('a').write('x')\n"
        "def test_slow(): Path('quick').exists() or time.sleep(60)\n"
    )
    step = step_of("test_d.py")
    after = Step("see.after", "a command", ("this",), 10)
    first = Runner(folder, folder / "out", 4, lines.append).run([step, after])
    assert [result.state for result in first] == ["unfinished", "unfinished"]
    (folder / "quick").touch()
    (second,) = Runner(folder, folder / "out", 60, lines.append).run([step])
    assert second.state == "passed"
    assert second.counts == {"passed": 2}
    assert (folder / "count").read_text() == "x"
    (third,) = Runner(folder, folder / "out", 60, lines.append).run([step])
    assert third == second


def test_commands_that_fail_or_hang_are_reported(folder: Path, lines: list[str]) -> None:
    (folder / "good.py").write_text("print('noise')\nprint('device: fine')\n")
    (folder / "bad.py").write_text("raise SystemExit('no compiler')\n")
    (folder / "slow.py").write_text("import time\ntime.sleep(60)\n")
    steps = [
        Step("see.good", "", ("good",), 20, shown="^device: .*"),
        Step("see.bad", "", ("bad",), 20),
        Step("see.slow", "", ("slow",), 1),
    ]
    good, bad, slow = Runner(folder, folder / "out", 60, lines.append).run(steps)
    assert (good.state, good.message) == ("passed", "device: fine")
    assert (bad.state, bad.message) == ("failed", "ended with status 1: no compiler")
    assert (slow.state, slow.message) == ("failed", "hung: killed after 1 s")

    (folder / "bad.py").write_text("print('mended')\n")
    sample_runner = Runner(folder, folder / "out", 60, lines.append)
    assert sample_runner.run([steps[1]]) == [bad]
    sample_runner.forget([steps[1]])
    assert sample_runner.run([steps[0], steps[1]])[1].state == "passed"
    assert {record["step"] for record in sample_runner.read("steps.jsonl")} == {"see.good", "see.bad", "see.slow"}


def test_benchmarks_say_that_there_is_no_device(folder: Path, lines: list[str]) -> None:
    sample_runner = Runner(folder, folder / "out", 60, lines.append)
    (folder / "out" / "facts.json").write_text('{"devices": []}')
    (result,) = sample_runner.run([next(step for step in PLAN if step.stage == "bench")])
    assert (result.state, result.message) == ("no device", "this measures a CUDA device, and none is visible")
    # No process of the step was started.
    assert not list((folder / "out" / "logs").iterdir())


def test_device_code_is_built_for_the_devices_of_the_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    sample_runner = Runner(folder, folder / "out", 60)
    assert "TORCH_CUDA_ARCH_LIST" not in sample_runner.environment()
    facts = {"devices": [{"capability": "9.0"}, {"capability": "8.0"}, {"capability": "9.0"}]}
    (folder / "out" / "facts.json").write_text(json.dumps(facts))
    assert sample_runner.environment()["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0"


def test_a_benchmark_knows_the_options_that_its_step_gives(tmp_path: Path, lines: list[str]) -> None:
    step = next(step for step in PLAN if step.name == "bench.floor")
    arguments = ["cpu" if part == "cuda" else part for part in step.arguments]
    # Only a device has these limits, so nothing is measured.
    (result,) = Runner(ROOT, tmp_path, 60, lines.append).run([replace(step, arguments=tuple(arguments))])
    assert (result.state, result.message) == ("skipped", "no device: this measures a CUDA device")


def test_the_plan_names_files_that_exist() -> None:
    for step in PLAN:
        assert step.stage in plan.STAGES
        for part in step.arguments:
            if part.startswith(("tests/", "benchmarks/")):
                assert (ROOT / part).exists(), part
    stages = [step.stage for step in PLAN]
    assert stages.index("build") < stages.index("tests") < stages.index("bench")
    # The last step of the tests runs those that no other step has.
    assert any(step.arguments[-1] == "tests" for step in PLAN)


def test_stages_and_steps_are_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert [step.name for step in plan.chosen(["tests.graphs", "see"])] == ["see.device", "see.doctor", "tests.graphs"]
    with pytest.raises(SystemExit):
        program.main(["test"])
    assert "no stage or step 'test'; there are see, build, tests, bench, see.device" in capsys.readouterr().err
    assert program.main(["--plan"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(PLAN)


def test_results_of_other_sources_are_set_aside(tmp_path: Path) -> None:
    old, new = {"sources": "1", "torch": "2"}, {"sources": "3", "torch": "2"}
    assert program.set_aside(tmp_path, old, afresh=False) is None
    (tmp_path / "tests.jsonl").write_text("{}\n")
    assert program.set_aside(tmp_path, old, afresh=False) is None
    assert (tmp_path / "tests.jsonl").is_file()
    message = program.set_aside(tmp_path, new, afresh=False)
    assert message is not None
    assert message.endswith("changed since: sources")
    assert not (tmp_path / "tests.jsonl").exists()
    assert (tmp_path / "earlier-1" / "tests.jsonl").is_file()


def test_results_without_a_device_are_not_kept_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "output_of", lambda *command: None)
    before = program.identity()
    assert before["devices"] == "none"
    monkeypatch.setattr(program, "output_of", lambda *command: "NVIDIA H100 80GB HBM3, 580.1")
    after = program.identity()
    assert after["devices"] != before["devices"]
    assert {name for name in after if after[name] != before[name]} == {"devices"}


def test_a_copy_is_made_after_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [Step("see.good", "", ("this",), 20)]
    monkeypatch.setattr(program, "chosen", lambda names: steps)
    monkeypatch.setattr(runner, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(program, "identity", lambda: {"sources": "1"})
    arguments = ["--output", str(tmp_path / "out"), "--copy-to", str(tmp_path / "copy"), "--budget", "30"]
    assert program.main(arguments) == 0
    assert (tmp_path / "copy" / "summary.txt").read_text() == (tmp_path / "out" / "summary.txt").read_text()
    assert "see.good" in (tmp_path / "copy" / "steps.jsonl").read_text()


def test_the_summary_is_at_most_120_columns_wide() -> None:
    adapter = {
        "benchmark": "b", "case": "official B=6 K=1000 bfloat16 forward+backward cuda", "provider": "triton",
        "median_ms": 1.5, "best_ms": 1.25, "spread_ms": 0.0625, "ratio": None, "share": 0.25, "gb_per_s": 900.0,
        "host_ms": 0.9, "wall_ms": 1.75, "extra_mib": 100.0,
    }  # fmt: skip
    small = adapter | {
        "benchmark": "s", "case": "select views E=64", "provider": "ours", "median_ms": 0.00525, "ratio": 2.0,
    }  # fmt: skip
    limit = {"benchmark": "test_bench_floor_bandwidth", "case": "copy", "value": 2990.123, "unit": "GB/s"}
    launch = {"case": "6 x 1000", "launch": "float32 class_attention_backward_queries", "us": 123.456}
    text = summary([Result("bench.adapter", message="x" * 300)], [], [adapter, small, limit, launch])
    assert "float32 class_attention_backward_queries     123.5" in text.splitlines()
    assert "measured limits: copy 2990 GB/s" in text
    first, row, second, other = text.splitlines()[-4:]
    assert (first, second) == (adapter["case"], small["case"])
    assert row.split() == ["triton", "1.500", "1.250", "0.06250", "0.25", "900.0", "100", "0.9000", "1.750"]
    assert other.split()[:2] == ["ours", "0.00525"]
    assert all(len(line) <= 120 for line in text.splitlines())
