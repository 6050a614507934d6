#!/usr/bin/env bash
# Check, then time, on one CUDA machine: what the CPUs of CI cannot show.
#
#   benchmarks/gpu.sh FOLDER [--part tests|kernels|fused|overlap|layers|all] [--quick]
#
#   tests    the GPU suite                                                FOLDER/tests.log
#   kernels  benchmarks/kernels.py: Triton kernels, checked, then timed    FOLDER/kernels.json, kernels.log
#   fused    benchmarks/fused_cuda.py: the sum over ranks with residual and norm, across processes: checked, also under
#            compute-sanitizer where that is installed, then timed        FOLDER/fused.json, fused.log
#   overlap  benchmarks/overlap_cuda.py, one measurement after another    FOLDER/overlap_*.json, overlap.log
#   layers   benchmarks/layers.py on this machine's processors            FOLDER/layers.json, layers.log
#
# Each part ends within ten minutes; one that fails does not keep the others from running. FOLDER/status.txt has the
# exit status of every command, and the script's own is 1 where one was not 0. It installs nothing and needs torch,
# triton, transformers, einops, safetensors, jaxtyping, hypothesis and pytest; beartype and matplotlib are not needed.
set -u -o pipefail
cd "$(dirname "$0")/.."
usage='usage: benchmarks/gpu.sh FOLDER [--part tests|kernels|fused|overlap|layers|all] [--quick]'
out=${1:?$usage}
shift
part=all quick=
while (($#)); do
  case $1 in
    --part) part=${2:?$usage}; shift 2 ;;
    --quick) quick=--quick; shift ;;
    *) echo "$usage" >&2; exit 2 ;;
  esac
done
case $part in tests | kernels | fused | overlap | layers | all) ;; *) echo "$usage" >&2; exit 2 ;; esac
mkdir -p "$out"

python=${PYTHON:-python3}
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TRITON_INTERPRET=0
export CUBLAS_WORKSPACE_CONFIG=:4096:8                              # the suite asks for deterministic algorithms
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo} # one process, no network
failed=0

# run SECONDS NAME COMMAND...: what it prints goes here and to NAME.log; its exit status to status.txt (124: too long).
run() {
  local seconds=$1 name=$2 status=0 start=$SECONDS
  shift 2
  echo "== $name"
  timeout --kill-after=10 "$seconds" "$@" 2>&1 | tee -a "$out/${name%%_*}.log" || status=$?
  echo "$name: $status after $((SECONDS - start)) s" | tee -a "$out/status.txt"
  ((status == 0)) || failed=1
}
wants() { [[ $part == "$1" || $part == all ]]; }

{
  date -u +%Y-%m-%d
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm --format=csv,noheader
  "$python" -c 'import torch, triton, transformers as t; print("torch", torch.__version__, "triton", triton.__version__, "transformers", t.__version__)'
} 2>&1 | tee "$out/machine.txt"

if wants tests; then
  # Without the shape checker, which needs beartype; another PyTorch's warnings are no failures of ours.
  run 540 tests "$python" -m pytest -q -m gpu tests -o addopts="--import-mode=importlib --strict-markers" \
    -o filterwarnings=default --continue-on-collection-errors -rs --durations=10
fi
if wants kernels; then
  run 300 kernels "$python" benchmarks/kernels.py $quick --json "$out/kernels.json"
fi
if wants fused; then
  run 280 fused "$python" benchmarks/fused_cuda.py $quick --json "$out/fused.json"
  if command -v compute-sanitizer > /dev/null; then
    run 300 fused_sanitizer compute-sanitizer --target-processes all --error-exitcode 9 \
      "$python" benchmarks/fused_cuda.py --quick --check-only
  else
    echo "fused_sanitizer: not run, compute-sanitizer is not installed" | tee -a "$out/status.txt"
  fi
fi
if wants overlap; then
  for one in ghost:60 schedules:180 contention:120 tax:100 late:60; do
    name=${one%:*}
    run "${one#*:}" "overlap_$name" "$python" benchmarks/overlap_cuda.py $quick --only "$name" --json "$out/overlap_$name.json"
  done
fi
if wants layers; then
  run 540 layers "$python" benchmarks/layers.py --quick --json "$out/layers.json"
fi

exit $failed
