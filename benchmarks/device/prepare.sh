#!/usr/bin/env bash
# Fetch the packages that a GPU machine without a network lacks into .whl/. Run this where there is a network.
#
#   bash benchmarks/device/prepare.sh [PYTHON_VERSION]      (the GPU machine's; 3.12 by default)
#
# The machine's own Python must have torch, torchvision, triton, timm, pytest, pytest-benchmark, hypothesis, safetensors and
# matplotlib. Git ignores .whl/, so a tool that copies only what Git knows must be told of it.
set -euo pipefail
cd "$(dirname "$0")/../.."
version=${1:-3.12}
mkdir -p .whl
python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --dest .whl \
  'open_clip_torch>=3.3,<4' ftfy wcwidth regex 'tyro>=1.0,<2' docstring-parser typeguard 'rich>=13' \
  markdown-it-py mdurl ninja 'pytest-timeout>=2.3'
ls -sh .whl
