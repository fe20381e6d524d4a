"""A rerun never overwrites: other options are another study, on the same tiles."""

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from eosin._files import file_fingerprint
from eosin._fingerprints import STAGES, content_hash
from eosin.errors import ConfigError, UnknownNameError
from eosin.mil._recipe import Component, Recipe, Training
from eosin.mil._tables import LabelTable
from eosin.mil.tasks._classification import Classification
from eosin.pipeline._comparison import compare_studies
from eosin.pipeline._deploy import Machine
from eosin.pipeline._preflight import Labelled
from eosin.pipeline._result import Result
from eosin.pipeline._run import Pipeline, run_pipeline, study_key
from eosin.pipeline._studies import StudyFolder, StudyKey, begin_study, differing, find_study, place_study, studies_of
from eosin.wsi._grid import Tiling
from eosin.wsi._job import JobFolder
from eosin.wsi._synthetic import Cohort, make_cohort
from eosin.wsi._tissue import TissueOptions

COHORT = Cohort(n_slides=8, size_um=(300.0, 350.0), slides_per_patient=1, fine_fraction=0, pen_fraction=0, seed=2)
OPTIONS = Pipeline(
    tiling=Tiling(patch_size=128),
    recipe=Recipe(
        aggregator=Component(name="abmil", options={"embed_dims": [8], "hidden": 4}),
        training=Training(epochs=2, select="last", patience=0),
    ),
    folds=2,
    formats=("csv",),
)
OTHER_SEED = {
    "recipe": OPTIONS.recipe.model_copy(update={"training": Training(epochs=2, select="last", patience=0, seed=5)})
}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    make_cohort(folder, COHORT)
    return folder


@pytest.fixture(scope="module")
def job(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> JobFolder:
    job = JobFolder(tmp_path_factory.mktemp("jobs") / "job")
    run(cohort, job)
    return job


def run(cohort: Path, job: JobFolder, study: str | None = None, **changes: object) -> Result:
    return run_pipeline(
        [cohort / "slides"], cohort / "labels.csv", job, OPTIONS.model_copy(update=changes), study=study
    )


def contents(folder: Path) -> dict[str, str]:
    """Return a hash of every result; records of what was skipped are none, nor are other studies."""
    others = {"studies", "records", "claims"}
    files = (one for one in folder.rglob("*") if one.is_file() and not others & set(one.relative_to(folder).parts))
    return {path.relative_to(folder).as_posix(): content_hash(path) for path in files}


def a_question(
    fingerprint: str, *, lr: float = 1e-4, tiles: str = "t", features: str = "w", encoder: str = "he"
) -> StudyKey:
    return StudyKey(fingerprint, {"folds": 5, "recipe.training.lr": lr}, tiles, features, encoder)


def begun(job: JobFolder, question: StudyKey, name: str | None = None) -> StudyFolder:
    study = place_study(job, question, name)
    study.begin()
    return study


@pytest.mark.long
def test_another_option_is_another_study_and_the_first_stays_to_the_byte(
    cohort: Path, job: JobFolder, tmp_path: Path
) -> None:
    copy = JobFolder(tmp_path / "job")
    shutil.copytree(job.root, copy.root)
    before = contents(copy.root)
    made = run(cohort, copy, **OTHER_SEED)
    assert made.out.parent == copy.root / "studies"
    assert made.features == copy.features_dir("0.5mpp_128px_0px_overlap", "he_texture")
    after = contents(copy.root)
    assert {name for name in before if before[name] != after[name]} <= {"run.json"}
    assert set(after) == set(before)
    assert {path.name for path in made.out.iterdir()} >= {"study.json", "crossval", "model", "heatmaps", "report.html"}
    page = (made.out / "report.html").read_text()
    assert '<a href="../../report.html">first</a>' in page
    assert "recipe.training.seed 0" in page
    written = contents(made.out)
    again = run(cohort, copy, **OTHER_SEED)
    assert again.out == made.out
    changed = {name for name, value in contents(made.out).items() if written.get(name) != value}
    assert changed <= {"run.json", "report.html"}
    assert run(cohort, copy).out == copy.root
    first, second = compare_studies(copy)
    assert (first.name, second.name) == ("first", made.out.name)
    assert second.options == {"recipe.training.seed": 5}
    assert second.difference is not None
    assert second.difference.difference == pytest.approx(second.value - first.value)
    assert second.difference.test == "DeLong"
    assert (second.n_slides, second.n_patients) == (8, 8)


def test_studies_of_other_patients_are_not_compared(cohort: Path, job: JobFolder, tmp_path: Path) -> None:
    copy = JobFolder(tmp_path / "job")
    shutil.copytree(job.root, copy.root)
    rows = (cohort / "labels.csv").read_text().splitlines()
    (tmp_path / "labels.csv").write_text("\n".join(rows[:-1]))
    made = run_pipeline([cohort / "slides"], tmp_path / "labels.csv", copy, OPTIONS, study="fewer")
    assert made.out == copy.root / "studies/fewer"
    _, second = compare_studies(copy)
    assert second.refusal.startswith("not comparable with first: only one of the two runs has predictions for")
    assert second.difference is None


def test_a_question_finds_its_study_and_a_name_is_never_taken_twice(tmp_path: Path) -> None:
    job = JobFolder(tmp_path)
    first = begun(job, a_question("a" * 16))
    assert (first.name, first.path) == ("first", tmp_path)
    second = begun(job, a_question("b" * 16, lr=1e-3))
    assert second.path == tmp_path / "studies/bbbbbbbb"
    third = begun(job, a_question("c" * 16), "trial 3")
    assert [study.name for study in studies_of(job)] == ["first", "bbbbbbbb", "trial 3"]
    assert place_study(job, a_question("c" * 16)).path == third.path
    assert place_study(job, a_question("c" * 16), "trial 3").begun
    with pytest.raises(ConfigError, match=r"trial 3: holds.*recipe.training.lr 0.0001 instead of 0.01"):
        place_study(job, a_question("d" * 16, lr=1e-2), "trial 3")
    for name in ("../x", ".x", "a/b", ""):
        with pytest.raises(ConfigError, match="cannot be the name of a folder"):
            place_study(job, a_question("d" * 16), name)
    assert differing(studies_of(job)) == {"recipe.training.lr": [1e-4, 1e-3, 1e-4]}


def test_of_two_first_runs_at_one_moment_one_is_the_first_study(tmp_path: Path) -> None:
    for attempt in range(10):
        job = JobFolder(tmp_path / str(attempt))
        together = threading.Barrier(3)

        def begin(letter: str, job: JobFolder = job, together: threading.Barrier = together) -> StudyFolder:
            together.wait()
            return begin_study(job, a_question(letter * 16))

        with ThreadPoolExecutor() as pool:
            made = list(pool.map(begin, "abc"))
        names = {study.name: study.key for study in studies_of(job)}
        assert len(names) == 3
        assert all(names[study.name] == study.key for study in made)


def test_tiles_and_features_are_shared_where_they_are_made_alike(tmp_path: Path) -> None:
    job = JobFolder(tmp_path)
    begun(job, a_question("a" * 16))
    assert begun(job, a_question("b" * 16)).tiles == job
    assert begun(job, a_question("c" * 16, encoder="other", features="x")).tiles == job
    own = begun(job, a_question("d" * 16, tiles="u"))
    assert own.tiles.root == own.path
    weights = begun(job, a_question("e" * 16, features="x"))
    assert weights.tiles.root == weights.path
    assert begun(job, a_question("0" * 16, tiles="u")).tiles == own.tiles
    assert [study.tiles for study in studies_of(job)][3] == own.tiles


def test_the_newest_finished_study_is_meant_unless_one_is_named(tmp_path: Path) -> None:
    job = JobFolder(tmp_path)
    with pytest.raises(ConfigError, match="has no study"):
        find_study(job)
    for name in "ab":
        study = begun(job, a_question(name * 16), name)
        for file in ("crossval/metrics.json", "model/model.json"):
            (study.path / file).parent.mkdir()
            (study.path / file).write_text("{}")
    begun(job, a_question("c" * 16), "c")
    assert find_study(job).name == "b"
    assert find_study(job, "c").name == "c"
    with pytest.raises(UnknownNameError, match="known: a, b, c"):
        find_study(job, "d")
    (tmp_path / "studies/a/study.json").write_text("{}")
    with pytest.raises(ConfigError, match="is damaged"):
        studies_of(job)


def test_results_of_0_1_stay_where_they_are(cohort: Path, job: JobFolder, tmp_path: Path) -> None:
    copy = JobFolder(tmp_path / "job")
    shutil.copytree(job.root, copy.root)
    (copy.root / "study.json").unlink()
    (old,) = studies_of(copy)
    assert (old.name, old.path, old.is_finished) == ("first", copy.root, True)
    assert place_study(copy, a_question("a" * 16)).path == copy.root / "studies/aaaaaaaa"
    begun(copy, a_question("b" * 16))
    first, second = compare_studies(copy)
    assert (first.state, second.state) == ("finished", "unfinished")


@pytest.fixture
def labelled() -> Labelled:
    table = LabelTable(("s", "t"), ("p", "q"), {"label": ("x", "y"), "age": ("1", "2")})
    return Labelled(table, Classification(classes=("x", "y")), "error", 2)


def test_every_input_of_a_study_makes_another_one(labelled: Labelled, tmp_path: Path) -> None:
    splits, table, weights = tmp_path / "splits.csv", tmp_path / "mpp.csv", tmp_path / "w.pt"
    for path in (splits, table, weights):
        path.write_text("1")
    base: dict[str, object] = {"splits": splits, "slide_mpp": table}
    machine = Machine(weights=weights)
    plain = study_key(OPTIONS, labelled, machine, **base).fingerprint
    other = Labelled(LabelTable(("s", "t"), ("p", "q"), {"label": ("y", "y")}), labelled.task, "error", 2)
    changes: dict[str, Callable[[], str]] = {
        "options": lambda: study_key(OPTIONS.model_copy(update={"folds": 3}), labelled, machine, **base).fingerprint,
        "labels": lambda: study_key(OPTIONS, other, machine, **base).fingerprint,
        "encoder": lambda: study_key(OPTIONS, labelled, Machine(weights=weights, precision="bf16"), **base).fingerprint,
        "splits": lambda: (splits.write_text("2"), study_key(OPTIONS, labelled, machine, **base).fingerprint)[1],
        "slide_mpp": lambda: study_key(OPTIONS, labelled, machine, splits=splits, slide_mpp=0.25).fingerprint,
    }
    assert set(changes) == set(STAGES["study"].inputs)
    assert len({plain, *(change() for change in changes.values())}) == len(changes) + 1
    splits.write_text("1")
    comments = LabelTable(("t", "s"), ("q", "p"), {"label": ("y", "x"), "age": ("3", "4")})
    same = Labelled(comments, labelled.task, "error", 2)
    formats = OPTIONS.model_copy(update={"formats": ("png",)})
    assert study_key(formats, same, machine, **base).fingerprint == plain
    tissue = OPTIONS.model_copy(update={"tissue": TissueOptions(min_area_um2=1)})
    assert study_key(tissue, labelled, machine).tiles != study_key(OPTIONS, labelled, machine).tiles
    assert (
        study_key(OPTIONS, labelled, machine).tiles
        == study_key(OPTIONS.model_copy(update=OTHER_SEED), labelled, machine).tiles
    )
    assert study_key(OPTIONS, labelled, machine).features != study_key(OPTIONS, labelled, Machine()).features
    two = study_key(OPTIONS, labelled, machine, second={"tiling": {"mpp": 1.0}})
    assert two.options["second.tiling.mpp"] == 1.0
    assert two.tiles != study_key(OPTIONS, labelled, machine).tiles
    assert json.dumps(two.options)
    assert file_fingerprint(weights) in two.options.values()
