"""Small slides with known pixels."""

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

WriteSlide = Callable[..., Path]


@pytest.fixture(scope="session")
def tissue_picture() -> NDArray[np.uint8]:
    """Return (1200, 1600, 3): glass with one round piece of H&E-like texture of radius 400 px at (700, 600)."""
    return paint_tissue((1200, 1600), (700, 600), 400)


def paint_tissue(shape: tuple[int, int], centre: tuple[int, int], radius: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(0)
    rows, columns = np.indices(shape)
    inside = np.hypot(columns - centre[0], rows - centre[1]) < radius
    nuclei = np.kron(rng.random((shape[0] // 8 + 1, shape[1] // 8 + 1)), np.ones((8, 8)))[: shape[0], : shape[1]]
    density = np.where(nuclei[..., None] > 0.7, [0.45, 0.6, 0.25], [0.05, 0.3, 0.1]) * inside[..., None]
    picture = 243 * 10.0**-density + rng.normal(0, 2, (*shape, 1))
    return picture.clip(0, 255).astype(np.uint8)


@pytest.fixture
def write_slide(tmp_path: Path) -> WriteSlide:
    """Return a function that writes a picture as a tiled TIFF; lossless unless told otherwise."""

    def write(
        name: str,
        picture: NDArray[np.uint8],
        *,
        mpp: float | None = 0.5,
        levels: tuple[int, ...] = (),
        compression: str | None = "deflate",
        tile: int | None = 256,
        description: str | None = None,
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = {"tile": (tile, tile)} if tile else {"rowsperstrip": 8}
        common = {"photometric": "rgb", "compression": compression, "metadata": None, **shape}
        with tifffile.TiffWriter(path) as tiff:
            per_cm = {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
            tiff.write(picture, description=description, **per_cm, **common)
            for factor in levels:
                small = np.asarray(Image.fromarray(picture).reduce(factor))
                tiff.write(small, subfiletype=1, **common)
        return path

    return write


TILE_PX = 256


@pytest.fixture(scope="session")
def giant_slide(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that writes a BigTIFF whose tile tables point at few shared JPEG tiles: huge on paper only."""
    folder = tmp_path_factory.mktemp("giant")

    def write(name: str, side_px: int, *, mpp: float, n_levels: int) -> Path:
        path = folder / name
        if not path.exists():
            path.write_bytes(sparse_bigtiff(side_px, mpp, n_levels))
        return path

    return write


def sparse_bigtiff(side_px: int, mpp: float, n_levels: int) -> bytes:
    """Return a round piece of tissue, made of whole level-0 tiles; coarser levels show the same."""
    body = bytearray(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))
    across = -(-side_px // TILE_PX)
    tissue = np.hypot(*(np.indices((across, across)) - across / 2)) < across / 4
    previous = 8
    for level in range(n_levels):
        side = -(-side_px // 4**level)
        places = _append_tiles(body, tissue, 4**level)
        tables = [_append(body, column.astype("<u8").tobytes())[0] for column in places.T]
        position = _append(body, _directory(side, mpp * 4**level, level, tables, len(places), body))[0]
        struct.pack_into("<Q", body, previous, position)
        previous = position + len(body[position:]) - 8
    return bytes(body)


def _append_tiles(body: bytearray, tissue: NDArray[np.bool_], factor: int) -> NDArray[np.int64]:
    """Append the tiles of one level, equal ones once; return offset and size of each, (n, 2)."""
    picture = np.asarray(Image.fromarray(paint_tissue((TILE_PX, TILE_PX), (128, 128), 1000)).reduce(factor))
    picture = np.tile(picture, (factor, factor, 1))
    count = -(-len(tissue) // factor)
    padded = np.pad(tissue, (0, count * factor - len(tissue)))
    cells = padded.reshape(count, factor, count, factor).swapaxes(1, 2).reshape(-1, factor, factor)
    known: dict[bytes, tuple[int, int]] = {}
    for cell in cells:
        if cell.tobytes() not in known:
            shown = np.kron(cell, np.ones((TILE_PX // factor, TILE_PX // factor), bool))
            known[cell.tobytes()] = _append(body, _jpeg(np.where(shown[..., None], picture, np.uint8(243))))
    return np.array([known[cell.tobytes()] for cell in cells], np.int64)


def _jpeg(picture: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=85, subsampling=0)
    return buffer.getvalue()


def _append(body: bytearray, data: bytes) -> tuple[int, int]:
    body.extend(bytes(-len(body) % 8))
    start = len(body)
    body.extend(data)
    return start, len(data)


def _directory(side: int, mpp: float, level: int, tables: list[int], n_tiles: int, body: bytearray) -> bytes:
    bits = struct.unpack("<Q", struct.pack("<HHHH", 8, 8, 8, 0))[0]
    resolution = struct.unpack("<Q", struct.pack("<II", round(1e7 / mpp), 1000))[0]
    inline = n_tiles == 1
    first = [struct.unpack_from("<Q", body, table)[0] if inline else table for table in tables]
    entries = [
        (254, 4, 1, int(level > 0)), (256, 4, 1, side), (257, 4, 1, side), (258, 3, 3, bits), (259, 3, 1, 7),
        (262, 3, 1, 6), (277, 3, 1, 3), (282, 5, 1, resolution), (283, 5, 1, resolution), (284, 3, 1, 1),
        (296, 3, 1, 3), (322, 3, 1, TILE_PX), (323, 3, 1, TILE_PX), (324, 16, n_tiles, first[0]),
        (325, 16, n_tiles, first[1]), (530, 3, 2, struct.unpack("<Q", struct.pack("<HHHH", 1, 1, 0, 0))[0]),
    ]  # fmt: skip
    packed = b"".join(struct.pack("<HHQQ", *entry) for entry in entries)
    return struct.pack("<Q", len(entries)) + packed + struct.pack("<Q", 0)
