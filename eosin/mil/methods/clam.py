"""CLAM: attention pooling whose most and least attended instances are also separated.

Lu, Williamson, Chen, Chen, Barbieri, Mahmood: Data-efficient and weakly supervised computational pathology on
whole-slide images, Nature Biomedical Engineering 2021, https://doi.org/10.1038/s41551-020-00682-w.

1. ``h = dropout(relu(W x + b))``; ``s = gated attention of h``; ``a = softmax(s)`` within the bag.
2. Single branch (`clam_sb`): one attention row, ``z = Σ a h``, ``logits = W_c z + b_c``.
3. Several branches (`clam_mb`): one attention row per class, ``logit_c = w_c · z_c + b_c``.
4. Instance term (`clam_instance`), class c with its own head ``H_c`` of two outputs, k instances each: the k most
   attended get target 1 and the k least attended target 0 if c is the bag's class. Otherwise, and only when the
   classes exclude each other (`subtyping`), the k most attended get target 0. Mean over the instances, sum over
   classes, divided by the number of classes when `subtyping`.
5. Objective ``0.7 · bag + 0.3 · instance``. The ranking has no gradient, the embedded instances do.

Deviations from the authors' code. A bag of fewer than 2k instances uses ⌊n/2⌋ for k, where the code fails or puts an
instance into both groups. Gate dropout has its own probability; the code's is 0.25 whatever non-zero value is given.
Logits keep the dtype of the model. The instance loss is the mean over the bags of a pack; the code trains on one bag
at a time. The default loss is the code's cross-entropy; `svm` is the smooth top-1 hinge of the paper.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from eosin.kernels import segment_softmax, segment_topk_mask
from eosin.mil._closed_forms import PooledBag, linear_terms
from eosin.mil._layers import Attention, Init, as_dtype, embedding, initialise
from eosin.mil._recipe import RECIPES, Component, Recipe, Term, Training
from eosin.mil.bags import PackedBags
from eosin.mil.layouts import LAYOUTS, Found, Layout, Meaning, Taker, Tensors
from eosin.mil.options import Count, Dropout, NotNegative, Positive
from eosin.mil.slots import (
    AGGREGATORS,
    LOSS_TERMS,
    Aggregator,
    AggregatorOutput,
    AttentionOutput,
    LossTerm,
    class_names,
    instance_width,
)
from eosin.mil.subsets import as_array
from eosin.mil.task import Task, require_classes


class ClassAttentionOutput(AttentionOutput):
    """Attention whose columns belong to the model's outputs: scores (N, K)."""

    own_columns = True


class _Clam(Aggregator):
    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        *,
        width: int,
        embed_layers: int,
        branches: int,
        hidden: int,
        gated: bool,
        dropout: float,
        gate_dropout: float,
    ) -> None:
        super().__init__(in_dim, n_outputs, embed_dim=branches * width)
        self.embed = embedding(in_dim, (width,) * embed_layers, dropout=dropout)
        self.attention = Attention(width, hidden=hidden, heads=branches, gated=gated, gate_dropout=gate_dropout)

    def forward(self, bags: PackedBags) -> AttentionOutput:
        """Return logits, bag embeddings, scores and instances."""
        return self.aggregate(bags.with_values(self.embed(bags.values)))

    def aggregate(self, bags: PackedBags) -> AttentionOutput:
        """Return the output for bags of embedded instances."""
        raise NotImplementedError


@AGGREGATORS.register("clam_sb")
class ClamSingleBranch(_Clam):
    """CLAM with one attention row, equations 1 and 2.

    Parameters
    ----------
    in_dim, n_outputs
        Feature width D and logits K.
    width, embed_layers : int
        Width E of an embedded instance, and layers of that width before the attention; the authors have one.
    hidden : int
        Width of the attention's hidden layer: 256 is the authors' "small", 384 their "big".
    gated : bool
        Whether the attention has a gate.
    dropout, gate_dropout : float
        After the embedding and on the hidden layer of the attention, both factors of a gate.
    init : {"default", "xavier"}
        torch's initial weights, or Xavier normal with zero bias as in older releases.
    """

    output_type = AttentionOutput

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        *,
        width: Count = 512,
        embed_layers: Count = 1,
        hidden: Count = 256,
        gated: bool = True,
        dropout: Dropout = 0.25,
        gate_dropout: Dropout = 0.25,
        init: Init = "default",
    ) -> None:
        super().__init__(
            in_dim,
            n_outputs,
            width=width,
            embed_layers=embed_layers,
            branches=1,
            hidden=hidden,
            gated=gated,
            dropout=dropout,
            gate_dropout=gate_dropout,
        )
        self.classifier = nn.Linear(width, n_outputs)
        initialise(self, init)

    def aggregate(self, bags: PackedBags) -> AttentionOutput:
        """Return the output for bags of embedded instances."""
        pool = self.attention.pool(bags.values, bags)
        bag = as_dtype(pool.pooled[:, 0], self.classifier.weight)  # (B, E)
        return AttentionOutput(self.classifier(bag), bag, pool.scores, bags.values)

    @override
    def readout(self, bags: PackedBags, output: AggregatorOutput) -> PooledBag:
        assert isinstance(output, AttentionOutput)  # what the model declares
        terms = linear_terms("ne,ke->nk", output.instances, self.classifier.weight)[:, None]
        return PooledBag(as_array(output.scores), terms, as_array(self.classifier.bias))


@AGGREGATORS.register("clam_mb")
class ClamMultiBranch(_Clam):
    """CLAM with one attention row and one linear layer per class, equations 1 and 3.

    Parameters
    ----------
    in_dim, n_outputs, width, embed_layers, hidden, gated, dropout, gate_dropout, init
        As `ClamSingleBranch`.
    """

    output_type = ClassAttentionOutput

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        *,
        width: Count = 512,
        embed_layers: Count = 1,
        hidden: Count = 256,
        gated: bool = True,
        dropout: Dropout = 0.25,
        gate_dropout: Dropout = 0.25,
        init: Init = "default",
    ) -> None:
        super().__init__(
            in_dim,
            n_outputs,
            width=width,
            embed_layers=embed_layers,
            branches=n_outputs,
            hidden=hidden,
            gated=gated,
            dropout=dropout,
            gate_dropout=gate_dropout,
        )
        self.classifier = nn.Linear(width, n_outputs)  # row c is the layer of class c
        initialise(self, init)

    def aggregate(self, bags: PackedBags) -> ClassAttentionOutput:
        """Return the output for bags of embedded instances."""
        pool = self.attention.pool(bags.values, bags)
        weight, bias = self.classifier.weight, self.classifier.bias
        branches = as_dtype(pool.pooled, weight)  # (B, K, E)
        logits = (branches * weight).sum(2) + bias
        return ClassAttentionOutput(logits, branches.flatten(1), pool.scores, bags.values)

    @override
    def readout(self, bags: PackedBags, output: AggregatorOutput) -> PooledBag:
        assert isinstance(output, AttentionOutput)  # what the model declares
        own = linear_terms("ne,ke->nk", output.instances, self.classifier.weight)
        terms = own[:, :, None] * np.eye(own.shape[1])  # a branch adds to its own class only
        return PooledBag(as_array(output.scores), terms, as_array(self.classifier.bias))

    @override
    def branches(self, weights: Tensor, classes: Sequence[str]) -> dict[str, Tensor]:
        return dict(zip(class_names(weights.shape[1], classes), weights.unbind(1), strict=True))


@LOSS_TERMS.register("clam_instance")
class ClamInstance(LossTerm):
    """Clustering of the most and least attended instances, equation 4; mean over bags.

    The rows that rank are the model's attention row of each class if it has one per class, else the mean of the rows.

    Parameters
    ----------
    model : Aggregator
    task : Task
        Must have classes.
    k : int
        Instances at either end of the ranking.
    subtyping : bool
        The classes exclude each other, so that the instances a wrong class attends to are negative.
    loss : {"cross_entropy", "svm"}
    tau, margin : float
        Temperature and margin of the hinge.
    """

    requires = AttentionOutput

    def __init__(
        self,
        model: Aggregator,
        task: Task,
        *,
        k: Count = 8,
        subtyping: bool = False,
        loss: Literal["cross_entropy", "svm"] = "cross_entropy",
        tau: Positive = 1.0,
        margin: NotNegative = 1.0,
    ) -> None:
        super().__init__(model, task)
        require_classes(task, "clam_instance")
        self.task = task
        self.k = k
        self.subtyping = subtyping
        self.loss = loss
        self.tau = tau
        self.margin = margin
        width = instance_width(model)
        self.weight = nn.Parameter(torch.empty(task.n_outputs, 2, width))
        self.bias = nn.Parameter(torch.empty(task.n_outputs, 2))
        for parameter in (self.weight, self.bias):
            nn.init.uniform_(parameter, -(width**-0.5), width**-0.5)  # as nn.Linear

    def forward(self, output: AggregatorOutput, bags: PackedBags, target: Tensor) -> Tensor:
        """Return the loss, a scalar; 0 when no bag has two instances."""
        assert isinstance(output, AttentionOutput)  # checked when built
        member = self.task.memberships(target) > 0  # (B, K)
        ranks = self._ranking(output, bags)  # (N, 1 or K)
        counts = tuple(min(self.k, length // 2) for length in bags.lengths)
        bag, top = self._losses(output.instances, ranks, bags, counts, largest=True)  # (T,), (K, T, 2)
        _, low = self._losses(output.instances, ranks, bags, counts, largest=False)
        true = member[bag].T  # (K, T)
        count = torch.tensor(counts, device=bag.device)[bag]
        losses = torch.where(true, (top[..., 1] + low[..., 0]) / 2, float(self.subtyping) * top[..., 0]) / count
        scale = member.shape[1] if self.subtyping else 1
        return losses.sum() / (bags.n_bags * scale)

    def _ranking(self, output: AttentionOutput, bags: PackedBags) -> Tensor:
        scores = output.scores.detach()
        if output.own_columns or scores.shape[1] == 1:
            return scores
        return segment_softmax(scores, bags.cu_seqlens).mean(1, keepdim=True)

    def _losses(
        self, instances: Tensor, ranks: Tensor, bags: PackedBags, counts: tuple[int, ...], *, largest: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the bags of the T chosen instances and their losses for either target, (K, T, 2)."""
        k = torch.tensor(counts)
        chosen = segment_topk_mask(ranks, bags.cu_seqlens, k, largest=largest).T  # (1 or K, N)
        places = torch.nonzero_static(chosen, size=len(chosen) * sum(counts))
        rows = places[:, 1].view(len(chosen), -1).expand(len(self.weight), -1)  # (K, T)
        picked = instances[rows]  # (K, T, E)
        wide = torch.promote_types(picked.dtype, torch.float32)
        logits = torch.baddbmm(self.bias[:, None].to(wide), picked.to(wide), self.weight.mT.to(wide)).to(wide)
        bag = torch.repeat_interleave(torch.arange(bags.n_bags), k)
        return bag.to(ranks.device), self._instance_loss(logits)

    def _instance_loss(self, logits: Tensor) -> Tensor:
        """Return the loss for target 0 and for target 1 beside each other, (..., 2) -> (..., 2)."""
        if self.loss == "cross_entropy":
            return -functional.log_softmax(logits, -1)
        other = 1 - torch.eye(2, dtype=logits.dtype, device=logits.device)
        violation = logits[..., None, :] - logits[..., None] + self.margin * other
        return self.tau * (violation / self.tau).logsumexp(-1)


def _recipe(aggregator: str) -> Recipe:
    return Recipe(
        aggregator=Component(name=aggregator),
        terms=(Term(name="clam_instance", options={"k": 8, "loss": "svm"}, weight=0.3),),
        bag_weight=0.7,
        training=Training(
            optimizer="adam",
            lr=2e-4,
            weight_decay=1e-5,
            epochs=200,
            patience=20,
            min_epochs=50,
            schedule="constant",
            balance="sampling",
        ),
    )


def _read(taker: Taker) -> Found:
    tensors, widths = taker.embedding("attention_net")
    place = taker.index(r"attention_net\.(\d+)\.(?:attention_a\.)?0\.weight")
    branches = taker.count(r"classifiers\.\d+\.weight")
    tensors |= taker.attention(*taker.gate(f"attention_net.{place}."), widths[-1], heads=branches or 1)
    if branches:
        heads = taker.stack("classifiers.*", "", branches, 1, widths[-1])
        tensors |= {f"classifier{part}": torch.cat(list(heads[part])) for part in (".weight", ".bias")}
    else:
        tensors |= taker.head("classifiers", "classifier", widths[-1])
    return _found("CLAM", "clam_mb" if branches else "clam_sb", tensors, widths)


def _found(tool: str, name: str, tensors: Tensors, widths: list[int], outputs: Meaning | None = "softmax") -> Found:
    options = {
        "width": widths[-1],
        "embed_layers": len(widths),
        "hidden": len(tensors["attention.V.weight"]),
        "gated": "attention.U.weight" in tensors,
    }
    return Found(tool, Component(name=name, options=options), tensors, outputs=outputs)


def _read_millab(taker: Taker) -> Found:
    tensors, widths = taker.embedding("patch_embed")
    tensors |= taker.attention(*taker.gate("global_attn."), widths[-1])
    tensors |= taker.head("classifier", "classifier", widths[-1])
    return _found("MIL-Lab's CLAM", "clam_sb", tensors, widths, outputs=None)


LAYOUTS.add(
    "MIL-Lab CLAM",
    Layout(
        (r"patch_embed\.0\.weight", r"global_attn\..*", r"instance_classifiers\..*"),
        _read_millab,
        unused=("instance_loss_fn.", "instance_classifiers."),
    ),
)
# heads of the instance term live in the file, and serve training only
LAYOUTS.add(
    "CLAM", Layout((r"attention_net\.0\.weight",), _read, unused=("instance_loss_fn.", "instance_classifiers."))
)

RECIPE = _recipe("clam_sb")
RECIPES.add("clam_sb", RECIPE)
RECIPES.add("clam_mb", _recipe("clam_mb"))
