"""What pyproject.toml cannot say: the C++ sources go into the package, and a wheel may carry the compiled libraries.

Nothing is compiled here. `make wheel` sets RADA_FAST_CARRY to what `rada-fast build` made: a JSON table from the folder
in the package, named after the PyTorch or CUDA version served, to the files; see rada_fast/extension/libraries.py.
"""

import json
import os
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

CARRIED = json.loads(os.environ.get("RADA_FAST_CARRY", "{}"))


class BuildPackage(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib) / "rada_fast"
        shutil.copytree("csrc", package / "csrc", dirs_exist_ok=True)
        for name, files in CARRIED.items():
            place = package / "lib" / name
            place.mkdir(parents=True, exist_ok=True)
            for file in files:
                shutil.copy2(file, place)


class Wheel(bdist_wheel):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = not CARRIED

    def get_tag(self) -> tuple[str, str, str]:
        # The library is loaded by PyTorch, not by Python: it serves every Python of its platform.
        return ("py3", "none", super().get_tag()[2])


setup(cmdclass={"build_py": BuildPackage, "bdist_wheel": Wheel})
