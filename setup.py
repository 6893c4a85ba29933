"""What pyproject.toml cannot say: the C++ sources go into the package, and a wheel may carry the compiled library.

Nothing is compiled here. `make wheel` sets RADA_FAST_CARRY to a library that `rada-fast build` made, and
RADA_FAST_CARRY_FOR to the PyTorch it was made for; see rada_fast/extension.py.
"""

import os
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

CARRIED = os.environ.get("RADA_FAST_CARRY")


class BuildPackage(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib) / "rada_fast"
        shutil.copytree("csrc", package / "csrc", dirs_exist_ok=True)
        if CARRIED:
            place = package / "lib" / os.environ["RADA_FAST_CARRY_FOR"]
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CARRIED, place)


class Wheel(bdist_wheel):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = not CARRIED

    def get_tag(self) -> tuple[str, str, str]:
        # The library is loaded by PyTorch, not by Python: it serves every Python of its platform.
        return ("py3", "none", super().get_tag()[2])


setup(cmdclass={"build_py": BuildPackage, "bdist_wheel": Wheel})
