"""The table of compiled kernels: every kernel that ships is in it, and none spills."""

import ast
import csv
import importlib.util
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "benchmarks" / "results" / "compile_sm90.csv"
SHARED_BYTES_OF_AN_SM = 227 * 1024


def rows():
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def launched_kernels():
    """Return the kernels that some launcher calls with a grid."""
    names = set()
    for path in (ROOT / "eosin" / "kernels").rglob("triton_impl.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                names.add(node.func.value.id)
    return names


def test_every_launched_kernel_was_compiled():
    assert len(launched_kernels()) >= 14
    assert launched_kernels() == {row["kernel"] for row in rows()}


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row['triton']} {row['kernel']} {row['configuration']}")
def test_no_configuration_spills_or_needs_more_shared_memory_than_there_is(row):
    assert int(row["spilled_bytes"]) == 0
    assert int(row["registers"]) <= 255
    assert int(row["shared_bytes"]) <= SHARED_BYTES_OF_AN_SM


@pytest.mark.slow
def test_the_table_can_be_made_again(tmp_path):
    import subprocess
    import sys

    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    command = [sys.executable, "benchmarks/compile_sm90.py", "--only", "gate_scores", "--out", str(tmp_path / "t.csv")]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    with (tmp_path / "t.csv").open(newline="") as file:
        made = list(csv.DictReader(file))
    assert made
    assert all(row["spilled_bytes"] == "0" for row in made)
