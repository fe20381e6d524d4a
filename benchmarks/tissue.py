"""Tissue masks of real overviews, to be judged by eye.

``results/tissue.csv`` names pictures of public repositories, the µm/px that they were taken to have, and what was seen
when the masks were looked at. The pictures are not here: clone the repositories into one folder, each as
``OWNER+NAME``, and run::

    python benchmarks/tissue.py --clones FOLDER --out FOLDER_OF_MASKS

For each picture a PNG is written: beside the picture its tissue, with glass in grey, the outline in green and ink in
magenta. The column ``coverage`` of the table is rewritten; verdicts are not. They were given so: *right* when less than
about a twentieth of the mask is not tissue and less than about a tenth of the tissue is missing.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eosin.errors import EosinError
from eosin.wsi._array_impl import ArraySlide
from eosin.wsi._morphology import grow
from eosin.wsi._tissue import TissueMask, find_tissue

TABLE = Path(__file__).parent / "results" / "tissue.csv"
GREY, GREEN, MAGENTA = 110, (0, 200, 0), (255, 0, 255)


def read_picture(path: Path, crop: str, shrink: int) -> NDArray[np.uint8]:
    """Return a picture on white, the part that shows the slide, each way smaller by a whole number."""
    Image.MAX_IMAGE_PIXELS = None
    with Image.open(path) as image:
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image.convert("RGBA"))
    box = tuple(map(int, crop.split())) if crop else (0, 0, *page.size)
    return np.asarray(page.convert("RGB").crop(box).reduce(shrink))


def draw(rgb: NDArray[np.uint8], found: TissueMask) -> Image.Image:
    """Return the picture, and beside it the picture with its mask."""
    drawn = (rgb // 2 + GREY // 2).astype(np.uint8)
    sides = rgb.shape[1::-1]
    for mask, colour in ((found.mask, GREEN), (found.pen, MAGENTA)):
        if mask is not None and mask.any():
            large = np.asarray(Image.fromarray(mask).resize(sides, Image.Resampling.NEAREST))
            if colour == GREEN:
                drawn[large] = rgb[large]
            drawn[grow(large, 1) & grow(~large, 1)] = colour
    return Image.fromarray(np.concatenate([rgb, drawn], axis=1))


def main() -> None:
    """Make the masks of all pictures that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clones", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        path = options.clones / row["repository"].replace("/", "+") / row["path"]
        if not path.is_file():
            print(f"{row['name']}: there is no {path}")
            continue
        rgb = read_picture(path, row["crop"], int(row["shrink"]))
        try:
            found = find_tissue(ArraySlide(rgb, mpp=float(row["mpp"])))
        except EosinError as error:
            print(f"{row['name']}: {error}")
            continue
        row["coverage"] = f"{found.coverage:.3f}"
        draw(rgb, found).save(options.out / f"{row['name']}.png")
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
