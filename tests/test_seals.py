"""JSON is measured before it is parsed: bytes, values, levels; what is refused is refused at once, with the limit."""

import json
import resource
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eosin import _seals as seals
from eosin._seals import is_intact, parse_json, read_json, sealed

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(st.dictionaries(st.text(), PLAIN, max_size=4))
def test_what_json_says_is_read(data) -> None:
    try:
        text = json.dumps(data, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return
    assert parse_json(text) == data
    assert parse_json(json.dumps(data)) == data
    assert is_intact(parse_json(json.dumps(sealed(data)))) or "checksum" in data


def nested(levels: int, opened: str = "[", closed: str = "]") -> str:
    return opened * levels + closed * levels


@pytest.mark.parametrize("make", [nested, lambda levels: nested(levels, '{"a":', "}").replace("{}", "{0}") or ""])
def test_levels_are_counted_up_to_the_limit(make) -> None:
    text = make(seals.MAX_JSON_DEPTH).replace('"a":}', '"a":1}')
    parse_json(text)
    with pytest.raises(ValueError, match="more than 64 levels, the limit"):
        parse_json(f"[{text}]")


def test_brackets_in_texts_and_siblings_are_not_levels() -> None:
    assert parse_json(json.dumps(["[" * 500, '\\"]' * 500, "{" * 500])) is not None
    assert len(parse_json("[" + ",".join(["[[]]"] * 500) + "]")) == 500


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "[1",
        '{"a"',
        "[NaN]",
        "[Infinity]",
        "[" + "9" * 309 + "]",
        "[1e999]",
        '["\\ud800"]',
        "\xff\xfe",
        "[1]]",
        "[" * 200,
    ],
)
def test_what_is_not_json_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_json(text.encode("latin-1"))


BOMBS = {
    "a sparse file": (lambda file: file.truncate(seals.MAX_JSON_BYTES + 1), "the limit is 67,108,864"),
    "empty lists": (
        lambda file: file.write(b"[" + b"[]," * 2_000_001 + b"1]"),
        "more than 4,000,000 values, the limit",
    ),
    "one text": (lambda file: file.write(b'["' + b"x" * 2**26 + b'"]'), "the limit is 67,108,864"),
    "open lists": (lambda file: file.write(b"[" * 3_900_000), "more than 64 levels, the limit"),
    "closed lists": (lambda file: file.write(b"[" * 3_900_000 + b"]" * 3_900_000), "more than 64 levels, the limit"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_at_once_and_the_limit_is_named(name: str, tmp_path: Path) -> None:
    write, words = BOMBS[name]
    with (tmp_path / "a.json").open("wb") as file:
        write(file)
    started, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=words):
        read_json(tmp_path / "a.json")
    assert time.process_time() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200 * 1024  # KiB
