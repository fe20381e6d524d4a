"""`eosin convert`: what the file does not say is asked for, in one line and with exit code 2."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eosin.mil._checkpoint import load_card
from tests.cli.conftest import Run

AUTHORS = Path(__file__).parents[1] / "mil" / "authors"
FACTS = ("--encoder", "theirs", "--dim", 12, "--mpp", 0.5, "--patch-size", 256)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Write a checkpoint whose activation and outputs no tensor shows, as PackMIL's own class made it."""
    tensors = load_file(AUTHORS / "gabmil_gelu.safetensors")
    state = {name.removeprefix("state/"): value for name, value in tensors.items() if name.startswith("state/")}
    torch.save({"model": state}, tmp_path / "their.pt")
    return tmp_path / "their.pt"


def test_the_choices_are_named_and_nothing_is_written(refused: Run, checkpoint: Path, tmp_path: Path) -> None:
    command = ("convert", checkpoint, "--out", tmp_path / "model", *FACTS, "--classes", "a,b,c")
    line = refused(*command)
    assert all(word in line for word in ("embed_activation", "relu", "gelu", "softmax", "sigmoid", "risk:INDEX"))
    assert "embed_activation" in refused(*command, "--outputs", "softmax")
    assert "softmax" in refused(*command, "--activation", "gelu")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (("--outputs", "softmax", "--classes", "a,b,c"), "classification"),
        (("--task", "multilabel", "--classes", "a,b,c"), "multilabel"),
        (("--outputs", "risk:2"), "cox"),
    ],
)
def test_what_is_said_decides(run: Run, checkpoint: Path, tmp_path: Path, said: tuple[str, ...], kind: str) -> None:
    result = run("convert", checkpoint, "--out", tmp_path / "model", *FACTS, *said, "--option", "embed_activation=gelu")
    assert result.exit_code == 0, result.output
    card = load_card(tmp_path / "model")
    assert (card.task["kind"], card.recipe.aggregator.options["embed_activation"]) == (kind, "gelu")


@pytest.mark.parametrize(
    ("said", "word"),
    [
        (("--option", "embed_activation"), "expected NAME=VALUE"),
        (("--activation", "gelu", "--option", "embed_activation=relu"), "each name once"),
        (("--activation", "swish"), "relu or gelu or none"),
        (("--outputs", "risk:9", "--activation", "gelu"), "risk:0, risk:1, risk:2"),
    ],
)
def test_what_does_not_fit_is_refused(
    refused: Run, checkpoint: Path, tmp_path: Path, said: tuple[str, ...], word: str
) -> None:
    assert word in refused("convert", checkpoint, "--out", tmp_path / "model", *FACTS, *said)


def test_a_truncated_file_is_refused_in_one_line(refused: Run, checkpoint: Path, tmp_path: Path) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:-200])
    assert "their.pt" in refused("convert", checkpoint, "--out", tmp_path / "model", *FACTS, "--classes", "a,b,c")
