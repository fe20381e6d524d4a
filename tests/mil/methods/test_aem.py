import math

import pytest
import torch
from torch import nn

from eosin.errors import ConfigError
from eosin.mil.bags import PackedBags
from eosin.mil.methods.abmil import Abmil
from eosin.mil.methods.acmil import Acmil
from eosin.mil.methods.aem import AttentionEntropy
from eosin.mil.methods.pooling import MeanPooling
from eosin.mil.slots import AttentionOutput
from eosin.mil.tasks._classification import Classification

TASK = Classification(classes=("a", "b", "c"))
MODEL = Abmil(4, 3)


def scored(scores, lengths=None):
    bags = PackedBags.pack(list(torch.zeros(len(scores), 4).split(lengths or [len(scores)])))
    return AttentionOutput(torch.zeros(bags.n_bags, 3), torch.zeros(bags.n_bags, 4), scores, bags.values), bags


def term(scores, lengths=None, *, progress=0.0, **options):
    part = AttentionEntropy(MODEL, TASK, **options)
    part.start_step(progress)
    return part(*scored(scores, lengths), torch.zeros(1))


def test_outputs_and_gradients_are_the_authors(golden, same, complete):
    golden = golden("aem")
    model = Abmil(40, 3, embed_dims=(24,), embed_bias=False, hidden=16, dropout=0).double()
    files = {name: f"embed.{name[8:]}" if name.startswith("embed") else name for name in model.state_dict()}
    model.load_state_dict({name: golden[file] for name, file in files.items()})
    x = golden["x"].requires_grad_()
    bags = PackedBags.pack([x])
    output = model(bags)
    parts = {"ce_loss": TASK.loss(output.logits, golden["label"])}
    parts["neg_entropy"] = AttentionEntropy(model, TASK)(output, bags, golden["label"])
    total = parts["ce_loss"] + golden["lam"] * parts["neg_entropy"]
    total.backward()
    found = parts | {"total_loss": total, "grad.x": x.grad, "attention_logits": output.scores[:, 0]}
    found |= {"attention": output.scores[:, 0].softmax(0), "logits": output.logits}
    found |= {f"grad.{files[name]}": value.grad for name, value in model.named_parameters()}
    same(found, golden)
    rest = [name for name in golden if name.startswith(("multi.", "masked."))]  # see the next test
    complete(golden, {*found, *files.values(), *rest, "x", "label", "lam"})


def test_rows_are_averaged_and_hidden_instances_count_nothing(golden, same):
    golden = golden("aem")
    scores = golden["multi.attention_logits"].T.requires_grad_()
    loss = term(scores)
    (gradient,) = torch.autograd.grad(loss, scores)
    masked = term(golden["masked.attention_logits"].T)
    found = {"multi.neg_entropy": loss, "multi.grad.attention_logits": gradient.T, "masked.neg_entropy": masked}
    same(found, golden)
    hidden = torch.tensor([[1.0], [float("-inf")], [2.0]], requires_grad=True)
    loss = term(hidden)
    torch.testing.assert_close(loss, term(torch.tensor([[1.0], [2.0]])))
    loss.backward()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("normalised", [False, True])
def test_the_gradient_of_one_row_is_the_equation(normalised):
    scores = torch.randn(7, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(term(scores, normalised=normalised), scores)
    a = scores.detach().softmax(0)
    entropy = -(a * a.log()).sum()
    wanted = a * (a.log() + entropy) / (math.log(7) if normalised else 1)
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-14)


def test_a_pack_is_the_mean_over_its_bags():
    scores = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    whole = term(scores, [5, 1, 3])
    torch.testing.assert_close(whole, torch.stack([term(part) for part in scores.split([5, 1, 3])]).mean())


def test_normalised_entropy_does_not_know_the_size_of_the_bag():
    uniform = torch.zeros(1000, 1)
    torch.testing.assert_close(term(uniform), torch.tensor(-math.log(1000)))
    for sizes in ([1000], [7, 993]):
        torch.testing.assert_close(term(uniform, sizes, normalised=True), torch.tensor(-1.0))
    assert term(torch.zeros(1, 1), normalised=True) == 0


@pytest.mark.parametrize(("progress", "share"), [(0.0, 1.0), (0.25, 0.8535533906), (0.5, 0.5), (1.0, 0.0)])
def test_annealing_fades_the_term_out_by_half_a_cosine(progress, share):
    uniform = torch.zeros(8, 1, dtype=torch.float64)
    torch.testing.assert_close(term(uniform, anneal=True, progress=progress), -share * uniform.new_tensor(math.log(8)))
    torch.testing.assert_close(term(uniform, progress=progress), -uniform.new_tensor(math.log(8)))


def test_it_adds_to_any_attention_even_with_hidden_instances():
    torch.manual_seed(0)
    model = Acmil(4, 3, mask_k=3, mask_p=0.9)
    bags = PackedBags.pack([torch.randn(n, 4) for n in (6, 1, 0)])
    loss = AttentionEntropy(model, TASK)(model(bags), bags, torch.zeros(3))
    loss.backward()
    assert all(
        parameter.grad.isfinite().all() for parameter in nn.ModuleList([model.embed, model.attention]).parameters()
    )
    with pytest.raises(ConfigError, match="AttentionEntropy needs an aggregator that returns AttentionOutput"):
        AttentionEntropy(MeanPooling(4, 3), TASK)
