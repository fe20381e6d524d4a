import csv

import numpy as np
import pytest
import torch

from eosin.errors import CheckpointError, ConfigError, FeatureMismatchError, LabelError
from eosin.features._bag import FeatureSpec
from eosin.mil._cohort import Cohort
from eosin.mil._data import MemoryBags, make_examples
from eosin.mil._recipe import Component, Recipe, Training
from eosin.mil._study import Study
from eosin.mil._tables import LabelTable
from eosin.mil._train import fit
from eosin.mil.continual import (
    SEQUENCE,
    TABLE,
    Source,
    base_recipe,
    continued,
    measures,
    read_sequence,
    record_task,
    sequence,
    summary,
)
from eosin.mil.task import make_task

DIM = 64
RECIPE = Recipe(
    aggregator=Component(name="abmil", options={"embed_dims": [128], "hidden": 32, "dropout": 0.0}),
    training=Training(epochs=15, lr=3e-3, select="last", patience=0, bags_per_step=4, optimizer="adam"),
)


def organ(number, n_bags=32, kind="classification", dim=DIM, names=("normal", "tumour")):
    """Return a task whose instances lie around a place of its own; tumour bags have some that are shifted."""
    generator = torch.Generator().manual_seed(number)
    place, shift = torch.randn(2, dim, generator=generator) * 2
    bags, labels = {}, []
    for bag in range(n_bags):
        rows = torch.randn(int(torch.randint(6, 14, (), generator=generator)), dim, generator=generator) + place
        rows[:3] += shift * (bag % 2)
        bags[f"o{number}s{bag:02d}"] = rows
        labels.append(f"{names[bag % 2]}-{number}")
    ids = tuple(bags)
    table = LabelTable(ids, ids, {"label": tuple(labels)})
    task = make_task(kind, table.rows())
    examples = make_examples(MemoryBags(bags, FeatureSpec(encoder="toy", dim=dim)), table, task)
    return Study(task, examples, Cohort(ids, ids, tuple(labels)), table)


SOURCE = Source(features="/features", labels="/labels.csv", target="label")


class Course:
    """A sequence of organs, learnt one after the other below a folder."""

    def __init__(self, root, monkeypatch, n_tasks=2, recipe=RECIPE):
        self.root, self.organs = root, [organ(number) for number in range(n_tasks)]
        by_path = {f"/features{number}": study for number, study in enumerate(self.organs)}
        monkeypatch.setattr(sequence, "open_study", lambda features, labels, **_: by_path[str(features)])
        self.sequence = None
        for number, study in enumerate(self.organs):
            self.learn(number, study, recipe)

    def run(self, number):
        return self.root / f"task{number}"

    def learn(self, number, study, recipe=RECIPE):
        before = self.run(number - 1) if number else None
        if before is not None:
            recipe, study = continued(before, study, base_recipe(before))
        ids = study.examples.ids
        fit(recipe, study.task, study.examples.subset(ids[:20]), folder=self.run(number))
        source = SOURCE.model_copy(update={"features": SOURCE.features.with_name(f"features{number}")})
        self.sequence = record_task(self.run(number), study, source, test=ids[20:], run=before)


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield Course(tmp_path_factory.mktemp("course"), patch, n_tasks=3)


def test_later_tasks_are_learnt_and_earlier_ones_are_not_lost(course):
    results = course.sequence.results()
    assert (results.diagonal() >= 0.75).all()
    assert results[2].mean() > 0.5  # by chance, one of six classes would be right: 0.17
    assert np.isnan(results[np.triu_indices(3, 1)]).all()


def test_the_table_says_what_the_sequence_is_worth(course):
    with (course.run(2) / TABLE).open() as file:
        rows = list(csv.DictReader(file))
    results = course.sequence.results()
    assert [row["after_task"] for row in rows] == ["1", "2", "3"]
    assert float(rows[2]["accuracy_normal-0_tumour-0"]) == pytest.approx(results[2, 0], abs=1e-5)
    assert rows[0]["accuracy_normal-2_tumour-2"] == rows[0]["forgetting"] == ""
    found = measures(course.sequence, 3)
    assert float(rows[2]["average_accuracy"]) == pytest.approx(results[2].mean(), abs=1e-5)
    assert float(rows[2]["forgetting"]) == pytest.approx(
        np.mean([results[:2, 0].max() - results[2, 0], results[1, 1] - results[2, 1]]), abs=1e-5
    )
    assert float(rows[2]["backward_transfer"]) == pytest.approx(found["backward_transfer"], abs=1e-5)
    assert "forgetting" in summary(course.sequence)[-1]


def test_the_run_holds_all_that_the_next_task_needs(course, monkeypatch):
    recorded = read_sequence(course.run(1))
    assert [task.classes for task in recorded.tasks] == [("normal-0", "tumour-0"), ("normal-1", "tumour-1")]
    recipe, study = continued(course.run(1), organ(7), base_recipe(course.run(1)))
    assert recipe.aggregator.options["classes"] == [2, 2, 2]
    assert recipe.strategy.options["continue_from"] == str(course.run(1))
    assert not recipe.training.standardize
    assert study.task.classes[4:] == ("normal-7", "tumour-7")
    assert set(study.examples.targets.tolist()) == {4, 5}


def test_a_killed_task_goes_on_to_the_same_weights(course, tmp_path):
    recipe, study = continued(course.run(0), organ(5), base_recipe(course.run(0)))
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"epochs": 3})})

    def kill(epoch):
        if epoch["epoch"] == 2:
            raise KeyboardInterrupt

    whole = fit(recipe, study.task, study.examples)
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, study.task, study.examples, folder=tmp_path, progress=kill, state_interval_s=0)
    resumed = fit(recipe, study.task, study.examples, folder=tmp_path)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_an_earlier_task_that_is_gone_leaves_a_gap_and_a_warning(course, tmp_path, monkeypatch, caplog):
    def gone(*_, **__):
        raise ConfigError("no such folder of features")

    monkeypatch.setattr(sequence, "open_study", gone)
    recipe, study = continued(course.run(0), organ(5), base_recipe(course.run(0)))
    quick = recipe.model_copy(update={"training": recipe.training.model_copy(update={"epochs": 1})})
    fit(quick, study.task, study.examples, folder=tmp_path)
    recorded = record_task(tmp_path, study, SOURCE, run=course.run(0))
    assert recorded.accuracy[-1] == (None, None)
    assert "cannot be tested again" in caplog.text
    assert summary(recorded)[-1].startswith("after 2 tasks: average accuracy unknown")
    assert (tmp_path / TABLE).read_text().splitlines()[1].startswith("1,")


def test_what_cannot_follow_is_refused(course, tmp_path):
    run, base = course.run(0), base_recipe(course.run(0))
    with pytest.raises(LabelError, match="already has the classes normal-0, tumour-0"):
        continued(run, organ(0), base)
    with pytest.raises(ConfigError, match="works with classification only"):
        continued(run, organ(4, kind="binary"), base)
    with pytest.raises(FeatureMismatchError, match="width 8"):
        continued(run, organ(4, dim=8), base)
    with pytest.raises(ConfigError, match="holds abmil, whose options stay"):
        continued(run, organ(4), Recipe(aggregator=Component(name="gdat")))
    wider = Component(name="owlora", options={**base.aggregator.options, "host_options": {"hidden": 99}})
    with pytest.raises(ConfigError, match="whose options stay"):
        continued(run, organ(4), base.model_copy(update={"aggregator": wider}))
    same = continued(run, organ(4), RECIPE)[0]
    assert same.aggregator.options["host"] == "abmil"
    (tmp_path / SEQUENCE).write_text("[]")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_sequence(tmp_path)
    with pytest.raises(CheckpointError, match="train the earlier task again"):
        read_sequence(tmp_path / "nowhere")


def test_a_class_without_a_slide_is_refused_if_it_is_new(course):
    _, study = continued(course.run(0), organ(4), base_recipe(course.run(0)))
    study.task.require_trainable(study.examples.targets)
    with pytest.raises(LabelError, match="no training slide of class tumour-4"):
        study.task.require_trainable(study.examples.targets[::2])


def test_a_model_of_another_strategy_cannot_go_on(tmp_path):
    study = organ(0)
    masked = RECIPE.model_copy(
        update={
            "strategy": Component(name="mhim"),
            "training": RECIPE.training.model_copy(update={"epochs": 1}),
        }
    )
    fit(masked, study.task, study.examples, folder=tmp_path)
    with pytest.raises(ConfigError, match="strategy mhim; a sequence of tasks needs supervised"):
        base_recipe(tmp_path)
