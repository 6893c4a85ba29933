"""Install a wheel into a fresh environment and start what needs files of the package, away from the checkout.

    python .ci/try_wheel.py dist/rada_fast-0.1.0-py3-none-any.whl

The dependencies are those of the environment that runs this, which the fresh one can see. Nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

DEPENDENCIES = [place for place in sys.path if Path(place).name in ("site-packages", "dist-packages")]
COMMANDS = (
    ("-c", "import rada_fast, sys; assert sys.prefix in rada_fast.__file__, rada_fast.__file__"),
    ("-m", "rada_fast", "doctor", "--json"),
    ("-m", "rada_fast", "demo", "--images", "40", "--epochs", "1"),
    ("-m", "rada_fast", "bench", "adapter", "--batch", "1", "--classes", "10", "--repeats", "1"),
)


def main(wheel: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "env", with_pip=False)
        python = folder / "env" / "bin" / "python"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        packages = folder / "env" / "lib" / version / "site-packages"
        install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
        subprocess.run([sys.executable, *install, packages, Path(wheel).resolve()], check=True)
        # A .pth file comes behind the packages of the environment itself. An editable installation, whose own .pth file
        # is not read from a folder that another one names, stays out of sight.
        (packages / "dependencies.pth").write_text("\n".join(DEPENDENCIES))
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "RADA_FAST"))}
        # The library of this version, if the user has built one, would hide that the wheel runs without any.
        environment = kept | {"RADA_FAST_CACHE": str(folder / "cache")}
        for command in COMMANDS:
            done = subprocess.run(
                [python, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
            )
            print(f"{'ok' if done.returncode == 0 else 'FAILED'}: {' '.join(command)}", flush=True)
            if done.returncode:
                sys.exit(done.stdout + done.stderr)
            if "doctor" in command:
                json.loads(done.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
