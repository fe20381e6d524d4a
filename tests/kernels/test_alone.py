"""The kernels and their benchmark run where torch and Triton are all there is."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ABSENT = ("pydantic", "numpy", "scipy", "pandas", "h5py", "timm", "typer", "rich", "yaml", "sklearn", "PIL", "shapely")
PROGRAM = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
import gpu_cases, kernels_gpu
import kernels as benchmark
from eosin import kernels
print(len(kernels.__all__), callable(kernels_gpu.run), callable(benchmark.main))
"""


def test_kernels_and_their_benchmark_import_with_torch_and_triton_alone():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1:] == ["True", "True"]
