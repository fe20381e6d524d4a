import pytest
import torch
from torch import nn
from torch.nn import functional

from eosin.errors import ConfigError
from eosin.mil.bags import PackedBags
from eosin.mil.methods.acmil import (
    Acmil,
    AcmilBranches,
    AcmilDiversity,
    AcmilMultiHead,
    TopMasking,
    default_width,
)
from eosin.mil.tasks._classification import Classification

TASK = Classification(classes=("a", "b", "c"))
LENGTHS = (40, 3, 0, 1, 12)


def load(golden):
    model = Acmil(40, 3, width=24, hidden=16, branches=4, mask_p=0).double()
    ours = {"embed": "embed.0", "slide_classifier": "classifier"}
    parts = ("embed", "attention", "slide_classifier", "branch_classifier")
    names = {name: name for name in golden if name.split(".")[0] in parts and "." in name}
    files = {name.replace(part := name.split(".")[0], ours.get(part, part), 1): name for name in names}
    model.load_state_dict({name: golden[file] for name, file in files.items()})
    return model, files


def objective(model, x, label):
    bags = PackedBags.pack([x])
    output = model(bags)
    parts = {
        "slide_loss": TASK.loss(output.logits, label),
        "branch_loss": AcmilBranches(model, TASK)(output, bags, label),
        "diversity_loss": AcmilDiversity(model, TASK)(output, bags, label),
    }
    found = {
        "attention": output.scores.softmax(0).T,
        "branch_logits": output.branch_logits[0],
        "slide_logits": output.logits,
        "total_loss": sum(parts.values()),
    }
    return output, found | parts


def test_outputs_and_gradients_are_the_authors(golden, same, complete):
    golden = golden("acmil_ga")
    model, files = load(golden)
    x = golden["x"].requires_grad_()
    output, found = objective(model, x, golden["label"])
    found["total_loss"].backward()
    gradients = {f"grad.{files[name]}": parameter.grad for name, parameter in model.named_parameters()}
    found |= gradients | {"attention_logits": output.scores.T, "grad.x": x.grad}
    top = output.scores.topk(int(golden["K"]), dim=0).indices.T
    same(found | {"stkim.topk_index": top}, golden)
    masked = [name for name in golden if name.startswith("stkim.")]  # see the next test
    complete(golden, {*found, *files.values(), *masked, "x", "label", "K", "p"})


def test_hidden_instances_are_left_out_as_the_authors_do(golden, same, complete, monkeypatch):
    golden = golden("acmil_ga")
    model, _ = load(golden)
    model.masking.p = float(golden["p"])
    monkeypatch.setattr(TopMasking, "hidden", lambda *_: ~golden["stkim.keep_mask"].T)
    _, found = objective(model.train(), golden["x"], golden["label"])
    found = {f"stkim.{name}": value for name, value in found.items()}
    same(found, golden)
    read = {"stkim.keep_mask", "stkim.topk_index"}
    complete({name: golden[name] for name in golden if name.startswith("stkim.")}, {*found, *read})
    hidden = ~golden["stkim.keep_mask"]
    assert (hidden.sum(1) == int(float(golden["K"]) * float(golden["p"]))).all()
    assert hidden.gather(1, golden["stkim.topk_index"]).sum() == hidden.sum()


@pytest.mark.parametrize("sampling", ["fixed", "bernoulli"])
def test_what_is_hidden_lies_in_the_top_and_never_is_the_whole_bag(sampling):
    torch.manual_seed(0)
    bags = PackedBags.pack([torch.randn(n, 2) for n in LENGTHS])
    scores = torch.randn(bags.n_instances, 3)
    masking = TopMasking(6, 0.5, sampling)
    drawn = torch.stack([masking.hidden(scores, bags) for _ in range(300)])  # (300, N, 3)
    counts = torch.stack([part.sum(1) for part in drawn.split(LENGTHS, dim=1)], 1)  # (300, B, 3)
    for hidden, bag in zip(drawn.split(LENGTHS, dim=1), scores.split(LENGTHS), strict=True):
        top = bag.argsort(0, descending=True).argsort(0) < 6
        assert not (hidden & ~top).any()
    if sampling == "fixed":
        assert (counts == torch.tensor([3, 1, 0, 0, 3])[:, None]).all()
        often = drawn[:, :40].float().mean(0)
        assert often[often > 0].sub(0.5).abs().max() < 0.15
        assert (drawn[:, :40, 0] != drawn[:, :40, 1]).any(1).float().mean() > 0.9  # branches are drawn apart
    else:
        assert abs(counts[:, 0].float().mean() - 3) < 0.2
        assert counts[:, 0].float().std() > 1
    full = TopMasking(10, 1.0, sampling).hidden(scores, bags)
    assert [int(part[:, 0].sum()) for part in full.split(LENGTHS)] == [10, 2, 0, 0, 10]


def test_the_bag_is_the_mean_of_its_branches():
    torch.manual_seed(0)
    model = Acmil(5, 3, width=8, hidden=4, branches=3).double().eval()
    bag = torch.randn(9, 5, dtype=torch.float64)
    h = functional.relu(bag @ model.embed[0].weight.T)
    weights = model.attention(h).softmax(0).T  # (M, n)
    output = model(PackedBags.pack([bag]))
    torch.testing.assert_close(output.logits[0], model.classifier(weights.mean(0) @ h), rtol=1e-12, atol=1e-12)
    rows = [model.branch_classifier.weight[i] @ (weights[i] @ h) + model.branch_classifier.bias[i] for i in range(3)]
    torch.testing.assert_close(output.branch_logits[0], torch.stack(rows), rtol=1e-12, atol=1e-12)


def test_nothing_is_hidden_when_not_training():
    masking = TopMasking(6, 0.5, "fixed").eval()
    scores = torch.randn(5, 2)
    assert masking(scores, PackedBags.pack([torch.zeros(5, 1)])) is scores


class PlainMultiHead(nn.Module):
    """Attention as published: every key and value is projected."""

    def __init__(self, model, branch):
        super().__init__()
        self.model, self.branch = model, branch

    def forward(self, h):
        model, i = self.model, self.branch
        linear = lambda x, part: x @ part.weight[i].T + part.bias[i]  # noqa: E731
        split = lambda x: x.unflatten(-1, (model.heads, -1)).transpose(-2, -3)  # noqa: E731
        query = split(linear(model.queries[i : i + 1], model.query))  # (H, 1, d)
        scores = query @ split(linear(h, model.key)).mT / query.shape[-1] ** 0.5  # (H, 1, n)
        return scores[:, 0].T, self.read(model.read, i, scores.softmax(-1), h)

    def read(self, readout, i, weights, h):
        value = (h @ readout.value.weight[i].T + readout.value.bias[i]).unflatten(-1, (self.model.heads, -1))
        pooled = (weights @ value.transpose(0, 1)).transpose(0, 1).flatten(1)  # (1, E)
        out = pooled @ readout.out.weight[i].T + readout.out.bias[i]
        return functional.layer_norm(out, out.shape[1:], readout.scale[i], readout.shift[i], 1e-6)[0]


def test_folding_the_queries_changes_nothing():
    torch.manual_seed(0)
    model = AcmilMultiHead(5, 3, width=8, heads=2, branches=3).double().eval()
    with torch.no_grad():
        model.queries.normal_()
        model.read.scale.normal_()
        model.read.shift.normal_()
    bags = PackedBags.pack([torch.randn(n, 5, dtype=torch.float64) for n in (7, 2)])
    output = model(bags)
    for number, bag in enumerate(bags.unpack()):
        h = model.embed(bag)
        plain = [PlainMultiHead(model, branch) for branch in range(3)]
        scores, read = zip(*(branch(h) for branch in plain), strict=True)
        torch.testing.assert_close(bags.unpack(output.scores)[number], torch.cat(scores, 1))
        logits = [z @ model.branch_classifier.weight[i].T + model.branch_classifier.bias[i] for i, z in enumerate(read)]
        torch.testing.assert_close(output.branch_logits[number], torch.stack(logits))
        weights = torch.stack(scores).softmax(1).mean(0).T[:, None]  # (H, 1, n)
        bag_row = plain[0].read(model.read_bag, 0, weights, h)
        torch.testing.assert_close(output.embedding[number], bag_row)
        torch.testing.assert_close(output.logits[number], model.classifier(bag_row))


@pytest.mark.parametrize("heads", [1, 2])
def test_diversity_is_the_mean_cosine_of_branches_with_the_same_head(heads):
    torch.manual_seed(0)
    model = AcmilMultiHead(5, 3, width=8, heads=heads, branches=3).eval()
    with torch.no_grad():
        model.queries.normal_()
    bags = PackedBags.pack([torch.randn(n, 5) for n in (7, 2)])
    output = model(bags)
    wanted = []
    for scores in bags.unpack(output.scores):
        weights = scores.softmax(0).T.unflatten(0, (3, heads))  # (M, H, n)
        pairs = [functional.cosine_similarity(weights[i], weights[j], dim=-1) for i in range(3) for j in range(i)]
        wanted.append(torch.stack(pairs).mean())
    torch.testing.assert_close(
        AcmilDiversity(model, TASK)(output, bags, torch.tensor([0, 1])), torch.stack(wanted).mean()
    )


@pytest.mark.parametrize("kind", [Acmil, AcmilMultiHead])
def test_one_branch_and_empty_bags_are_defined(kind):
    torch.manual_seed(0)
    model = kind(5, 3, branches=1)
    bags = PackedBags.pack([torch.randn(n, 5) for n in LENGTHS])
    target = torch.zeros(len(LENGTHS), dtype=torch.int64)
    output = model(bags)
    assert AcmilBranches(model, TASK)(output, bags, target) == 0
    assert AcmilDiversity(model, TASK)(output, bags, target) == 0
    many = kind(5, 3, branches=2)
    output = many(bags)
    loss = TASK.loss(output.logits, target) + AcmilDiversity(many, TASK)(output, bags, target)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in many.parameters() if parameter.grad is not None)


def test_widths_are_the_authors():
    assert [default_width(d) for d in (384, 512, 768, 1024, 1536)] == [128, 256, 384, 512, 768]
    assert default_width(3) == 128


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ConfigError, match="8 heads do not divide the width 20"):
        AcmilMultiHead(5, 3, width=20)
    with pytest.raises(ConfigError, match=r"heads: .* must be at least 1"):
        AcmilMultiHead(5, 3, heads=0)
    with pytest.raises(ConfigError, match=r"branches: .* must be at least 1"):
        Acmil(5, 3, branches=0)
    with pytest.raises(ConfigError, match=r"mask_p: .* must be at most 1"):
        Acmil(5, 3, mask_p=1.5)
