#!/usr/bin/env bash
# Every memory figure and every program on a CUDA device that computes nothing: bench/null_gpu.py says how.
#     PYTHON=CUVENV/bin/python bench/null_gpu.sh        (a venv with a CUDA build of torch: tools/nullgpu/README.md)
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" bench/null_gpu.py "$@"
