"""run_batch isolates failures and resumes; write_file leaves whole files or none."""

import errno
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from eosin import _batch as batch
from eosin._batch import Outcome, run_batch
from eosin._claims import Todo
from eosin._files import file_fingerprint
from eosin._records import Record, Report, read_run_json
from eosin.errors import ConfigError, MoreToDo, OutputError, SlideOpenError


def work(kind: str) -> Outcome:
    """Behave as the item's name says."""
    if kind.startswith("bad"):
        raise SlideOpenError(Path(kind), "cannot be opened")
    if kind.startswith("bug"):
        raise RuntimeError("a\nbug")
    if kind.startswith("killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    if kind.startswith("late"):
        time.sleep(300)
    if kind.startswith("full"):
        raise OutputError(Path("/disk"), "disk full")
    return Outcome("empty" if kind.startswith("empty") else "ok")


def statuses(report: Report) -> dict[str, tuple[str, str]]:
    return {record.slide_id: (record.status, record.reason) for record in report.records}


def test_failures_are_isolated_and_reported_in_order(tmp_path: Path) -> None:
    seen: list[Record] = []
    report = run_batch(
        ["good", "bad", "bug", "empty", "done"],
        work,
        key=str,
        stage="test",
        is_done=lambda item: item == "done",
        run_json=tmp_path / "job" / "run.json",
        progress=seen.append,
    )
    assert statuses(report) == {
        "good": ("ok", ""),
        "bad": ("failed", "unreadable"),
        "bug": ("failed", "internal"),
        "empty": ("empty", ""),
        "done": ("skipped", "done"),
    }
    assert [record.slide_id for record in report.records] == ["good", "bad", "bug", "empty", "done"]
    assert len(seen) == 5
    assert report.exit_code == 1
    assert report.summary() == "5 slides: 1 ok, 1 empty, 1 skipped, 2 failed"
    assert {record.slide_id for record in read_run_json(tmp_path / "job" / "run.json")} == set(statuses(report))
    assert "\n" not in report.records[2].message


@pytest.mark.long
def test_a_process_that_dies_or_hangs_costs_one_slide() -> None:
    report = run_batch(
        ["good1", "killed", "late", "good2", "bad", "good3"], work, key=str, stage="test", workers=2, timeout_s=12
    )  # the start of a process counts, and is slow on a busy machine
    assert statuses(report) == {
        "good1": ("ok", ""),
        "killed": ("failed", "crashed"),
        "late": ("failed", "timeout"),
        "good2": ("ok", ""),
        "bad": ("failed", "unreadable"),
        "good3": ("ok", ""),
    }
    assert "SIGKILL" in report.records[1].message


@pytest.mark.parametrize("workers", [0, 1])
def test_a_full_disk_stops_the_run(workers: int, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="disk full"):
        run_batch(["good", "full", "good2"], work, key=str, stage="t", workers=workers, run_json=tmp_path / "run.json")
    assert [record.slide_id for record in read_run_json(tmp_path / "run.json")] == ["good"]


def test_run_json_merges_stages_and_shards(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    for shard in [(0, 2), (1, 2)]:
        run_batch(["a", "b", "c"], work, key=str, stage="tile", run_json=path, shard=shard)
    run_batch(["a"], work, key=str, stage="extract", run_json=path)
    assert [(r.stage, r.slide_id) for r in read_run_json(path)] == [
        ("extract", "a"),
        ("tile", "a"),
        ("tile", "b"),
        ("tile", "c"),
    ]


def test_a_foreign_run_json_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("[1, 2]")
    with pytest.raises(ConfigError, match=r"not a run\.json"):
        run_batch(["a"], work, key=str, stage="tile", run_json=tmp_path / "run.json")
    assert (tmp_path / "run.json").read_text() == "[1, 2]"


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0)])
def test_impossible_shards_are_refused(shard: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="shard"):
        run_batch(["a"], work, key=str, stage="t", shard=shard)


def test_duplicate_ids_are_refused_before_any_work() -> None:
    with pytest.raises(ConfigError, match=r"unique.*same"):
        run_batch(["same", "same"], work, key=str, stage="t")


def test_fingerprint_sees_both_ends_and_the_size(tmp_path: Path) -> None:
    def fingerprint(content: bytes) -> str:
        (tmp_path / "f").write_bytes(content)
        return file_fingerprint(tmp_path / "f")

    base = bytes(3 * 2**20)
    variants = [base, b"1" + base[1:], base[:-1] + b"1", base + b"\0", b""]
    assert len({fingerprint(content) for content in variants}) == len(variants)


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EROFS", "EFBIG"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_full_disk_is_no_bad_slide(code: str, workers: int, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="S1"):
        run_batch(
            [f"S1 {code}", "S2"], fill_the_disk, key=str, stage="t", workers=workers, run_json=tmp_path / "r.json"
        )


def fill_the_disk(item: str) -> Outcome:
    code = getattr(errno, item.split()[-1], None)
    if code is not None:
        raise OSError(code, os.strerror(code), item)
    return Outcome()


def read_missing(item: str) -> Outcome:
    Path(item).read_bytes()
    return Outcome()


def test_a_slide_that_is_gone_is_called_missing(tmp_path: Path) -> None:
    report = run_batch([str(tmp_path / "gone.svs")], read_missing, key=str, stage="tile")
    assert [(record.reason, record.message) for record in report.records] == [
        ("missing", "gone.svs: No such file or directory")
    ]


@pytest.mark.parametrize("change", [("S1", "S2"), ('"ok"', '"failed"'), ("checksum", "check"), ("records", "record")])
def test_a_run_json_that_was_changed_is_refused_and_never_overwritten(tmp_path: Path, change: tuple[str, str]) -> None:
    path = tmp_path / "run.json"
    run_batch(["S1"], lambda _: Outcome(), key=str, stage="t", run_json=path)
    assert [record.slide_id for record in read_run_json(path)] == ["S1"]
    damaged = path.read_text().replace(*change, 1)
    path.write_text(damaged)
    with pytest.raises(ConfigError, match=r"not a run\.json"):
        run_batch(["S1"], lambda _: Outcome(), key=str, stage="t", run_json=path)
    assert path.read_text() == damaged


@pytest.mark.parametrize("workers", [0, 1])
def test_no_slide_is_begun_after_the_time_of_the_job(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) - 5))
    with pytest.raises(MoreToDo, match=r"2 of 3 slides are left.*run the same command again"):
        run_batch(
            ["a", "b", "done"],
            work,
            key=str,
            stage="t",
            workers=workers,
            is_done=lambda item: item == "done",
            run_json=tmp_path / "run.json",
        )
    assert [record.slide_id for record in read_run_json(tmp_path / "run.json")] == ["done"]


def test_a_slide_fits_when_the_longest_so_far_would(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(batch.time, "time", lambda: clock[0])
    monkeypatch.setattr(batch.time, "monotonic", lambda: clock[0])
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1100")
    deadline = batch._Deadline()
    assert deadline.allows()
    deadline.begin("a")
    clock[0] = 1045
    assert deadline.end("a") == 45
    assert deadline.allows()
    clock[0] = 1056
    assert not deadline.allows()
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    assert batch._Deadline().allows()


def test_two_runs_share_the_items(tmp_path: Path) -> None:
    made: list[str] = []

    def make(item: str) -> Outcome:
        made.append(item)
        time.sleep(0.02)
        (tmp_path / item).touch()
        return Outcome()

    def run() -> None:
        run_batch(
            [f"S{number}" for number in range(20)],
            make,
            key=str,
            stage="t",
            is_done=lambda item: (tmp_path / item).exists(),
            output=lambda item: tmp_path / item,
            run_json=tmp_path / "run.json",
        )

    runs = [threading.Thread(target=run) for _ in range(3)]
    for one in runs:
        one.start()
    for one in runs:
        one.join()
    assert sorted(made) == sorted(f"S{number}" for number in range(20))
    assert {record.status for record in read_run_json(tmp_path / "run.json")} <= {"ok", "skipped"}
    assert not any(record.message for record in read_run_json(tmp_path / "run.json"))


def test_results_are_recorded_as_they_come_and_reported_in_the_order_of_the_items(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def make(todo: Todo[str]) -> batch.Results:
        items = [taken[0] for _ in range(3) if (taken := todo.take()) is not None]
        for item in reversed(items):
            yield item, Outcome()
            seen.append([record.slide_id for record in read_run_json(tmp_path / "run.json")])

    report = batch.collect(["a", "b", "c"], make, key=str, stage="t", run_json=tmp_path / "run.json")
    assert seen == [["c"], ["c", "b"], ["c", "b", "a"]]
    assert [record.slide_id for record in report.records] == ["a", "b", "c"]
