"""Every checkpoint of the authors' classes, the whole way: `eosin import`, `eosin convert`, `eosin predict`."""

import csv
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from tests.cli.conftest import Run
from tests.mil.test_convert_authors import FILES, read

pytestmark = pytest.mark.long  # half a second for each of many files; five of them are in the fast suite


def imported(run: Run, bag: torch.Tensor, folder: Path) -> Path:
    """Write a bag as TRIDENT does, import it, and return the feature file."""
    steps = np.arange(len(bag))
    with h5py.File(folder / "slide.h5", "w") as file:
        file.create_dataset("features", data=bag.numpy()).attrs["encoder"] = "theirs"
        coords = file.create_dataset("coords", data=np.stack([steps, 0 * steps], 1) * 256)
        coords.attrs.update({"patch_size": 256, "patch_size_level0": 256, "level0_magnification": 20,
                             "target_magnification": 20, "overlap": 0})  # fmt: skip
    result = run("import", folder / "slide.h5", "--out", folder / "job", "--slide-mpp", 0.5)
    assert result.exit_code == 0, result.output
    (stored,) = (folder / "job").rglob("slide.h5")
    return stored


@pytest.mark.parametrize("name", FILES)
def test_the_commands_give_the_authors_probabilities(run: Run, tmp_path: Path, name: str) -> None:
    known, (state, bag, logits) = FILES[name], read(name)
    torch.save({"model": state}, tmp_path / "their.pt")
    classes = [f"c{number}" for number in range(max(2, len(logits)))]
    said = [f"--option={option}={value}" for option, value in known.options.items()]
    facts = ("--encoder", "theirs", "--dim", bag.shape[1], "--mpp", 0.5, "--patch-size", 256)
    meaning = ("--outputs", known.outputs, "--classes", ",".join(classes))
    result = run("convert", tmp_path / "their.pt", "--out", tmp_path / "model", *facts, *meaning, *said)
    assert result.exit_code == 0, result.output
    table, stored = tmp_path / "predictions.csv", imported(run, bag, tmp_path)
    result = run("predict", "--model", tmp_path / "model", "--features", stored.parent, "--out", table)
    assert result.exit_code == 0, result.output
    with table.open() as file:
        (row,) = csv.DictReader(file)
    exclusive = known.outputs == "softmax" and len(logits) > 1
    wanted = logits.softmax(0) if exclusive else logits.sigmoid()
    found = [float(row[f"prob_{name}"]) for name in (classes if len(logits) > 1 else classes[1:])]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def test_a_model_that_reads_merged_tokens_is_refused(refused: Run, tmp_path: Path) -> None:
    known, state = FILES["mhim_attn"], read("mhim_merge_test")[0]
    torch.save({"model": state}, tmp_path / "their.pt")
    said = [f"--option={option}={value}" for option, value in (known.options | {"merge_test": "true"}).items()]
    facts = ("--encoder", "theirs", "--dim", 5, "--mpp", 0.5, "--patch-size", 256, "--outputs", "softmax")
    line = refused("convert", tmp_path / "their.pt", "--out", tmp_path / "model", *facts, *said)
    assert "merged tokens at inference" in line
    assert not (tmp_path / "model").exists()
