"""Extraction: content, resume, failures that stay with their slide."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from numpy.typing import NDArray

from eosin._files import file_fingerprint
from eosin._processes import Stopped
from eosin.errors import ConfigError, OutputError
from eosin.features import _encoding as encoding
from eosin.features import _inference as inference
from eosin.features import _reading as reading
from eosin.features._bag import FeatureBag
from eosin.features._encoders import find_encoder
from eosin.features._extract import extract
from eosin.features._inference import Encoder, TolerantEncoder, load_encoder
from eosin.features._reading import ReadRequest, TileBatch
from eosin.features._store import read_bag, read_footer
from eosin.wsi._coordinates import write_grid
from eosin.wsi._grid import TileGrid, Tiling
from eosin.wsi._job import JobFolder
from eosin.wsi._slide_file import SlideFile

TILING = Tiling(mpp=0.5, patch_size=32)
ENCODER = "timm:test_vit?random"


def add_slide(folder: Path, slide_id: str, *, n: int = 12, seed: int = 0) -> SlideFile:
    """Paint noise with a tint, and lay n tiles over it in the job beside it."""
    rng = np.random.default_rng(seed)
    pixels = (rng.integers(0, 120, (256, 256, 3)) + rng.integers(0, 120, 3)).astype(np.uint8)
    path = folder / f"{slide_id}.tiff"
    tifffile.imwrite(
        path, pixels, tile=(64, 64), photometric="rgb", resolution=(20000, 20000), resolutionunit="CENTIMETER"
    )
    origins = np.stack(np.meshgrid(np.arange(8) * 32, np.arange(8) * 32), axis=-1).reshape(-1, 2)[:n].astype(np.int64)
    grid = TileGrid(origins, 32, TILING, (256, 256), 0.5)
    write_grid(
        JobFolder(folder).patches(TILING.folder, slide_id),
        grid,
        slide_id=slide_id,
        mpp_source="user",
        fingerprint=file_fingerprint(path),
    )
    return SlideFile(path, slide_id)


def features_of(job: JobFolder, slide: SlideFile) -> Path:
    return job.features(TILING.folder, "timm_test_vit_random", slide.slide_id)


@pytest.fixture
def job(tmp_path: Path) -> JobFolder:
    return JobFolder(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_are_the_encoded_tiles_in_the_order_of_the_grid(job: JobFolder, workers: int) -> None:
    slides = [add_slide(job.root, f"s{i}", n=n, seed=i) for i, n in enumerate((12, 0, 1, 20))]
    report = extract(slides, job, ENCODER, batch_size=5, workers=workers)
    assert [(record.slide_id, record.status) for record in report.records] == [
        ("s0", "ok"),
        ("s1", "empty"),
        ("s2", "ok"),
        ("s3", "ok"),
    ]
    encoder = load_encoder(ENCODER)
    for slide in slides:
        bag = read_bag(features_of(job, slide), verify=True)
        assert bag.grid is not None
        pixels = tifffile.imread(slide.path)
        tiles = [pixels[y : y + 32, x : x + 32] for x, y in bag.grid.origins_px0.tolist()]
        expected = encoder.encode(np.array(tiles, np.uint8).reshape(-1, 32, 32, 3))
        np.testing.assert_allclose(bag.features, expected, rtol=1e-4, atol=1e-5)
        assert (bag.spec.encoder, bag.spec.mpp, bag.spec.patch_size, bag.spec.dim) == (ENCODER, 0.5, 32, 64)
        assert bag.spec.weights_hash == encoder.weights_hash
        assert bag.provenance["mpp_source"] == "user"
    records = json.loads(job.run_json.read_text())["records"]
    assert [record["slide_id"] for record in records] == ["s0", "s1", "s2", "s3"]


def test_a_second_run_skips_what_is_done_and_redoes_what_changed(job: JobFolder) -> None:
    slides = [add_slide(job.root, f"s{i}", seed=i) for i in range(4)]
    extract(slides, job, ENCODER, workers=0)
    before = {slide.slide_id: features_of(job, slide).stat().st_mtime_ns for slide in slides}
    features_of(job, slides[1]).write_bytes(features_of(job, slides[1]).read_bytes()[:-4000])
    slides[2] = add_slide(job.root, "s2", seed=9)
    add_slide(job.root, "s3", n=3, seed=3)
    report = extract(slides, job, ENCODER, workers=0)
    assert [record.status for record in report.records] == ["skipped", "ok", "ok", "ok"]
    after = {slide.slide_id: features_of(job, slide).stat().st_mtime_ns for slide in slides}
    assert [before[name] == after[name] for name in before] == [True, False, False, False]
    assert read_footer(features_of(job, slides[3])).n_rows == 3
    again = extract(slides, job, ENCODER, workers=0)
    assert again.count("skipped") == 4


def test_other_precision_is_another_result(job: JobFolder) -> None:
    slide = add_slide(job.root, "s")
    extract([slide], job, ENCODER, workers=0)
    exact = np.array(read_bag(features_of(job, slide)).features)
    report = extract([slide], job, ENCODER, precision="bf16", workers=0)
    assert report.count("ok") == 1
    bag = read_bag(features_of(job, slide))
    assert bag.features.dtype == np.float16
    np.testing.assert_allclose(bag.features, exact, atol=0.1, rtol=0.1)


def test_every_fault_stays_with_its_slide(job: JobFolder) -> None:
    slides = [add_slide(job.root, f"s{i}", seed=i) for i in range(6)]
    job.patches(TILING.folder, "s1").unlink()
    tifffile.imwrite(slides[2].path, np.zeros((256, 256, 3), np.uint8), tile=(64, 64), photometric="rgb")
    slides[3].path.write_bytes(b"no slide")
    job.patches(TILING.folder, "s4").write_bytes(b"no grid")
    slides[5].path.unlink()
    report = extract(slides, job, ENCODER, workers=1)
    assert [(record.status, record.reason) for record in report.records] == [
        ("ok", ""),
        ("failed", "not-tiled"),
        ("failed", "changed"),
        ("failed", "changed"),
        ("failed", "damaged"),
        ("failed", "missing"),
    ]
    assert report.exit_code == 1


@pytest.mark.parametrize(("blow", "reason"), [(signal.SIGKILL, "crashed"), (signal.SIGSTOP, "timeout")])
@pytest.mark.long
def test_a_decoder_that_dies_or_hangs_loses_its_slide_only(
    job: JobFolder, monkeypatch: pytest.MonkeyPatch, blow: signal.Signals, reason: str
) -> None:
    plain = reading._SlideReader.read

    def read(child: reading._SlideReader, request: ReadRequest, stopping: threading.Event) -> Iterator[TileBatch]:
        try:
            for batch in plain(child, request, stopping):
                if request.slide.slide_id == "b":
                    monkeypatch.setattr(reading, "HANG_S", 1.0 if blow == signal.SIGSTOP else 60.0)
                    os.kill(child.child.process.pid, blow)
                yield batch
        finally:
            monkeypatch.setattr(reading, "HANG_S", 60.0)

    monkeypatch.setattr(reading._SlideReader, "read", read)
    slides = [add_slide(job.root, name, n=60, seed=i) for i, name in enumerate("abc")]
    report = extract(slides, job, ENCODER, batch_size=1, workers=1)
    assert [record.reason for record in report.records] == ["", reason, ""]
    assert not features_of(job, slides[1]).exists()


def test_which_tiling(job: JobFolder) -> None:
    with pytest.raises(ConfigError, match="eosin tile"):
        extract([], job, ENCODER)
    slide = add_slide(job.root, "s")
    other = job.patches("1mpp_256px_0px_overlap", "s")
    other.parent.mkdir(parents=True)
    other.write_bytes(job.patches(TILING.folder, "s").read_bytes())
    with pytest.raises(ConfigError, match="several tilings"):
        extract([slide], job, ENCODER)
    with pytest.raises(ConfigError, match="has no tiling x"):
        extract([slide], job, ENCODER, tiling="x")
    assert extract([slide], job, ENCODER, tiling=TILING.folder, workers=0).count("ok") == 1


@pytest.mark.parametrize(("mpp", "warned"), [(0.5, False), (1.0, True)])
def test_another_resolution_than_the_encoder_knows_is_warned_of(
    job: JobFolder, caplog: pytest.LogCaptureFixture, mpp: float, warned: bool
) -> None:
    run = encoding.Extraction(job, "any folder", Encoder(find_encoder("kaiko_vits16"), "", None))
    run.check_tiles(Tiling(mpp=mpp, patch_size=256))
    assert ("trained on tiles of about 0.5" in caplog.text) == warned


def test_tiles_that_the_descriptor_cannot_take_are_refused(job: JobFolder) -> None:
    with pytest.raises(ConfigError, match="at least 32 px, these have 16"):
        encoding.Extraction(job, "x", load_encoder("he_texture")).check_tiles(Tiling(mpp=0.5, patch_size=16))


def test_the_name_of_a_folder_says_nothing_of_its_tiles(job: JobFolder) -> None:
    slide = add_slide(job.root, "s")
    misnamed = "0.5mpp_8px_0px_overlap"
    job.patches(TILING.folder, "s").parent.parent.rename(job.root / misnamed)
    assert extract([slide], job, "he_texture", tiling=misnamed, workers=0).count("ok") == 1


def test_shards_share_the_work(job: JobFolder) -> None:
    slides = [add_slide(job.root, f"s{i}", seed=i) for i in range(5)]
    reports = [extract(slides, job, ENCODER, workers=0, shard=(i, 2)) for i in range(2)]
    assert [len(report.records) for report in reports] == [3, 2]
    assert all(features_of(job, slide).is_file() for slide in slides)


class Stub(Encoder):
    """An encoder whose rows are the tiles' mean colours, with faults on demand."""

    def __init__(self, *, nan_in: tuple[str, ...] = (), room: int = 100, scale: float = 1, refuses: int = 0) -> None:
        super().__init__(replace(find_encoder("he_texture"), dim=3), "hash", None, precision="fp16")
        self.nan_in, self.room, self.scale, self.refuses = nan_in, room, scale, refuses
        self.calls: list[tuple[int, str]] = []

    def start(self, tiles: NDArray[np.uint8], *, precision: str | None = None) -> Callable[[], NDArray[np.float32]]:
        precision = precision or self.precision
        self.calls.append((len(tiles), precision))
        if len(tiles) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if len(tiles) == self.refuses:
            raise ValueError("unforeseen")
        rows = tiles.reshape(len(tiles), -1, 3).mean(axis=1, dtype=np.float32) * self.scale
        return lambda: np.full_like(rows, np.nan) if precision in self.nan_in else rows


def test_overflow_is_computed_again_in_fp32() -> None:
    encoder = Stub(nan_in=("fp16",))
    rows = TolerantEncoder(encoder, 8)(np.ones((3, 4, 4, 3), np.uint8))
    assert encoder.calls == [(3, "fp16"), (3, "fp32")]
    np.testing.assert_array_equal(rows, np.ones((3, 3)))


def test_out_of_memory_halves_the_step_and_stays_there() -> None:
    encoder = Stub(room=3)
    careful = TolerantEncoder(encoder, 8)
    tiles = np.arange(8, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    np.testing.assert_array_equal(careful(tiles)[:, 0], np.arange(8))
    np.testing.assert_array_equal(careful(tiles)[:, 0], np.arange(8))
    assert [size for size, _ in encoder.calls] == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    encoder.room = 0
    with pytest.raises(OutputError, match="one tile"):
        careful(tiles)


def test_features_that_stay_not_finite_fail_the_slide(job: JobFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    slides = [add_slide(job.root, "s")]
    monkeypatch.setattr(inference, "load_encoder", lambda *_, **__: Stub(nan_in=("fp16", "fp32")))
    report = extract(slides, job, "he_texture", workers=0)
    assert report.failed[0].reason == "non-finite"
    assert "x=0, y=0" in report.failed[0].message
    assert list(job.root.rglob("features_*/*")) == []


def test_large_values_are_kept_in_float32(job: JobFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "load_encoder", lambda *_, **__: Stub(scale=1000))
    slide = add_slide(job.root, "s")
    extract([slide], job, "he_texture", workers=0)
    assert read_bag(job.features(TILING.folder, "he_texture", "s")).features.dtype == np.float32


@pytest.mark.parametrize("batch_size", [4, 64])
def test_a_surprise_from_the_encoder_is_noted_for_its_own_slide(
    job: JobFolder, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    monkeypatch.setattr(inference, "load_encoder", lambda *_, **__: Stub(refuses=3 if batch_size == 4 else 7))
    slides = [add_slide(job.root, f"s{n}", n=n) for n in (5, 7, 6)]
    report = extract(slides, job, "he_texture", batch_size=batch_size, workers=0)
    assert [record.reason for record in report.records] == ["", "internal", ""]
    assert "unforeseen" in report.failed[0].message


def test_what_was_read_ahead_of_a_failed_slide_is_dropped(job: JobFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = Stub(refuses=7)
    monkeypatch.setattr(inference, "load_encoder", lambda *_, **__: stub)
    slides = [add_slide(job.root, "a", n=40), add_slide(job.root, "b", n=5)]
    monkeypatch.setattr(stub, "refuses", 4)
    report = extract(slides, job, "he_texture", batch_size=4, workers=0)
    assert [record.reason for record in report.records] == ["internal", "internal"]
    assert len(stub.calls) <= 4, "at most one batch more than the refused one is begun for each slide"


def test_a_folder_that_cannot_be_written_stops_the_run(job: JobFolder) -> None:
    slide = add_slide(job.root, "s")
    features_of(job, slide).parent.parent.joinpath("features_timm_test_vit_random").write_text("in the way")
    with pytest.raises(OutputError):
        extract([slide], job, ENCODER, workers=0)


def test_memory_for_tiles_comes_from_where_the_device_wants_it(job: JobFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []

    def allocate(shape: tuple[int, ...]) -> NDArray[np.uint8]:
        shapes.append(shape)
        return np.empty(shape, np.uint8)

    monkeypatch.setattr("eosin.features._extract.allocator", lambda _: allocate)
    slides = [add_slide(job.root, "s", n=5)]
    assert extract(slides, job, ENCODER, batch_size=3, workers=1).count("ok") == 1
    assert shapes == [(3, 32, 32, 3), (2, 32, 32, 3)]


def test_files_are_written_while_the_next_slide_is_encoded(job: JobFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "load_encoder", lambda *_, **__: Stub())
    write, encoded = encoding.write_bag, threading.Event()
    keep = encoding.Encoding._keep

    def keep_and_tell(self: encoding.Encoding, slide: SlideFile, batch: TileBatch, rows: NDArray[np.float32]) -> None:
        keep(self, slide, batch, rows)
        if slide.slide_id == "s1":
            encoded.set()

    def wait_and_write(path: Path, bag: FeatureBag) -> None:
        assert path.stem != "s0" or encoded.wait(10), "the second slide was not encoded before the first was written"
        write(path, bag)

    monkeypatch.setattr(encoding.Encoding, "_keep", keep_and_tell)
    monkeypatch.setattr(encoding, "write_bag", wait_and_write)
    slides = [add_slide(job.root, f"s{i}", n=4, seed=i) for i in range(3)]
    assert extract(slides, job, "he_texture", workers=0).count("ok") == 3


def test_what_cannot_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler\nlong story")

    monkeypatch.setattr(torch.nn.Module, "compile", fail)
    with pytest.raises(ConfigError, match=r"cannot be compiled on this machine \(no compiler\); remove --compile"):
        load_encoder(ENCODER, compiled=True)
    with pytest.raises(ConfigError, match="not a neural network"):
        load_encoder("he_texture", compiled=True)


@pytest.mark.slow
def test_a_compiled_encoder_gives_the_same_rows(job: JobFolder) -> None:
    encoder = load_encoder(ENCODER, compiled=True)
    plain = load_encoder(ENCODER)
    tiles = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    for b in (7, 1, 4):
        np.testing.assert_allclose(encoder.encode(tiles[:b]), plain.encode(tiles[:b]), rtol=1e-4, atol=1e-5)
    assert encoder.weights_hash == plain.weights_hash


def test_a_run_that_is_stopped_has_a_record_of_every_file_that_it_wrote(
    job: JobFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide = add_slide(job.root, "s0")
    run = encoding.Extraction(job, TILING.folder, load_encoder(ENCODER))
    write = encoding.write_bag

    def write_slowly(path: Path, bag: FeatureBag) -> None:
        time.sleep(0.3)  # the signal comes before the disk is done
        write(path, bag)

    def read_until_stopped() -> Iterator[object]:
        yield from reading.read_slide(ReadRequest(slide, run.patches(slide), 5))
        yield reading.SlideEnd("s0")
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(encoding, "write_bag", write_slowly)
    found: list[str] = []
    loop = encoding.Encoding(run, read_until_stopped(), {"s0": slide}, batch_size=5)  # type: ignore[arg-type]
    with loop, pytest.raises(Stopped):
        found.extend(name for name, _ in loop)
    assert found == ["s0"]
