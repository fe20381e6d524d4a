#!/usr/bin/env bash
# Fetch what eosin needs and a machine for PyTorch seldom has, as wheels that travel to it: about 30 MB in .whl.
#
#   benchmarks/gpu_wheels.sh [FOLDER]        with PYTHON_VERSION, by default 3.12, for 64-bit x86 Linux
#
# gpu_first_contact.sh installs what it finds in .whl beside the project before its stages, without a network.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.whl}
platforms=()
for glibc in 39 35 34 31 28 27 24 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
python=${PYTHON:-python3}
"$python" -m pip download --quiet --no-deps --only-binary=:all: --dest "$folder" \
  --python-version "${PYTHON_VERSION:-3.12}" --implementation cp "${platforms[@]}" \
  --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
  annotated-types imagecodecs openslide-bin openslide-python pydicom shapely typing-inspection pydantic
# pydantic takes exactly one version of its core
core=$(unzip -p "$folder"/pydantic-2*.whl '*/METADATA' | sed -n 's/^Requires-Dist: pydantic-core==\([0-9.]*\).*/\1/p')
"$python" -m pip download --quiet --no-deps --only-binary=:all: --dest "$folder" \
  --python-version "${PYTHON_VERSION:-3.12}" --implementation cp "${platforms[@]}" "pydantic-core==$core"
du -sh "$folder"
