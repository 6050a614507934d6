#!/usr/bin/env bash
# Check, then time, then write: the GPU suite and benchmarks on one CUDA machine.
#
#   benchmarks/gpu.sh FOLDER [--quick]
#
# Writes FOLDER/{machine.txt,tests.log,*.json,*.png}; exits non-zero when a test or a result is wrong. It installs nothing
# and needs torch, triton, transformers, einops, jaxtyping, beartype, hypothesis and pytest on the path; runs in minutes.
set -u -o pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu.sh FOLDER [--quick]}
quick=${2:-}
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

# Benchmarks that have a CUDA form are listed here; each refuses to print a time over a wrong result.
for name in; do
  echo "== $name"
  python3 "benchmarks/$name.py" $quick --json "$out/$name.json" --plot "$out/$name.png" || failed=1
done

exit $failed
