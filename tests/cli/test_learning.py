"""`eosin import`, `split`, `train`, `crossval`, `predict`, `heatmap` on small input, and every bad input."""

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from eosin.features import _store as store
from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.features._store import find_bags, read_bag, write_bag
from eosin.mil._checkpoint import load_card
from eosin.mil._splits import read_splits
from eosin.wsi._synthetic import make_slide

from .conftest import Run

QUICK = ("--set", "recipe.training.epochs=2", "--set", "recipe.aggregator.options.embed_dims=[16]")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(path: Path, lines: list[str], *, header: str = "patient_id,slide_id,label") -> Path:
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


@pytest.fixture(scope="session")
def labels(cohort: Path) -> Path:
    return cohort / "labels.csv"


@pytest.fixture(scope="session")
def splits(labels: Path, run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("splits")
    result = run("split", "--labels", labels, "--folds", 3, "--out", out)
    assert (result.exit_code, result.stdout) == (0, f"{out}\n")
    return out


@pytest.fixture(scope="session")
def model(features: Path, labels: Path, splits: Path, run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "run"
    arguments = ("--features", features, "--labels", labels, "--splits", splits, "--fold", 0, "--out", out)
    result = run("train", *arguments, "--recipe", "abmil", *QUICK)
    results = [out, *(out / name for name in ("metrics.json", "predictions.csv", "report.html", "cohort.csv"))]
    assert (result.exit_code, result.stdout.split()) == (0, list(map(str, results)))
    assert re.search(r"test part: Area under the ROC curve: (0\.\d+|1\.000|undefined)", result.stderr), result.stderr
    assert "open run/report.html in a browser" in result.stderr
    return out


def test_splits_keep_patients_together_and_test_every_slide_once(splits: Path, labels: Path) -> None:
    patient = {row["slide_id"]: row["patient_id"] for row in rows(labels)}
    parts = read_splits(splits)
    assert len(parts) == 3
    for split in parts:
        sides = [{patient[slide] for slide in part} for part in (split.train, split.val, split.test)]
        assert all(sides)
        assert sum(map(len, sides)) == len(set.union(*sides)) == 6
    assert sorted(slide for split in parts for slide in split.test) == sorted(patient)


def test_a_model_folder_is_complete_and_told_by_info(model: Path, run: Run) -> None:
    assert {"model.safetensors", "model.json"} <= {path.name for path in model.iterdir()}
    assert load_card(model).features.encoder == "he_texture"
    result = run("info", model)
    assert result.exit_code == 0
    assert {"kind: model", "schema_version: 2"} <= set(result.stdout.splitlines())


def test_a_model_is_judged_by_the_part_that_has_not_trained_it(
    model: Path, splits: Path, features: Path, labels: Path, run: Run, tmp_path: Path
) -> None:
    (tested, *_) = read_splits(splits)
    predicted = rows(model / "predictions.csv")
    assert {row["slide_id"] for row in predicted} == set(tested.test)
    metrics = json.loads((model / "metrics.json").read_text())
    right = [row["predicted"] == row["label"] for row in predicted]
    assert metrics["out_of_fold"]["accuracy"]["value"] == pytest.approx(np.mean(right))
    page = (model / "report.html").read_text()
    assert "One model on its test part" in page
    assert "Over folds" not in page
    base = ("train", "--features", features, "--labels", labels, *QUICK)
    refitted = run(*base, "--out", tmp_path / "refitted")
    assert refitted.stdout.split() == [str(tmp_path / "refitted"), str(tmp_path / "refitted/cohort.csv")]
    alone = ("--set", "recipe.training.refit=false", "--set", "recipe.training.threshold=true")
    assert run(*base, "--out", tmp_path / "chosen", *alone).exit_code == 0
    assert "which chose the epoch and any threshold" in (tmp_path / "chosen/report.html").read_text()
    (threshold,) = {row["threshold"] for row in rows(tmp_path / "chosen/predictions.csv")}
    assert float(threshold) == load_card(tmp_path / "chosen").load_task().threshold


def test_options_of_the_recipe_reach_the_model(model: Path) -> None:
    recipe = load_card(model).recipe
    assert recipe.training.epochs == 2
    assert list(recipe.aggregator.options["embed_dims"]) == [16]


def test_a_recipe_can_come_from_a_file_and_changes_from_a_configuration(
    features: Path, labels: Path, model: Path, run: Run, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("aggregator: {name: abmil, options: {embed_dims: [16]}}\ntraining: {epochs: 2}\n")
    config = tmp_path / "config.yaml"
    config.write_text("recipe: {aggregator: {options: {embed_dims: [16]}}, training: {epochs: 2}}\ntiling: {mpp: 1}\n")
    for name, arguments in {"file": ["--recipe", file], "config": ["--config", config]}.items():
        result = run("train", "--features", features, "--labels", labels, "--out", tmp_path / name, *arguments)
        assert result.exit_code == 0
        recipe = load_card(tmp_path / name).recipe
        assert (recipe.training.epochs, list(recipe.aggregator.options["embed_dims"])) == (2, [16])
    small = {"linear_below": 200}  # of the default recipe, which the other model does not have
    assert load_card(tmp_path / "config").recipe == load_card(model).recipe.model_copy(update=small)


def test_crossval_writes_models_predictions_metrics_and_a_report(
    features: Path, labels: Path, splits: Path, run: Run, tmp_path: Path
) -> None:
    arguments = ("--features", features, "--labels", labels, "--splits", splits, "--out", tmp_path)
    result = run("crossval", *arguments, *QUICK)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        str(tmp_path / name) for name in ("metrics.json", "predictions.csv", "report.html")
    ]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert {"mean", "standard_error", "interval", "n_folds"} <= set(metrics["metrics"]["accuracy"])
    assert metrics["n_folds"] == 3
    assert sorted(row["slide_id"] for row in rows(tmp_path / "predictions.csv")) == [f"S{i:03d}" for i in range(12)]
    page = (tmp_path / "report.html").read_text()
    assert "Area under the ROC curve" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "Beside a baseline: mean of the tiles, logistic regression" in page
    assert sorted(row["slide_id"] for row in rows(tmp_path / "baseline/predictions.csv")) == [
        row["slide_id"] for row in sorted(rows(tmp_path / "predictions.csv"), key=lambda row: row["slide_id"])
    ]
    for fold in range(3):
        assert load_card(tmp_path / f"fold_{fold}").features.encoder == "he_texture"
    lines = result.stderr.splitlines()
    assert any(line.startswith("Area under the ROC curve: ") and "3 folds (mean ± sd)" in line for line in lines)
    assert lines[-1].endswith("report.html in a browser")
    made = run("card", tmp_path)
    assert (made.exit_code, made.stdout.strip()) == (0, str(tmp_path / "model_card.md"))
    assert (
        "**Preparation** (T 7, 9b; CLAIM: data preparation): features of he\\_texture"
        in (tmp_path / "model_card.md").read_text()
    )
    assert "items are open" in made.stderr


def test_predict_gives_a_row_per_slide(model: Path, features: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "p.csv"
    result = run("predict", "--model", model, "--model", model, "--features", features, "--out", out)
    assert (result.exit_code, result.stdout) == (0, f"{out}\n")
    seen, *lines = result.stderr.splitlines()
    assert "8 of 12 slides, or their patients, trained the model" in seen
    assert lines == ["12 slides: 12 ok", "cohort: 12 slides given", "12 used"]
    table = rows(out)
    assert [row["slide_id"] for row in table] == [f"S{i:03d}" for i in range(12)]
    for row in table:
        assert row["status"] == "ok"
        assert math.isclose(float(row["prob_normal"]) + float(row["prob_tumour"]), 1, abs_tol=1e-6)
        assert row["predicted"] in ("normal", "tumour")


def test_predict_gives_a_row_per_patient(
    model: Path, features: Path, labels: Path, run: Run, refused: Run, tmp_path: Path
) -> None:
    out = tmp_path / "p.parquet"
    result = run("predict", "--model", model, "--features", features, "--patients", labels, "--out", out)
    assert (result.exit_code, result.stdout) == (0, f"{out}\n{tmp_path / 'p_patients.parquet'}\n")
    patients, slides = pd.read_parquet(tmp_path / "p_patients.parquet"), pd.read_parquet(out)
    assert len(patients) == 6
    assert set(patients["n_used"]) == {2}
    assert patients["n_tiles"].sum() == slides["n_tiles"].sum()
    other = table(tmp_path / "t.csv", ["p1,elsewhere,x"])
    message = refused(
        "predict", "--model", model, "--features", features, "--patients", other, "--out", tmp_path / "q.csv"
    )
    assert "none of the 1 slides in the table of patients" in message
    assert not (tmp_path / "q.csv").exists()


def test_predict_from_slides_equals_predict_from_their_features(
    model: Path, cohort: Path, features: Path, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "slides").mkdir()
    for name in ("S000.tiff", "S001.tiff"):
        (tmp_path / "slides" / name).symlink_to(cohort / "slides" / name)
    (tmp_path / "slides/bad.svs").write_bytes(b"no slide" * 100)
    arguments = ("--slides", tmp_path / "slides", "--job", tmp_path / "job", "--out", tmp_path / "a.csv")
    result = run("predict", "--model", model, *arguments)
    assert result.exit_code == 1
    assert "failed: bad: " in result.stderr
    assert "eosin cannot read this format" in result.stderr
    assert run("predict", "--model", model, "--features", features, "--out", tmp_path / "b.csv").exit_code == 0
    made, kept = ({row["slide_id"]: row for row in rows(tmp_path / name)} for name in ("a.csv", "b.csv"))
    assert {name: row["status"] for name, row in made.items()} == {"S000": "ok", "S001": "ok", "bad": "failed"}
    assert made["bad"]["reason"] == "unsupported"
    assert "eosin cannot read this format" in made["bad"]["message"]
    for name in ("S000", "S001"):
        assert float(made[name]["prob_tumour"]) == pytest.approx(float(kept[name]["prob_tumour"]), abs=1e-5)


def test_heatmap_writes_what_it_prints(model: Path, cohort: Path, features: Path, run: Run, tmp_path: Path) -> None:
    slide = cohort / "slides/S003.tiff"
    result = run("heatmap", "--model", model, "--slide", slide, "--features", features, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    png, geojson = map(Path, result.stdout.splitlines())
    with Image.open(png) as picture:
        assert min(picture.size) > 50
    objects = json.loads(geojson.read_text())["features"]
    assert len(objects) == len(read_bag(features / "S003.h5").features)
    assert all("measurements" in item["properties"] for item in objects)


def test_heatmap_makes_the_features_that_it_lacks(model: Path, cohort: Path, run: Run, tmp_path: Path) -> None:
    slide = cohort / "slides/S003.tiff"
    result = run("heatmap", "--model", model, "--slide", slide, "--out", tmp_path, "--format", "csv")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path}/S003_alone.csv\n"
    assert len(find_bags(tmp_path / "job/0.5mpp_128px_0px_overlap/features_he_texture")) == 1


def test_counterfactual_writes_what_it_prints(
    model: Path, cohort: Path, features: Path, run: Run, tmp_path: Path
) -> None:
    slide = cohort / "slides/S003.tiff"
    arguments = ("--model", model, "--features", features / "S003.h5", "--slide", slide, "--out", tmp_path)
    result = run("counterfactual", *arguments, "--set", "questions.rounds=3", "--class", "tumour")
    assert result.exit_code == 0, result.output
    assert [Path(line).name for line in result.stdout.splitlines()] == [
        f"S003_counterfactual.{suffix}" for suffix in ("csv", "geojson", "html")
    ]
    assert {row["class"] for row in rows(Path(result.stdout.splitlines()[0]))} == {"tumour"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--class", "stroma"], "stroma"),
        (["--regions", "nowhere.geojson"], "nowhere.geojson"),
        (["--format", "docx"], "docx"),
        (["--set", "questions.round=1"], "did you mean rounds"),
    ],
)
def test_counterfactual_options_that_make_no_sense(
    refused: Run, model: Path, features: Path, tmp_path: Path, arguments: list[str], told: str
) -> None:
    base = ("--model", model, "--features", features / "S003.h5", "--out", tmp_path / "out")
    assert told in refused("counterfactual", *base, *arguments)
    assert not (tmp_path / "out").exists()


def npz(path: Path, *, bags: int = 24) -> Path:
    rng = np.random.default_rng(0)
    index = np.repeat(np.arange(bags), 5)
    label = (np.arange(bags) % 2).astype(np.int8)
    instances = rng.normal(size=(len(index), 8)).astype(np.float32) + label[index][:, None]
    masks = np.ones((2, 3, bags), bool)
    for repeat in range(2):
        for fold, test in enumerate(np.array_split(rng.permutation(bags), 3)):
            masks[repeat, fold, test] = False
    np.savez(path, instances=instances, bag_index=index.astype(np.int32), bag_label=label, cv_train_mask=masks)
    return path


def test_import_then_crossval_with_the_files_own_folds(run: Run, tmp_path: Path) -> None:
    data = tmp_path / "data"
    result = run("import", npz(tmp_path / "set.npz"), "--out", data)
    assert result.stdout.splitlines() == [str(data / name) for name in ("features", "labels.csv", "splits")]
    arguments = ("--features", data / "features", "--labels", data / "labels.csv", "--splits", data / "splits")
    result = run("crossval", *arguments, "--out", tmp_path / "cv", "--recipe", "mean", *QUICK[:2])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "cv/metrics.json").read_text())["n_folds"] == 6


def test_a_sweep_is_chosen_from_within_each_fold(run: Run, refused: Run, tmp_path: Path) -> None:
    assert run("import", npz(tmp_path / "set.npz"), "--out", tmp_path).exit_code == 0
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("recipes: [mean, max]\ngrid: {training.epochs: [1, 2]}\n")
    arguments = ("--features", tmp_path / "features", "--labels", tmp_path / "labels.csv", "--folds", 2)
    command = ("crossval", *arguments, "--sweep", sweep, "--out", tmp_path / "cv")
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == str(tmp_path / "cv/sweep.csv")
    assert len(rows(tmp_path / "cv/sweep.csv")) == 5
    assert len(json.loads((tmp_path / "cv/chosen/metrics.json").read_text())["choices"]) == 2
    assert "remove --recipe" in refused(*command, "--recipe", "abmil")
    sweep.write_text("recipe: [mean]\n")
    assert "did you mean recipes" in refused(*command)


def test_features_go_to_another_tools_layout_and_come_back(
    features: Path, cohort: Path, run: Run, tmp_path: Path
) -> None:
    result = run("export", features / "S000.h5", "--to", "trident", "--out", tmp_path / "theirs")
    assert result.exit_code == 0, result.output
    written = [Path(line) for line in result.stdout.splitlines()]
    assert all(path.is_file() for path in written)
    encoded = next(path for path in written if "features" in path.parent.name)
    back = run("import", encoded, "--out", tmp_path / "ours", "--slide", cohort / "slides/S000.tiff")
    assert back.exit_code == 0, back.output
    (path,) = (tmp_path / "ours").glob("**/S000.h5")
    assert np.array_equal(read_bag(path).features, read_bag(features / "S000.h5").features)


def test_many_files_are_exported_and_a_damaged_one_fails_alone(features: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("S000.h5", "S001.h5"):
        (tmp_path / "in" / name).write_bytes((features / name).read_bytes())
    (tmp_path / "in/S001.h5").write_bytes(b"x" * 100)
    result = run("export", tmp_path / "in", "--to", "clam", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "failed: S001: " in result.stderr
    assert result.stdout


def test_export_to_an_unknown_layout(refused: Run, features: Path, tmp_path: Path) -> None:
    assert "trident" in refused("export", features / "S000.h5", "--to", "tridnet", "--out", tmp_path / "out")


@pytest.mark.shared
def test_files_of_clam_are_imported(run: Run, refused: Run, shared: Path, tmp_path: Path) -> None:
    file = shared / "data/interop/clam_h5/CMU-1-Small-Region.patch_level0.h5"
    assert "mpp" in refused("import", file, "--out", tmp_path / "none")
    slide = shared / "data/slides/CMU-1-Small-Region.svs"
    result = run("import", file, "--out", tmp_path / "job", "--slide", slide)
    assert result.exit_code == 0, result.output
    assert Path(result.stdout.strip()).is_file()


@pytest.mark.shared
def test_a_checkpoint_of_clam_becomes_a_model(run: Run, refused: Run, shared: Path, tmp_path: Path) -> None:
    file = shared / "data/checkpoints/clam_demo_s_0_checkpoint.pt"
    command = ("convert", file, "--mpp", 0.5, "--patch-size", 256, "--out", tmp_path / "model")
    assert "did you mean resnet50" in refused(*command, "--encoder", "resnet5", "--classes", "normal,tumour")
    assert "name 2 classes" in refused(*command, "--encoder", "resnet50", "--classes", "tumour")
    assert not (tmp_path / "model").exists()
    result = run(*command, "--encoder", "resnet50", "--classes", "normal, tumour")
    assert result.exit_code == 0, result.output
    card = load_card(tmp_path / "model")
    assert (card.features.encoder, card.features.dim, card.task["classes"]) == ("resnet50", 1024, ["normal", "tumour"])


@pytest.mark.long
@pytest.mark.shared
def test_a_part_of_musk1_is_imported_and_trained_on(run: Run, shared: Path, tmp_path: Path) -> None:
    first, last = 27, 67  # 20 positive and 20 negative bags
    with np.load(shared / "data/mil/musk1.npz") as whole:
        kept = (whole["bag_index"] >= first) & (whole["bag_index"] < last)
        part = {"instances": whole["instances"][kept], "bag_index": whole["bag_index"][kept] - first}
        labels, masks = whole["bag_label"][first:last], whole["cv_train_mask"][:1, :2, first:last]
    np.savez(tmp_path / "musk.npz", bag_label=labels, cv_train_mask=masks, **part)
    assert run("import", tmp_path / "musk.npz", "--out", tmp_path).exit_code == 0
    assert len(find_bags(tmp_path / "features")) == 40
    arguments = ("--features", tmp_path / "features", "--labels", tmp_path / "labels.csv")
    quick = ("--splits", tmp_path / "splits", "--set", "recipe.training.epochs=3", "--recipe", "abmil")
    result = run("crossval", *arguments, "--out", tmp_path / "cv", *quick)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "cv/metrics.json").read_text())["metrics"]["accuracy"]["n_folds"] == 2


SITES = [f"P{i:02d},S{i:03d},{'normal' if i % 2 else 'tumour'},{'ABC'[i % 3]}" for i in range(12)]


def test_how_a_table_was_understood_is_said(labels: Path, run: Run, tmp_path: Path) -> None:
    result = run("split", "--labels", labels, "--folds", 3, "--out", tmp_path)
    assert result.stderr == (
        "slides: column 'slide_id'; patients: column 'patient_id' (6 patients with 12 slides); values: label; "
        "label: column 'label', classes normal (6), tumour (6), positive: tumour "
        "(--target 'label=normal' for the other)\n"
    )
    turned = run("split", "--labels", labels, "--folds", 3, "--out", tmp_path, "--target", "label=normal")
    assert "classes tumour (6), normal (6), positive: normal (--target 'label=tumour' for the other)" in turned.stderr


@pytest.mark.parametrize("kind", ["kfold", "monte-carlo", "holdout", "nested"])
def test_every_kind_of_split_is_made_for_clam_and_stamp(labels: Path, run: Run, tmp_path: Path, kind: str) -> None:
    options = ("--folds", 3, "--inner-folds", 2, "--kind", kind) if kind == "nested" else ("--folds", 2, "--kind", kind)
    result = run("split", "--labels", labels, *options, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    names = {str(path.relative_to(tmp_path / "out")) for path in tmp_path.glob("out/**/*") if path.is_file()}
    if kind == "nested":
        assert {f"outer_{i}/splits_{j}.csv" for i in range(3) for j in range(2)} <= names
    else:
        assert {"splits_0.csv", "splits_1.csv", "splits.json"} <= names


@pytest.mark.long
def test_splits_of_stamp_and_nested_ones_are_trained_on(
    features: Path, labels: Path, splits: Path, run: Run, tmp_path: Path
) -> None:
    arguments = ("--features", features, "--labels", labels, *QUICK)
    result = run("crossval", *arguments, "--splits", splits / "splits.json", "--out", tmp_path / "stamp")
    assert result.exit_code == 0, result.output
    assert run(
        "split", "--labels", labels, "--folds", 3, "--inner-folds", 2, "--kind", "nested", "--out", tmp_path / "n"
    )
    result = run("crossval", *arguments, "--splits", tmp_path / "n", "--out", tmp_path / "nested")
    assert result.exit_code == 0, result.output
    assert len(rows(tmp_path / "nested/predictions.csv")) == 12
    assert load_card(tmp_path / "nested/fold_2/inner_1").features.encoder == "he_texture"


def test_several_targets_from_two_tables_of_stamp_at_patient_level(features: Path, run: Run, tmp_path: Path) -> None:
    table(tmp_path / "slides.csv", [f"P{i // 2},S{i:03d}.h5" for i in range(12)], header="PATIENT,FILENAME")
    lines = [f"P{p},{'ab'[p % 2]},{p % 3 if p else ''},{p + 1},{p % 2}" for p in range(6)]
    clini = table(tmp_path / "clini.csv", lines, header="PATIENT,kind,grade,months,dead")
    (tmp_path / "splits_0.csv").write_text("train,val,test\n" + "".join(f"S{i:03d},,\n" for i in range(8)))
    arguments = ("--features", features, "--labels", clini, "--slide-table", tmp_path / "slides.csv", *QUICK)
    options = ("--level", "patient", "--task", "multitask", "--target", "kind; regression:grade; cox:months,dead")
    last = ("--set", "recipe.training.select=last", "--splits", tmp_path, "--max-instances-per-step", 100)
    result = run("train", *arguments, *options, *last, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "numbers from 0 to 2, 1 without" in result.stderr
    card = load_card(tmp_path / "run")
    assert card.recipe.training.max_instances_per_step == 100
    assert card.training["n_train_patients"] == 4
    result = run("predict", "--model", tmp_path / "run", "--features", features, "--out", tmp_path / "p.parquet")
    assert result.exit_code == 0, result.output


@pytest.mark.long
def test_two_cross_validations_are_compared(
    features: Path, labels: Path, splits: Path, run: Run, tmp_path: Path
) -> None:
    arguments = ("crossval", "--features", features, "--labels", labels, "--splits", splits, *QUICK[:2])
    assert run(*arguments, "--recipe", "mean", "--out", tmp_path / "a").exit_code == 0
    result = run(*arguments, "--recipe", "max", "--out", tmp_path / "b", "--compare", tmp_path / "a")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "b/report.html").read_text()
    assert "Compared with a" in page
    assert "paired bootstrap" in page


def test_a_run_that_cannot_be_compared_stops_before_training(
    features: Path, labels: Path, splits: Path, refused: Run, tmp_path: Path
) -> None:
    base = ("crossval", "--features", features, "--labels", labels, "--splits", splits, "--out", tmp_path / "out")
    other = tmp_path / "other"
    assert "other/predictions.csv: cannot be read as a table (no such file)" in refused(*base, "--compare", other)
    other.mkdir()
    header = "fold,slide_id,patient_id,label,prob_normal,prob_tumour,predicted"
    table(other / "predictions.csv", ["0,S000,P0,normal,0.7,0.3,normal"], header=header)
    assert "only one of the two runs has predictions for S001" in refused(*base, "--compare", other)
    table(other / "predictions.csv", ["0,S000,P0,2.5"], header="fold,slide_id,patient_id,score")
    assert "predictions without the column 'label'" in refused(*base, "--compare", other)
    assert not (tmp_path / "out").exists()


# bad input


def test_a_sweep_of_options_that_do_not_exist_stops_before_training(
    features: Path, labels: Path, refused: Run, tmp_path: Path
) -> None:
    (tmp_path / "sweep.yaml").write_text("recipes: [mean, abmil]\ngrid: {aggregator.options.gate: [true]}\n")
    arguments = ("--features", features, "--labels", labels, "--sweep", tmp_path / "sweep.yaml", "--folds", 2)
    assert "'gate'" in refused("crossval", *arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sites_are_named_in_what_was_understood(run: Run, tmp_path: Path) -> None:
    sites = [f"p{i},s{i},{i % 2},{'XYZW'[i // 4]}" for i in range(16)]
    path = table(tmp_path / "l.csv", sites, header="patient_id,slide_id,label,Centre")
    result = run("split", "--labels", path, "--group", "site", "--folds", 3, "--out", tmp_path / "out")
    assert "sites: column 'Centre'" in result.stderr


def test_too_few_sites_are_called_sites(refused: Run, tmp_path: Path) -> None:
    path = table(tmp_path / "l.csv", SITES, header="patient_id,slide_id,label,site")
    line = refused("split", "--labels", path, "--group", "site", "--folds", 5, "--out", tmp_path / "out")
    assert "sites" in line
    assert "patients" not in line
    path = table(tmp_path / "m.csv", [line[:-2] for line in SITES])
    line = refused("split", "--labels", path, "--group", "site", "--out", tmp_path / "out")
    assert "no column 'site'" in line
    assert not (tmp_path / "out").exists()


def twelve(*values: str) -> list[str]:
    """Return twelve rows, each a patient, with these values in turn."""
    return [f"P{i},S{i:03d},{values[i % len(values)]}" for i in range(12)]


@pytest.mark.parametrize(
    ("lines", "header", "task", "told"),
    [
        ([*twelve("a", "b"), "p0,S000,b"], "label", "binary", "slides with more than one row: S000"),
        (
            twelve("a", "b", "nan", "a"),
            "label",
            "binary",
            "3 slides have no label (has no value in column label): S002, S006, S010",
        ),
        (twelve("a"), "label", "binary", "only the label 'a'"),
        (["P0,S000,a"], "label", "binary", "only the label 'a'"),
        ([*twelve("a")[:-1], "P11,S011,b"], "label", "binary", "class 'b' has 1 patient,"),
        (twelve("3,0", "5,0"), "time,event", "cox", "holds no event"),
        (twelve("3,1", "5,1"), "time,censorship", "cox", "1 being censored"),
        (twelve("3,2", "5,1"), "time,event", "survival", "say which (--target time,event=1 or"),
        (twelve("5"), "label", "regression", "every value in column 'label' is the same"),
        (twelve("high", "low"), "label", "ordinal", "is not known; state it"),
    ],
)
def test_labels_that_cannot_be_learnt(
    refused: Run, features: Path, tmp_path: Path, lines: list[str], header: str, task: str, told: str
) -> None:
    path = table(tmp_path / "l.csv", lines, header=f"patient_id,slide_id,{header}")
    base = ("--features", features, "--labels", path, "--out", tmp_path / "out", "--task", task)
    assert told in refused("crossval", *base, "--folds", 2, *QUICK)
    assert not (tmp_path / "out").exists()


def test_features_with_nan_stop_the_run_and_name_the_slide(
    features: Path, labels: Path, run: Run, tmp_path: Path
) -> None:
    for path in features.glob("*.h5"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    rewrite_with_nan(tmp_path / "S002.h5")
    result = run("train", "--features", tmp_path, "--labels", labels, "--out", tmp_path / "out", *QUICK)
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert line == "error: features of S002 are infinite or NaN; extract them again"
    assert not list(tmp_path.glob("out/*"))


def rewrite_with_nan(path: Path) -> None:
    """Write a feature file again with a NaN under checksums that fit, as a faulty tool might."""
    bag = read_bag(path)
    values = np.array(bag.features)
    values[1, 0] = np.nan
    with path.open("wb") as file:
        store._write(file, replace(bag, features=values))


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ("patient_id,object,label", "slide_id"),
        ("who,slide_id,label", "--group slide"),
        ("patient_id,slide_id,x,y", "2 columns could be it: x (0: 4, 1: 4); y (0: 4, 1: 4)"),
    ],
)
def test_a_label_table_without_the_columns(refused: Run, tmp_path: Path, header: str, told: str) -> None:
    lines = [f"p{i},s{i},{i % 2},{i // 4}"[: None if header.endswith("y") else -2] for i in range(8)]
    path = table(tmp_path / "l.csv", lines, header=header)
    assert told in refused("split", "--labels", path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


EXCEL = b"PK\x03\x04"
OLD_EXCEL = bytes.fromhex("d0cf11e0a1b11ae1")
READERS = {
    "split": ("split", "--labels", "TABLE", "--folds", 3, "--out", "OUT"),
    "train": ("train", "--features", "FEATURES", "--labels", "TABLE", "--out", "OUT", *QUICK),
    "crossval": ("crossval", "--features", "FEATURES", "--labels", "TABLE", "--folds", 3, "--out", "OUT", *QUICK),
    "splits": (
        "crossval", "--features", "FEATURES", "--labels", "LABELS", "--splits", "TABLE", "--out", "OUT", *QUICK
    ),
    "predict": (
        "predict", "--model", "MODEL", "--features", "FEATURES", "--patients", "TABLE", "--out", "OUT/p.csv"
    ),
    "run": ("run", "--slides", "SLIDES", "--labels", "TABLE", "--encoder", "he_texture", "--job", "OUT"),
}  # fmt: skip


def filled(command: tuple[object, ...], **places: Path) -> list[object]:
    names = sorted(places, key=len, reverse=True)
    made: list[object] = []
    for part in command:
        name = next((name for name in names if str(part).split("/")[0] == name), None)
        made.append(part if name is None else Path(str(part).replace(name, str(places[name]), 1)))
    return made


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("name", "start", "told"),
    [
        ("t.csv", EXCEL, "t.csv: is an Excel workbook; name it .xlsx"),
        ("t.tsv", OLD_EXCEL, "t.tsv: is a workbook of Excel before 2007; save it as .xlsx"),
        ("t.csv", b"PAR1", "t.csv: is a parquet file; name it .parquet"),
        (
            "t.csv",
            b"slide_id,patient_id,label\na,1,b\xc3\xb6sartig\nb,2,b\xf6sartig\n",
            "line 3 is not in UTF-8; save the table as CSV UTF-8",
        ),
        ("t.xlsx", b"slide_id,patient_id,label\n", "t.xlsx: cannot be read as a table"),
    ],
    ids=["excel", "old-excel", "parquet", "two-encodings", "text"],
)
def test_a_table_that_is_something_else_is_told_by_every_command_that_reads_one(
    request: pytest.FixtureRequest,
    refused: Run,
    cohort: Path,
    labels: Path,
    tmp_path: Path,
    reader: str,
    name: str,
    start: bytes,
    told: str,
) -> None:
    (tmp_path / name).write_bytes(start)
    command = READERS[reader]
    places = {"TABLE": tmp_path / name, "OUT": tmp_path / "out", "LABELS": labels, "SLIDES": cohort / "slides"}
    for place in ("features", "model"):
        if place.upper() in command:
            places[place.upper()] = request.getfixturevalue(place)
    assert told in refused(*filled(command, **places))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("reader", ["split", "crossval", "predict"])
def test_unicode_text_of_excel_is_a_table_to_every_command(
    run: Run, features: Path, model: Path, labels: Path, tmp_path: Path, reader: str
) -> None:
    text = labels.read_text().replace(",", "\t")
    (tmp_path / "t.txt").write_text(text, encoding="utf-16")
    places = {"TABLE": tmp_path / "t.txt", "OUT": tmp_path / "out", "FEATURES": features, "MODEL": model}
    result = run(*filled(READERS[reader], **places))
    assert result.exit_code == 0, result.output
    if reader == "predict":
        assert len(rows(tmp_path / "out/p_patients.csv")) == len({row["patient_id"] for row in rows(labels)})
    else:
        assert "classes normal (6), tumour (6)" in result.stderr


def test_a_label_for_an_unknown_slide(refused: Run, features: Path, labels: Path, run: Run, tmp_path: Path) -> None:
    lines = [*labels.read_text().splitlines()[1:], "P99,S999,tumour"]
    path = table(tmp_path / "l.csv", lines)
    arguments = ("--features", features, "--labels", path, "--out", tmp_path / "out")
    line = refused("train", *arguments, "--missing", "error")
    assert "S999" in line
    assert "--missing drop" in line
    assert not (tmp_path / "out").exists()
    assert run("train", *arguments, "--missing", "drop", *QUICK).exit_code == 0


def test_a_class_that_a_training_fold_lacks(refused: Run, features: Path, labels: Path, tmp_path: Path) -> None:
    one = [row["slide_id"] for row in rows(labels) if row["label"] == "tumour"]
    zero = [row["slide_id"] for row in rows(labels) if row["label"] == "normal"]
    splits = tmp_path / "splits"
    splits.mkdir()
    pairs = zip(zero, one, strict=True)
    (splits / "splits_0.csv").write_text("train,val,test\n" + "".join(f"{b},,{a}\n" for a, b in pairs))
    assert zero
    assert one
    arguments = ("--features", features, "--labels", labels, "--splits", splits, "--out", tmp_path / "out")
    for command in ("train", "crossval"):
        assert "no training slide of normal" in refused(command, *arguments)
        assert not (tmp_path / "out").exists()


def test_fewer_patients_than_folds(refused: Run, labels: Path, tmp_path: Path) -> None:
    line = refused("split", "--labels", labels, "--folds", 5, "--out", tmp_path / "out")
    assert "patients" in line
    assert not (tmp_path / "out").exists()


def test_splits_that_leak_a_patient(refused: Run, features: Path, labels: Path, tmp_path: Path) -> None:
    text = "train,val,test\nS000,,S001\nS002,,S003\n"
    (tmp_path / "splits_0.csv").write_text(text)
    arguments = ("--features", features, "--labels", labels, "--splits", tmp_path, "--out", tmp_path / "out")
    assert "patients in both train and test" in refused("crossval", *arguments)


def test_features_of_another_encoder(refused: Run, run: Run, model: Path, cohort: Path, tmp_path: Path) -> None:
    make_slide(tmp_path / "a.tiff", size_px0=(512, 512))
    write_bag(
        tmp_path / "other/a.h5",
        FeatureBag(np.ones((4, 16), np.float32), FeatureSpec(encoder="uni_v1", dim=16, mpp=0.5, patch_size=128), "a"),
    )
    line = refused("predict", "--model", model, "--features", tmp_path / "other", "--out", tmp_path / "p.csv")
    assert "encoder uni_v1, not he_texture" in line
    assert not (tmp_path / "p.csv").exists()
    arguments = ("--slide", tmp_path / "a.tiff", "--features", tmp_path / "other", "--out", tmp_path / "hm")
    assert "encoder uni_v1, not he_texture" in refused("heatmap", "--model", model, *arguments)
    assert not (tmp_path / "hm").exists()


def test_features_of_two_encoders_in_one_folder(refused: Run, features: Path, labels: Path, tmp_path: Path) -> None:
    for path in features.glob("*.h5"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    spec = FeatureSpec(encoder="uni_v1", dim=16, mpp=0.5, patch_size=128)
    write_bag(tmp_path / "S000.h5", FeatureBag(np.ones((4, 16), np.float32), spec, "S000"))
    line = refused("train", "--features", tmp_path, "--labels", labels, "--out", tmp_path / "out")
    assert "uni_v1" in line
    assert "he_texture" in line


def test_a_damaged_feature_file_is_a_row_with_its_reason(model: Path, features: Path, run: Run, tmp_path: Path) -> None:
    for name in ("S000.h5", "S001.h5"):
        (tmp_path / name).write_bytes((features / name).read_bytes())
    (tmp_path / "S001.h5").write_bytes((features / "S001.h5").read_bytes()[:1000])
    result = run("predict", "--model", model, "--features", tmp_path, "--out", tmp_path / "p.csv")
    assert result.exit_code == 1
    assert "failed: S001: " in result.stderr
    assert [row["status"] for row in rows(tmp_path / "p.csv")] == ["ok", "failed"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--recipe", "abmill"], "did you mean abmil"),
        (["--recipe", "missing.yaml"], "missing.yaml: cannot be read"),
        (["--task", "classify"], "did you mean classification"),
        (["--target", "grade"], "no column 'grade'"),
        (["--group", "house"], "no group named 'house'"),
        (["--missing", "ignore"], "known: drop, error"),
        (["--device", "toaster"], "toaster"),
        (["--cache-gb", "-1"], "a cache of -1 GB"),
        (["--device-cache-gb", "-1"], "a cache of -1 GB"),
        (["--precision", "fp8"], "fp8"),
        (["--set", "recipe.training.learning_rate=1"], "training named 'learning_rate'"),
        (["--set", "recipe.training.lr=-1"], "training.lr"),
        (["--set", "recipe.aggregator.name=abmill"], "did you mean abmil"),
        (["--set", "recipe.aggregator.options.gate=1"], "did you mean gated"),
        (["--set", "recipe.terms=[{name: entropy}]"], "no loss term named 'entropy'"),
        (["--set", "tiling.mpp=1"], "no option in --set tiling.mpp=1 named 'tiling'"),
        (["--splits", "nowhere"], "nowhere"),
    ],
)
def test_training_options_that_make_no_sense(
    refused: Run, features: Path, labels: Path, tmp_path: Path, arguments: list[str], told: str
) -> None:
    base = ("--features", features, "--labels", labels, "--out", tmp_path / "out")
    assert told in refused("train", *base, *arguments)
    assert not (tmp_path / "out").exists()


def test_a_fold_must_be_chosen_and_exist(
    refused: Run, cohort: Path, features: Path, labels: Path, splits: Path, tmp_path: Path
) -> None:
    base = ("--features", features, "--labels", labels, "--splits", splits, "--out", tmp_path)
    assert "choose one with --fold" in refused("train", *base)
    assert "folds 0 to 2" in refused("train", *base, "--fold", 3)
    alone = ("--features", features, "--labels", labels, "--out", tmp_path)
    assert "--fold 1 needs --splits" in refused("train", *alone, "--fold", 1)
    assert "the splits fix the number of folds" in refused("crossval", *base, "--folds", 2)
    slides = ("--slides", cohort / "slides", *base[2:6], "--job", tmp_path)
    assert "the splits fix the number of folds" in refused("run", *slides, "--folds", 2)


@pytest.mark.parametrize("arguments", [[], ["--features", "f", "--slides", "s"], ["--slides", "s"]])
def test_predict_must_know_what_to_predict(refused: Run, model: Path, tmp_path: Path, arguments: list[str]) -> None:
    assert "--job JOB" in refused("predict", "--model", model, "--out", tmp_path / "p.csv", *arguments)


def test_a_folder_that_is_no_model(refused: Run, features: Path, tmp_path: Path) -> None:
    line = refused("predict", "--model", tmp_path, "--features", features, "--out", tmp_path / "p.csv")
    assert "is not a model folder" in line
    assert "no slide in this folder" in refused("info", tmp_path)
    (tmp_path / "fold_0").mkdir()
    (tmp_path / "fold_0/model.json").write_text("{}")
    line = refused("predict", "--model", tmp_path, "--features", features, "--out", tmp_path / "p.csv")
    assert "fold_0/model.json: has schema version None" in line


def test_heatmap_formats_are_checked_before_any_work(refused: Run, model: Path, cohort: Path, tmp_path: Path) -> None:
    slide = cohort / "slides/S003.tiff"
    arguments = ("--slide", slide, "--out", tmp_path / "out", "--format", "png,jpg")
    assert "no heat-map format named 'jpg'" in refused("heatmap", "--model", model, *arguments)
    assert not (tmp_path / "out").exists()


def test_results_that_cannot_be_written(
    refused: Run, model: Path, features: Path, labels: Path, cohort: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    out = tmp_path / "file/out"
    slide = cohort / "slides/S003.tiff"
    study = ("--features", features, "--labels", labels, "--precision", "fp32", *QUICK)
    commands: list[tuple[object, ...]] = [
        ("split", "--labels", labels, "--folds", 3, "--out", out),
        ("train", *study, "--out", out),
        ("crossval", *study, "--folds", 3, "--out", out),
        ("predict", "--model", model, "--features", features, "--out", out / "p.csv"),
        ("heatmap", "--model", model, "--slide", slide, "--features", features, "--out", out),
        ("import", npz(tmp_path / "set.npz"), "--out", out),
    ]
    for command in commands:
        assert "--verbose names the folders" in refused(*command, code=3)


def test_what_import_does_not_know(refused: Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.ones(3))
    assert "instances" in refused("import", tmp_path / "x.npz", "--out", tmp_path / "out")
    assert "no such file" in refused("import", tmp_path / "missing.npz", "--out", tmp_path / "out")
