import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter
from scenes import detect_tissue

from eosin.errors import SlideError
from eosin.wsi._histology import lay_out
from eosin.wsi._morphology import grow
from eosin.wsi._overview import Overview, read_overview
from eosin.wsi._slide_file import open_slide
from eosin.wsi._synthetic import SlidePlan, make_slide
from eosin.wsi._tissue import TissueMask, TissueOptions, find_tissue

MPP = 8.0
OPTIONS = TissueOptions()
PENS = {
    "blue": (30, 50, 170),
    "dark blue": (20, 30, 160),
    "green": (10, 120, 50),
    "black": (15, 15, 20),
    "red": (200, 20, 40),
    "orange": (240, 120, 20),
    "yellow": (250, 230, 40),
    "purple": (110, 30, 150),
}


@pytest.fixture(scope="module")
def scene():
    """Two pieces of tissue on glass at 8 µm/px; returns the picture and where tissue is."""
    rng = np.random.default_rng(2)
    rows, columns = np.indices((300, 400))
    inside = np.hypot(columns - 120, rows - 150) < 80
    inside |= (np.abs(columns - 300) < 40) & (np.abs(rows - 150) < 100)
    nuclei = rng.random(inside.shape)[..., None]
    density = (np.array([0.07, 0.35, 0.12]) + nuclei * [0.3, 0.3, 0.12]) * inside[..., None]
    return shine(density, rng), inside


def shine(density, rng, light=243.0):
    return (light * 10.0**-density + rng.normal(0, 1.5, density.shape)).clip(0, 255).astype(np.uint8)


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def test_tissue_is_found(scene):
    picture, inside = scene
    mask, notes = detect_tissue(picture, MPP, OPTIONS)
    assert iou(mask, inside) > 0.95
    assert notes == ()


def test_glass_around_a_picture_changes_nothing(scene):
    picture, _ = scene
    image = Image.fromarray(picture)
    ImageDraw.Draw(image).line([(215, 5), (222, 150), (210, 295)], fill=PENS["blue"], width=9)
    rng = np.random.default_rng(7)
    large = rng.normal(243, 1.5, (500, 700, 3)).clip(0, 255).astype(np.uint8)
    large[60:360, 150:550] = np.asarray(image)
    fixed = TissueOptions(min_stain=0.03)
    small, _ = detect_tissue(np.asarray(image), MPP, fixed)
    found, _ = detect_tissue(large, MPP, fixed)
    assert (found[60:360, 150:550] ^ small).sum() <= 0.002 * small.sum()
    assert found.sum() == found[60:360, 150:550].sum()


@pytest.mark.parametrize("strength", [0.1, 0.3, 2.0])
def test_faint_and_strong_stains_are_found(scene, strength):
    picture, inside = scene
    density = -np.log10((picture.astype(float) + 1) / 244).clip(max=0)
    mask, _ = detect_tissue(shine(density * strength, np.random.default_rng(0)), MPP, OPTIONS)
    assert iou(mask, inside) > 0.93


@pytest.mark.parametrize("light", [(170, 167, 171), (220, 205, 183), (250, 250, 250), (200, 210, 215)])
def test_the_colour_of_the_glass_does_not_matter(scene, light):
    picture, inside = scene
    mask, _ = detect_tissue((picture / 243.0 * light).clip(0, 255).astype(np.uint8), MPP, OPTIONS)
    assert iou(mask, inside) > 0.93


@pytest.mark.parametrize("colour", PENS.values(), ids=PENS)
def test_pen_on_glass_is_left_out(scene, colour):
    picture, inside = scene
    image = Image.fromarray(picture.copy())
    ImageDraw.Draw(image).line([(215, 5), (222, 150), (210, 295)], fill=colour, width=9)
    ink = (np.asarray(image) != picture).any(axis=2)
    mask, notes = detect_tissue(np.asarray(image), MPP, OPTIONS)
    assert (mask & ink).sum() == 0
    assert iou(mask, inside) > 0.93
    assert notes == ("pen marks were left out",)


def test_a_pen_ring_does_not_make_its_inside_tissue(scene):
    picture, inside = scene
    image = Image.fromarray(picture.copy())
    ImageDraw.Draw(image).ellipse((20, 50, 235, 260), outline=(20, 110, 60), width=6)
    mask, _ = detect_tissue(np.asarray(image), MPP, OPTIONS)
    assert iou(mask, inside) > 0.93


@pytest.mark.parametrize("colour", ["green", "blue", "red"])
@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_a_ring_of_more_ink_than_tissue_is_left_out(colour, strength):
    rng = np.random.default_rng(4)
    rows, columns = np.indices((140, 180))
    inside = np.hypot(columns - 90, rows - 70) < 20
    density = (np.array([0.07, 0.35, 0.12]) + rng.random((140, 180, 1)) * [0.3, 0.3, 0.12]) * inside[..., None]
    image = Image.fromarray(shine(density * strength, rng))
    ImageDraw.Draw(image).ellipse((20, 8, 160, 132), outline=PENS[colour], width=9)
    noisy = (np.asarray(image) + rng.normal(0, 1.5, (140, 180, 3))).clip(0, 255).astype(np.uint8)
    ink = (np.asarray(image) == PENS[colour]).all(axis=2)
    assert ink.sum() > 2 * inside.sum()
    mask, notes = detect_tissue(noisy, MPP, OPTIONS)
    assert (mask & ink).sum() == 0
    assert iou(mask, inside) > 0.9
    assert notes == ("pen marks were left out",)


def test_pen_is_kept_on_request_and_when_it_is_the_stain(scene):
    picture, inside = scene
    image = Image.fromarray(picture.copy())
    ImageDraw.Draw(image).rectangle((200, 20, 230, 280), fill=(10, 120, 50))
    kept, _ = detect_tissue(np.asarray(image), MPP, TissueOptions(remove_pen=False))
    assert kept[100, 215]
    blue = picture[..., [1, 0, 2]]  # what absorbs red most: not haematoxylin and eosin
    mask, notes = detect_tissue(blue, MPP, OPTIONS)
    assert iou(mask, inside) > 0.93
    assert notes == ()


def test_red_cells_inside_tissue_are_no_pen(scene):
    picture, _ = scene
    bleeding = picture.copy()
    rng = np.random.default_rng(0)
    bleeding[120:180, 90:150] = (np.array([190, 45, 65]) + rng.normal(0, 6, (60, 60, 3))).clip(0, 255)
    mask, _ = detect_tissue(bleeding, MPP, OPTIONS)
    assert mask[150, 120]


def test_black_edges_lines_and_dirt_are_no_tissue(scene):
    picture, inside = scene
    dirty = picture.copy()
    dirty[:14], dirty[:, -12:] = (6, 6, 8), (4, 5, 5)
    dirty[280:282] = (190, 192, 190)
    dirty[:, 212:214] = (170, 173, 176)
    dirty[240:252, 190:202] = (120, 118, 119)
    mask, _ = detect_tissue(dirty, MPP, OPTIONS)
    assert iou(mask, inside) > 0.93


def spoil(picture, density):
    """Put something between lamp and camera that absorbs, (h, w, 3) or wider."""
    return (picture * 10.0 ** -np.broadcast_to(density, picture.shape)).clip(0, 255).round().astype(np.uint8)


@pytest.mark.parametrize("tint", [(0.01, 0.01, 0.05), (0.01, 0.06, 0.03), (0.05, 0.02, 0.01)])
def test_tinted_bands_of_glass_are_no_tissue(scene, tint):
    picture, inside = scene
    across = np.exp(-(((np.arange(300) - 40) / 9.0) ** 2))[:, None, None]  # the profile of a band of glue
    mask, _ = detect_tissue(spoil(picture, across * tint), MPP, OPTIONS)
    assert iou(mask, inside) > 0.93
    strip = np.zeros((300, 400, 1))
    strip[:, 372:] = 1  # a sharp edge
    mask, _ = detect_tissue(spoil(picture, strip * tint), MPP, OPTIONS)
    assert iou(mask, inside) > 0.93


def test_spilt_eosin_around_the_tissue_is_no_tissue(scene):
    picture, inside = scene
    rows, columns = np.indices(inside.shape)
    haze = np.clip(1 - np.hypot(columns - 120, rows - 150) / 160, 0, 1)[..., None] * np.array([0.01, 0.12, 0.05])
    mask, _ = detect_tissue(spoil(picture, haze), MPP, OPTIONS)
    assert iou(mask, inside) > 0.93


def test_a_shadow_of_the_scan_is_no_tissue(scene):
    picture, inside = scene
    shade = np.clip(1 - np.arange(300) / 45, 0, 1)[:, None, None] * np.array([0.25, 0.26, 0.29])
    mask, _ = detect_tissue(spoil(picture, shade), MPP, OPTIONS)
    assert iou(mask, inside) > 0.93


def test_a_dark_frame_is_no_tissue(scene):
    picture, inside = scene
    framed = picture.copy()
    wood = np.random.default_rng(0).normal((45, 32, 25), 7, picture.shape).clip(0, 255)
    frame = np.ones(inside.shape, bool)
    frame[12:-14, :-13] = False
    framed[frame] = wood[frame]
    mask, _ = detect_tissue(framed, MPP, OPTIONS)
    assert iou(mask, inside) > 0.93


def test_nearly_black_tissue_is_found():
    rng = np.random.default_rng(6)
    rows, columns = np.indices((300, 400))
    inside = np.hypot(columns - 160, rows - 150) < 100
    silver = 0.75 * (1 + 0.08 * rng.normal(size=(300, 400, 1))) * np.array([0.92, 1.0, 1.06])
    mask, notes = detect_tissue(shine(silver * inside[..., None], rng), 16.0, OPTIONS)
    assert iou(mask, inside) > 0.93
    assert notes == ()


def test_the_pale_half_of_an_array_is_found(scene):
    picture, inside = scene
    density = -np.log10((picture.astype(float) + 1) / 244).clip(max=0)
    density[:, 210:] *= 0.12  # one of the two pieces
    mask, _ = detect_tissue(shine(density, np.random.default_rng(1)), MPP, OPTIONS)
    assert iou(mask[:, 210:], inside[:, 210:]) > 0.9


@pytest.mark.parametrize("colour", [(60, 175, 160), (45, 70, 190), (225, 25, 45)])
def test_strokes_are_left_out_to_where_they_fade(scene, colour):
    picture, inside = scene
    image = Image.new("L", (400, 300))
    ImageDraw.Draw(image).line([(205, 5), (240, 150), (200, 295)], fill=255, width=12)
    stroke = np.asarray(image.filter(ImageFilter.GaussianBlur(2))) / 255
    stroke = stroke * np.linspace(1, 0.45, 300)[:, None]  # the pen runs dry
    ink = stroke[..., None] * -np.log10((np.array(colour) + 1) / 256)
    mask, _ = detect_tissue(spoil(picture, ink), MPP, OPTIONS)
    assert (mask & (stroke > 0.2) & ~inside).sum() < 0.03 * (stroke > 0.2).sum()
    assert iou(mask, inside) > 0.93


def test_a_frame_full_of_tissue_is_all_tissue(scene):
    picture, _ = scene
    mask, notes = detect_tissue(picture[100:200, 70:170], MPP, OPTIONS)
    assert mask.mean() > 0.99
    assert "look at its contour picture" in notes[0]


@pytest.mark.parametrize("level", [243, 160, 255])
def test_empty_glass_has_no_tissue(level):
    noise = np.random.default_rng(0).normal(level, 2, (300, 400, 3))
    mask, notes = detect_tissue(noise.clip(0, 255).astype(np.uint8), MPP, OPTIONS)
    assert not mask.any()
    assert notes == ()


def test_thresholds_are_areas_and_the_largest_piece_stays():
    def blob(*radii):
        rows, columns = np.indices((200, 300))
        inside = np.zeros((200, 300), bool)
        for number, radius in enumerate(radii):
            inside |= np.hypot(columns - 60 - 90 * number, rows - 100) < radius
        return shine(np.array([0.1, 0.4, 0.15]) * inside[..., None], np.random.default_rng(0))

    two, _ = detect_tissue(blob(40, 6), MPP, OPTIONS)  # 320 µm and 48 µm radius
    assert two[100, 60]
    assert not two[100, 150]
    alone, _ = detect_tissue(blob(6), MPP, OPTIONS)
    assert alone[100, 60]


def test_small_holes_are_filled_and_large_ones_kept():
    rows, columns = np.indices((200, 200))
    ring = np.hypot(columns - 100, rows - 100)
    picture = shine(np.array([0.1, 0.4, 0.15]) * ((ring < 90) & (ring > 30))[..., None], np.random.default_rng(0))
    kept, _ = detect_tissue(picture, MPP, OPTIONS)
    filled, _ = detect_tissue(picture, MPP, TissueOptions(max_hole_um2=1e6))
    assert not kept[100, 100]
    assert filled[100, 100]


def test_fluorescence_is_recognised():
    rng = np.random.default_rng(0)
    dark = rng.normal(6, 2, (200, 200, 3)).clip(0, 255)
    dark[50:90, 50:90, 2] = 200
    assert Overview(dark.astype(np.uint8), MPP).is_dark
    assert not Overview(np.full((10, 10, 3), 240, np.uint8), MPP).is_dark


def test_half_black_bright_field_is_not_fluorescence(scene):
    picture, _ = scene
    assert not Overview(np.concatenate([np.zeros_like(picture), picture, np.zeros_like(picture)]), MPP).is_dark


def test_dark_slides_are_refused(write_slide):
    path = write_slide("dark.tiff", np.full((512, 512, 3), 5, np.uint8))
    with open_slide(path) as slide, pytest.raises(SlideError, match="background is dark") as caught:
        find_tissue(slide)
    assert caught.value.code == "dark-background"


def test_find_tissue_works_at_a_physical_resolution(write_slide, tissue_picture):
    for mpp in (0.5, 1.0):
        with open_slide(write_slide(f"{mpp}.tiff", tissue_picture, mpp=mpp)) as slide:
            mask = find_tissue(slide)
        assert mask.area_um2 == pytest.approx(np.pi * (400 * mpp) ** 2, rel=0.08)
        assert max(mask.mask.shape) >= 128
        assert mask.coverage == pytest.approx(np.pi * 400**2 / tissue_picture[..., 0].size, rel=0.08)


@pytest.mark.parametrize("seed", [1, 3, 5])
def test_planted_tissue_is_found_with_pen_marks_present(tmp_path, seed):
    size, mpp = (3000, 2400), 0.5
    for name, pen in (("clean", False), ("inked", True)):
        make_slide(tmp_path / f"{name}.tiff", size_px0=size, mpp=mpp, pen=pen, seed=seed)
    plan = SlidePlan("clean", size_um=(size[0] * mpp, size[1] * mpp), mpp=mpp, seed=(seed,))
    layout = lay_out(plan.size_um, tumour_fraction=0.0, rng=plan.rng("layout"))
    with open_slide(tmp_path / "clean.tiff") as clean, open_slide(tmp_path / "inked.tiff") as inked:
        mask = find_tissue(inked)
        cell = mask.px0_per_cell[0] * mpp
        difference = read_overview(inked, cell).astype(int) - read_overview(clean, cell)
        ink = np.abs(difference).max(axis=2) > 20
        unmarked = find_tissue(clean).mask
    planted = layout.resized(layout.tissue, cell) > 0
    height, width = (min(sides) for sides in zip(planted.shape, ink.shape, strict=True))
    found, truth, ink = mask.mask[:height, :width], planted[:height, :width], ink[:height, :width]
    off_ink = ~grow(ink, 4)
    assert ink.mean() > 0.005
    assert iou(unmarked[:height, :width], truth) > 0.9
    assert iou(found, truth) > 0.9
    assert iou(found & off_ink, truth & off_ink) > 0.9
    assert (found & ~truth & ink).sum() < 0.1 * ink.sum()


def test_fraction_is_the_exact_area(write_slide):
    rng = np.random.default_rng(5)
    mask = TissueMask(rng.random((7, 9)) < 0.5, (10.0, 20.0), (90, 140), 0.5)
    fine = np.kron(mask.mask, np.ones((20, 10), bool))  # one cell per level-0 pixel
    boxes = np.array([[0, 0, 90, 140], [3, 7, 25, 33], [15, 20, 16, 21], [80, 130, 100, 160], [-20, -20, 5, 5]])
    expected = [
        fine[max(y0, 0) : y1, max(x0, 0) : x1].sum() / ((x1 - x0) * (y1 - y0)) for x0, y0, x1, y1 in boxes.tolist()
    ]
    assert np.allclose(mask.fraction(boxes), expected)
    assert mask.fraction(np.zeros((0, 4))).shape == (0,)
