"""A file with two slides in it, through every command that opens slides."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from PIL import Image

from eosin.features._store import read_bag
from eosin.mil._checkpoint import ModelCard, build_model, save_model
from eosin.mil._recipe import Component, Recipe, Training
from eosin.mil.task import make_task
from eosin.wsi._synthetic import Cohort, make_cohort

from .conftest import Run

TILES = ("--patch-size", 64)
QUICK = ("--set", "questions.rounds=2", "--set", "questions.controls=5", "--set", "questions.fractions=[0.05]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Path:
    """Two painted slides of different sizes in each of two files, tiled and encoded as four slides, and a model."""
    folder = tmp_path_factory.mktemp("scenes")
    make_cohort(folder / "painted", Cohort(n_slides=2, size_um=(250.0, 300.0)))
    one, two = (tifffile.imread(path)[:, :, :3] for path in sorted((folder / "painted/slides").iterdir()))
    (folder / "slides").mkdir()
    for name, pictures in {"a": (one[:512, :448], two), "b": (two[:, ::-1], one[:512, :448])}.items():
        with tifffile.TiffWriter(folder / f"slides/{name}.ome.tif", ome=True) as tiff:
            for picture in pictures:
                metadata = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
                tiff.write(np.ascontiguousarray(picture), photometric="rgb", tile=(128, 128), metadata=metadata)
    slides = (folder / "slides", "--job", folder / "job", "--scene", "all")
    assert run("tile", *slides, *TILES).exit_code == 0
    assert run("extract", *slides, "--encoder", "he_texture").exit_code == 0
    recipe = Recipe(aggregator=Component(name="abmil", options={"hidden": 2}), training=Training(standardize=False))
    task = make_task("classification", [{"label": "normal"}, {"label": "tumour"}])
    spec = read_bag(features(folder) / "a_scene1.h5").spec
    torch.manual_seed(0)
    card = ModelCard(recipe=recipe, task=task.model_dump(mode="json"), features=spec)
    save_model(folder / "model", build_model(recipe, task, spec.dim), card)
    return folder


def features(folder: Path) -> Path:
    (found,) = (folder / "job").glob("*/features_*")
    return found


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def test_all_scenes_are_slides_of_their_own(folder: Path) -> None:
    bags = {path.stem: read_bag(path) for path in features(folder).glob("*.h5")}
    assert sorted(bags) == ["a_scene1", "a_scene2", "b_scene1", "b_scene2"]
    assert bags["a_scene1"].grid.slide_size_px0 == (448, 512) == bags["b_scene2"].grid.slide_size_px0
    # the same pixels in two files, as another scene of each
    assert np.array_equal(np.asarray(bags["a_scene1"].features), np.asarray(bags["b_scene2"].features))


def test_predictions_of_all_scenes_and_of_one(folder: Path, run: Run, tmp_path: Path) -> None:
    base = ("predict", "--model", folder / "model", "--slides", folder / "slides")
    assert run(*base, "--job", tmp_path / "job", "--scene", "all", "--out", tmp_path / "all.csv").exit_code == 0
    assert run(*base, "--job", tmp_path / "one", "--scene", 1, "--out", tmp_path / "one.csv").exit_code == 0
    everything = pd.read_csv(tmp_path / "all.csv").set_index("slide_id").prob_tumour
    first = pd.read_csv(tmp_path / "one.csv").set_index("slide_id").prob_tumour
    assert list(everything.index) == ["a_scene1", "a_scene2", "b_scene1", "b_scene2"]
    assert everything["a_scene1"] == everything["b_scene2"] != everything["a_scene2"]
    assert (first["a"], first["b"]) == (everything["a_scene1"], everything["b_scene1"])


def test_maps_and_questions_are_drawn_on_the_scene_of_the_features(folder: Path, run: Run, tmp_path: Path) -> None:
    whole = ("--model", folder / "model", "--slides", folder / "slides/a.ome.tif", "--scene", "all")
    drawn = run("heatmap", *whole, "--features", features(folder), "--format", "png", "--out", tmp_path)
    assert drawn.exit_code == 0, drawn.output
    shapes = [size_of(path) for path in sorted(tmp_path.glob("a_scene?_*.png"))]
    assert len(shapes) == 2
    assert shapes[0] != shapes[1]
    asked = run(
        "counterfactual", *whole, "--features", features(folder) / "a_scene2.h5", "--out", tmp_path / "asked", *QUICK
    )
    assert asked.exit_code == 0, asked.output
    page = run("view", *whole, "--features", features(folder), "--html", tmp_path / "page.html")
    assert page.exit_code == 0, page.output
    text = (tmp_path / "page.html").read_text()
    assert "a_scene1" in text
    assert "a_scene2" in text


def test_the_features_of_one_scene_are_refused_on_another(folder: Path, refused: Run, tmp_path: Path) -> None:
    refused(
        "counterfactual", "--model", folder / "model", "--features", features(folder) / "a_scene1.h5",
        "--slides", folder / "slides/a.ome.tif", "--scene", 2, "--out", tmp_path,
    )  # fmt: skip


def test_a_run_of_all_scenes_finds_their_labels(folder: Path, run: Run, tmp_path: Path) -> None:
    rows = [f"{name}_scene{number},{name}{number},{'xy'[number - 1]}" for name in "abc" for number in (1, 2)]
    (tmp_path / "labels.csv").write_text("slide,patient,label\n" + "\n".join(rows) + "\n")
    shutil.copy(folder / "slides/a.ome.tif", tmp_path / "c.ome.tif")
    slides = ("--slides", folder / "slides", "--slides", tmp_path / "c.ome.tif")
    base = ("check", *slides, "--labels", tmp_path / "labels.csv", "--job", tmp_path / "job")
    result = run(*base, "--folds", 2, "--scene", "all")
    assert result.exit_code == 0, result.output
    result = run(*base, "--folds", 2, "--scene", "both")
    assert result.exit_code == 2
    assert "--scene both: expected all or a number" in result.stderr


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory, run: Run, folder: Path) -> Path:
    """Two slides of equal size in one file, the second of them tiled and encoded."""
    twins = tmp_path_factory.mktemp("twins")
    picture = tifffile.imread(folder / "slides/a.ome.tif", series=1)
    with tifffile.TiffWriter(twins / "t.ome.tif", ome=True) as tiff:
        for turned in (picture, picture[:, ::-1]):
            metadata = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
            tiff.write(np.ascontiguousarray(turned), photometric="rgb", tile=(128, 128), metadata=metadata)
    slides = (twins / "t.ome.tif", "--job", twins / "job", "--scene", 2)
    assert run("tile", *slides, *TILES).exit_code == 0
    assert run("extract", *slides, "--encoder", "he_texture").exit_code == 0
    return twins


def test_tiles_and_features_of_one_scene_are_refused_on_another_of_its_size(
    twins: Path, folder: Path, run: Run, tmp_path: Path
) -> None:
    shutil.copytree(twins, tmp_path / "t")
    slide, job = tmp_path / "t/t.ome.tif", tmp_path / "t/job"
    of_second = "of scene 2, plane 1 of the file, but scene 1, plane 1 was opened; pass --scene 2 --plane 1"
    assert read_bag(features(tmp_path / "t") / "t.h5").grid.image == "scene 2, plane 1"
    on_first = run("extract", slide, "--job", job, "--encoder", "he_texture")
    assert on_first.exit_code == 1
    assert of_second in on_first.output
    asked = ("--model", folder / "model", "--features", features(tmp_path / "t") / "t.h5", "--slides", slide)
    for command in (("heatmap", "--out"), ("counterfactual", "--out"), ("view", "--html")):
        refused = run(command[0], *asked, command[1], tmp_path / "out.html")
        assert refused.exit_code == 2, refused.output
        assert of_second.removeprefix("of ") in refused.output
    # the same rows on the other scene: features are made again, and stale ones are found
    assert run("tile", slide, "--job", job, "--scene", 1, *TILES).exit_code == 0
    checked = run("verify", job)
    assert checked.exit_code == 1
    assert "stale" in checked.output
