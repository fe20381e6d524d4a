import numpy as np
import pytest
import torch
from torch import nn

from eosin.errors import ConfigError
from eosin.mil.bags import PackedBags
from eosin.mil.continual import continual_metrics
from eosin.mil.methods.abmil import Abmil
from eosin.mil.methods.comel import ComelPseudoLabels, pseudo_label_losses, pseudo_labels
from eosin.mil.methods.owlora import OrthogonalLora, truncated_basis
from eosin.mil.slots import AttentionOutput
from eosin.mil.tasks._classification import Binary, Classification

TASK = Classification(classes=("normal", "tumour", "other"))


def test_pseudo_labels_are_the_authors(golden, same):
    golden = golden("comel_bppl")
    bags = PackedBags.pack([golden["feat"]])
    threshold = (1 + golden["tau"] * golden["quality_mean"]) / 2
    torch.testing.assert_close(threshold, golden["tau2"])
    labels, chosen = pseudo_labels(golden["attn"], golden["feat"], bags, threshold=threshold)
    assert torch.equal(labels, golden["pseudo"])
    assert torch.equal(chosen, golden["selected"])
    loss = pseudo_label_losses(golden["attn"], golden["feat"], bags, threshold=threshold, floor=1e-10)
    same({"loss": loss[0]}, golden)


def sure(logits, n_bags=2):
    torch.manual_seed(0)
    bags = PackedBags.pack([torch.randn(6, 4) for _ in range(n_bags)])
    scores = torch.randn(6 * n_bags, 1, requires_grad=True)
    return AttentionOutput(torch.tensor(logits), torch.zeros(n_bags, 4), scores, bags.values), bags, scores


def test_only_positive_bags_that_are_surely_right_are_labelled():
    term = ComelPseudoLabels(Abmil(4, 3), TASK).eval()
    output, bags, scores = sure([[0.0, 9.0, 0.0], [9.0, 0.0, 0.0]])
    wanted = pseudo_label_losses(
        scores.split(6)[0].softmax(0), bags.values[:6], PackedBags.pack([bags.values[:6]]), threshold=0.5
    )
    assert wanted > 0
    torch.testing.assert_close(term(output, bags, torch.tensor([1, 0])), wanted[0] / 2)
    assert term(output, bags, torch.tensor([2, 0])) == 0  # wrong
    assert term(output, bags, torch.tensor([0, 0])) == 0  # negative
    unsure, bags, _ = sure([[0.0, 2.0, 0.0], [9.0, 0.0, 0.0]])
    assert term(unsure, bags, torch.tensor([1, 0])) == 0
    one = ComelPseudoLabels(Abmil(4, 1), Binary(classes=("a", "b"))).eval()
    output, bags, _ = sure([[9.0], [-9.0]])
    torch.testing.assert_close(one(output, bags, torch.tensor([1, 0])), wanted[0] / 2)


def test_the_threshold_rises_with_the_quality_of_predictions():
    term = ComelPseudoLabels(Abmil(4, 3), TASK, momentum=0.5).train()
    output, bags, _ = sure([[0.0, 99.0, 0.0], [99.0, 0.0, 0.0]])
    for _ in range(3):
        term(output, bags, torch.tensor([1, 1]))  # one of two is right
    torch.testing.assert_close(term.quality, torch.tensor(0.5 * (1 - 0.5**3)))


def test_low_rank_updates_are_the_authors(golden, same):
    golden = golden("comel_owlora")
    lora = OrthogonalLora(nn.Linear(12, 10).double(), energy=1.0)
    with torch.no_grad():
        lora.base.weight.copy_(golden["w_weight"])
        lora.base.bias.copy_(golden["w_bias"])
    lora.basis_down, lora.basis_up = golden["w_slot0_down_weight"], golden["w_slot0_up_weight"]
    for slot in (1, 2):
        lora.add_task(3)
        with torch.no_grad():
            for part in ("down", "up"):
                getattr(lora, part)[-1].copy_(golden[f"w_slot{slot}_{part}_weight"])
            lora.scales[-1].copy_(golden[f"w_slot{slot}_scales"])
    out, penalty = lora(golden["x"]), lora.penalty()
    ((out * golden["R"]).sum() + penalty).backward()
    found = {"out": out, "penalty": penalty, "g_scales": lora.scales[-1].grad}
    same(found | {"g_down_raw": lora.down[-1].grad, "g_up_raw": lora.up[-1].grad}, golden)
    lora.project_gradients()
    same({"g_down_projected": lora.down[-1].grad, "g_up_projected": lora.up[-1].grad}, golden)
    assert lora.base.weight.grad is None
    assert lora.down[0].grad is None


def test_a_new_task_changes_nothing_and_stays_out_of_the_basis():
    torch.manual_seed(0)
    lora = OrthogonalLora(nn.Linear(6, 5).double(), energy=0.8)
    x = torch.randn(4, 6, dtype=torch.float64)
    before = lora(x)
    lora.add_task(2)
    torch.testing.assert_close(lora(x), before)
    with torch.no_grad():
        lora.up[-1].normal_()
    lora(x).square().sum().backward()
    lora.project_gradients()
    torch.testing.assert_close(lora.down[-1].grad @ lora.basis_down.mT, torch.zeros(2, len(lora.basis_down)).double())


def test_the_basis_is_the_authors(golden, same):
    golden = golden("comel_basis")
    up, values, down = truncated_basis(golden["weight_before"])
    assert len(values) == int(golden["rank"])
    same({"weight_after": up * values @ down, "singular_values": torch.linalg.svdvals(golden["weight_before"])}, golden)


def test_metrics_of_a_sequence_are_the_definitions(golden):
    golden = golden("continual_metrics")
    found = continual_metrics(golden["R"].numpy())
    names = {"final_average": found.final_average, "incremental_average": found.incremental_average}
    names |= {"forgetting": found.forgetting, "bwt": found.backward_transfer}
    for name, value in names.items():
        assert value == pytest.approx(float(golden[name]), rel=1e-12)
    with pytest.raises(ConfigError, match="at least 2 tasks"):
        continual_metrics(np.ones((1, 1)))
