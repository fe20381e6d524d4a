import pytest

from eosin.errors import CheckpointError
from eosin.mil._crossval import crossval
from eosin.mil._data import patient_examples
from eosin.mil._recipe import Component, Recipe, Training
from eosin.mil._seen import SEEN, Run, Seen, read_seen, write_seen
from eosin.mil._splits import make_splits
from eosin.mil._train import fit

RECIPE = Recipe(
    aggregator=Component(name="abmil", options={"embed_dims": [4], "hidden": 2}),
    training=Training(epochs=1, bags_per_step=16, select="last", patience=0),
)


def test_a_model_says_what_shaped_it(toy, tmp_path):
    train, val = toy.parts()
    fit(RECIPE, toy.task, train, val, folder=tmp_path)
    seen = read_seen(tmp_path)
    assert seen.patient_of == dict(zip(toy.examples.ids, toy.examples.patient_ids, strict=True))
    parts = [line.rsplit(",", 1)[1] for line in (tmp_path / SEEN).read_text().split()[1:]]
    assert parts == ["train"] * len(train) + ["val"] * len(val)


def test_a_model_of_an_older_version_is_told_what_it_saw_when_it_is_asked_for_again(toy, tmp_path):
    train, val = toy.parts()
    fit(RECIPE, toy.task, train, val, folder=tmp_path)
    (tmp_path / SEEN).unlink()
    fit(RECIPE, toy.task, train, val, folder=tmp_path)
    assert set(read_seen(tmp_path).patient_of) == set(toy.examples.ids)


def test_a_patient_stands_for_all_slides(make_toy, tmp_path):
    toy = make_toy(per_patient=3)
    write_seen(tmp_path, patient_examples(toy.examples), None)
    assert read_seen(tmp_path).patient_of == dict(zip(toy.examples.ids, toy.examples.patient_ids, strict=True))


def test_a_fold_judges_its_test_slides_and_strangers_are_judged_by_all(make_toy, tmp_path):
    toy = make_toy(per_patient=2)
    splits = make_splits(toy.cohort, folds=3, val_fraction=0.0)
    crossval(RECIPE, toy.task, toy.examples, splits, cohort=toy.cohort, out=tmp_path)
    run = Run.open(tmp_path)
    for number, split in enumerate(splits):
        assert all(run.unbiased(slide) == (tmp_path / f"fold_{number}",) for slide in split.test)
    assert len(run.unbiased("stranger")) == 3
    (tmp_path / "fold_0" / SEEN).unlink()
    older = Run.open(tmp_path)
    assert older.unbiased(splits[0].test[0]) == ()
    assert older.is_unknown(splits[0].test[0])
    assert not run.is_unknown(splits[0].test[0])


def test_another_slide_of_a_seen_patient_is_seen():
    seen = Seen({"s1": "p1", "s2": "p1"})
    assert seen.has("s1")
    assert seen.has("s9", "p1")
    assert not seen.has("s9", "p2")
    assert not seen.has("s9")


def test_folds_are_in_order_of_number_and_found_in_a_job(toy, tmp_path):
    for number in (10, 2):
        fit(RECIPE, toy.task, toy.parts()[0], folder=tmp_path / f"job/crossval/fold_{number}")
    assert [model.folder.name for model in Run.open(tmp_path / "job").models] == ["fold_2", "fold_10"]


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not a run"):
        Run.open(tmp_path)
    (tmp_path / SEEN).write_text("nothing\nthere\n")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_seen(tmp_path)
