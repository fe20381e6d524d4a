"""Checkpoints that the authors' own classes wrote, and what these classes answer.

Each file of `authors/` was made outside this project: the public class of the repository, commit and arguments that the
header of the file names was built with small widths and given random weights; the file holds its state dictionary under
the authors' names (`state/...`), a bag (`x`), and its answer in float64 (`logits`). Nothing of eosin took part.
"""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from eosin.errors import CheckpointError
from eosin.features._bag import FeatureSpec
from eosin.mil._checkpoint import load_model
from eosin.mil._convert import convert_checkpoint
from eosin.mil.bags import PackedBags

FOLDER = Path(__file__).parent / "authors"


@dataclass(frozen=True)
class Known:
    """What a file must become, and what only its owner can state."""

    aggregator: str
    outputs: str = "softmax"
    options: dict[str, str] = field(default_factory=dict)


RELU, GELU, NONE = ({"embed_activation": name} for name in ("relu", "gelu", "none"))
WHOLE = {"merge_test": "false"}
FILES = {
    "clam_sb": Known("clam_sb"),
    "clam_sb_big_no_gate": Known("clam_sb"),
    "clam_sb_no_gate_no_dropout": Known("clam_sb"),
    "clam_mb": Known("clam_mb"),
    "clam_mb_no_gate": Known("clam_mb"),
    "mil_fc": Known("max"),
    "mil_fc_mc": Known("max"),
    "acmil_ga": Known("acmil"),
    "acmil_ga_residual": Known("acmil"),
    "acmil_single_mha": Known("acmil_mha"),
    "aem_mha": Known("acmil_mha"),
    "acmil_mha": Known("acmil_mha"),
    "acmil_abmil": Known("abmil"),
    "aem_abmil": Known("abmil"),
    "millab_abmil": Known("abmil"),
    "millab_abmil_two_layers": Known("abmil"),
    "millab_abmil_no_gate": Known("abmil"),
    "millab_abmil_wrapped": Known("abmil"),
    "millab_clam": Known("clam_sb"),
    "millab_clam_two_layers_no_gate": Known("clam_sb"),
    "millab_dsmil": Known("dsmil"),
    "millab_transmil_1": Known("transmil"),
    "millab_transmil_2": Known("transmil"),
    "millab_transmil_3": Known("transmil"),
    "dsmil": Known("dsmil", "sigmoid"),
    "dsmil_two_classes_linear_passing": Known("dsmil", "sigmoid"),
    "dsmil_iclassifier": Known("dsmil", "sigmoid"),
    "transmil": Known("transmil"),
    "hippo": Known("abmil"),
    "hippo_no_gate": Known("abmil"),
    "gabmil_relu": Known("abmil", options=RELU),
    "gabmil_gelu": Known("abmil", options=GELU),
    "gabmil_none": Known("abmil", options=NONE),
    "dabmil_relu": Known("abmil", options=RELU),
    "dabmil_gelu_no_bias": Known("abmil", options=GELU),
    "packmil_repo_dsmil": Known("dsmil", options=GELU),
    "packmil_transmil": Known("transmil", options=RELU),
    "mhim_attn": Known("abmil", options=RELU | {"attention_activation": "relu"} | WHOLE),
    "mhim_attn_gelu_tanh": Known("abmil", options=GELU | {"attention_activation": "tanh"} | WHOLE),
    "mhim_attn_gelu_gelu": Known("abmil", options=GELU | {"attention_activation": "gelu"} | WHOLE),
    "mhim_no_merge": Known("abmil", options=RELU | {"attention_activation": "relu"}),
    "mhim_dsmil": Known("dsmil", options=GELU | WHOLE),
    "mhim_selfattn": Known("transmil", options=RELU | WHOLE),
    "mhim_repo_transmil": Known("transmil", options=RELU),
    "torchmil_abmil": Known("abmil", "sigmoid", {"attention_activation": "tanh"}),
    "torchmil_abmil_gated_gelu": Known("abmil", "sigmoid", {"attention_activation": "gelu"}),
    "torchmil_abmil_embedded": Known("abmil", "sigmoid", RELU | {"attention_activation": "relu"}),
    "torchmil_clam": Known("abmil", "sigmoid", {"attention_activation": "tanh"}),
    "torchmil_dsmil": Known("dsmil", "sigmoid"),
    "set_transformer": Known("set_transformer", options={"heads": "2"}),
    "set_transformer_seeds": Known("set_transformer", options={"heads": "2"}),
    "set_transformer_two_seeds": Known("set_transformer", "sigmoid", {"heads": "2"}),
    "deepmil": Known("abmil", "sigmoid"),
    "deepmil_gated": Known("abmil", "sigmoid"),
    "trident": Known("abmil", "sigmoid"),
    "trident_two_heads": Known("abmil", "sigmoid"),
    "trident_no_gate": Known("abmil", "sigmoid"),
    "packmil_ads": Known("downsampled", options=GELU),
    "packmil_gated": Known("abmil", options=RELU),
    "packmil_two_classifiers": Known("downsampled", options=RELU),
}


def read(name):
    """Return state dictionary, bag and answer."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (it is no mapping)
    state = {key.removeprefix("state/"): value for key, value in tensors.items() if key.startswith("state/")}
    return state, tensors["x"], tensors["logits"]


def convert(state, folder, known, bag, logits, **others):
    torch.save({"epoch": 3, "state_dict": state}, folder / "their.pt")
    count = max(2, len(logits))
    classes = [f"c{number}" for number in range(count)]
    arguments = {"classes": classes, "outputs": known.outputs, "options": known.options} | others
    spec = FeatureSpec(encoder="theirs", dim=bag.shape[1])
    card = convert_checkpoint(folder / "their.pt", folder / "out", features=spec, **arguments)
    return card, load_model(folder / "out")[0]


def answer(model, bag):
    with torch.no_grad():
        return model.double()(PackedBags.pack([bag.double()]))


@pytest.mark.parametrize("name", FILES)
def test_the_answer_is_that_of_the_authors_class(name, tmp_path):
    known, (state, bag, logits) = FILES[name], read(name)
    card, model = convert(state, tmp_path, known, bag, logits)
    assert card.recipe.aggregator.name == known.aggregator
    torch.testing.assert_close(answer(model, bag).logits[0], logits, rtol=0, atol=1e-9)


def test_every_file_is_used():
    assert {path.stem for path in FOLDER.glob("*.safetensors")} == {*FILES, "millab_feather"}


def test_feather_without_its_last_layer(tmp_path):
    state, bag, embedding = read("millab_feather")
    known = Known("abmil", "softmax")
    with pytest.raises(CheckpointError, match="lacks the layers classifier; pass --partial"):
        convert(state, tmp_path, known, bag, [0, 0])
    card, model = convert(state, tmp_path, known, bag, [0, 0], partial=True)
    assert card.training["untrained"] == "classifier"
    torch.testing.assert_close(answer(model, bag).embedding[0], embedding, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", [name for name, known in FILES.items() if known.options])
def test_what_tensors_do_not_say_is_asked_for(name, tmp_path):
    known, (state, bag, logits) = FILES[name], read(name)
    with pytest.raises(CheckpointError) as caught:
        convert(state, tmp_path, known, bag, logits, options={}, outputs=None)
    message = str(caught.value)
    assert "outputs" in message
    assert all(option in message for option in known.options)
    assert all(value in message for value in known.options.values())
    assert not (tmp_path / "out").exists()
