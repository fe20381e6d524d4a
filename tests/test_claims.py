"""Claims: one slide, one run; a claim ends with its process, or with its lease where there are no locks."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from features.test_extract import TILING, Stub, add_slide

from eosin import _claims as claims
from eosin._claims import DONE_ELSEWHERE, LEASE_S, Claims, Lease, Todo, check_claims, claimed
from eosin.errors import OutputError
from eosin.features import _inference as inference
from eosin.features._extract import extract
from eosin.features._store import read_bag
from eosin.wsi._job import JobFolder
from eosin.wsi._slide_file import SlideFile

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

    assert claims.why_leases(tmp_path) == ""
    monkeypatch.setattr(fcntl, "flock", remove_and_lock)
    assert not Claims().take(output)


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the file system have no locks, as Lustre without the option flock."""

    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    claims._why_no_locks.cache_clear()
    yield
    claims._why_no_locks.cache_clear()


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_lease_is_exclusive_until_it_is_released(tmp_path: Path) -> None:
    first, second, output = Claims(), Claims(), tmp_path / "s.h5"
    assert "no locks" in claims.why_leases(tmp_path)
    assert first.take(output)
    assert not second.take(output)
    first.release(output)
    assert second.take(output)
    second.release_all()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        Claims().take(tmp_path / "file" / "s.h5")


@pytest.mark.usefixtures("no_locks")
def test_a_lease_whose_holder_is_gone_is_broken_by_one_of_many(tmp_path: Path) -> None:
    output, lease = tmp_path / "s.h5", tmp_path / ".s.h5.lease"
    lease.write_text('{"by": "dead", "token": "x"}')
    assert not Claims().take(output)
    os.utime(lease, (time.time() - LEASE_S - 60,) * 2)
    everybody = [Claims() for _ in range(8)]
    taken: list[bool] = []
    threads = [threading.Thread(target=lambda one=one: taken.append(one.take(output))) for one in everybody]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(taken) == 1
    for one in everybody:
        one.release_all()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_locks")
def test_a_lease_is_renewed_while_its_holder_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_S", 0.05)
    holder, output = Claims(), tmp_path / "s.h5"
    assert holder.take(output)
    os.utime(tmp_path / ".s.h5.lease", (0, 0))
    end = time.monotonic() + 20
    while (tmp_path / ".s.h5.lease").stat().st_mtime == 0 and time.monotonic() < end:
        time.sleep(0.05)
    assert not Claims().take(output)
    holder.release_all()


def test_a_lease_that_was_taken_anew_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at a stale lease and its removal another run may have broken it and taken its own."""
    lease, rename = tmp_path / ".s.h5.lease", Path.rename
    lease.write_text('{"by": "dead", "token": "old"}')
    os.utime(lease, (0, 0))

    def late(self: Path, target: Path) -> Path:
        lease.write_text('{"by": "alive", "token": "new"}')
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    assert Lease.take(lease) is None
    assert json.loads(lease.read_text())["token"] == "new"
    assert list(tmp_path.iterdir()) == [lease]


def test_a_mount_whose_locks_end_at_the_machine_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path.stat().st_dev
    line = f"36 35 {os.major(device)}:{os.minor(device)} / /x rw,noatime shared:1 - lustre mgs:/x rw,localflock\n"
    read_text = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda self, **how: line if self.name == "mountinfo" else read_text(self, **how)
    )
    claims._why_no_locks.cache_clear()
    assert "localflock" in claims.why_leases(tmp_path)
    claims._why_no_locks.cache_clear()


def test_a_claim_that_another_holds_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "POLL_S", 0.01)
    other, seen = Claims(), []
    assert other.take(tmp_path / "fold_0")

    def wait() -> None:
        with claimed(tmp_path / "fold_0"):
            seen.append("mine")

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.2)
    assert seen == []
    other.release_all()
    waiting.join()
    assert seen == ["mine"]


def test_slides_of_other_runs_come_last_and_may_be_done_by_then(tmp_path: Path) -> None:
    slides = [SlideFile(tmp_path / name, name) for name in "abc"]
    other, done = Claims(), set()
    assert other.take(tmp_path / "a.h5")
    todo = Todo(
        slides,
        key=lambda slide: slide.slide_id,
        output=lambda slide: tmp_path / f"{slide.slide_id}.h5",
        is_done=lambda slide: slide.slide_id in done,
    )
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


def test_two_processes_try_whether_claims_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_claims(tmp_path) == "locks; two processes on this machine exclude each other"
    monkeypatch.setenv(claims.FORCE, "1")
    assert check_claims(tmp_path) == "leases, because EOSIN_LEASES=1 is set"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("answers", "told"), [([True], "same slide"), ([False, False], "outlives")])
def test_claims_that_do_not_work_are_told(
    answers: list[bool], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = iter(answers)
    monkeypatch.setattr(claims, "call_apart", lambda *_, **__: next(given))
    with pytest.raises(OutputError, match=told):
        check_claims(tmp_path)
