import random

import numpy as np
import pytest

from eosin.errors import LabelError
from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.features._store import write_bag
from eosin.mil._splits import Split, make_nested_splits, write_splits
from eosin.mil._study import confounded_sites, open_labels, open_study, pose_task, write_all_splits

SPEC = FeatureSpec(encoder="toy", dim=2)


@pytest.fixture
def folder(tmp_path):
    lines = ["patient_id,slide_id,site,grade"]
    for patient in range(12):
        for slide in range(1 + patient % 2):
            name = f"s{patient:02d}{slide}"
            lines.append(f"p{patient},{name},site{patient % 3},g{patient % 2}")
            write_bag(tmp_path / "features" / f"{name}.h5", FeatureBag(np.ones((2, 2), np.float32), SPEC, name))
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    return tmp_path


def test_features_and_labels_become_a_study(folder):
    write_bag(
        folder / "features" / "unlabelled.h5",
        FeatureBag(np.ones((2, 3), np.float32), FeatureSpec(encoder="other", dim=3), "unlabelled"),
    )
    study = open_study(folder / "features", folder / "labels.csv")
    assert study.task.target == "grade"
    assert study.notes[-1] == "1 of 19 slides with features have no label and are left out"
    assert len(study.examples) == len(study.cohort.slide_ids) == 18
    assert set(study.cohort.strata) == {"g0", "g1"}
    splits = study.splits(folds=3)
    write_splits(folder / "splits", splits, study.cohort)
    assert study.splits(folder / "splits") == splits


def test_patients_may_be_the_bags(folder):
    study = open_study(folder / "features", folder / "labels.csv", level="patient", keep_sites=True)
    assert study.examples.ids == tuple(f"p{n}" for n in range(12))
    assert study.examples.bags.length("p1") == 4
    assert study.cohort.sites[:4] == ("site0", "site1", "site2", "site0")
    assert study.examples.targets.tolist() == [0, 1] * 6


@pytest.mark.parametrize("level", ["slide", "patient"])
def test_slides_without_tiles_or_features_are_left_out_of_splits_too(folder, level):
    whole = open_study(folder / "features", folder / "labels.csv")
    splits = whole.splits(folds=3)
    write_all_splits(folder / "splits", [splits], whole.cohort)
    write_bag(folder / "features/s000.h5", FeatureBag(np.ones((0, 2), np.float32), SPEC, "s000"))
    (folder / "features/s020.h5").unlink()
    with pytest.raises(LabelError, match="labelled slides have no features: s020"):
        open_study(folder / "features", folder / "labels.csv")
    study = open_study(folder / "features", folder / "labels.csv", missing="drop", level=level)
    assert study.notes[-2:] == (
        "1 of 18 labelled slides have no features and are left out", "1 slides without tiles are left out: s000",
    )  # fmt: skip
    gone = {"slide": {"s000", "s020"}, "patient": {"p0", "p2"}}[level]
    assert not gone & set(study.examples.ids)
    for kind in ("splits", "splits/splits.json"):
        for split in study.splits(folder / kind):
            assert set().union(*split.parts().values()) == set(study.examples.ids)


@pytest.mark.parametrize("level", ["slide", "patient"])
def test_every_slide_is_accounted_for(folder, level):
    write_bag(folder / "features/s000.h5", FeatureBag(np.ones((0, 2), np.float32), SPEC, "s000"))
    write_bag(folder / "features/spare.h5", FeatureBag(np.ones((1, 2), np.float32), SPEC, "spare"))
    (folder / "features/s020.h5").unlink()
    study = open_study(folder / "features", folder / "labels.csv", missing="drop", level=level)
    folds = study.splits(folds=3)
    missed = {"slide": "s040", "patient": "p4"}[level]
    without = [Split(*(tuple(n for n in part if n != missed) for part in fold.parts().values())) for fold in folds]
    flow = study.account(without)
    assert {slide: (loss.step, loss.reason) for slide, loss in flow.losses.items()} == {
        "s000": ("tissue", "has no tissue"),
        "s020": ("features", "has no features"),
        "spare": ("labelled", "has no row in the label table"),
        "s040": ("in splits", "is in no split"),
    }
    assert len(flow.slide_ids) == 19
    assert len(flow.used) == 15


def test_rows_without_a_label_are_dropped_on_purpose_only(folder):
    labels = folder / "labels.csv"
    labels.write_text(
        labels.read_text().replace("s000,site0,g0", "s000,site0,").replace("s030,site0,g1", "s030,site0,NaN")
    )
    with pytest.raises(LabelError, match="no value in column 'grade' for s000, s030"):
        open_study(folder / "features", labels)
    study = open_study(folder / "features", labels, missing="drop")
    assert study.task.classes == ("g0", "g1")
    assert study.left_out == {"s000", "s030"}
    assert {slide: loss.reason for slide, loss in study.flow.losses.items()} == dict.fromkeys(
        ["s000", "s030"], "has no value in column grade"
    )


def test_splits_of_slides_are_splits_of_their_patients(folder):
    study = open_study(folder / "features", folder / "labels.csv")
    patients = open_study(folder / "features", folder / "labels.csv", level="patient")
    splits = study.splits(folds=3)
    write_splits(folder / "splits", splits, study.cohort)
    patient = study.table.patient_of()
    for of_slides, of_patients in zip(splits, patients.splits(folder / "splits"), strict=True):
        for part, names in of_patients.parts().items():
            assert set(names) == {patient[slide] for slide in of_slides.parts()[part]}
            assert len(names) == len(set(names))


def test_splits_come_from_stamps_file_from_a_column_and_nested(folder):
    study = open_study(folder / "features", folder / "labels.csv")
    splits = study.splits(folds=3, val_fraction=0)
    write_all_splits(folder / "splits", [splits], study.cohort)
    sets = [{name: set(part) for name, part in split.parts().items()} for split in splits]
    found = study.splits(folder / "splits" / "splits.json")
    assert [{name: set(part) for name, part in split.parts().items()} for split in found] == sets
    rows = [f"{slide},{part},x" for part, names in splits[0].parts().items() for slide in names]
    (folder / "parts.csv").write_text("\n".join(["ID,Split,Label", *rows, "elsewhere,train,x"]))
    (found,) = study.splits(folder / "parts.csv")
    assert {name: set(part) for name, part in found.parts().items()} == sets[0]
    assert study.nested(folder / "splits") == study.nested(None) == []
    nested = make_nested_splits(study.cohort, folds=3, inner_folds=2)
    write_all_splits(folder / "nested", nested, study.cohort)
    assert study.nested(folder / "nested") == nested


def test_splits_of_another_cohort_are_refused(folder):
    study = open_study(folder / "features", folder / "labels.csv")
    assert any(note.startswith("label: column 'grade', classes g0 (6), g1 (12)") for note in study.notes)
    (folder / "splits_0.csv").write_text("train,val,test\ns000,,nobody\n")
    with pytest.raises(LabelError, match="not in the label table: nobody"):
        study.splits(folder / "splits_0.csv")
    (folder / "plain.csv").write_text((folder / "labels.csv").read_text().replace("site,", "where,"))
    with pytest.raises(LabelError, match="no column 'site'"):
        open_study(folder / "features", folder / "plain.csv", target="grade", keep_sites=True)


def test_sites_that_tell_the_class_are_reported(tmp_path):
    def notes(site_of):
        lines = ["patient_id,slide_id,site,label", *(f"p{i},s{i},{site_of(i)},{'ab'[i % 2]}" for i in range(8))]
        (tmp_path / "labels.csv").write_text("\n".join(lines))
        table = open_labels(tmp_path / "labels.csv")
        return confounded_sites(table, pose_task("classification", table, None))

    assert "site and class cannot be separated" in notes(lambda i: f"site{i % 2}")[0]
    assert not notes(lambda i: f"site{i % 3}")
    assert not notes(lambda i: f"site{i}")


@pytest.mark.long
def test_a_thousand_cohorts_add_up_from_files_and_rows_to_the_splits(tmp_path):
    rng = random.Random(0)
    names = [f"s{number:02d}" for number in range(24)]
    for name in names[:20]:
        n_tiles = 0 if name in ("s03", "s11") else 2
        write_bag(tmp_path / "f" / f"{name}.h5", FeatureBag(np.ones((n_tiles, 2), np.float32), SPEC, name))
    for _ in range(1000):
        files = {name: tmp_path / "f" / f"{name}.h5" for name in names[:20] if rng.random() < 0.9}
        rows = [name for name in names if rng.random() < 0.9]
        blank = {name for name in rows if rng.random() < 0.1}
        cells = [
            f"p{int(name[1:]) // 2},{name},{'' if name in blank else 'ab'[int(name[1:]) // 2 % 2]}" for name in rows
        ]
        (tmp_path / "t.csv").write_text("\n".join(("patient_id,slide_id,label", *cells)))
        study = open_study(files, tmp_path / "t.csv", missing="drop")
        asked = [name for name in rows if rng.random() < 0.9]
        part = {name: rng.randrange(3) for name in {int(one[1:]) // 2 for one in asked}}
        parts = [tuple(name for name in asked if part[int(name[1:]) // 2] == number) for number in range(3)]
        flow = study.account([Split(*(tuple(n for n in names if n not in study.left_out) for names in parts))])
        fit = {name for name in rows if name in files and name not in blank and name not in ("s03", "s11")}
        assert set(flow.slide_ids) == {*files, *rows}
        assert set(flow.used) == fit & set(asked)
        assert set(flow.losses) == set(flow.slide_ids) - set(flow.used)
        steps = flow.counts()
        assert steps[0].slides - sum(sum(step.lost.values()) for step in steps) == steps[-1].slides == len(flow.used)
        assert {flow.losses[name].step for name in rows if name not in files} <= {"features", "labelled"}
