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
from cluster_runs import POISON, RECIPE, arrays_of, eosin, start
from safetensors.torch import load_file

from eosin._records import read_run_json
from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.features._store import write_bag
from eosin.wsi._synthetic import Cohort, make_cohort

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


def test_a_slide_that_kills_its_process_fails_alone(
    tmp_path: Path, cohort: Path, slurm: dict[str, str], site: Path
) -> None:
    slides = tmp_path / "slides\n'; touch pwned; #"  # a name that a shell would take apart
    slides.mkdir()
    for path in sorted((cohort / "slides").iterdir())[:3]:
        shutil.copy(path, slides)
    shutil.copy(path, slides / "poison $(touch pwned).tiff")
    (tmp_path / "poison.py").write_text(POISON)
    told = eosin(
        "tile", "--slides", slides, "--patch-size", 128, "--job", tmp_path / "job", "--cluster", site, "--plugin",
        tmp_path / "poison.py", code=1, POISON_LOG=str(tmp_path / "deaths"), **slurm,
    )  # fmt: skip
    assert "[worker-lost]" in told
    assert (tmp_path / "deaths").read_text() == "xxx"
    made = read_run_json(tmp_path / "job/run.json")
    assert sorted(record.status for record in made) == ["failed", "ok", "ok", "ok"]
    assert not list(tmp_path.rglob("pwned*"))


def test_the_end_of_the_time_that_the_scheduler_gave_the_command_is_exit_code_4(
    tmp_path: Path, cohort: Path, slurm: dict[str, str]
) -> None:
    command = [sys.executable, "-m", "eosin", "tile", "--slides", str(cohort / "slides"), "--patch-size", "128"]
    command += ["--job", str(tmp_path / "job")]
    over = ("env", "SLURM_JOB_END_TIME=1000000000")  # as if the walltime had been used up by what came before
    step = ["srun", "--ntasks", "1", "--overcommit", "--mem", "1G"]
    done = subprocess.run([*step, *over, *command], env=os.environ | slurm, capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert "8 of 8 slides are left" in done.stderr
    done = subprocess.run([*step, *command], env=os.environ | slurm, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_plain_array_jobs_share_the_slides(tmp_path: Path, cohort: Path, slurm: dict[str, str]) -> None:
    job = tmp_path / "job"
    (tmp_path / "array.sh").write_text(
        f"#!/bin/bash\n{sys.executable} -m eosin tile --slides {cohort}/slides --patch-size 128 --job {job}\n"
    )
    submit = ["sbatch", "--wait", "--array=0-1", "--overcommit", "--mem=1G", "--output=/dev/null"]
    command = [*submit, str(tmp_path / "array.sh")]
    subprocess.run(command, env=os.environ | slurm, check=True, capture_output=True, timeout=300)
    made = read_run_json(job / "run.json")
    assert [record.status for record in made] == ["ok"] * 8


@pytest.mark.slow
def test_sweep_prediction_and_maps_on_the_cluster_are_those_of_one_machine(
    tmp_path: Path, slurm: dict[str, str], site: Path
) -> None:
    make_cohort(tmp_path, Cohort(n_slides=12, size_um=(320.0, 360.0), fine_fraction=0, pen_fraction=0, seed=5))
    job, slides = tmp_path / "job", tmp_path / "slides"
    common = ("--slides", slides, "--job", job)
    eosin("tile", *common, "--patch-size", 128)
    eosin("extract", *common, "--encoder", "he_texture")
    features = next(job.rglob("features_*"))
    (tmp_path / "sweep.yaml").write_text(
        "recipes: [abmil]\ngrid: {training.lr: [1.0e-3, 1.0e-4], training.epochs: [1]}\n"
    )
    learn = ("--features", features, "--labels", tmp_path / "labels.csv", "--folds", 2)
    sweep = ("crossval", *learn, "--sweep", tmp_path / "sweep.yaml")
    eosin(*sweep, "--out", tmp_path / "near")
    eosin(*sweep, "--out", tmp_path / "far", "--cluster", site, **slurm)
    near, far = (sorted((tmp_path / name).rglob("model.safetensors")) for name in ("near", "far"))
    assert [path.read_bytes() for path in far] == [path.read_bytes() for path in near] != []
    model = near[0].parent
    for name, where in (("near", ()), ("far", ("--cluster", site))):
        out = tmp_path / f"{name}_use"
        eosin("predict", "--model", model, "--slides", slides, "--job", out, "--out", out / "p.csv", *where, **slurm)
        eosin("heatmap", "--model", model, "--slides", slides, "--features", features, "--format", "png", "--out",
              out / "maps", *where, **slurm)  # fmt: skip
    assert (tmp_path / "far_use/p.csv").read_bytes() == (tmp_path / "near_use/p.csv").read_bytes()
    maps = {name: sorted((tmp_path / f"{name}_use/maps").glob("*.png")) for name in ("near", "far")}
    assert [path.read_bytes() for path in maps["far"]] == [path.read_bytes() for path in maps["near"]] != []


@pytest.mark.slow
def test_two_hundred_slides_to_folds_through_a_killed_driver_and_a_cancelled_job(
    tmp_path: Path, slurm: dict[str, str], site: Path
) -> None:
    options = Cohort(n_slides=200, size_um=(320.0, 360.0), fine_fraction=0, pen_fraction=0, min_tumour=0.1, seed=5)
    make_cohort(tmp_path, options)
    settings = [word for option in ("tiling.patch_size=128", *RECIPE) for word in ("--set", option)]
    common = ("run", "--slides", tmp_path / "slides", "--labels", tmp_path / "labels.csv", "--folds", 5, *settings)
    eosin(*common, "--job", tmp_path / "near", timeout_s=1200)
    far = (*common, "--job", tmp_path / "far", "--cluster", site)
    run_json = tmp_path / "far/run.json"
    first = start(*far, **slurm)
    wait_until(lambda: len(read_run_json(run_json)) >= 40, first)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    eosin("jobs", tmp_path / "far", "--stop", **slurm)
    wait_until(lambda: not jobs_of(slurm))
    before = {record.slide_id: record.at for record in read_run_json(run_json)}
    second = start(*far, **slurm)
    wait_until(lambda: len(read_run_json(run_json)) >= len(before) + 20, second)
    subprocess.run(["scancel", jobs_of(slurm)[0]], env=os.environ | slurm, check=True)
    _, err = second.communicate(timeout=1200)
    assert second.returncode == 0, err
    after = {record.slide_id: record.at for record in read_run_json(run_json) if record.stage == "tile"}
    assert len(after) == 200
    assert all(after[name] == at for name, at in before.items())
    assert arrays_of(tmp_path / "far") == arrays_of(tmp_path / "near")
    for name in ("crossval/predictions.csv", "crossval/metrics.json", "model/model.safetensors"):
        assert (tmp_path / "far" / name).read_bytes() == (tmp_path / "near" / name).read_bytes()


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[str] | None" = None) -> None:
    end = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < end
        assert process is None or process.poll() is None
        time.sleep(0.2)
