#!/usr/bin/env bash
# Check, then write: the GPU suite on one CUDA machine. Benchmarks that have a CUDA form are to be timed here, after it.
#
#   benchmarks/gpu.sh FOLDER
#
# Writes FOLDER/{machine.txt,tests.log}; exits non-zero when a test or a result is wrong. It installs nothing
# and needs torch, triton, transformers, einops, jaxtyping, beartype, hypothesis and pytest on the path; runs in minutes.
set -u -o pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu.sh FOLDER}
mkdir -p "$out"
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TRITON_INTERPRET=0
failed=0

{
  date -u +%Y-%m-%d
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  python3 -c 'import torch, triton, transformers as t; print("torch", torch.__version__, "triton", triton.__version__, "transformers", t.__version__)'
} | tee "$out/machine.txt"

echo "== tests"
python3 -m pytest -q -m gpu tests 2>&1 | tee "$out/tests.log" || failed=1

exit $failed
