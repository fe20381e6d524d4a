import pytest
import torch
from torch.nn import functional

from eosin.errors import ConfigError
from eosin.mil.bags import PackedBags
from eosin.mil.methods.clam import ClamInstance, ClamMultiBranch, ClamSingleBranch
from eosin.mil.slots import AttentionOutput
from eosin.mil.task import Task
from eosin.mil.tasks._classification import Classification

TASK = Classification(classes=("a", "b", "c"))


def load(golden):
    model = ClamSingleBranch(40, 3, width=24, hidden=16, dropout=0, gate_dropout=0).double()
    names = [name for name in golden if name.split(".")[0] in ("embed", "attention", "classifier") and "." in name]
    model.load_state_dict({name.replace("embed.", "embed.0."): golden[name] for name in names})
    return model


def load_term(golden, model, **options):
    term = ClamInstance(model, TASK, k=int(golden["k_sample"]), **options).double()
    with torch.no_grad():
        term.weight.copy_(golden["instance_classifier.weight"])
        term.bias.copy_(golden["instance_classifier.bias"])
    return term


def predictions(term, output, label, *, subtyping):
    """What the instance heads say of the instances that are labelled, class after class, and their labels."""
    order = output.scores[:, 0].argsort(descending=True)
    top, low = order[: term.k], order.flip(0)[: term.k]
    said, labels = [], []
    for c in range(len(term.weight)):
        rows = torch.cat([top, low]) if c == label else top
        if c == label or subtyping:
            said.append((output.instances[rows] @ term.weight[c].T + term.bias[c]).argmax(1))
            labels.append(torch.tensor([1] * term.k + [0] * term.k if c == label else [0] * term.k))
    return torch.cat(said), torch.cat(labels)


def test_outputs_and_gradients_are_the_authors(golden, same, complete):
    golden = golden("clam_sb")
    model = load(golden)
    term = load_term(golden, model, subtyping=True)
    x = golden["x"].requires_grad_()
    bags = PackedBags.pack([x])
    target = golden["label"]
    output = model(bags)
    bag_loss, instance_loss = TASK.loss(output.logits, target), term(output, bags, target)
    total = 0.7 * bag_loss + 0.3 * instance_loss
    total.backward()
    found = {
        "attention_logits": output.scores.T,
        "attention": output.scores.softmax(0).T,
        "bag_features": output.embedding,
        "logits": output.logits,
        "logits_official": output.logits,
        "prob": output.logits.softmax(1),
        "y_hat": output.logits.argmax(1, keepdim=True),
        "bag_loss": bag_loss,
        "instance_loss": load_term(golden, model)(output, bags, target),
        "instance_loss_subtyping": instance_loss,
        "total_loss": total,
        "grad.x": x.grad,
        "grad.instance_classifier.weight": term.weight.grad,
        "grad.instance_classifier.bias": term.bias.grad,
    }
    weights = {name.replace("embed.0.", "embed."): value for name, value in model.named_parameters()}
    found |= {f"grad.{name}": value.grad for name, value in weights.items()}
    for suffix, subtyping in (("", False), ("_subtyping", True)):
        said, labels = predictions(term, output, int(target), subtyping=subtyping)
        found |= {f"instance_preds{suffix}": said, f"instance_targets{suffix}": labels}
    same(found, golden)
    heads = ("instance_classifier.weight", "instance_classifier.bias")
    complete(golden, {*found, *weights, *heads, "x", "label", "k_sample"})


def plain_term(term, instances, scores, bags, target):
    """One bag, class and instance at a time."""
    losses = []
    for bag, h, s in zip(target, instances.split(bags.lengths), scores.split(bags.lengths), strict=True):
        k = min(term.k, len(h) // 2)
        total = torch.zeros((), dtype=h.dtype)
        for c in range(3):
            column = s[:, min(c, s.shape[1] - 1)]
            order = column.argsort(descending=True, stable=True)
            logits = h @ term.weight[c].T + term.bias[c]
            wanted = [(i, 1) for i in order[:k]] + [(i, 0) for i in column.argsort(stable=True)[:k]]
            if c != bag:
                wanted = [(i, 0) for i in order[:k]] if term.subtyping else []
            parts = [instance_loss(term, logits[i], y) for i, y in wanted]
            total = total + (torch.stack(parts).mean() if parts else 0)
        losses.append(total / (3 if term.subtyping else 1))
    return torch.stack(losses).mean()


def instance_loss(term, logits, label):
    if term.loss == "cross_entropy":
        return functional.cross_entropy(logits, torch.tensor(label))
    other = logits[1 - label] + term.margin - logits[label]
    return term.tau * torch.log(1 + torch.exp(other / term.tau))


@pytest.mark.parametrize("loss", ["cross_entropy", "svm"])
@pytest.mark.parametrize("subtyping", [False, True])
@pytest.mark.parametrize("kind", [ClamSingleBranch, ClamMultiBranch])
def test_the_term_of_a_pack_is_the_mean_over_its_bags(kind, subtyping, loss):
    torch.manual_seed(0)
    model = kind(5, 3, width=6, hidden=4).double().eval()
    term = ClamInstance(model, TASK, k=3, subtyping=subtyping, loss=loss, tau=0.7, margin=1.3).double()
    bags = PackedBags.pack([torch.randn(n, 5, dtype=torch.float64) for n in (9, 1, 4, 0, 7)])
    target = torch.tensor([0, 1, 2, 2, 1])
    output = model(bags)
    found = term(output, bags, target)
    by_hand = plain_term(term, output.instances, output.scores, bags, target)
    torch.testing.assert_close(found, by_hand, rtol=1e-12, atol=1e-12)
    found.backward()
    assert all(parameter.grad.any() for parameter in model.embed.parameters())
    assert all(parameter.grad is None for parameter in model.attention.parameters())


@pytest.mark.parametrize("gated", [False, True])
def test_each_class_has_its_branch_and_layer(gated):
    torch.manual_seed(0)
    model = ClamMultiBranch(5, 3, width=6, hidden=4, gated=gated).eval()
    assert (model.attention.U is None) == (not gated)
    bag = torch.randn(8, 5)
    h = model.embed(bag)
    pooled = model.attention(h).softmax(0).T @ h
    by_hand = torch.stack([model.classifier(pooled[c])[c] for c in range(3)])
    torch.testing.assert_close(model(PackedBags.pack([bag])).logits[0], by_hand)


def test_other_attention_ranks_by_its_mean():
    model = ClamSingleBranch(5, 3, width=6, hidden=4)
    term = ClamInstance(model, TASK, k=1)
    scores = torch.tensor([[0.0, 5.0], [4.0, 0.0], [4.1, 4.9]])  # the last has the largest mean weight
    output = AttentionOutput(torch.zeros(1, 3), torch.zeros(1, 6), scores, torch.eye(3, 6))
    bags = PackedBags.pack([torch.zeros(3, 5)])
    one = AttentionOutput(output.logits, output.embedding, scores.softmax(0).mean(1, keepdim=True), output.instances)
    assert scores.softmax(0).mean(1).argmax() == 2
    torch.testing.assert_close(term(output, bags, torch.tensor([0])), term(one, bags, torch.tensor([0])))


def test_what_makes_no_sense_is_refused():
    class Years(Task):
        kind: str = "years"

    model = ClamSingleBranch(5, 1, width=6, hidden=4)
    with pytest.raises(ConfigError, match="task years has none"):
        ClamInstance(model, Years())
    with pytest.raises(ConfigError, match=r"k: .* must be at least 1"):
        ClamInstance(model, TASK, k=0)
    with pytest.raises(ConfigError, match=r"tau: .* must be more than 0"):
        ClamInstance(model, TASK, loss="svm", tau=0.0)
