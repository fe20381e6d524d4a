"""Changed files of every kind that eosin reads back: none is taken for what was written, none crashes or hangs.

A process of its own reads the mutants, so that a crash or a hang is a failed test. `EOSIN_CAMPAIGN` scales the number
of the long run, 1,000 mutants of each kind; `EOSIN_SEED` makes other ones.
"""

import json
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pandas as pd
import pytest
import torch
from scaling import SEED, scaled
from scenes import lattice

from eosin import _tables as tables
from eosin._batch import Outcome, run_batch
from eosin._files import write_json
from eosin._filesets import finish_set
from eosin._processes import Child, serve_calls
from eosin._records import Log, Record, read_run_json
from eosin._seals import sealed
from eosin._tables import read_table
from eosin.errors import EosinError, TableError
from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.features._store import read_bag, write_bag
from eosin.heatmaps._annotations import read_regions
from eosin.mil._checkpoint import ModelCard, build_model, load_model, save_model
from eosin.mil._cohort import Cohort
from eosin.mil._crossval import read_predictions
from eosin.mil._data import MemoryBags, make_examples
from eosin.mil._log import LOG, read_log, write_log
from eosin.mil._prediction_table import PredictionTable
from eosin.mil._recipe import Component, Recipe, Training
from eosin.mil._resume import State, read_state, write_state
from eosin.mil._seen import SEEN, read_seen, write_seen
from eosin.mil._splits import Split, read_splits, write_splits
from eosin.mil._tables import LabelTable
from eosin.mil._train import PRECISION, _kept_precision
from eosin.mil.continual import read_sequence
from eosin.mil.tasks._classification import Classification
from eosin.options import read_yaml
from eosin.viewer._saved import read_session
from eosin.wsi._coordinates import read_footer, read_grid, read_quality, write_grid
from eosin.wsi._geojson import read_outline
from eosin.wsi._quality import TileQuality

FEW, MANY = 12, scaled(1000, 24)
HANG_S = 300.0
GRID = lattice(size_px0=(640, 480), slide_mpp=0.5, patch_size=80)
SPEC = FeatureSpec(encoder="toy", dim=8, mpp=0.5, patch_size=80)
RECIPE = Recipe(
    aggregator=Component(name="abmil", options={"embed_dims": [4], "hidden": 4}), training=Training(standardize=False)
)
TASK = Classification(classes=("normal", "tumour"))
IDS = tuple(f"s{number}" for number in range(8))
SQUARE = [[0, 0], [100, 0], [100, 100], [0, 100], [0, 0]]
OUTLINE = {
    "type": "FeatureCollection",
    "features": [
        {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [SQUARE]}, "properties": {"name": "Tumour"}}
    ],
}


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes
    ----------
    make : callable
        Writes it into a folder and returns the path of the file that is changed.
    read : callable
        Given that path, returns what was read, comparable.
    is_ours : bool
        Whether eosin wrote it, so that what is read is nothing else than what was written.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    is_ours: bool = True


def examples() -> Any:
    bags = {name: torch.randn(3, SPEC.dim, generator=torch.Generator().manual_seed(1)) for name in IDS}
    table = LabelTable(IDS, IDS, {"label": tuple(("normal", "tumour")[number % 2] for number in range(len(IDS)))})
    return make_examples(MemoryBags(bags, SPEC), table, TASK)


def make_model(folder: Path) -> Path:
    torch.manual_seed(0)
    files = {LOG: write_log(folder, [{"epoch": 1, "loss": 0.5}]), SEEN: write_seen(folder, examples(), None)}
    card = ModelCard(recipe=RECIPE, task=TASK.model_dump(mode="json"), features=SPEC, files=files)
    save_model(folder, build_model(RECIPE, TASK, SPEC.dim), card)
    return folder


def read_model(path: Path) -> object:
    model, card = load_model(path.parent)
    return card.model_dump_json(), {name: tensor.tolist() for name, tensor in model.state_dict().items()}


def make_splits(folder: Path) -> Path:
    labels = ("normal", "tumour") * 4
    write_splits(
        folder, [Split(IDS[:4], IDS[4:6], IDS[6:]), Split(IDS[4:], IDS[2:4], IDS[:2])], Cohort(IDS, IDS, labels)
    )
    return folder


def make_run_json(folder: Path) -> Path:
    run_batch(list(IDS), lambda _: Outcome(), key=str, stage="tile", run_json=folder / "run.json")
    return folder / "run.json"


def make_records(folder: Path) -> Path:
    log = Log(folder / "run.json")
    for name in IDS:
        log.begin(name, "tile")
        log.add(Record(name, "tile", "ok", message="7 tiles"))
    return next((folder / "records").iterdir())


def read_records(path: Path) -> object:
    """Return what is known of each slide; a line that is damaged is left out, and its slide looked at again."""
    found = {record.slide_id: (record.status, record.message) for record in read_run_json(path.parents[1] / "run.json")}
    return dict.fromkeys(IDS, ("ok", "7 tiles")) | found


def prediction_table(path: Path) -> PredictionTable:
    return PredictionTable(path, "slide_id", TASK, {"model": "m"}, ("model", "n_tiles", "features_hash"), "hash")


def make_predictions(path: Path) -> Path:
    table = prediction_table(path)
    for number, name in enumerate(IDS):
        probability = 0.9 - number / 10
        row = {"status": "ok", "reason": "", "predicted": "normal", "prob_normal": probability}
        table.add(name, row | {"prob_tumour": 1 - probability, "n_tiles": 7, "features_hash": f"f{number}"})
    table.finish({name: {} for name in IDS})
    return path


def kept_rows(path: Path) -> object:
    """Return the rows that a later run keeps; those that were changed are made again, which is not silent."""
    table, sound = prediction_table(path), prediction_table(path.with_name("sound" + path.suffix))
    facts = {name: {"features_hash": f"f{number}"} for number, name in enumerate(IDS)}
    table.keep(IDS, facts.__getitem__)
    sound.keep(IDS, facts.__getitem__)
    assert len(sound.rows) == len(IDS)
    return {name: table.rows.get(name, row) for name, row in sound.rows.items()}


def make_table(suffix: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        make_predictions(folder / f"sound{suffix}")
        return make_predictions(folder / f"p{suffix}")

    return make


def make_results(folder: Path) -> Path:
    (folder / "predictions.csv").write_text("fold,slide_id,label,prob_a\n" + "".join(f"0,{n},a,0.5\n" for n in IDS))
    finish_set(folder, ["predictions.csv"])
    return folder / "predictions.csv"


def make_state(folder: Path) -> Path:
    write_state(folder, State({"w": torch.arange(6.0)}, {"fingerprint": "f", "history": [{"epoch": 1}], "best": 0.5}))
    return folder / "state.safetensors"


def read_kept_state(path: Path) -> object:
    state = read_state(path.parent, "f")
    return None if state is None else ({name: one.tolist() for name, one in state.tensors.items()}, state.facts)


def make_coordinates(folder: Path) -> Path:
    scores = TileQuality(*np.random.default_rng(0).random((4, GRID.n_tiles), np.float32))
    write_grid(folder / "s_patches.h5", GRID, slide_id="s", mpp_source="user", fingerprint="f", quality=scores)
    return folder / "s_patches.h5"


def read_coordinates(path: Path) -> object:
    quality = read_quality(path)
    scores = None if quality is None else pickle.dumps(quality)
    return read_grid(path).origins_px0.tolist(), read_grid(path).slide_mpp, read_footer(path), scores


def make_features(folder: Path) -> Path:
    rows = np.random.default_rng(0).random((GRID.n_tiles, SPEC.dim), np.float32)
    write_bag(folder / "s.h5", FeatureBag(rows, SPEC, "s", GRID))
    return folder / "s.h5"


def read_features(path: Path) -> object:
    bag = read_bag(path)
    return bag.features.tolist(), bag.spec, bag.slide_id, dict(bag.provenance), bag.grid.origins_px0.tolist()


def make_session(folder: Path) -> Path:
    verdict = {"logits": [0.0, 1.0], "columns": {"predicted": "tumour"}, "log_odds": {"tumour": 1.0}}
    data = {
        "kind": "eosin-viewer-session", "version": 2, "eosin": "0.2", "model_id": "m", "aggregator": "abmil",
        "class_name": "tumour", "method": "exact", "added": None, "before": verdict, "after": verdict, "words": "w",
        "removed": {"slide_id": "s", "slide_fingerprint": "f", "n_tiles": 9, "tiles": [[0, 4]]},
    }  # fmt: skip
    write_json(folder / "s_1.json", sealed(data))
    return folder / "s_1.json"


def make_sequence(folder: Path) -> Path:
    source = {"features": "/f", "labels": "/l.csv", "target": "label"}
    task = {"classes": ["a", "b"], "source": source, "judged_by": "test", "slides": ["s1"], "run": "/r"}
    write_json(folder / "sequence.json", sealed({"tasks": [task], "accuracy": [[0.5]]}))
    return folder / "sequence.json"


def make_precision(folder: Path) -> Path:
    write_json(folder / PRECISION, sealed({"precision": "bf16", "device": "cpu", "processor": "any"}))
    return folder / PRECISION


def make_text(name: str, text: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text(text)
        return folder / name

    return make


def make_labels(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        frame = pd.DataFrame({"patient_id": IDS, "slide_id": IDS, "label": ["normal", "tumour"] * 4, "mpp": 0.25})
        path = folder / name
        if path.suffix == ".xlsx":
            book = openpyxl.Workbook()
            for row in [list(frame), *frame.to_numpy().tolist()]:
                book.active.append(row)
            book.save(path)
        elif path.suffix == ".parquet":
            frame.to_parquet(path, index=False)
        else:
            frame.to_csv(path, index=False)
        return path

    return make


def read_here(read: Callable[[Path], tables.Table], path: Path) -> tables.Table:
    """Do what `read_table` does in a process for each file: whatever is raised there is a refusal."""
    try:
        return read(path)
    except Exception as error:
        raise TableError("refused") from error


YAML = (
    "slides: [a, b]\ntiling: &t {mpp: 0.5, patch_size: 256}\nother: *t\nrecipe:\n  training: {lr: 1e-4, epochs: 20}\n"
)
KINDS = {
    "model.json": Kind(lambda folder: make_model(folder) / "model.json", read_model),
    "model.safetensors": Kind(lambda folder: make_model(folder) / "model.safetensors", read_model),
    "seen.csv": Kind(lambda folder: make_model(folder) / SEEN, lambda path: read_seen(path.parent)),
    "log.csv": Kind(
        lambda folder: make_model(folder) / LOG,
        lambda path: read_log(path.parent, json.loads((path.parent / "model.json").read_text())["files"][LOG]) or None,
    ),
    "splits_0.csv": Kind(lambda folder: make_splits(folder) / "splits_0.csv", lambda path: read_splits(path.parent)),
    "manifest.json": Kind(lambda folder: make_splits(folder) / "manifest.json", lambda path: read_splits(path.parent)),
    "run.json": Kind(make_run_json, lambda path: [(one.slide_id, one.status) for one in read_run_json(path)]),
    "records": Kind(make_records, read_records),
    "predictions.csv": Kind(make_table(".csv"), kept_rows),
    "predictions.parquet": Kind(make_table(".parquet"), kept_rows),
    "predictions of a cross-validation": Kind(make_results, read_predictions),
    "state": Kind(make_state, read_kept_state),
    "coordinates": Kind(make_coordinates, read_coordinates),
    "features": Kind(make_features, read_features),
    "session": Kind(make_session, lambda path: read_session(path).model_dump()),
    "sequence.json": Kind(make_sequence, lambda path: read_sequence(path.parent).model_dump()),
    "precision.json": Kind(make_precision, _kept_precision),
    "study.yaml": Kind(make_text("s.yaml", YAML), lambda path: fingerprint_of(read_yaml(path)), is_ours=False),
    "outline": Kind(make_text("a.geojson", json.dumps(OUTLINE)), read_outline, is_ours=False),
    "regions": Kind(make_text("a.geojson", json.dumps(OUTLINE)), read_regions, is_ours=False),
    "labels.csv": Kind(make_labels("l.csv"), read_table, is_ours=False),
    "labels.xlsx": Kind(make_labels("l.xlsx"), read_table, is_ours=False),
    "labels.parquet": Kind(make_labels("l.parquet"), read_table, is_ours=False),
}


def fingerprint_of(data: dict[str, Any]) -> str:
    """Use all of what was read, as a command does that prints or hashes it."""
    return json.dumps(data, default=str)


ODD = [b"\0", b'"', b"\n", b"'", b"[[[[", b"{", b"\xff\xfe", b"1e999", b"9" * 400, b"NaN", b"\\ud800", b"&a *a", b"-"]


def cut(data: bytearray, rng: np.random.Generator) -> bytearray:
    return data[: int(rng.integers(len(data)))]


def flip(data: bytearray, rng: np.random.Generator) -> bytearray:
    for place in rng.integers(0, len(data), 1 + int(rng.integers(4))):
        data[place] ^= 1 << int(rng.integers(8))
    return data


def blank(data: bytearray, rng: np.random.Generator) -> bytearray:
    start = int(rng.integers(len(data)))
    data[start : start + 64] = bytes(len(data[start : start + 64]))
    return data


def other_digit(data: bytearray, rng: np.random.Generator) -> bytearray:
    digits = [place for place, byte in enumerate(data) if 48 <= byte <= 57]
    if digits:
        data[int(rng.choice(digits))] = 48 + int(rng.integers(10))
    return data


def exchange(data: bytearray, rng: np.random.Generator) -> bytearray:
    """Exchange two words, as when the classes of a model change places: the file stays well formed."""
    words = list(re.finditer(rb"[A-Za-z0-9_.]{2,}", bytes(data)))
    if len(words) > 1:
        first, second = sorted(rng.choice(len(words), 2, replace=False))
        a, b = words[int(first)], words[int(second)]
        return data[: a.start()] + b[0] + data[a.end() : b.start()] + a[0] + data[b.end() :]
    return data


def drop_line(data: bytearray, rng: np.random.Generator) -> bytearray:
    lines = bytes(data).splitlines(keepends=True)
    del lines[int(rng.integers(len(lines)))]
    return bytearray(b"".join(lines))


def repeat(data: bytearray, rng: np.random.Generator) -> bytearray:
    start = int(rng.integers(len(data)))
    part = data[start : start + int(rng.integers(1, 200))]
    return data[:start] + part * int(rng.integers(2, 50)) + data[start:]


def insert(data: bytearray, rng: np.random.Generator) -> bytearray:
    """Put in what parsers stumble over."""
    place = int(rng.integers(len(data)))
    return data[:place] + ODD[int(rng.integers(len(ODD)))] + data[place:]


MUTATORS = [cut, flip, blank, other_digit, exchange, drop_line, repeat, insert]


def strike(name: str, folder: Path, count: int) -> list[str]:
    """Read mutants of one kind of file; return what went wrong."""
    tables._read_apart = read_here  # type: ignore[assignment]
    kind, rng, faults = KINDS[name], np.random.default_rng([SEED, len(name)]), []
    path = kind.make(folder)
    sound, data = kind.read(path), path.read_bytes()
    for number in range(count):
        mutate = MUTATORS[number % len(MUTATORS)]
        changed = bytes(mutate(bytearray(data), rng))
        if changed == data:
            continue
        path.write_bytes(changed)
        try:
            found = kind.read(path)
        except EosinError as error:
            if "\n" in error.message or not error.message.isprintable():
                faults.append(f"{mutate.__name__} {number}: a message of several lines: {error.message!r}")
        except Exception as error:  # noqa: BLE001 - whatever it is, a person would see "unexpected"
            faults.append(f"{mutate.__name__} {number}: unexpected {type(error).__name__}: {error}")
        else:
            if kind.is_ours and found is not None and found != sound:
                faults.append(f"{mutate.__name__} {number}: read without a word: {str(found)[:200]}")
    return faults


@pytest.fixture(scope="module")
def reader() -> Iterator[list[Child]]:
    """A process that reads mutants; a test that loses it puts another in its place."""
    children = [Child(serve_calls, has_children=True)]
    yield children
    children[0].stop()


def no_fault(name: str, reader: list[Child], folder: Path, count: int) -> None:
    if not reader[0].process.is_alive():
        reader[0] = Child(serve_calls, has_children=True)
    reader[0].send((strike, (name, folder, count)))
    try:
        faults = reader[0].receive(HANG_S + count)
    except EosinError:
        reader[0].stop()
        raise
    assert not faults, f"{len(faults)} of {count}:\n" + "\n".join(faults[:20])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.long
def test_no_changed_file_is_taken_for_a_sound_one(name: str, reader: list[Child], tmp_path: Path) -> None:
    no_fault(name, reader, tmp_path, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_thousands_of_changed_files(name: str, reader: list[Child], tmp_path: Path) -> None:
    no_fault(name, reader, tmp_path, MANY)
