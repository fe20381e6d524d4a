"""PackMIL: many slides per step, each halved at random, and a second branch that reads packs of slides as one.

Tang, Fang and others: Revisiting pre-processing and batching for multiple instance learning in computational
pathology, 2025, https://arxiv.org/abs/2509.20923.

1. Sampling. A slide of n instances is shuffled; the first ⌊τ n⌋ instances go to the main branch, the rest to the
   residual branch. Below m·r instances both get all of it. With `top_up`, a side shorter than m·r is filled from the
   other side. A side is cut to L·r instances; L doubles for a step when ``⌊⌊n_max (1 - τ)⌋ / r⌋ > L``, with 4 for r
   where there is no downsampler (`overflow`).
2. Main branch: the slides, packed and never mixed. Residual branch: neighbouring slides join a pack until the next
   would exceed L; each pack is one bag, a hyperslide, read by the same network.
3. Hyperslide labels. Classes: counts / largest count, focal loss ``mean ¼ (1 - e^{-b})² b`` with b the sigmoid
   cross-entropy. Grades (ISUP 0 to 5): mean primary and secondary Gleason pattern, their sum interpolated between 0→0,
   6→1, 7→2 or 3, 8→4, 9→5 and rounded; loss ``-(1 - p) log p``. Survival: the earliest slide's bin; if that slide is
   censored, also the earliest event's bin, and the fraction of censored slides as a soft c in ``-(1 - c) (log S_{Y-1} +
   log h_Y) - c log S_{Y_c}``. `packmil_labels` says it in full. Objective: ``main + λ residual``.
4. Attention-driven downsampler: instances are weighed, transformed and in training reduced by groups of r, by the
   aggregator `downsampled` around any other (`eosin methods downsampled` has its equations).

Deviations from the authors' code. Slides are isolated for every aggregator; the code mixes those of a pack when the
aggregator has a class token. There is no padding, hence no dependence on the longest pack. A side never becomes empty:
then both get the whole slide, where the code attends to other slides. Instances keep their order within a side, for
aggregators that read it. Batch norms of the code's networks are left out, since they mix slides. The learning rate
falls to 0, the code's to 1e-7. Sampling is with masks and known counts; there is no loop over instances.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from eosin.errors import ConfigError
from eosin.mil.bags import PackedBags
from eosin.mil.methods.abmil import PRESETS as ABMIL_PRESETS
from eosin.mil.methods.packmil_downsampler import Downsampled
from eosin.mil.methods.packmil_labels import Labels, LabelWeights, choose_labels, residual_loss
from eosin.mil.recipe import RECIPES, Component, Recipe, Training
from eosin.mil.slots import STRATEGIES, Aggregator, AggregatorOutput, Step, Strategy
from eosin.mil.tasks import Task

OVERFLOW = 4  # the authors' downsampling factor, which counts for the pack length where nothing is downsampled, too


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
        main_fraction: float = 0.5,
        pack_length: int = 2400,
        min_length: int = 128,
        top_up: bool = False,
        residual_weight: float = 0.2,
        labels: Labels = "auto",
        label_weights: LabelWeights = "slides",
        overflow: int | None = None,
        own_classifier: bool = False,
    ) -> None:
        super().__init__(model, task)
        if not 0 < main_fraction < 1 or pack_length < 1 or min_length < 0:
            raise ConfigError(
                f"packmil: main_fraction {main_fraction} must lie between 0 and 1, pack_length {pack_length} be at "
                f"least 1 and min_length {min_length} at least 0"
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
        loss = residual_loss(self.task, self.labels, logits, target, pack_of, weights)
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
    ends = functional.pad(count.cumsum(0), (1, 0)).to(bags.cu_seqlens)
    coords_px0 = None if bags.coords_px0 is None else bags.coords_px0[rows]
    return PackedBags(bags.values[rows], ends, tuple(counts), coords_px0, bags.ids)


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
    ends = functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(bags.cu_seqlens)
    return PackedBags(bags.values, ends, tuple(lengths), bags.coords_px0)


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
    host = Component(name="abmil", options=ABMIL_PRESETS["packmil"])
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
