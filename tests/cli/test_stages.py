"""`eosin tile --from`, `eosin run --recipe two_stage`, `eosin train --continue-from`."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from fine_texture import FineCohort, make_fine_cohort

from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.features._store import write_bag
from eosin.wsi._coordinates import read_footer, read_grid

from .conftest import Run

QUICK = ("--set", "recipe.training.epochs=1", "--set", "recipe.training.select=last")


@pytest.fixture(scope="module")
def fine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fine")
    make_fine_cohort(folder, FineCohort(n_slides=6, side_px=512, radius_px=50))
    return folder


@pytest.fixture(scope="module")
def first_stage(fine: Path, run: Run) -> Path:
    """Tile, encode and cross-validate at 2 µm/px; return the job."""
    job = fine / "job"
    tiles = ("--mpp", 2, "--patch-size", 32)
    assert run("tile", fine / "slides", "--job", job, *tiles).exit_code == 0
    assert run("extract", fine / "slides", "--job", job, "--encoder", "he_texture", "--workers", 0).exit_code == 0
    features = job / "2mpp_32px_0px_overlap/features_he_texture"
    arguments = ("--features", features, "--labels", fine / "labels.csv", "--folds", 3, "--out", job / "crossval")
    assert run("crossval", *arguments, *QUICK).exit_code == 0
    return job


def test_the_grid_of_the_second_stage_is_written(fine: Path, first_stage: Path, run: Run) -> None:
    second = ("--from", first_stage / "crossval", "--mpp", 1.0, "--patch-size", 32, "--budget", 5)
    result = run("tile", fine / "slides", "--job", first_stage, *second)
    folder = first_stage / "1mpp_32px_0px_overlap_budget5"
    assert (result.exit_code, result.stdout) == (0, f"{folder}\n")
    path = folder / "patches/F000_patches.h5"
    assert 5 <= read_grid(path).n_tiles <= 20
    assert json.loads(read_footer(path).selection)["out_of_fold"] == "yes"
    again = run("tile", fine / "slides", "--job", first_stage, *second, "--set", "selection.seed=0")
    assert "6 skipped" in again.stderr
    assert run("extract", fine / "slides", "--job", first_stage, "--encoder", "he_texture",
               "--tiling", folder.name).exit_code == 0  # fmt: skip


def test_bad_requests_for_a_second_stage_are_refused_in_one_line(
    fine: Path, first_stage: Path, refused: Run, tmp_path: Path
) -> None:
    common = ("tile", fine / "slides", "--job", first_stage, "--patch-size", 32)
    stage = (*common, "--from", first_stage / "crossval")
    assert "--from RUN" in refused(*common, "--budget", 64)
    assert "--from RUN" in refused(*common, "--allow-seen")
    assert "budget" in refused(*stage, "--mpp", 1, "--budget", 0)
    assert "not a training run" in refused(*common, "--from", tmp_path)
    assert "cannot be cut" in refused(*stage, "--mpp", 0.7)
    assert "--preview" in refused(*stage, "--mpp", 1, "--preview")
    assert "clusters" in refused(*stage, "--mpp", 1, "--set", "selection.cluster=2")


@pytest.mark.slow
def test_one_command_goes_through_both_stages(fine: Path, run: Run, tmp_path: Path) -> None:
    result = run(
        "run", "--slides", fine / "slides", "--labels", fine / "labels.csv", "--recipe", "two_stage", "--folds", 2,
        "--job", tmp_path, *QUICK, "--set", "tiling.patch_size=32", "--set", "second.tiling.patch_size=32",
        "--set", "second.tiling.mpp=1", "--set", "second.selection.budget=6",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "stages.json") in result.stdout.splitlines()
    stages = json.loads((tmp_path / "stages.json").read_text())["stages"]
    assert [stage["mpp"] for stage in stages] == [2.0, 1.0]


def organ(folder: Path, number: int) -> tuple[Path, Path]:
    """Write features and labels of a task; return both."""
    rng = np.random.default_rng(number)
    place, shift = rng.normal(size=(2, 12)) * 2
    lines = ["patient_id,slide_id,label"]
    for slide in range(16):
        rows = rng.normal(size=(8, 12)) + place + shift * (slide % 2)
        bag = FeatureBag(rows.astype(np.float32), FeatureSpec(encoder="toy", dim=12), f"o{number}s{slide:02d}")
        write_bag(folder / f"features{number}/{bag.slide_id}.h5", bag)
        lines.append(f"p{slide},{bag.slide_id},{('normal', 'tumour')[slide % 2]}{number}")
    (folder / f"labels{number}.csv").write_text("\n".join(lines) + "\n")
    return folder / f"features{number}", folder / f"labels{number}.csv"


def test_a_sequence_of_tasks_is_trained_and_reported(run: Run, refused: Run, tmp_path: Path) -> None:
    narrow = ("--set", "recipe.aggregator.options.embed_dims=[16]", "--set", "recipe.training.epochs=3")
    before: tuple[object, ...] = ()
    for number in range(3):
        features, labels = organ(tmp_path, number)
        splits, out = tmp_path / f"splits{number}", tmp_path / f"task{number}"
        assert run("split", "--labels", labels, "--folds", 4, "--out", splits).exit_code == 0
        options = before or ("--recipe", "abmil", *narrow)
        arguments = ("--features", features, "--labels", labels, "--splits", splits, "--fold", 0, "--out", out)
        result = run("train", *arguments, *options)
        assert result.exit_code == 0, result.output
        before = ("--continue-from", out)
    assert result.stdout.splitlines() == [str(out), str(out / "continual.csv"), str(out / "cohort.csv")]
    assert "after 3 tasks: average accuracy" in result.stderr
    assert "task 1 (normal0, tumour0): accuracy" in result.stderr
    with (out / "continual.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["after_task"] for row in rows] == ["1", "2", "3"]
    assert all(0 <= float(rows[2][f"accuracy_normal{n}_tumour{n}"]) <= 1 for n in range(3))
    assert all(-1 <= float(rows[2][name]) <= 1 for name in ("forgetting", "backward_transfer"))
    predicted = run("predict", "--model", out, "--features", tmp_path / "features0", "--out", tmp_path / "p.csv")
    assert predicted.exit_code == 0
    assert "prob_tumour2" in (tmp_path / "p.csv").read_text().splitlines()[0]
    data = ("--features", features, "--labels", labels, "--out", tmp_path / "no")
    assert "already has the classes" in refused("train", *data, "--continue-from", out)
    assert "is not a model folder" in refused("train", *data, "--continue-from", tmp_path)
    assert "whose options stay" in refused("train", *data, "--continue-from", tmp_path / "task0", "--recipe", "comel")
