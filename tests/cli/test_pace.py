"""A line a minute where there is no terminal, a bar where there is one, and the time that is left in both."""

import io
import sys
import threading
import time

import pytest

from eosin._batch import tell_tiles
from eosin._records import Record
from eosin.cli import _progress
from eosin.cli._progress import Pace, duration, progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_the_line_says_how_far_how_fast_how_long_and_what_failed(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("tile", 100) as advance:
        assert advance is not None
        for number in range(10):  # done by a run before this one: they say nothing of the pace
            advance(Record(f"old{number}", "tile", "skipped", "done"))
        for number in range(30):
            clock[0] += 6
            advance(Record(f"new{number}", "tile", "failed" if number == 0 else "ok"))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "tile: 20 of 100 done, 600 per hour, 8 min left, 1 failed",
        "tile: 30 of 100 done, 600 per hour, 7 min left, 1 failed",
        "tile: 40 of 100 done, 600 per hour, 6 min left, 1 failed",
    ]


def test_tiles_are_counted_where_they_are_the_work(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("extract", 4) as advance:
        assert advance is not None
        for done in range(
            100, 1100, 100
        ):  # the first slide takes ten minutes, and its tiles tell how long the rest takes
            clock[0] += 60
            tell_tiles("a", done, 1000)
        advance(Record("a", "extract", "ok"))
        clock[0] += 60
        tell_tiles("b", 50, 100)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "extract: 0 of 4 done, 100 tiles, 2 tiles/s, 39 min left"
    assert lines[4] == "extract: 0 of 4 done, 500 tiles, 2 tiles/s, 35 min left"
    assert lines[-1] == "extract: 1 of 4 done, 1,050 tiles, 2 tiles/s, 18 min left"


def test_nobody_hears_of_tiles_outside_of_a_stage() -> None:
    tell_tiles("a", 1, 2)


def test_before_anything_is_made_the_line_says_that_the_time_is_not_known() -> None:
    assert Pace("train", 5, begun=0.0).words(60.0) == "0 of 5 done, time left not known yet"
    assert Pace("train", None, begun=0.0, done=3, made=3).words(60.0) == "3 done, 180 per hour"


class Terminal(io.StringIO):
    """Something that a person looks at."""

    def isatty(self) -> bool:
        return True


def test_a_bar_shows_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "160")
    with progress("extract", 3) as advance:
        assert advance is not None
        tell_tiles("a", 10, 20)
        advance(Record("a", "extract", "ok"))
        advance(Record("b", "extract", "failed"))
    assert "2 of 3 done" in screen.getvalue()
    assert "10 tiles" in screen.getvalue()
    assert "1 failed" in screen.getvalue()
    assert "left" in screen.getvalue()


@pytest.mark.parametrize(
    ("seconds", "words"), [(4, "4 s"), (59.4, "59 s"), (90, "2 min"), (3600, "1 h 0 min"), (12000, "3 h 20 min")]
)
def test_a_duration_is_said_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_line_comes_while_nothing_is_finished(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_progress, "MINUTE_S", 0.2)
    monkeypatch.setattr(_progress, "WATCH_S", 0.02)
    before = threading.active_count()
    with progress("extract", 4):
        time.sleep(0.7)
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 3
    assert set(lines) == {"extract: 0 of 4 done, time left not known yet"}
    assert threading.active_count() == before
