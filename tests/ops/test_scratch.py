"""A build with the address sanitizer reports every access past the end of an array of a thread's scratch memory."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from rada_fast.extension import libraries

PROGRAM = """
#include <cstdlib>
#include "cpu/scratch.h"

int main(int, char** arguments) {
  // The second array takes more than there is, so that the memory grows. The third time it has grown.
  for (int time = 0; time < 3; ++time) {
    rada_fast::Scratch& scratch = rada_fast::Scratch::rewound();
    float* array = scratch.take<float>(9);
    float* other = scratch.take<float>(1 << 20);
    for (int i = 0; i < 9; ++i) array[i] = 0;
    for (int i = 0; i < 1 << 20; ++i) other[i] = 0;
    if (time == std::atoi(arguments[1])) array[9] = 0;
  }
}
"""


def test_the_address_sanitizer_sees_where_an_array_ends(tmp_path: Path) -> None:
    folder, program = libraries.source_dir(), tmp_path / "program"
    compiler = libraries.build_parameters().compiler
    command = [compiler, "-std=c++20", "-fsanitize=address", f"-I{folder}", "-xc++", "-", "-o", str(program)]
    for source in ("int main() {}", PROGRAM):
        built = subprocess.run(command, input=source, text=True, capture_output=True, check=False)
        if source != PROGRAM and built.returncode:
            pytest.skip(f"{compiler} has no address sanitizer here")
        assert built.returncode == 0, built.stderr
    for time, reported in ((-1, False), (0, True), (2, True)):
        done = subprocess.run(
            [program, str(time)], text=True, capture_output=True, check=False, env={"ASAN_OPTIONS": "detect_leaks=0"}
        )
        assert bool(done.returncode) == reported, done.stderr
        assert ("use-after-poison" in done.stderr) == reported
