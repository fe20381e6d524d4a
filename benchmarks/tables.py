"""What the benchmarks that repeat something over seeds share: the summary of their rows, and the file."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Row = Mapping[str, Any]


def with_summaries(rows: Sequence[Row], *, over: str, key: Sequence[str]) -> list[Row]:
    """Return the rows, then two per group: mean and standard deviation of every other column, to four digits.

    Parameters
    ----------
    rows : sequence of mappings
        With the same columns; all but those named here hold numbers.
    over : str
        Column of what was repeated; says which of the two a row is.
    key : sequence of str
        Columns that make a group.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in key), []).append(row)
    found = list(rows)
    for values, members in groups.items():
        others = [name for name in members[0] if name not in (over, *key)]
        for name, summary in (("mean", mean), ("sd", stdev)):
            if len(members) > 1 or name == "mean":
                numbers = {column: round(float(summary([row[column] for row in members])), 4) for column in others}
                found.append(dict(zip(key, values, strict=True)) | {over: name} | numbers)
    return found


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write a CSV with the columns of the first row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_table(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a CSV, none if it is not there."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
