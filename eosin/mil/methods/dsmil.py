"""DSMIL: every instance is compared with the critical instance of each class.

Li, Li, Eliceiri: Dual-stream multiple instance learning network for whole slide image classification with
self-supervised contrastive learning, CVPR 2021, https://arxiv.org/abs/2011.08939.

1. Instance stream: ``c = W_i x + b`` (N, K); the critical instance of class k is ``m_k = argmax_n c_nk`` in the bag.
2. Bag stream: ``q(x) = tanh(W_2 relu(W_1 x))`` (one linear layer when not `nonlinear`), ``a_nk = softmax_n(q(x_n) ·
   q(x_{m_k}) / √A)``, ``z_k = Σ_n a_nk v(x_n)`` with v the identity or, with `passing_v`, ``relu(W_v dropout(x))``.
3. ``logits = Σ_k W_k z_k + b``: every output sees the rows of all classes.
4. Objective ``½ loss(bag logits) + ½ loss(max_n c)``, the second half being the term `dsmil_max`.
5. With ``prediction="mean"`` the logits are ``½ (bag logits + max_n c)``, in training and at inference, and the term is
   left out: the form of MHIM-MIL version 2.

Deviations from the authors' code. Of tied critical instances the first is taken, where the code's sort is unstable.
Both halves of the objective are the task's own loss: their sigmoid cross-entropy for a multi-label or binary task,
softmax cross-entropy for a classification. Weights start orthogonal with zero bias as in the training script, in the
recipe both classifiers at zero: unit rows read features of unit deviation, so that a fresh model has logits of several
units in a random direction, which a short training does not get rid of. The learning rate falls to 0, the code's to
5e-6. The code's `average` takes the mean of the two probabilities, and at inference alone. The variants inside MHIM-MIL
and PackMIL, which embed first and pool a projection, are in the files of these.

Scores lie between -√A and √A, since queries do between -1 and 1. The gradient of the instance stream reaches one
instance per bag and class, so that which instance is critical at the start can decide whether a rare signal is found
(docs/methods.md).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from typing_extensions import override

from eosin.kernels import attention_pool, segment_max, segment_pool, segment_topk_mask
from eosin.mil._attention import bag_product
from eosin.mil._closed_forms import PooledBag, linear_terms
from eosin.mil._layers import Activation, activation, as_dtype, embedding, initialise
from eosin.mil._recipe import RECIPES, Component, Recipe, Term, Training
from eosin.mil._reevaluation import ForwardBag
from eosin.mil.bags import PackedBags
from eosin.mil.layouts import LAYOUTS, Found, Layout, Taker, Tensors, without_merging
from eosin.mil.options import Count, Dropout
from eosin.mil.slots import (
    AGGREGATORS,
    LOSS_TERMS,
    Aggregator,
    AggregatorOutput,
    AttentionOutput,
    LossTerm,
    class_names,
)
from eosin.mil.subsets import Floats, Indices, Subsets, as_array
from eosin.mil.task import Task


@dataclass(frozen=True, eq=False)
class DsmilOutput(AttentionOutput):
    """Output of DSMIL: scores have a column per class.

    Attributes
    ----------
    instance_logits : (N, K) float
        Of the instance stream.
    """

    instance_logits: Tensor


@AGGREGATORS.register("dsmil")
class Dsmil(Aggregator):
    """Attention by similarity to the critical instances, equations 1 to 3.

    Parameters
    ----------
    in_dim, n_outputs
        Feature width D and logits K.
    embed_dims : tuple of int
        Widths of layers before both streams; none uses the features as they are.
    embed_activation, dropout
        Of those layers.
    hidden : int
        Width A of the query.
    nonlinear : bool
        Two query layers instead of one.
    passing_v : bool
        Pool a learned projection instead of the instances.
    value_activation, value_dropout
        After and before that projection.
    row_norm : bool
        A layer norm on the pooled row of each class, as MIL-Lab has it.
    prediction : {"bag", "mean"}
        Logits of the bag stream, or the mean of both streams, equation 5.
    init : {"orthogonal", "zero_heads", "default", "xavier"}
        Initial weights, with `zero_heads` orthogonal but for both classifiers; biases are zero except with torch's
        default.
    """

    output_type = DsmilOutput

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        *,
        embed_dims: tuple[Count, ...] = (),
        embed_activation: Activation = "relu",
        dropout: Dropout = 0.0,
        hidden: Count = 128,
        nonlinear: bool = True,
        passing_v: bool = False,
        value_activation: Activation = "relu",
        value_dropout: Dropout = 0.0,
        row_norm: bool = False,
        prediction: Literal["bag", "mean"] = "bag",
        init: Literal["orthogonal", "zero_heads", "default", "xavier"] = "orthogonal",
    ) -> None:
        width = (in_dim, *embed_dims)[-1]
        super().__init__(in_dim, n_outputs, embed_dim=n_outputs * width)
        self.prediction = prediction
        self.embed = embedding(in_dim, embed_dims, activation=embed_activation, dropout=dropout)
        self.instance_classifier = nn.Linear(width, n_outputs)
        second = [nn.ReLU(), nn.Linear(hidden, hidden), nn.Tanh()] if nonlinear else []
        self.query = nn.Sequential(nn.Linear(width, hidden), *second)
        value = [nn.Dropout(value_dropout), nn.Linear(width, width), activation(value_activation)] if passing_v else []
        self.value = nn.Sequential(*value)
        self.norm = nn.LayerNorm(width) if row_norm else None
        self.classifier = nn.Linear(n_outputs * width, n_outputs)
        if init in ("default", "xavier"):
            initialise(self, init)
        else:
            self.apply(_orthogonal)
        if init == "zero_heads":
            for head in (self.instance_classifier, self.classifier):
                nn.init.zeros_(head.weight)

    def forward(self, bags: PackedBags) -> DsmilOutput:
        """Return logits, bag rows, scores, pooled instances and instance logits."""
        return self.aggregate(bags.with_values(self.embed(bags.values)))

    def aggregate(self, bags: PackedBags) -> DsmilOutput:
        """Return the output for bags of embedded instances."""
        instance_logits = self.instance_classifier(bags.values)  # (N, K)
        query = self.query(bags.values)  # (N, A)
        critical = segment_topk_mask(instance_logits, bags.cu_seqlens, 1).to(query.dtype)  # one 1 per bag and class
        key = segment_pool(critical, query, bags.cu_seqlens).to(query.dtype)  # (B, K, A)
        scores = bag_product(query, key, bags.lengths) * query.shape[1] ** -0.5
        values = self.value(bags.values)
        rows, _, _ = attention_pool(scores, values, bags.cu_seqlens)
        rows = as_dtype(rows, self.classifier.weight)
        bag = (rows if self.norm is None else self.norm(rows)).flatten(1)  # (B, K * E)
        logits = self.classifier(bag)
        if self.prediction == "mean":
            logits = (logits + segment_max(instance_logits, bags.cu_seqlens)) / 2
        return DsmilOutput(logits, bag, scores, values, instance_logits)

    @override
    def readout(self, bags: PackedBags, output: AggregatorOutput) -> "CriticalBag | None":
        if self.norm is not None:
            return None
        assert isinstance(output, DsmilOutput)  # what the model declares
        share = 0.5 if self.prediction == "mean" else 1.0  # of the bag stream in the logits, equation 5
        weights = self.classifier.weight.view(self.n_outputs, self.n_outputs, -1)  # (K, H, E)
        terms = share * linear_terms("ne,khe->nhk", output.instances, weights)
        pooled = PooledBag(as_array(output.scores), terms, share * as_array(self.classifier.bias))
        own = as_array(output.instance_logits)
        critical = own.argmax(axis=0) if len(own) else np.zeros(0, dtype=np.int64)
        rows = np.arange(len(own))
        return CriticalBag(pooled, ForwardBag(self, bags), critical, rows, (1 - share) * own)

    @override
    def branches(self, weights: Tensor, classes: Sequence[str]) -> dict[str, Tensor]:
        return dict(zip(class_names(weights.shape[1], classes), weights.unbind(1), strict=True))


@dataclass(frozen=True, eq=False)
class CriticalBag(Subsets):
    """A bag of DSMIL: softmax pooling whose scores hang on one critical instance per class.

    Sets that leave the critical instances in place follow from the sums; the others are forward passes, at most one per
    class when single instances are asked about.

    Parameters
    ----------
    pooled : PooledBag
        The bag stream's part of the logits, with scores against the critical instances.
    again : ForwardBag
        The bag that this one was selected from.
    critical : (K,) int64
        The instance of each class that all others are compared with.
    rows : (n,) int64
        Rows of this bag's instances in `again`.
    own : (n, K) float64
        The instance stream's part of the logits, of which the largest of each class counts; zeros where it has none.
    """

    pooled: PooledBag
    again: ForwardBag
    critical: Indices
    rows: Indices
    own: Floats

    how = (
        "All numbers are exact: predictions follow from the sums of the model's softmax pooling, and the model was run "
        "again where a tile is taken that it compares all others with"
    )

    @property
    @override
    def n_instances(self) -> int:
        return self.pooled.n_instances

    @property
    @override
    def instant(self) -> bool:
        return False  # sets without a critical instance run the model

    def _largest(self) -> Floats:
        return np.asarray(self.own.max(axis=0)) if len(self.own) else np.zeros(self.own.shape[1])

    @override
    def logits(self) -> Floats:
        return self.pooled.logits() + self._largest()

    @override
    def keep_only(self, index: ArrayLike) -> Floats:
        if np.isin(self.critical, index).all():
            return self.pooled.keep_only(index) + self._largest()
        return self.again.keep_only(self.rows[np.asarray(index, dtype=np.int64)])

    @override
    def select(self, index: Indices) -> Self:
        # in ascending order
        kept = np.unique(index)
        if np.isin(self.critical, kept).all():
            critical = np.searchsorted(kept, self.critical)
            return replace(
                self, pooled=self.pooled.select(kept), critical=critical, rows=self.rows[kept], own=self.own[kept]
            )
        return self._anew(self.again.select(self.rows[kept]))

    @override
    def join(self, donor: Self) -> Self:
        return self._anew(self.again.select(self.rows).join(donor.again.select(donor.rows)))

    def _anew(self, again: ForwardBag) -> Self:
        """Return the bag of instances that have other critical ones among them."""
        with torch.no_grad():
            form = again.model.readout(again.pack, again.model(again.pack))
        assert isinstance(form, CriticalBag)  # the model is DSMIL
        wide = form.with_zero_logit() if again.wide else form
        return replace(self, **vars(wide))

    @override
    def with_zero_logit(self) -> Self:
        own = np.concatenate([np.zeros_like(self.own), self.own], axis=1)
        return replace(self, pooled=self.pooled.with_zero_logit(), again=self.again.with_zero_logit(), own=own)

    @override
    def leave_one_out(self) -> Floats:
        changes = self.pooled.leave_one_out()
        critical = np.unique(self.critical)
        changes[critical] = np.stack([self.remove([instance]) for instance in critical]) - self.logits()
        return changes

    @override
    def only_one(self) -> Floats:
        # alone, an instance is critical for every class: its weights are 1 whatever its scores
        return self.pooled.only_one() + self.own

    @override
    def log_weight_gradient(self) -> Floats:
        # the critical instances are held fixed
        return self.pooled.log_weight_gradient()


@LOSS_TERMS.register("dsmil_max")
class DsmilMax(LossTerm):
    """The task's loss on the largest instance logit of each class, equation 4; mean over bags."""

    requires = DsmilOutput

    def __init__(self, model: Aggregator, task: Task) -> None:
        super().__init__(model, task)
        self.task = task

    def forward(self, output: AggregatorOutput, bags: PackedBags, target: Tensor) -> Tensor:
        """Return the loss, a scalar; the logits of an empty bag count as 0."""
        assert isinstance(output, DsmilOutput)  # checked when built
        return self.task.loss(segment_max(output.instance_logits, bags.cu_seqlens), target)


def _orthogonal(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.orthogonal_(module.weight)
        nn.init.zeros_(module.bias)


def read_streams(taker: Taker, instance: str, stream: str, *, bias: bool = True) -> tuple[Tensors, dict[str, object]]:
    """Return the tensors of both streams below these names, and the options of their sizes."""
    nonlinear = taker.has(re.escape(stream) + r"\.q\.0\.weight")
    tensors = taker.linear(f"{stream}.q.0" if nonlinear else f"{stream}.q", "query.0", bias=bias)
    hidden, width = tensors["query.0.weight"].shape
    tensors |= taker.linear(f"{stream}.q.2", "query.2", hidden, hidden) if nonlinear else {}
    tensors |= taker.head(instance, "instance_classifier", width)
    passing = taker.has(re.escape(stream) + r"\.v\.1\.weight")
    tensors |= taker.linear(f"{stream}.v.1", "value.1", width, width, bias=bias) if passing else {}
    if taker.has(re.escape(stream) + r"\.fcc\..*"):  # a convolution over the rows of all classes
        bag = taker.take(f"{stream}.fcc.weight", None, None, width)
        tensors |= {"classifier.weight": bag.flatten(1), "classifier.bias": taker.take(f"{stream}.fcc.bias", len(bag))}
    return tensors, {"hidden": hidden, "nonlinear": nonlinear, "passing_v": passing}


def _read(taker: Taker) -> Found:
    instance = "i_classifier.fc.0" if taker.has(r"i_classifier\.fc\.0\..*") else "i_classifier.fc"
    tensors, options = read_streams(taker, instance, "b_classifier")
    return Found("DSMIL", Component(name="dsmil", options=options), tensors, reads_features="query.0.weight")


def _read_millab(taker: Taker) -> Found:
    """Read MIL-Lab's DSMIL, whose convolution `fcc` for three classes is never called."""
    tensors, widths = taker.embedding("patch_embed")
    width = widths[-1]
    for unused in [name for name in taker.rest if name.startswith("b_classifier.fcc.")]:
        del taker.rest[unused]
    streams, options = read_streams(taker, "i_classifier.inst_classifier", "b_classifier")
    tensors |= streams | taker.norm("b_classifier.norm", "norm", width)
    if taker.has(r"classifier\..*"):
        bag = taker.take("classifier.weight", None, None, width)
        tensors |= {"classifier.weight": bag.flatten(1), "classifier.bias": taker.take("classifier.bias", len(bag))}
    options |= {"embed_dims": tuple(widths), "value_activation": "none", "row_norm": True, "prediction": "mean"}
    return Found("MIL-Lab's DSMIL", Component(name="dsmil", options=options), tensors)


def _read_torchmil(taker: Taker) -> Found:
    embedded = taker.has(r"feat_ext\..*")
    said = {"embed_activation": taker.ask("embed_activation", "relu", "gelu", "none")} if embedded else {}
    tensors, widths = taker.embedding("feat_ext") if embedded else ({}, [])
    nonlinear, passing = taker.has(r"q_nn\.0\..*"), taker.has(r"v_nn\..*")
    query = taker.linear("q_nn.0" if nonlinear else "q_nn", "query.0", None, widths[-1] if widths else None)
    hidden, width = query["query.0.weight"].shape
    tensors |= query | (taker.linear("q_nn.2", "query.2", hidden, hidden) if nonlinear else {})
    tensors |= taker.linear("v_nn.1", "value.1", width, width) if passing else {}
    tensors |= taker.linear("inst_classifier", "instance_classifier", 1, width)
    tensors |= taker.linear("bag_classifier", "classifier", 1, width)
    options = {"embed_dims": tuple(widths), "hidden": hidden, "nonlinear": nonlinear, "passing_v": passing}
    first = "embed.0.weight" if embedded else "query.0.weight"
    return Found("torchmil's DSMIL", Component(name="dsmil", options=options | said), tensors, reads_features=first)


def _read_mhim(taker: Taker) -> Found:
    """Read DSMIL inside MHIM-MIL, which predicts with the mean of both streams, and as MHIM-MIL compares with it."""
    inside = taker.has(r"online_encoder\..*")
    activation = taker.ask("embed_activation", "relu", "gelu", "none")
    if taker.has(r"merge\..*"):
        without_merging(taker)
    for unused in [name for name in taker.rest if inside and name.startswith("predictor.")]:
        del taker.rest[unused]
    before = "online_encoder." if inside else ""
    tensors, widths = taker.embedding("feature")
    instance = f"{before}i_classifier.0" if inside else "i_classifier"
    streams, options = read_streams(taker, instance, f"{before}b_classifier")
    options |= {"embed_dims": tuple(widths), "embed_activation": activation, "prediction": "mean" if inside else "bag"}
    return Found("DSMIL of MHIM-MIL or PackMIL", Component(name="dsmil", options=options), tensors | streams)


LAYOUTS.add("DSMIL of MHIM-MIL", Layout((r"feature\..*", r"(online_encoder\.)?b_classifier\..*"), _read_mhim))
LAYOUTS.add("MIL-Lab DSMIL", Layout((r"patch_embed\.0\.weight", r"b_classifier\..*"), _read_millab))
LAYOUTS.add("torchmil DSMIL", Layout((r"q_nn\..*", r"inst_classifier\..*", r"bag_classifier\..*"), _read_torchmil))
LAYOUTS.add("DSMIL", Layout((r"b_classifier\..*",), _read))

RECIPE = Recipe(
    aggregator=Component(name="dsmil", options={"init": "zero_heads"}),
    terms=(Term(name="dsmil_max", weight=0.5),),
    bag_weight=0.5,
    training=Training(optimizer="adam", lr=1e-4, betas=(0.5, 0.9), weight_decay=1e-3, epochs=50, schedule="cosine"),
)
RECIPES.add("dsmil", RECIPE)
