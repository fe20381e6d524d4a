"""ACMIL: several attention branches that are kept apart, and top instances that are hidden while training.

Zhang, Li, Sun, Zheng, Zhu, Yang: Attention-challenging multiple instance learning for whole slide image
classification, ECCV 2024, https://arxiv.org/abs/2311.07125.

1. ``h = relu(W x)`` without bias; gated attention with M columns on shared V and U, ``a_i = softmax(s_i)`` in the
   bag.
2. Branches: ``z_i = Σ a_in h_n``, ``branch_logits_i = W_i z_i + b_i``.
3. Bag: ``ā = mean_i a_i``, ``logits = W (Σ ā_n h_n) + b``; since the sum is linear it is the mean of the z_i.
4. STKIM, in training and per branch: of the K' = min(K, n) highest scores exactly ⌊K' p⌋, chosen at random, become
   -inf, so that the softmax spreads their weight over the others in proportion.
5. `acmil_branches` is ``mean_i loss(branch_logits_i)``, 0 for M = 1; `acmil_diversity` is the mean of cos(a_i, a_j)
   over pairs of branches, of the masked weights. Objective: bag loss plus both, each with weight 1.
6. `acmil_mha` replaces equation 1 by a learned query per branch that attends with several heads (projections with
   bias, dropout after the output projection, layer norm with eps 1e-6); the bag has its own value and output
   projections, on weights that are averaged over the branches after the softmax. A query is one vector, so ``q · (W_k
   h + b_k)`` is ``(W_kᵀ q) · h + q · b_k`` and ``Σ a (W_v h + b_v) = W_v (Σ a h) + b_v``: keys and values of the
   instances are never computed. The diversity is averaged over the heads.

Deviations from the authors' code. Masked scores are -inf, which half precision holds, instead of -1e9; at least one
instance of a bag is always left, where p = 1 would hide all of a small bag and silently attend uniformly. The paper
hides each top instance independently: `sampling="bernoulli"`. Branch losses are means over the bags of a pack. The
deployed pass is that of the highest AUC on the validation bags, to which the code adds the macro F1.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from eosin.errors import ConfigError
from eosin.kernels import attention_pool, segment_pool, segment_softmax, segment_topk_mask
from eosin.mil._closed_forms import PooledBag, ReadoutBag, linear_terms
from eosin.mil._layers import Attention, as_dtype, embedding
from eosin.mil._recipe import RECIPES, Component, Recipe, Term, Training
from eosin.mil.bags import PackedBags
from eosin.mil.layouts import LAYOUTS, Found, Layout, Taker, Tensors
from eosin.mil.options import Count, Dropout, Share, Whole
from eosin.mil.slots import (
    AGGREGATORS,
    LOSS_TERMS,
    Aggregator,
    AggregatorOutput,
    AttentionOutput,
    LossTerm,
)
from eosin.mil.subsets import as_array
from eosin.mil.task import Task

NORM_EPS = 1e-6

Sampling = Literal["fixed", "bernoulli"]


@dataclass(frozen=True, eq=False)
class AcmilOutput(AttentionOutput):
    """Output of ACMIL: scores (N, M * H) hold the H heads of the first branch, then of the second and so on.

    While training, the scores of hidden instances are -inf.

    Attributes
    ----------
    branch_logits : (B, M, K) float
    """

    branch_logits: Tensor


class BranchLinear(nn.Module):
    """One linear layer per branch.

    Parameters
    ----------
    branches, in_dim, out_dim : int
    """

    def __init__(self, branches: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(branches, out_dim, in_dim))
        self.bias = nn.Parameter(torch.empty(branches, out_dim))
        for parameter in (self.weight, self.bias):
            nn.init.uniform_(parameter, -(in_dim**-0.5), in_dim**-0.5)  # as nn.Linear

    def forward(self, values: Tensor) -> Tensor:
        """Apply each branch's layer to its own column: (B, M, in) -> (B, M, out)."""
        return torch.einsum("bmi,moi->bmo", values, self.weight) + self.bias


@AGGREGATORS.register("acmil")
class Acmil(Aggregator):
    """ACMIL on gated attention, equations 1 to 4.

    Parameters
    ----------
    in_dim, n_outputs
        Feature width D and logits K.
    width : int or None
        Width E of an embedded instance; None is half the features', 128 for D = 384, in multiples of 32.
    residual_blocks : int
        Blocks behind the embedding, which the authors' code has and their models leave out.
    hidden : int
        Width of the attention's hidden layer.
    branches : int
        Attention branches M.
    mask_k : int
        Highest scores of a branch that may be hidden.
    mask_p : float
        Fraction of them that is hidden in training; 0 hides none.
    sampling : {"fixed", "bernoulli"}
        Hide exactly that fraction, or each with that probability.
    """

    output_type = AcmilOutput

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        *,
        width: Count | None = None,
        residual_blocks: Whole = 0,
        hidden: Count = 128,
        branches: Count = 5,
        mask_k: Whole = 10,
        mask_p: Share = 0.6,
        sampling: Sampling = "fixed",
    ) -> None:
        width = default_width(in_dim) if width is None else width
        super().__init__(in_dim, n_outputs, embed_dim=width)
        self.masking = TopMasking(mask_k, mask_p, sampling)
        self.embed = embedding(in_dim, (width,), bias=False, residual_blocks=residual_blocks)
        self.attention = Attention(width, hidden=hidden, heads=branches)
        self.branch_classifier = BranchLinear(branches, width, n_outputs)
        self.classifier = nn.Linear(width, n_outputs)

    def forward(self, bags: PackedBags) -> AcmilOutput:
        """Return logits of the bag and of the branches, bag embeddings, scores and instances."""
        return self.aggregate(bags.with_values(self.embed(bags.values)))

    def aggregate(self, bags: PackedBags) -> AcmilOutput:
        """Return the output for bags of embedded instances."""
        scores = self.masking(self.attention(bags.values), bags)  # (N, M)
        pooled, _, _ = attention_pool(scores, bags.values, bags.cu_seqlens)
        branches = as_dtype(pooled, self.classifier.weight)  # (B, M, E)
        bag = branches.mean(1)
        return AcmilOutput(self.classifier(bag), bag, scores, bags.values, self.branch_classifier(branches))

    @override
    def readout(self, bags: PackedBags, output: AggregatorOutput) -> PooledBag:
        assert isinstance(output, AttentionOutput)  # what the model declares
        branches = output.scores.shape[1]
        one = linear_terms("ne,ke->nk", output.instances, self.classifier.weight)[:, None] / branches
        return PooledBag(as_array(output.scores), np.repeat(one, branches, axis=1), as_array(self.classifier.bias))


@AGGREGATORS.register("acmil_mha")
class AcmilMultiHead(Aggregator):
    """ACMIL on multi-head attention of learned queries, equation 6.

    Parameters
    ----------
    in_dim, n_outputs, width, branches, mask_k, mask_p, sampling
        As `Acmil`; hiding is per head and branch.
    heads : int
        Attention heads of each branch; divides the width.
    dropout : float
        After the output projections.
    """

    output_type = AcmilOutput

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        *,
        width: Count | None = None,
        heads: Count = 8,
        branches: Count = 5,
        dropout: Dropout = 0.1,
        mask_k: Whole = 10,
        mask_p: Share = 0.6,
        sampling: Sampling = "fixed",
    ) -> None:
        width = default_width(in_dim) if width is None else width
        if width % heads:
            raise ConfigError(f"acmil_mha: {heads} heads do not divide the width {width}; choose another width")
        super().__init__(in_dim, n_outputs, embed_dim=width)
        self.masking = TopMasking(mask_k, mask_p, sampling)
        self.embed = embedding(in_dim, (width,), bias=False)
        self.queries = nn.Parameter(torch.empty(branches, width).normal_(std=1e-6))
        self.query = BranchLinear(branches, width, width)
        self.key = BranchLinear(branches, width, width)
        self.read = _Readout(branches, width, heads, dropout)
        self.read_bag = _Readout(1, width, heads, dropout)
        self.branch_classifier = BranchLinear(branches, width, n_outputs)
        self.classifier = nn.Linear(width, n_outputs)
        self.heads = heads

    def forward(self, bags: PackedBags) -> AcmilOutput:
        """Return logits of the bag and of the branches, bag embeddings, scores and instances."""
        return self.aggregate(bags.with_values(self.embed(bags.values)))

    def aggregate(self, bags: PackedBags) -> AcmilOutput:
        """Return the output for bags of embedded instances."""
        scores = self.masking(self._scores(bags.values), bags)  # (N, M * H)
        pooled, _, _ = attention_pool(scores, bags.values, bags.cu_seqlens)
        pooled = torch.unflatten(as_dtype(pooled, self.classifier.weight), 1, (-1, self.heads))  # (B, M, H, E)
        branch_logits = self.branch_classifier(self.read(pooled))
        bag = self.read_bag(pooled.mean(1, keepdim=True))[:, 0]
        return AcmilOutput(self.classifier(bag), bag, scores, bags.values, branch_logits)

    @override
    def readout(self, bags: PackedBags, output: AggregatorOutput) -> ReadoutBag:
        """Read what the bag's own values give under the weights of each branch and head, mean over the branches."""
        assert isinstance(output, AttentionOutput)  # what the model declares
        scores = torch.unflatten(output.scores.detach().double().cpu(), 1, (-1, self.heads))  # (n, M, H)
        parts = self.read_bag.value, self.read_bag.out, self.classifier
        weights = [layer.weight.detach().double().cpu() for layer in parts]
        biases = [layer.bias.detach().double().cpu() for layer in parts]
        scale, shift = (part.detach().double().cpu()[0] for part in (self.read_bag.scale, self.read_bag.shift))
        values = output.instances.detach().double().cpu() @ weights[0][0].T

        def read(pooled: Tensor) -> Tensor:
            out = functional.linear(pooled.flatten(1) + biases[0][0], weights[1][0], biases[1][0])
            normed = functional.layer_norm(out, out.shape[1:], eps=NORM_EPS) * scale + shift
            return functional.linear(normed, weights[2], biases[2])

        return ReadoutBag(scores, torch.unflatten(values, 1, (self.heads, -1)), read)

    @override
    def branches(self, weights: Tensor, classes: Sequence[str]) -> dict[str, Tensor]:
        # the heads of a branch speak with one voice
        return super().branches(torch.unflatten(weights, 1, (-1, self.heads)).mean(2), classes)

    def _scores(self, instances: Tensor) -> Tensor:
        query = self._by_head(self.query(self.queries[None])[0])  # (M, H, E / H)
        query = query * query.shape[2] ** -0.5
        key_weight, key_bias = self._by_head(self.key.weight), self._by_head(self.key.bias)
        folded = torch.einsum("mhd,mhde->mhe", query, key_weight).flatten(0, 1)  # (M * H, E)
        return functional.linear(instances, folded, (query * key_bias).sum(2).flatten())

    def _by_head(self, rows: Tensor) -> Tensor:
        return torch.unflatten(rows, 1, (self.heads, -1))


class _Readout(nn.Module):
    """Value and output projections of pooled instances, dropout and layer norm, apart for each branch."""

    def __init__(self, branches: int, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.value = BranchLinear(branches, width, width)
        self.out = BranchLinear(branches, width, width)
        self.scale = nn.Parameter(torch.ones(branches, width))
        self.shift = nn.Parameter(torch.zeros(branches, width))
        self.heads = heads
        self.dropout = dropout

    def forward(self, pooled: Tensor) -> Tensor:
        """Read instances that each head has pooled: (B, M, H, E) -> (B, M, E)."""
        weight = torch.unflatten(self.value.weight, 1, (self.heads, -1))  # (M, H, E / H, E)
        value = torch.einsum("bmhe,mhde->bmhd", pooled, weight).flatten(2) + self.value.bias
        out = functional.dropout(self.out(value), self.dropout, self.training)
        return functional.layer_norm(out, out.shape[2:], eps=NORM_EPS) * self.scale + self.shift


class TopMasking(nn.Module):
    """Hide some of the highest scores of every column while training, equation 4 (STKIM).

    Parameters
    ----------
    k : int
        Highest scores of a bag and column that may be hidden.
    p : float
        Fraction of them that is hidden.
    sampling : {"fixed", "bernoulli"}
        Exactly ⌊k p⌋, or each with probability p.
    """

    def __init__(self, k: int, p: float, sampling: Sampling) -> None:
        super().__init__()
        self.k, self.p, self.sampling = k, p, sampling

    def forward(self, scores: Tensor, bags: PackedBags) -> Tensor:
        """Return the scores (N, H), hidden ones replaced by -inf; at least one of a bag stays."""
        if not self.training or self.k == 0 or self.p == 0:
            return scores
        return scores.masked_fill(self.hidden(scores, bags), float("-inf"))

    def hidden(self, scores: Tensor, bags: PackedBags) -> Tensor:
        """Draw which scores are hidden, (N, H) bool."""
        drawn = torch.rand(scores.shape, device=scores.device)
        top = segment_topk_mask(scores, bags.cu_seqlens, self.k)
        fixed = self.sampling == "fixed"
        wanted = top if fixed else top & (drawn < self.p)
        share = self.p if fixed else 1.0
        most = [max(0, min(int(min(self.k, length) * share), length - 1)) for length in bags.lengths]
        priority = torch.where(wanted, drawn, -1.0)
        return wanted & segment_topk_mask(priority, bags.cu_seqlens, torch.tensor(most))


@LOSS_TERMS.register("acmil_branches")
class AcmilBranches(LossTerm):
    """The task's loss on each branch, equation 5; mean over branches and bags, 0 for a single branch."""

    requires = AcmilOutput

    def __init__(self, model: Aggregator, task: Task) -> None:
        super().__init__(model, task)
        self.task = task

    def forward(self, output: AggregatorOutput, bags: PackedBags, target: Tensor) -> Tensor:
        """Return the loss, a scalar."""
        assert isinstance(output, AcmilOutput)  # checked when built
        branches = output.branch_logits.unbind(1)
        if len(branches) == 1:
            return output.logits.new_zeros(())
        return torch.stack([self.task.loss(logits, target) for logits in branches]).mean()


@LOSS_TERMS.register("acmil_diversity")
class AcmilDiversity(LossTerm):
    """Mean cosine between the attention weights of branches, equation 5; mean over pairs, heads and bags."""

    requires = AcmilOutput

    def forward(self, output: AggregatorOutput, bags: PackedBags, target: Tensor) -> Tensor:
        """Return the loss, a scalar from 0 to 1; 0 for a single branch."""
        assert isinstance(output, AcmilOutput)  # checked when built
        branches = output.branch_logits.shape[1]
        if branches == 1:
            return output.logits.new_zeros(())
        weights = segment_softmax(output.scores, bags.cu_seqlens)
        products = segment_pool(weights, weights, bags.cu_seqlens)  # (B, M * H, M * H)
        products = torch.unflatten(torch.unflatten(products, 2, (branches, -1)), 1, (branches, -1))
        products = products.diagonal(dim1=2, dim2=4)  # (B, M, M, H)
        norms = products.diagonal(dim1=1, dim2=2).clamp_min(1e-16).sqrt()  # (B, H, M); an empty bag has none
        cosines = products.permute(0, 3, 1, 2) / (norms[..., :, None] * norms[..., None, :])
        first, second = torch.triu_indices(branches, branches, 1, device=cosines.device)
        diversity: Tensor = cosines[..., first, second].mean()
        return diversity


def default_width(in_dim: int) -> int:
    """Return the width E that the authors give features of width D, in steps of 32 where they give none."""
    return max(128, 32 * round(in_dim / 64)) if in_dim != 384 else 128


def _recipe(aggregator: str) -> Recipe:
    return Recipe(
        aggregator=Component(name=aggregator),
        terms=(Term(name="acmil_branches"), Term(name="acmil_diversity")),
        training=Training(
            optimizer="adamw", lr=1e-4, weight_decay=1e-5, epochs=50, patience=0, schedule="cosine", select="metric"
        ),
    )


def _read_common(taker: Taker, branches: int) -> Tensors:
    embed = {"embed.0.weight": taker.take("dimreduction.fc1.weight", None, None)}
    width = len(embed["embed.0.weight"])
    slide = taker.linear("Slide_classifier.fc", "classifier", None, width)
    outputs = len(slide["classifier.weight"])
    return embed | slide | taker.stack("classifier.*.fc", "branch_classifier", branches, outputs, width)


def _read_gated(taker: Taker) -> Found:
    branches = taker.count(r"classifier\.\d+\.fc\.weight")
    tensors = _read_common(taker, branches)
    width = len(tensors["embed.0.weight"])
    blocks = taker.numbers(r"dimreduction\.resBlocks\.(\d+)\.block\.0\.weight")
    for block in blocks:
        for place, new in ((0, "first"), (2, "second")):
            weight = taker.take(f"dimreduction.resBlocks.{block}.block.{place}.weight", width, width)
            tensors[f"embed.{2 + block}.{new}.weight"] = weight  # behind the linear layer and its activation
    tensors |= taker.attention(*_GATE, width, heads=branches)
    options = {
        "width": width,
        "residual_blocks": len(blocks),
        "hidden": len(tensors["attention.V.weight"]),
        "branches": branches,
    }
    return Found("ACMIL", Component(name="acmil", options=options), tensors)


def _read_heads(taker: Taker) -> Found:
    queries = taker.take("q", 1, None, None)[0]
    branches, width = queries.shape
    tensors = _read_common(taker, branches) | {"queries": queries}
    parts = {"q_proj": "query", "k_proj": "key", "v_proj": "read.value", "out_proj": "read.out"}
    for old, new in parts.items():
        tensors |= taker.stack(f"sub_attention.*.{old}", new, branches, width, width)
    for part, new in (("weight", "scale"), ("bias", "shift")):
        norms = [taker.take(f"sub_attention.{branch}.layer_norm.{part}", width) for branch in range(branches)]
        tensors |= {f"read.{new}": torch.stack(norms)} | _own(taker, "bag_attention.layer_norm", part, new, width)
    for old, new in (("v_proj", "value"), ("out_proj", "out")):
        layer = taker.linear(f"bag_attention.{old}", f"read_bag.{new}", width, width)
        tensors |= {name: value[None] for name, value in layer.items()}
    for unused in [name for name in taker.rest if re.match(r"bag_attention\.[qk]_proj\.", name)]:
        del taker.rest[unused]  # the bag takes its weights from the branches
    return Found("ACMIL", Component(name="acmil_mha", options={"width": width, "branches": branches}), tensors)


def _own(taker: Taker, old: str, part: str, new: str, width: int) -> Tensors:
    return {f"read_bag.{new}": taker.take(f"{old}.{part}", width)[None]}


def _read_plain(taker: Taker) -> Found:
    """Read the ABMIL of ACMIL and AEM, which is another network than their own with one branch."""
    embed = taker.take("dimreduction.fc1.weight", None, None)
    tensors = {"embed.0.weight": embed} | taker.attention(*_GATE, len(embed))
    tensors |= taker.head("classifier.fc", "classifier", len(embed))
    options = {"embed_dims": (len(embed),), "embed_bias": False, "hidden": len(tensors["attention.V.weight"])}
    return Found("ABMIL of ACMIL", Component(name="abmil", options=options), tensors)


def _read_single(taker: Taker) -> Found:
    """Read MHA of ACMIL and AEM: ours with one branch, whose reading of the bag is that of the branch."""
    queries = taker.take("q", 1, 1, None)[0]
    width = queries.shape[1]
    tensors = {"queries": queries, "embed.0.weight": taker.take("dimreduction.fc1.weight", width, None)}
    for old, new in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "read.value"), ("out_proj", "read.out")):
        tensors |= {name: one[None] for name, one in taker.linear(f"attention.{old}", new, width, width).items()}
    for part, new in (("weight", "scale"), ("bias", "shift")):
        tensors[f"read.{new}"] = taker.take(f"attention.layer_norm.{part}", width)[None]
    tensors |= {name.replace("read.", "read_bag."): one for name, one in tensors.items() if name.startswith("read.")}
    last = taker.linear("classifier.fc", "classifier", None, width)
    tensors |= last | {f"branch_{name}": one[None] for name, one in last.items()}
    return Found("MHA of ACMIL", Component(name="acmil_mha", options={"width": width, "branches": 1}), tensors)


_GATE = ("attention.attention_V.0", "attention.attention_U.0", "attention.attention_weights")
_MARK = r"dimreduction\.fc1\.weight"
LAYOUTS.add("ACMIL", Layout((_MARK, r"attention\.attention_V\.0\.weight"), _read_gated))
LAYOUTS.add(
    "ABMIL of ACMIL",
    Layout((_MARK, r"attention\.attention_V\.0\.weight", r"classifier\.fc\.(weight|bias)"), _read_plain),
)
LAYOUTS.add("MHA of ACMIL", Layout((_MARK, r"q", r"attention\.q_proj\..*"), _read_single))
LAYOUTS.add("ACMIL with heads", Layout((_MARK, r"sub_attention\..*"), _read_heads))

# ACMIL's own ABMIL; it halves the width of the features, and 512 is that of 1,024.
RECIPES.add(
    "abmil_acmil",
    Recipe(aggregator=Component(name="abmil", options={"hidden": 128, "embed_bias": False, "dropout": 0.0})),
)
RECIPE = _recipe("acmil")
RECIPES.add("acmil", RECIPE)
RECIPES.add("acmil_mha", _recipe("acmil_mha"))
