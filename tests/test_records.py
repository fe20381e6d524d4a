"""A record is there when its slide is finished, whatever happens next; `run.json` is the view of them all."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from eosin import _records as records
from eosin._batch import Outcome, run_batch
from eosin._files import append_line
from eosin._records import Log, Record, merge, read_begun, read_run_json
from eosin._seals import sealed
from eosin.errors import ConfigError

DIES_AT_S2 = """
import os, signal, sys
from pathlib import Path
from eosin._batch import Outcome, run_batch
def work(item):
    if item == "S2":
        os.kill(os.getpid(), signal.SIGKILL)
    return Outcome()
run_batch(["S0", "S1", "S2", "S3"], work, key=str, stage="tile", run_json=Path(sys.argv[1]))
"""


def lines_of(run_json: Path) -> list[dict[str, object]]:
    return [
        json.loads(line)
        for part in run_json.with_name("records").glob("*.jsonl")
        for line in part.read_text().splitlines()
    ]


def test_a_killed_process_has_the_records_of_all_that_it_finished(tmp_path: Path) -> None:
    run_json = tmp_path / "run.json"
    subprocess.run([sys.executable, "-c", DIES_AT_S2, run_json], check=False)
    assert not run_json.exists()
    assert [(record.slide_id, record.status) for record in read_run_json(run_json)] == [("S0", "ok"), ("S1", "ok")]
    (begun,) = read_begun(run_json)
    assert (begun.slide_id, begun.stage) == ("S2", "tile")
    assert abs(time.time() - begun.at) < 600
    report = run_batch(["S2", "S3"], lambda _: Outcome(), key=str, stage="tile", run_json=run_json)
    assert report.count("ok") == 2
    assert [record["slide_id"] for record in json.loads(run_json.read_text())["records"]] == ["S0", "S1", "S2", "S3"]
    assert not run_json.with_name("records").exists()


def test_a_record_is_there_as_soon_as_its_slide_is_finished(tmp_path: Path) -> None:
    run_json, seen = tmp_path / "run.json", []

    def work(item: str) -> Outcome:
        seen.append([record.slide_id for record in read_run_json(run_json)])
        return Outcome(message=item)

    run_batch(["a", "b", "c"], work, key=str, stage="t", run_json=run_json)
    assert seen == [[], ["a"], ["a", "b"]]
    record = read_run_json(run_json)[0]
    assert record.by.endswith(f"-{os.getpid()}")
    assert abs(time.time() - record.at) < 600


def test_a_skip_does_not_take_the_place_of_what_was_said_of_the_slide(tmp_path: Path) -> None:
    run_json = tmp_path / "run.json"
    run_batch(["a"], lambda _: Outcome(message="345 tiles"), key=str, stage="t", run_json=run_json)
    report = run_batch(["a", "b"], lambda _: Outcome(), key=str, stage="t", run_json=run_json, is_done=lambda _: True)
    assert report.count("skipped") == 2
    assert [(one.slide_id, one.status, one.message) for one in read_run_json(run_json)] == [
        ("a", "ok", "345 tiles"),
        ("b", "skipped", ""),
    ]


def test_the_last_record_counts_whichever_process_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_json = tmp_path / "run.json"
    clock = iter([1000.0, 2000.0, 1500.0])
    monkeypatch.setattr(records.time, "time", lambda: next(clock))
    names = iter(["zz-1-a", "aa-1-b", "mm-1-c"])  # the order of their names must not matter
    monkeypatch.setattr(records, "_part_name", lambda _: next(names))
    log = Log(run_json)
    for status in ("failed", "ok", "empty"):
        log.add(Record("S1", "tile", status))  # type: ignore[arg-type]
    assert [record.status for record in read_run_json(run_json)] == ["ok"]


@pytest.mark.parametrize(
    ("before", "after", "left"),
    [
        ("ok", "skipped", "ok"),
        ("skipped", "ok", "ok"),
        ("failed", "skipped", "skipped"),
        ("skipped", "failed", "failed"),
    ],
)
@pytest.mark.parametrize("names", ["ab", "ba"])
def test_that_a_slide_was_done_says_less_than_how_it_was_done(
    before: str, after: str, left: str, names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_json = tmp_path / "run.json"
    for status, name, at in zip((before, after), names, (1000.0, 2000.0), strict=True):
        monkeypatch.setattr(records.time, "time", lambda at=at: at)
        monkeypatch.setattr(records, "_part_name", lambda _, name=name: f"m-1-{name}")
        Log(run_json).add(Record("S1", "tile", status, "done" if status == "skipped" else ""))  # type: ignore[arg-type]
    assert [record.status for record in read_run_json(run_json)] == [left]


def other_machine(part: Path) -> Path:
    return part.with_name(f"elsewhere-1-{part.stem[-8:]}.jsonl")


@pytest.mark.parametrize(("idle_s", "is_left"), [(60, True), (7200, False)])
def test_parts_of_other_machines_are_merged_and_kept_while_somebody_may_append(
    tmp_path: Path, idle_s: float, is_left: bool
) -> None:
    run_json = tmp_path / "run.json"
    Log(run_json).add(Record("S1", "tile", "ok"))
    (part,) = run_json.with_name("records").iterdir()
    other = part.rename(other_machine(part))
    os.utime(other, (time.time() - idle_s,) * 2)
    merge(run_json)
    assert other.exists() == is_left
    assert [one["slide_id"] for one in json.loads(run_json.read_text())["records"]] == ["S1"]
    append_line(other, json.dumps(sealed({"slide_id": "S2", "stage": "tile", "status": "ok", "at": time.time()})))
    assert {record.slide_id for record in read_run_json(run_json)} == {"S1", "S2"}


@pytest.mark.parametrize(
    "tear",
    [
        lambda text: text[:-20],
        lambda text: text + "{",
        lambda text: "nonsense\n" + text,
        lambda text: text + "[1]\n",
        lambda text: text + '{"slide_id": "x", "of": "a later version"}\n',
        lambda text: text + "\x00" * 40,
    ],
)
def test_a_torn_line_costs_no_other_record(tmp_path: Path, tear: Callable[[str], str]) -> None:
    run_json = tmp_path / "run.json"
    log = Log(run_json)
    for name in ("S1", "S2", "S3"):
        log.add(Record(name, "tile", "ok"))
    (part,) = run_json.with_name("records").iterdir()
    text = part.read_text()
    part.write_text(tear(text))
    whole = {"S1", "S2"} if len(tear(text)) < len(text) else {"S1", "S2", "S3"}
    assert {record.slide_id for record in read_run_json(run_json)} == whole
    merge(run_json)
    assert {record.slide_id for record in read_run_json(run_json)} == whole


def test_a_job_of_0_1_is_read(tmp_path: Path) -> None:
    old = {"slide_id": "S1", "stage": "tile", "status": "ok", "reason": "", "message": "", "seconds": 1.5}
    (tmp_path / "run.json").write_text(json.dumps({"schema": 1, "eosin": "0.1", "records": [old]}))
    assert read_run_json(tmp_path / "run.json") == [Record("S1", "tile", "ok", seconds=1.5)]
    run_batch(["S2"], lambda _: Outcome(), key=str, stage="tile", run_json=tmp_path / "run.json")
    assert [record.slide_id for record in read_run_json(tmp_path / "run.json")] == ["S1", "S2"]


WAITS_AFTER_S1 = """
import sys, time
from pathlib import Path
from eosin._batch import Outcome, run_batch
from eosin._processes import Stopped, require_running, stoppable
def work(item):
    while item == "S2":
        require_running()
        time.sleep(0.05)
    return Outcome()
with stoppable():
    try:
        run_batch(["S0", "S1", "S2"], work, key=str, stage="tile", run_json=Path(sys.argv[1]))
    except Stopped:
        sys.exit(143)
"""


def test_a_run_that_is_stopped_merges_what_it_has(tmp_path: Path) -> None:
    run_json = tmp_path / "run.json"
    process = subprocess.Popen([sys.executable, "-c", WAITS_AFTER_S1, run_json])
    end = time.monotonic() + 60
    while not read_begun(run_json) or read_begun(run_json)[0].slide_id != "S2":
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    assert [one["slide_id"] for one in json.loads(run_json.read_text())["records"]] == ["S0", "S1"]


def test_the_work_per_record_does_not_grow_with_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of n slides every record is written once while the run goes on, and once more at its end."""
    written: list[int] = []
    append, write = records.append_line, records.write_json
    monkeypatch.setattr(records, "append_line", lambda path, line: (written.append(1), append(path, line)))
    monkeypatch.setattr(
        records, "write_json", lambda path, data: (written.append(len(data["records"])), write(path, data))
    )
    run_batch(range(200), lambda _: Outcome(), key=str, stage="t", run_json=tmp_path / "run.json")
    assert sum(written) == 200 * 3  # begun, finished, merged


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the run.json of a job with more records than one JSON file is to hold."""
    monkeypatch.setattr(records, "MOST_IN_JSON", 20)
    run_batch([f"S{n:02}" for n in range(30)], lambda _: Outcome(message="ü"), key=str, stage="tile",
              run_json=tmp_path / "run.json")  # fmt: skip
    return tmp_path / "run.json"


def test_a_large_job_has_an_indexed_store_that_run_json_names(large: Path) -> None:
    head = json.loads(large.read_text())
    assert head["counts"] == {"tile": {"ok": 30}}
    assert "records" not in head
    assert [path.name for path in large.with_name("records").iterdir()] == [head["store"]]
    assert [record.slide_id for record in read_run_json(large)] == [f"S{n:02}" for n in range(30)]
    assert read_run_json(large)[0].message == "ü"


def test_what_is_new_goes_into_a_store_by_the_rule_of_all_records(large: Path) -> None:
    first = read_run_json(large)
    report = run_batch(["S00", "S01", "X"], lambda item: Outcome(message=item), key=str, stage="tile", run_json=large,
                       is_done=lambda item: item == "S00")  # fmt: skip
    assert [record.status for record in report.records] == ["skipped", "ok", "ok"]
    after = {record.slide_id: record for record in read_run_json(large)}
    assert len(after) == 31
    assert after["S00"] == first[0]
    assert (after["S01"].message, after["X"].message) == ("S01", "X")
    assert len(list(large.with_name("records").iterdir())) == 1


def test_one_line_is_added_to_a_large_job_without_reading_the_others(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(records.Store, "rows", refuse)
    log = Log(large)
    assert log.knows("S03", "tile")
    assert not log.knows("S03", "extract")
    log.add(Record("Y", "tile", "ok"))
    assert log.knows("Y", "tile")
    merge(large)
    assert Log(large).knows("Y", "tile")


def test_a_reader_takes_the_store_that_takes_the_place_of_its_own(large: Path) -> None:
    log = Log(large)
    Log(large).add(Record("Y", "tile", "ok"))
    merge(large)
    assert log.knows("S03", "tile")
    assert log.knows("Y", "tile")


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_store_is_refused(damage: str, large: Path) -> None:
    (store,) = large.with_name("records").iterdir()
    data = bytearray(store.read_bytes())
    data[len(data) // 2] ^= 1
    store.write_bytes(data if damage == "flip" else data[:-100])
    if damage == "gone":
        store.unlink()
    named = json.loads(large.read_text())["store"]
    log = Log(large)
    log.add(Record("Y", "tile", "ok"))
    for read in (lambda: read_run_json(large), lambda: log.knows("S03", "tile"), lambda: merge(large)):
        with pytest.raises(ConfigError, match=r"run\.json: is not a run\.json of eosin"):
            read()
    assert json.loads(large.read_text())["store"] == named  # no copy of the damage under a new checksum


def test_a_small_job_that_grows_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_json = tmp_path / "run.json"
    run_batch(["a", "b"], lambda _: Outcome(), key=str, stage="t", run_json=run_json)
    before = read_run_json(run_json)
    monkeypatch.setattr(records, "MOST_IN_JSON", 2)
    run_batch(["c"], lambda _: Outcome(), key=str, stage="t", run_json=run_json)
    assert read_run_json(run_json)[:2] == before
    assert [record.slide_id for record in read_run_json(run_json)] == ["a", "b", "c"]
