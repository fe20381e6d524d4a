#!/usr/bin/env bash
# The tests as other machines run them: instruction sets, numbers of threads, orders, a cluster's commands on PATH.
# Usage: tests/campaign.sh [GROUP OF TESTS ...]; without arguments those that compute most.
# With EOSIN_CAMPAIGN below 1 two settings, one order and two small groups are left, to see that all of it works.
set -uo pipefail
cd "$(dirname "$0")/.."
groups=("$@")
[ ${#groups[@]} -gt 0 ] || groups=(tests/mil tests/kernels tests/heatmaps tests/features/test_he_texture.py tests/wsi/test_pixels.py)
fake=$(mktemp -d)
trap 'rm -rf "$fake"' EXIT
for name in srun sbatch scontrol squeue; do
  printf '#!/bin/sh\necho "%s must not be called" >&2\nexit 1\n' "$name" > "$fake/$name"
  chmod +x "$fake/$name"
done

slurm="SLURM_JOB_ID=7 SLURM_NTASKS=2 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_NNODES=1 SLURM_CPUS_ON_NODE=2 SLURM_JOB_NAME=eosin"
machines=(
  "ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=1"
  "ATEN_CPU_CAPABILITY=avx2 OMP_NUM_THREADS=2"
  "DNNL_MAX_CPU_ISA=SSE41 OMP_NUM_THREADS=1"
  "DNNL_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=2"
  "DNNL_MAX_CPU_ISA=AVX512_CORE OMP_NUM_THREADS=1"
  "OPENBLAS_CORETYPE=Nehalem OMP_NUM_THREADS=1"
  "OPENBLAS_CORETYPE=Haswell OPENBLAS_NUM_THREADS=2 OMP_NUM_THREADS=2"
  "$slurm PATH=$fake:$PATH OMP_NUM_THREADS=1"
)
seeds=${SEEDS:-1 2 3}
if [ "${EOSIN_CAMPAIGN:-1}" != 1 ]; then
  machines=("${machines[0]}" "${machines[-1]}")
  seeds=1
  [ $# -gt 0 ] || groups=(tests/mil/test_metrics.py tests/wsi/test_pixels.py)
fi
failed=0
run() {
  local started=$SECONDS line
  line=$(env $1 .venv/bin/python -m pytest -q -p no:cacheprovider "${@:2}" "${groups[@]}" 2>&1 | tail -1)
  case $line in *failed* | *error*) failed=1 ;; *passed*) ;; *) failed=1 ;; esac
  printf '%-75.75s %4d s  %s\n' "${1//PATH=$fake:$PATH/a fake srun on PATH} ${*:2}" $((SECONDS - started)) "$line"
}
for machine in "${machines[@]}"; do
  workers=${WORKERS:-2}
  case $machine in *OMP_NUM_THREADS=2*) workers=$(((workers + 1) / 2)) ;; esac  # as many threads as cores, not twice as many
  run "$machine" -n "$workers"
done
for seed in $seeds; do
  run OMP_NUM_THREADS=1 -n "${WORKERS:-2}" --random-order --random-order-seed="$seed"
done
exit $failed
