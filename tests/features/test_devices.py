"""Several device processes: the same files as one makes, one report, and a death that costs one slide."""

import os
import signal
from pathlib import Path

import pytest

from eosin.errors import ConfigError, OutputError
from eosin.features import _devices as module
from eosin.features._devices import DevicePool, DeviceWork
from eosin.features._extract import extract
from eosin.features._inference import EncoderChoice
from eosin.wsi._job import JobFolder
from eosin.wsi._slide_file import SlideFile

from .test_extract import TILING, add_slide

ENCODER = "he_texture"  # needs no network, so that processes start soon


def features_of(job: JobFolder, slide: SlideFile) -> Path:
    return job.features(TILING.folder, ENCODER, slide.slide_id)


@pytest.mark.long
def test_two_devices_make_the_files_that_one_makes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = JobFolder(tmp_path / "one"), JobFolder(tmp_path / "two")
    sizes = (12, 0, 20, 7, 33, 64)
    slides = [add_slide(one.root, f"s{i}", n=n, seed=i) for i, n in enumerate(sizes)]
    for i, n in enumerate(sizes):
        add_slide(two.root, f"s{i}", n=n, seed=i)
    same = [SlideFile(two.root / slide.path.name, slide.slide_id) for slide in slides]
    extract(slides, one, ENCODER, batch_size=5, workers=0)
    two.patches(TILING.folder, "s3").unlink()
    report = extract(same, two, ENCODER, batch_size=5, workers=0, devices=("cpu", "cpu"))
    assert [record.status for record in report.records] == ["ok", "empty", "ok", "failed", "ok", "ok"]
    assert [record.reason for record in report.failed] == ["not-tiled"]
    assert len(two.run_json.read_text()) > 0
    for slide in slides:
        if slide.slide_id != "s3":
            assert features_of(one, slide).read_bytes() == features_of(two, slide).read_bytes()
    assert not list(two.root.rglob(".*.lock.*"))
    features_of(two, slides[4]).unlink()
    again = extract(same, two, ENCODER, batch_size=5, workers=0, devices=("cpu",))
    assert [record.status for record in again.records] == ["skipped", "skipped", "skipped", "failed", "ok", "skipped"]


@pytest.mark.slow
def test_a_device_process_that_dies_costs_the_slide_that_it_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = JobFolder(tmp_path)
    slides = [add_slide(tmp_path, f"s{i}", n=40, seed=i) for i in range(4)]
    hear, killed = DevicePool._hear, []

    def hear_and_kill(pool: DevicePool, process: module._DeviceProcess, todo: module.Todo) -> None:
        hear(pool, process, todo)
        if process.at_work_on == "s1" and not killed:
            killed.append(process.child.process.pid)
            os.kill(process.child.process.pid or 0, signal.SIGKILL)

    monkeypatch.setattr(DevicePool, "_hear", hear_and_kill)
    report = extract(slides, job, ENCODER, batch_size=1, workers=0, devices=("cpu",))
    assert [record.reason for record in report.records] == ["", "crashed", "", ""]
    assert report.failed[0].message.endswith("the process that encoded it on cpu died (SIGKILL)")
    assert not features_of(job, slides[1]).exists()
    monkeypatch.undo()
    assert extract(slides, job, ENCODER, workers=0).count("ok") == 1


@pytest.mark.long
def test_what_an_encoder_refuses_is_said_once(tmp_path: Path) -> None:
    slides = [add_slide(tmp_path, "s")]
    with pytest.raises(ConfigError, match="has no weights to load"):
        extract(slides, JobFolder(tmp_path), ENCODER, weights=Path("w.pth"), devices=("cpu",))
    with pytest.raises(ConfigError, match="exclude each other"):
        extract(slides, JobFolder(tmp_path), ENCODER, device="cpu", devices=("cpu",))


def test_a_process_that_dies_while_it_loads_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = DevicePool._start

    def start_and_kill(pool: DevicePool, device: str) -> module._DeviceProcess:
        process = start(pool, device)
        os.kill(process.child.process.pid or 0, signal.SIGKILL)
        return process

    monkeypatch.setattr(DevicePool, "_start", start_and_kill)
    work = DeviceWork(JobFolder(tmp_path), TILING.folder, EncoderChoice(ENCODER), 4, 0)
    with (
        pytest.raises(OutputError, match=r"the process that loaded the encoder died \(SIGKILL\)"),
        DevicePool(work, ["cpu"]),
    ):
        pass
