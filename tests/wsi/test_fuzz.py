"""Damaged slides end with a reason code; none stops, hangs or kills a run."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scaling import scaled

from eosin.wsi._grid import Tiling
from eosin.wsi._job import JobFolder, tile_slides
from eosin.wsi._slide_file import SlideFile
from eosin.wsi._synthetic import make_slide

HANG_S = 30.0
PATIENCE_S = 90.0  # the first slide of a worker waits for its process to start, on a busy machine long
SOURCES = {  # file of the reference data: µm/px to state, share of the mutations
    "CMU-1-Small-Region.svs": (None, 0.08),
    "small.svs": (None, 0.26),
    "OS-1-detail.ome.tif": (None, 0.1),
    "boxes.tiff": (0.5, 0.2),
    "boxes-dicom/boxes_0.dcm": (None, 0.1),
    "kidney-48-5.tif": (0.5, 0.05),
    "skimage-ihc.png": (0.5, 0.05),
    "test3-DAPI-2-(387).ndpi": (None, 0.1),
    "dicom-camelyon-jpeg/multi_frame_jpeg_camelyon_challenge_image.dcm": (19.0, 0.05),
    "tcga-cr-7395-01a-01-ts1.svs": (0.25, 0.01),
}


def truncate(data: bytearray, rng: np.random.Generator) -> bytearray:
    return data[: int(rng.integers(0, len(data)))]


def flip_bits(data: bytearray, rng: np.random.Generator) -> bytearray:
    for position in rng.integers(0, len(data), 1 + int(rng.integers(16))):
        data[position] ^= 1 << int(rng.integers(8))
    return data


def zero_a_page(data: bytearray, rng: np.random.Generator) -> bytearray:
    start = int(rng.integers(0, max(1, len(data) - 4096)))
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    return data


def spoil_ends(data: bytearray, rng: np.random.Generator) -> bytearray:
    """Change bytes where headers and directories are: in the first and the last kB."""
    for _ in range(1 + int(rng.integers(8))):
        place = int(rng.integers(0, min(1024, len(data))))
        data[place if rng.random() < 0.5 else -1 - place] = int(rng.integers(256))
    return data


def declare_sizes(data: bytearray, rng: np.random.Generator) -> bytearray:
    """Write extreme 32-bit numbers into the first and the last kB."""
    for _ in range(1 + int(rng.integers(3))):
        place = int(rng.integers(0, max(1, min(1024, len(data)) - 4)))
        place = place if rng.random() < 0.5 else max(0, len(data) - 4 - place)
        number = int(rng.choice([0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1]))
        data[place : place + 4] = number.to_bytes(4, "little")
    return data


MUTATORS: list[Callable[[bytearray, np.random.Generator], bytearray]] = [
    truncate, flip_bits, zero_a_page, spoil_ends, declare_sizes,
]  # fmt: skip


def mutate(source: Path, folder: Path, count: int, mpp: float | None, rng: np.random.Generator) -> list[SlideFile]:
    original = source.read_bytes()
    slides = []
    for number in range(count):
        name = f"{source.name.split('.')[0]}-{number}"
        path = folder / (name + source.name[source.name.index(".") :])
        path.write_bytes(MUTATORS[number % len(MUTATORS)](bytearray(original), rng))
        slides.append(SlideFile(path, name, mpp))
    return slides


def check(slides: list[SlideFile], job: Path) -> None:
    report = tile_slides(slides, JobFolder(job), Tiling(patch_size=64), workers=2, timeout_s=PATIENCE_S)
    assert len(report.records) == len(slides)
    for record in report.records:
        assert record.seconds < HANG_S, record
        assert record.reason not in {"internal", "timeout"}, record
        assert "\n" not in record.message, record
        if record.status == "failed":
            assert record.reason, record
            assert record.message, record


def fuzz_real_slides(shared: Path, folder: Path, total: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    here = folder / "slides"
    here.mkdir()
    slides: list[SlideFile] = []
    for name, (mpp, share) in SOURCES.items():
        slides += mutate(shared / "data" / "slides" / name, here, round(share * total), mpp, rng)
    assert len(slides) >= total
    check(slides, folder / "job")
    shutil.rmtree(here)
    shutil.rmtree(folder / "job")


@pytest.mark.shared
@pytest.mark.long
def test_300_damaged_copies_of_real_slides(shared: Path, tmp_path: Path):
    fuzz_real_slides(shared, tmp_path, 300, seed=0)


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize("seed", range(1, 1 + scaled(10)))
def test_1_000_more_damaged_copies_of_real_slides(shared: Path, tmp_path: Path, seed: int):
    fuzz_real_slides(shared, tmp_path, scaled(1000, 20), seed)


READ_TILES = """
import sys
from pathlib import Path
import numpy as np
from eosin.errors import EosinError
from eosin.wsi._slide_file import open_slide
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        with open_slide(path) as slide:
            width, height = slide.size_px0
            for factor in (1, 2, 5):
                for y in range(0, min(height, 1024), 256):
                    for x in range(0, min(width, 1024), 256):
                        slide.read((x, y), (256, 256), slide.mpp * factor)
        print("ok")
    except EosinError as error:
        print(error.code)
"""


@pytest.mark.long
def test_reading_tiles_of_damaged_slides_raises_only_our_errors(tmp_path: Path):
    make_slide(tmp_path / "a.tiff", size_px0=(700, 600), seed=3)
    folder = tmp_path / "slides"
    folder.mkdir()
    slides = mutate(tmp_path / "a.tiff", folder, 100, None, np.random.default_rng(7))
    command = [sys.executable, "-c", READ_TILES, str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=10 * PATIENCE_S, check=False)
    assert ended.returncode == 0, ended.stderr
    codes = ended.stdout.split()
    assert len(codes) == len(slides)
    assert {"ok", "corrupt"} <= set(codes)
