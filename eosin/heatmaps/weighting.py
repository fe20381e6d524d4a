"""G_i = ∂target / ∂log w_i: the first-order price of a tile, for models that have to be run again.

w_i is the weight of tile i where the model reads its bag out, 1 for every tile; everything before that place is held
fixed. Leaving a tile out costs about -G_i there, and more or less than that through the layers before.

- MambaMIL, GDAT: the last attention pooling, ``α_i (p_i - F)``.
- Set Transformer: the pooling by seeds, whose scores take ``+ log w``; derived through the seeds' own layers.
- TransMIL: the keys of the last layer, which the landmarks read with ``+ log w``; landmarks, queries and convolution
  are held fixed.
- Models with a closed form (`eosin.heatmaps.closed_forms`): their pooling; DSMIL's critical tiles are held fixed.

A method joins by ``@weight_gradient.register``.
"""

from collections.abc import Callable
from functools import singledispatch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from eosin.heatmaps.closed_forms import closed_form
from eosin.heatmaps.pooled import Floats
from eosin.heatmaps.tracing import NystromFactors, inputs_of
from eosin.mil.attention import bag_attention, mixed_weights
from eosin.mil.bags import PackedBags
from eosin.mil.methods.gdat import Gdat
from eosin.mil.methods.mambamil import MambaMil
from eosin.mil.methods.packmil_downsampler import Downsampled
from eosin.mil.methods.set_transformer import MultiheadBlock, SetTransformer
from eosin.mil.methods.transmil import TransMil
from eosin.mil.slots import AttentionOutput
from eosin.mil.standardize import Standardized

Value = Callable[[Tensor], Tensor]


@singledispatch
def weight_gradient(model: nn.Module, pack: PackedBags, value: Value) -> Floats | None:
    """Return G_i (n,) of one bag, or None for a model that reads its bag out without weights.

    Parameters
    ----------
    model : Module
        In evaluation mode.
    pack : PackedBags
        One bag.
    value : callable
        One row of logits (K,) to the number that is asked about, differentiable.
    """
    with torch.no_grad():
        output = model(pack)
        form = closed_form(model, pack, output)
    gradient = None if form is None else form.log_weight_gradient()
    if gradient is None:
        return None
    return np.asarray(gradient @ _slope(output.logits[0], value).cpu().numpy())


@weight_gradient.register(Standardized)
def _of_standardized(model: Standardized, pack: PackedBags, value: Value) -> Floats | None:
    with torch.no_grad():
        standardized = model.standardizer(pack)
    return weight_gradient(model.aggregator, standardized, value)


@weight_gradient.register(Downsampled)
def _of_host(model: Downsampled, pack: PackedBags, value: Value) -> Floats | None:
    with torch.no_grad():
        changed = model.downsample(pack, longer_than=None)
    return weight_gradient(model.host, changed, value)


@weight_gradient.register(MambaMil)
@weight_gradient.register(Gdat)
def _of_attention_pooling(model: MambaMil | Gdat, pack: PackedBags, value: Value) -> Floats:
    with torch.no_grad():
        output = model(pack)
    return pooling_gradient(output, _slope(output.logits[0], value), model.classifier.weight)


def pooling_gradient(output: AttentionOutput, slope: Tensor, weight: Tensor) -> Floats:
    """Return ``α_i (p_i - F)`` for one softmax pooling with a linear classifier of weights (K, E)."""
    share = output.scores[:, 0].double().softmax(0)
    own = (output.instances @ (slope.to(weight) @ weight).detach()).double()
    return np.asarray((share * (own - share @ own)).detach().cpu().numpy())


def _slope(logits: Tensor, value: Value) -> Tensor:
    """Return the derivative of the value by the logits, (K,)."""
    with torch.enable_grad():
        leaf = logits.detach().double().requires_grad_()
        (slope,) = torch.autograd.grad(value(leaf), leaf)
    return slope


@weight_gradient.register(SetTransformer)
def _of_set_transformer(model: SetTransformer, pack: PackedBags, value: Value) -> Floats:
    with torch.no_grad(), inputs_of([model.pool]) as seen:
        model(pack)
    bags: PackedBags = seen[0][0]
    with torch.enable_grad():
        seeds, scores, _ = model.pool(bags.with_values(bags.values.detach().requires_grad_()))
        for block in model.decoder:
            assert isinstance(block, MultiheadBlock)  # for the type checker
            seeds = block.attend_within(seeds)
        (gradient,) = torch.autograd.grad(value(model.classifier(seeds.flatten(1))[0]), scores)
    return np.asarray(gradient.double().sum(1).cpu().numpy())


@weight_gradient.register(TransMil)
@torch.no_grad()
def _of_transmil(model: TransMil, pack: PackedBags, value: Value) -> Floats:
    with inputs_of([model.layer2.norm, model.norm]) as seen:
        model(pack)
    layout = model.layout(pack)
    factors = NystromFactors.of(model.layer2, seen[0][0], layout)
    slope = _class_slope(model, seen[1][0], value)  # (H, d)
    start = np.zeros(len(layout.source))
    start[int(layout.first[0])] = 1.0
    mix = factors.to_landmarks(start)  # (m, H)
    key, values = factors.third(1), factors.third(2)
    query = factors.marks_query[None]
    scale, zeros = model.layer2.scale, layout.zeros
    read = bag_attention(query, key, values, layout.lengths, scale, zeros=zeros)[0]  # (m, H, d)
    level = mix * torch.einsum("mhd,hd->mh", read, slope)
    own = torch.einsum("phd,hd->ph", values, slope)
    shared = mixed_weights(query, key, mix[None].to(query), layout.lengths, scale, zeros=zeros)
    lost = mixed_weights(query, key, level[None].to(query), layout.lengths, scale, zeros=zeros)
    prices = (shared * own - lost).double().sum(1, keepdim=True)
    return np.asarray(layout.per_instance(prices)[:, 0].cpu().numpy())


def _class_slope(model: TransMil, class_token: Tensor, value: Value) -> Tensor:
    """Return the derivative of the value by what the class token read in the last layer, per head: (H, d)."""
    with torch.enable_grad():
        leaf = class_token.detach().requires_grad_()  # (1, E)
        logits = functional.linear(model.norm(leaf), model.classifier.weight, model.classifier.bias)
        (slope,) = torch.autograd.grad(value(logits[0]), leaf)
    read: Tensor = torch.unflatten((slope[0] @ model.layer2.to_out.weight).detach(), 0, (model.layer2.heads, -1))
    return read
