import numpy as np
import pytest

from eosin.errors import LabelError
from eosin.features.bag import FeatureBag, FeatureSpec
from eosin.features.store import write_bag
from eosin.mil.splits import make_splits, write_splits
from eosin.mil.study import open_study

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
    assert len(study.examples) == len(study.cohort.slide_ids) == 18
    assert set(study.cohort.strata) == {"g0", "g1"}
    splits = study.splits(folds=3)
    write_splits(folder / "splits", splits, study.cohort)
    assert study.splits(folder / "splits") == splits


def test_patients_may_be_the_bags(folder):
    study = open_study(folder / "features", folder / "labels.csv", level="patient", site="site")
    assert study.examples.ids == tuple(f"p{n}" for n in range(12))
    assert study.examples.bags.length("p1") == 4
    assert study.cohort.sites[:4] == ("site0", "site1", "site2", "site0")
    assert study.examples.targets.tolist() == [0, 1] * 6


def test_splits_of_another_cohort_are_refused(folder):
    study = open_study(folder / "features", folder / "labels.csv")
    slides = study.splits(folds=3)
    patients = open_study(folder / "features", folder / "labels.csv", level="patient")
    write_splits(folder / "splits", slides, study.cohort)
    with pytest.raises(LabelError, match="not in the label table"):
        patients.splits(folder / "splits")
    assert make_splits(patients.cohort, folds=3)
    with pytest.raises(LabelError, match="no column 'hospital'"):
        open_study(folder / "features", folder / "labels.csv", site="hospital")
