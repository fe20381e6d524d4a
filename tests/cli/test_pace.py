"""A line a minute where there is no terminal."""

import pytest

from eosin._records import Record
from eosin.cli import _common as common
from eosin.cli._common import Pace, duration


def test_the_line_says_how_far_how_fast_how_long_and_what_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(common.time, "monotonic", lambda: clock[0])
    pace = Pace("tile", 100)
    for number in range(10):  # done by a run before this one: they say nothing of the pace
        pace.note(Record(f"old{number}", "tile", "skipped", "done"))
    for number in range(30):
        clock[0] += 6
        pace.note(Record(f"new{number}", "tile", "failed" if number == 0 else "ok"))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "tile: 20 of 100 done, 600 per hour, 8 min left, 1 failed",
        "tile: 30 of 100 done, 600 per hour, 7 min left, 1 failed",
        "tile: 40 of 100 done, 600 per hour, 6 min left, 1 failed",
    ]


@pytest.mark.parametrize(
    ("seconds", "words"), [(4, "4 s"), (59.4, "59 s"), (90, "2 min"), (3600, "1 h 0 min"), (12000, "3 h 20 min")]
)
def test_a_duration_is_said_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words
