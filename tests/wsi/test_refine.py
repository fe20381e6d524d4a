"""Large slides: decided at 16 µm, read at 8 µm only along the border and where ink may be."""

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scenes import detect_tissue

from eosin.errors import SlideError
from eosin.wsi._array_impl import ArraySlide
from eosin.wsi._grid import Tiling, make_grid
from eosin.wsi._morphology import grow
from eosin.wsi._refine import enlarge
from eosin.wsi._tissue import TissueMask, TissueOptions, examine, find_tissue, look_over

MPP = 8.0
SHAPE = (1000, 1280)
PENS = {
    "blue": (30, 50, 170),
    "green": (10, 120, 50),
    "black": (15, 15, 20),
    "red": (200, 20, 40),
    "yellow": (250, 230, 40),
    "purple": (110, 30, 150),
}


class CountingSlide(ArraySlide):
    """Counts the pixels that are read at the mask's own resolution."""

    fine_px = 0

    def read(self, origin_px0, size_px, mpp):
        self.fine_px += size_px[0] * size_px[1] * (mpp == MPP)
        return super().read(origin_px0, size_px, mpp)


@pytest.fixture(scope="module")
def scene():
    rng = np.random.default_rng(2)
    rows, columns = np.indices(SHAPE)
    inside = np.hypot(columns - 420, rows - 480) < 300
    inside |= (np.abs(columns - 1050) < 90) & (np.abs(rows - 500) < 330)
    nuclei = rng.random(SHAPE)[..., None]
    density = (np.array([0.07, 0.35, 0.12]) + nuclei * [0.3, 0.3, 0.12]) * inside[..., None]
    return shine(density, rng), inside


def shine(density, rng):
    return (243.0 * 10.0**-density + rng.normal(0, 1.5, density.shape)).clip(0, 255).astype(np.uint8)


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def found_on(picture, options=None):
    slide = CountingSlide(picture, mpp=MPP)
    assert look_over(slide, options).mpp == 2 * MPP
    mask = find_tissue(slide, options)
    assert mask.mask.shape == picture.shape[:2]
    assert mask.pen.shape == picture.shape[:2]
    return mask, slide.fine_px


def test_the_mask_is_that_of_the_fine_picture_and_little_of_it_is_read(scene):
    picture, inside = scene
    mask, fine_px = found_on(picture)
    direct, _ = detect_tissue(picture, MPP, TissueOptions())
    assert iou(mask.mask, inside) > 0.985
    assert iou(mask.mask, direct) > 0.985
    assert 0 < fine_px < 0.55 * inside.size
    assert mask.notes == ()


def test_odd_numbers_of_cells_and_tissue_at_the_edges(scene):
    picture, inside = (part[200:801, 120:1331] for part in scene)
    wide = np.pad(picture, ((0, 0), (0, 41), (0, 0)), mode="edge")
    mask, _ = found_on(wide)
    assert iou(mask.mask[:, : inside.shape[1]], inside) > 0.98


@pytest.mark.parametrize("strength", [0.07, 0.1, 0.3, 2.0])
def test_faint_and_strong_stains_are_found(scene, strength):
    picture, inside = scene
    density = -np.log10((picture.astype(float) + 1) / 244).clip(max=0)
    mask, _ = found_on(shine(density * strength, np.random.default_rng(0)))
    assert iou(mask.mask, inside) > 0.96


@pytest.mark.parametrize("width", [9, 22])
@pytest.mark.parametrize("colour", PENS.values(), ids=PENS)
def test_pen_on_glass_is_left_out(scene, colour, width):
    picture, inside = scene
    image = Image.fromarray(picture)
    ImageDraw.Draw(image).line([(800, 5), (822, 500), (790, 990)], fill=colour, width=width)
    ink = (np.asarray(image) != picture).any(axis=2)
    mask, _ = found_on(np.asarray(image))
    assert (mask.mask & ink).sum() == 0
    assert iou(mask.mask, inside) > 0.97
    assert mask.notes == ("pen marks were left out",)
    assert (mask.pen & ink).sum() > 0.98 * ink.sum()
    assert not (mask.pen & ~grow(ink, 9)).any()


def test_a_stain_of_the_colour_of_ink_is_kept(scene):
    picture, inside = scene
    mask, _ = found_on(picture[..., [1, 0, 2]])
    assert iou(mask.mask, inside) > 0.97
    assert mask.notes == ()


def test_threads_are_removed_where_they_leave_the_tissue(scene):
    picture, inside = scene
    thread = picture.copy()
    thread[480:482, 715:945] = (190, 120, 160)  # 16 µm
    mask, _ = found_on(thread)
    assert not mask.mask[470:495, 740:930].any()
    assert iou(mask.mask, inside) > 0.98


def test_a_small_slide_is_read_once(scene):
    picture, _ = scene
    slide = ArraySlide(picture[:300, :400], mpp=MPP)
    assert look_over(slide).mpp == MPP


def test_enlarging_repeats_every_cell():
    mask = np.random.default_rng(0).random((5, 7)) < 0.5
    assert np.array_equal(enlarge(mask), mask.repeat(2, axis=0).repeat(2, axis=1))
    assert np.array_equal(enlarge(mask[1:4, 2:5]), enlarge(mask)[2:8, 4:10])


@pytest.mark.parametrize("cell", [(10.0, 20.0), (3.7, 3.1), (1.0, 1.0)])
def test_shares_of_a_lattice_are_those_of_its_squares(cell):
    rng = np.random.default_rng(3)
    mask = TissueMask(rng.random((300, 280)) < 0.4, cell, (int(280 * cell[0]), int(300 * cell[1])), 0.5)
    mask.mask[:20], mask.mask[:, 250:] = False, False
    side = 47
    xs, ys = np.arange(0, mask.slide_size_px0[0] - side, 31), np.arange(0, mask.slide_size_px0[1] - side, 29)
    origins = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)
    boxes = np.concatenate([origins, origins + side], axis=1)
    assert np.allclose(mask.lattice(xs, ys, side).ravel(), mask.fraction(boxes))
    some = rng.permutation(len(origins))[:500]
    assert np.allclose(mask.share_of(origins[some], side), mask.fraction(boxes[some]))
    assert mask.share_of(np.zeros((0, 2), np.int64), side).shape == (0,)
    grid = make_grid(mask, Tiling(patch_size=47, overlap=16), slide_size_px0=mask.slide_size_px0, slide_mpp=0.5)
    assert 0 < grid.n_tiles < (len(xs) + 2) * (len(ys) + 2)


def test_the_border_is_that_of_the_fine_cells(scene):
    picture, inside = scene
    slide = ArraySlide(picture, mpp=MPP)
    coarse = enlarge(examine(look_over(slide), TissueOptions()).mask)
    assert iou(coarse, inside) < 0.995
    assert iou(find_tissue(slide).mask, inside) > 0.999


@pytest.mark.parametrize("strength", [0.3, 1.0, 2.0])
def test_brown_on_pale_blue_is_tissue(scene, strength):
    _, inside = scene
    rng = np.random.default_rng(4)
    nuclei, positive = rng.random((*SHAPE, 1)), rng.random((*SHAPE, 1)) < 0.3
    haematoxylin = (nuclei + 0.03) * [0.16, 0.17, 0.07]
    brown = positive * nuclei * [0.25, 0.45, 0.7]
    mask, _ = found_on(shine((haematoxylin + brown) * inside[..., None] * strength, rng))
    assert iou(mask.mask, inside) > 0.97
    assert mask.notes == ()


@pytest.mark.parametrize("light", [(170, 167, 171), (220, 205, 183), (250, 250, 250), (200, 210, 215)])
def test_the_colour_of_the_glass_does_not_matter(scene, light):
    picture, inside = scene
    mask, fine_px = found_on((picture / 243.0 * light).clip(0, 255).astype(np.uint8))
    assert iou(mask.mask, inside) > 0.99
    assert fine_px < 0.55 * inside.size


def test_black_edges_lines_and_dirt_are_no_tissue(scene):
    picture, inside = scene
    dirty = picture.copy()
    dirty[:30], dirty[:, -25:] = (6, 6, 8), (4, 5, 5)
    dirty[940:943], dirty[:, 760:763] = (190, 192, 190), (170, 173, 176)
    dirty[850:880, 800:830] = (120, 118, 119)
    mask, _ = found_on(dirty)
    assert iou(mask.mask, inside) > 0.99


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_fat_belongs_to_the_tissue_that_it_touches(scene, strength):
    picture, inside = scene
    rows, columns = np.indices(SHAPE)
    fat = (np.hypot(columns - 420, rows - 480) < 420) & (columns > 420) & ~inside
    membranes = fat & ((columns % 8 < 2) | (rows % 8 < 2))  # around cells of 64 µm
    density = -np.log10((picture.astype(float) + 1) / 244).clip(max=0)
    density += membranes[..., None] * np.array([0.01, 0.06, 0.03]) * strength
    mask, _ = found_on(shine(density, np.random.default_rng(0)))
    assert mask.mask[fat].mean() > 0.93
    assert iou(mask.mask, inside | fat) > 0.97


def test_fluorescence_is_refused_before_anything_fine_is_read(scene):
    _, inside = scene
    dark = np.random.default_rng(0).normal(6, 2, (*SHAPE, 3)).clip(0, 255).astype(np.uint8)
    dark[inside, 2] = 200
    slide = CountingSlide(dark, mpp=MPP)
    with pytest.raises(SlideError, match="background is dark") as caught:
        find_tissue(slide)
    assert caught.value.code == "dark-background"
    assert slide.fine_px == 0


def test_a_large_slide_of_glass_has_no_tissue():
    noise = np.random.default_rng(0).normal(230, 2, (*SHAPE, 3)).clip(0, 255).astype(np.uint8)
    mask, fine_px = found_on(noise)
    assert not mask.mask.any()
    assert fine_px == 0
