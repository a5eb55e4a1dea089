#!/usr/bin/env bash
# The extension for a GPU machine with CPython 3.12, torch 2.11.0+cu130 and an sm_90 GPU, made on a machine without a GPU:
#
#   tools/gpu/prebuild.sh [folder of the virtual environment, default build/py312]
#
# It leaves vaefast/_C.cpython-312-x86_64-linux-gnu.so and vaefast/_build_info.py, which git ignores: with them the
# checkout needs no compiler on the GPU machine (make gpu). nvcc 13 and g++ have to be there, and a Python 3.12 with its
# headers (PYTHON=...). 20 CPU-minutes; the environment takes 5 GB.
set -euo pipefail
cd "$(dirname "$0")/../.."
env=${1:-build/py312}
torch=2.11.0+cu130
so=vaefast/_C.cpython-312-x86_64-linux-gnu.so

find_python() {
  local python
  for python in "${PYTHON:-}" python3.12 "$HOME"/.pyenv/versions/3.12*/bin/python; do
    [ -n "$python" ] && "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && echo "$python" && return
  done
  echo "there is no Python 3.12: PYTHON=/path/to/python3.12 $0" >&2
  return 1
}

if ! "$env/bin/python" -c "import ninja, numpy, setuptools, torch; assert torch.__version__ == '$torch'" 2>/dev/null; then
  python=$(find_python)
  "$python" -m venv --clear "$env"
  # PyPI's build of this version is the one for CUDA 13.0
  "$env/bin/pip" install --quiet torch==2.11.0 'setuptools>=77,<82' ninja numpy
fi

rm -f "$so" vaefast/_build_info.py
# lines for the sanitizer's messages; what is small or has lines nvcc does not compress unasked, at four times the size
flags="-lineinfo --compress-mode=size -Xfatbin=-compress-all"
VAEFAST_FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 MAX_JOBS=${MAX_JOBS:-$(nproc)} \
  NVCC_APPEND_FLAGS="${NVCC_APPEND_FLAGS:-} $flags" nice "$env/bin/python" setup.py build_ext --inplace

"$env/bin/python" - <<PYTHON
import torch, vaefast
from vaefast import _build
print(vaefast.show_config())
assert torch.__version__ == "$torch", f"torch {torch.__version__} is not $torch"
assert "cuda" in vaefast.available_backends(), "the extension has no CUDA kernels"
assert _build.info().cuda_archs == ("9.0",), f"built for {_build.info().cuda_archs}"
PYTHON
size=$(stat -c %s "$so")
[ "$size" -lt 20000000 ] || { echo "$so: $size bytes are more than a checkout should carry (20 MB)" >&2; exit 1; }
ls -l "$so" vaefast/_build_info.py
