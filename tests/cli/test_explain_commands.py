"""`eosin heatmap` and `eosin counterfactual` on slides whose right answer is known, and on input that does not fit."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from shapely import box, geometry

sys.path.insert(0, str(Path(__file__).parents[1] / "heatmaps"))

from scenes import feature_bag, lattice, marked_pixels, write_slide

from eosin._files import file_fingerprint
from eosin.features._bag import FeatureBag
from eosin.features._encoders import folder_name
from eosin.features._store import read_bag, read_spec, write_bag
from eosin.heatmaps._subject import pack_bag
from eosin.mil._checkpoint import ModelCard, build_model, load_model, save_model
from eosin.mil._jury import Jury
from eosin.mil._recipe import Component, Recipe, Training
from eosin.mil.task import make_task
from eosin.pipeline._studies import StudyKey, place_study
from eosin.wsi._job import JobFolder

from .conftest import Run

DIM, TILE = 6, 20
QUICK = ("--set", "questions.rounds=3", "--set", "questions.controls=9", "--set", "questions.fractions=[0.05]")
ABMIL = {"embed_dims": (), "gated": False, "hidden": 1, "attention_bias": False}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six slides, half of them with one tile that a model calls tumour, with features, outlines and labels."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "slides").mkdir()
    (folder / "regions").mkdir()
    rows = []
    for number in range(6):
        name, is_tumour = f"s{number}", number % 2 == 0
        grid = lattice(size_px0=(320, 240), slide_mpp=0.5, patch_size=40)
        write_slide(folder / "slides" / f"{name}.tiff", marked_pixels(grid, TILE), mpp=0.5)
        features = np.random.default_rng(number).uniform(0, 0.1, size=(grid.n_tiles, DIM)).astype(np.float32)
        features[TILE] = 1.0 if is_tumour else 0.05
        spec = feature_bag(features, grid).spec
        provenance = {"input_fingerprint": file_fingerprint(folder / "slides" / f"{name}.tiff")}
        write_bag(folder / "features" / f"{name}.h5", FeatureBag(features, spec, name, grid, provenance))
        outline = {
            "type": "Feature",
            "geometry": geometry.mapping(box(*grid.boxes_px0()[TILE].tolist())),
            "properties": {"classification": {"name": "Tumor", "color": [200, 0, 0]}},
        }
        (folder / "regions" / f"{name}.geojson").write_text(json.dumps(outline))
        rows.append({"slide_id": name, "patient_id": f"p{number}", "label": "tumour" if is_tumour else "normal"})
    pd.DataFrame(rows).to_csv(folder / "labels.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def models(study: Path) -> dict[str, Path]:
    """A model that attends to large features and calls them tumour, and others with weights as they fall."""
    spec = feature_bag(np.zeros((1, DIM), np.float32), lattice(size_px0=(40, 40), slide_mpp=0.5, patch_size=40)).spec
    task = make_task("classification", [{"label": "normal"}, {"label": "tumour"}])
    made = {}
    for name, options in {"abmil": ABMIL, "mean": {"embed_dims": ()}, "gdat": {"width": 8, "heads": 2}}.items():
        recipe = Recipe(aggregator=Component(name=name, options=options), training=Training(standardize=False))
        torch.manual_seed(0)
        model = build_model(recipe, task, DIM)
        if name == "abmil":
            with torch.no_grad():
                model.attention.V.weight.fill_(1.0)
                model.attention.w.weight.fill_(6.0)
                model.classifier.weight.copy_(torch.tensor([[0.0], [10.0]]).expand(2, DIM))
                model.classifier.bias.copy_(torch.tensor([0.0, -8.0]))
        made[name] = study / "models" / name
        save_model(made[name], model, ModelCard(recipe=recipe, task=task.model_dump(mode="json"), features=spec))
    return made


def test_every_format_of_a_heat_map_is_named_and_written(
    study: Path, models: dict[str, Path], run: Run, tmp_path: Path
) -> None:
    formats = "png,geojson,tiff,scores.tiff,csv,parquet,html"
    slide = ("--slide", study / "slides/s0.tiff", "--features", study / "features", "--out", tmp_path)
    result = run("heatmap", "--model", models["abmil"], *slide, "--format", formats)
    assert f"heat maps of 1 slide: open {tmp_path.name}" in result.stderr
    assert result.exit_code == 0, result.output
    assert [Path(line).name for line in result.stdout.splitlines()] == [
        f"s0_alone.{name}" for name in formats.split(",")
    ]
    assert pd.read_parquet(tmp_path / "s0_alone.parquet").effect.idxmax() == TILE


def test_model_without_attention_is_drawn_by_the_evidence_of_its_tiles(
    study: Path, models: dict[str, Path], run: Run, tmp_path: Path
) -> None:
    slide = ("--slide", study / "slides/s0.tiff", "--features", study / "features", "--out", tmp_path)
    result = run("heatmap", "--model", models["mean"], *slide, "--format", "png,csv")
    assert result.exit_code == 0, result.output
    assert [Path(line).name for line in result.stdout.splitlines()] == ["s0_alone.png", "s0_alone.csv"]


def test_maps_can_be_chosen(study: Path, models: dict[str, Path], run: Run, refused: Run, tmp_path: Path) -> None:
    base = ("--slide", study / "slides/s0.tiff", "--features", study / "features", "--out", tmp_path)
    result = run("heatmap", "--model", models["gdat"], *base, "--format", "csv", "--maps", "rollout,gradient")
    assert result.exit_code == 0, result.output
    columns = pd.read_csv(tmp_path / "s0_rollout.csv").columns
    assert {column.split("_")[0] for column in columns[3:]} == {"rollout", "gradient"}
    assert "no map named 'saliency'" in refused("heatmap", "--model", models["gdat"], *base, "--maps", "saliency")
    assert "has no attention" in refused("heatmap", "--model", models["mean"], *base, "--maps", "attention")


def test_tiles_of_another_slide_are_added(study: Path, models: dict[str, Path], run: Run, tmp_path: Path) -> None:
    result = run(
        "counterfactual", "--model", models["abmil"], "--features", study / "features/s1.h5", "--out", tmp_path,
        "--class", "tumour", "--donor", study / "features/s0.h5", "--donor-regions", study / "regions/s0.geojson",
        "--donor-slide", study / "slides/s0.tiff", "--region-class", "Tumor", "--format", "csv,parquet,figure.png,html",
        *QUICK,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "s1_counterfactual.csv")
    pd.testing.assert_frame_equal(
        table, pd.read_parquet(tmp_path / "s1_counterfactual.parquet"), rtol=1e-8, check_dtype=False
    )
    added = table[table.kind == "add"].set_index("tiles")
    assert set(added.index) == {"5 % most attended tiles of s0", "tiles in Tumor of s0"}
    assert (added.probability_before < 0.5).all()
    assert (added.probability_after > 0.5).all()
    assert (added.n_controls == 9).all()
    page = (tmp_path / "s1_counterfactual.html").read_text(encoding="utf-8")
    assert "With the tiles in Tumor of s0 added (1) the model now says tumour" in page


@pytest.mark.parametrize("direction", ["min", "max", "least"])
def test_searches_in_every_direction(
    study: Path, models: dict[str, Path], run: Run, tmp_path: Path, direction: str
) -> None:
    arguments = (
        "--model",
        models["abmil"],
        "--features",
        study / "features/s0.h5",
        "--out",
        tmp_path,
        "--format",
        "csv",
    )
    chosen = ("--set", f"questions.direction={direction}", "--set", "questions.on=probability")
    result = run("counterfactual", *arguments, *QUICK, *chosen)
    assert result.exit_code == 0, result.output
    rows = pd.read_csv(tmp_path / "s0_counterfactual.csv").set_index("tiles")
    change = rows.change["tiles of the search"]
    assert {"min": change < -1, "max": change > 0, "least": abs(change) < 0.5}[direction]
    assert ("best set of the search's size" in rows.index) == (direction != "least")
    assert ("smallest necessary set" in rows.index) == (direction == "min")
    assert rows.n_tiles["smallest sufficient set"] == 1
    assert rows.kind["smallest sufficient set"] == "keep only"


def test_cohort_gives_tables_tests_and_one_report(
    study: Path, models: dict[str, Path], run: Run, tmp_path: Path
) -> None:
    result = run(
        "counterfactual", "--model", models["abmil"], "--features", study / "features", "--labels",
        study / "labels.csv", "--slide", study / "slides", "--regions", study / "regions", "--region-class", "Tumor",
        "--class", "tumour", "--donor", study / "features/s0.h5", "--out", tmp_path, "--format",
        "csv,parquet,html,geojson,png", *QUICK,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert [Path(line).name for line in result.stdout.splitlines()] == [
        "interventions.csv", "cohort.csv", "interventions.parquet", "cohort.parquet", "report.html",
    ]  # fmt: skip
    cohort = pd.read_csv(tmp_path / "cohort.csv").set_index(["kind", "what"])
    region = cohort.loc["remove", "tiles in Tumor"]
    assert (region.n_slides, region.n_patients) == (6, 6)
    assert (region.sensitivity_before, region.sensitivity_after) == (1, 0)
    assert (region.specificity_before, region.specificity_after) == (1, 1)
    assert -1 <= region.sensitivity_change_low < region.sensitivity_change_high < 0.5  # three patients prove little
    assert region.change_over_random < 0
    added = cohort.loc["add", "5 % most attended tiles of s0"]
    assert added.n_slides == 5  # not to itself
    assert added.specificity_after == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Without the tiles in Tumor (1) the model no longer says tumour" in page
    assert "sensitivity 1.00 → 0.00" in page
    assert len(list((tmp_path / "slides").glob("*.geojson"))) == len(list((tmp_path / "slides").glob("*.png"))) == 6


def test_a_cohort_that_was_asked_is_not_asked_again_and_damaged_answers_are(
    study: Path, models: dict[str, Path], run: Run, tmp_path: Path
) -> None:
    asked = (
        "counterfactual", "--model", models["abmil"], "--features", study / "features", "--class", "tumour",
        "--out", tmp_path, "--format", "csv", "--set", "questions.rounds=3", "--set", "questions.controls=4",
        "--set", "questions.shuffles=2",
    )  # fmt: skip

    def ask(*more: object) -> tuple[list[bytes], dict[str, int]]:
        assert run(*asked, *more).exit_code == 0
        tables = [(tmp_path / name).read_bytes() for name in ("cohort.csv", "interventions.csv")]
        return tables, {path.name: path.stat().st_mtime_ns for path in (tmp_path / "slides").glob("*_answers.json")}

    tables, written = ask()
    assert len(written) == 6
    assert ask() == (tables, written)
    note = tmp_path / "slides/s3_answers.json"
    note.write_text(note.read_text(encoding="utf-8").replace('"n_tiles": 1', '"n_tiles": 2', 1), encoding="utf-8")
    again = ask()
    assert again[0] == tables
    assert {name for name, at in again[1].items() if at != written[name]} == {note.name}
    assert not set(ask("--set", "questions.seed=1")[1].items()) & set(written.items())


def test_one_bad_slide_of_a_cohort_is_listed(study: Path, models: dict[str, Path], run: Run, tmp_path: Path) -> None:
    features = tmp_path / "features"
    features.mkdir()
    for path in (study / "features").glob("*.h5"):
        (features / path.name).write_bytes(path.read_bytes())
    (features / "s1.h5").write_bytes(b"broken")
    base = ("--model", models["abmil"], "--features", features, "--class", "tumour", "--out", tmp_path / "out")
    result = run("counterfactual", *base, "--format", "csv", *QUICK, "--set", "questions.shuffles=3")
    assert result.exit_code == 1
    assert "failed: s1:" in result.stderr
    assert set(pd.read_csv(tmp_path / "out/interventions.csv").slide) == {"s0", "s2", "s3", "s4", "s5"}
    cohort = pd.read_csv(tmp_path / "out/cohort.csv")
    assert cohort.sensitivity_before.isna().all()
    assert cohort.p.isna().all()  # the model chose all of these tiles
    assert cohort.p_shuffled.isin([0.25, 0.5, 0.75, 1]).all()
    assert (cohort.p_shuffled_adjusted >= cohort.p_shuffled).all()


def bad_region(kind: str) -> Any:
    shapes = {
        "outside": [[9000, 9000], [9100, 9000], [9100, 9100], [9000, 9100], [9000, 9000]],
        "self-intersecting": [[0, 0], [300, 200], [300, 0], [0, 200], [0, 0]],
        "damaged": [[0, 0], ["x", 1]],
        "not finite": [[0, 0], [1e999, 0], [5, 5], [0, 0]],
    }
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [shapes[kind]]}, "properties": {}}


@pytest.mark.parametrize(
    ("kind", "told"), [("outside", "outside the slide"), ("damaged", "damaged"), ("not finite", "geojson")]
)
def test_regions_that_cannot_be_used(
    study: Path, models: dict[str, Path], refused: Run, tmp_path: Path, kind: str, told: str
) -> None:
    (tmp_path / "a.geojson").write_text(json.dumps(bad_region(kind)))
    base = ("--model", models["abmil"], "--features", study / "features/s0.h5", "--out", tmp_path / "out", *QUICK)
    assert told in refused("counterfactual", *base, "--regions", tmp_path / "a.geojson")
    assert not (tmp_path / "out").exists()


def test_region_that_crosses_itself_is_repaired(study: Path, models: dict[str, Path], run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.geojson").write_text(json.dumps(bad_region("self-intersecting")))
    base = ("--model", models["abmil"], "--features", study / "features/s0.h5", "--out", tmp_path, "--format", "csv")
    result = run("counterfactual", *base, *QUICK, "--regions", tmp_path / "a.geojson")
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "s0_counterfactual.csv")
    assert (table[table.tiles == "annotated tiles"].n_tiles > 5).all()


def changed(study: Path, path: Path, **changes: Any) -> Path:
    """Write the features of s0 with something that does not fit."""
    grid = changes.get("grid", lattice(size_px0=changes.get("size", (320, 240)), slide_mpp=0.5, patch_size=40))
    grid = grid.select(np.arange(changes.get("tiles", grid.n_tiles)))
    features = np.random.default_rng(0).random((grid.n_tiles, changes.get("dim", DIM))).astype(np.float32)
    spec = feature_bag(features, grid).spec.model_copy(update={"encoder": changes.get("encoder", "test")})
    provenance = {"input_fingerprint": changes.get("fingerprint", "")}
    write_bag(path, FeatureBag(features, spec, "s0", grid, provenance))
    return path


@pytest.mark.parametrize(
    ("changes", "command", "told"),
    [
        ({"encoder": "other"}, "heatmap", "encoder other"),
        ({"encoder": "other"}, "counterfactual", "encoder other"),
        ({"dim": 9}, "heatmap", "9"),
        ({"dim": 9}, "counterfactual", "9"),
        ({"size": (640, 240)}, "heatmap", "pass the slide that they came from"),
        ({"size": (640, 240)}, "counterfactual", "pass the slide that they came from"),
        ({"fingerprint": "0" * 64}, "heatmap", "another file"),
        ({"fingerprint": "0" * 64}, "counterfactual", "another file"),
        ({"tiles": 1}, "counterfactual", "at least two tiles, the slide has 1"),
        ({"tiles": 0}, "counterfactual", "no tiles"),
    ],
)
def test_features_that_do_not_fit_are_refused_in_one_line(
    study: Path, models: dict[str, Path], refused: Run, tmp_path: Path, changes: dict[str, Any], command: str, told: str
) -> None:
    features = changed(study, tmp_path / "s0.h5", **changes)
    base = ("--model", models["abmil"], "--slide", study / "slides/s0.tiff", "--features", features)
    assert told in refused(command, *base, "--out", tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


def test_a_slide_without_tiles_is_no_failure_and_one_tile_is_a_map(
    study: Path, models: dict[str, Path], run: Run, tmp_path: Path
) -> None:
    base = ("--model", models["abmil"], "--slide", study / "slides/s0.tiff", "--out", tmp_path / "out")
    empty = run("heatmap", *base, "--features", changed(study, tmp_path / "empty.h5", tiles=0), "--format", "csv")
    assert empty.exit_code == 0, empty.output
    assert "1 empty" in empty.stderr
    one = run("heatmap", *base, "--features", changed(study, tmp_path / "one.h5", tiles=1), "--format", "csv,png,html")
    assert one.exit_code == 0, one.output
    assert pd.read_csv(tmp_path / "out/s0_alone.csv").attention.tolist() == [1.0]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--class", "stroma"), "stroma"),
        ((), "one class for all slides"),
        (("--class", "tumour", "--regions", "labels.csv"), "folder of <slide>.geojson"),
        (("--class", "tumour", "--format", "docx"), "docx"),
        (
            ("--class", "tumour", "--donor", "features/s0.h5", "--donor-regions", "a", "--donor-regions", "b"),
            "2 --donor-regions",
        ),
        (("--class", "tumour", "--donor", "nowhere.h5"), "nowhere.h5"),
        (("--class", "tumour", "--set", "questions.direction=up"), "direction"),
        (("--class", "tumour", "--set", "questions.fractions=[1.5]"), "fractions"),
    ],
)
def test_cohort_questions_that_make_no_sense(
    study: Path, models: dict[str, Path], refused: Run, tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    placed = [study / part if part in ("labels.csv", "features/s0.h5") else part for part in arguments]
    base = ("--model", models["abmil"], "--features", study / "features", "--out", tmp_path / "out")
    assert told in refused("counterfactual", *base, *placed)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def crossval(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folds: the first was trained on s0, s1 and s2, the second on s3 and chosen by s4; nobody has seen s5."""
    folder = tmp_path_factory.mktemp("crossval")
    for number, seen in enumerate((("s0,p0,train", "s1,p1,train", "s2,p2,train"), ("s3,p3,train", "s4,p4,val"))):
        model, card = load_model(models["abmil"])
        with torch.no_grad():
            model.classifier.bias[1] -= number
        save_model(folder / f"fold_{number}", model, card)
        (folder / f"fold_{number}/seen.csv").write_text("\n".join(("slide_id,patient_id,part", *seen)) + "\n")
    return folder


def test_maps_of_a_crossval_are_those_of_the_fold_that_has_not_seen_the_slide(
    study: Path, crossval: Path, run: Run, tmp_path: Path
) -> None:
    common = ("--features", study / "features", "--out", tmp_path / "out", "--format", "html,csv,png")
    result = run("heatmap", "--model", crossval, "--slides", study / "slides", *common)
    assert result.exit_code == 0, result.output
    assert "warning" not in result.stderr
    pages = {path.name[:2]: path.read_text(encoding="utf-8") for path in (tmp_path / "out").glob("*.html")}
    assert all("Answered by: out-of-fold: fold_1." in pages[name] for name in ("s0", "s1", "s2"))
    assert all("Answered by: out-of-fold: fold_0." in pages[name] for name in ("s3", "s4"))
    assert "Answered by: mean of all 2 models." in pages["s5"]
    shutil.rmtree(tmp_path / "out")
    result = run("heatmap", "--model", crossval / "fold_1", "--slides", study / "slides", *common)
    assert "1 of 6 slides, or their patients, trained the model that answers for them: s3" in result.stderr
    assert "1 of 6 slides, or their patients, chose the model that answers for them: s4" in result.stderr
    pages = {path.name[:2]: path.read_text(encoding="utf-8") for path in (tmp_path / "out").glob("*.html")}
    assert "Caution: the model was trained on this slide" in pages["s3"]
    assert "Caution" not in pages["s5"]


def test_what_ifs_over_slides_that_a_model_has_seen_say_so_beside_the_numbers(
    study: Path, crossval: Path, run: Run, tmp_path: Path
) -> None:
    common = ("--features", study / "features", "--labels", study / "labels.csv", "--class", "tumour", *QUICK)
    result = run("counterfactual", "--model", crossval / "fold_0", *common, "--format", "csv,html", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "3 of 6 slides, or their patients, trained the model" in result.stderr
    cohort = pd.read_csv(tmp_path / "cohort.csv").set_index(["slides", "kind", "what"])
    top = ("remove", "5 % most attended tiles")
    assert (cohort.n_slides[("all", *top)], cohort.n_seen[("all", *top)]) == (6, 3)
    assert (cohort.n_slides[("unseen", *top)], cohort.n_seen[("unseen", *top)]) == (3, 0)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "6 (3 of 6 slides seen in training)" in page
    assert "slides new to the model alone" in page
    said = pd.read_csv(tmp_path / "interventions.csv").groupby("slide").seen.first()
    assert dict(said) == {"s0": "trained", "s1": "trained", "s2": "trained", "s3": "no", "s4": "no", "s5": "no"}
    result = run("counterfactual", "--model", crossval, *common, "--format", "csv", "--out", tmp_path / "cv")
    assert "warning" not in result.stderr
    rows = pd.read_csv(tmp_path / "cv/interventions.csv")
    assert set(rows.seen) == {"no"}
    assert dict(rows.groupby("slide").answered_by.first())["s4"] == "out-of-fold: fold_0"
    assert set(pd.read_csv(tmp_path / "cv/cohort.csv").slides) == {"all"}


def test_a_what_if_of_one_slide_says_what_its_model_has_seen(
    study: Path, crossval: Path, run: Run, tmp_path: Path
) -> None:
    result = run(
        "counterfactual", "--model", crossval / "fold_0", "--features", study / "features/s0.h5", "--out", tmp_path,
        "--format", "csv,html", *QUICK,
    )  # fmt: skip
    assert "trained the model that answers for them: s0" in result.stderr
    assert set(pd.read_csv(tmp_path / "s0_counterfactual.csv").seen) == {"trained"}
    assert "Caution: the model was trained on this slide" in (tmp_path / "s0_counterfactual.html").read_text()


def test_donors_that_a_model_has_seen_are_named_beside_the_numbers(
    study: Path, crossval: Path, run: Run, tmp_path: Path
) -> None:
    donors = ("--donor", study / "features/s0.h5", "--donor", study / "features/s4.h5")
    common = ("--model", crossval / "fold_0", *donors, *QUICK, "--format", "csv,html")
    one = tmp_path / "one"
    result = run("counterfactual", *common, "--features", study / "features/s5.h5", "--out", one)
    assert result.exit_code == 0, result.output
    told = (
        "donors that, or whose patients, trained the model that is asked, so the effect of their tiles flatters it: s0"
    )
    assert f"warning: {told}" in result.stderr
    assert f"Caution: {told}." in (one / "s5_counterfactual.html").read_text(encoding="utf-8")
    table = pd.read_csv(one / "s5_counterfactual.csv", keep_default_na=False).set_index("tiles").donor_seen
    assert table["5 % most attended tiles of s0"] == "trained"
    assert table["5 % most attended tiles of s4"] == "no"
    assert set(table["5 % most attended tiles"]) == {""}
    every = tmp_path / "every"
    cohort = ("--features", study / "features", "--class", "tumour")
    result = run("counterfactual", *common, *cohort, "--set", "questions.shuffles=2", "--out", every)
    assert result.exit_code == 0, result.output
    assert told in result.stderr
    assert told in (every / "report.html").read_text(encoding="utf-8")
    rows = pd.read_csv(every / "cohort.csv").set_index(["slides", "what"]).donor_seen
    assert rows["all", "5 % most attended tiles of s0"] == "trained"
    rows = pd.read_csv(every / "interventions.csv", keep_default_na=False)
    assert set(rows[rows.tiles.str.endswith("of s0")].donor_seen) == {"trained"}
    # of a cross-validation s0 trained the fold that answers for s4, and not the one that answers for s1
    result = run("counterfactual", *common[2:], *cohort, "--set", "questions.shuffles=2", "--model", crossval,
                 "--out", tmp_path / "folds")  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = pd.read_csv(tmp_path / "folds/interventions.csv", keep_default_na=False)
    seen = rows[rows.tiles.str.endswith("of s0")].groupby("slide").donor_seen.first()
    assert (seen["s4"], seen["s1"]) == ("trained", "no")


def test_a_committee_says_the_mean_of_its_models(study: Path, crossval: Path) -> None:
    jury = Jury.open([crossval], device="cpu")
    asked = jury.ask("s5")
    bag = pack_bag(asked.model, read_bag(study / "features/s5.h5"))
    with torch.no_grad():
        each = [model(bag) for model in jury.ensemble.models]
        together = asked.model(bag)
    np.testing.assert_allclose(
        together.logits.softmax(1), torch.stack([one.logits.softmax(1) for one in each]).mean(0), atol=1e-6
    )
    weights = torch.stack([one.scores.softmax(0).mean(1) for one in each]).mean(0)
    np.testing.assert_allclose(together.scores.softmax(0)[:, 0], weights, atol=1e-6)
    assert asked.card.model_id not in {card.model_id for card in jury.ensemble.cards}


def test_the_viewer_says_whether_its_model_has_seen_a_slide(
    study: Path, crossval: Path, run: Run, tmp_path: Path
) -> None:
    common = ("--features", study / "features", "--slides", study / "slides/s3.tiff", "--html")
    result = run("view", "--model", crossval / "fold_1", *common, tmp_path / "seen.html")
    assert "trained the model that answers for them: s3" in result.stderr
    assert "Caution: the model was trained on this slide" in (tmp_path / "seen.html").read_text()
    assert run("view", "--model", crossval, *common, tmp_path / "new.html").exit_code == 0
    page = (tmp_path / "new.html").read_text()
    assert "Answered by: out-of-fold: fold_0." in page
    assert "Caution" not in page


@pytest.fixture(scope="module")
def finished_job(study: Path, crossval: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `eosin run` leaves behind: two studies, the newer with the cross-validation, and their features."""
    job = JobFolder(tmp_path_factory.mktemp("run") / "job")
    for name in ("first", "newer"):
        begun = place_study(job, StudyKey(name, {}, "tiles", "features", "planted"), name)
        begun.begin()
        (begun.path / "model").mkdir()
        (begun.path / "model/model.json").write_text("{}")
    shutil.copytree(crossval, begun.path / "crossval")
    (begun.path / "crossval/metrics.json").write_text("{}")
    encoder = folder_name(read_spec(study / "features/s0.h5").encoder)
    shutil.copytree(study / "features", job.root / f"tiles/features_{encoder}")
    return job.root


@pytest.mark.long
def test_a_job_stands_where_a_model_does_with_the_folds_and_features_of_its_newest_study(
    study: Path, finished_job: Path, run: Run, refused: Run, tmp_path: Path
) -> None:
    slides = ("--slides", study / "slides")
    viewed = run("view", finished_job, *slides, "--html", tmp_path / "v.html")
    assert viewed.exit_code == 0, viewed.output
    assert "6 slides: 6 ok" in viewed.stderr
    page = (tmp_path / "v.html").read_text()
    assert "out-of-fold: fold_1" in page
    assert "mean of all 2 models" in page
    one = ("--slides", study / "slides/s3.tiff")
    for model in (finished_job / "studies/newer", finished_job / "studies/newer/crossval"):
        assert run("view", model, *one, "--html", tmp_path / "v.html").exit_code == 0
    mapped = run("heatmap", "--model", finished_job, *one, "--out", tmp_path / "h", "--format", "html")
    assert "model: the cross-validation of study newer" in mapped.stderr
    assert "out-of-fold: fold_0" in (tmp_path / "h/s3_alone.html").read_text(encoding="utf-8")
    said = run("predict", "--model", finished_job, "--features", study / "features", "--out", tmp_path / "p.csv")
    assert said.exit_code == 0, said.output
    answered = pd.read_csv(tmp_path / "p.csv").set_index("slide_id").answered_by
    assert dict(answered) == {
        **dict.fromkeys(("s0", "s1", "s2"), "out-of-fold: fold_1"),
        **dict.fromkeys(("s3", "s4"), "out-of-fold: fold_0"),
        "s5": "mean of all 2 models",
    }
    asked = (
        "--model",
        finished_job,
        "--features",
        study / "features/s4.h5",
        "--out",
        tmp_path / "c",
        "--format",
        "csv",
    )
    assert run("counterfactual", *asked, *QUICK).exit_code == 0
    assert set(pd.read_csv(tmp_path / "c/s4_counterfactual.csv").seen) == {"no"}
    shutil.rmtree(finished_job / "tiles")
    assert "found none; pass --features" in refused("view", finished_job, *slides, "--html", tmp_path / "v.html")


@pytest.mark.parametrize("kind", ["regression", "ordinal", "multilabel", "survival", "cox"])
def test_folds_of_every_task_answer_together_in_maps_and_in_the_viewer(
    study: Path, run: Run, refused: Run, tmp_path: Path, kind: str
) -> None:
    """Two folds of a task, with their own scales: the page says the mean that the table of predictions has."""
    spec = read_spec(study / "features/s0.h5")
    tables = {"label": "1 2 3 2 1 3", "time": "1 2 3 4 5 6", "event": "1 0 1 1 1 1", "er": "0 1 0 1 0 1"}
    rows = [
        dict(zip(tables, row, strict=True)) for row in zip(*(text.split() for text in tables.values()), strict=True)
    ]
    target = {"survival": "time,event", "cox": "time,event", "multilabel": "er,event"}.get(kind, "label")
    posed = make_task(kind, rows, target=target)
    for number in range(2):
        task = posed.fit_to(posed.encode(rows[number:]))
        torch.manual_seed(number)
        recipe = Recipe(aggregator=Component(name="abmil"), training=Training(standardize=False))
        model = build_model(recipe, task, DIM)
        folder = tmp_path / f"cv/fold_{number}"
        save_model(folder, model, ModelCard(recipe=recipe, task=task.model_dump(mode="json"), features=spec))
        (folder / "seen.csv").write_text(f"slide_id,patient_id,part\nt{number},q{number},train\n")
    given = ("--model", tmp_path / "cv", "--features", study / "features")
    slide = ("--slides", study / "slides/s5.tiff")
    assert run("predict", *given, "--out", tmp_path / "p.csv").exit_code == 0
    row = pd.read_csv(tmp_path / "p.csv").set_index("slide_id").loc["s5"]
    drawn = run("heatmap", *given, *slide, "--out", tmp_path, "--format", "html")
    assert drawn.exit_code == 0, drawn.output
    (page,) = tmp_path.glob("s5_*.html")
    said = row["risk"] if "risk" in row else row.get("prob_er", row.get("prob_1", row.get("predicted")))
    assert f"{float(said):.3f}" in page.read_text(encoding="utf-8")
    viewed = run("view", *given, *slide, "--html", tmp_path / "v.html")
    assert viewed.exit_code == 0, viewed.output
    assert "mean of all 2 models" in (tmp_path / "v.html").read_text(encoding="utf-8")
    for features in ("features", "features/s5.h5"):
        asked = ("--model", tmp_path / "cv", "--features", study / features, "--class", "x", "--out", tmp_path / "c")
        told = refused("counterfactual", *asked)
        assert f"counterfactuals need a model of classes; this model has the task {kind}" in told


def test_figures_of_an_external_cohort_are_over_slides_that_the_models_have_not_seen(
    study: Path, crossval: Path, run: Run, refused: Run, tmp_path: Path
) -> None:
    """The truth is turned for s4 and s5, so that rates over all slides and over unseen ones differ."""
    words = {
        "s0": "TUMOUR",
        "s1": "Normal ",
        "s2": "Tumour",
        "s3": "normal",
        "s4": "normal",
        "s5": "tumour",
        "s9": "normal",
    }
    lines = [f"{slide}.tiff,p{slide[1]},{word}" for slide, word in words.items()]
    table = tmp_path / "external.csv"
    table.write_text("\n".join(("Slide,Patient,Befund", *lines)) + "\n")
    given = ("predict", "--features", study / "features", "--labels", table)
    fold = ("--model", crossval / "fold_0", "--out", tmp_path / "p.csv")
    assert "is in 'label', which the table of labels does not have; it has Befund" in refused(*given, *fold)
    aimed = (*given, "--target", "Befund", *fold)
    result = run(*aimed)
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "p_metrics.json").read_text())
    assert told["seen"] == {"trained": 3, "validated": 0, "unknown": 0, "no": 3}
    # s3 is right; s4 is called tumour and s5 normal
    assert [told["metrics"][name]["value"] for name in ("accuracy", "sensitivity", "specificity")] == [1 / 3, 0, 0.5]
    over = "3 slides of 3 patients that the models have not seen"
    assert told["over"] == over
    assert f"figures over {over}: " in result.stderr
    assert "Specificity 0.500" in result.stderr
    page = (tmp_path / "p_report.html").read_text(encoding="utf-8")
    assert over in page
    assert [Path(line).name for line in result.stdout.splitlines()] == ["p.csv", "p_metrics.json", "p_report.html"]
    losses = pd.read_csv(tmp_path / "p_cohort.csv").set_index("slide_id")
    assert set(losses[losses.used == 1].index) == {"s3", "s4", "s5"}
    assert losses.reason["s0"] == "has shaped the model that answers"
    assert losses.reason["s9"] == "has no slide or feature file"
    everyone = run(*aimed, "--with-seen")
    assert "3 slides, or their patients, have shaped the models; figures with them are too good" in everyone.stderr
    told = json.loads((tmp_path / "p_metrics.json").read_text())
    assert told["metrics"]["accuracy"]["value"] == 4 / 6
    assert told["over"] == "6 slides of 6 patients (3 of the slides have shaped the models)"
    # of a cross-validation, folds answer that have not seen the slide
    run(*given, "--target", "Befund", "--model", crossval, "--out", tmp_path / "cv.csv")
    assert json.loads((tmp_path / "cv_metrics.json").read_text())["seen"]["no"] == 6
    table.write_text("Slide,Befund\ns3,benign\ns4,tumour\n")
    assert "'benign' in column 'label' is not one of the classes normal, tumour" in refused(*aimed)
    assert "pass --labels, too" in refused("predict", "--features", study / "features", *fold, "--with-seen")


def test_survival_of_an_external_cohort_is_read_as_its_own_table_says(
    study: Path, run: Run, refused: Run, tmp_path: Path
) -> None:
    recipe = Recipe(aggregator=Component(name="abmil"), training=Training(standardize=False))
    rows = [{"time": str(n + 1), "event": str(n % 2)} for n in range(6)]
    posed = make_task("cox", rows, target="time,event")
    task = posed.fit_to(posed.encode(rows))
    torch.manual_seed(0)
    model = build_model(recipe, task, DIM)
    spec = read_spec(study / "features/s0.h5")
    save_model(tmp_path / "m", model, ModelCard(recipe=recipe, task=task.model_dump(mode="json"), features=spec))
    table = tmp_path / "external.csv"
    given = ("predict", "--model", tmp_path / "m", "--features", study / "features", "--labels", table)
    values = {}
    for name, ones in {"death": 1, "alive": 0}.items():
        lines = [f"s{n},{n + 1},{ones if n % 2 else 1 - ones}" for n in range(6)]
        table.write_text("\n".join((f"slide,months,{name}", *lines)))
        result = run(*given, "--target", f"months,{name}", "--out", tmp_path / f"{name}.csv")
        assert result.exit_code == 0, result.output
        assert "each slide counts as a patient" in result.stderr
        assert "6 slides may be among them" in result.stderr
        values[name] = json.loads((tmp_path / f"{name}_metrics.json").read_text())["metrics"]["cindex"]["value"]
    assert values["death"] == values["alive"] is not None
