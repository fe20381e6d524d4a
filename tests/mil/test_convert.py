import pytest
import torch

from eosin.errors import CheckpointError
from eosin.features.bag import FeatureSpec
from eosin.mil.bags import PackedBags
from eosin.mil.checkpoint import load_model
from eosin.mil.convert import _HIPPO, _MILLAB, _PACKMIL, convert_checkpoint, read_tensors, recognise


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


@pytest.mark.parametrize("names", [_MILLAB, _HIPPO, _PACKMIL], ids=["millab", "hippo", "packmil"])
def test_gated_attention_of_other_tools(names, tmp_path):
    shapes = {
        "embed.0": (6, 5),
        "attention.V": (4, 6),
        "attention.U": (4, 6),
        "attention.w": (1, 4),
        "classifier": (3, 6),
    }
    old = {}
    for name, new in names.items():
        old |= {f"{name}.weight": torch.randn(shapes[new]), f"{name}.bias": torch.randn(shapes[new][0])}
    torch.save({"model": {f"module.{name}": tensor for name, tensor in old.items()}}, tmp_path / "their.pt")
    convert_checkpoint(tmp_path / "their.pt", tmp_path / "out", features=spec(5), classes=["a", "b", "c"])
    model, _ = load_model(tmp_path / "out")
    bag = torch.randn(7, 5)
    by_new = {new: name for name, new in names.items()}
    activation = torch.nn.functional.gelu if names is _PACKMIL else torch.relu
    h = activation(linear(bag, old, by_new["embed.0"]))
    scores = gated(h, old, *(by_new[f"attention.{x}"] for x in "VUw"))
    logits = linear(scores.softmax(0).T @ h, old, by_new["classifier"])
    torch.testing.assert_close(model(PackedBags.pack([bag])).logits, logits, rtol=1e-4, atol=1e-5)


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


def test_what_does_not_fit_is_refused(shared, tmp_path):
    folder = shared / "data/checkpoints"
    clam = folder / "clam_demo_s_0_checkpoint.pt"
    for path, dim, classes, message in [
        (folder / "dsmil_init.pth", 512, "ab", r"lacks the tensor i_classifier\.fc\.weight"),
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
    with pytest.raises(CheckpointError, match="of no network that is known"):
        recognise({"w": torch.zeros(1)}, clam)


class Payload:
    def __reduce__(self):
        return print, ("ran",)


def test_a_file_that_would_run_code_is_refused(tmp_path, capsys):
    torch.save({"model": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        read_tensors(tmp_path / "evil.pt")
    assert "ran" not in capsys.readouterr().out
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(CheckpointError):
        read_tensors(tmp_path / "text.pt")
    torch.save({"model": 3}, tmp_path / "numbers.pt")
    with pytest.raises(CheckpointError, match="no dictionary of tensors"):
        read_tensors(tmp_path / "numbers.pt")
