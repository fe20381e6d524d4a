"""Which methods answer counterfactuals without being run again, and how their bags are made."""

from functools import singledispatch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from eosin.heatmaps.pooled import Floats, PooledBag
from eosin.heatmaps.readout import ExactBag, MaxBag, NoisyOrBag, ReadoutBag, SmoothMaxBag
from eosin.mil.bags import PackedBags
from eosin.mil.methods.abmil import Abmil
from eosin.mil.methods.acmil import Acmil, AcmilMultiHead
from eosin.mil.methods.clam import ClamMultiBranch, ClamSingleBranch
from eosin.mil.methods.dsmil import Dsmil
from eosin.mil.methods.ins import Ins, InsOutput
from eosin.mil.methods.pooling import LsePooling, MaxPooling, MeanPooling, Pooling
from eosin.mil.slots import AggregatorOutput, AttentionOutput

Exact = PooledBag | ExactBag
CACHED_ROWS = 1024


@singledispatch
def closed_form(model: nn.Module, pack: PackedBags, output: AggregatorOutput) -> Exact | None:
    """Return a bag as a model sees it that embeds every instance alone, or None for any other model.

    A model that is linear after softmax pooling joins by `contributions`; one of another form by
    ``@closed_form.register``.
    """
    form = contributions(model, output) if isinstance(output, AttentionOutput) else None
    return PooledBag(as_array(output.scores), *form) if form and isinstance(output, AttentionOutput) else None


@closed_form.register
def _of_mean(model: MeanPooling, pack: PackedBags, output: AggregatorOutput) -> PooledBag:
    """Averaging is attention with equal scores."""
    terms = _terms("ne,ke->nk", model.embed(pack.values), model.classifier.weight)
    bias = as_array(model.classifier.bias)
    if model.level == "instance":
        terms, bias = terms + bias, np.zeros_like(bias)
    return PooledBag(np.zeros((len(terms), 1)), terms[:, None], bias)


@closed_form.register
def _of_maximum(model: MaxPooling, pack: PackedBags, output: AggregatorOutput) -> MaxBag:
    return MaxBag(*_pooled_rows(model, pack))


@closed_form.register
def _of_smooth_maximum(model: LsePooling, pack: PackedBags, output: AggregatorOutput) -> SmoothMaxBag:
    rows, head, bias = _pooled_rows(model, pack)
    return SmoothMaxBag(rows, head, bias, model.sharpness)


def _pooled_rows(model: Pooling, pack: PackedBags) -> tuple[Tensor, Tensor, Tensor]:
    """Return what is pooled (n, F), and the linear head (K, F) and bias (K,) that follow."""
    rows = model.embed(pack.values)
    if model.level == "instance":
        head = torch.eye(model.n_outputs, dtype=torch.float64)
        return model.classifier(rows).cpu(), head, head.new_zeros(model.n_outputs)
    head, bias = (parameter.detach().double().cpu() for parameter in (model.classifier.weight, model.classifier.bias))
    return rows.cpu(), head, bias


@closed_form.register
def _of_instance_classifier(model: Ins, pack: PackedBags, output: AggregatorOutput) -> ExactBag:
    assert isinstance(output, InsOutput)  # what the model declares
    logits = output.instance_logits.detach().double().cpu()
    head = torch.eye(logits.shape[1], dtype=torch.float64)
    if model.n_outputs == 1:
        head = head[1:] - head[:1]
    if model.pooling == "max":
        return MaxBag(logits - logits[:, :1], head, head.new_zeros(len(head)))
    if model.pooling == "noisy_or":
        chance = logits.log_softmax(1)
        others = [chance[:, [k for k in range(chance.shape[1]) if k != c]].logsumexp(1) for c in range(1, len(head.T))]
        return NoisyOrBag(torch.stack(others, 1), head)
    floor = torch.finfo(torch.promote_types(output.instance_logits.dtype, torch.float32)).tiny

    def read(share: Tensor) -> Tensor:
        logs = torch.where(share.sum(2) > 0, share[:, 0].clamp_min(floor).log(), 0.0)
        return logs @ head.T

    return ReadoutBag(logits.new_zeros(len(logits), 1, 1), logits.softmax(1)[:, None], read)


@closed_form.register
def _of_learned_queries(model: AcmilMultiHead, pack: PackedBags, output: AggregatorOutput) -> ReadoutBag:
    """The bag reads what its own values give under the weights of each branch and head, mean over the branches."""
    assert isinstance(output, AttentionOutput)  # what the model declares
    scores = torch.unflatten(output.scores.detach().double().cpu(), 1, (-1, model.heads))  # (n, M, H)
    parts = model.read_bag.value, model.read_bag.out, model.classifier
    weights = [layer.weight.detach().double().cpu() for layer in parts]
    biases = [layer.bias.detach().double().cpu() for layer in parts]
    scale, shift = (part.detach().double().cpu()[0] for part in (model.read_bag.scale, model.read_bag.shift))
    values = output.instances.detach().double().cpu() @ weights[0][0].T

    def read(pooled: Tensor) -> Tensor:
        out = functional.linear(pooled.flatten(1) + biases[0][0], weights[1][0], biases[1][0])
        normed = functional.layer_norm(out, out.shape[1:], eps=1e-6) * scale + shift
        return functional.linear(normed, weights[2], biases[2])

    return ReadoutBag(scores, torch.unflatten(values, 1, (model.heads, -1)), read)


@singledispatch
def contributions(model: nn.Module, output: AttentionOutput) -> tuple[Floats, Floats] | None:
    """Return terms (n, H, K) and bias (K,) of a model that is linear after its pooling, or None for any other.

    A method joins by ``@contributions.register``.
    """
    return None


@contributions.register(Abmil)
def _of_concatenated_heads(model: Abmil, output: AttentionOutput) -> tuple[Floats, Floats]:
    heads = output.scores.shape[1]
    weights = model.classifier.weight.view(model.n_outputs, heads, -1)  # (K, H, E)
    return _terms("ne,khe->nhk", output.instances, weights), as_array(model.classifier.bias)


@contributions.register(Dsmil)
def _of_critical_instances(model: Dsmil, output: AttentionOutput) -> tuple[Floats, Floats]:
    weights = model.classifier.weight.view(model.n_outputs, model.n_outputs, -1)  # (K, H, E)
    return _terms("ne,khe->nhk", output.instances, weights), as_array(model.classifier.bias)


@contributions.register(ClamSingleBranch)
def _of_one_branch(model: ClamSingleBranch, output: AttentionOutput) -> tuple[Floats, Floats]:
    return _terms("ne,ke->nk", output.instances, model.classifier.weight)[:, None], as_array(model.classifier.bias)


@contributions.register(ClamMultiBranch)
def _of_branch_per_class(model: ClamMultiBranch, output: AttentionOutput) -> tuple[Floats, Floats]:
    own = _terms("ne,ke->nk", output.instances, model.classifier.weight)
    return own[:, :, None] * np.eye(own.shape[1]), as_array(model.classifier.bias)


@contributions.register(Acmil)
def _of_averaged_branches(model: Acmil, output: AttentionOutput) -> tuple[Floats, Floats]:
    branches = output.scores.shape[1]
    one = _terms("ne,ke->nk", output.instances, model.classifier.weight)[:, None] / branches
    return np.repeat(one, branches, axis=1), as_array(model.classifier.bias)


def _terms(rule: str, instances: Tensor, weights: Tensor) -> Floats:
    # float64 weights would copy the instances; the products are summed in blocks that stay in the cache instead
    wide = weights.detach().double()
    blocks = [torch.einsum(rule, block.double(), wide) for block in torch.split(instances, CACHED_ROWS)]
    return as_array(torch.cat(blocks))


def as_array(values: Tensor) -> Floats:
    """Return a tensor as float64 on the host."""
    return np.asarray(values.detach().double().cpu().numpy())
