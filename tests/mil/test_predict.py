import csv
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from eosin._records import Record
from eosin.errors import ConfigError, FeatureMismatchError
from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.features._store import find_bags, write_bag
from eosin.mil import _feed as feed
from eosin.mil import _predict as prediction
from eosin.mil._checkpoint import load_card, load_model, save_model
from eosin.mil._crossval import crossval
from eosin.mil._data import FeatureFolder
from eosin.mil._ensemble import load_ensemble
from eosin.mil._predict import predict
from eosin.mil._recipe import Component, Recipe, Training
from eosin.mil._seen import SEEN
from eosin.mil._splits import make_splits
from eosin.mil._train import fit
from eosin.mil.task import make_task


def train_models(toy, folder, seeds=(0, 1)):
    train, val = toy.parts()
    for seed in seeds:
        training = Training(epochs=10, lr=1e-2, bags_per_step=8, seed=seed)
        recipe = Recipe(aggregator=Component(name="abmil", options={"embed_dims": [8], "hidden": 4}), training=training)
        fit(recipe, toy.task, train, val, folder=folder / str(seed))
    return [folder / str(seed) for seed in seeds]


@pytest.fixture
def models(toy, tmp_path):
    return train_models(toy, tmp_path / "models")


@pytest.fixture
def folder(toy, tmp_path):
    features = tmp_path / "features"
    for slide in ("s000", "s001", "s003"):
        write_bag(features / f"{slide}.h5", FeatureBag(toy.bags.load(slide).numpy(), toy.bags.spec, slide))
    write_bag(features / "empty.h5", FeatureBag(np.zeros((0, toy.bags.spec.dim), np.float32), toy.bags.spec, "empty"))
    (features / "broken.h5").write_bytes(b"not a feature file")
    other = FeatureSpec(encoder="other", dim=toy.bags.spec.dim)
    write_bag(features / "other.h5", FeatureBag(np.zeros((2, other.dim), np.float32), other, "other"))
    return features


def read(path):
    with path.open(newline="") as file:
        return {row["slide_id"]: row for row in csv.DictReader(file)}


def test_every_slide_is_one_row_whatever_becomes_of_it(models, folder, tmp_path):
    report = predict(models[:1], find_bags(folder), tmp_path / "out.csv")
    rows = read(tmp_path / "out.csv")
    assert {slide: row["status"] for slide, row in rows.items()} == {
        "s000": "ok", "s001": "ok", "s003": "ok", "empty": "empty", "broken": "failed", "other": "failed",
    }  # fmt: skip
    assert report.exit_code == 1
    assert rows["other"]["reason"] == "mismatch"
    assert "encoder other, not toy" in rows["other"]["message"]
    assert rows["empty"]["predicted"] == ""
    ok = rows["s001"]
    assert float(ok["prob_c0"]) + float(ok["prob_c1"]) == pytest.approx(1)
    assert ok["predicted"] == "c1"
    assert ok["n_tiles"] != "0"
    assert ok["encoder"] == "toy"
    assert ok["uncertainty"] == ""


def test_a_large_bag_is_read_in_pieces_and_gets_the_same_answer(models, folder, tmp_path, monkeypatch):
    predict(models, find_bags(folder), tmp_path / "whole.csv")
    read_rows = []
    load = FeatureFolder.load
    monkeypatch.setattr(
        FeatureFolder, "load", lambda self, name, rows: read_rows.append(rows) or load(self, name, rows)
    )
    for module in (prediction, feed):
        monkeypatch.setattr(module, "LARGE_BAG", 3)
    monkeypatch.setattr(feed, "PIECE_ROWS", 2)
    monkeypatch.setattr(feed, "KEPT_BYTES", 0)
    predict(models, find_bags(folder), tmp_path / "pieces.csv")
    assert max(map(len, read_rows)) == 2
    whole, pieces = read(tmp_path / "whole.csv"), read(tmp_path / "pieces.csv")
    for slide in ("s000", "s001", "s003"):
        assert float(pieces[slide]["prob_c1"]) == pytest.approx(float(whole[slide]["prob_c1"]), rel=1e-6)


def test_every_slide_is_accounted_for_by_name_step_and_reason(models, folder, tmp_path):
    failures = [Record("blurred", "tile", "failed", "no-mpp"), Record("torn", "extract t/e", "failed", "corrupt")]
    patient_of = {"s000": "P0", "s001": "P0", "empty": "P1", "gone": "P2", "blurred": "P3"}
    for _ in range(2):  # the second run keeps rows
        made = predict(models[:1], find_bags(folder), tmp_path / "p.csv", failures=failures, patient_of=patient_of)
        assert {slide: (loss.step, loss.reason) for slide, loss in made.flow.losses.items()} == {
            "blurred": ("readable", "no-mpp"),
            "torn": ("features", "corrupt"),
            "empty": ("tissue", "has no tissue"),
            "broken": ("predicted", read(tmp_path / "p.csv")["broken"]["reason"]),
            "other": ("predicted", "mismatch"),
            "gone": ("found", "has no slide or feature file"),
            "s003": ("labelled", "has no row in the table of patients"),
        }
        assert made.flow.used == ("s000", "s001")
        assert [row["used"] for row in read(tmp_path / "p_cohort.csv").values()].count("1") == 2
        steps = json.loads((tmp_path / "p_cohort.json").read_text())["cohort"]
        left = {"given": 9, "found": 8, "readable": 7, "tissue": 6, "features": 5, "predicted": 3, "labelled": 2}
        assert {step["step"]: step["slides"] for step in steps} == left


def test_an_ensemble_is_the_mean_and_says_how_much_it_varies(models, folder, tmp_path):
    tables = []
    for number, chosen in enumerate([models[:1], models[1:], models]):
        predict(chosen, find_bags(folder), tmp_path / f"{number}.csv")
        tables.append(read(tmp_path / f"{number}.csv"))
    for slide in ("s000", "s003"):
        values = [float(table[slide]["prob_c1"]) for table in tables]
        assert values[2] == pytest.approx((values[0] + values[1]) / 2)
        assert float(tables[2][slide]["uncertainty"]) == pytest.approx(np.std(values[:2], ddof=1))
    assert tables[2]["s000"]["model"] == f"{tables[0]['s000']['model']}+{tables[1]['s000']['model']}"


def test_features_that_fit_no_model_stop_the_run(models, folder, tmp_path):
    with pytest.raises(FeatureMismatchError, match="encoder other, not toy"):
        predict(models, {"other": folder / "other.h5"}, tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_models_of_different_questions_are_no_ensemble(make_toy, models, tmp_path):
    others = train_models(make_toy(kind="binary"), tmp_path / "binary", seeds=(0,))
    with pytest.raises(ConfigError, match="have different classes or tasks"):
        load_ensemble([*models, *others])
    with pytest.raises(ConfigError, match="there is no model"):
        load_ensemble([])


def test_every_row_says_what_it_was_made_by(models, folder, tmp_path):
    predict(models[:1], find_bags(folder), tmp_path / "out.csv")
    row = read(tmp_path / "out.csv")["s001"]
    assert row["model"] == load_card(models[0]).model_id
    assert row["threshold"] == "0.5"
    assert row["encoder_hash"] == ""
    assert len(row["features_hash"]) == 16


def test_parquet_holds_the_same_as_csv(models, folder, tmp_path):
    for name in ("a.csv", "a.parquet"):
        predict(models, find_bags(folder), tmp_path / name)
    frame = pd.read_parquet(tmp_path / "a.parquet").set_index("slide_id")
    table = read(tmp_path / "a.csv")
    assert list(frame.index) == list(table)
    assert frame["n_tiles"].dtype == "Int64"
    for slide, row in table.items():
        if row["status"] == "ok":
            assert frame.loc[slide, "prob_c1"] == float(row["prob_c1"])
            assert frame.loc[slide, "uncertainty"] == float(row["uncertainty"])
        else:
            assert np.isnan(frame.loc[slide, "prob_c1"])
    with pytest.raises(ConfigError, match=r"suffix \.csv or \.parquet"):
        predict(models, find_bags(folder), tmp_path / "a.xlsx")


@pytest.mark.parametrize("name", ["out.csv", "out.parquet"])
@pytest.mark.long
def test_a_finished_row_stays_while_models_and_features_are_the_same(models, folder, tmp_path, monkeypatch, name):
    out, files = tmp_path / name, find_bags(folder)
    predict(models[:1], files, out)
    before = out.read_bytes()
    seen = []
    plain = prediction.predict_slide
    monkeypatch.setattr(prediction, "predict_slide", lambda e, path: seen.append(path.stem) or plain(e, path))
    report = predict(models[:1], files, out)
    assert seen == [slide for slide in files if slide in {"broken", "other"}]
    assert report.count("skipped") == 4
    assert out.read_bytes() == before
    seen.clear()
    bag = FeatureBag(np.ones((3, 12), np.float32), FeatureSpec(encoder="toy", dim=12), "s001")
    write_bag(folder / "s001.h5", bag)
    predict(models[:1], files, out)
    assert sorted(seen) == sorted(["s001", *(slide for slide in files if slide in {"broken", "other"})])
    seen.clear()
    predict(models[1:], files, out)
    assert len(seen) == len(files)


def test_a_table_that_is_not_ours_is_replaced(models, folder, tmp_path, caplog):
    out = tmp_path / "out.csv"
    for content in (b"a,b\n1,2\n", b"\xff\xfe\x00", b""):
        out.write_bytes(content)
        with caplog.at_level(logging.WARNING):
            report = predict(models[:1], find_bags(folder), out)
        assert report.count("skipped") == 0
        assert "s001" in read(out)


def test_slides_that_failed_before_are_rows_with_their_own_reason(models, folder, tmp_path):
    lost = Record("a_slide", "tile", "failed", "no-mpp", "the slide states no mpp; pass --slide-mpp (µm/px)")
    predict(models, {"s001": folder / "s001.h5"}, tmp_path / "out.csv", failures=[lost])
    table = read(tmp_path / "out.csv")
    assert list(table) == ["a_slide", "s001"]
    row = table["a_slide"]
    assert (row["status"], row["reason"], row["message"]) == ("failed", "no-mpp", lost.message)
    assert row["model"] == table["s001"]["model"]


SCRIPT = """
import json, os, random, signal, sys, time
from pathlib import Path

import torch

torch.set_num_threads(1)
from eosin.features._store import find_bags
from eosin.mil import _feed as feed
from eosin.mil import _predict as prediction
from eosin.mil import _prediction_table as prediction_table

prediction_table.SAVE_INTERVAL_S = 0
model, folder, out = map(Path, sys.argv[1:4])
partial = out.with_name(f".{out.name}.partial.csv")
draw = random.Random(0)


def stamp():
    return os.stat(partial).st_mtime_ns if partial.exists() else None


states = []
for _ in range(8):
    before = stamp()
    pid = os.fork()
    if not pid:
        prediction.predict([model], find_bags(folder), out, progress=lambda _: time.sleep(0.01))
        os._exit(0)
    while stamp() == before and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.0005)
    time.sleep(draw.choice((0, draw.uniform(0, 0.05))))
    os.kill(pid, signal.SIGKILL)
    killed = os.waitpid(pid, 0)[1] != 0
    states.append([killed, out.exists()])
print(json.dumps(states))
"""


def many_bags(folder, n_bags):
    rng = np.random.default_rng(0)
    for number in range(n_bags):
        spec = FeatureSpec(encoder="toy", dim=12)
        write_bag(folder / f"m{number:03d}.h5", FeatureBag(rng.normal(size=(5, 12)).astype(np.float32), spec, "x"))
    return folder


@pytest.mark.long
def test_a_killed_run_leaves_no_half_table_and_goes_on(models, tmp_path):
    folder, out = many_bags(tmp_path / "many", 120), tmp_path / "out.csv"
    predict(models[:1], find_bags(folder), tmp_path / "straight.csv")
    command = [sys.executable, "-c", SCRIPT, str(models[0]), str(folder), str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    states = json.loads(done.stdout)
    assert sum(killed for killed, _ in states) >= 2
    if not any(exists for _, exists in states):
        assert 0 < len(read(tmp_path / ".out.csv.partial.csv")) < 120
    report = predict(models[:1], find_bags(folder), out)
    assert report.count("skipped") > 0
    assert out.read_bytes() == (tmp_path / "straight.csv").read_bytes()
    assert not (tmp_path / ".out.csv.partial.csv").exists()


def test_an_interrupted_run_keeps_what_is_finished(models, folder, tmp_path):
    def stop(record):
        if record.slide_id == "s001":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(models[:1], find_bags(folder), tmp_path / "out.csv", progress=stop)
    assert not (tmp_path / "out.csv").exists()
    report = predict(models[:1], find_bags(folder), tmp_path / "out.csv")
    assert {record.slide_id for record in report.records if record.status == "skipped"} >= {"s000", "s001"}


def edit(path, change):
    """Change the rows of a table by hand."""
    is_csv = path.suffix == ".csv"
    frame = pd.read_csv(path, dtype=str, keep_default_na=False) if is_csv else pd.read_parquet(path)
    change(frame)
    frame.to_csv(path, index=False) if is_csv else frame.to_parquet(path)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.long
def test_a_row_that_was_edited_is_made_again_and_no_other(models, folder, tmp_path, suffix):
    out, files = tmp_path / f"out{suffix}", {name: folder / f"{name}.h5" for name in ("s000", "s001", "empty")}
    predict(models, files, out)
    before = out.read_bytes()
    for column in ("prob_c0", "predicted", "n_tiles", "fingerprint", "encoder_hash", "status"):

        def change(frame, column=column):
            old = frame.loc[1, column]
            frame.loc[1, column] = (
                old + type(old)(1) if not isinstance(old, str) else "0.5" if old.startswith(("0", "1")) else "x"
            )

        edit(out, change)
        assert out.read_bytes() != before
        assert predict(models, files, out).count("skipped") == 2
        assert out.read_bytes() == before
    assert predict(models, files, out).count("skipped") == 3


def test_rows_of_another_card_with_the_same_weights_are_made_again(models, folder, tmp_path):
    files = {"s000": folder / "s000.h5"}
    predict(models[:1], files, tmp_path / "out.csv")
    model, card = load_model(models[0])
    other = card.task | {"threshold": 0.9} if "threshold" in card.task else card.task | {"classes": ["x", "y"]}
    assert save_model(models[0], model, card.model_copy(update={"task": other})).weights_hash == card.weights_hash
    assert predict(models[:1], files, tmp_path / "out.csv").count("skipped") == 0


QUICK = Recipe(
    aggregator=Component(name="abmil", options={"embed_dims": [4], "hidden": 2}),
    training=Training(epochs=2, bags_per_step=16, lr=1e-2),
)


@pytest.fixture
def whole(toy, tmp_path):
    """The features of every slide of the toy cohort, and of one that nobody has seen."""
    features = tmp_path / "whole"
    for slide in toy.examples.ids:
        write_bag(features / f"{slide}.h5", FeatureBag(toy.bags.load(slide).numpy(), toy.bags.spec, slide))
    write_bag(features / "new.h5", FeatureBag(toy.bags.load("s001").numpy(), toy.bags.spec, "new"))
    return find_bags(features)


def test_a_row_says_whether_the_model_has_seen_the_slide(models, toy, whole, tmp_path, caplog):
    train, val = toy.parts()
    with caplog.at_level(logging.WARNING):
        predict(models[:1], whole, tmp_path / "out.csv")
    rows = read(tmp_path / "out.csv")
    assert {row["seen"] for slide, row in rows.items() if slide in train.ids} == {"trained"}
    assert {row["seen"] for slide, row in rows.items() if slide in val.ids} == {"validated"}
    assert (rows["new"]["seen"], rows["new"]["seen_by"], rows["new"]["answered_by"]) == ("no", "", "model")
    assert rows[train.ids[0]]["seen_by"] == "slide"
    assert "40 of 61 slides, or their patients, trained the model" in caplog.text
    assert "20 of 61 slides, or their patients, chose the model" in caplog.text


def test_a_new_slide_of_a_seen_patient_is_seen_once_the_patient_is_known(models, toy, whole, tmp_path):
    out, new = tmp_path / "out.csv", {"new": whole["new"]}
    predict(models[:1], new, out)
    assert read(out)["new"]["seen"] == "no"
    spelled = toy.examples.patient_ids[0].upper().replace("-", "_")
    predict(models[:1], new, out, patient_of={"new": spelled})
    assert (read(out)["new"]["seen"], read(out)["new"]["seen_by"]) == ("trained", "patient")
    with (tmp_path / "out_patients.csv").open(newline="") as file:
        (patient,) = csv.DictReader(file)
    assert (patient["patient_id"], patient["seen"], patient["seen_by"]) == (spelled, "trained", "patient")
    predict(models[:1], new, out, patient_of={"new": spelled}, ids="exact")
    assert read(out)["new"]["seen"] == "no"


def test_a_model_that_does_not_say_what_it_has_seen_is_unknown(models, whole, tmp_path, caplog):
    (models[0] / SEEN).unlink()
    with caplog.at_level(logging.WARNING):
        predict(models[:1], {"new": whole["new"]}, tmp_path / "out.csv")
    assert read(tmp_path / "out.csv")["new"]["seen"] == "unknown"
    assert "does not say which slides it has seen" in caplog.text
    predict(models, whole, tmp_path / "both.csv")
    rows = read(tmp_path / "both.csv")
    assert (rows["new"]["seen"], rows["s000"]["seen"]) == ("unknown", "trained")


@pytest.mark.parametrize("kind", ["classification", "survival"])
def test_of_a_crossval_the_fold_answers_that_has_not_seen_the_patient(make_toy, tmp_path, caplog, kind):
    toy = make_toy(per_patient=2)
    task, examples = toy.task, toy.examples
    if kind == "survival":
        rows = [
            row | {"time": str(place + 1), "event": str(place % 3 > 0)} for place, row in enumerate(toy.table.rows())
        ]
        task = make_task("survival", rows, target="time,event")
        examples = replace(examples, targets=task.encode(rows))
    splits = make_splits(toy.cohort, folds=3, val_fraction=0.2)
    crossval(QUICK, task, examples, splits, cohort=toy.cohort, out=tmp_path / "cv")
    features = tmp_path / "features"
    for slide in [*examples.ids, "new"]:
        data = toy.bags.load("s001" if slide == "new" else slide).numpy()
        write_bag(features / f"{slide}.h5", FeatureBag(data, toy.bags.spec, slide))
    with caplog.at_level(logging.WARNING):
        predict(
            [tmp_path / "cv"],
            find_bags(features),
            tmp_path / "out.csv",
            patient_of=toy.table.patient_of() | {"new": "x"},
        )
    assert "figures over" not in caplog.text
    rows, said = read(tmp_path / "out.csv"), read(tmp_path / "cv/predictions.csv")
    number = "prob_c1" if kind == "classification" else "survival_1"
    for place, split in enumerate(splits):
        for slide in split.test:
            assert (rows[slide]["seen"], rows[slide]["answered_by"]) == ("no", f"out-of-fold: fold_{place}")
            assert rows[slide]["model"] == load_card(tmp_path / f"cv/fold_{place}").model_id
            if kind == "classification":
                assert float(rows[slide][number]) == pytest.approx(float(said[slide][number]), abs=1e-6)
                assert rows[slide]["predicted"] == said[slide]["predicted"]
    assert rows["new"]["answered_by"] == "mean of all 3 models"
    assert rows["new"]["uncertainty" if kind == "classification" else number]
    edges = {row["until_1"] for row in rows.values()} if kind == "survival" else {""}
    assert len(edges) == 1
    with (tmp_path / "out_patients.csv").open(newline="") as file:
        patients = {row["patient_id"]: row for row in csv.DictReader(file)}
    first = examples.ids.index(splits[0].test[0])
    mine = [slide for slide, patient in toy.table.patient_of().items() if patient == examples.patient_ids[first]]
    row = patients[examples.patient_ids[first]]
    assert row["answered_by"] == "out-of-fold: fold_0"
    if kind == "classification":
        assert float(row[number]) == pytest.approx(np.mean([float(rows[slide][number]) for slide in mine]))
    again = predict([tmp_path / "cv"], find_bags(features), tmp_path / "out.csv")
    assert again.count("skipped") == 61


def test_a_crossval_and_a_model_answer_together(models, toy, whole, tmp_path):
    splits = make_splits(toy.cohort, folds=2, val_fraction=0.0)
    recipe = QUICK.model_copy(update={"training": QUICK.training.model_copy(update={"select": "last"})})
    crossval(recipe, toy.task, toy.examples, splits, cohort=toy.cohort, out=tmp_path / "cv")
    predict([tmp_path / "cv", models[0]], whole, tmp_path / "out.csv")
    rows = read(tmp_path / "out.csv")
    tested = splits[1].test[0]
    assert rows[tested]["answered_by"].startswith("cv out-of-fold: fold_1; 0 model")
    assert rows[tested]["seen"] in {"trained", "validated"}
    assert rows["new"]["seen"] == "no"
