#!/usr/bin/env bash
# What to run first on a machine with a GPU: five stages, each with a time limit and a result file of its own.
#
#   benchmarks/gpu_first_contact.sh [--rehearse] [--out FOLDER] [STAGE ...]
#
# a correctness  tests of all Triton kernels on the device           correctness.xml, correctness.log   60 s
# b kernels      table of docs/gpu.md beside eager, compile, SDPA    kernels.csv                        120 s
# c training     slides per second of six methods                    training.csv                       120 s
# d extraction   tiles per second of two networks                    extraction.csv                     90 s
# e parallel     two processes on one GPU                            parallel.csv                       30 s
#
# Stages a and b need torch, Triton, pytest and hypothesis. The others need the packages of eosin: `gpu_wheels.sh` fetches
# those that a machine for PyTorch seldom has into .whl, and this script installs what is there, without a network.
# A stage that fails or runs out of time does not stop the others; its rows so far are in its file, and summary.txt says
# how each ended. With --rehearse everything runs small on the CPU, where Triton's kernels are interpreted.
set -uo pipefail
cd "$(dirname "$0")/.."
out=gpu_first_contact rehearse=() stages=()
while [ $# -gt 0 ]; do
  case $1 in
    --rehearse) rehearse=(--rehearse) ;;
    --out) out=$2; shift ;;
    a | b | c | d | e) stages+=("$1") ;;
    *) echo "unknown: $1; give --rehearse, --out FOLDER or stages a to e" >&2; exit 2 ;;
  esac
  shift
done
[ ${#stages[@]} -gt 0 ] || stages=(a b c d e)
mkdir -p "$out" || exit 2
python=${PYTHON:-python3}
if compgen -G ".whl/*.whl" >/dev/null; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  if "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" .whl/*.whl; then
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
  else
    echo "wheels not installed, stages c to e may fail" | tee -a "$out/summary.txt"
  fi
fi
export PYTHONPATH=$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
declare -A seconds=([a]=60 [b]=120 [c]=120 [d]=90 [e]=30)
failed=0

run() { # stage, command ...
  local stage=$1 began=$SECONDS limit=${seconds[$1]}
  shift
  [ ${#rehearse[@]} -eq 0 ] || limit=$((limit * 5)) # a CPU is slow
  timeout --kill-after=5 "$limit" "$@" > >(tee "$out/$stage.log") 2>&1
  local code=$?
  case $code in
    0) how=done ;;
    124 | 137) how="out of time" ;;
    *) how="failed with $code" ;;
  esac
  [ $code -eq 0 ] || failed=1
  echo "$stage $how, $((SECONDS - began)) of $limit s" | tee -a "$out/summary.txt"
}

for stage in "${stages[@]}"; do
  case $stage in
    a)
      if [ ${#rehearse[@]} -gt 0 ]; then
        tests=(tests/kernels/test_triton.py -k "attention_pool and not half or causal_conv")
      else
        tests=(tests/kernels/test_triton.py tests/kernels/test_triton_mixes.py -m "gpu or not gpu")
      fi
      run a "$python" -m pytest -q -p no:cacheprovider -o addopts= --confcutdir tests/kernels "${tests[@]}" --junitxml "$out/correctness.xml"
      ;;
    b) run b "$python" benchmarks/gpu_contact.py kernels "${rehearse[@]}" --out "$out/kernels.csv" --seconds 100 ;;
    c) run c "$python" benchmarks/gpu_contact.py training "${rehearse[@]}" --out "$out/training.csv" --seconds 100 ;;
    d) run d "$python" benchmarks/gpu_contact.py extraction "${rehearse[@]}" --out "$out/extraction.csv" --seconds 75 ;;
    e)
      run e "$python" -m torch.distributed.run --standalone --nproc-per-node 2 \
        benchmarks/gpu_contact.py parallel "${rehearse[@]}" --out "$out/parallel.csv"
      ;;
  esac
done
exit $failed
