"""Checkpoints that the authors' own classes wrote, and what these classes answer.

Each file of `authors/` was made outside this project: the public class of the repository, commit and arguments that the
header of the file names was built with small widths and given random weights; the file holds its state dictionary under
the authors' names (`state/...`), a bag (`x`), and its answer in float64 (`logits`). Nothing of eosin took part.
"""

import csv
import random
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors import safe_open

from eosin.errors import CheckpointError
from eosin.features._bag import FeatureSpec
from eosin.features._store import find_bags, read_spec
from eosin.features.interop import ImportOptions, import_file
from eosin.mil._checkpoint import load_model
from eosin.mil._convert import convert_checkpoint, read_tensors, recognise
from eosin.mil._predict import predict
from eosin.mil.bags import PackedBags

FOLDER = Path(__file__).parent / "authors"


@dataclass(frozen=True)
class Known:
    """What a file must become, and what only its owner can state."""

    aggregator: str
    outputs: str = "softmax"
    options: dict[str, str] = field(default_factory=dict)
    within: float = 1e-9


RELU, GELU, NONE = ({"embed_activation": name} for name in ("relu", "gelu", "none"))
WHOLE = {"merge_test": "false"}
FILES = {
    "clam_sb": Known("clam_sb"),
    "clam_sb_big_no_gate": Known("clam_sb"),
    "clam_sb_no_gate_no_dropout": Known("clam_sb"),
    "clam_mb": Known("clam_mb"),
    "clam_mb_no_gate": Known("clam_mb"),
    "mil_fc": Known("max", within=1e-8),  # the difference of two layers is rounded to float32
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
    "torchmil_transmil": Known("transmil", "sigmoid", {"heads": "2", "landmarks": "4"}),
    "torchmil_transmil_plain": Known("transmil", "sigmoid", {"heads": "4", "landmarks": "3"}),
    "stamp_vit": Known("transformer", options={"heads": "2"}),
    "stamp_mlp": Known("abmil"),
    "stamp_linear": Known("mean", options={"pooling": "mean"}),
    "stamp_trans_mil": Known("transmil"),
    "set_transformer": Known("set_transformer", options={"heads": "2"}),
    "set_transformer_seeds": Known("set_transformer", options={"heads": "2"}),
    "set_transformer_two_seeds": Known("set_transformer", "sigmoid", {"heads": "2"}),
    "deepmil": Known("abmil", "sigmoid"),
    "deepmil_gated": Known("abmil", "sigmoid"),
    "trident": Known("abmil", "sigmoid"),
    "trident_two_heads": Known("abmil", "sigmoid"),
    "trident_no_gate": Known("abmil", "sigmoid"),
    "packmil_batch_norm": Known("abmil", options=GELU, within=1e-6),  # norms go into float32 layers
    "packmil_batch_norm_ads": Known("downsampled", options=RELU, within=1e-6),
    "packmil_batch_norm_after": Known("abmil", options=RELU, within=1e-6),
    "dabmil_batch_norm": Known("abmil", options=RELU, within=1e-6),
    "gabmil_batch_norm": Known("abmil", options=GELU, within=1e-6),
    "pack_mean": Known("mean", options=GELU | {"pooling": "mean"}),
    "pack_max": Known("max", options=RELU | {"pooling": "max"}),
    "mambamil_sr": Known("mambamil", options=RELU | {"kind": "sr", "rate": "3"}),
    "mambamil_bi": Known("mambamil", options=GELU | {"kind": "bi"}),
    "mambamil_plain": Known("mambamil", options=RELU),
    "mamba_repo_abmil": Known("abmil", options=GELU),
    "mamba_repo_gated": Known("abmil", options=RELU),
    "mamba_repo_transmil": Known("transmil", options=GELU),
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
    torch.testing.assert_close(answer(model, bag).logits[0], logits, rtol=0, atol=known.within)


def test_every_file_is_used():
    assert {path.stem for path in FOLDER.glob("*.safetensors")} == {*FILES, "millab_feather", "mhim_merge_test"}


@pytest.mark.parametrize(
    "name", ["clam_sb", "dsmil_two_classes_linear_passing", "packmil_ads", "mil_fc", "torchmil_abmil"]
)
def test_import_convert_and_predict_give_the_authors_probabilities(name, tmp_path):
    known, (state, bag, logits) = FILES[name], read(name)
    with h5py.File(tmp_path / "slide.h5", "w") as file:  # as TRIDENT writes it
        features = file.create_dataset("features", data=bag.numpy())
        features.attrs["encoder"] = "theirs"
        steps = np.arange(len(bag))
        coords = file.create_dataset("coords", data=np.stack([steps, 0 * steps], 1) * 256)
        coords.attrs.update({"patch_size": 256, "patch_size_level0": 256, "level0_magnification": 20,
                             "target_magnification": 20, "overlap": 0})  # fmt: skip
    import_file(tmp_path / "slide.h5", tmp_path / "job", ImportOptions(slide_mpp=0.5))
    (stored,) = (tmp_path / "job").rglob("slide.h5")
    spec = read_spec(stored)
    torch.save({"model": state}, tmp_path / "their.pt")
    classes = [f"c{number}" for number in range(max(2, len(logits)))]
    arguments = {"classes": classes, "outputs": known.outputs, "options": known.options}
    convert_checkpoint(tmp_path / "their.pt", tmp_path / "out", features=spec, **arguments)
    predict([tmp_path / "out"], find_bags(stored.parent), tmp_path / "predictions.csv")
    with (tmp_path / "predictions.csv").open() as file:
        (row,) = csv.DictReader(file)
    several = known.outputs == "softmax" and len(logits) > 1
    wanted = logits.softmax(0) if several else logits.sigmoid()
    found = [float(row[f"prob_{name}"]) for name in (classes if len(logits) > 1 else classes[1:])]
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("name", ["clam_sb_big_no_gate", "clam_mb", "acmil_ga", "transmil"])
def test_one_output_may_be_a_hazard(name, index, tmp_path):
    state, bag, logits = read(name)
    card, model = convert(state, tmp_path, FILES[name], bag, logits, classes=(), outputs=f"risk:{index}")
    assert card.task["kind"] == "cox"
    torch.testing.assert_close(answer(model, bag).logits[0], logits[[index]], rtol=0, atol=1e-9)


def test_an_output_that_reads_all_classes_cannot_stand_alone(tmp_path):
    state, bag, logits = read("dsmil_iclassifier")
    with pytest.raises(CheckpointError, match="cannot give output 1 alone"):
        convert(state, tmp_path, FILES["dsmil_iclassifier"], bag, logits, classes=(), outputs="risk:1")


@pytest.mark.parametrize("name", ["trident_two_heads", "torchmil_abmil_gated_gelu", "acmil_ga_residual"])
def test_what_ifs_of_layers_that_only_public_code_has(name, tmp_path):
    state, bag, logits = read(name)
    model = convert(state, tmp_path, FILES[name], bag, logits)[1].double()
    pack = PackedBags.pack([bag.double()])
    with torch.no_grad():
        form = model.readout(pack, model(pack))
    without = [answer(model, torch.cat([bag[:row], bag[row + 1 :]])).logits[0] - logits for row in range(len(bag))]
    torch.testing.assert_close(torch.from_numpy(form.leave_one_out()), torch.stack(without), rtol=0, atol=1e-9)


def test_merged_tokens_at_inference_are_refused(tmp_path):
    state, bag, logits = read("mhim_merge_test")
    known = FILES["mhim_attn"]
    with pytest.raises(CheckpointError, match="merged tokens at inference"):
        convert(state, tmp_path, known, bag, logits, options=known.options | {"merge_test": "true"})


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({}, "--outputs softmax .*sigmoid .*risk:INDEX"),
        ({"outputs": "risk"}, "say which is the risk: --outputs risk:0, risk:1"),
        ({"outputs": "risk:7"}, "say which is the risk"),
        ({"outputs": "risk:1", "classes": ["a", "b", "c"]}, "a risk has no classes"),
        ({"outputs": "gelu"}, "is not softmax, sigmoid, risk"),
        ({"task": "survival"}, "choose classification, binary, multilabel, cox"),
        ({"task": "cox", "outputs": "softmax"}, "contradicts --task cox"),
        ({"outputs": "softmax", "options": {"gated": "false"}}, "has gated True"),
        ({"outputs": "softmax", "options": {"colour": "red"}}, "named 'colour'"),
        ({"outputs": "softmax"}, "name 3 classes, not 0"),
    ],
)
def test_what_is_said_must_fit(said, message, tmp_path):
    state, bag, logits = read("acmil_ga" if said.get("options", {}).get("gated") is None else "millab_abmil")
    with pytest.raises(CheckpointError, match=message):
        convert(state, tmp_path, FILES["acmil_ga"], bag, logits, **{"classes": (), "outputs": None} | said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model", "net", "model.", "net.", "_orig_mod.",
                                     "module.", "model.module._orig_mod."])  # fmt: skip
def test_wrappers_are_taken_off(wrapper, tmp_path):
    state, bag, _ = read("millab_abmil")
    wrapped = {f"{wrapper}{name}": value for name, value in state.items()} if "." in wrapper else {wrapper: state}
    torch.save(wrapped, tmp_path / "their.pt")
    found, questions = recognise(read_tensors(tmp_path / "their.pt"), tmp_path / "their.pt")
    assert (found.aggregator.name, found.dim, questions) == ("abmil", bag.shape[1], [])


DAMAGES = {
    "removed": lambda state, name, _: state.pop(name),
    "renamed": lambda state, name, _: state.update({f"{name}x": state.pop(name)}),
    "flattened": lambda state, name, _: state.update({name: state[name].flatten()}),
    "longer": lambda state, name, _: state.update({name: torch.cat([state[name].reshape(-1, 1)] * 2)}),
    "empty": lambda state, name, _: state.update({name: torch.zeros(0, 3)}),
    "a number": lambda state, name, _: state.update({name: torch.tensor(1.0)}),
    "whole numbers": lambda state, name, _: state.update({name: state[name].to(torch.int64)}),
    "half": lambda state, name, _: state.update({name: state[name].half()}),
    "complex": lambda state, name, _: state.update({name: state[name].to(torch.complex64)}),
    "not a number": lambda state, name, _: state.update({name: state[name] * float("nan")}),
    "larger than the file": lambda state, name, _: state.update({name: torch.zeros(1).expand(10**5, 10**6)}),
    "besides": lambda state, name, _: state.update({f"{name}.0": torch.zeros(2, 2)}),
    "no tensor": lambda state, name, _: state.update({name: "text"}),
    "truncated": lambda state, name, _: None,
    "flipped": lambda state, name, _: None,
}


def damaged(damage, path, chance):
    """Write one of the authors' files with one fault of this kind, and return its name and its answer."""
    name = chance.choice(sorted(FILES))
    state, _, logits = read(name)
    DAMAGES[damage](state, chance.choice(sorted(state)), chance)
    torch.save(state, path, _use_new_zipfile_serialization=chance.random() < 0.7)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])
    if damage == "flipped":
        content = bytearray(path.read_bytes())
        for _ in range(chance.choice((1, 8, 64))):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
    return name, logits


def read_or_refused(path, folder, known, logits):
    """Recognise and convert a file; say whether it was refused. Any error but a `CheckpointError` is a fault."""
    try:
        found, _ = recognise(read_tensors(path), path, known.options)
        spec = FeatureSpec(encoder="theirs", dim=found.dim)
        said = {"classes": [f"c{k}" for k in range(max(2, len(logits)))], "outputs": known.outputs}
        convert_checkpoint(path, folder / "out", features=spec, options=known.options, **said)
    except CheckpointError:
        return True
    return False


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_read_or_refused(damage, tmp_path):
    chance = random.Random(damage)
    for _ in range(20):
        name, logits = damaged(damage, tmp_path / "their.pt", chance)
        read_or_refused(tmp_path / "their.pt", tmp_path, FILES[name], logits)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_4_000_damaged_files_are_read_or_refused(damage, tmp_path):
    chance, refused = random.Random(f"many {damage}"), 0
    each = -(-4000 // len(DAMAGES))
    for _ in range(each):
        name, logits = damaged(damage, tmp_path / "their.pt", chance)
        refused += read_or_refused(tmp_path / "their.pt", tmp_path, FILES[name], logits)
    assert (refused == 0) == (damage == "half")  # weights in half precision are whole


@pytest.mark.parametrize("damage", ["not a number", "larger than the file", "besides", "no tensor", "truncated"])
def test_damage_that_shows_is_refused(damage, tmp_path):
    chance, path = random.Random(damage), tmp_path / "their.pt"
    state, _, _ = read("clam_sb")
    DAMAGES[damage](state, "classifiers.weight", chance)
    torch.save(state, path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(CheckpointError):
        recognise(read_tensors(path), path)
