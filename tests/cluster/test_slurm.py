"""The whole way on a real SLURM of one node: workers are cancelled, the driver is killed, and everything ends right.

Needs Debian's slurm-wlm and munge, root, and the script that starts the three daemons beside the checkout.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from cluster_runs import RECIPE, arrays_of, eosin, start
from safetensors.torch import load_file

from eosin._records import read_run_json
from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.features._store import write_bag

SCRIPT = Path(__file__).parents[3] / "shared/slurm/slurm.sh"
SITE = """
provider: slurm
partition: main
walltime: "00:20:00"
jobs: 2
cores: 1
memory_gb: 1
address: 127.0.0.1
"""

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(shutil.which("slurmctld") is None, reason="slurmctld is not installed"),
    pytest.mark.skipif(not SCRIPT.is_file(), reason="no script beside the checkout that starts SLURM"),
    pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="SLURM's daemons need root"),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run(["bash", SCRIPT, "start", folder], check=True, capture_output=True)
    yield {"SLURM_CONF": str(folder / "slurm.conf")}
    subprocess.run(["bash", SCRIPT, "stop", folder], check=True, capture_output=True)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "site.yaml").write_text(SITE)
    return tmp_path / "site.yaml"


def jobs_of(slurm: dict[str, str]) -> list[str]:
    out = subprocess.run(
        ["squeue", "-h", "-o", "%i"], env=os.environ | slurm, capture_output=True, text=True, check=True
    )
    return out.stdout.split()


def test_pixels_to_folds_are_bit_equal_to_a_run_here(
    tmp_path: Path, cohort: Path, slurm: dict[str, str], site: Path
) -> None:
    settings = [word for option in RECIPE for word in ("--set", option)]
    common = (
        "--slides",
        cohort / "slides",
        "--labels",
        cohort / "labels.csv",
        "--folds",
        2,
        "--set",
        "tiling.patch_size=128",
    )
    eosin("run", *common, *settings, "--job", tmp_path / "near")
    eosin("run", *common, *settings, "--job", tmp_path / "far", "--cluster", site, **slurm)
    assert arrays_of(tmp_path / "far") == arrays_of(tmp_path / "near") != {}
    for name in ("crossval/predictions.csv", "crossval/fold_0/model.safetensors", "crossval/fold_1/model.safetensors"):
        assert (tmp_path / "far" / name).read_bytes() == (tmp_path / "near" / name).read_bytes()
    assert {record.status for record in read_run_json(tmp_path / "far/crossval/run.json")} == {"ok"}
    assert jobs_of(slurm) == []
    features = next((tmp_path / "near").rglob("features_*"))
    model = tmp_path / "near/model"
    asked = ("counterfactual", "--model", model, "--features", features, "--class", "tumour", "--format", "csv")
    quick = ("--set", "questions.rounds=3", "--set", "questions.controls=4", "--set", "questions.shuffles=2")
    eosin(*asked, *quick, "--out", tmp_path / "asked_near")
    eosin(*asked, *quick, "--out", tmp_path / "asked_far", "--cluster", site, **slurm)
    for name in ("cohort.csv", "interventions.csv"):
        assert (tmp_path / "asked_far" / name).read_bytes() == (tmp_path / "asked_near" / name).read_bytes()


def test_tasks_of_one_step_train_the_model_of_one_process(tmp_path: Path, slurm: dict[str, str]) -> None:
    rows, lines = np.random.default_rng(0), ["patient_id,slide_id,label"]
    (tmp_path / "features").mkdir()
    for number in range(12):
        bag = rows.normal(number % 2, 1, (6, 4)).astype(np.float32)
        write_bag(tmp_path / f"features/s{number}.h5", FeatureBag(bag, FeatureSpec(encoder="toy", dim=4), f"s{number}"))
        lines.append(f"p{number},s{number},{'ab'[number % 2]}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    train = ("train", "--features", tmp_path / "features", "--labels", tmp_path / "labels.csv", "--precision", "fp32")
    options = ("epochs=2", "optimizer=sgd", "refit=false", "bags_per_step=4")
    settings = [word for option in options for word in ("--set", f"recipe.training.{option}")]
    settings += ["--set", "recipe.aggregator={name: mean, options: {dropout: 0}}"]
    eosin(*train, *settings, "--out", tmp_path / "one")
    told = ("--set", "recipe.training.processes=2")
    step = ("srun", "--ntasks", "2", "--overcommit", "--mem", "2G", sys.executable, "-m", "eosin")
    command = [str(word) for word in (*step, *train, *settings, *told, "--out", tmp_path / "two")]
    done = subprocess.run(command, env=os.environ | slurm, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_driver_that_is_killed_and_a_job_that_is_cancelled_lose_nothing(
    tmp_path: Path, cohort: Path, slurm: dict[str, str], site: Path
) -> None:
    job = tmp_path / "job"
    arguments = ("tile", "--slides", cohort / "slides", "--patch-size", 128, "--job", job, "--cluster", site)
    first = start(*arguments, **slurm)
    wait_until(lambda: len(read_run_json(job / "run.json")) >= 1, first)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    before = {record.slide_id: record.at for record in read_run_json(job / "run.json")}
    said = eosin("jobs", job, "--stop", **slurm)
    assert "its jobs were cancelled" in said or "left no jobs behind" in said  # they may have noticed it first
    wait_until(lambda: not jobs_of(slurm))
    second = start(*arguments, **slurm)
    wait_until(lambda: bool(jobs_of(slurm)), second)
    subprocess.run(["scancel", jobs_of(slurm)[0]], env=os.environ | slurm, check=True)
    _, err = second.communicate(timeout=400)
    assert second.returncode == 0, err
    after = {record.slide_id: (record.status, record.at) for record in read_run_json(job / "run.json")}
    assert len(after) == 8
    assert {status for status, _ in after.values()} == {"ok"}
    assert all(after[name][1] == at for name, at in before.items())


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[str] | None" = None) -> None:
    end = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < end
        assert process is None or process.poll() is None
        time.sleep(0.2)
