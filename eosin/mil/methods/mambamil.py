"""MambaMIL: selective scans along the list of instances, in its own order and in a second one.

Yang, Wang, Chen: MambaMIL: Enhancing long sequence modeling with sequence reordering in computational pathology,
MICCAI 2024, https://arxiv.org/abs/2403.06800. The scan: Gu, Dao: Mamba, 2023, https://arxiv.org/abs/2312.00752.

1. ``h = dropout(gelu(W x + b))``; L times ``h ← h + mixer(LN(h))``; ``h ← LN(h)``; attention ``s = w tanh(V h)``, ``a
   = softmax(s)`` within the bag, ``logits = W Σ a h + b``.
2. Mixer: (x, z) = halves of ``W_in h``; each branch walks x in its own order: ``c_t = silu(b + Σ_j w_j x_{t-3+j})``,
   ``[δ, B, C] = W_x c``, ``Δ = softplus(W_dt δ + b_dt)``, ``A = -exp(A_log)``, ``H_t = exp(Δ_t A) H_{t-1} + Δ_t c_t
   B_t``, ``y_t = H_t C_t + D c_t``. The branches' y, back in the order of the list, are added; the mixer is ``W_out
   (y · silu(z))``.
3. Second branches: none (`plain`), from the end of the bag (`bi`), or every `rate`-th instance, k = ⌈n / rate⌉ of
   them, then every `rate`-th from the second on, and so on (`sr`). The rows of zeros that fill the last columns lie
   within the sequence and move the state, as in the authors' code, because of the convolution's bias; their outputs
   are dropped.

Deviations from the authors' code. Its initialisation of all linear layers erases Mamba's step sizes, so that the
state forgets within a few instances: `dt_init="official"`; the default keeps Mamba's. It wrote the bidirectional and
reordering branches for a fused GPU kernel only; they run everywhere here. The attention is returned. Decay rates and
skip connections have no weight decay (attribute ``no_weight_decay``).

Memory: channels of a mixer do not meet between W_in and W_out except in W_x, so large packs are computed in groups of
channels, first for [δ, B, C], then for the output, each computed again in the backward pass. The loops run over
layers, branches and groups of channels. The order of instances matters: features are read in the order of their file.
"""

import math
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from eosin.errors import CheckpointError
from eosin.kernels import ScanOrder, causal_conv, reversed_order, selective_scan, strided_order
from eosin.mil._attention import recomputed
from eosin.mil._layers import Activation, Attention, as_dtype, embedding, initialise, pooling_gradient
from eosin.mil._recipe import RECIPES, Component, Recipe, Training
from eosin.mil.bags import PackedBags
from eosin.mil.layouts import LAYOUTS, Found, Layout, Taker, Tensors
from eosin.mil.options import Count, Dropout
from eosin.mil.slots import AGGREGATORS, Aggregator, AttentionOutput
from eosin.mil.subsets import Floats, Value, slope_of

GROUP_ELEMENTS = 2**24  # rows times channels of a mixer that are computed at once

Kind = Literal["sr", "bi", "plain"]


@AGGREGATORS.register("mambamil")
class MambaMil(Aggregator):
    """Selective scans and attention pooling, equations 1 to 3.

    Parameters
    ----------
    in_dim, n_outputs
        Feature width D and logits K.
    kind : {"sr", "bi", "plain"}
        Second branch: reordered, reversed or none.
    rate : int
        Distance of neighbours in the reordered branch.
    width : int
        Width E of an instance.
    layers : int
        Mixers L.
    expand : int
        Channels of a mixer per width.
    d_state, d_conv : int
        States of a channel, and taps of the convolution.
    dt_rank : int or None
        Width of δ; None is ⌈width / 16⌉.
    hidden : int
        Width of the attention's hidden layer.
    embed_activation, dropout
        Of the embedding.
    dt_init : {"mamba", "official"}
        Step sizes from 0.001 to 0.1 at the start, or Xavier normal and zero as all layers.
    """

    output_type = AttentionOutput
    order_dependent = True

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        *,
        kind: Kind = "sr",
        rate: Count = 5,
        width: Count = 512,
        layers: Count = 2,
        expand: Count = 2,
        d_state: Count = 16,
        d_conv: Count = 4,
        dt_rank: Count | None = None,
        hidden: Count = 128,
        embed_activation: Activation = "gelu",
        dropout: Dropout = 0.0,
        dt_init: Literal["mamba", "official"] = "mamba",
    ) -> None:
        super().__init__(in_dim, n_outputs, embed_dim=width)
        self.kind = kind
        self.rate = rate
        self.embed = embedding(in_dim, (width,), activation=embed_activation, dropout=dropout)
        rank = math.ceil(width / 16) if dt_rank is None else dt_rank
        branches = 1 if kind == "plain" else 2
        self.layers = nn.ModuleList(
            MixerLayer(width, expand * width, branches=branches, d_state=d_state, d_conv=d_conv, dt_rank=rank)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, hidden=hidden, gated=False)
        self.classifier = nn.Linear(width, n_outputs)
        initialise(self, "xavier")
        if dt_init == "mamba":
            for layer in self.modules():
                if isinstance(layer, MixerLayer):
                    layer.start_steps()

    def forward(self, bags: PackedBags) -> AttentionOutput:
        """Return logits, bag embeddings, scores and the instances after the last layer."""
        return self.aggregate(bags.with_values(recomputed(self.embed, bags.n_instances, bags.values)))

    def aggregate(self, bags: PackedBags) -> AttentionOutput:
        """Return the output for bags of embedded instances."""
        orders = (None, *self._second(bags))
        tokens = bags.values
        for layer in self.layers:
            tokens = layer(tokens, bags.cu_seqlens, orders)
        tokens = self.norm(tokens)
        pool = self.attention.pool(tokens, bags)
        bag = as_dtype(pool.pooled[:, 0], self.classifier.weight)
        return AttentionOutput(self.classifier(bag), bag, pool.scores, tokens)

    @override
    def weight_gradient(self, bags: PackedBags, value: Value) -> Floats:
        with torch.no_grad():
            output = self(bags)
        return pooling_gradient(output.scores, output.instances, self.classifier, slope_of(output.logits[0], value))

    def _second(self, bags: PackedBags) -> tuple[ScanOrder, ...]:
        if self.kind == "plain":
            return ()
        return (reversed_order(bags.cu_seqlens) if self.kind == "bi" else strided_order(bags.cu_seqlens, self.rate),)


class MixerLayer(nn.Module):
    """Layer norm, the mixer of equation 2 and the residual.

    Parameters
    ----------
    width, inner : int
        Width E of an instance and channels of the mixer.
    branches : int
        Orders in which it walks a bag.
    d_state, d_conv, dt_rank : int
        As `MambaMil`.
    """

    def __init__(self, width: int, inner: int, *, branches: int, d_state: int, d_conv: int, dt_rank: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.branches = nn.ModuleList(
            ScanBranch(inner, d_state=d_state, d_conv=d_conv, dt_rank=dt_rank) for _ in range(branches)
        )
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.inner = inner

    def start_steps(self) -> None:
        """Draw Mamba's initial step sizes, the same for all branches."""
        steps = torch.exp(torch.empty(self.inner).uniform_(math.log(1e-3), math.log(1e-1))).clamp_min(1e-4)
        for branch in self._branches():
            bound = branch.dt_proj.in_features**-0.5
            nn.init.uniform_(branch.dt_proj.weight, -bound, bound)
            with torch.no_grad():
                branch.dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus of it is the step

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, orders: tuple[ScanOrder | None, ...]) -> Tensor:
        """Mix instances along each bag: (N, E) -> (N, E)."""
        rows = len(tokens)
        size = max(16, min(self.inner, GROUP_ELEMENTS // max(rows, 1)))
        groups = [slice(first, min(first + size, self.inner)) for first in range(0, self.inner, size)]
        selected = [recomputed(partial(self._select, orders, cu_seqlens, group), rows, tokens) for group in groups]
        total = torch.stack(selected).sum(0) if len(selected) > 1 else selected[0]
        mixed = tokens
        for group in groups:
            mixed = mixed + recomputed(partial(self._mix, orders, cu_seqlens, group), rows, tokens, total)
        return mixed

    def _branches(self) -> list["ScanBranch"]:
        return [branch for branch in self.branches if isinstance(branch, ScanBranch)]

    def _projected(self, normed: Tensor, half: int, group: slice) -> Tensor:
        """Return some channels of x (0) or z (1)."""
        return functional.linear(normed, torch.unflatten(self.in_proj.weight, 0, (2, -1))[half, group])

    def _select(self, orders: tuple[ScanOrder | None, ...], cu_seqlens: Tensor, group: slice, tokens: Tensor) -> Tensor:
        """Return what some channels add to [δ, B, C] of all branches, one branch after the other: (N + N', r + 2 S)."""
        x = self._projected(self.norm(tokens), 0, group)
        parts = [
            branch.select(branch.convolve(x, cu_seqlens, order, group), group)
            for branch, order in zip(self._branches(), orders, strict=True)
        ]
        return torch.cat(parts)

    def _mix(
        self, orders: tuple[ScanOrder | None, ...], cu_seqlens: Tensor, group: slice, tokens: Tensor, selected: Tensor
    ) -> Tensor:
        """Return what some channels add to the output, (N, E)."""
        normed = self.norm(tokens)
        x = self._projected(normed, 0, group)
        sizes = [len(tokens) if order is None else len(order.source) for order in orders]
        scanned = [
            branch.scan(branch.convolve(x, cu_seqlens, order, group), part, cu_seqlens, order, group)
            for branch, order, part in zip(self._branches(), orders, torch.split(selected, sizes), strict=True)
        ]
        y = scanned[0] if len(scanned) == 1 else scanned[0] + scanned[1]
        gate = functional.silu(self._projected(normed, 1, group))
        return functional.linear(y * gate, self.out_proj.weight[:, group])


class ScanBranch(nn.Module):
    """One walk along the bags: convolution, selection and scan.

    Parameters
    ----------
    inner : int
        Channels.
    d_state, d_conv, dt_rank : int
        As `MambaMil`.
    """

    def __init__(self, inner: int, *, d_state: int, d_conv: int, dt_rank: int) -> None:
        super().__init__()
        bound = d_conv**-0.5  # as torch's convolution
        self.conv_weight = nn.Parameter(torch.empty(inner, d_conv).uniform_(-bound, bound))
        self.conv_bias = nn.Parameter(torch.empty(inner).uniform_(-bound, bound))
        self.select_proj = nn.Linear(inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        for parameter in (self.A_log, self.D):
            parameter.no_weight_decay = True  # type: ignore[attr-defined]
        self.d_state = d_state

    def convolve(self, x: Tensor, cu_seqlens: Tensor, order: ScanOrder | None, group: slice) -> Tensor:
        """Return c of some channels, in the branch's order."""
        return causal_conv(x, self.conv_weight[group], self.conv_bias[group], cu_seqlens, order=order)

    def select(self, convolved: Tensor, group: slice) -> Tensor:
        """Return what some channels add to [δ, B, C]."""
        return functional.linear(convolved, self.select_proj.weight[:, group])

    def scan(
        self, convolved: Tensor, selected: Tensor, cu_seqlens: Tensor, order: ScanOrder | None, group: slice
    ) -> Tensor:
        """Return y of some channels, in the order of the list."""
        step, b, c = torch.split(selected, [self.dt_proj.in_features, self.d_state, self.d_state], 1)
        y = selective_scan(
            convolved,
            functional.linear(step, self.dt_proj.weight[group]),
            -torch.exp(self.A_log[group]),
            b,
            c,
            cu_seqlens if order is None else order.cu_seqlens,
            d=self.D[group],
            delta_bias=self.dt_proj.bias[group],
        )
        return y if order is None else y[order.place]


def _read(taker: Taker) -> Found:
    """Read the authors' model; that a second branch is reversed or reordered, and by which rate, no tensor shows."""
    said: dict[str, object] = {"embed_activation": taker.ask("embed_activation", "relu", "gelu", "none")}
    said["kind"] = taker.ask("kind", "sr", "bi") if taker.has(r"layers\.0\.1\.A_b_log") else "plain"
    if said["kind"] == "sr":
        said["rate"] = int(taker.ask("rate"))
    tensors, widths = taker.embedding("_fc1")
    width = widths[-1]
    numbers = taker.numbers(r"layers\.(\d+)\.0\.weight")
    branches = ("", "_b") if said["kind"] != "plain" else ("",)
    for number in numbers:
        tensors |= _read_mixer(taker, f"layers.{number}", width, branches)
    tensors |= taker.norm("norm", "norm", width)
    tensors |= taker.attention("attention.0", None, "attention.2", width)
    tensors |= taker.head("classifier", "classifier", width)
    first = "layers.0.branches.0"
    if f"{first}.A_log" not in tensors:
        raise CheckpointError(taker.path, "lacks the layers of MambaMIL; it is only a part of a model")
    inner, states = tensors[f"{first}.A_log"].shape
    options: dict[str, object] = {
        "width": width,
        "layers": len(numbers),
        "expand": max(1, inner // width),
        "d_state": states,
        "d_conv": tensors[f"{first}.conv_weight"].shape[1],
        "dt_rank": tensors[f"{first}.dt_proj.weight"].shape[1],
        "hidden": len(tensors["attention.V.weight"]),
    }
    return Found("MambaMIL", Component(name="mambamil", options=options | said), tensors, outputs="softmax")


def _read_mixer(taker: Taker, old: str, width: int, branches: tuple[str, ...]) -> Tensors:
    tensors = taker.norm(f"{old}.0", f"{old}.norm", width)
    tensors |= taker.linear(f"{old}.1.in_proj", f"{old}.in_proj", None, width, bias=False)
    inner = len(tensors[f"{old}.in_proj.weight"]) // 2
    tensors |= taker.linear(f"{old}.1.out_proj", f"{old}.out_proj", width, inner, bias=False)
    for number, mark in enumerate(branches):
        new = f"{old}.branches.{number}"
        tensors[f"{new}.conv_weight"] = taker.take(f"{old}.1.conv1d{mark}.weight", inner, 1, None)[:, 0]
        tensors[f"{new}.conv_bias"] = taker.take(f"{old}.1.conv1d{mark}.bias", inner)
        tensors |= taker.linear(f"{old}.1.x_proj{mark}", f"{new}.select_proj", None, inner, bias=False)
        tensors |= taker.linear(f"{old}.1.dt_proj{mark}", f"{new}.dt_proj", inner)
        tensors[f"{new}.A_log"] = taker.take(f"{old}.1.A{mark}_log", inner, None)
        tensors[f"{new}.D"] = taker.take(f"{old}.1.D{mark}", inner)
    return tensors


LAYOUTS.add("MambaMIL", Layout((r"_fc1\..*", r"layers\.0\.1\.in_proj\..*", r"classifier\..*"), _read))

RECIPE = Recipe(
    aggregator=Component(name="mambamil"),
    training=Training(
        optimizer="adam", lr=2e-4, weight_decay=1e-5, epochs=200, patience=20, min_epochs=50, schedule="constant"
    ),
)
RECIPES.add("mambamil", RECIPE)
