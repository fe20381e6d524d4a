"""The account of a cohort adds up, whatever happens to its slides."""

import csv
import itertools
import random
import re

from eosin._records import Record
from eosin.mil._flow import COHORT, STEPS, Flow
from eosin.report._flow import flow_svg

REASONS = ("no-mpp", "truncated", "no row in the table", "blank label")


def random_flow(rng: random.Random) -> Flow:
    files = [f"S{number}" for number in rng.sample(range(60), rng.randint(0, 40))]
    rows = [f"S{number}" for number in rng.sample(range(60), rng.randint(0, 40))]
    flow = Flow.of(files, rows, patient_of={slide: f"P{int(slide[1:]) // 3}" for slide in rows})
    for step in rng.sample(list(STEPS), rng.randint(0, len(STEPS))):
        lost = rng.sample(sorted({*files, *rows, "never-named"}), rng.randint(0, min(10, len({*files, *rows}))))
        flow = flow.lose(step, {slide: rng.choice(REASONS) for slide in lost})
    return flow


def test_a_thousand_cohorts_add_up(tmp_path):
    rng = random.Random(0)
    for _ in range(1000):
        flow = random_flow(rng)
        counts = flow.counts()
        assert counts[0].slides == len(flow.slide_ids) == len(set(flow.slide_ids))
        for before, after in itertools.pairwise(counts):
            assert before.slides - sum(after.lost.values()) == after.slides
            assert before.patients >= after.patients
        assert counts[-1].slides == len(flow.used)
        assert set(flow.used) | set(flow.losses) == set(flow.slide_ids)
        assert not set(flow.used) & set(flow.losses)
    flow.write(tmp_path)
    with (tmp_path / COHORT).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["slide_id"] for row in rows] == list(flow.slide_ids)
    assert sum(row["used"] == "1" for row in rows) == len(flow.used)


def test_a_slide_keeps_its_first_reason_and_one_that_nobody_named_comes_in():
    flow = Flow.of(["a", "b"]).lose("readable", {"a": "truncated"}).lose("labelled", {"a": "no row", "c": "no row"})
    assert flow.losses["a"].reason == "truncated"
    assert flow.slide_ids == ("a", "b", "c")
    assert flow.used == ("b",)


def test_a_thousand_predictions_add_up():
    rng = random.Random(1)
    ends = [
        ("predict", "ok", ""),
        ("predict", "skipped", "done"),
        ("predict", "empty", ""),
        ("predict", "failed", "nan"),
    ]
    ends += [("tile", "failed", "no-mpp"), ("extract 1mpp/uni", "failed", "corrupt"), ("predict", "failed", "missing")]
    for _ in range(1000):
        names = [f"S{number}" for number in range(rng.randint(0, 30))]
        records = {name: Record(name, *rng.choice(ends)) for name in names}
        empty = {name for name, record in records.items() if record.status == "empty"}
        empty |= {name for name, record in records.items() if record.status == "skipped" and rng.random() < 0.2}
        patient_of = None if rng.random() < 0.3 else {name: f"P{name[-1]}" for name in names if rng.random() < 0.8}
        flow = Flow.of_predictions(records, empty, patient_of)
        counts = flow.counts()
        assert counts[0].slides == len(names)
        assert counts[0].slides - sum(sum(count.lost.values()) for count in counts) == len(flow.used)
        done = [name for name in names if records[name].status in ("ok", "skipped") and name not in empty]
        assert list(flow.used) == [name for name in done if patient_of is None or name in patient_of]
        assert {flow.losses[name].step for name in names if records[name].stage == "tile"} <= {"readable"}
        assert {flow.losses[name].step for name in names if records[name].reason == "missing"} <= {"found"}


def test_patients_that_are_not_known_are_not_counted():
    flow = Flow.of(["a", "b", "c"], patient_of={"a": "P1", "b": "nan", "c": ""})
    assert flow.counts()[0].patients == 1


def test_the_lines_name_every_loss_with_its_reason():
    flow = Flow.of([f"s{i}" for i in range(9)], patient_of={"s0": "P0", "s1": "P0"})
    flow = flow.lose("readable", {"s0": "no-mpp"}).keep("labelled", ["s1", "s2"], "no row in the label table")
    assert list(flow.lines()) == [
        "cohort: 9 slides of 1 patient given",
        "  1 lost, no-mpp: s0",
        "  6 lost, no row in the label table: s3, s4, s5, s6, s7 and 1 more",
        "  2 used",
    ]


def test_the_diagram_shows_every_step_and_escapes_what_it_is_given():
    flow = Flow.of(["a", "b", "c"]).lose("readable", {"a": "<script>"}).lose("in splits", {"b": "in no split"})
    picture = flow_svg(flow)
    assert "3 slides" in picture
    assert "1: &lt;script&gt;" in picture
    assert "1: in no split" in picture
    assert "Used in the analysis" in picture
    assert "<script" not in picture
    assert "Slides given and used" in flow_svg(Flow.of(["a"]))
    assert ">1 slide, 1 patient<" in flow_svg(Flow.of(["a"], patient_of={"a": "P"}))


def test_a_long_reason_is_shown_to_its_end():
    reason = "has no value in column Diagnosis of the first biopsy before therapy (central review)"
    picture = flow_svg(Flow.of(["a", "b"]).lose("labelled", {"a": reason}))
    shown = " ".join(re.findall(r"<text[^>]*>([^<]*)", picture)).replace("\N{NO-BREAK SPACE}", " ")
    assert reason in " ".join(shown.split())
