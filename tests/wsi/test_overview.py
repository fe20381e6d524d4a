import subprocess
import sys

import numpy as np
import pytest

from eosin.errors import ConfigError
from eosin.wsi._overview import make_thumbnail, read_overview
from eosin.wsi._slide_file import open_slide


def test_the_whole_slide_at_one_mpp(write_slide, tissue_picture):
    with open_slide(write_slide("a.tiff", tissue_picture, levels=(4,))) as slide:
        found = read_overview(slide, 4.0)
        odd = read_overview(slide, 3.0)
    cells = tissue_picture.reshape(150, 8, 200, 8, 3).mean(axis=(1, 3))
    assert np.abs(found - cells).max() <= 2
    assert odd.shape == (200, 267, 3)


def test_thumbnails_keep_the_shape_and_never_grow(write_slide, tissue_picture):
    with open_slide(write_slide("a.tiff", tissue_picture)) as slide:
        thumbnail = make_thumbnail(slide)
        assert thumbnail.size == (1000, 750)
        again = make_thumbnail(slide, read_overview(slide, 1.5 * slide.mpp))
        assert again.size == (1000, 750)
        reduced = make_thumbnail(slide, read_overview(slide, slide.mpp))
        assert reduced.size == (800, 600)
        unused = make_thumbnail(slide, read_overview(slide, 8 * slide.mpp))
    assert np.abs(np.asarray(thumbnail, int) - np.asarray(again)).mean() < 3
    assert np.abs(np.asarray(thumbnail.resize((800, 600)), int) - np.asarray(reduced)).mean() < 3
    assert np.array_equal(thumbnail, unused)
    with open_slide(write_slide("b.tiff", tissue_picture[:300, :200])) as slide:
        assert make_thumbnail(slide).size == (200, 300)


def test_an_overview_that_is_no_overview_is_refused(giant_slide):
    path = giant_slide("pyramid.tiff", 100_000, mpp=0.25, n_levels=5)
    with open_slide(path) as slide, pytest.raises(ConfigError, match="request a larger mpp"):
        read_overview(slide, 0.5)


CHILD = """
import sys
from pathlib import Path
from eosin.wsi._overview import read_overview
from eosin.wsi._slide_file import open_slide
with open_slide(Path(sys.argv[1])) as slide:
    picture = read_overview(slide, float(sys.argv[2]))
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # ru_maxrss is the parent's too
print(picture.shape[1], picture.mean(), peak.split()[1])
"""


@pytest.mark.parametrize(("side", "n_levels"), [(14_000, 1), (100_000, 5)])
def test_memory_is_bounded_by_the_result_not_by_the_slide(giant_slide, side, n_levels):
    path = giant_slide(f"{side}.tiff", side, mpp=0.25, n_levels=n_levels)
    command = [sys.executable, "-c", CHILD, str(path), "8.0"]
    width, mean, peak_kb = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(width) == -(-side // 32)
    assert 200 < float(mean) < 240
    assert float(peak_kb) < 512 * 1024
