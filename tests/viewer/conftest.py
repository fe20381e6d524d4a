"""Two slides, one with a marked tile that the model looks for, and a viewer that shows them."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from scenes import lattice, marked_pixels, write_slide

from eosin._files import file_fingerprint
from eosin.features._bag import FeatureBag
from eosin.features._store import write_bag
from eosin.viewer._catalogue import open_catalogue
from eosin.viewer._page import Desk
from eosin.viewer._server import serving
from eosin.viewer._show import page_builder
from eosin.viewer._tiles import TileStore
from eosin.wsi._slide_file import find_slides

CHROMIUM = Path("/usr/bin/chromium")
TILE = 5 * 16 + 9  # the marked one, as in the scene


@pytest.fixture(scope="module")
def folder(scene):
    """Features of slide-1, whose marked tile the model calls tumour, and of slide-2, normal and scanned finer."""
    folder, _, bag = scene
    write_bag(folder / "features/slide-1.h5", bag)
    other, grid = folder / "slide-2.tiff", lattice(size_px0=(3200, 2400), slide_mpp=0.1, patch_size=40)
    write_slide(other, marked_pixels(grid, 3), mpp=0.1, downsamples=(5,))
    values = np.random.default_rng(1).uniform(0, 0.1, size=bag.features.shape).astype(np.float32)
    provenance = {"input_fingerprint": file_fingerprint(other)}
    write_bag(folder / "features/slide-2.h5", FeatureBag(values, bag.spec, "slide-2", grid, provenance))
    return folder


@pytest.fixture(scope="module")
def catalogue(folder, model_folder):
    catalogue = open_catalogue(
        model_folder, [folder / "features"], find_slides([folder / "slide-1.tiff", folder / "slide-2.tiff"])
    )
    yield catalogue
    catalogue.slides.close()


@pytest.fixture(scope="module")
def studies(catalogue):
    """Both slides as the model sees them, the one with tumour first."""
    return [catalogue.study(one.key) for one in catalogue.shown]


@pytest.fixture(scope="module")
def desk(catalogue, tmp_path_factory):
    with ThreadPoolExecutor(1) as pool:
        yield Desk(catalogue, TileStore(catalogue.slides), tmp_path_factory.mktemp("sessions"), pool)


@pytest.fixture(scope="module")
def url(desk):
    """Address of a running viewer."""
    with serving(page_builder(desk), desk.store) as url:
        yield url


class Priced:
    """Subsets whose every question costs a run of the model."""

    price, instant = 1, False

    def __init__(self, subsets):
        self._subsets = subsets

    def __getattr__(self, name):
        return getattr(self._subsets, name)


@pytest.fixture(scope="module")
def slow_url(desk, catalogue):
    """The same with a model that has to be run again for every question."""
    study = catalogue.study(catalogue.shown[0].key)
    slow = dataclasses.replace(study, seen=dataclasses.replace(study.seen, subsets=Priced(study.seen.subsets)))
    catalogue._studies[study.listed.key] = slow
    with serving(page_builder(desk), desk.store) as url:
        yield url
    catalogue._studies[study.listed.key] = study


@pytest.fixture(scope="module")
def chromium():
    """A headless browser; for one module, because playwright's loop is in the way of other tests that run one."""
    if not CHROMIUM.exists():
        pytest.skip("there is no /usr/bin/chromium on this machine")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()
