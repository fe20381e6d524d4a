import pytest
import torch
from torch.nn import functional

from eosin.errors import ConfigError
from eosin.mil.bags import PackedBags
from eosin.mil.methods.clam import ClamInstance, ClamMultiBranch, ClamSingleBranch
from eosin.mil.slots import AttentionOutput
from eosin.mil.tasks import Classification, Task

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


def test_outputs_and_gradients_are_the_authors(golden, same):
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
        "bag_loss": bag_loss,
        "instance_loss": load_term(golden, model)(output, bags, target),
        "instance_loss_subtyping": instance_loss,
        "total_loss": total,
        "grad.x": x.grad,
        "grad.instance_classifier.weight": term.weight.grad,
        "grad.instance_classifier.bias": term.bias.grad,
    }
    found |= {f"grad.{name.replace('embed.0.', 'embed.')}": value.grad for name, value in model.named_parameters()}
    same(found, golden)


def plain_term(term, instances, scores, bags, target):
    """One bag, class and instance at a time."""
    losses = []
    for bag, h, s in zip(target, instances.split(bags.lengths), scores.split(bags.lengths), strict=True):
        k = min(term.k, len(h) // 2)
        total = torch.zeros(())
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
    model = kind(5, 3, width=6, hidden=4).eval()
    term = ClamInstance(model, TASK, k=3, subtyping=subtyping, loss=loss, tau=0.7, margin=1.3)
    bags = PackedBags.pack([torch.randn(n, 5) for n in (9, 1, 4, 0, 7)])
    target = torch.tensor([0, 1, 2, 2, 1])
    output = model(bags)
    found = term(output, bags, target)
    torch.testing.assert_close(found, plain_term(term, output.instances, output.scores, bags, target))
    found.backward()
    assert all(parameter.grad.any() for parameter in model.embed.parameters())
    assert all(parameter.grad is None for parameter in model.attention.parameters())


def test_each_class_has_its_branch_and_layer():
    torch.manual_seed(0)
    model = ClamMultiBranch(5, 3, width=6, hidden=4).eval()
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
    with pytest.raises(ConfigError, match="at least 1"):
        ClamInstance(model, TASK, k=0)
