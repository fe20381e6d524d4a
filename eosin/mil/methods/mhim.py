"""MHIM-MIL: a moving-average teacher hides what is easy, and the student learns from the rest.

Version 1: Tang, Huang, Zhang, Zhou, Zhang, Liu: Multiple instance learning framework with masked hard instance mining
for whole slide image classification, ICCV 2023, https://arxiv.org/abs/2307.15254. Version 2: the same authors'
extension, Multiple instance learning framework with masked hard instance mining for gigapixel histopathology image
analysis, IJCV 2025.

Version 1 (`mhim`), for each bag of n instances:

1. The teacher, in training mode and without gradient, reads the whole bag: embedding F_t and attention scores (for
   DSMIL the largest instance logit instead).
2. Hidden is the union of three sets, their sizes relative to n: ⌈β_r n⌉ random instances, the ⌈β_l n⌉ lowest, and of
   the ⌈(β_h / r) n⌉ highest a random ⌈r ·⌉ ("randomly high"; all of the ⌈β_h n⌉ highest for r = 1). With several
   attention rows each row votes for its highest, the most voted count, and likewise for the lowest.
3. The student reads the instances that are left. Objective: bag loss ``+ α · (-Σ_j softmax(F_t / τ)_j log
   softmax(F_s)_j)`` over the features j of the bag embeddings; an embedding of several rows (one per class in DSMIL)
   has one softmax per row, and the mean over the rows is taken. With DSMIL the bag loss is ``½ bag + ½ maximum``.
4. After the step ``θ_t ← m θ_t + (1 - m) θ_s``. With `decay`, β_h falls to 0 by half a cosine over the training; with
   `momentum_schedule="cosine"`, m rises to 1: ``f + ½ (b - f) (1 + cos(π t / T))``.

Version 2 (`mhim_v2`):

5. Instances are ranked by ``p_n = max_c softmax_c(W (a_n h_n))``, the classifier on the weighted instance. For TransMIL
   the weighted instance is ``W_out concat_heads(a_hn v_hn)``, with attention and values of the first layer. DSMIL ranks
   as in version 1, and its one bag loss is that of the mean of its two logits.
6. The highest are hidden as in 2 with constant β_h; of the L survivors ``⌊(1 - random_mask_ratio) L⌋`` are kept at
   random, or `keep_at_least` if that is more; a bag of no more than these is left whole. The others are recycled: k
   global tokens Q read them, ``Z = out(attention(LN(Q), LN(rest)))`` with shared norm and without biases in q, k, v;
   the student reads [kept; Z]. After the step ``Q ← m_q Q + (1 - m_q) Z``. A bag that keeps few instances is given the
   first ⌊share · kept⌋ rows of Z only.

Deviations from the authors' code. `random_mask_ratio` is the fraction that is removed, 0.8; the code's `merge_ratio` is
the fraction that is kept, and its documentation contradicts it. Only the first bias of the classifier enters p in the
code, which cancels; `score_bias` adds all of them. Tokens are updated after the backward pass, not before it, from the
mean over the bags of a pack. A bag that would be hidden whole is left whole, and version 2 keeps at least one instance.
The code gives every bag all k tokens; beside a handful of kept instances the student then learns to read the class from
its tokens, which the deployed model does not see, and on whole bags it says nothing. `token_share` keeps them a
minority; it changes nothing where a bag keeps 10 k instances, and none is the code. The recipes keep at least 100
instances, for biopsies and cores: a student that sees 20 of 100 tiles misses a tumour of 3 % half of the time and
learns that it means nothing, one that sees 100 misses it once in 20; and 3 % of six instances, rounded up, are a sixth
of them. From 500 instances on it changes nothing. The student embeds only what is left, instead of embedding all and
then hiding. DSMIL predicts with the bag stream after version 1, where the code takes the mean of both probabilities.
The learning rate of version 2 falls to 0, the code's to 1e-7. Hiding uses boolean masks; there is no loop over bags.
Version 1 waits once per step for the number of instances left.

The teacher starts as the student, or with `init_from` as a model that was trained plainly, whose embedding the
student then takes too (the paper's order: `eosin train` with the recipe of the same aggregator, then with this one).
"""

import copy
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from eosin.errors import ConfigError
from eosin.kernels import bag_offsets, segment_max, segment_softmax, segment_topk_mask
from eosin.mil._attention import bag_attention
from eosin.mil._checkpoint import load_model
from eosin.mil._recipe import RECIPES, Component, Recipe, Term, Training
from eosin.mil.bags import PackedBags
from eosin.mil.layouts import LAYOUTS, Found, Layout, Taker, without_merging
from eosin.mil.options import Count, Dropout, NotNegative, Positive, Share
from eosin.mil.slots import (
    STRATEGIES,
    Aggregator,
    AttentionOutput,
    EmbeddingAggregator,
    HasInstanceLogits,
    Step,
    Strategy,
    Wrapper,
    instance_width,
)
from eosin.mil.task import Task

MomentumSchedule = Literal["constant", "cosine"]


@STRATEGIES.register("mhim")
class Mhim(Strategy):
    """Masked hard instance mining, version 1, equations 1 to 4.

    Parameters
    ----------
    model : Aggregator
        The student.
    task : Task
    random_ratio, low_ratio, high_ratio : float
        Fractions β_r, β_l and β_h of a bag that are hidden.
    high_factor : float
        r: the highest are drawn from 1 / r times as many.
    decay : bool
        β_h falls to 0.
    consistency : float
        Weight α of the consistency between the embeddings.
    temperature : float
        τ of the teacher.
    momentum : float
        m of the teacher.
    momentum_schedule : {"constant", "cosine"}
    init_from : path or None
        Folder of a plainly trained model of the same aggregator.
    """

    requires = AttentionOutput

    def __init__(
        self,
        model: Aggregator,
        task: Task,
        *,
        random_ratio: Share = 0.5,
        low_ratio: Share = 0.0,
        high_ratio: Share = 0.01,
        high_factor: Share = 0.5,
        decay: bool = True,
        consistency: NotNegative = 0.1,
        temperature: Positive = 0.1,
        momentum: Share = 0.9999,
        momentum_schedule: MomentumSchedule = "constant",
        init_from: Path | None = None,
    ) -> None:
        super().__init__(model, task)
        self.ratios = (random_ratio, low_ratio, high_ratio)
        self.high_factor = high_factor
        self.decay = decay
        self.consistency = consistency
        self.temperature = temperature
        self.teacher = started(Teacher(model, momentum=momentum, schedule=momentum_schedule), model, init_from)

    def forward(self, bags: PackedBags, target: Tensor) -> Step:
        """Hide, let the student read the rest, and compare the embeddings."""
        whole = self.teacher(bags)
        left = bags.select(~self.hidden(rankings(whole), bags))
        output = self.model(left)
        loss = consistency_loss(embedding_rows(output), embedding_rows(whole), self.temperature)
        return Step(output, left, {"consistency": self.consistency * loss})

    def hidden(self, ranks: Tensor, bags: PackedBags) -> Tensor:
        """Return which instances are hidden given their scores (N, H): (N,) bool."""
        random_ratio, low_ratio, high_ratio = self.ratios
        if self.decay:
            high_ratio = cosine(high_ratio, 0.0, self.progress)
        hidden = random_subset(bags, fraction_counts(bags, random_ratio))
        hidden |= voted(ranks, bags, fraction_counts(bags, low_ratio), largest=False)
        hidden |= randomly_high(ranks, bags, high_ratio, self.high_factor)[0]
        return hidden & leaves_some(hidden, bags)

    def after_step(self, step: Step) -> None:
        """Let the teacher follow."""
        self.teacher.follow(self.model, self.progress)


@STRATEGIES.register("mhim_v2")
class MhimV2(Strategy):
    """Masked hard instance mining, version 2, equations 5 and 6.

    Parameters
    ----------
    model : Aggregator
        The student; must embed instances one by one before it aggregates them.
    task : Task
    high_ratio, high_factor : float
        β_h and r as in version 1, constant.
    random_mask_ratio : float
        Fraction of the other instances that is taken away at random and recycled.
    keep_at_least : int
        A bag of at most so many instances is left whole, and of a longer one as many are kept whatever that fraction.
    tokens : int
        Global tokens k.
    heads, head_dim : int
        Of the tokens' attention.
    token_dropout : float
        After its output projection.
    token_momentum : float
        m_q of the tokens.
    token_share : float or None
        Most tokens of a bag, as a fraction of the instances that it keeps; none gives every bag all.
    score_bias : bool
        Add the classifier's bias in equation 5.
    consistency, temperature, momentum, momentum_schedule, init_from
        As in version 1.
    """

    requires = AttentionOutput

    def __init__(
        self,
        model: Aggregator,
        task: Task,
        *,
        high_ratio: Share = 0.03,
        high_factor: Share = 1.0,
        random_mask_ratio: Share = 0.8,
        keep_at_least: Count = 1,
        tokens: Count = 10,
        heads: Count = 8,
        head_dim: Count = 64,
        token_dropout: Dropout = 0.1,
        token_momentum: Share = 0.9999,
        token_share: Share | None = 0.1,
        score_bias: bool = False,
        consistency: NotNegative = 0.5,
        temperature: Positive = 0.1,
        momentum: Share = 0.9997,
        momentum_schedule: MomentumSchedule = "constant",
        init_from: Path | None = None,
    ) -> None:
        super().__init__(model, task)
        if not isinstance(model, EmbeddingAggregator):
            raise ConfigError(
                f"mhim_v2 adds tokens to embedded instances, which {type(model).__name__} does not accept; "
                "choose an aggregator with the methods embed and aggregate, or mhim"
            )
        require_linear_classifier(model)
        width = _embedded_width(model)
        self.high_ratio, self.high_factor = high_ratio, high_factor
        self.random_mask_ratio = random_mask_ratio
        self.keep_at_least = keep_at_least
        self.score_bias = score_bias
        self.consistency = consistency
        self.temperature = temperature
        self.recycle = GlobalRecycle(
            width,
            tokens=tokens,
            heads=heads,
            head_dim=head_dim,
            dropout=token_dropout,
            momentum=token_momentum,
            token_share=token_share,
        )
        self.teacher = started(Teacher(model, momentum=momentum, schedule=momentum_schedule), model, init_from)

    def forward(self, bags: PackedBags, target: Tensor) -> Step:
        """Hide, recycle, let the student read what is kept with the tokens, and compare the embeddings."""
        whole = self.teacher(bags)
        ranks = instance_probability(self.teacher.model, whole, bags, bias=self.score_bias)
        kept, rest, counts = self.divide(ranks, bags)
        student = self.model
        assert isinstance(student, EmbeddingAggregator)  # checked when built
        embedded = student.embed(bags.values)
        left = self.recycle(embedded, bags, kept, rest, counts)
        output = student.aggregate(left)
        loss = consistency_loss(embedding_rows(output), embedding_rows(whole), self.temperature)
        return Step(output, left, {"consistency": self.consistency * loss})

    def divide(self, ranks: Tensor, bags: PackedBags) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
        """Return which instances are kept and which recycled, (N,) bool, and how many of each bag; equation 6."""
        hidden, taken = randomly_high(ranks, bags, self.high_ratio, self.high_factor)
        share, least = 1 - self.random_mask_ratio, self.keep_at_least
        taken = [count if length > max(count, least) else 0 for count, length in zip(taken, bags.lengths, strict=True)]
        hidden = hidden & torch.tensor(taken, device=hidden.device).bool()[bags.bag_index()]
        left = [length - count for length, count in zip(bags.lengths, taken, strict=True)]
        keep = [min(count, max(least, math.floor(share * count + 1e-9))) for count in left]
        kept = random_subset(bags, keep, among=~hidden)
        counts = [(stay, survivors - stay) for stay, survivors in zip(keep, left, strict=True)]
        return kept, ~hidden & ~kept, counts

    def after_step(self, step: Step) -> None:
        """Let the teacher and the tokens follow."""
        self.teacher.follow(self.model, self.progress)
        self.recycle.follow()


def _embedded_width(model: EmbeddingAggregator) -> int:
    linear = [layer for layer in model.embed.modules() if isinstance(layer, nn.Linear)]
    assert isinstance(model, Aggregator)
    return linear[-1].out_features if linear else model.in_dim


class Teacher(nn.Module):
    """A moving average of a model, in the same mode as the student and without gradient.

    Parameters
    ----------
    model : Aggregator
    momentum : float
        m of equation 4.
    schedule : {"constant", "cosine"}
        Whether m rises to 1.
    """

    def __init__(self, model: Aggregator, *, momentum: float, schedule: MomentumSchedule) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.momentum = momentum
        self.schedule = schedule

    @torch.no_grad()
    def forward(self, bags: PackedBags) -> AttentionOutput:
        """Read whole bags."""
        output = self.model(bags)
        assert isinstance(output, AttentionOutput)  # checked when built
        return output

    @torch.no_grad()
    def follow(self, student: Aggregator, progress: float) -> None:
        """Move towards the student, equation 4; parameters only."""
        momentum = cosine(self.momentum, 1.0, progress) if self.schedule == "cosine" else self.momentum
        for mine, new in zip(self.model.parameters(), student.parameters(), strict=True):
            mine.lerp_(new.detach(), 1 - momentum)


def started(teacher: Teacher, student: Aggregator, folder: Path | None) -> Teacher:
    """Give the teacher, and the student's embedding, the weights of a plainly trained model."""
    if folder is None:
        return teacher
    plain, _ = load_model(folder)
    model = plain.inner if isinstance(plain, Wrapper) else plain
    state = model.state_dict()
    if type(model) is not type(student) or _shapes(state.items()) != _shapes(student.state_dict().items()):
        raise ConfigError(
            f"init_from {folder} holds a {type(model).__name__} of another kind or size than the "
            f"{type(student).__name__} that is trained; train a plain model with the same aggregator and options"
        )
    teacher.model.load_state_dict(state)
    embedding = {name: value for name, value in state.items() if name.startswith("embed.")}
    student.load_state_dict(embedding, strict=False)
    return teacher


def _shapes(state: Iterable[tuple[str, Tensor]]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state}


def cosine(start: float, end: float, progress: float) -> float:
    """Return the value at a fraction of half a cosine from `start` to `end`."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * progress))


def consistency_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the cross-entropy between the softmaxes of embeddings (..., E), equation 3; mean over the rows."""
    wide = torch.promote_types(student.dtype, torch.float32)
    wanted = functional.softmax(teacher.detach().to(wide) / temperature, -1)
    return -(wanted * functional.log_softmax(student.to(wide), -1)).sum(-1).mean()


def embedding_rows(output: AttentionOutput) -> Tensor:
    """Return the bag embeddings as rows of the width of an instance, (B, rows, E), or as one row each."""
    width = output.instances.shape[1]
    if output.embedding.shape[1] % width:
        return output.embedding[:, None]
    return torch.unflatten(output.embedding, 1, (-1, width))


def rankings(output: AttentionOutput) -> Tensor:
    """Return what instances are ranked by, (N, H): attention, for DSMIL the largest instance logit; equation 1.

    The attention of TransMIL may be negative, and is then ranked as it is.
    """
    return output.instance_logits.amax(1, keepdim=True) if isinstance(output, HasInstanceLogits) else output.ranks


def instance_probability(model: Aggregator, output: AttentionOutput, bags: PackedBags, *, bias: bool = False) -> Tensor:
    """Return the largest class probability of each weighted instance, (N, 1), equation 5.

    A model with one output has two classes. Several attention rows: those of CLAM-MB weigh for their class, those of
    TransMIL for their part of the values, those that the classifier reads beside each other for their part of its
    weights, others are averaged. For DSMIL it is as in version 1.
    """
    if isinstance(output, HasInstanceLogits):
        return rankings(output)
    classifier = require_linear_classifier(model)
    values = model.instance_values(output)
    if values is not None:
        logits = functional.linear(values, classifier.weight)
    else:
        weights = segment_softmax(output.scores, bags.cu_seqlens)  # (N, H)
        logits = _weighted_logits(classifier.weight, weights, output)
    if bias and classifier.bias is not None:
        logits = logits + classifier.bias
    if logits.shape[1] == 1:
        logits = functional.pad(logits, (1, 0))
    return logits.softmax(1).amax(1, keepdim=True)


def _weighted_logits(weight: Tensor, attention: Tensor, output: AttentionOutput) -> Tensor:
    instances = output.instances.to(weight.dtype)
    if output.own_columns:
        return instances @ weight.T * attention
    width = instances.shape[1]
    if weight.shape[1] == width:
        return instances @ weight.T * attention.mean(1, keepdim=True)
    by_row = torch.unflatten(weight, 1, (-1, width))  # (K, H, E)
    products = functional.linear(instances, by_row.flatten(0, 1))  # (N, K * H)
    return (torch.unflatten(products, 1, by_row.shape[:2]) * attention[:, None]).sum(2)


def require_linear_classifier(model: Aggregator) -> nn.Linear:
    """Return the layer that reads the bag embedding; `ConfigError` if it cannot read single instances."""
    classifier = getattr(model, "classifier", None)
    if not isinstance(classifier, nn.Linear) or classifier.in_features % instance_width(model):
        raise ConfigError(
            f"mhim_v2 ranks instances with the bag classifier, which {type(model).__name__} cannot apply to instances; "
            "choose another aggregator, or mhim"
        )
    return classifier


def random_subset(bags: PackedBags, counts: list[int], *, among: Tensor | None = None) -> Tensor:
    """Draw so many instances of each bag, of those in `among`: (N,) bool."""
    priority = torch.rand(bags.n_instances, 1, device=bags.values.device)
    if among is not None:
        priority = torch.where(among[:, None], priority, -1.0)
    return segment_topk_mask(priority, bags.cu_seqlens, torch.tensor(counts))[:, 0]


def voted(ranks: Tensor, bags: PackedBags, counts: list[int], *, largest: bool = True) -> Tensor:
    """Return so many instances of each bag with the most votes of the columns, earlier ones on ties: (N,) bool."""
    k = torch.tensor(counts)
    chosen = segment_topk_mask(ranks, bags.cu_seqlens, k, largest=largest)
    if chosen.shape[1] == 1:
        return chosen[:, 0]
    votes = chosen.sum(1, keepdim=True).to(torch.float32)
    return segment_topk_mask(votes, bags.cu_seqlens, k)[:, 0]


def randomly_high(ranks: Tensor, bags: PackedBags, ratio: float, factor: float) -> tuple[Tensor, list[int]]:
    """Draw a fraction of each bag from its highest, equation 2 of `mhim`: (N,) bool and how many of each bag."""
    wide = ratio / factor if factor else 0.0
    if wide > 1:
        wide, factor = 1.0, ratio
    candidates = fraction_counts(bags, wide)
    high = voted(ranks, bags, candidates)
    counts = [math.ceil(factor * count) for count in candidates]
    if factor == 1:
        return high, counts
    return random_subset(bags, counts, among=high), counts


def fraction_counts(bags: PackedBags, ratio: float) -> list[int]:
    """Return ⌈ratio · n⌉ of each bag."""
    return [math.ceil(ratio * length) for length in bags.lengths]


def leaves_some(hidden: Tensor, bags: PackedBags) -> Tensor:
    """Return for each instance whether anything of its bag is left, (N,) bool."""
    left = segment_max((~hidden)[:, None].float(), bags.cu_seqlens)[:, 0] > 0  # (B,)
    return left[bags.bag_index()]


def rows_where(mask: Tensor, count: int) -> Tensor:
    """Return the rows where a mask of known count is true, without asking the device for the count."""
    return torch.nonzero_static(mask, size=count)[:, 0]


class GlobalRecycle(nn.Module):
    """The global recycle network: tokens that read the instances taken away, equation 6.

    Parameters
    ----------
    width : int
        Width E of embedded instances.
    tokens, heads, head_dim : int
    dropout, momentum : float
    token_share : float or None
        Most tokens that a bag is given, as a fraction of the instances that it keeps; none gives each bag all.
    """

    queries: Tensor

    def __init__(
        self,
        width: int,
        *,
        tokens: int,
        heads: int,
        head_dim: int,
        dropout: float,
        momentum: float,
        token_share: float | None = None,
    ) -> None:
        super().__init__()
        bound = math.sqrt(6 / (768 + width))
        self.register_buffer("queries", torch.empty(tokens, width).uniform_(-bound, bound))
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, width)
        self.heads = heads
        self.dropout = dropout
        self.momentum = momentum
        self.token_share = token_share
        self._read: Tensor | None = None

    def read(self, rest: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Let the tokens read instances: (N, E) -> (B, k, E)."""
        query = self._split(self.to_q(self.norm(self.queries.to(rest.dtype)))).expand(len(lengths), -1, -1, -1)
        key, value = (self._split(part) for part in self.to_kv(self.norm(rest)).chunk(2, 1))
        read = bag_attention(query, key, value, lengths, query.shape[3] ** -0.5).flatten(2)
        return functional.dropout(self.to_out(read), self.dropout, self.training)

    def forward(
        self, embedded: Tensor, bags: PackedBags, kept: Tensor, rest: Tensor, counts: list[tuple[int, int]]
    ) -> PackedBags:
        """Return bags of the kept instances followed by what the tokens read in the rest."""
        keep, take = (tuple(column) for column in zip(*counts, strict=True))
        tokens = self.read(embedded[rows_where(rest, sum(take))], take)  # (B, k, E)
        self._read = tokens.detach()
        given = [self.given(count) for count in keep]
        lengths = torch.tensor(keep) + torch.tensor(given)
        bag = torch.repeat_interleave(torch.arange(bags.n_bags), lengths)
        place = torch.arange(len(bag)) - (lengths.cumsum(0) - lengths)[bag] - torch.tensor(keep)[bag]
        is_token = place >= 0
        rows = len(embedded) + bag * tokens.shape[1] + place
        source = rows.to(embedded.device)
        source[rows_where(~is_token.to(embedded.device), sum(keep))] = rows_where(kept, sum(keep))
        values = torch.cat([embedded, tokens.flatten(0, 1).to(embedded.dtype)])[source]
        longer = tuple(lengths.tolist())
        return PackedBags(values, bag_offsets(longer, values.device), longer, None, bags.ids)

    def given(self, kept: int) -> int:
        """Return how many tokens stand beside so many kept instances."""
        k = len(self.queries)
        return k if self.token_share is None else min(k, math.floor(self.token_share * kept + 1e-9))

    @torch.no_grad()
    def follow(self) -> None:
        """Move the tokens towards what they read in the last step, the mean over its bags."""
        if self._read is not None:
            self.queries.lerp_(self._read.mean(0).to(self.queries.dtype), 1 - self.momentum)
            self._read = None

    def _split(self, values: Tensor) -> Tensor:
        return torch.unflatten(values, -1, (self.heads, -1))


def _read_attention(taker: Taker) -> Found:
    """Read MHIM-MIL around attention pooling; the layers of its attention have no bias."""
    said = {
        "embed_activation": taker.ask("embed_activation", "relu", "gelu", "none"),
        "attention_activation": taker.ask("attention_activation", "relu", "gelu", "tanh"),
    }
    if taker.has(r"merge\..*"):
        without_merging(taker)
    tensors, widths = taker.embedding("feature")
    tensors |= taker.attention(*taker.gate("online_encoder.attention.attention."), widths[-1], bias=False)
    tensors |= taker.head("predictor", "classifier", widths[-1])
    sizes = {"embed_dims": tuple(widths), "hidden": len(tensors["attention.V.weight"])}
    options = sizes | said | {"gated": "attention.U.weight" in tensors, "attention_bias": False}
    return Found("MHIM-MIL", Component(name="abmil", options=options), tensors)


LAYOUTS.add(
    "MHIM-MIL", Layout((r"feature\..*", r"online_encoder\.attention\.attention\..*", r"predictor\..*"), _read_attention)
)

# The networks inside the authors' repository, by version.
_XAVIER: dict[str, object] = {"dropout": 0.25, "init": "xavier"}
NETWORKS: dict[str, dict[str, object]] = {
    "abmil": _XAVIER | {"hidden": 128, "gated": False, "attention_activation": "relu", "attention_bias": False},
    "dsmil": _XAVIER | {"embed_dims": (512,), "passing_v": True},
    "transmil": {"embed_dropout": 0.25, "padding": "grid", "init": "xavier"},
}
NETWORKS_V2 = {name: options | {"embed_activation": "gelu"} for name, options in NETWORKS.items()}
NETWORKS_V2["dsmil"]["prediction"] = "mean"
for _version, _options in (("mhim", NETWORKS["abmil"]), ("mhim_v2", NETWORKS_V2["abmil"])):
    RECIPES.add(f"abmil_{_version}", Recipe(aggregator=Component(name="abmil", options=_options)))

# Table of the paper's settings: C16 is CAMELYON16, TCGA the two lung cohorts.
PRESETS: dict[str, dict[str, object]] = {
    "c16_abmil": {},
    "c16_transmil": {
        "random_ratio": 0.0,
        "low_ratio": 0.8,
        "high_ratio": 0.03,
        "momentum_schedule": "cosine",
    },
    "tcga_abmil": {
        "random_ratio": 0.7,
        "low_ratio": 0.2,
        "high_ratio": 0.02,
        "high_factor": 1.0,
        "consistency": 0.5,
        "momentum_schedule": "cosine",
    },
    "tcga_transmil": {
        "random_ratio": 0.6,
        "low_ratio": 0.2,
        "high_ratio": 0.02,
        "high_factor": 1.0,
        "consistency": 0.5,
    },
}

SMALL_BAGS: dict[str, object] = {"keep_at_least": 100}  # of version 2, see above

_TRAINING = Training(
    optimizer="adam", lr=2e-4, weight_decay=1e-5, epochs=200, patience=30, min_epochs=130, schedule="cosine"
)
_TRAINING_V2 = _TRAINING.model_copy(update={"patience": 20, "min_epochs": 75})
_DSMIL_TERMS = (Term(name="dsmil_max", weight=0.5),)

RECIPE = Recipe(
    aggregator=Component(name="abmil", options=NETWORKS["abmil"]),
    strategy=Component(name="mhim", options=PRESETS["c16_abmil"]),
    training=_TRAINING,
)
RECIPES.add("mhim", RECIPE)
RECIPES.add(
    "mhim_dsmil",
    Recipe(
        aggregator=Component(name="dsmil", options=NETWORKS["dsmil"]),
        terms=_DSMIL_TERMS,
        strategy=Component(name="mhim", options=PRESETS["c16_abmil"]),
        bag_weight=0.5,
        training=_TRAINING,
    ),
)
RECIPES.add(
    "mhim_transmil",
    Recipe(
        aggregator=Component(name="transmil", options=NETWORKS["transmil"]),
        strategy=Component(name="mhim", options=PRESETS["c16_transmil"]),
        training=_TRAINING,
    ),
)
RECIPES.add(
    "mhim_v2",
    Recipe(
        aggregator=Component(name="abmil", options=NETWORKS_V2["abmil"]),
        strategy=Component(name="mhim_v2", options=SMALL_BAGS),
        training=_TRAINING_V2,
    ),
)
RECIPES.add(
    "mhim_v2_dsmil",
    Recipe(
        aggregator=Component(name="dsmil", options=NETWORKS_V2["dsmil"]),
        strategy=Component(name="mhim_v2", options=SMALL_BAGS),
        training=_TRAINING_V2,
    ),
)
