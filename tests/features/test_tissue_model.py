"""Tissue by a network: fields are laid edge to edge, and their answers become the outlines that tiles are cut from."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from eosin.errors import CheckpointError
from eosin.features import _tissue_model
from eosin.features._tissue_model import TissueModel, load_tissue_model, outline_slides, segment_slide
from eosin.wsi import ArraySlide, find_slides
from eosin.wsi._synthetic import Cohort, make_cohort


class Dark(nn.Module):
    """Says tissue where the normalised red is low."""

    def forward(self, pixels):
        return {"out": torch.cat([pixels[:, :1], torch.ones_like(pixels[:, :1])], dim=1)}


DARK = TissueModel(Dark(), "dark", torch.device("cpu"))


@pytest.mark.parametrize("mpp", [0.5, 1.0])
def test_every_field_lies_where_it_was_read(mpp):
    picture = np.full((900, 1300, 3), 240, np.uint8)
    picture[160:704, 320:1152] = 90  # crosses the borders of fields
    mask = segment_slide(ArraySlide(picture, mpp=mpp), DARK)
    step = 8 / mpp
    assert mask.px0_per_cell == (step, step)
    wanted = np.zeros(mask.mask.shape, bool)
    wanted[round(160 / step) : round(704 / step), round(320 / step) : round(1152 / step)] = True
    assert np.array_equal(mask.mask, wanted)


def test_weights_are_read_as_hest_and_trident_store_them(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    network = torchvision.models.segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None, num_classes=2, aux_loss=True
    )
    state = {f"model.{name}": value.half() for name, value in network.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "seg.ckpt")
    model = load_tissue_model(tmp_path / "seg.ckpt", torch.device("cpu"))
    assert torch.equal(model.network.classifier[4].weight, network.classifier[4].weight.half().float())
    assert not model.network.training
    del state["model.classifier.4.bias"]
    torch.save({"state_dict": state}, tmp_path / "seg.ckpt")
    with pytest.raises(CheckpointError, match=r"classifier\.4\.bias is missing"):
        load_tissue_model(tmp_path / "seg.ckpt", torch.device("cpu"))


def test_outlines_are_kept_and_made_again_when_weights_change(tmp_path):
    make_cohort(tmp_path, Cohort(n_slides=2, size_um=(300.0, 300.0)))
    slide, _ = find_slides([tmp_path / "slides"])
    other = TissueModel(Dark(), "other", torch.device("cpu"))

    def outline(slide, model):
        return outline_slides([slide], model, tmp_path / "out").records[0].reason

    assert [outline(slide, DARK), outline(slide, DARK)] == ["", "done"]
    assert outline(slide, other) == ""
    assert outline(replace(slide, mpp=0.6), other) == ""
    with slide.path.open("ab") as file:
        file.write(b"x")
    assert outline(replace(slide, mpp=0.6), other) == ""
    (file,) = (tmp_path / "out").iterdir()
    sound = file.read_text()
    assert json.loads(sound)["features"]
    moved = re.sub(r'("coordinates":[^0-9]*)[0-9]', r"\g<1>12", sound, count=1)
    for changed in (moved, sound[:-9], "[" * 100_000, "[]"):
        file.write_text(changed)
        assert outline(replace(slide, mpp=0.6), other) == ""
        assert file.read_text() == sound


def test_the_command_cuts_tiles_from_what_the_network_found(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from eosin.cli.app import app
    from eosin.wsi._coordinates import read_grid

    def tile(*more):
        arguments = ["tile", "--slides", tmp_path / "s", "--job", tmp_path / "job", "--slide-mpp", 0.5, *more]
        return CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)

    from PIL import Image

    picture = np.full((512, 1024, 3), 245, np.uint8)
    picture[:, 512:] = 60  # grey, so that only the network calls it tissue
    (tmp_path / "s").mkdir()
    Image.fromarray(picture).save(tmp_path / "s/a.png")
    monkeypatch.setattr(_tissue_model, "load_tissue_model", lambda path, device: DARK)
    result = tile("--tissue-weights", Path("weights.ckpt"))
    assert result.exit_code == 0, result.output
    (coordinates,) = (tmp_path / "job").glob("*/patches/*.h5")
    assert sorted(map(tuple, read_grid(coordinates).origins_px0.tolist())) == [
        (512, 0), (512, 256), (768, 0), (768, 256),
    ]  # fmt: skip
    both = tile("--tissue-weights", "w.ckpt", "--contours", tmp_path)
    assert both.exit_code == 2
    assert "--contours and --tissue-weights" in both.stderr


def cohort_with_labels(tmp_path, n_slides=6):
    make_cohort(tmp_path / "c", Cohort(n_slides=n_slides, size_um=(300.0, 300.0)))
    slides = find_slides([tmp_path / "c/slides"])
    rows = [f"{slide.slide_id},p{number},{'ab'[number % 2]}" for number, slide in enumerate(slides)]
    (tmp_path / "labels.csv").write_text("\n".join(["slide,patient,label", *rows, ""]))
    return slides


def test_a_run_takes_the_tissue_of_the_network_and_its_weights_are_part_of_the_study(tmp_path, monkeypatch):
    from eosin.pipeline import _run as run_module
    from eosin.pipeline._preflight import Problems
    from eosin.pipeline._run import Inputs, Pipeline, check_run
    from eosin.wsi._coordinates import read_grid
    from eosin.wsi._grid import Tiling
    from eosin.wsi._job import JobFolder

    slides = cohort_with_labels(tmp_path)
    for name in ("one", "two"):
        (tmp_path / f"{name}.ckpt").write_text(name)
    everywhere = replace(DARK, network=Dark())
    everywhere.network.forward = lambda pixels: {"out": torch.cat([0 * pixels[:, :1], 0 * pixels[:, :1] + 9], dim=1)}
    for module in (_tissue_model, run_module):
        monkeypatch.setattr(module, "load_tissue_model", lambda path, device: everywhere)
    job, options = JobFolder(tmp_path / "job"), Pipeline(tiling=Tiling(patch_size=64), folds=2)

    def inputs(weights):
        return Inputs([tmp_path / "c/slides"], tmp_path / "labels.csv", job, options, tissue_weights=weights)

    tiles = inputs(tmp_path / "one.ckpt").tiles
    report = tiles.write(slides, job)
    assert not report.failed
    with slides[0].open() as slide:
        wanted = np.prod([side * slide.mpp // 32 for side in slide.size_px0])
    assert read_grid(job.patches(tiles.folder, slides[0].slide_id)).n_tiles == wanted  # glass, too: the network says so
    keys = []
    for weights in (None, tmp_path / "one.ckpt", tmp_path / "two.ckpt"):
        problems = Problems()
        checked = check_run(problems, inputs(weights))
        problems.require()
        keys.append(checked.study.key.fingerprint)
    assert len(set(keys)) == 3


def test_weights_that_are_none_are_found_by_check_and_by_a_study_file(tmp_path):
    from typer.testing import CliRunner

    from eosin.cli.app import app

    cohort_with_labels(tmp_path)
    (tmp_path / "none.ckpt").write_text("no weights")
    (tmp_path / "study.yaml").write_text(
        "slides: c/slides\nlabels: labels.csv\njob: job\nfolds: 2\ntissue_weights: none.ckpt\n"
    )
    options = ["--labels", tmp_path / "labels.csv", "--job", tmp_path / "job", "--folds", 2]
    flags = ["check", "--slides", tmp_path / "c/slides", *options, "--tissue-weights", tmp_path / "none.ckpt"]
    for arguments in (flags, ["check", "--config", tmp_path / "study.yaml"]):
        result = CliRunner().invoke(app, [str(one) for one in arguments])
        assert result.exit_code == 2, result.output
        assert "none.ckpt" in result.stderr
