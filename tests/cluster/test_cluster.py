"""Stages on Parsl's local workers: what is sent, what comes back, and what happens when a worker dies."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cluster_runs import POISON, arrays_of, eosin, start
from pydantic import TypeAdapter

from eosin._claims import Claims
from eosin._records import Record, process_name, read_run_json
from eosin.cluster import _jobs as jobs
from eosin.cluster._place import FOLDER, Cluster, driver_file
from eosin.cluster._site import Site
from eosin.cluster._worker import BUSY, _class_of, _open, gpus_of_worker, item_to_json, perform, write_stage
from eosin.errors import ConfigError
from eosin.features._extract import ExtractStage
from eosin.mil._study import FoldStage
from eosin.wsi._grid import Tiling
from eosin.wsi._job import JobFolder, TilePlan, TissueTiles
from eosin.wsi._slide_file import SlideFile, find_slides

EXAMPLES = sorted((Path(__file__).parents[2] / "configs/cluster").glob("*.yaml"))
LOCAL = "provider: local\nworkers: 2\n"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_understood_and_says_what_it_would_submit(path: Path) -> None:
    site = Site.read(path)
    for stage in ("tile", "extract 0.5mpp/uni", "train"):
        first = site.of_stage(stage).describe(stage, 1000)[0]
        assert first.startswith(f"{stage}: 1000 tasks on ")
    assert site.of_stage("extract x").gpus == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("provider: slrum", "slurm"),
        ("walltime: 30 min", "walltime"),
        ("provider: kubernetes", "image"),
        ("stages: {extract: {gpu: 1}}", "gpus"),
        ("workers: 0", "at least 1"),
        ("worker_init: export HF_TOKEN=hf_abc", r"HF_TOKEN=\$\(cat FILE\)"),
        ("options: ['#SBATCH --export=DB_PASSWORD=abc']", "DB_PASSWORD"),
        ("slides: /data", "slides"),
    ],
)
def test_a_wrong_site_is_refused_before_any_work(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(ConfigError, match=told) as caught:
        Site.read(tmp_path / "site.yaml")
    assert "abc" not in str(caught.value)


def test_a_secret_that_is_read_from_elsewhere_is_allowed() -> None:
    assert Site(worker_init='export HF_TOKEN=$(cat ~/.token)\nexport API_KEY="$KEY"').worker_init


def test_the_drivers_of_a_job_are_seen_and_ended_each(tmp_path: Path) -> None:
    logs = tmp_path / FOLDER
    logs.mkdir()
    host = process_name().rpartition("-")[0]
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    found = {process_name(): [], f"{host}-{dead.pid}": ["17"], "elsewhere-1": ["18"], "past-2": []}
    for name, numbers in found.items():
        said = {"driver": name, "stage": "tile", "total": 9, "provider": "local", "jobs": numbers}
        driver_file(logs, name).write_text(json.dumps(said))
    lines = jobs.stop(tmp_path)
    assert [line for line in lines if "17" in line] == ["the driver is gone; end its jobs yourself: 17"]
    assert len(lines) == 3
    assert {path.name for path in logs.glob("stop-*")} == {f"stop-{process_name()}", "stop-elsewhere-1"}
    Cluster(Site(), tmp_path)  # a new process of that number
    assert {path.name for path in logs.glob("stop-*")} == {"stop-elsewhere-1"}


def test_a_job_takes_no_new_slide_towards_its_end() -> None:
    assert Site(walltime="10:00:00").drain_s == 10 * 3600 - 900
    assert Site(walltime="00:10:00").drain_s == 540


@pytest.mark.parametrize(
    ("environment", "chosen"),
    [
        ({"CUDA_VISIBLE_DEVICES": "2,3", "PARSL_WORKER_RANK": "1", "PARSL_WORKER_COUNT": "2"}, "3"),
        ({"CUDA_VISIBLE_DEVICES": "4,5,6,7", "PARSL_WORKER_RANK": "0", "PARSL_WORKER_COUNT": "2"}, "4,5"),
        ({"CUDA_VISIBLE_DEVICES": "5", "PARSL_WORKER_RANK": "0", "PARSL_WORKER_COUNT": "1"}, ""),
        ({"CUDA_VISIBLE_DEVICES": "0", "PARSL_WORKER_RANK": "1", "PARSL_WORKER_COUNT": "4"}, ""),
        ({}, ""),
    ],
)
def test_workers_of_a_job_share_its_gpus(environment: dict[str, str], chosen: str) -> None:
    assert gpus_of_worker(environment) == chosen


@pytest.mark.parametrize("name", ["os:system", "eosinx:A", "subprocess:Popen"])
def test_a_worker_rebuilds_classes_of_eosin_alone(name: str) -> None:
    with pytest.raises(ConfigError, match="not a class of eosin"):
        _class_of(name)


@pytest.mark.parametrize("stage", [TilePlan, ExtractStage, FoldStage])
def test_every_stage_can_be_written_as_json(stage: type) -> None:
    assert TypeAdapter(stage).json_schema()


@pytest.fixture
def plan(tmp_path: Path, cohort: Path) -> tuple[str, SlideFile, TilePlan]:
    slide = find_slides([cohort / "slides"])[0]
    stage = TissueTiles(Tiling(patch_size=128)).plan([slide], JobFolder(tmp_path / "job"))
    write_stage(tmp_path / "stage.json", stage, SlideFile, stage.job.run_json)
    return str(tmp_path / "stage.json"), slide, stage


def test_a_worker_makes_an_item_once_and_leaves_it_to_the_run_that_has_it(
    plan: tuple[str, SlideFile, TilePlan],
) -> None:
    path, slide, stage = plan
    before = Path.cwd()
    other = Claims()
    try:
        assert other.take(stage.output(slide))
        assert perform(path, item_to_json(slide)) == BUSY
        other.release_all()
        first, second = (Record(**json.loads(perform(path, item_to_json(slide)))) for _ in range(2))
    finally:
        os.chdir(before)
        _open.cache_clear()
    assert (first.status, second.status, second.reason) == ("ok", "skipped", "done")
    assert [record.status for record in read_run_json(stage.job.run_json)] == ["ok"]


def test_another_version_on_the_worker_is_refused(plan: tuple[str, SlideFile, TilePlan], tmp_path: Path) -> None:
    path, slide, _ = plan
    changed = json.loads(Path(path).read_text()) | {"eosin": "9.9"}
    (tmp_path / "other.json").write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match=r"eosin 9\.9"):
        perform(str(tmp_path / "other.json"), item_to_json(slide))


def test_a_dry_run_says_what_would_be_submitted_and_does_nothing(tmp_path: Path, cohort: Path) -> None:
    (tmp_path / "site.yaml").write_text("provider: slurm\npartition: gpu\njobs: 3\nworker_init: module load cuda\n")
    said = eosin(
        "tile", "--slides", cohort / "slides", "--job", tmp_path / "job", "--cluster", tmp_path / "site.yaml",
        "--dry-run",
    )  # fmt: skip
    assert "tile: 8 tasks on SLURM, at most 3 jobs of 1 workers" in said
    assert "module load cuda" in said
    assert not (tmp_path / "job" / FOLDER).exists()


@pytest.mark.long
def test_local_workers_make_what_one_process_makes_and_a_poisonous_slide_stops_nobody(
    tmp_path: Path, cohort: Path
) -> None:
    slides = tmp_path / "slides; touch pwned"  # a name that a shell would take apart
    slides.mkdir()
    for path in (cohort / "slides").iterdir():
        (slides / path.name).symlink_to(path)
    (slides / "poison $(touch pwned).tiff").write_bytes((next(slides.iterdir())).read_bytes())
    (tmp_path / "poison.py").write_text(POISON)
    (tmp_path / "site.yaml").write_text(LOCAL)
    common = ("--slides", slides, "--patch-size", 128)
    said = eosin(
        "tile", *common, "--job", tmp_path / "far", "--cluster", tmp_path / "site.yaml", "--plugin",
        tmp_path / "poison.py", code=1, POISON_LOG=str(tmp_path / "deaths"),
    )  # fmt: skip
    assert "[worker-lost]" in said
    assert (tmp_path / "deaths").read_text() == "xxx"
    eosin("tile", "--slides", cohort / "slides", "--patch-size", 128, "--job", tmp_path / "near")
    assert arrays_of(tmp_path / "far") == arrays_of(tmp_path / "near") != {}
    made = read_run_json(tmp_path / "far/run.json")
    assert sorted(record.status for record in made) == ["failed"] + ["ok"] * 8
    assert not list(tmp_path.rglob("pwned*"))
    assert not Path("pwned").exists()
    assert (tmp_path / "far" / FOLDER).stat().st_mode & 0o777 == 0o700
    assert not list((tmp_path / "far" / FOLDER).rglob("*.key_secret"))
    (view,) = jobs.view_job(tmp_path / "far")
    assert (view.name, view.counts["ok"], view.counts["failed"], view.running) == ("tile", 8, 1, ())


@pytest.mark.long
def test_two_drivers_on_one_job_make_each_slide_once(tmp_path: Path, cohort: Path) -> None:
    (tmp_path / "site.yaml").write_text("provider: local\nworkers: 1\n")
    arguments = ("tile", "--slides", cohort / "slides", "--patch-size", 128, "--job", tmp_path / "job")
    both = [start(*arguments, "--cluster", tmp_path / "site.yaml") for _ in range(2)]
    for driver in both:
        _, err = driver.communicate(timeout=300)
        assert driver.returncode == 0, err
        assert "8 slides: " in err
    records = read_run_json(tmp_path / "job/run.json")
    assert [record.status for record in records] == ["ok"] * 8
    assert not list((tmp_path / "job").rglob("*.lock"))


def test_a_limit_of_the_whole_run_ends_it_with_exit_code_4(tmp_path: Path, cohort: Path) -> None:
    (tmp_path / "site.yaml").write_text(f'{LOCAL}limit: "00:00:00"\n')
    said = eosin(
        "tile", "--slides", cohort / "slides", "--job", tmp_path / "job", "--cluster", tmp_path / "site.yaml", code=4
    )
    assert "8 of 8 slides are left, because the time was over" in said


def test_a_job_that_never_was_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a job folder"):
        jobs.view_job(tmp_path)
    with pytest.raises(ConfigError, match="no run with --cluster"):
        jobs.stop(tmp_path)
