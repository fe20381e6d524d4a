import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scaling import scaled

from eosin.errors import ConfigError, LabelError
from eosin.mil._cohort import Cohort
from eosin.mil._interop import read_patient_splits
from eosin.mil._splits import (
    Split,
    check_splits,
    make_nested_splits,
    make_splits,
    read_nested_splits,
    read_splits,
    with_validation,
    write_nested_splits,
    write_splits,
)
from eosin.mil._study import checked_splits
from eosin.mil.task import make_task


def a_cohort(n_patients=40, n_classes=2, seed=0, mixed=0.1, n_sites=0):
    rng = np.random.default_rng(seed)
    slides, patients, strata, sites = [], [], [], []
    for patient in range(n_patients):
        label, site = rng.integers(n_classes), f"site{rng.integers(max(n_sites, 1))}"
        for slide in range(rng.integers(1, 4)):
            slides.append(f"s.{patient:03d}.{slide}")
            patients.append(f"{patient:03d}")
            strata.append(str(rng.integers(n_classes) if rng.random() < mixed else label))
            sites.append(site)
    return Cohort(tuple(slides), tuple(patients), tuple(strata), tuple(sites) if n_sites else ())


def sides(split, key_of):
    return [{key_of[slide] for slide in part} for part in split.parts().values()]


COHORTS = st.builds(
    a_cohort,
    n_patients=st.integers(2, 60),
    n_classes=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
    mixed=st.sampled_from([0.0, 0.1, 0.5]),
    n_sites=st.sampled_from([0, 0, 3, 12]),
)


KINDS = ["kfold", "monte-carlo", "holdout", "nested"]


def made(cohort, folds, kind, seed):
    """Return splits in lists that share a test part, and the lists' number of splits; nothing when refused."""
    try:
        if kind == "nested":
            return make_nested_splits(cohort, folds=folds, inner_folds=2 + folds % 3, seed=seed)
        splits = make_splits(cohort, folds=folds, kind=kind, seed=seed)
    except LabelError:
        return []
    return [splits] if kind == "holdout" else [[split] for split in splits]


def holds(cohort, folds, kind, seed):
    nested = made(cohort, folds, kind, seed)
    patient = dict(zip(cohort.slide_ids, cohort.patient_ids, strict=True))
    stratum = dict(zip(cohort.slide_ids, cohort.strata, strict=True))
    site = dict(zip(cohort.slide_ids, cohort.sites or cohort.patient_ids, strict=True))
    for splits in nested:
        assert len({frozenset(split.test) for split in splits}) == 1
        for split in splits:
            for key_of in (patient, site):
                train, val, test = sides(split, key_of)
                assert train
                assert val
                assert test
                assert not train & val
                assert not train & test
                assert not val & test
            assert {stratum[slide] for slide in split.train} == set(cohort.strata)
            assert len(split.train) + len(split.val) + len(split.test) == len(cohort.slide_ids)
        if kind in ("holdout", "nested"):
            validated = sorted(slide for split in splits for slide in split.val)
            assert validated == sorted(set(cohort.slide_ids) - set(splits[0].test))
    if nested and kind in ("kfold", "nested"):
        assert sorted(slide for splits in nested for slide in splits[0].test) == sorted(cohort.slide_ids)


@settings(max_examples=1000, deadline=None)
@given(COHORTS, st.integers(2, 10), st.sampled_from(KINDS), st.integers(0, 99))
def test_no_patient_is_on_two_sides_and_no_class_is_missing(cohort, folds, kind, seed):
    holds(cohort, folds, kind, seed)


@pytest.mark.slow
@settings(max_examples=scaled(10_000, 100), deadline=None)
@given(COHORTS, st.integers(2, 10), st.sampled_from(KINDS), st.integers(0, 99))
def test_no_patient_is_on_two_sides_in_ten_thousand_cohorts(cohort, folds, kind, seed):
    holds(cohort, folds, kind, seed)


@pytest.mark.parametrize("kind", KINDS)
def test_most_cohorts_can_be_split(kind):
    """The properties above would hold of nothing, too."""
    assert all(made(a_cohort(60, 2, seed=seed), 3, kind, seed) for seed in range(20))


def test_folds_are_balanced_and_repeatable():
    cohort = a_cohort(200, 3, mixed=0.0)
    splits = make_splits(cohort, folds=5, seed=3)
    stratum = dict(zip(cohort.slide_ids, cohort.strata, strict=True))
    for name in set(cohort.strata):
        counts = [sum(stratum[slide] == name for slide in split.test) for split in splits]
        assert max(counts) - min(counts) <= 4
    assert splits == make_splits(cohort, folds=5, seed=3)
    assert splits != make_splits(cohort, folds=5, seed=4)


def test_sites_stay_together():
    cohort = a_cohort(80, 2, n_sites=12)
    site = dict(zip(cohort.slide_ids, cohort.sites, strict=True))
    for split in make_splits(cohort, folds=3):
        train, val, test = sides(split, site)
        assert not train & val
        assert not (train | val) & test


def test_a_class_with_too_few_patients_is_an_error():
    cohort = Cohort(tuple("abcdef"), tuple("123456"), ("x", "x", "x", "x", "y", "y"))
    with pytest.raises(LabelError, match="class 'y' has 2 patients, at least 3"):
        make_splits(cohort, folds=3)


def test_one_patient_of_a_class_is_told_what_to_do_about_validation():
    cohort = Cohort(tuple("abc"), tuple("abc"), tuple("xyy"))
    with pytest.raises(LabelError, match=r"class 'x' has 1 patient, at least 2 .*training.select: last"):
        with_validation(Split(tuple("abc"), (), ()), cohort)


def test_too_few_sites_are_called_sites():
    names = tuple(f"s{number}" for number in range(12))
    sites = ("A",) * 6 + ("B",) * 6
    cohort = Cohort(names, names, ("x", "y") * 6, sites)
    with pytest.raises(LabelError, match="class 'x' has 2 sites, at least 3"):
        make_splits(cohort, folds=3)


def test_shares_that_leave_nothing_are_refused():
    cohort = a_cohort(60)
    for options in ({"val_fraction": 0.9, "test_fraction": 0.2}, {"val_fraction": -0.1}, {"test_fraction": 0.0}):
        with pytest.raises(LabelError, match="shares must be greater than 0"):
            make_splits(cohort, kind="monte-carlo", **options)
    with pytest.raises(LabelError, match="at least 2"):
        make_splits(cohort, folds=1)
    with pytest.raises(LabelError, match="both need at least 2"):
        make_nested_splits(cohort, inner_folds=1)


def test_nested_splits_are_written_and_read(tmp_path):
    cohort = a_cohort(60)
    nested = make_nested_splits(cohort, folds=3, inner_folds=2)
    write_nested_splits(tmp_path, nested, cohort)
    assert read_nested_splits(tmp_path) == nested
    assert read_nested_splits(tmp_path / "outer_0") == []
    with pytest.raises(LabelError, match=r"holds nested splits; pass the folder of one outer fold, .*outer_<i>"):
        read_splits(tmp_path)
    write_splits(tmp_path / "outer_0", [nested[0][0], nested[1][0]], cohort)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(LabelError, match="outer fold 0 have different test parts"):
        read_nested_splits(tmp_path)


def test_leaking_sites_are_split_by_site():
    cohort = Cohort(tuple("abcd"), tuple("abcd"), tuple("0101"), tuple("XXYX"))
    with pytest.raises(LabelError, match=r"sites in both train and test: X; split by site .*--group site"):
        check_splits([Split(("a", "b"), (), ("c", "d"))], cohort)


def test_leakage_is_an_error_that_names_the_patients():
    cohort = Cohort(("a1", "a2", "b1", "c1"), ("A", "A", "B", "C"), ("0", "1", "0", "1"))
    with pytest.raises(LabelError, match="fold 0: patients in both train and test: A;"):
        check_splits([Split(("a1", "b1"), (), ("a2", "c1"))], cohort)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (Split(("a1", "a2", "zz"), (), ("b1",)), "not in the label table: zz"),
        (Split(("a1", "a1", "a2"), (), ("b1",)), "more than once: a1"),
        (Split(("a1", "a2"), (), ("b1", "a1")), "patients in both train and test: A; split by patient"),
        (Split((), ("b1",), ("c1",)), "no slides to train on"),
        (Split(("b1",), (), ("c1",)), "no training slide of 1"),
    ],
)
def test_splits_that_would_give_wrong_figures_are_refused(split, message):
    cohort = Cohort(("a1", "a2", "b1", "c1"), ("A", "A", "B", "C"), ("0", "1", "0", "1"))
    with pytest.raises(LabelError, match=message):
        check_splits([split], cohort)


def test_validation_is_taken_from_training_alone():
    cohort = a_cohort(60)
    split = make_splits(cohort, folds=3, val_fraction=0.0)[0]
    assert not split.val
    with_val = with_validation(split, cohort)
    assert set(with_val.train) | set(with_val.val) == set(split.train)
    assert with_val.test == split.test
    assert with_val.val
    check_splits([with_val], cohort)
    assert with_validation(with_val, cohort) is with_val


def test_what_is_written_is_read(tmp_path):
    cohort = a_cohort(50)
    splits = make_splits(cohort, folds=11, kind="monte-carlo")
    write_splits(tmp_path, splits, cohort)
    assert read_splits(tmp_path) == splits
    assert (tmp_path / "splits_0_descriptor.csv").read_text().startswith(",train,val,test\n0,")
    assert (tmp_path / "splits_0.csv").read_text().startswith(f",train,val,test\n0,{splits[0].train[0]},")


def test_the_two_layouts_of_clam_say_the_same(shared):
    folder = shared / "data/interop/splits"
    ragged = read_splits(folder / "clam-task1-splits_0.csv")[0]
    flags = read_splits(folder / "clam-task1-splits_0_bool.csv")[0]
    assert [len(part) for part in ragged.parts().values()] == [300, 51, 48]
    assert {name: set(part) for name, part in ragged.parts().items()} == {
        name: set(part) for name, part in flags.parts().items()
    }


def test_counts_of_clam_are_no_split(shared):
    with pytest.raises(LabelError, match="pass the file without _descriptor"):
        read_splits(shared / "data/interop/splits/clam-task1-splits_0_descriptor.csv")


def test_what_is_no_split_is_refused(tmp_path):
    (tmp_path / "splits_0.csv").write_text("a,b\n1,2\n")
    with pytest.raises(LabelError, match="not a table of splits"):
        read_splits(tmp_path)
    with pytest.raises(LabelError, match=r"has no splits_<i>\.csv"):
        read_splits(tmp_path / "..")


def survival_rows(n, *, censored):
    return [
        {"slide_id": f"s{k}", "patient_id": f"p{k}", "time": str(k), "event": str(int(k not in censored))}
        for k in range(n)
    ]


@pytest.mark.parametrize(
    ("kind", "target", "rows"),
    [
        ("survival", "time,event", survival_rows(30, censored={12, 13})),
        ("cox", "time,event", survival_rows(12, censored={0})),
        ("regression", "time", survival_rows(13, censored=())),
        ("multitask", "event; regression:time", [{"slide_id": "x", "patient_id": "x", "event": "", "time": "3"},
                                                 *survival_rows(20, censored=set(range(10)))]),
        ("multilabel", "event,extra", [row | {"extra": str(int(k < 10))}
                                       for k, row in enumerate(survival_rows(20, censored=set(range(12))))]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("split_kind", ["kfold", "monte-carlo", "holdout"])
def test_bins_that_balance_a_split_may_be_smaller_than_the_folds_are_many(kind, target, rows, split_kind):
    task = make_task(kind, rows, target=target)
    strata = tuple(task.strata(rows))
    assert min(strata.count(name) for name in strata) < 5
    names = tuple(row["slide_id"] for row in rows)
    cohort = Cohort(names, names, strata, soft=task.soft_strata(rows))
    splits = make_splits(cohort, folds=5, kind=split_kind)
    assert all(split.train and split.val and split.test for split in splits)
    if split_kind == "kfold":
        assert sorted(name for split in splits for name in split.test) == sorted(names)
        most = {name: max(sum(s == name for n, s in zip(names, strata, strict=True) if n in split.test)
                          for split in splits) for name in set(strata)}  # fmt: skip
        assert all(most[name] <= -(-strata.count(name) // 5) + 1 for name in most)


def test_bins_do_not_make_patients():
    rows = survival_rows(4, censored={1})
    task = make_task("cox", rows, target="time,event")
    names = tuple(row["slide_id"] for row in rows)
    with pytest.raises(LabelError, match="there are 4 patients, at least 5 are needed; use fewer folds"):
        make_splits(Cohort(names, names, tuple(task.strata(rows)), soft=task.soft_strata(rows)), folds=5)


@pytest.mark.parametrize("kind", ["kfold", "monte-carlo"])
def test_parts_of_sites_of_very_different_size_are_near_their_fraction(kind):
    rng = np.random.default_rng(0)
    sizes = [200, 120, 80, 60, 40, 30, 20, 15, 10, 8, 6, 5, 4, 3, 2, 2, 1, 1]
    sites = tuple(f"site{n}" for n, size in enumerate(sizes) for _ in range(size))
    names = tuple(f"s{n}" for n in range(len(sites)))
    bent = {f"site{n}": rng.uniform(0.2, 0.8) for n in range(len(sizes))}
    strata = tuple("01"[int(rng.random() < bent[site])] for site in sites)
    cohort = Cohort(names, names, strata, sites)
    label, whole = dict(zip(names, strata, strict=True)), strata.count("1") / len(strata)
    for split in make_splits(cohort, folds=5 if kind == "monte-carlo" else 3, kind=kind, seed=1):
        assert 0.08 * len(names) < len(split.val) < 0.25 * len(names)
        assert abs(np.mean([label[name] == "1" for name in split.val]) - whole) < 0.2


def test_fewer_splits_in_the_same_folder_leave_none_of_the_old_ones(tmp_path):
    cohort = a_cohort()
    write_splits(tmp_path, make_splits(cohort, folds=4), cohort)
    fewer = make_splits(cohort, folds=3, seed=1)
    write_splits(tmp_path, fewer, cohort)
    assert read_splits(tmp_path) == fewer
    assert len(list(tmp_path.glob("splits_*"))) == 6
    write_nested_splits(tmp_path, make_nested_splits(cohort, folds=3, inner_folds=2), cohort)
    assert not list(tmp_path.glob("splits_*"))
    write_splits(tmp_path, fewer, cohort)
    assert not list(tmp_path.glob("outer_*"))


def test_splits_that_eosin_did_not_write_are_neither_pooled_nor_deleted(tmp_path):
    cohort = a_cohort()
    splits = make_splits(cohort, folds=4)
    write_splits(tmp_path, splits, cohort)
    (tmp_path / "manifest.json").unlink()  # as of eosin 0.1 or CLAM
    assert read_splits(tmp_path) == splits
    with pytest.raises(ConfigError, match=r"splits_3\.csv.* would be read as a part of the new set of"):
        write_splits(tmp_path, splits[:3], cohort)
    write_splits(tmp_path, splits, cohort)
    (tmp_path / "splits_4.csv").write_text((tmp_path / "splits_0.csv").read_text())
    assert read_splits(tmp_path) == splits


@pytest.mark.parametrize("damage", [lambda text: text.replace("s.", "t.", 1), lambda text: text[:-9], None])
def test_a_split_that_was_changed_is_refused(tmp_path, damage):
    cohort = a_cohort()
    write_splits(tmp_path, make_splits(cohort, folds=3), cohort)
    path = tmp_path / "splits_1.csv"
    text = path.read_text()
    path.unlink() if damage is None else path.write_text(damage(text))
    assert damage is None or path.read_text() != text
    for asked in (tmp_path, path):
        with pytest.raises(LabelError, match=r"splits_1.csv: .*changed or deleted"):
            read_splits(asked)
    (tmp_path / "manifest.json").write_text((tmp_path / "manifest.json").read_text().replace("splits_1", "splits_7"))
    with pytest.raises(LabelError, match="its checksum does not fit"):
        read_splits(tmp_path)


def test_a_set_that_is_being_replaced_is_not_read(tmp_path, monkeypatch):
    cohort = a_cohort()
    write_splits(tmp_path, make_splits(cohort, folds=3), cohort)
    monkeypatch.setattr("eosin.mil._splits.finish_set", lambda *_: None)  # killed before the end
    write_splits(tmp_path, make_splits(cohort, folds=2), cohort)
    with pytest.raises(LabelError, match="has not finished"):
        read_splits(tmp_path)


@pytest.mark.parametrize(("part", "other"), [("train", "val"), ("train", "test"), ("val", "test")])
@pytest.mark.parametrize("kind", ["patient", "site"])
def test_nobody_is_on_two_sides_whichever_they_are(part, other, kind):
    ids = tuple("abcdefgh")
    parts = {"train": ["a", "b", "c", "d"], "val": ["e", "f"], "test": ["g", "h"]}
    key = {name: name for name in ids} | {parts[other][0]: parts[part][0]}
    keys = tuple(key[name] for name in ids)
    cohort = Cohort(ids, keys if kind == "patient" else ids, ("0", "1") * 4, keys if kind == "site" else ())
    with pytest.raises(LabelError, match=f"{kind}s in both {part} and {other}"):
        check_splits([Split(*(tuple(parts[name]) for name in ("train", "val", "test")))], cohort)


SLIDES = ("S1", "S2", "S3", "S4")


@pytest.mark.parametrize(
    ("text", "policy", "found"),
    [
        ("train,val,test\nS1.svs,/data/S3.tiff,S4\nS2,,\n", "ask", (("S1", "S2"), ("S3",), ("S4",))),
        ("Train,Validation,Test\ns1,S3,S4\nS2,nan,\n", "merge", (("S1", "S2"), ("S3",), ("S4",))),
        ("slide,train,val,test\nS1,TRUE,FALSE,FALSE\nS3,FALSE,FALSE,TRUE\n", "ask", (("S1",), (), ("S3",))),
        ("train,test\ns1,S4\nS2,S\u200b3\n", "ask", "1 slide is written in another way in the splits .*'s1' = 'S1'"),
        ("train,test\ns1,S4\nS2,S3\n", "exact", "fold 0: slides that are not in the label table: s1"),
        ("train,test\ns1,S4\nS1,S3\n", "merge", "fold 0: slides named more than once: S1"),
        ("train,test\nS1,s1\nS2,S3\n", "merge", "fold 0: patients in both train and test: 1"),
    ],
)
def test_names_in_given_splits_go_through_the_same_rules_as_all_others(tmp_path, text, policy, found):
    (tmp_path / "splits_0.csv").write_text(text, encoding="utf-8")
    cohort = Cohort(SLIDES, ("1", "2", "3", "4"), ("x", "x", "x", "x"))

    def read():
        return checked_splits(read_splits(tmp_path), cohort, ids=policy)

    if isinstance(found, tuple):
        assert read() == [Split(*found)]
        return
    with pytest.raises(LabelError, match=found):
        read()


def test_patients_in_splits_of_stamp_go_through_the_same_rules(tmp_path):
    path = tmp_path / "splits.json"
    path.write_text(json.dumps({"splits": [{"train_patients": ["TCGA-A1-A0SB-01Z", "p2"], "test_patients": [3]}]}))
    cohort = Cohort(SLIDES[:3], ("TCGA-A1-A0SB", "P2", "3"), ("x", "x", "x"))
    with pytest.raises(LabelError, match=r"2 patients are written in another way.*'p2' = 'P2'"):
        read_patient_splits(path, cohort)
    assert read_patient_splits(path, cohort, "merge") == [Split(("S1", "S2"), (), ("S3",))]


def test_the_same_seed_makes_the_same_splits_and_another_seed_others():
    cohort = a_cohort()
    for make in (
        lambda seed: make_splits(cohort, seed=seed),
        lambda seed: make_splits(cohort, kind="monte-carlo", seed=seed),
        lambda seed: make_nested_splits(cohort, folds=3, inner_folds=3, seed=seed),
        lambda seed: with_validation(Split(cohort.slide_ids[9:], (), cohort.slide_ids[:3]), cohort, seed=seed),
    ):
        assert make(3) == make(3) != make(4)


def test_what_is_not_asked_for_is_five_folds_of_seed_0():
    cohort, given = a_cohort(), Split(a_cohort().slide_ids, (), ())
    assert make_splits(cohort) == make_splits(cohort, folds=5, seed=0)
    assert make_nested_splits(cohort) == make_nested_splits(cohort, folds=5, inner_folds=5, seed=0)
    assert with_validation(given, cohort) == with_validation(given, cohort, val_fraction=0.15, seed=0)


def of_each_class(n_patients):
    numbers = range(2 * n_patients)
    return Cohort(tuple(f"s{i}" for i in numbers), tuple(f"p{i}" for i in numbers), tuple("ab"[i % 2] for i in numbers))


@pytest.mark.parametrize(
    ("n_patients", "options"),
    [
        (3, {"folds": 3}),
        (3, {"folds": 2}),
        (2, {"folds": 2, "val_fraction": 0.0}),
        (2, {"folds": 1, "kind": "monte-carlo", "val_fraction": 0.0, "test_fraction": 0.5}),
        (3, {"folds": 2, "kind": "holdout"}),
    ],
)
def test_as_few_patients_as_parts_or_folds_are_enough_and_one_less_is_refused(n_patients, options):
    assert len(make_splits(of_each_class(n_patients), **options)) == options["folds"]
    with pytest.raises(LabelError, match=f"has {n_patients - 1} patient.*at least {n_patients} are needed"):
        make_splits(of_each_class(n_patients - 1), **options)


def test_as_few_patients_as_nested_folds_need_are_enough_and_one_less_is_refused():
    assert len(make_nested_splits(of_each_class(4), folds=2, inner_folds=3)) == 2
    assert len(make_nested_splits(of_each_class(4), folds=4, inner_folds=3)) == 4
    with pytest.raises(LabelError, match="has 3 patients, at least 4 are needed"):
        make_nested_splits(of_each_class(3), folds=2, inner_folds=3)


@pytest.mark.parametrize("shares", [(1.0, 0.2), (0.2, 1.0), (0.5, 0.5), (-0.1, 0.2), (0.2, 0.0)])
def test_shares_at_the_border_are_refused(shares):
    with pytest.raises(LabelError, match="greater than 0 and their sum less than 1"):
        make_splits(a_cohort(), val_fraction=shares[0], test_fraction=shares[1])


def test_a_monte_carlo_draw_may_be_single_and_folds_may_not():
    assert len(make_splits(a_cohort(), folds=1, kind="monte-carlo")) == 1
    for kind in ("kfold", "holdout"):
        with pytest.raises(LabelError, match="cross-validation needs at least 2"):
            make_splits(a_cohort(), folds=1, kind=kind)


def test_draws_test_the_share_that_is_asked_for_and_may_overlap():
    cohort = of_each_class(50)
    draws = make_splits(cohort, folds=4, kind="monte-carlo", test_fraction=0.3, val_fraction=0.1)
    assert [len(split.test) for split in draws] == [30] * 4
    assert len({slide for split in draws for slide in split.test}) < 4 * 30


def test_flags_of_clam_are_read_as_names(tmp_path):
    path = tmp_path / "splits_0_bool.csv"
    path.write_text(",train,val,test\na.svs,True,False,False\nb,False,True,False\nc,False,False,True\n")
    assert read_splits(path) == [Split(("a",), ("b",), ("c",))]
    path.write_text(",train,test\na,True,False\nb,False,True\n")
    assert read_splits(path) == [Split(("a",), (), ("b",))]


def test_counts_of_a_split_are_those_of_its_slides(tmp_path):
    cohort = of_each_class(3)
    write_splits(tmp_path, [Split(cohort.slide_ids[:3], cohort.slide_ids[3:5], cohort.slide_ids[5:])], cohort)
    counts = tmp_path / "splits_0_descriptor.csv"
    assert counts.read_text().splitlines() == [",train,val,test", "a,2,1,0", "b,1,1,1"]
    with pytest.raises(LabelError, match="lists numbers of slides, not their names"):
        read_splits(counts)


def test_splits_of_many_patients_take_as_long_as_few_for_each():
    def cohort(n):
        names = tuple(map(str, range(n)))
        return Cohort(names, names, tuple("ab"[k % 2] for k in range(n)))

    def seconds(n):
        whole = cohort(n)
        begun = time.process_time()
        make_splits(whole, folds=5)
        return time.process_time() - begun

    # eight times the patients took a hundred times as long when a set was made for each of them
    assert seconds(8000) < 30 * min(seconds(1000) for _ in range(2))
