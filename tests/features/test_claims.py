"""Claims: one slide, one run; a claim ends with its process."""

import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from eosin.errors import OutputError
from eosin.features import _inference as inference
from eosin.features._claims import DONE_ELSEWHERE, Claims, Todo
from eosin.features._extract import extract
from eosin.features._store import read_bag
from eosin.wsi._job import JobFolder
from eosin.wsi._slide_file import SlideFile

from .test_extract import TILING, Stub, add_slide

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs locks of a POSIX system")


def test_a_claim_is_exclusive_until_it_is_released(tmp_path: Path) -> None:
    first, second, output = Claims(), Claims(), tmp_path / "folder" / "s.h5"
    assert first.take(output)
    assert not second.take(output)
    first.release(output)
    assert list(output.parent.iterdir()) == []
    assert second.take(output)
    second.release_all()
    second.release(output)
    assert list(output.parent.iterdir()) == []


def test_a_claim_ends_with_its_process(tmp_path: Path) -> None:
    output = tmp_path / "s.h5"
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        claims = Claims()
        os.write(writer, b"1" if claims.take(output) else b"0")
        signal.pause()
    assert os.read(reader, 1) == b"1"
    claims = Claims()
    assert not claims.take(output)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert claims.take(output)
    claims.release_all()


def test_a_lock_file_that_was_removed_meanwhile_is_no_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    output, flock = tmp_path / "s.h5", fcntl.flock

    def remove_and_lock(handle: object, operation: int) -> None:
        (tmp_path / ".s.h5.lock").unlink()
        flock(handle, operation)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", remove_and_lock)
    assert not Claims().take(output)


def test_a_file_system_without_locks_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    claims = Claims()
    assert claims.take(tmp_path / "s.h5")
    claims.release_all()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        Claims().take(tmp_path / "file" / "s.h5")


def test_slides_of_other_runs_come_last_and_may_be_done_by_then(tmp_path: Path) -> None:
    slides = [SlideFile(tmp_path / name, name) for name in "abc"]
    other, done = Claims(), set()
    assert other.take(tmp_path / "a.h5")
    todo = Todo(slides, lambda slide: tmp_path / f"{slide.slide_id}.h5", lambda slide: slide.slide_id in done)
    assert todo.take() == (slides[1], False)
    assert todo.take() == (slides[2], False)
    assert todo.take() is None
    assert len(todo) == 1
    (tmp_path / "a.h5").touch()
    done.add("a")
    other.release_all()
    assert todo.take() == (slides[0], True)
    assert todo.take() is None
    todo.put_back([slides[2], slides[1]])
    assert todo.take() == (slides[2], False)
    todo.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]


def test_two_runs_at_the_same_time_do_not_do_the_work_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = JobFolder(tmp_path)
    slides = [add_slide(tmp_path, f"s{i}", n=30, seed=i) for i in range(8)]
    stubs: list[Stub] = []

    def load(*_: object, **__: object) -> Stub:
        stubs.append(Stub())
        return stubs[-1]

    monkeypatch.setattr(inference, "load_encoder", load)
    reports = []
    runs = [
        threading.Thread(target=lambda: reports.append(extract(slides, job, "he_texture", batch_size=3, workers=0)))
        for _ in range(2)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert sum(size for stub in stubs for size, _ in stub.calls) == 8 * 30
    for slide in slides:
        bag = read_bag(job.features(TILING.folder, "he_texture", slide.slide_id), verify=True)
        assert np.isfinite(bag.features).all()
    records = [record for report in reports for record in report.records]
    assert {record.status for record in records} <= {"ok", "skipped"}
    made = [record for record in records if record.status == "ok" and record.message != DONE_ELSEWHERE]
    assert sorted(record.slide_id for record in made) == [slide.slide_id for slide in slides]
    assert not list(tmp_path.rglob("*.lock")) or all(path.name == ".run.json.lock" for path in tmp_path.rglob("*.lock"))
