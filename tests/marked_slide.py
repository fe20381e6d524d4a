"""One slide with one marked tile, for every test that looks for it."""

import numpy as np
import pytest
import torch
from scenes import feature_bag, lattice, marked_pixels, write_slide

from eosin._files import file_fingerprint
from eosin.features._bag import FeatureBag
from eosin.mil._checkpoint import ModelCard, build_model, save_model
from eosin.mil._recipe import Component, Recipe, Training
from eosin.mil.task import make_task
from eosin.wsi._slide_file import SlideFile

DIM = 6
TILE = 5 * 16 + 9


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A slide with one marked tile, features that are large there, and a model that attends to large features."""
    folder = tmp_path_factory.mktemp("scene")
    grid = lattice(size_px0=(640, 480), slide_mpp=0.5, patch_size=40)
    write_slide(folder / "slide-1.tiff", marked_pixels(grid, TILE), mpp=0.5)
    features = np.random.default_rng(0).uniform(0, 0.1, size=(grid.n_tiles, DIM)).astype(np.float32)
    features[TILE] = 1.0
    bag = feature_bag(features, grid)
    slide = SlideFile(folder / "slide-1.tiff", "slide-1")
    provenance = {"input_fingerprint": file_fingerprint(slide.path)}
    return folder, slide, FeatureBag(features, bag.spec, "slide-1", grid, provenance)


@pytest.fixture(scope="module")
def model_folder(scene):
    """A model that says tumour because of the marked tile and for no other reason."""
    folder, _, bag = scene
    options = {"embed_dims": (), "gated": False, "hidden": 1, "attention_bias": False}
    recipe = Recipe(aggregator=Component(name="abmil", options=options), training=Training(standardize=False))
    task = make_task("classification", [{"label": "normal"}, {"label": "tumour"}])
    model = build_model(recipe, task, DIM)
    with torch.no_grad():
        model.attention.V.weight.fill_(1.0)
        model.attention.w.weight.fill_(3.0)
        model.classifier.weight.copy_(torch.tensor([[0.0], [10.0]]).expand(2, DIM))
        model.classifier.bias.copy_(torch.tensor([0.0, -4.0]))
    save_model(folder / "model", model, ModelCard(recipe=recipe, task=task.model_dump(mode="json"), features=bag.spec))
    return folder / "model"
