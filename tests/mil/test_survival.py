import re
import shlex

import numpy as np
import pytest
import torch

from eosin.errors import LabelError
from eosin.mil._data import make_examples
from eosin.mil._ensemble import Ensemble
from eosin.mil._evaluate import predict_outputs
from eosin.mil._recipe import Component, Recipe, Training
from eosin.mil._survival_metrics import concordance, kaplan_meier
from eosin.mil._tables import LabelTable
from eosin.mil._train import fit
from eosin.mil.task import load_task, make_task
from eosin.mil.tasks._cox import Cox
from eosin.mil.tasks._survival import DiscreteSurvival, says_event, survival_losses


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_the_loss_and_its_gradient_are_the_authors(shared, alpha):
    golden = np.load(shared / "golden/nll_surv.npz")
    logits = torch.from_numpy(golden["logits"]).requires_grad_()
    event = 1 - torch.from_numpy(golden["censored"])
    loss = survival_losses(logits, torch.from_numpy(golden["time_bin"]), event, alpha=alpha).mean()
    loss.backward()
    np.testing.assert_allclose(loss.detach(), golden[f"loss_alpha{alpha}"], rtol=1e-12)
    np.testing.assert_allclose(logits.grad, golden[f"grad_logits_alpha{alpha}"], rtol=1e-9, atol=1e-12)
    task = DiscreteSurvival()
    np.testing.assert_allclose(task.activate(logits), golden["survival"], rtol=1e-12)
    np.testing.assert_allclose(task.risk(task.activate(logits)), golden["risk"], rtol=1e-12)


def test_concordance_is_scikit_survivals(shared):
    golden = np.load(shared / "golden/cindex.npz")
    found = concordance(golden["risk"], golden["time"], ~golden["censored"], tied=float(golden["tied_tol"]))
    assert found == pytest.approx(float(golden["cindex"]), abs=1e-15)


def test_concordance_is_one_minus_itself_when_risk_is_turned_round():
    rng = np.random.default_rng(0)
    risk, time, event = rng.normal(size=50), rng.exponential(size=50), rng.random(50) < 0.6
    assert concordance(risk, time, event) == pytest.approx(1 - concordance(-risk, time, event))
    assert concordance(-time, time, np.ones(50, bool)) == 1.0
    assert concordance(risk, time, np.zeros(50, bool)) is None


def rows(*pairs, event="event"):
    return [{"time": str(time), event: str(flag)} for time, flag in pairs]


def test_bins_hold_equal_numbers_of_the_training_parts_events():
    task = make_task("survival", rows((1, 1), (9, 0)), target="time,event")
    target = torch.tensor([[t, t % 3 != 0] for t in range(1, 60)], dtype=torch.float64)
    fitted = task.fit_to(target)
    events = target[target[:, 1] == 1, 0]
    counts = torch.bucketize(events, torch.tensor(fitted.edges, dtype=torch.float64), right=True).bincount()
    assert counts.max() - counts.min() <= 1
    assert load_task(fitted.model_dump(mode="json")) == fitted
    early = fitted.bag_losses(torch.tensor([[9.0, 0, 0, 0]]), torch.tensor([[1.0, 1.0]]).double())
    late = fitted.bag_losses(torch.tensor([[9.0, 0, 0, 0]]), torch.tensor([[59.0, 1.0]]).double())
    assert early < 0.01 < 5 < late


def test_a_table_says_until_when_and_is_read_at_the_times_of_another_task():
    own, other = DiscreteSurvival(edges=(2.0, 4.0, 8.0)), DiscreteSurvival(edges=(3.0, 4.0, 6.0))
    curve = np.array([[0.8, 0.6, 0.4, 0.1]])
    columns = {name: [str(value) for value in values] for name, values in own.table(curve).items()}
    assert [columns[f"until_{k}"] for k in (1, 2, 3)] == [["2.0"], ["4.0"], ["8.0"]]
    np.testing.assert_allclose(own.read_outputs(columns), curve)
    np.testing.assert_allclose(other.read_outputs(columns), [[0.7, 0.6, 0.5, 0.1]])


def test_an_ensemble_answers_at_times_common_to_its_models(monkeypatch):
    tasks = DiscreteSurvival(edges=(2.0, 4.0, 8.0)), DiscreteSurvival(edges=(4.0, 8.0, 16.0))
    said = {tasks[0]: [[0.8, 0.6, 0.2, 0.1]], tasks[1]: [[0.6, 0.2, 0.1, 0.0]]}  # the same curve where both know it
    monkeypatch.setattr("eosin.mil._ensemble.predict_outputs", lambda _m, task, *_a, **_o: np.array(said[task]))
    models = Ensemble((None, None), (), tasks, torch.device("cpu"))
    assert models.task.edges == (3.0, 6.0, 12.0)
    outputs = models.outputs(None, "s")
    np.testing.assert_allclose(outputs[0, :2], [0.7, 0.4])
    np.testing.assert_allclose(outputs[:, 1], 0.4)
    assert models.answer(outputs)["until_2"] == 6.0


def test_time_and_event_are_two_columns():
    with pytest.raises(LabelError, match="'event' cannot be both time and event"):
        make_task("cox", rows((1, 1)), target="event, event=1")


def test_the_words_that_are_events_are_said():
    task = make_task("cox", rows((1, "dead"), (9, "alive"), (3, "Deceased")), target="time,event")
    assert "'event' with Deceased or dead for an event, 2 of 3" in task.describe(
        rows((1, "dead"), (9, "alive"), (3, "Deceased"))
    )


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_training_starts_from_the_hazards_of_the_average_patient(alpha):
    rng = np.random.default_rng(0)
    pairs = np.stack([rng.exponential(5, 400), rng.random(400) < 0.5], 1)
    target = torch.from_numpy(pairs)
    fitted = DiscreteSurvival(alpha=alpha).fit_to(target)
    logits = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    fitted.loss(logits.expand(400, -1), target).backward()
    assert logits.grad.abs().max() < 2e-3  # half an event more and less than the minimum of the loss
    survival = fitted.activate(torch.zeros(1, 4))[0, :3]
    times, curve = kaplan_meier(pairs[:, 0], pairs[:, 1] == 1)
    if not alpha:
        at_edges = np.append(1.0, curve)[np.searchsorted(times, fitted.edges, side="right")]
        np.testing.assert_allclose(survival, at_edges, atol=0.1)  # who is censored in a bin counts as surviving it
    none = DiscreteSurvival(edges=fitted.edges)
    np.testing.assert_allclose(none.activate(torch.tensor([fitted.base])), fitted.activate(torch.zeros(1, 4)), 1e-6)
    assert none.same_question(fitted.model_copy(update={"alpha": 0.0}))


def survival_cohort(make_toy, n_bags):
    toy = make_toy(n_bags=n_bags)
    rng = np.random.default_rng(0)
    died, lost = rng.exponential(np.where(toy.examples.targets == 1, 2.0, 9.0)), rng.exponential(8.0, n_bags)
    pairs = zip(np.minimum(died, lost), (died <= lost).astype(int), strict=True)
    columns = [(f"{time:.4f}", str(seen)) for time, seen in pairs]
    values = dict(zip(("time", "event"), zip(*columns, strict=True), strict=True))
    table = LabelTable(toy.table.slide_ids, toy.table.patient_ids, values)
    task = make_task("survival", table.rows(), target="time,event")
    return toy, task, make_examples(toy.bags, table, task)


def test_survival_is_learnt_in_the_passes_of_an_everyday_recipe(make_toy):
    toy, task, examples = survival_cohort(make_toy, 500)
    train, test = examples.subset(examples.ids[:200]), examples.subset(examples.ids[200:])
    small = Component(name="abmil", options={"embed_dims": [16], "hidden": 8})
    training = Training(lr=1e-3, bags_per_step=16, epochs=15, select="last")
    fitted = fit(Recipe(aggregator=small, training=training), task, train)
    task, target = fitted.card.load_task(), test.targets.numpy()
    found = task.metrics(predict_outputs(fitted.model, task, toy.bags, test.ids), target)["cindex"]
    oracle = concordance(toy.examples.targets[200:].double().numpy(), target[:, 0], target[:, 1] == 1)
    assert oracle > 0.65
    assert found > oracle - 0.05


def test_a_censorship_column_is_turned_round():
    usual = make_task("survival", rows((3, 1), (5, 0)), target="time,event")
    clam = make_task("survival", rows((3, 0), (5, 1), event="censorship"), target="time,censorship")
    assert clam.one_is_censored
    assert torch.equal(usual.encode(rows((3, 1), (5, 0))), clam.encode(rows((3, 0), (5, 1), event="censorship")))
    assert clam.decode(np.array([[3.0, 1.0], [5.0, 0.0]]))[1].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([(1, 0), (2, 0)], "holds no event.*say which value is the event"),
        ([(-1, 1)], "a time cannot be negative"),
        ([(1, "maybe")], "is neither 0 nor 1"),
        ([("x", 1)], "is not a number"),
    ],
)
def test_bad_survival_tables_are_refused(pairs, message):
    with pytest.raises(LabelError, match=message):
        make_task("cox", rows(*pairs), target="time,event")


def test_words_mean_what_they_say_and_a_value_can_be_named():
    words = make_task("cox", rows((3, "Dead"), (5, "alive"), event="censor_status"), target="time,censor_status")
    assert words.encode(rows((3, "Dead"), (5, "alive"), event="censor_status"))[:, 1].tolist() == [1, 0]
    named = make_task("cox", rows((3, 2), (5, 1), event="status"), target="time,status=2")
    assert named.encode(rows((3, 2), (5, 1), event="status"))[:, 1].tolist() == [1, 0]
    assert named.decode(np.array([[3.0, 1.0], [5.0, 0.0]]))[1].tolist() == ["2", "1"]
    assert load_task(named.model_dump(mode="json")) == named
    turned = make_task("cox", rows((3, 0), (5, 1)), target="time,event=0")
    assert turned.encode(rows((3, 0), (5, 1)))[:, 1].tolist() == [1, 0]
    with pytest.raises(LabelError, match="holds 0, 1, 2; the event was said to be '2', one of two"):
        make_task("cox", rows((3, 2), (5, 1), (6, 0)), target="time,event=2")
    with pytest.raises(LabelError, match=r"holds 1 and 2, .*if it is 1, 1 of 2 have one; .*--target time,event=2"):
        make_task("cox", rows((3, 2), (5, 1)), target="time,event")


def test_two_columns_are_needed_and_found():
    with pytest.raises(LabelError, match="survival needs two columns"):
        make_task("survival", rows((1, 1)), target="time")
    values = {"survival_months": ("1", "2"), "censorship": ("0", "1"), "age": ("50", "60")}
    assert LabelTable(("a", "b"), ("1", "2"), values).target_column() == "survival_months,censorship"


def test_the_partial_likelihood_by_hand():
    task = Cox()
    risk = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64)
    target = torch.tensor([[2.0, 1], [3.0, 0], [1.0, 1]], dtype=torch.float64)
    losses = task.bag_losses(risk[:, None], target)
    expected = [torch.logsumexp(risk[:2], 0) - risk[0], torch.tensor(0.0), torch.logsumexp(risk, 0) - risk[2]]
    torch.testing.assert_close(losses, torch.stack([value.double() for value in expected]))


@pytest.mark.parametrize("kind", ["survival", "cox"])
def test_strata_and_metrics(kind):
    task = make_task(kind, rows(*[(t, t % 2) for t in range(12)]), target="time,event")
    strata = task.strata(rows(*[(t, t % 2) for t in range(12)]))
    assert set(strata) == {f"{third} {seen}" for seen in ("event", "censored") for third in ("early", "middle", "late")}
    target = torch.tensor([[1.0, 1], [2.0, 1], [3.0, 0]]).double()
    logits = -target[:, :1].expand(-1, task.n_outputs).float()
    outputs = task.activate(logits)
    assert task.metrics(outputs, target.numpy())["cindex"] == 1.0
    assert "risk" in task.table(outputs)
    with pytest.raises(LabelError, match="no training slide has an event"):
        task.require_trainable(target[2:])


@pytest.mark.parametrize(
    ("column", "event"),
    [
        ("event", True), ("OS", True), ("Status", True), ("DeathEvent", True), ("OS_STATUS", True), ("PFS.event", True),
        ("uncensored", True), ("non_censored", True), ("noncensored", True), ("not censored", True),
        ("not_alive", True), ("non_survivors", True), ("event_observed", True), ("uncensored_status", True),
        ("deceased", True), ("death_from_cancer", True), ("overall_survival_event", True), ("dead", True),
        ("Décès", True), ("Événement", True), ("gestorben", True), ("Tod", True), ("unzensiert", True),
        ("nicht zensiert", True), ("muerto", True), ("overleden", True), ("nicht_lebend", True),
        ("censored", False), ("censorship", False), ("OS_censorship", False), ("Censor", False), ("alive", False),
        ("is_alive", False), ("survived", False), ("event_free", False), ("no_event", False), ("alive_status", False),
        ("Überlebt", False), ("lebt", False), ("zensiert", False), ("censuré", False), ("vivant", False),
        ("progression_free", False), ("isAlive", False), ("nicht verstorben", False), ("sin evento", False),
        ("x", None), ("vital", None), ("outcome", None), ("label", None), ("survival", None), ("vital_status", None),
        ("last_status", None), ("statut_vital", None), ("Vitalstatus", None), ("follow up status", None),
        ("dead_or_alive", None), ("alive/dead", None), ("progression_free_survival", None), ("delta", None),
        ("overall_survival_status", None), ("tumor_free", None), ("fustat", None),
    ],
)  # fmt: skip
def test_the_name_of_a_column_of_0_and_1_says_which_is_the_event_or_nothing(column, event):
    assert says_event(column) is event
    rows = [{"t": "1", column: "1"}, {"t": "2", column: "0"}, {"t": "3", column: "0"}]
    if event is None:
        with pytest.raises(LabelError, match="1, 1 of 3 have one; if it is 0, 2 of 3 have one; say") as asked:
            DiscreteSurvival.from_rows(rows, f"t,{column}")
        first, second = re.findall(r"--target (.+?)(?: or |\)$)", str(asked.value))
        for way, events in ((first, [1, 0, 0]), (second, [0, 1, 1])):
            chosen = DiscreteSurvival.from_rows(rows, *shlex.split(way))
            assert chosen.encode(rows)[:, 1].tolist() == events
    else:
        assert DiscreteSurvival.from_rows(rows, f"t,{column}").encode(rows)[:, 1].tolist() == (
            [1, 0, 0] if event else [0, 1, 1]
        )


@pytest.mark.parametrize(
    ("yes", "no"), [("JA", "nein"), ("Oui", "NON"), ("Sí", "no"), ("Verstorben", "LEBEND"), ("décédé", "vivant")]
)
def test_words_of_several_languages_say_whether_an_event_was_seen(yes, no):
    rows = [{"t": "1,5", "event": yes}, {"t": "2", "event": no}, {"t": "12,25", "event": no.upper()}]
    task = DiscreteSurvival.from_rows(rows, "t,event")
    assert task.encode(rows).tolist() == [[1.5, 1], [2, 0], [12.25, 0]]


def test_a_comma_that_may_stand_for_thousands_is_a_question():
    rows = [{"t": "1,234", "event": "1"}, {"t": "2", "event": "0"}]
    with pytest.raises(LabelError, match="can be read in two ways"):
        DiscreteSurvival.from_rows(rows, "t,event")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (("1:DECEASED", "0:LIVING", "0:LIVING"), [1, 0, 0]),
        (("1:Recurred/Progressed", "0:DiseaseFree", "0:DiseaseFree"), [1, 0, 0]),
        (
            ("2", "1", "1"),
            r"if it is 1, 2 of 3 have one; if it is 2, 1 of 3 .*status=1 or --target t,vital_status=2",
        ),
        (("AWD", "DOD", "DOD"), r"holds AWD and DOD.*--target t,vital_status=AWD or"),
        (("1", "1.0", "0"), r"if it is 1, 2 of 3 have one; if it is 0, 1 of 3"),
        (("yes", "no", "no"), r"if it is yes, 1 of 3 .*--target t,vital_status=yes or --target t,vital_status=no"),
        (("dead", "alive", "lost"), "'lost' in column 'vital_status' is neither 0 nor 1"),
    ],
)
def test_values_of_a_column_whose_name_says_nothing(values, told):
    rows = [{"t": "1", "vital_status": value} for value in values]
    if isinstance(told, list):
        assert DiscreteSurvival.from_rows(rows, "t,vital_status").encode(rows)[:, 1].tolist() == told
        return
    with pytest.raises(LabelError, match=told):
        DiscreteSurvival.from_rows(rows, "t,vital_status")


@pytest.mark.parametrize("column", ["uncensored", "alive", "outcome"])
def test_words_say_what_they_mean_whatever_the_column_is_called(column):
    rows = [{"t": "1", column: "Dead"}, {"t": "2", column: "alive"}]
    assert DiscreteSurvival.from_rows(rows, f"t,{column}").encode(rows)[:, 1].tolist() == [1, 0]
