#!/usr/bin/env bash
# Run tests and benchmarks on a GPU machine without a network, in a copy of this checkout with .whl/ in it (prepare.sh):
#
#   bash benchmarks/device/run.sh [STAGE or STEP...] [--budget SECONDS] [--output FOLDER]
#
# Without names everything runs in the order that `--plan` prints. Started again, it goes on where the time was over. Files
# go to results/device, and a copy to $OUT if it is set. README.md explains more. PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
work=${RADA_FAST_DEVICE_WORK:-${TMPDIR:-/tmp}/rada_fast_device}
mkdir -p "$work"
if compgen -G '.whl/*.whl' > /dev/null; then
  # Install these wheels once, in a folder of their own, so that the machine's packages stay as they are.
  stamp=$work/site-$(ls -l .whl/*.whl | sha256sum | cut -c 1-16)
  if [ ! -e "$stamp" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
      --root-user-action=ignore --upgrade --target "$work/site" .whl/*.whl
    touch "$stamp"
  fi
fi
export PYTHONPATH=$PWD:$work/site PATH=$work/site/bin:$PATH PYTHONUNBUFFERED=1
# What is compiled once serves every process that follows.
export RADA_FAST_CACHE=${RADA_FAST_CACHE:-$work/cache} TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$work/triton}
exec "$python" -m benchmarks.device ${OUT:+--copy-to "$OUT"} "$@"
