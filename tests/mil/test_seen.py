import pytest

from eosin.errors import CheckpointError
from eosin.mil._crossval import crossval
from eosin.mil._data import patient_examples
from eosin.mil._recipe import Component, Recipe, Training
from eosin.mil._seen import SEEN, Models, Run, Seen, Sight, Witness, read_seen, seen_counts, seen_notes, write_seen
from eosin.mil._splits import Split, make_splits
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
    metrics = crossval(RECIPE, toy.task, toy.examples, splits, cohort=toy.cohort, out=tmp_path)
    assert metrics["seen"] == {"trained": 0, "validated": 0, "unknown": 0, "no": len(toy.examples)}
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
    with pytest.raises(CheckpointError, match="not a training run"):
        Run.open(tmp_path)
    (tmp_path / SEEN).write_text("nothing\nthere\n")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_seen(tmp_path)


def test_a_slide_has_trained_or_chosen_a_model_or_is_new(toy, tmp_path):
    train, val = toy.parts()
    fit(RECIPE, toy.task, train, val, folder=tmp_path)
    seen = read_seen(tmp_path)
    assert seen.of(train.ids[0]) == Sight("trained", "slide", train.ids[0])
    assert seen.of(val.ids[0]) == Sight("validated", "slide", val.ids[0])
    assert seen.of("stranger", train.patient_ids[0]) == Sight("trained", "patient", train.patient_ids[0])
    assert seen.of("stranger").is_new


def test_the_validation_part_of_a_refitted_model_has_trained_it(toy, tmp_path):
    refit = RECIPE.model_copy(update={"training": RECIPE.training.model_copy(update={"select": "loss", "refit": True})})
    train, val = toy.parts()
    fit(refit, toy.task, train, val, folder=tmp_path)
    assert read_seen(tmp_path).of(val.ids[0]).part == "trained"


@pytest.mark.parametrize(
    ("slide", "patient", "by"),
    [
        ("S_01", None, "slide"),
        ("/data/s-01.svs", None, "slide"),
        ("new", "p007", "patient"),
        ("new", "P7", "patient"),
        ("P-007", None, "patient"),
        ("TCGA-A1-A0SB-01Z-00-DX2", None, "patient"),
        ("new", "TCGA-A1-A0SB-01A", "patient"),
    ],
)
def test_look_alikes_are_recognised_unless_names_are_exact(slide, patient, by):
    seen = Seen({"s-01": "P007", "TCGA-A1-A0SB-01Z-00-DX1": "TCGA-A1-A0SB"}) if patient != "P7" else Seen({"x": "P07"})
    if slide == "P-007":
        seen = Seen({"x": "p-7"})
    assert seen.of(slide, patient).part == "trained"
    assert seen.of(slide, patient).by == by
    if not slide.startswith("/"):
        assert seen.of(slide, patient, ids="exact").is_new
    assert seen.of("s-02", "p008").is_new
    assert seen.of("new", "unknown").is_new


def test_the_worst_that_any_slide_of_a_patient_did_counts():
    seen = Seen({"a": "p", "b": "p", "c": "q"}, {"a", "c"})
    assert seen.of("a") == Sight("validated", "slide", "a")
    assert seen.of("a", "p") == Sight("trained", "patient", "p")
    assert seen.of("new", "q") == Sight("validated", "patient", "q")


def test_slides_of_a_run_that_look_alike_are_told_apart_in_it(tmp_path):
    folds = [Witness(tmp_path / "fold_0", Seen({"01": "a"})), Witness(tmp_path / "fold_1", Seen({"1": "b"}))]
    run = Run(tmp_path, tuple(folds))
    assert run.unbiased("1") == (tmp_path / "fold_0",)
    assert run.unbiased("01") == (tmp_path / "fold_1",)
    assert run.unbiased("001") == ()


def test_of_repeated_folds_all_models_answer_that_have_not_seen_the_patient(make_toy, tmp_path):
    toy = make_toy(per_patient=2)
    splits = [
        split for seed in (0, 1) for split in make_splits(toy.cohort, folds=2, val_fraction=0.0, seed=seed)
    ]  # fmt: skip
    crossval(RECIPE, toy.task, toy.examples, splits, cohort=toy.cohort, out=tmp_path)
    run = Run.open(tmp_path)
    for slide in toy.examples.ids[:6]:
        tested = [number for number, split in enumerate(splits) if slide in split.test]
        chosen = run.choose([slide])
        assert chosen.folders == tuple(tmp_path / f"fold_{number}" for number in tested)
        assert chosen.how == "out-of-fold: " + "+".join(f"fold_{number}" for number in tested)
        assert chosen.sight.is_new
    stranger = run.choose(["stranger"])
    assert (len(stranger.folders), stranger.how) == (4, "mean of all 4 models")
    of_patient = run.choose(["stranger"], toy.examples.patient_ids[0])
    assert of_patient.folders == run.choose([toy.examples.ids[0]]).folders


def test_of_nested_folds_the_models_of_one_fold_answer_together(make_toy, tmp_path):
    toy = make_toy(per_patient=2)
    patient = toy.table.patient_of()

    def inner(split, kept):
        train = tuple(slide for slide in split.train if patient[slide][1:].split("-")[0] not in kept)
        return Split(train, tuple(slide for slide in split.train if slide not in train), split.test)

    outer = make_splits(toy.cohort, folds=2, val_fraction=0.0)
    nested = [[inner(split, ("0", "1", "2")), inner(split, ("3", "4", "5"))] for split in outer]
    crossval(RECIPE, toy.task, toy.examples, nested, cohort=toy.cohort, out=tmp_path)
    chosen = Run.open(tmp_path).choose([outer[1].test[0]])
    assert chosen.folders == (tmp_path / "fold_1/inner_0", tmp_path / "fold_1/inner_1")


def test_a_slide_that_every_fold_has_seen_is_answered_by_all_and_says_so(toy, tmp_path):
    ids = toy.examples.ids
    splits = [Split(ids[:40], (), ids[40:50]), Split(ids[:40], (), ids[50:])]
    crossval(RECIPE, toy.task, toy.examples, splits, cohort=toy.cohort, out=tmp_path)
    chosen = Run.open(tmp_path).choose([ids[0]])
    assert (len(chosen.folders), chosen.sight.part) == (2, "trained")


def test_models_without_the_file_may_have_seen_anything(toy, tmp_path):
    fit(RECIPE, toy.task, toy.parts()[0], folder=tmp_path / "a")
    fit(RECIPE, toy.task, toy.parts()[0], folder=tmp_path / "b")
    (tmp_path / "b" / SEEN).unlink()
    assert Models.open([tmp_path / "b"]).choose(["stranger"]).sight == Sight("unknown")
    both = Models.open([tmp_path / "a", tmp_path / "b"])
    assert both.choose(["stranger"]).sight == Sight("unknown")
    assert both.choose([toy.examples.ids[0]]).sight.part == "trained"
    assert both.choose(["stranger"]).how == "mean of all 2 models"


def test_what_a_reader_must_know_is_said_in_numbers_and_names():
    sights = {
        "new": Sight(), "a": Sight("trained", "slide", "a"), "B": Sight("trained", "slide", "b"),
        "c": Sight("validated", "patient", "p"), "d": Sight("unknown"),
    }  # fmt: skip
    trained, validated, unknown = seen_notes(sights)
    assert trained.startswith("2 of 5 slides, or their patients, trained the model")
    assert "a, B (as slide b)" in trained
    assert "1 of 5" in validated
    assert "c (as patient p)" in validated
    assert "1 of 5 slides may be among them" in unknown
    assert seen_notes({"new": Sight()}) == []
    assert seen_counts(sights.values()) == {"trained": 2, "validated": 1, "unknown": 1, "no": 1}
