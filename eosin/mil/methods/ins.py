"""INS: a good instance classifier by contrast and prototypes, from the labels of bags alone.

Qu, Ma, Luo, Guo, Wang, Song: Rethinking multiple instance learning for whole slide image classification: A good
instance classifier is all you need, IEEE TCSVT 2024, https://arxiv.org/abs/2307.02249. It descends from PiCO (Wang et
al., ICLR 2022).

1. Instance network (aggregator `ins`): ``h = relu(W x + b)``, class logits of h, projection ``q = normalise(W_2
   relu(W_1 h))``. The probability of a bag is the mean of its instances', and its logit the logarithm; or their
   largest, or that some instance has the class, ``1 - Π (1 - p)``.
2. Each step of the strategy `ins`: candidates Y are class 0 for instances of bags of class 0, else class 0 and the
   bag's; ``ŷ = argmax(softmax(logits) Y)``; ``r = softmax(q μᵀ)`` with the prototypes before the step; then instance
   by instance ``μ_ŷ ← m μ_ŷ + (1 - m) q``, then each μ is normalised; keys k are the projections of a moving-average
   network.
3. ``L_cls = -mean Σ_c t_c log softmax(logits)_c``; the soft targets t are uniform over the candidates, and before
   `start` the mean is over instances of other bags than those of class 0. From then on all take part, and ``t ← φ t +
   (1 - φ) onehot(argmax(r Y))`` with φ from 0.95 to 0.8; instances of bags of class 0 have class 0.
4. Contrast at temperature 0.07: before `start`, q against its own k and a queue of older keys (MoCo); then the mean
   over all of [q; k; queue] with the same ŷ, but q itself (supervised contrast). Objective: bag loss ``+ L_cls + ½
   L_con``.

Deviations from the authors' code. Candidates and certain negatives come from the labels of bags; the code reads the
labels of patches, also inside positive slides. The bag loss reads the pooled probability of the instances; the code
averages features and takes two of their dimensions for classes. The recipe pools by the largest probability: with the
mean, bags of which a tenth is positive are hardly separated (docs/methods.md). Places of the queue that were never
filled do not take part; the code fills them with noise, normalised along the wrong axis. The queue need not be a
multiple of the batch. There is one view per instance, as the code's feature dropout never acts. At most `sample`
instances of a pack take part in a step. Soft targets are kept per bag id and instance while training runs; bags without
ids, or drawn again in each pass, start from uniform targets every time.
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from eosin.kernels import segment_max, segment_mean, segment_sum
from eosin.mil._closed_forms import MaxBag, NoisyOrBag, ReadoutBag
from eosin.mil._layers import as_dtype, embedding
from eosin.mil._recipe import RECIPES, Component, Recipe, Training
from eosin.mil.bags import PackedBags
from eosin.mil.options import Count, NotNegative, Positive, Share
from eosin.mil.slots import AGGREGATORS, STRATEGIES, Aggregator, AggregatorOutput, Step, Strategy
from eosin.mil.task import Task, require_classes

TARGET = "target."


@dataclass(frozen=True, eq=False)
class InsOutput(AggregatorOutput):
    """Output of the instance network.

    Attributes
    ----------
    instance_logits : (N, C) float
        C is K, or 2 for a model with one output.
    projections : (N, P) float
        Unit rows.
    """

    instance_logits: Tensor
    projections: Tensor


@AGGREGATORS.register("ins")
class Ins(Aggregator):
    """Instance classifier whose probabilities make the bag's, equation 1.

    Parameters
    ----------
    in_dim, n_outputs
        Feature width D and logits K.
    width : int
        Width E of an embedded instance.
    projection : int
        Width P of a projection.
    pooling : {"mean", "max", "noisy_or"}
        How the probabilities of the instances make the bag's, equation 1. The mean is the share of a class, which stays
        below one half where few instances are positive: such bags are separated by their order and by a threshold
        (``training.threshold``), not by the most probable class.
    """

    output_type = InsOutput

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        *,
        width: Count = 512,
        projection: Count = 128,
        pooling: Literal["mean", "max", "noisy_or"] = "mean",
    ) -> None:
        super().__init__(in_dim, n_outputs, embed_dim=width)
        self.pooling = pooling
        self.embed = embedding(in_dim, (width,))
        self.classifier = nn.Linear(width, max(2, n_outputs))
        self.projector = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, projection))

    def forward(self, bags: PackedBags) -> InsOutput:
        """Return logits, mean embeddings, instance logits and projections."""
        instances = self.embed(bags.values)
        logits = self.classifier(instances)
        embedded = as_dtype(segment_mean(instances, bags.cu_seqlens), instances)
        projections = functional.normalize(self.projector(instances))
        return InsOutput(self._bag_logits(logits, bags), embedded, logits, projections)

    @override
    def readout(self, bags: PackedBags, output: AggregatorOutput) -> MaxBag | NoisyOrBag | ReadoutBag:
        assert isinstance(output, InsOutput)  # what the model declares
        logits = output.instance_logits.detach().double().cpu()
        head = torch.eye(logits.shape[1], dtype=torch.float64)
        if self.n_outputs == 1:
            head = head[1:] - head[:1]
        if self.pooling == "max":
            how = "All numbers are exact: the model takes the largest log-odds that any tile has of a class, so every "
            how += "prediction follows from the largest that remain without running it again"
            return MaxBag(logits - logits[:, :1], head, head.new_zeros(len(head)), how=how)
        if self.pooling == "noisy_or":
            chance = logits.log_softmax(1)
            classes = range(len(head.T))
            others = [chance[:, [k for k in classes if k != c]].logsumexp(1) for c in classes[1:]]
            return NoisyOrBag(torch.stack(others, 1), head)
        floor = torch.finfo(torch.promote_types(output.instance_logits.dtype, torch.float32)).tiny

        def read(share: Tensor) -> Tensor:
            logs = torch.where(share.sum(2) > 0, share[:, 0].clamp_min(floor).log(), 0.0)
            return logs @ head.T

        how = "All numbers are exact: the model averages the probabilities of its tiles, so every prediction follows "
        how += "from a mean without running it again"
        return ReadoutBag(logits.new_zeros(len(logits), 1, 1), logits.softmax(1)[:, None], read, how=how)

    def _bag_logits(self, logits: Tensor, bags: PackedBags) -> Tensor:
        """Return (B, K), 0 for an empty bag."""
        wide = _wide(logits)
        if self.pooling == "max":
            bag = segment_max(wide - wide[:, :1], bags.cu_seqlens)
        elif self.pooling == "noisy_or":
            bag = _noisy_or(wide, bags)
        else:
            share = segment_mean(wide.softmax(1), bags.cu_seqlens)
            bag = share.clamp_min(torch.finfo(share.dtype).tiny).log()
        bag = torch.where(bags.cu_seqlens.diff()[:, None] > 0, bag, 0.0)
        return bag if self.n_outputs > 1 else bag[:, 1:] - bag[:, :1]


def _wide(values: Tensor) -> Tensor:
    """Return values in float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _noisy_or(logits: Tensor, bags: PackedBags) -> Tensor:
    """Return (B, C): the log-odds that at least one instance has the class, 0 for class 0."""
    chance = logits.log_softmax(1)
    others = [torch.cat([chance[:, :c], chance[:, c + 1 :]], 1).logsumexp(1) for c in range(1, chance.shape[1])]
    none = segment_sum(torch.stack(others, 1), bags.cu_seqlens).clamp_max(-torch.finfo(chance.dtype).tiny)
    odds = torch.log(-torch.expm1(none)) - none
    return torch.cat([torch.zeros_like(odds[:, :1]), odds], 1)


@STRATEGIES.register("ins")
class InsStrategy(Strategy):
    """Contrast, prototypes and soft targets, equations 2 to 4.

    Parameters
    ----------
    model : Aggregator
    task : Task
        Must have classes.
    start : float
        Fraction of the training after which targets move and contrast is supervised.
    sample : int
        Most instances of a pack that take part.
    queue_size : int
    instance_weight, contrast_weight : float
        Of L_cls and L_con.
    temperature : float
    key_momentum, prototype_momentum : float
    phi_start, phi_end : float
        φ at both ends of the training.
    """

    requires = InsOutput
    prototypes: Tensor
    queue: Tensor
    queue_labels: Tensor

    def __init__(
        self,
        model: Aggregator,
        task: Task,
        *,
        start: Share = 0.025,
        sample: Count = 1024,
        queue_size: Count = 8192,
        instance_weight: NotNegative = 1.0,
        contrast_weight: NotNegative = 0.5,
        temperature: Positive = 0.07,
        key_momentum: Share = 0.999,
        prototype_momentum: Share = 0.9,
        phi_start: Share = 0.95,
        phi_end: Share = 0.8,
    ) -> None:
        super().__init__(model, task)
        require_classes(task, "ins")
        width = projection_width(model)
        self.start = start
        self.sample = sample
        self.instance_weight, self.contrast_weight = instance_weight, contrast_weight
        self.temperature = temperature
        self.key_momentum, self.prototype_momentum = key_momentum, prototype_momentum
        self.phi = (phi_start, phi_end)
        self.key_model = copy.deepcopy(model).requires_grad_(False)
        self.register_buffer("prototypes", torch.zeros(max(2, task.n_outputs), width))
        self.register_buffer("queue", torch.zeros(queue_size, width))
        self.register_buffer("queue_labels", torch.full((queue_size,), -1))  # -1: never filled
        self._next = 0
        self._targets: dict[str, Tensor] = {}

    def forward(self, bags: PackedBags, target: Tensor) -> Step:
        """Run the model on whole bags and contrast a sample of their instances."""
        output = self.model(bags)
        assert isinstance(output, InsOutput)  # checked when built
        self._follow()
        rows = torch.randperm(bags.n_instances, device=bags.values.device)[: self.sample]
        if not len(rows):
            return Step(output, bags)
        logits, query = _wide(output.instance_logits[rows]), _wide(output.projections[rows])
        candidates = self._candidates(bags, target)[rows].to(logits.dtype)  # (S, C)
        pseudo = (logits.detach().softmax(1) * candidates).argmax(1)
        with torch.no_grad():
            closeness = (query @ self.prototypes.to(query.dtype).mT).softmax(1)
            moved = moved_prototypes(self.prototypes, query.detach(), pseudo, self.prototype_momentum)
            self.prototypes.copy_(moved)
            keys = _wide(self.key_model(bags).projections[rows])
        moves = self.progress >= self.start
        soft = self._moved_targets(bags, rows, candidates, closeness if moves else None)
        contrast = self._contrast(query, keys, pseudo, supervised=moves)
        self._enqueue(keys, pseudo)
        among = None if moves else candidates[:, 1:].amax(1)
        losses = {
            "instance": self.instance_weight * soft_cross_entropy(logits, soft, among),
            "contrast": self.contrast_weight * contrast,
        }
        return Step(output, bags, losses)

    def get_extra_state(self) -> Tensor:
        """Return soft targets and the place in the queue as bytes, so that a killed training continues with them."""
        kept = {f"{TARGET}{name}": target.cpu().clone() for name, target in self._targets.items()}
        return torch.frombuffer(bytearray(save({**kept, "next": torch.tensor(self._next)})), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Take up what `get_extra_state` returned."""
        tensors = load(state.cpu().numpy().tobytes())
        self._next = int(tensors.pop("next"))
        self._targets = {name.removeprefix(TARGET): target for name, target in tensors.items()}

    def _candidates(self, bags: PackedBags, target: Tensor) -> Tensor:
        """Return the classes that each instance may have, (N, C) of zeros and ones."""
        classes = self.task.memberships(target)
        if classes.shape[1] == 1:
            classes = torch.cat([1 - classes, classes], 1)
        classes = classes.clone()
        classes[:, 0] = 1
        return classes[bags.bag_index()]

    def _moved_targets(self, bags: PackedBags, rows: Tensor, candidates: Tensor, closeness: Tensor | None) -> Tensor:
        uniform = candidates / candidates.sum(1, keepdim=True)
        kept = self._kept(bags, uniform)
        soft = uniform if kept is None else torch.where(kept[rows] < 0, uniform, kept[rows])
        if closeness is not None:
            begin, end = self.phi
            soft = moved_targets(soft, closeness, candidates, phi=begin + (end - begin) * self.progress)
        if kept is not None:
            kept[rows] = soft
            for name, part in zip(bags.ids, torch.split(kept, list(bags.lengths)), strict=True):
                self._targets[name] = part
        return soft

    def _kept(self, bags: PackedBags, like: Tensor) -> Tensor | None:
        """Return the soft targets so far, (N, C), -1 where there is none; None without ids."""
        if not bags.ids:
            return None
        known = [self._targets.get(name) for name in bags.ids]
        parts = [
            part.to(like) if part is not None and len(part) == length else like.new_full((length, like.shape[1]), -1.0)
            for part, length in zip(known, bags.lengths, strict=True)
        ]
        return torch.cat(parts)

    def _contrast(self, query: Tensor, keys: Tensor, pseudo: Tensor, *, supervised: bool) -> Tensor:
        filled = self.queue_labels >= 0
        queue = self.queue.to(query.dtype, copy=True)  # the queue moves on before the backward pass
        if not supervised:
            return momentum_contrast(query, keys, queue, self.temperature, filled=filled)
        features = torch.cat([query, keys, queue])
        labels = torch.cat([pseudo, pseudo, self.queue_labels])
        return supervised_contrast(query, features, labels, self.temperature)

    @torch.no_grad()
    def _follow(self) -> None:
        for mine, new in zip(self.key_model.parameters(), self.model.parameters(), strict=True):
            mine.lerp_(new.detach(), 1 - self.key_momentum)

    @torch.no_grad()
    def _enqueue(self, keys: Tensor, pseudo: Tensor) -> None:
        size = len(self.queue)
        keys, pseudo = keys[-size:], pseudo[-size:]
        places = (self._next + torch.arange(len(keys), device=keys.device)) % size
        self.queue[places] = keys.to(self.queue.dtype)
        self.queue_labels[places] = pseudo
        self._next = (self._next + len(keys)) % size


def projection_width(model: Aggregator) -> int:
    """Return the width P of a model's projections."""
    empty = PackedBags.pack([next(model.parameters()).new_zeros(0, model.in_dim)])
    with torch.no_grad():
        output = model(empty)
    assert isinstance(output, InsOutput)  # checked when built
    return output.projections.shape[1]


def soft_cross_entropy(logits: Tensor, target: Tensor, among: Tensor | None = None) -> Tensor:
    """Return ``-mean Σ_c t_c log softmax(logits)_c``, equation 3; over the rows that `among` (S,) marks with 1."""
    entropy = -(target * functional.log_softmax(logits, 1)).sum(1)
    return entropy.mean() if among is None else (entropy * among).sum() / among.sum().clamp_min(1)


def moved_targets(target: Tensor, closeness: Tensor, candidates: Tensor, *, phi: float) -> Tensor:
    """Move soft targets towards the nearest candidate prototype, to class 0 where it is the only one; all (S, C)."""
    nearest = functional.one_hot((closeness * candidates).argmax(1), target.shape[1]).to(target.dtype)
    moved = phi * target + (1 - phi) * nearest
    certain = candidates[:, 1:].sum(1) == 0
    negative = functional.one_hot(torch.zeros_like(certain, dtype=torch.int64), target.shape[1]).to(target.dtype)
    return torch.where(certain[:, None], negative, moved)


def moved_prototypes(prototypes: Tensor, query: Tensor, label: Tensor, momentum: float) -> Tensor:
    """Move prototypes (C, P) through the instances one after the other, equation 2, and normalise them.

    In closed form: an instance with l later ones of its class has weight ``(1 - m) m^l``.
    """
    member = functional.one_hot(label, len(prototypes)).to(prototypes.dtype)  # (S, C)
    later = member.flip(0).cumsum(0).flip(0) - member
    weights = member * (1 - momentum) * momentum**later
    moved = momentum ** member.sum(0)[:, None] * prototypes + weights.mT @ query.to(prototypes.dtype)
    return functional.normalize(moved)


def momentum_contrast(
    query: Tensor, keys: Tensor, queue: Tensor, temperature: float, *, filled: Tensor | None = None
) -> Tensor:
    """Return the cross-entropy of each query's own key against a queue, equation 4; mean over queries.

    Parameters
    ----------
    query, keys : (S, P) float
    queue : (Q, P) float
    temperature : float
    filled : (Q,) bool, optional
        Places of the queue that take part.
    """
    against = query @ queue.mT
    if filled is not None:
        against = against.masked_fill(~filled, float("-inf"))
    logits = torch.cat([(query * keys).sum(1, keepdim=True), against], 1) / temperature
    return -functional.log_softmax(logits, 1)[:, 0].mean()


def supervised_contrast(query: Tensor, features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return the contrast of queries with all features of their label, equation 4; mean over queries.

    Parameters
    ----------
    query : (S, P) float
        The first S rows of `features`.
    features : (F, P) float
    labels : (F,) int64
        -1 where a row takes no part.
    temperature : float
    """
    logits = query @ features.mT / temperature
    logits = logits - logits.detach().amax(1, keepdim=True)
    rows = torch.arange(len(query), device=query.device)
    others = (labels >= 0).expand(len(query), -1).clone()
    others[rows, rows] = False
    total = torch.where(others, logits, float("-inf")).exp().sum(1, keepdim=True)
    chance = logits - torch.log(total + 1e-12)
    same = others & (labels == labels[: len(query), None])
    return -(torch.where(same, chance, 0.0).sum(1) / same.sum(1).clamp(min=1)).mean()


# Targets move after 20 of 45 passes, the authors' schedule for slides of which only the label is known (TCGA). L_cls
# weighs three times the bag loss: that loss alone often overfits to the largest instance of a bag, whatever it is.
RECIPE = Recipe(
    aggregator=Component(name="ins", options={"pooling": "max"}),
    strategy=Component(name="ins", options={"start": 0.44, "instance_weight": 3.0}),
    training=Training(optimizer="sgd", lr=0.01, weight_decay=1e-3, epochs=40, patience=0, schedule="constant"),
)
RECIPES.add("ins", RECIPE)
