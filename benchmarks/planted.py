"""Synthetic bags whose truth is known: what must a method find, and what must it not rely on?

Three tests of the assumption of multiple-instance learning, a bag being positive because of what it contains: Raff and
Holt, Reproducibility in multiple instance learning: a case for algorithmic unit tests, NeurIPS 2023,
https://arxiv.org/abs/2310.17867. Each has a training and a test part that differ in something that must not matter. A
model that learnt the assumption has the same AUC on both; an AUC below 0.5 on the test part means that it learnt the
opposite of it. With background instances from N(0, I):

- `single_concept`: positive bags hold 1 to 4 instances from N(0, 3²) or N(1, 1). Negative bags of the training part,
  and positive bags of the test part, hold one "poison" from N(-10, 0.1²), a sign that would be easy to learn.
- `multi_concept`: positive bags hold instances of two concepts, N(2, 0.1²) and N(3, 0.1²), negative bags of one of
  them; the poison is as before.
- `false_frequency`: the same concepts, one or two instances of each. Negative bags hold one or two instances of one
  concept in the training part, and 35 to 45 in the test part: many of one concept do not make a bag positive.

The numbers are those of the paper's algorithms 1 to 3 as torchmil (https://github.com/Franblueee/torchmil) states them,
save that either concept, not always the first, is the one of a negative bag, and one or two instances where it has one.

`planted_signal` makes bags like slides: some percent of a bag's instances are of a kind that only positive bags have,
among tissue in varying proportions and, if wanted, striking instances that mean nothing.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from eosin.errors import ConfigError
from eosin.features._bag import FeatureSpec
from eosin.mil._data import Examples, MemoryBags

Part = Literal["train", "test"]
POISON, POISON_SD, CONCEPT_SD = -10.0, 0.1, 0.1
CONCEPTS = (2.0, 3.0)
TISSUES = 5  # kinds of background instances of `planted_signal`


@dataclass(frozen=True, eq=False)
class Planted:
    """Bags with their labels and with what was planted in them.

    Attributes
    ----------
    examples : Examples
        Targets are 0 and 1 in turn, int64; every bag is its own patient.
    planted : mapping of str to (n,) bool tensor
        Instances of a bag that make it positive, or would together with others.
    """

    examples: Examples
    planted: Mapping[str, Tensor] = field(repr=False)


def single_concept(n_bags: int, *, dim: int = 16, part: Part, background: int = 10, seed: int = 0) -> Planted:
    """Return bags that one kind of instance makes positive, with a poison that changes sides in the test part.

    Parameters
    ----------
    n_bags : int
    dim : int
        Feature width D.
    part : {"train", "test"}
    background : int
        Background instances of every bag.
    seed : int
        The parts of one seed are drawn apart.
    """

    def bag(label: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        concept = _normal(_between(1, 4, generator) * label, dim, generator)
        wide = torch.rand(len(concept), 1, generator=generator) < 0.5
        poison = _poison(label, part, dim, generator)
        return _joined([torch.where(wide, 3 * concept, 1 + concept)], [poison, _normal(background, dim, generator)])

    return _planted(bag, n_bags, dim, part, seed)


def multi_concept(n_bags: int, *, dim: int = 16, part: Part, seed: int = 0) -> Planted:
    """Return bags that two kinds of instances make positive only together; parameters as `single_concept`."""

    def bag(label: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        count = _between(1, 4, generator) if label else 1
        chosen = CONCEPTS if label else (CONCEPTS[_between(0, 1, generator)],)
        concepts = [mean + CONCEPT_SD * _normal(count, dim, generator) for mean in chosen]
        background = _normal(_between(1, 10, generator), dim, generator)
        return _joined(concepts, [_poison(label, part, dim, generator), background])

    return _planted(bag, n_bags, dim, part, seed)


def false_frequency(n_bags: int, *, dim: int = 16, part: Part, seed: int = 0) -> Planted:
    """Return bags as `multi_concept`, where negative test bags hold one concept many times."""

    def bag(label: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        most = (35, 45) if part == "test" and not label else (1, 2)
        chosen = CONCEPTS if label else (CONCEPTS[_between(0, 1, generator)],)
        concepts = [mean + CONCEPT_SD * _normal(_between(*most, generator), dim, generator) for mean in chosen]
        return _joined(concepts, [_normal(_between(1, 10, generator), dim, generator)])

    return _planted(bag, n_bags, dim, part, seed)


def planted_signal(
    n_bags: int,
    *,
    dim: int = 32,
    part: Part,
    lengths: tuple[int, int] = (2000, 2000),
    fraction: float | tuple[float, float] = 0.01,
    shift: float = 1.0,
    distractors: float = 0.0,
    draw_length: Callable[[torch.Generator], int] | None = None,
    seed: int = 0,
) -> Planted:
    """Return bags like slides, with a signal in a small part of the instances of positive bags.

    Parameters
    ----------
    n_bags, dim, part, seed
        As `single_concept`; the parts differ in their draws alone.
    lengths : (int, int)
        Smallest and largest number of instances; drawn evenly on a logarithmic scale.
    fraction : float or (float, float)
        Share of a positive bag's instances that carry the signal, at least one does; or the ends of a range from which
        it is drawn for each bag, evenly on a logarithmic scale.
    shift : float
        Root mean square distance of the signal from the tissue it lies in, per feature, in standard deviations.
    distractors : float
        Share of instances, in a random half of the bags whatever their label, that are as striking as the signal in
        another direction.
    draw_length : callable, optional
        Draws the length of a bag, instead of `lengths`.

    Raises
    ------
    ConfigError
        If a share is none, or the lengths are not a range.
    """
    least, most = (fraction, fraction) if isinstance(fraction, float | int) else fraction
    if not 0 < least <= most <= 1 or not 0 <= distractors < 1 or not 1 <= lengths[0] <= lengths[1]:
        raise ConfigError(
            f"planted_signal: fraction {fraction} must lie in (0, 1], distractors {distractors} in [0, 1) and lengths "
            f"{lengths} be a range from at least 1"
        )
    world = torch.Generator().manual_seed(seed)  # the same for both parts
    tissues = _normal(TISSUES, dim, world)
    signal, other = shift * torch.nn.functional.normalize(_normal(2, dim, world)) * dim**0.5

    def bag(label: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        length = draw_length(generator) if draw_length else _log_uniform(*lengths, generator)
        shares = -torch.rand(TISSUES, generator=generator).log()  # proportions as likely as any
        tissue = torch.multinomial(shares, length, replacement=True, generator=generator)
        values = tissues[tissue] + _normal(length, dim, generator)
        place = torch.rand(length, generator=generator).argsort()
        share = most if least == most else least * (most / least) ** float(torch.rand((), generator=generator))
        positive = place < max(1, round(share * length)) * label
        values[positive] += signal
        if torch.rand((), generator=generator) < 0.5:
            values[place >= length - round(distractors * length)] += other
        return values, positive

    return _planted(bag, n_bags, dim, part, seed)


DATASETS: dict[str, Callable[..., Planted]] = {
    "single_concept": single_concept,
    "multi_concept": multi_concept,
    "false_frequency": false_frequency,
    "planted_signal": planted_signal,
}


def _planted(
    make: Callable[[int, torch.Generator], tuple[Tensor, Tensor]], n_bags: int, dim: int, part: Part, seed: int
) -> Planted:
    generator = torch.Generator().manual_seed(2 * seed + (part == "test") + 1_000_003)
    bags = {f"{part}{number:05d}": make(number % 2, generator) for number in range(n_bags)}
    ids = tuple(bags)
    source = MemoryBags({name: values for name, (values, _) in bags.items()}, FeatureSpec(encoder="planted", dim=dim))
    examples = Examples(source, ids, ids, torch.arange(n_bags) % 2)
    return Planted(examples, {name: positive for name, (_, positive) in bags.items()})


def _joined(planted: list[Tensor], others: list[Tensor]) -> tuple[Tensor, Tensor]:
    count = sum(map(len, planted))
    values = torch.cat([*planted, *others])
    return values, torch.arange(len(values)) < count


def _poison(label: int, part: Part, dim: int, generator: torch.Generator) -> Tensor:
    """Return one poison for negative bags in training and for positive ones in the test, none for the others."""
    return POISON + POISON_SD * _normal(int(label == (part == "test")), dim, generator)


def _normal(count: int, dim: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, dim, generator=generator)


def _between(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _log_uniform(low: int, high: int, generator: torch.Generator) -> int:
    return round(low * math.pow(high / low, float(torch.rand((), generator=generator))))
