"""What is left out is a number: each loss on a mask where it is known."""

import json
import logging

import numpy as np
import pytest
from scenes import detect_tissue

from eosin.wsi._account import LOSSY, account_for
from eosin.wsi._grid import Tiling, make_grid
from eosin.wsi._job import JobFolder, tile_slides
from eosin.wsi._slide_file import find_slides, open_slide
from eosin.wsi._tiles import iterate_tiles
from eosin.wsi._tissue import TissueMask, TissueOptions

TILING = Tiling(patch_size=100, mpp=1.0)


def account_of(cells, tiling=TILING, **areas):
    """Return the account of a mask of cells of 10 x 10 px at 1 µm/px."""
    size = cells.shape[1] * 10, cells.shape[0] * 10
    mask = TissueMask(cells, (10.0, 10.0), size, 1.0, **areas)
    return account_for(mask, make_grid(mask, tiling, slide_size_px0=size, slide_mpp=1.0))


def test_tissue_beyond_the_last_tile_is_lost_at_the_edges():
    account = account_of(np.ones((25, 30), bool))
    assert account.found_um2 == 75_000
    assert account.edges == pytest.approx(5 / 25)
    assert account.tiles == account.small == account.ink == 0
    padded = account_of(np.ones((25, 30), bool), Tiling(patch_size=100, mpp=1.0, edges="pad"))
    assert padded.lost == 0


def test_tissue_in_tiles_with_little_of_it_is_lost_to_the_tile_rule():
    cells = np.zeros((20, 20), bool)
    cells[:10, :10] = True
    cells[10:14, 10:15] = True  # a fifth of its tile
    assert account_of(cells).tiles == pytest.approx(20 / 120)
    assert account_of(cells, Tiling(patch_size=100, mpp=1.0, min_tissue=0.2)).lost == 0


def test_tissue_between_overlapping_tiles_counts_once():
    assert account_of(np.ones((20, 20), bool), Tiling(patch_size=100, overlap=50, mpp=1.0)).lost == 0


def test_small_pieces_and_ink_count_as_tissue_that_was_found():
    account = account_of(np.ones((20, 20), bool), small_um2=30_000.0, ink_um2=10_000.0)
    assert (account.small, account.ink, account.lost) == (0.375, 0.125, 0.5)
    assert account.in_words() == ["0.08 mm² of tissue, left out: 38% in small pieces, 12% under ink", LOSSY]


def test_no_tissue_needs_no_words():
    assert account_of(np.zeros((20, 20), bool)).in_words() == []


def fragments(count, radius, spacing, large=0):
    """Paint round pieces of tissue on glass at 8 µm/px."""
    rng = np.random.default_rng(0)
    rows, columns = np.indices((spacing * count, spacing * count))
    inside = np.hypot(rows % spacing - spacing / 2, columns % spacing - spacing / 2) < radius
    inside |= np.hypot(rows - large, columns - large) < large
    density = (np.array([0.1, 0.4, 0.15]) + rng.random((*inside.shape, 1)) * 0.1) * inside[..., None]
    return (243 * 10.0**-density + rng.normal(0, 1, density.shape)).clip(0, 255).astype(np.uint8), inside


@pytest.mark.parametrize("large", [0, 40])
def test_many_small_fragments_are_the_tissue(large):
    picture, inside = fragments(7, 11, 36, large)
    mask, _ = detect_tissue(picture, 8.0, TissueOptions())
    assert (mask & inside).sum() > 0.95 * inside.sum()


def test_small_pieces_beside_large_tissue_are_dirt_unless_asked_for():
    picture, inside = fragments(7, 11, 36, large=90)
    few = inside.copy()
    few[:, 215:] = few[215:] = False  # all but a few fragments
    picture[inside & ~few] = 243
    mask, _ = detect_tissue(picture, 8.0, TissueOptions())
    assert mask[90, 90]
    assert not mask[7:30, 187:210].any()
    kept, _ = detect_tissue(picture, 8.0, TissueOptions(min_area_um2=5_000))
    assert kept[18, 198]


def test_a_record_states_what_was_left_out_and_a_warning_is_given(write_slide, tmp_path, caplog):
    picture = np.full((700, 700, 3), 243, np.uint8)
    noise = np.random.default_rng(0).normal(0, 12, (350, 350, 1))
    picture[350:, 350:] = (np.array([220, 150, 190]) + noise).clip(0, 255)
    slides = find_slides([write_slide("corner.tiff", picture)])
    messages = {}
    for edges in ("drop", "pad"):
        job = JobFolder(tmp_path / edges)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            tile_slides(slides, job, Tiling(edges=edges))
        messages[edges] = json.loads(job.run_json.read_text())["records"][0]["message"]
        assert ("corner" in caplog.text) == (edges == "drop")
    assert "at the edges" in messages["drop"]
    assert LOSSY in messages["drop"]
    assert "at the edges" not in messages["pad"]
    assert LOSSY not in messages["pad"]


def test_padded_tiles_hold_background_beyond_the_slide(write_slide):
    picture = np.random.default_rng(0).integers(80, 160, (300, 300, 3), dtype=np.uint8)
    with open_slide(write_slide("small.tiff", picture)) as slide:
        mask = TissueMask(np.ones((30, 30), bool), (10.0, 10.0), (300, 300), 0.5)
        grid = make_grid(mask, Tiling(edges="pad", min_tissue=0.01), slide_size_px0=(300, 300), slide_mpp=0.5)
        tiles = np.concatenate([some for some, _ in iterate_tiles(slide, grid, batch_size=2)])
    assert grid.n_tiles == 4
    assert np.array_equal(tiles[3][:44, :44], picture[256:, 256:])
    assert (tiles[3][45:] >= 240).all()
