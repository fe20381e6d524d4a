"""Spellings of ids: what nobody can see is removed, what a person must decide about is found and listed."""

from pathlib import Path

import pytest

from eosin._names import (
    Matched,
    clean,
    groups_of_look_alikes,
    is_missing,
    listed,
    look_alike,
    match_slides,
    same_patient,
    slide_id,
    slide_stem,
    unify,
)
from eosin.errors import LabelError


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        (" P01 ", "P01"),
        ("P\u200b01", "P01"),  # zero-width space
        ("\ufeffP01", "P01"),  # byte-order mark
        ("P\u00ad01", "P01"),  # soft hyphen
        ("\u200eP01\u200f", "P01"),  # direction marks
        ("P\u00a001", "P 01"),  # no-break space
        ("P \t 01", "P 01"),
        ("Mu\u0308ller", "Müller"),
        ("P01\x00", "P01"),
        ("TCGA-A1-A0SB", "TCGA-A1-A0SB"),
        ("", ""),
    ],
)
def test_what_cannot_be_seen_is_no_part_of_an_id(text, cleaned):
    assert clean(text) == cleaned
    assert clean(clean(text)) == cleaned


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("P01", "p01"),
        ("001", "1"),
        ("1.0", "1"),
        ("1.00", "1"),
        ("P001", "P1"),
        ("TCGA-01", "TCGA_01"),
        ("TCGA-01", "TCGA\u201301"),  # en dash
        ("TCGA-01", "TCGA\u221201"),  # minus sign
        ("TCGA-01", "TCGA\u201101"),  # no-break hyphen
        ("TCGA-01", "TCGA 01"),
        ("P01", "\uff3001"),  # full-width P
        ("Straße", "STRASSE"),
        ("Mu\u0308ller", "MÜLLER"),
    ],
)
def test_spellings_that_a_person_takes_for_one_look_alike(one, other):
    assert look_alike(one) == look_alike(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("P01", "P10"),
        ("1", "11"),
        ("100", "1"),
        ("1.05", "1.5"),
        ("1.10", "1.1"),
        ("A-1", "A1"),
        ("0", "00x"),
        ("a", "b"),
    ],
)
def test_different_ids_do_not_look_alike(one, other):
    assert look_alike(one) != look_alike(other)


@pytest.mark.parametrize(
    "word", ["", " ", "nan", "NaN", "NA", "n/a", "unknown", "Unknown ", "-", "\u200b", "None", "?"]
)
def test_words_for_not_known_are_missing(word):
    assert is_missing(word)


@pytest.mark.parametrize("word", ["0", "no", "negative", "P-1", "Nancy", "x"])
def test_other_words_are_values(word):
    assert not is_missing(word)


def test_look_alikes_stop_with_all_groups_and_both_ways_out():
    ids = ["P01", "p01", "P02", "001", "1", "P02"]
    assert groups_of_look_alikes(ids) == [("P01", "p01"), ("001", "1")]
    with pytest.raises(
        LabelError, match=r"table.csv: 2 patients .*'P01' = 'p01'; '001' = '1'.*--ids merge.*--ids exact"
    ):
        unify(ids, what="patients", where="table.csv")
    assert unify(ids, what="patients", where="", policy="exact") == tuple(ids)


def test_merged_ids_take_their_most_frequent_spelling():
    assert unify(["p01", "P01", "P01", "x"], what="patients", where="", policy="merge") == ("P01", "P01", "P01", "x")
    assert unify(["p01", "P01"], what="patients", where="", policy="merge") == ("p01", "p01")


def test_letters_that_look_the_same_on_a_screen_are_listed_as_escapes():
    with pytest.raises(LabelError, match=r"'TCGA-01' = 'TCGA\\u201301'"):
        unify(["TCGA-01", "TCGA\u201301"], what="patients", where="t")


@pytest.mark.parametrize(
    "name", ["b", "b.tiff", "/data/x/b.tiff", "C:\\x\\b.svs", "b.tiff.geojson", "b.geojson", " b.SVS"]
)
def test_ids_file_names_and_paths_are_one_slide(name):
    assert slide_id(name) == "b"


def test_other_dots_of_a_name_stay():
    assert slide_id("TCGA-A1.01Z-00-DX1.B6-2.svs") == "TCGA-A1.01Z-00-DX1.B6-2"
    assert slide_stem(Path("x/scan.2.ome.tiff")) == "scan.2"
    assert slide_stem(Path(".svs")) == ".svs"


@pytest.mark.parametrize("name", ["a", "a.svs", "A", "A.TIFF", "/data/x/a.tiff", "a.tiff.geojson", "a\u200b"])
def test_a_name_finds_its_slide(name):
    assert match_slides([(name, 0.5)], ["a", "b"], where="t").values == {"a": 0.5}


def test_names_of_nothing_are_reported_and_names_in_other_letters_noted():
    matched = match_slides([("A", 1), ("slide_b", 2)], ["a", "b"], where="t")
    assert matched.unknown == ("slide_b",)
    assert matched.notes == ("'A' was matched to slide 'a'",)
    assert match_slides([("A", 1)], ["a"], where="t", policy="exact").unknown == ("A",)


def test_two_values_for_one_slide_are_refused_and_equal_ones_are_not():
    assert match_slides([("a", 1), ("a.svs", 1)], ["a"], where="t").values == {"a": 1}
    with pytest.raises(LabelError, match=r"mpp.csv: slide 'a' has two rows.*; slide 'b' has two rows"):
        match_slides([("a", 1), ("a.svs", 2), ("b", 1), ("B", 3)], ["a", "b"], where="mpp.csv")


def test_a_name_that_could_be_two_slides_is_refused():
    assert match_slides([("a", 1)], ["a", "A"], where="t").values == {"a": 1}
    with pytest.raises(LabelError, match="'a_1' could be a-1 or A-1"):
        match_slides([("a_1", 1)], ["a-1", "A-1"], where="t")


def test_a_picture_beside_a_slide_keeps_its_own_name():
    matched = match_slides([("a.png", 1), ("a", 2)], ["a", "a.png"], where="t")
    assert matched.values == {"a.png": 1, "a": 2}
    assert match_slides([("a.png", 1)], ["a"], where="t").values == {"a": 1}


def test_a_long_list_of_look_alikes_says_how_many_more_there_are():
    groups = [(f"a{number}", f"A{number}") for number in range(14)]
    assert listed(groups[:12]).endswith("'a11' = 'A11'")
    assert listed(groups).endswith("'a11' = 'A11' and 2 more")


@pytest.mark.parametrize(("one", "other"), [("a--b", "a-b"), ("a - b", "a_b"), ("a\u2212b", "a-b")])
def test_runs_of_dashes_and_blanks_are_one(one, other):
    assert look_alike(one) == look_alike(other) != look_alike("ab")


def test_a_dash_is_no_letter():
    assert look_alike("aXX-XXb") != look_alike("a-b")


def test_what_is_alike_is_asked_of_the_key_that_is_given():
    with pytest.raises(LabelError, match="spelled in several ways"):
        unify(["TCGA-A1-A0SB-01Z", "TCGA-A1-A0SB"], what="patients", where="t", key=same_patient)


@pytest.mark.parametrize("name", ["C:\\scans\\b.png", "/data/b.png", "x/y/b.png"])
def test_a_picture_is_found_by_its_path(name):
    assert match_slides([(name, 1)], ["b.png", "b"], where="t").values == {"b.png": 1}


@pytest.mark.parametrize("name", ["b.svs", "/data/x/b.svs", "C:\\scans\\b.svs"])
def test_an_id_that_kept_its_suffix_in_another_tool_is_found_by_its_path(name):
    assert match_slides([(name, 1)], ["b.svs"], where="t").values == {"b.svs": 1}


def test_rows_after_one_that_is_unknown_count():
    assert match_slides([("x", 1), ("a", 2)], ["a"], where="t") == Matched({"a": 2}, ("x",), ())
