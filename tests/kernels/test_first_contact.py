"""The first contact with a GPU, rehearsed where the packages are missing that such a machine lacks."""

import csv
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_first_contact.sh"
# without the wheels of gpu_wheels.sh
ABSENT = ("openslide", "openslide_bin", "pydantic", "pydantic_core", "pydicom", "shapely", "imagecodecs")
BLOCKER = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


def rehearse(out, *stages, absent=False):
    """Run stages of the script and return its exit code and the lines of its summary."""
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": ""}
    if absent:
        (out / "site").mkdir()
        (out / "site" / "sitecustomize.py").write_text(BLOCKER)
        environment["PYTHONPATH"] = str(out / "site")
    command = ["bash", str(SCRIPT), "--rehearse", "--out", str(out / "found"), *stages]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=out, timeout=500)
    summary = out / "found" / "summary.txt"
    return done, summary.read_text().splitlines() if summary.exists() else []


@pytest.mark.parametrize("wrong", ["f", "--rehearsal"])
def test_unknown_stages_are_named(wrong, tmp_path):
    done, summary = rehearse(tmp_path, wrong)
    assert (done.returncode, summary) == (2, [])
    assert f"unknown: {wrong}; give --rehearse, --out FOLDER or stages a to e" in done.stderr


@pytest.mark.long
def test_kernels_are_tested_and_measured_without_the_packages_of_eosin(tmp_path):
    done, summary = rehearse(tmp_path, "a", "b", absent=True)
    assert [line.split(",")[0] for line in summary] == ["a done", "b done"], done.stdout + done.stderr
    suite = ET.parse(tmp_path / "found" / "correctness.xml").getroot().find("testsuite")
    assert int(suite.get("tests")) - int(suite.get("skipped")) > 10
    assert (suite.get("failures"), suite.get("errors")) == ("0", "0")
    with (tmp_path / "found" / "kernels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["case"] for row in rows}) > 20
    assert {"eosin", "eager bf16", "torch.compile bf16"} <= {row["variant"] for row in rows}
    assert not [row for row in rows if row["variant"].startswith("eosin") and row["note"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "file", "n_rows"), [("c", "training.csv", 14), ("d", "extraction.csv", 2), ("e", "parallel.csv", 1)]
)
def test_a_stage_is_rehearsed_alone(stage, file, n_rows, tmp_path):
    done, summary = rehearse(tmp_path, stage)
    assert [line.split(",")[0] for line in summary] == [f"{stage} done"], done.stdout + done.stderr
    with (tmp_path / "found" / file).open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert len(rows) == n_rows
    assert not [row["note"] for row in rows if row["note"]]
