"""PackMIL: many slides per step, each halved at random, and a second branch that reads packs of slides as one.

Tang, Fang and others: Revisiting pre-processing and batching for multiple instance learning in computational
pathology, 2025, https://arxiv.org/abs/2509.20923.

1. Sampling. A slide of n instances is shuffled; the first ⌊τ n⌋ instances go to the main branch, the rest to the
   residual branch. Below m·r instances both get all of it. With `top_up`, a side shorter than m·r is filled from the
   other side. A side is cut to L·r instances; L doubles for a step when ``⌊⌊n_max (1 - τ)⌋ / r⌋ > L``, with 4 for r
   where there is no downsampler (`overflow`).
2. Main branch: the slides, packed and never mixed. Residual branch: neighbouring slides join a pack until the next
   would exceed L; each pack is one bag, a hyperslide, read by the same network.
3. Hyperslide labels, objective ``main + λ residual``. A slide of the hyperslide counts as one, or as its instances w.

   - ``classes``: counts / largest count, a target of each class in [0, 1]; focal loss ``mean ¼ (1 - e^{-b})² b`` with b
     the sigmoid cross-entropy.
   - ``shares``: counts / sum, softmax cross-entropy with soft targets.
   - ``grades`` (ISUP 0 to 5): the weighted means of primary and secondary Gleason pattern, their sum interpolated
     between 0→0, 6→1, 7→2 (3 if the primary pattern is higher), 8→4, 9→5 and rounded. Other numbers of ordered classes:
     the weighted mean of the class numbers, rounded. Loss ``-(1 - p) log p`` with p the probability of that grade, from
     softmax, or from the steps of ordered classes. It is the authors' asymmetric loss (γ₊ 1, γ₋ 4, no smoothing), in
     which γ₋ has no effect.
   - ``survival``: the earliest slide's bin, an uncensored label if that slide is uncensored; else event bin Y of the
     earliest event in the pack (its own bin without one), Y_c its own bin and c the fraction of censored slides in
     ``-(1 - c) (log S_{Y-1} + log h_Y) - c log S_{Y_c}``.
4. Attention-driven downsampler (aggregator `downsampled` around any other): ``a = softmax(w tanh(V x))`` within the
   bag, ``x ← x (1 + a)``, ``h = gelu(W_1 x)``, ``W_2 h`` is what the other aggregator reads. In training bags of more
   than m·r instances are padded with zeros to a multiple of r and shuffled, padding included; groups of r rows of h are
   reduced to one before W_2. Shorter bags and all bags at inference are not reduced.

Deviations from the authors' code. Slides are isolated for every aggregator; the code mixes those of a pack when the
aggregator has a class token. There is no padding, hence no dependence on the longest pack. A side never becomes empty:
then both get the whole slide, where the code attends to other slides. Instances keep their order within a side, for
aggregators that read it. Batch norms of the code's networks are left out, since they mix slides. The learning rate
falls to 0, the code's to 1e-7. Sampling is with masks and known counts; there is no loop over instances. Benign slides
alone make a benign hyperslide; the code calls it grade 1. The random reduction picks one row per channel; the code's
subset of slots drifts across channels. The paper takes it for subtyping; the recipes here take the largest, as the
paper does for survival.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional
from typing_extensions import override

from eosin.errors import CheckpointError, ConfigError
from eosin.kernels import bag_offsets, segment_softmax
from eosin.mil import _attention as attention
from eosin.mil._attention import recomputed
from eosin.mil._layers import Attention
from eosin.mil._recipe import RECIPES, Component, Recipe, Training
from eosin.mil.bags import PackedBags
from eosin.mil.layouts import LAYOUTS, Found, Layout, Taker, Tensors, folded
from eosin.mil.options import Count, NotNegative, Part, Whole
from eosin.mil.slots import AGGREGATORS, STRATEGIES, Aggregator, AggregatorOutput, Step, Strategy, Wrapper
from eosin.mil.task import Task
from eosin.mil.tasks._classification import Ordinal
from eosin.mil.tasks._survival import DiscreteSurvival

OVERFLOW = 4  # the authors' downsampling factor, which counts for the pack length where nothing is downsampled, too
Labels = Literal["auto", "classes", "shares", "grades", "survival"]
LabelWeights = Literal["slides", "instances"]
PRIMARY, SECONDARY = (2.0, 3.0, 3.0, 4.0, 4.0, 5.0), (2.0, 3.0, 4.0, 3.0, 4.0, 5.0)  # Gleason patterns of ISUP 0 to 5
NEEDED = {
    "classes": "classes without an order",
    "shares": "classes without an order, one of which is true",
    "grades": "ordered classes, or six grades as classes",
    "survival": "survival times in bins",
}


@STRATEGIES.register("packmil")
class PackMil(Strategy):
    """Sampling, packing and the residual branch, equations 1 to 3; works with every aggregator.

    Parameters
    ----------
    model : Aggregator
    task : Task
    main_fraction : float
        τ, the fraction of a slide that the main branch reads.
    pack_length : int
        L, the most instances of a hyperslide.
    min_length : int
        m: slides of fewer than m·r instances are not split.
    top_up : bool
        Fill short sides from the other side.
    residual_weight : float
        λ; 0 leaves the residual branch out.
    labels : {"auto", "classes", "shares", "grades", "survival"}
        What hyperslides are labelled with; ``auto`` goes by the task.
    label_weights : {"slides", "instances"}
        Whether every slide of a hyperslide counts the same or by its instances.
    overflow : int or None
        L doubles for a step when the residual side of its largest slide holds this many times more; None: r, or 4
        without a downsampler.
    own_classifier : bool
        The residual branch has a classifier of its own.
    """

    requires = AggregatorOutput

    def __init__(
        self,
        model: Aggregator,
        task: Task,
        *,
        main_fraction: Part = 0.5,
        pack_length: Count = 2400,
        min_length: Whole = 128,
        top_up: bool = False,
        residual_weight: NotNegative = 0.2,
        labels: Labels = "auto",
        label_weights: LabelWeights = "slides",
        overflow: Count | None = None,
        own_classifier: bool = False,
    ) -> None:
        super().__init__(model, task)
        if residual_weight and model.reads_places:
            raise ConfigError(
                f"the residual branch of packmil mixes tiles of several slides, but {type(model).__name__} reads where "
                "tiles lie; pass residual_weight=0, or another aggregator"
            )
        self.labels = choose_labels(task, labels) if residual_weight else labels
        self.main_fraction = main_fraction
        self.pack_length = pack_length
        self.min_length = min_length
        self.top_up = top_up
        self.residual_weight = residual_weight
        self.label_weights = label_weights
        self.classifier = nn.Linear(model.embed_dim, task.n_outputs) if own_classifier and residual_weight else None
        self.factor = model.factor if isinstance(model, Downsampled) else 1
        self.overflow = overflow or (self.factor if isinstance(model, Downsampled) else OVERFLOW)

    def forward(self, bags: PackedBags, target: Tensor) -> Step:
        """Read one side of each slide in the main branch and the other in hyperslides."""
        longest = self._longest(bags.lengths)
        sizes = [self._sides(length, longest * self.factor) for length in bags.lengths]
        rank = random_rank(bags)
        length = torch.tensor(bags.lengths)
        main = _taken(bags, rank, [first for first, _ in sizes], torch.zeros_like(length))
        output, read = self._run(main)
        if not self.residual_weight:
            return Step(output, read)
        rest_sizes = [second for _, second in sizes]
        rest = self._prepared(_taken(bags, rank, rest_sizes, length - torch.tensor(rest_sizes)))
        pack_of = next_fit(rest.lengths, longest)
        hyper: AggregatorOutput = self._host()(merged(rest, pack_of))
        logits = hyper.logits if self.classifier is None else self.classifier(hyper.embedding)
        weights = rest.lengths if self.label_weights == "instances" else (1,) * rest.n_bags
        loss = residual_loss(self.task, self.labels, logits, target, pack_of=pack_of, weights=weights)
        return Step(output, read, {"residual": self.residual_weight * loss})

    def _longest(self, lengths: Sequence[int]) -> int:
        """Return L of this step."""
        rest = int(max(lengths, default=0) * (1 - self.main_fraction))
        return self.pack_length * (2 if rest // self.overflow > self.pack_length else 1)

    def _sides(self, length: int, most: int) -> tuple[int, int]:
        """Return how many instances of a slide the branches get, equation 1."""
        least = self.min_length * self.factor
        first = int(self.main_fraction * length)
        second = length - first
        if length < least or not first or not second:
            first = second = length
        elif self.top_up and length < least / min(self.main_fraction, 1 - self.main_fraction):
            first, second = max(first, least), max(second, least)
        return min(first, most), min(second, most)

    def _host(self) -> Aggregator:
        return self.model.host if isinstance(self.model, Downsampled) else self.model

    def _prepared(self, bags: PackedBags) -> PackedBags:
        if isinstance(self.model, Downsampled):
            return self.model.downsample(bags, longer_than=self.min_length * self.factor)
        return bags

    def _run(self, bags: PackedBags) -> tuple[AggregatorOutput, PackedBags]:
        read = self._prepared(bags)
        return self._host()(read), read


def random_rank(bags: PackedBags) -> Tensor:
    """Return the place of each instance in a random order of its bag, (N,) int64."""
    bag = bags.bag_index()
    order = torch.rand(bags.n_instances, device=bags.values.device).argsort()
    order = order[bag[order].argsort(stable=True)]  # bag after bag, random within
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    return rank - bags.cu_seqlens[:-1].to(torch.int64)[bag]


def _taken(bags: PackedBags, rank: Tensor, counts: Sequence[int], first: Tensor) -> PackedBags:
    """Return so many instances of each bag, from a first random rank on, in their own order."""
    count = torch.tensor(counts)
    low, high = first.to(rank.device), (first + count).to(rank.device)
    bag = bags.bag_index()
    rows = torch.nonzero_static((rank >= low[bag]) & (rank < high[bag]), size=sum(counts))[:, 0]
    coords, places = (None if where is None else where[rows] for where in (bags.coords_px0, bags.places))
    return PackedBags(bags.values[rows], bag_offsets(counts, rank.device), tuple(counts), coords, bags.ids, places)


def next_fit(lengths: Sequence[int], limit: int) -> list[int]:
    """Return the pack of each bag: neighbours join until the next one would exceed the limit, equation 2."""
    packs: list[int] = []
    number, filled = 0, 0
    for length in lengths:
        if packs and filled + length > limit:
            number, filled = number + 1, 0
        packs.append(number)
        filled += length
    return packs


def merged(bags: PackedBags, pack_of: Sequence[int]) -> PackedBags:
    """Return bags in which neighbours with the same pack number are one."""
    lengths = [0] * (pack_of[-1] + 1)
    for number, length in zip(pack_of, bags.lengths, strict=True):
        lengths[number] += length
    return PackedBags(bags.values, bag_offsets(lengths, bags.values.device), tuple(lengths), bags.coords_px0)


@AGGREGATORS.register("downsampled")
class Downsampled(Wrapper):
    """Another aggregator behind the attention-driven downsampler.

    Parameters
    ----------
    in_dim, n_outputs
        Feature width D and logits K.
    host : str
        Name of the other aggregator.
    host_options : dict
        Its options.
    factor : int
        Instances r that become one, in training under `packmil`.
    reduce : {"max", "random"}
        Largest value, or that of a random row of the group, for each channel.
    hidden : int
        Width of the attention's hidden layer.
    """

    instance_wise = False  # the weights that scale an instance are a softmax over its bag

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        *,
        host: str = "abmil",
        host_options: dict[str, object] | None = None,
        factor: Count = 4,
        reduce: Literal["max", "random"] = "max",
        hidden: Count = 128,
    ) -> None:
        inner = AGGREGATORS.build(host, in_dim, n_outputs, options=host_options or {})
        super().__init__(in_dim, n_outputs, inner)
        self.attention = Attention(in_dim, hidden=hidden, gated=False)
        self.first = nn.Linear(in_dim, in_dim)
        self.second = nn.Linear(in_dim, in_dim)
        self.host = inner
        self.factor = factor
        self.reduce = reduce

    @property
    @override
    def inner(self) -> Aggregator:
        return self.host

    @override
    def prepare(self, bags: PackedBags) -> PackedBags:
        return self.downsample(bags, longer_than=None)

    def downsample(self, bags: PackedBags, *, longer_than: int | None) -> PackedBags:
        """Return the bags it makes, those longer than a limit with groups of `factor` instances reduced to one.

        Parameters
        ----------
        bags : PackedBags
        longer_than : int or None
            The limit; None reduces no bag.
        """
        weights = segment_softmax(self.attention(bags.values), bags.cu_seqlens).to(bags.values.dtype)
        groups = [0] * bags.n_bags
        if longer_than is not None and self.factor > 1:
            groups = [-(-n // self.factor) if n > longer_than else 0 for n in bags.lengths]
        if not any(groups):
            return bags.with_values(self._in_pieces(self._hidden, bags.values, weights))
        length, group = torch.tensor(bags.lengths), torch.tensor(groups)
        values = self._pooled(bags, weights, _group_rows(length, group, self.factor))
        after = torch.where(group > 0, group, length)
        plain = torch.nonzero(torch.repeat_interleave(group == 0, length))[:, 0].to(values.device)
        if len(plain):
            whole = self._in_pieces(self._hidden, bags.values[plain], weights[plain])
            values = torch.cat([values, whole])[_back_in_order(group, after).to(values.device)]
        lengths = tuple(after.tolist())
        return PackedBags(values, bag_offsets(lengths, values.device), lengths, None, bags.ids)

    def _pooled(self, bags: PackedBags, weights: Tensor, slots: Tensor) -> Tensor:
        """Return one row per group of slots, (G, r) -> (G, D); features are put in order, which needs no gradient."""
        slots = slots.flatten().to(bags.values.device)
        rows = slots.clamp(max=bags.n_instances - 1)
        values = bags.values[rows]
        values[slots == bags.n_instances] = 0
        return self._in_pieces(self._group_of_hidden, values, weights[rows])

    def _in_pieces(self, function: Callable[[Tensor, Tensor], Tensor], values: Tensor, weights: Tensor) -> Tensor:
        """Return ``W_2 f(x, a)`` by pieces of whole groups; what f returns, if much, is computed again in backward."""

        def after(values: Tensor, weights: Tensor) -> Tensor:
            second: Tensor = self.second(function(values, weights))
            return second

        most = max(attention.CHECKPOINT_ROWS // self.factor, 1) * self.factor
        parts = zip(torch.split(values, most), torch.split(weights, most), strict=True)
        pieces = [recomputed(after, len(values), *part) for part in parts]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _hidden(self, values: Tensor, weights: Tensor) -> Tensor:
        """Return ``gelu(W_1 (x (1 + a)) + b_1)``; scaled after the product, a asks for no gradient of the features."""
        product = functional.linear(values, self.first.weight)
        scale, bias = (1 + weights).to(product.dtype), self.first.bias.to(product.dtype)
        return functional.gelu(torch.addcmul(bias, product, scale))

    def _group_of_hidden(self, values: Tensor, weights: Tensor) -> Tensor:
        groups = torch.unflatten(self._hidden(values, weights), 0, (-1, self.factor))  # (G, r, D)
        if self.reduce == "max":
            largest: Tensor = Largest.apply(groups)
            return largest
        choice = torch.randint(self.factor, (len(groups), 1, groups.shape[2]), device=groups.device)
        return groups.gather(1, choice)[:, 0]


class Largest(torch.autograd.Function):
    """The largest of the r rows of a group, channel by channel, the first of ties: (G, r, D) -> (G, D).

    torch's own keeps all rows for the backward pass and goes over them four times there.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, groups: Tensor) -> Tensor:
        """Return the largest."""
        largest = groups[:, 0].clone()
        place = torch.zeros_like(largest, dtype=torch.uint8)
        for number, rows in enumerate(groups.unbind(1)[1:], start=1):
            place = torch.maximum(place, (rows > largest).to(place.dtype) * number)
            torch.maximum(largest, rows, out=largest)
        ctx.save_for_backward(place)
        ctx.factor = groups.shape[1]  # type: ignore[attr-defined]
        return largest

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        """Give the gradient to the row that was largest."""
        (place,) = ctx.saved_tensors  # type: ignore[attr-defined]
        groups = gradient.new_empty(len(gradient), ctx.factor, gradient.shape[1])  # type: ignore[attr-defined]
        for number, rows in enumerate(groups.unbind(1)):
            torch.mul(gradient, place == number, out=rows)
        return groups


def _back_in_order(group: Tensor, after: Tensor) -> Tensor:
    """Return the rows that put groups, then instances of bags that have none, in the order of their bags."""
    bag = torch.repeat_interleave(torch.arange(len(group)), after)
    is_plain = (group == 0)[bag]
    n_groups = int(group.sum())
    return torch.where(is_plain, n_groups + is_plain.cumsum(0), (~is_plain).cumsum(0)) - 1


def _group_rows(length: Tensor, group: Tensor, r: int) -> Tensor:
    """Draw the rows of shuffled groups, padding included: (G, r) int64; the row after the last stands for padding."""
    size = group * r
    bag = torch.repeat_interleave(torch.arange(len(length)), size)
    place = torch.arange(len(bag)) - (size.cumsum(0) - size)[bag]
    rows = torch.where(place < length[bag], (length.cumsum(0) - length)[bag] + place, int(length.sum()))
    order = torch.rand(len(rows)).argsort()
    order = order[bag[order].argsort(stable=True)]
    return rows[order].view(-1, r)


def choose_labels(task: Task, labels: Labels) -> Labels:
    """Return the labels to use: those asked for, or those that suit the task.

    Raises
    ------
    ConfigError
        If the task cannot have them.
    """
    ordered, survival = isinstance(task, Ordinal), isinstance(task, DiscreteSurvival)
    classes = not ordered and type(task).memberships is not Task.memberships
    fits: dict[Labels, bool] = {
        "survival": survival,
        "grades": ordered or (task.kind == "classification" and task.n_outputs == len(PRIMARY)),
        "classes": classes,
        "shares": task.kind == "classification",
    }
    if labels == "auto":
        labels = "survival" if survival else "grades" if ordered else "classes"
    if not fits[labels]:
        raise ConfigError(
            f"packmil labels hyperslides by {labels}, which needs a task with {NEEDED[labels]}, not {task.kind} with "
            f"{task.n_outputs} outputs; choose other labels or residual_weight 0"
        )
    return labels


def residual_loss(
    task: Task, labels: Labels, logits: Tensor, target: Tensor, *, pack_of: Sequence[int], weights: Sequence[int]
) -> Tensor:
    """Return the loss of hyperslides; mean over hyperslides, for ``classes`` also over the classes.

    Parameters
    ----------
    task : Task
    labels : {"classes", "shares", "grades", "survival"}
        See `choose_labels`.
    logits : (P, K) float
        Of the hyperslides.
    target : (B, ...)
        The slides' targets.
    pack_of : sequence of int
        Hyperslide of each slide.
    weights : sequence of int
        What each slide counts.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    member = membership(pack_of, wide)  # (P, B)
    weight = torch.tensor(weights, dtype=wide.dtype, device=wide.device)
    if labels == "classes":
        return focal_loss(wide, class_shares(member * weight, task.memberships(target).to(wide)))
    if labels == "shares":
        shares = class_shares(member * weight, task.memberships(target).to(wide), of="sum")
        return -(shares * functional.log_softmax(wide, 1)).sum(1).mean()
    if labels == "grades":
        grades = hyperslide_grade(member, target, weight, n_grades=len(class_logs(task, wide[:1])[0]))
        return asymmetric_loss(class_logs(task, wide), grades.argmax(1))
    assert isinstance(task, DiscreteSurvival)  # checked when built
    return survival_loss(wide, *hyperslide_survival(member, *_bins_and_censored(task, target), weight))


def membership(pack_of: Sequence[int], like: Tensor) -> Tensor:
    """Return which slides a hyperslide holds, (P, B) of zeros and ones."""
    numbers = torch.tensor(pack_of, device=like.device)
    packs = torch.arange(pack_of[-1] + 1, device=like.device)
    return (packs[:, None] == numbers).to(like.dtype)


def class_shares(member: Tensor, memberships: Tensor, *, of: Literal["largest", "sum"] = "largest") -> Tensor:
    """Return class counts over the largest count or over their sum: (P, B) weights, (B, K) -> (P, K).

    With one output the other class is counted, too.
    """
    counts = member @ memberships
    others = member.sum(1, keepdim=True) - counts if counts.shape[1] == 1 else counts[:, :0]
    every = torch.cat([counts, others], 1)
    whole = every.amax(1, keepdim=True) if of == "largest" else every.sum(1, keepdim=True)
    return counts / whole.clamp_min(1e-12)


def focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return ``mean ¼ (1 - e^{-b})² b`` with b the sigmoid cross-entropy with soft targets, all (P, K)."""
    entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (0.25 * (1 - torch.exp(-entropy)).square() * entropy).mean()


def hyperslide_grade(
    member: Tensor, grade: Tensor, weight: Tensor, *, n_grades: int = len(PRIMARY), benign_is_zero: bool = True
) -> Tensor:
    """Return the two neighbouring grades of a hyperslide, weighted: (P, B), (B,) int64, (B,) -> (P, n_grades).

    Six grades are ISUP's. With ``benign_is_zero=False`` benign slides alone give two thirds of grade 1, as in the
    authors' code.
    """
    weights = member * weight
    whole = weights.sum(1).clamp_min(1e-12)
    is_isup = n_grades == len(PRIMARY)
    value = _isup_grade(weights, whole, grade) if is_isup else weights @ grade.to(weights.dtype) / whole
    if benign_is_zero:
        value = torch.where((member @ (grade > 0).to(member.dtype)) > 0, value, 0)
    distance = (value[:, None] - torch.arange(n_grades, device=value.device)).abs()
    return (1 - distance).clamp_min(0)


def _isup_grade(weights: Tensor, whole: Tensor, grade: Tensor) -> Tensor:
    """Return the grade of mean Gleason patterns, (P,) from 0 to 5; sums of counts are exact, so that ties are."""
    primary, secondary = (
        weights @ grade.new_tensor(table, dtype=weights.dtype)[grade] for table in (PRIMARY, SECONDARY)
    )
    total = (primary + secondary) / whole
    seven = torch.where(secondary >= primary, 2.0, 3.0).to(total.dtype)
    value = torch.where(total <= 6, total / 6, 1 + (total - 6) * (seven - 1))
    value = torch.where(total > 7, seven + (total - 7) * (4 - seven), value)
    return torch.where(total > 8, 4 + (total - 8), value).clamp(0, 5)


def class_logs(task: Task, logits: Tensor) -> Tensor:
    """Return the log probability of each class, (P, classes), from softmax or from the steps of ordered classes."""
    if not isinstance(task, Ordinal):
        return functional.log_softmax(logits, 1)
    zeros = logits.new_zeros(len(logits), 1)
    reached = torch.cat([zeros, functional.logsigmoid(logits).cumsum(1)], 1)
    return reached + torch.cat([functional.logsigmoid(-logits), zeros], 1)


def asymmetric_loss(logs: Tensor, target: Tensor) -> Tensor:
    """Return the mean of ``-(1 - p) log p``: log probabilities (P, classes), true class (P,)."""
    true = logs.gather(1, target[:, None])
    return -((1 - true.exp()) * true).mean()


def hyperslide_survival(
    member: Tensor, time_bin: Tensor, censored: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return event bin Y, soft censoring c and censoring bin Y_c of hyperslides, (P,) each.

    Parameters
    ----------
    member : (P, B) of zeros and ones
    time_bin : (B,) int64
    censored : (B,) of zeros and ones
    weight : (B,) float, optional
        What each slide counts in c.
    """
    never = int(1e9)
    holds = member > 0
    n_slides = len(time_bin)
    place = time_bin * n_slides + torch.arange(n_slides, device=time_bin.device)  # the first of ties is smallest
    first = torch.where(holds, place, never).argmin(1)
    earliest = time_bin[first]
    event = torch.where(holds & (censored == 0), time_bin, never).amin(1)
    is_censored = censored[first] > 0
    weights = member if weight is None else member * weight
    share = (weights @ censored.to(member.dtype)) / weights.sum(1).clamp_min(1e-12)
    event_bin = torch.where(is_censored & (event < never), event, earliest)
    return event_bin, torch.where(is_censored, share, 0), earliest


def survival_loss(logits: Tensor, event_bin: Tensor, censored: Tensor, censored_bin: Tensor) -> Tensor:
    """Return the mean of ``-(1 - c) (log S_{Y-1} + log h_Y) - c log S_{Y_c}``, probabilities clamped at 1e-7."""
    hazard = logits.sigmoid()
    survival = functional.pad((1 - hazard).cumprod(1), (1, 0), value=1.0)  # S_{-1}, S_0, ...
    before = survival.gather(1, event_bin[:, None]).clamp_min(1e-7).log()
    event = hazard.gather(1, event_bin[:, None]).clamp_min(1e-7).log()
    after = survival.gather(1, censored_bin[:, None] + 1).clamp_min(1e-7).log()
    soft = censored[:, None]
    return (-(1 - soft) * (before + event) - soft * after).mean()


def _bins_and_censored(task: DiscreteSurvival, target: Tensor) -> tuple[Tensor, Tensor]:
    edges = torch.tensor(task.edges, dtype=target.dtype, device=target.device)
    return torch.bucketize(target[:, 0].contiguous(), edges, right=True), 1 - target[:, 1]


# The networks inside the authors' repository.
_GELU: dict[str, object] = {"embed_activation": "gelu", "init": "xavier"}
NETWORKS: dict[str, dict[str, object]] = {
    "abmil": _GELU | {"hidden": 128, "gated": False, "dropout": 0.25},
    "dsmil": _GELU | {"embed_dims": (512,), "dropout": 0.25, "passing_v": True},
    "transmil": _GELU | {"embed_dropout": 0.25, "padding": "grid"},
}
RECIPES.add("abmil_packmil", Recipe(aggregator=Component(name="abmil", options=NETWORKS["abmil"])))

# The paper's settings of the strategy: prostate grading (PANDA), breast subtyping (BRCA), survival.
PRESETS: dict[str, dict[str, object]] = {
    "panda": {
        "main_fraction": 0.4,
        "pack_length": 600,
        "min_length": 0,
        "labels": "grades",
        "label_weights": "instances",
    },
    "brca": {"pack_length": 2400, "min_length": 128},
    "survival": {
        "pack_length": 3200,
        "min_length": 256,
        "top_up": True,
        "residual_weight": 0.5,
        "labels": "survival",
    },
}


def _recipe(
    preset: str,
    *,
    factor: int | None,
    lr: float,
    epochs: int,
    min_epochs: int,
    bags_per_step: int,
    patience: int = 20,
    warmup: float = 0.0,
) -> Recipe:
    host = Component(name="abmil", options=NETWORKS["abmil"])
    reduced = Component(name="downsampled", options={"host": host.name, "host_options": host.options, "factor": factor})
    return Recipe(
        aggregator=reduced if factor else host,
        strategy=Component(name="packmil", options=PRESETS[preset]),
        training=Training(
            optimizer="adam",
            lr=lr,
            weight_decay=1e-5,
            epochs=epochs,
            patience=patience,
            min_epochs=min_epochs,
            schedule="cosine",
            warmup=warmup,
            bags_per_step=bags_per_step,
        ),
    )


def _read_gabmil(taker: Taker) -> Found:
    """Read the ABMIL that MHIM-MIL, PackMIL and MambaMIL compare with; without biases it has none but the last."""
    activation = taker.ask("embed_activation", "relu", "gelu", "none")
    bias = taker.has(r"attention(_a|_V)?\.0\.bias")
    tensors, widths = taker.embedding("feature", bias=bias)
    mamba = ("attention_V.0", "attention_U.0", "attention_weights")
    plain = "attention." if taker.has(r"attention\.0\..*") else ""
    names = mamba if taker.has(r"attention_V\.0\..*") else taker.gate(plain)
    tensors |= taker.attention(*names, widths[-1], bias=bias)
    last = "classifier.0" if taker.has(r"classifier\.0\..*") else "classifier"
    tensors |= taker.head(last, "classifier", widths[-1])
    gated = "attention.U.weight" in tensors
    tensors = _without_norms(taker, tensors, "norm", "norm1", last_is_read=not gated)
    return Found("ABMIL of MHIM-MIL, PackMIL or MambaMIL", _abmil(tensors, widths, activation), tensors)


def _without_norms(taker: Taker, tensors: Tensors, first: str, last: str, *, last_is_read: bool = True) -> Tensors:
    """Return the tensors with the batch norms inside the linear layers that follow them.

    The first stands before the embedding or behind it. Behind it, it also acts on the pooled bag, since the attention
    weights add up to 1. The last stands before the classifier; the gated network of the baselines never calls it.
    """
    tensors = dict(tensors)
    before_last = taker.batch_norm(last)
    if before_last is not None and last_is_read and "classifier.weight" in tensors:
        tensors |= folded(tensors, "classifier", before_last)
    norm = taker.batch_norm(first)
    if norm is None:
        return tensors
    width, dim = tensors["embed.0.weight"].shape
    size = len(norm[0])
    if size not in (width, dim):
        raise CheckpointError(taker.path, f"holds a batch norm of width {size} between layers of {dim} and {width}")
    behind = taker.ask("embed_norm_pos", "0", "1") == "1" if width == dim else size == width
    for layer in ("attention.V", "attention.U", "classifier") if behind else ("embed.0",):
        if f"{layer}.weight" in tensors:
            tensors |= folded(tensors, layer, norm)
    if "attention.V.bias" in tensors:
        tensors.setdefault("attention.w.bias", torch.zeros(1))
    return tensors


def _abmil(tensors: Tensors, widths: list[int], activation: str) -> Component:
    options = {
        "embed_dims": tuple(widths),
        "embed_activation": activation,
        "embed_bias": "embed.0.bias" in tensors,
        "gated": "attention.U.weight" in tensors,
        "hidden": len(tensors["attention.V.weight"]),
        "attention_bias": "attention.V.bias" in tensors,
    }
    return Component(name="abmil", options=options)


def _read_packed(taker: Taker) -> Found:
    """Read PackMIL itself around ABMIL, with its downsampler or without; the residual branch serves training alone."""
    activation = taker.ask("embed_activation", "relu", "gelu")
    bias = taker.has(r"mil\.embed\.0\.bias")
    tensors, widths = taker.embedding("mil.embed", bias=bias)
    gated = taker.has(r"mil\.aggregate\.attention_a\.0\.weight")
    gate = taker.gate("mil.aggregate." if gated else "mil.aggregate.attention.")
    tensors |= taker.attention(*gate, widths[-1], bias=bias)
    tensors |= taker.head("predictor", "classifier", widths[-1])
    tensors = _without_norms(taker, tensors, "mil.norm", "mil.aggregate.norm1")
    host = _abmil(tensors, widths, activation)
    if not taker.has(r"downsampler\..*"):
        return Found("PackMIL", host, tensors)
    dim = tensors["embed.0.weight"].shape[1]
    below = taker.attention("downsampler.attention.0", None, "downsampler.attention.2", dim)
    below |= taker.linear("downsampler.embed.0", "first", dim, dim)
    below |= taker.linear("downsampler.downsample", "second", dim, dim)
    options = {
        "host": host.name,
        "host_options": host.options | {"dropout": 0.0},
        "hidden": len(below["attention.V.weight"]),
    }
    tensors = {f"host.{name}": tensor for name, tensor in tensors.items()} | below
    return Found("PackMIL", Component(name="downsampled", options=options), tensors, reads_features="first.weight")


_BASELINE = (r"feature\.\d+\.weight", r"attention(_a|_V)?\.0\.weight", r"classifier\..*")
LAYOUTS.add("ABMIL of PackMIL", Layout(_BASELINE, _read_gabmil))
LAYOUTS.add("PackMIL", Layout((r"mil\.embed\.0\.weight",), _read_packed, unused=("predictor_res.",)))

RECIPE = _recipe("brca", factor=4, lr=5e-4, epochs=75, min_epochs=30, bags_per_step=32)
RECIPES.add("packmil", RECIPE)
# The paper's rates are for its batches and its thousand slides: 5e-4 in 75 passes of 30 steps. With a hundred slides a
# pass has 3 steps, which leads nowhere; 8 bags per step at twice the rate come as far (docs/methods.md, on packing).
RECIPES.add("packmil_small", _recipe("brca", factor=4, lr=1e-3, epochs=75, min_epochs=30, bags_per_step=8, warmup=2.0))
RECIPES.add("packmil_panda", _recipe("panda", factor=None, lr=1e-3, epochs=100, min_epochs=75, bags_per_step=128))
RECIPES.add(
    "packmil_survival",
    _recipe("survival", factor=3, lr=1e-3, epochs=200, min_epochs=30, bags_per_step=32, patience=15),
)
