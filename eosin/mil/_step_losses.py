"""Losses that compare bags, exact over all bags of a step although its packs are computed one by one.

The partial likelihood of Cox compares a bag with all that are still at risk, in whichever pack they are. A step of
several packs is therefore gone through twice: first without gradients, to hear what the model says of every bag, then
pack by pack with them. In the second turn the loss of the whole step is a function of the pack's own logits, those of
the others being known numbers, so that the gradients of the packs add up to that of the step. Both turns must draw the
same random numbers.
"""

from collections.abc import Callable

import torch
from torch import Tensor, distributed

Calls = dict[str, list[tuple[Tensor, Tensor]]]


class StepLosses:
    """What the packs of a step gave to losses that compare bags: logits and targets of each call, in order."""

    def __init__(self) -> None:
        self._packs: list[Calls] = []
        self._pack: int | None = None
        self._hears = False
        self._asked: dict[str, int] = {}

    def hear(self) -> None:
        """Begin the first turn of the next pack."""
        self._packs.append({})
        self._pack, self._hears = len(self._packs) - 1, True

    def exchange(self, device: torch.device, *, counts: bool) -> None:
        """Hear the packs of the other processes; those of a process without a bag of the step do not count."""
        own = [{name: [(a.cpu(), b.cpu()) for a, b in said] for name, said in pack.items()} for pack in self._packs]
        found: list[list[Calls]] = [[] for _ in range(distributed.get_world_size())]
        distributed.all_gather_object(found, own if counts else [])
        others = [pack for rank, packs in enumerate(found) if rank != distributed.get_rank() for pack in packs]
        self._packs += [
            {name: [(a.to(device), b.to(device)) for a, b in said] for name, said in pack.items()} for pack in others
        ]

    def answer(self, pack: int) -> None:
        """Begin the second turn of a pack, by the order of the first."""
        self._pack, self._hears, self._asked = pack, False, {}

    def forget(self) -> None:
        """End the step; until the next, losses compare the bags that they are given alone."""
        self._packs, self._pack = [], None

    def losses(self, name: str, logits: Tensor, target: Tensor, compare: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return the losses of bags among all bags of the step, (B,).

        Their sum has the gradient of the sum over the step: what the bags change in the losses of others is in it, too.

        Parameters
        ----------
        name : str
            Of the target; its calls in one pack are those in another, in their order.
        logits, target : (B, ...) tensor
        compare : callable
            Returns the losses (B,) of bags that are compared with each other, from logits and targets.
        """
        if self._pack is None:
            return compare(logits, target)
        if self._hears:
            self._packs[self._pack].setdefault(name, []).append((logits.detach(), target))
            return compare(logits, target)
        call = self._asked.get(name, 0)
        self._asked[name] = call + 1
        others = [
            pack[name][call]
            for number, pack in enumerate(self._packs)
            if number != self._pack and call < len(pack.get(name, ()))
        ]
        if not others:
            return compare(logits, target)
        said, known = [logits, *(a for a, _ in others)], [target, *(b for _, b in others)]
        everyone = compare(torch.cat(said), torch.cat(known))
        rest = everyone[len(logits) :].sum()
        return everyone[: len(logits)] + (rest - rest.detach()) / len(logits)
