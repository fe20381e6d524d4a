import contextlib
import os
from argparse import Namespace
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch

from eosin.errors import CheckpointError
from eosin.features._bag import FeatureSpec
from eosin.mil._checkpoint import load_model
from eosin.mil._convert import convert_checkpoint, read_tensors, recognise
from eosin.mil.bags import PackedBags


def spec(dim):
    return FeatureSpec(encoder="theirs", dim=dim)


def linear(z, tensors, name):
    return z @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def gated(h, tensors, v, u, w):
    return linear(torch.tanh(linear(h, tensors, v)) * torch.sigmoid(linear(h, tensors, u)), tensors, w)


def test_a_real_clam_says_what_its_tensors_say(shared, tmp_path):
    path = shared / "data/checkpoints/clam_demo_s_0_checkpoint.pt"
    card = convert_checkpoint(path, tmp_path, features=spec(1024), classes=["normal", "tumour"])
    assert card.recipe.aggregator.name == "clam_sb"
    assert card.training["converted_from"] == "CLAM"
    model, _ = load_model(tmp_path)
    old, bag = read_tensors(path), torch.randn(20, 1024)
    h = torch.relu(linear(bag, old, "attention_net.0"))
    scores = gated(h, old, *(f"attention_net.3.attention_{x}" for x in ("a.0", "b.0", "c")))
    logits = linear(scores.softmax(0).T @ h, old, "classifiers")
    output = model(PackedBags.pack([bag]))
    torch.testing.assert_close(output.logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.scores, scores, rtol=1e-4, atol=1e-5)


def test_a_real_dsmil_says_what_its_tensors_say(shared, tmp_path):
    path = shared / "data/checkpoints/dsmil_c16_aggregator.pth"
    card = convert_checkpoint(path, tmp_path, features=spec(512), classes=["normal", "tumour"])
    assert card.load_task().kind == "binary"
    model, _ = load_model(tmp_path)
    old, bag = read_tensors(path), torch.randn(20, 512)
    instance = linear(bag, old, "i_classifier.fc.0")
    query = torch.tanh(linear(torch.relu(linear(bag, old, "b_classifier.q.0")), old, "b_classifier.q.2"))
    attention = (query @ query[instance.argmax()] / 128**0.5).softmax(0)
    logit = (attention @ bag) @ old["b_classifier.fcc.weight"][0, 0] + old["b_classifier.fcc.bias"]
    torch.testing.assert_close(model(PackedBags.pack([bag])).logits[0], logit, rtol=1e-4, atol=1e-5)


def test_clam_with_a_branch_per_class(tmp_path):
    old = {}
    shapes = {
        "attention_net.0": (6, 5),
        "attention_net.2.attention_a.0": (4, 6),
        "attention_net.2.attention_b.0": (4, 6),
    }
    shapes |= {"attention_net.2.attention_c": (3, 4)} | {f"classifiers.{k}": (1, 6) for k in range(3)}
    for name, shape in shapes.items():
        old |= {f"{name}.weight": torch.randn(shape), f"{name}.bias": torch.randn(shape[0])}
    torch.save(old, tmp_path / "their.pt")
    card = convert_checkpoint(tmp_path / "their.pt", tmp_path / "out", features=spec(5), classes=["a", "b", "c"])
    assert card.recipe.aggregator.name == "clam_mb"
    model, _ = load_model(tmp_path / "out")
    bag = torch.randn(7, 5)
    h = torch.relu(linear(bag, old, "attention_net.0"))
    a = gated(h, old, *(f"attention_net.2.attention_{x}" for x in ("a.0", "b.0", "c"))).softmax(0)
    logits = torch.cat([linear(a[:, k] @ h, old, f"classifiers.{k}") for k in range(3)])
    torch.testing.assert_close(model(PackedBags.pack([bag])).logits[0], logits, rtol=1e-4, atol=1e-5)


def convert(old, folder, *, dim, classes="abc", wrap=True, outputs="softmax", **options):
    torch.save({"model": old, "epoch": 3} if wrap else old, folder / "their.pt")
    card = convert_checkpoint(
        folder / "their.pt", folder / "out", features=spec(dim), classes=list(classes), outputs=outputs, **options
    )
    return card, load_model(folder / "out")[0]


def linears(shapes):
    return {
        f"{name}.{part}": torch.randn(shape if part == "weight" else shape[:1])
        for name, shape in shapes.items()
        for part in ("weight", "bias")
    }


@pytest.mark.parametrize("last", [2, 3])
def test_clam_without_a_gate(last, tmp_path):
    shapes = {"attention_net.0": (6, 5), "attention_net.3.module.0": (4, 6), f"attention_net.3.module.{last}": (1, 4)}
    old = linears(shapes | {"classifiers": (3, 6)})
    card, model = convert(old, tmp_path, dim=5, wrap=False)
    assert card.recipe.aggregator.options["gated"] is False
    bag = torch.randn(7, 5)
    h = torch.relu(linear(bag, old, "attention_net.0"))
    hidden = torch.tanh(linear(h, old, "attention_net.3.module.0"))
    scores = linear(hidden, old, f"attention_net.3.module.{last}")
    logits = linear(scores.softmax(0).T @ h, old, "classifiers")
    torch.testing.assert_close(model(PackedBags.pack([bag])).logits, logits, rtol=1e-4, atol=1e-5)


def test_acmil_says_what_the_authors_code_says(shared, tmp_path):
    with np.load(shared / "golden" / "acmil_ga.npz") as file:
        golden = {name: torch.from_numpy(file[name]).float() for name in file.files}
    names = {"attention.V": "attention.attention_V.0", "attention.U": "attention.attention_U.0",
             "attention.w": "attention.attention_weights", "slide_classifier": "Slide_classifier.fc"}  # fmt: skip
    old = {f"{new}.{part}": golden[f"{name}.{part}"] for name, new in names.items() for part in ("weight", "bias")}
    old["dimreduction.fc1.weight"] = golden["embed.weight"]
    for branch in range(4):
        for part in ("weight", "bias"):
            old[f"classifier.{branch}.fc.{part}"] = golden[f"branch_classifier.{part}"][branch]
    card, model = convert(old, tmp_path, dim=40)
    assert (card.recipe.aggregator.name, card.training["converted_from"]) == ("acmil", "ACMIL")
    output = model(PackedBags.pack([golden["x"]]))
    torch.testing.assert_close(output.logits, golden["slide_logits"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.branch_logits[0], golden["branch_logits"], rtol=1e-4, atol=1e-5)


def test_acmil_with_heads_equals_every_key_and_value_written_out(tmp_path):
    width, branches, heads = 16, 3, 8
    shapes = {"Slide_classifier.fc": (3, width), "bag_attention.v_proj": (width, width),
              "bag_attention.out_proj": (width, width), "bag_attention.layer_norm": (width,)}  # fmt: skip
    for branch in range(branches):
        shapes[f"classifier.{branch}.fc"] = (3, width)
        shapes[f"sub_attention.{branch}.layer_norm"] = (width,)
        shapes |= {f"sub_attention.{branch}.{part}_proj": (width, width) for part in ("q", "k", "v", "out")}
    old = linears(shapes) | {"dimreduction.fc1.weight": torch.randn(width, 5), "q": torch.randn(1, branches, width)}
    card, model = convert(old, tmp_path, dim=5)
    assert card.recipe.aggregator.name == "acmil_mha"
    bag = torch.randn(9, 5)
    h = torch.relu(bag @ old["dimreduction.fc1.weight"].T)

    def by_head(rows):
        return rows.view(len(rows), heads, -1).transpose(0, 1)

    def read(weights, part):
        pooled = (weights @ by_head(linear(h, old, f"{part}.v_proj"))).transpose(0, 1).flatten(1)
        norm = (old[f"{part}.layer_norm.weight"], old[f"{part}.layer_norm.bias"])
        return torch.nn.functional.layer_norm(linear(pooled, old, f"{part}.out_proj"), (width,), *norm, eps=1e-6)

    weights, logits = [], []
    for branch in range(branches):
        part = f"sub_attention.{branch}"
        query, key = (
            by_head(linear(x, old, f"{part}.{y}")) for x, y in ((old["q"][0, [branch]], "q_proj"), (h, "k_proj"))
        )
        weights.append((query @ key.mT / (width // heads) ** 0.5).softmax(-1))
        logits.append(linear(read(weights[-1], part), old, f"classifier.{branch}.fc"))
    whole = linear(read(torch.stack(weights).mean(0), "bag_attention"), old, "Slide_classifier.fc")
    output = model(PackedBags.pack([bag]))
    torch.testing.assert_close(output.branch_logits[0], torch.cat(logits), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.logits, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_transmil_says_what_the_authors_code_says(shared, tmp_path, prefix):
    with np.load(shared / "golden" / "transmil.npz") as file:
        golden = {name: torch.from_numpy(file[name]).float() for name in file.files}
    names = {"embed.": "_fc1.0.", "classifier.": "_fc2.", "to_out.": "to_out.0.", "ppeg.conv7.": "pos_layer.proj.",
             "ppeg.conv5.": "pos_layer.proj1.", "ppeg.conv3.": "pos_layer.proj2."}  # fmt: skip
    old = {}
    for name, value in golden.items():
        if name.split(".")[0] in ("embed", "cls_token", "ppeg", "layer1", "layer2", "norm", "classifier"):
            for ours, theirs in names.items():
                name = name.replace(ours, theirs)
            old[prefix + name] = value
    card, model = convert(old, tmp_path, dim=24, classes="ab", wrap=False)
    assert card.recipe.aggregator.options.items() >= {"width": 16, "heads": 8}.items()
    output = model(PackedBags.pack([golden["x"]]))
    torch.testing.assert_close(output.logits, golden["logits"], rtol=1e-3, atol=1e-4)


def test_a_real_start_for_training_loads_and_predicts(shared, tmp_path):
    path = shared / "data/checkpoints/dsmil_init.pth"
    card = convert_checkpoint(path, tmp_path, features=spec(512), classes=["normal", "tumour"], partial=True)
    assert card.training["untrained"] == "classifier, instance_classifier"
    model, _ = load_model(tmp_path)
    old, bag = read_tensors(path), torch.randn(20, 512)
    new = model.state_dict()
    instance = linear(bag, new, "instance_classifier")
    query = linear(bag, old, "b_classifier.q")
    value = torch.relu(linear(bag, old, "b_classifier.v.1"))
    attention = (query @ query[instance.argmax(0)].T / 128**0.5).softmax(0)  # (n, K)
    expected = new["classifier.weight"] @ (attention.T @ value).flatten() + new["classifier.bias"]
    output = model(PackedBags.pack([bag]))
    torch.testing.assert_close(output.logits[0], expected, rtol=1e-3, atol=1e-4)


def test_what_does_not_fit_is_refused(shared, tmp_path):
    folder = shared / "data/checkpoints"
    clam = folder / "clam_demo_s_0_checkpoint.pt"
    for path, dim, classes, message in [
        (folder / "dsmil_init.pth", 512, "ab", "lacks the layers classifier, instance_classifier; pass --partial"),
        (clam, 512, "ab", "trained on features of width 1024, not 512"),
        (clam, 1024, "abc", "has 2 outputs; name 2 classes, not 3"),
        (tmp_path / "none.pt", 5, "ab", "no such file"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            convert_checkpoint(path, tmp_path / "out", features=spec(dim), classes=list(classes))
    assert not (tmp_path / "out").exists()
    tensors = read_tensors(clam)
    with pytest.raises(CheckpointError, match="nothing explains surprise"):
        recognise(tensors | {"surprise": torch.zeros(1)}, clam)
    with pytest.raises(CheckpointError, match="does not match any network"):
        recognise({"w": torch.zeros(1)}, clam)


class Payload:
    """Runs a function when it is unpickled."""

    def __init__(self, function, argument):
        self.parts = function, (argument,)

    def __reduce__(self):
        return self.parts


class Setting(Enum):
    """A setting as training scripts keep it beside the weights."""

    VIT = "vit"


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", [print, os.system, eval])
def test_nothing_in_a_file_runs(function, zipped, tmp_path, capfd):
    payload = Payload(function, "print('ran')" if function is eval else "echo ran")
    for content in ({"model": payload}, {"state_dict": {"fc.weight": torch.zeros(2, 3)}, "config": payload}):
        torch.save(content, tmp_path / "evil.pt", _use_new_zipfile_serialization=zipped)
        with contextlib.suppress(CheckpointError):
            assert set(read_tensors(tmp_path / "evil.pt")) == {"fc.weight"}
    assert "ran" not in capfd.readouterr().out


def test_settings_of_any_class_beside_the_weights_are_not_looked_at(tmp_path):
    weights = {"model.fc.weight": torch.ones(2, 3), "model.fc.bias": torch.zeros(2)}
    settings = {"name": Setting.VIT, "where": Path("/data"), "args": Namespace(lr=0.1), "counts": np.ones(3)}
    torch.save({"state_dict": weights, "hyper_parameters": settings}, tmp_path / "stamp.ckpt")
    assert set(read_tensors(tmp_path / "stamp.ckpt")) == {"fc.weight", "fc.bias"}


def test_a_file_without_tensors_is_refused(tmp_path):
    torch.save({"model": Payload(print, "ran")}, tmp_path / "evil.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        read_tensors(tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(CheckpointError):
        read_tensors(tmp_path / "text.pt")
    torch.save({"model": 3}, tmp_path / "numbers.pt")
    with pytest.raises(CheckpointError, match="is not a dictionary of tensors"):
        read_tensors(tmp_path / "numbers.pt")
