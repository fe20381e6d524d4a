"""The viewer's two promises: an answer to a drawn region within 100 ms, and tiles as fast as a reader moves.

*Answers*: 200,000 tiles on a lattice, models of the pooling kind, as the page does it: the drawn lasso to tiles, the
model's answer, words, the veil over removed tiles and its border; the transfer to the browser is not part of it. Beside
it the same answer from running the model on the remaining tiles.

*Tiles*: every tile of a pyramid once (nothing cached), read with OpenSlide and with our own reader, encoded as JPEG of
512 x 512 pixels; beside it OpenSlide's own DeepZoom generator with its defaults (254 + 1 pixels), counted as what it is
and in megapixels.

Run: ``python benchmarks/viewer.py --slide SLIDE.svs --out benchmarks/results/viewer.csv``
"""

import argparse
import dataclasses
import http.client
import io
import platform
import statistics
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import openslide
import pandas as pd
import torch
from openslide.deepzoom import DeepZoomGenerator

from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.heatmaps._subject import look
from eosin.mil._checkpoint import ModelCard, build_model
from eosin.mil._jury import Asked
from eosin.mil._recipe import Component, Recipe, Training
from eosin.mil.bags import PackedBags
from eosin.mil.subsets import Target
from eosin.mil.task import make_task
from eosin.viewer._canvas import make_canvas
from eosin.viewer._catalogue import Catalogue, Listed, SlideStudy
from eosin.viewer._lattice import area_in_outline, make_lattice, tiles_within
from eosin.viewer._layers import Layers
from eosin.viewer._server import serving
from eosin.viewer._session import Edited, in_words, judge
from eosin.viewer._tiles import OpenSlides, TilePyramid, TileStore, encode_jpeg
from eosin.wsi._grid import TileGrid, Tiling
from eosin.wsi._openslide_impl import OpenSlideSlide
from eosin.wsi._slide import Slide
from eosin.wsi._slide_file import SlideFile, open_slide

DIM = 512
MODELS = {
    "abmil": {},
    "clam_sb": {},
    "clam_mb": {},
    "acmil": {},
    "mean": {},
}


def make_grid(n_tiles: int) -> TileGrid:
    """Return a disc of tiles of a resection."""
    side = int(np.ceil(np.sqrt(n_tiles * 4 / np.pi))) + 2
    axis = np.arange(side, dtype=np.int64) * 256
    origins = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    nearest = np.argsort(((origins - axis.mean()) ** 2).sum(1), kind="stable")[:n_tiles]
    return TileGrid(origins[np.sort(nearest)], 256, Tiling(mpp=0.25, patch_size=256), (side * 256, side * 256), 0.25)


def make_study(name: str, n_tiles: int) -> tuple[Catalogue, SlideStudy]:
    """Return a slide of random features as a fresh model sees it."""
    grid = make_grid(n_tiles)
    spec = FeatureSpec(encoder="random", dim=DIM, mpp=0.25, patch_size=256)
    features = np.random.default_rng(0).normal(size=(n_tiles, DIM)).astype(np.float32)
    bag = FeatureBag(features, spec, "slide", grid)
    recipe = Recipe(aggregator=Component(name=name, options=MODELS[name]), training=Training(standardize=False))
    task = make_task("classification", [{"label": "normal"}, {"label": "tumour"}])
    torch.manual_seed(0)
    model = build_model(recipe, task, DIM).eval()
    card = ModelCard(recipe=recipe, task=task.model_dump(mode="json"), features=spec)
    asked = Asked(model, card)
    catalogue = Catalogue(lambda _slide: asked, card, [])
    seen = look(model, bag, single_logit_is_second_class=model.n_outputs < 2)
    listed = Listed("0" * 16, "slide", SlideFile(Path("slide"), "slide"), None)
    layers = Layers(model, bag, seen, catalogue.classes)
    study = SlideStudy(listed, bag, seen, layers, make_lattice(grid), OpenSlides({}), asked)
    return catalogue, study


def wobbly_circle(centre: float, radius: float, corners: int = 400) -> np.ndarray:
    """Return what a hand draws: a circle of many corners that are not quite on it."""
    turn = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    reach = radius * (1 + 0.05 * np.sin(9 * turn) + 0.01 * np.random.default_rng(0).normal(size=corners))
    return centre + reach[:, None] * np.stack([np.cos(turn), np.sin(turn)], axis=1)


def measure_answers(name: str, n_tiles: int, repetitions: int) -> Iterator[dict[str, object]]:
    """Yield the time of an answer, small and large region, and of running the model again."""
    catalogue, study = make_study(name, n_tiles)
    side = study.grid.slide_size_px0[0]
    plain = study.layers.get(study.layers.choices[0])
    canvas = make_canvas(study.lattice, plain.percentile(), plain)
    whole = Edited.untouched(study)
    before = judge(study.asked, whole.logits())
    for share in (0.01, 0.25):
        outline = wobbly_circle(side / 2, side / 2 * np.sqrt(share))

        def answer(outline: np.ndarray = outline) -> Edited:
            edited = whole.act("remove", tiles_within(study.grid, area_in_outline(study.grid, outline)))
            in_words(catalogue, edited, before, judge(study.asked, edited.logits()), "tumour")
            canvas.show_removed(edited.present)
            return edited

        edited = answer()

        def again(edited: Edited = edited) -> object:
            rows = torch.from_numpy(np.ascontiguousarray(study.bag.features[edited.present]))
            with torch.no_grad():
                return study.asked.model(PackedBags.pack([rows])).logits

        ours, theirs = medians([answer, again], repetitions)
        exact = again()[0].double().numpy()
        gap = abs(float(Target(1).of(edited.logits())) - float(Target(1).of(widened(exact))))
        for way, seconds in (("viewer: drawn lasso to answer, veil included", ours), ("model run again", theirs)):
            yield {
                "what": "answer", "case": f"{name}, {edited.n_removed} of {n_tiles} tiles removed", "way": way,
                "milliseconds": round(1000 * seconds, 1), "log_odds_gap": f"{gap:.1e}", "method": study.seen.method,
            }  # fmt: skip


def measure_transplant(name: str, n_tiles: int, repetitions: int) -> Iterator[dict[str, object]]:
    """Yield the time until a slide answers to 1,000 tiles that are added to it."""
    catalogue, study = make_study(name, n_tiles)
    donor = dataclasses.replace(study, listed=dataclasses.replace(study.listed, key="1" * 16, slide_id="donor"))
    whole, tiles = Edited.untouched(study), np.arange(0, n_tiles, max(1, n_tiles // 1000))
    before = judge(study.asked, whole.logits())

    def answer() -> str:
        edited = whole.transplant(donor, tiles)
        return in_words(catalogue, edited, before, judge(study.asked, edited.logits()), "tumour")

    answer()
    (seconds,) = medians([answer], repetitions)
    yield {
        "what": "answer", "case": f"{name}, {len(tiles)} tiles added to {n_tiles}",
        "way": "viewer: added tiles to answer", "milliseconds": round(1000 * seconds, 1), "method": study.seen.method,
    }  # fmt: skip


def widened(logits: np.ndarray) -> np.ndarray:
    """Return two logits for a model with one."""
    return logits if len(logits) > 1 else np.concatenate([[0.0], logits])


def medians(ways: list[Callable[[], object]], repetitions: int) -> list[float]:
    """Return the median seconds of each way, one after the other in every round."""
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(repetitions):
        for way, taken in zip(ways, times, strict=True):
            started = time.perf_counter()
            way()
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in times]


def all_tiles(pyramid: TilePyramid) -> list[tuple[int, int, int]]:
    """Return every tile that shows some of the slide, the finest zoom most of them."""
    return [
        (zoom, column, row)
        for zoom in range(pyramid.max_zoom + 1)
        for row in range(2**zoom)
        for column in range(2**zoom)
        if pyramid.shows_slide(zoom, column, row)
    ]


def serve_all(slide: Slide) -> tuple[int, float]:
    """Return tiles and megapixels of one pass over a slide through our tiles."""
    pyramid = TilePyramid(slide.size_px0, slide.mpp)
    places = all_tiles(pyramid)
    for place in places:
        encode_jpeg(pyramid.read(slide, *place))
    return len(places), len(places) * 0.512**2


def deepzoom_all(path: Path) -> tuple[int, float]:
    """Return the same for OpenSlide's generator, levels as small as one tile left out, quality as ours."""
    with openslide.OpenSlide(path) as slide:
        generator = DeepZoomGenerator(slide)
        count, pixels = 0, 0
        for level in range(8, generator.level_count):
            columns, rows = generator.level_tiles[level]
            for address in ((column, row) for row in range(rows) for column in range(columns)):
                tile = generator.get_tile(level, address)
                tile.save(io.BytesIO(), "JPEG", quality=85)
                count, pixels = count + 1, pixels + tile.width * tile.height
    return count, pixels / 1e6


def ours_with_openslide(path: Path) -> tuple[int, float]:
    """Tiles of the viewer, read with OpenSlide."""
    with OpenSlideSlide(path) as slide:
        return serve_all(slide)


def ours_as_opened(path: Path) -> tuple[int, float]:
    """Tiles of the viewer, with the reader that `open_slide` takes."""
    with open_slide(path) as slide:
        return serve_all(slide)


def over_http(path: Path) -> tuple[int, float]:
    """Tiles of the viewer as a browser gets them from its server; the time of the client counts, too."""
    store = TileStore(OpenSlides({"0" * 16: SlideFile(path, path.stem)}))
    with store.slides.borrow("0" * 16) as slide:
        places = all_tiles(TilePyramid(slide.size_px0, slide.mpp))
    with serving(lambda document, template: None, store) as url:
        address = urllib.parse.urlsplit(url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port)
        for zoom, column, row in places:
            connection.request("GET", f"{address.path}tiles/{'0' * 16}/colour/{zoom}/{column}/{row}.jpg")
            assert connection.getresponse().read().startswith(b"\xff\xd8")
        connection.close()
    store.slides.close()
    return len(places), len(places) * 0.512**2


TILE_WAYS = {
    "viewer, OpenSlide, 512 px": ours_with_openslide,
    "viewer, reader of open_slide, 512 px": ours_as_opened,
    "viewer, over HTTP, 512 px": over_http,
    "OpenSlide DeepZoom generator, 254 + 2 px": deepzoom_all,
}


def measure_tiles(path: Path, repetitions: int) -> Iterator[dict[str, object]]:
    """Yield tiles and megapixels per second of CPU time: what one core serves."""
    rates: dict[str, list[tuple[float, float]]] = {way: [] for way in TILE_WAYS}
    for _ in range(repetitions):
        for way, serve in TILE_WAYS.items():
            started = time.process_time()
            count, megapixels = serve(path)
            seconds = time.process_time() - started
            rates[way].append((count / seconds, megapixels / seconds))
    for way, taken in rates.items():
        tiles, megapixels = (statistics.median(values) for values in zip(*taken, strict=True))
        yield {
            "what": "tiles", "case": path.name, "way": way, "tiles_per_s_and_core": round(tiles, 1),
            "megapixels_per_s_and_core": round(megapixels, 1),
        }  # fmt: skip


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slide", type=Path, nargs="*", default=[])
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--tiles", type=int, default=200_000)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/viewer.csv"))
    arguments = parser.parse_args()
    rows = [row for name in arguments.models for row in measure_answers(name, arguments.tiles, arguments.repetitions)]
    rows += list(measure_transplant(arguments.models[0], arguments.tiles, arguments.repetitions))
    rows += [row for path in arguments.slide for row in measure_tiles(path, arguments.repetitions)]
    table = pd.DataFrame(rows)
    table["threads"] = torch.get_num_threads()
    table["machine"] = f"{platform.machine()}, {platform.python_version()}, torch {torch.__version__}"
    table.to_csv(arguments.out, index=False)
    print(table.to_string())


if __name__ == "__main__":
    main()
