"""OME-Zarr slides of both versions, and those that are damaged or try to read elsewhere."""

import json

import numpy as np
import pytest
from PIL import Image

from eosin.errors import MissingResolutionError, SlideError, SlideOpenError
from eosin.wsi._job import JobFolder, tile_slides
from eosin.wsi._slide_file import find_slides, open_slide

zarr = pytest.importorskip("zarr", reason="needs the extra zarr")


@pytest.fixture(scope="module")
def picture(tissue_picture):
    return np.ascontiguousarray(tissue_picture[300:812, 400:1100])


def write_zarr(path, picture, *, version="0.4", unit="micrometer", scale=0.5, name="x", factor=1, first="0"):
    group = zarr.open_group(path, mode="w", zarr_format=2 if version == "0.4" else 3)
    datasets = []
    for level in range(3):
        small = np.asarray(Image.fromarray(picture).reduce(2**level))
        data = np.moveaxis(small, -1, 0)[None, :, None].astype(np.uint8 if factor == 1 else np.uint16) * factor
        array = group.create_array(str(level), shape=data.shape, chunks=(1, 1, 1, 128, 128), dtype=data.dtype)
        array[:] = data
        step = [1, 1, 1, scale * 2**level, scale * 2**level] if scale else [1] * 5
        datasets.append({"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": step}]})
    datasets[0]["path"] = first
    space = {"type": "space", **({"unit": unit} if unit else {})}
    axes = [{"name": "t", "type": "time"}, {"name": "c", "type": "channel"},
            *({"name": axis, **space} for axis in "zyx")]  # fmt: skip
    facts = {"multiscales": [{"version": version, "name": name, "axes": axes, "datasets": datasets}]}
    group.attrs.update(facts if version == "0.4" else {"ome": {"version": "0.5", **facts}})
    return path


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("factor", [1, 257])
def test_pixels_levels_and_mpp(tmp_path, picture, version, factor):
    with open_slide(write_zarr(tmp_path / "a.ome.zarr", picture, version=version, factor=factor)) as slide:
        assert (slide.mpp, slide.mpp_source, slide.reader) == (0.5, "ome-zarr", "OME-Zarr")
        assert slide.downsamples == [1.0, 2.0, 4.0]
        assert np.array_equal(slide.read((0, 0), slide.size_px0, 0.5), picture)
        half = np.asarray(Image.fromarray(picture).reduce(2))
        assert np.array_equal(slide.read((0, 0), (350, 256), 1.0), half)


def test_a_folder_of_zarr_is_a_slide_of_a_batch(tmp_path, picture):
    write_zarr(tmp_path / "in" / "a.ome.zarr", picture)
    slides = find_slides([tmp_path / "in"])
    assert [slide.slide_id for slide in slides] == ["a"]
    assert slides == find_slides([tmp_path / "in" / "a.ome.zarr"])
    job = JobFolder(tmp_path / "job")
    assert tile_slides(slides, job).records[0].status == "ok"
    assert tile_slides(slides, job).records[0].reason == "done"


def test_without_scale_or_unit_there_is_no_mpp(tmp_path, picture):
    with open_slide(write_zarr(tmp_path / "a.zarr", picture, unit="")) as slide, pytest.raises(MissingResolutionError):
        slide.read((0, 0), (10, 10), 0.5)


@pytest.mark.parametrize("place", ["../secret", "/etc", "0/../../secret", "C:/x"])
def test_paths_that_lead_out_are_refused(tmp_path, picture, place):
    write_zarr(tmp_path / "secret", picture)
    with pytest.raises(SlideOpenError, match="path outside its folder"):
        open_slide(write_zarr(tmp_path / "a.zarr", picture, first=place))


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_missing_chunks_are_counted(tmp_path, picture, share):
    path = write_zarr(tmp_path / "a.zarr", picture)
    chunks = sorted(file for file in (path / "0").rglob("*") if file.is_file() and not file.name.startswith("."))
    for chunk in chunks[: int(share * len(chunks))]:
        chunk.unlink()
    if share < 0.5:
        with open_slide(path, mpp=0.5) as slide:
            assert any("of its stored tiles are missing" in note for note in slide.notes)
        return
    with pytest.raises(SlideError) as caught:
        open_slide(path, mpp=0.5)
    assert caught.value.code == "missing-tiles"


def test_damaged_metadata_are_one_line(tmp_path, picture):
    path = write_zarr(tmp_path / "a.zarr", picture)
    facts = json.loads((path / ".zattrs").read_text())
    del facts["multiscales"][0]["datasets"]
    (path / ".zattrs").write_text(json.dumps(facts))
    with pytest.raises(SlideOpenError, match="the OME-Zarr is damaged"):
        open_slide(path)
