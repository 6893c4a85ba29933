"""Do what pyproject.toml cannot express: put the C++ sources, and compiled libraries if asked to, into the package.

Nothing is compiled here. `make wheel` compiles with `rada-fast build` and sets RADA_FAST_CARRY to a JSON table of the
libraries. Its keys are the folders in the package, which are named after the PyTorch or CUDA version that they serve,
and its values the lists of files; see rada_fast/extension/libraries.py.
"""

import json
import os
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

LIBRARIES = json.loads(os.environ.get("RADA_FAST_CARRY", "{}"))


class BuildPackage(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib) / "rada_fast"
        shutil.copytree("csrc", package / "csrc", dirs_exist_ok=True)
        for name, files in LIBRARIES.items():
            folder = package / "lib" / name
            folder.mkdir(parents=True, exist_ok=True)
            for file in files:
                shutil.copy2(file, folder)


class Wheel(bdist_wheel):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = not LIBRARIES

    def get_tag(self) -> tuple[str, str, str]:
        # PyTorch loads the library, not Python, so that it serves every Python version of its platform.
        return ("py3", "none", super().get_tag()[2])


setup(cmdclass={"build_py": BuildPackage, "bdist_wheel": Wheel})
