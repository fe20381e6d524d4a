"""From bags in files to packs on a device: which bags are computed together, and in which order."""

import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from eosin.errors import ConfigError
from eosin.kernels._memory import new_tensor
from eosin.mil._data import BagSource, Examples
from eosin.mil._tables import shown
from eosin.mil.bags import LARGE_BAG, PIECE_ROWS, BagInPieces, PackedBags

EVALUATION_INSTANCES = 100_000
KEPT_BYTES = 256 * 2**20
AHEAD = 2

T = TypeVar("T")


def pack_bags(
    bags: BagSource,
    ids: Sequence[str],
    *,
    most_per_bag: int = 0,
    generator: torch.Generator | None = None,
    places: bool = False,
) -> PackedBags:
    """Load bags and pack them, in their stored dtype, on the host.

    Parameters
    ----------
    bags : BagSource
    ids : sequence of str
    most_per_bag : int
        A random sample of this many instances stands for a larger bag; 0 takes all.
    generator : torch.Generator, optional
        Draws the samples.
    places : bool
        Whether the pack has the places of the tiles, for a model that reads them.
    """
    chosen = [_sample(bags.length(name), most_per_bag, generator) for name in ids]
    values = [bags.load(name, rows) for name, rows in zip(ids, chosen, strict=True)]
    where = [_places(bags, name, rows) for name, rows in zip(ids, chosen, strict=True)] if places else None
    return PackedBags.pack(values, ids=tuple(ids), places=where)


def _sample(length: int, most: int, generator: torch.Generator | None) -> Tensor | None:
    """Return the rows of a random sample, or None for all."""
    if not most or length <= most:
        return None
    # in the order of the file: read in one sweep, and neighbours stay beside each other
    return torch.randperm(length, generator=generator)[:most].sort().values


def _places(bags: BagSource, name: str, rows: Tensor | None) -> Tensor:
    where = bags.places(name)
    if where is None and bags.length(name):
        raise without_places([name])
    where = torch.zeros(0, 2) if where is None else where
    return where if rows is None else where[rows]


def without_places(names: Sequence[str]) -> ConfigError:
    """Return the error for bags whose features have no tile coordinates, of a model that reads them."""
    return ConfigError(
        f"the model reads where tiles lie, but the features of {shown(names)} have no tile coordinates; extract them "
        "again, or choose an aggregator or an option that does not read them (eosin methods)"
    )


def require_places(bags: BagSource, ids: Sequence[str]) -> None:
    """Raise `ConfigError` that names the bags without tile coordinates."""
    lacking = [name for name in ids if bags.length(name) and bags.places(name) is None]
    if lacking:
        raise without_places(lacking)


def group_by_budget(lengths: Sequence[int], most_instances: int) -> list[list[int]]:
    """Group consecutive bags; a group exceeds the budget of instances only if its single bag does; 0: one group.

    Returns
    -------
    list of lists of int
        Positions in `lengths`; every position once, in order.
    """
    groups: list[list[int]] = []
    filled = 0
    for position, length in enumerate(lengths):
        if not groups or (most_instances and filled + length > most_instances):
            groups.append([])
            filled = 0
        groups[-1].append(position)
        filled += length
    return groups


class DeviceBags:
    """Bags that stay on a device from their first use until a budget is spent; the others are copied each time.

    Parameters
    ----------
    bags : BagSource
    device : torch.device
    budget_bytes : int
        Of the stored dtype.
    """

    def __init__(self, bags: BagSource, device: torch.device, budget_bytes: int) -> None:
        self.spec = bags.spec
        self.ids: Sequence[str] = bags.ids
        self._bags = bags
        self._device = device
        self._kept: dict[str, Tensor] = {}
        self._free_bytes = budget_bytes

    def length(self, bag_id: str) -> int:
        """Return the number of instances."""
        return self._bags.length(bag_id)

    def load(self, bag_id: str, rows: Tensor | None = None) -> Tensor:
        """Return the instances, or some rows of them, on the device."""
        if bag_id in self._kept:
            bag = self._kept[bag_id]
            return bag if rows is None else bag[rows.to(self._device)]
        # a random sample is another one in the next pass
        if rows is not None:
            return self._bags.load(bag_id, rows).to(self._device)
        bag = self._bags.load(bag_id).to(self._device)
        if bag.nbytes <= self._free_bytes:
            self._kept[bag_id] = bag
            self._free_bytes -= bag.nbytes
        return bag

    def places(self, bag_id: str) -> Tensor | None:
        """Return where the tiles lie, on the host, or None."""
        return self._bags.places(bag_id)

    def content_hash(self, bag_id: str) -> str:
        """Return a hash of all instances."""
        return self._bags.content_hash(bag_id)


class EvaluationPacks:
    """All examples in packs, made again at each pass, or kept on the device when they are small.

    A bag of more than `LARGE_BAG` instances that is alone in its pack comes in pieces.

    Parameters
    ----------
    bags : BagSource
    ids : sequence of str
    device : torch.device
    most_instances : int
        Per pack.
    places : bool
        As of `pack_bags`.
    """

    def __init__(
        self,
        bags: BagSource,
        ids: Sequence[str],
        device: torch.device,
        *,
        most_instances: int = EVALUATION_INSTANCES,
        places: bool = False,
    ) -> None:
        self._places = places
        lengths = [bags.length(name) for name in ids]
        self._bags = bags
        self._groups = [[ids[place] for place in group] for group in group_by_budget(lengths, most_instances)]
        self._device = device
        self._kept: list[PackedBags] = []
        self._keep = 4 * sum(lengths) * bags.spec.dim <= KEPT_BYTES

    def __iter__(self) -> Iterator[PackedBags | BagInPieces]:
        if self._kept:
            yield from self._kept
            return
        for pack in map(self._on_device, ahead(map(self._pack, self._groups))):
            if self._keep and isinstance(pack, PackedBags):
                self._kept.append(pack)
            yield pack

    def _pack(self, group: Sequence[str]) -> PackedBags | BagInPieces:
        length = self._bags.length(group[0])
        if self._keep or len(group) > 1 or length <= LARGE_BAG:
            return pack_bags(self._bags, group, places=self._places)
        where = _places(self._bags, group[0], None).to(self._device) if self._places else None
        return BagInPieces(_Pieces(self._bags, group[0]), length, group[0], where)

    def _on_device(self, pack: PackedBags | BagInPieces) -> PackedBags | BagInPieces:
        if isinstance(pack, PackedBags):
            return on_device(pack, self._device)
        return pack.map(lambda piece: _widened(piece.to(self._device)))


@dataclass(frozen=True)
class _Pieces:
    """The instances of a bag, a piece at a time; of a file, a piece is in memory only while it is used."""

    bags: BagSource
    bag_id: str

    def __iter__(self) -> Iterator[Tensor]:
        for rows in torch.arange(self.bags.length(self.bag_id)).split(PIECE_ROWS):  # type: ignore[no-untyped-call]
            yield self.bags.load(self.bag_id, rows)


def on_device(bags: PackedBags, device: torch.device) -> PackedBags:
    """Return the bags on a device with float32 values (float64 stays), converted after the transfer."""
    moved = bags.to(device)
    return moved.with_values(_widened(moved.values))


def _widened(values: Tensor) -> Tensor:
    if values.dtype in (torch.float32, torch.float64):
        return values
    return new_tensor(values, tuple(values.shape), torch.float32).copy_(values)


def draw_order(
    examples: Examples, weights: Tensor | None, generator: torch.Generator, *, bags_per_step: int
) -> list[list[int]]:
    """Return the examples of each step of a pass: all once in random order, or drawn with replacement by weight."""
    if weights is None:
        order = torch.randperm(len(examples), generator=generator)
    else:
        order = torch.multinomial(weights, len(examples), replacement=True, generator=generator)
    return [step.tolist() for step in order.split(bags_per_step)]  # type: ignore[no-untyped-call]


def ahead(items: Iterable[T], *, most: int = AHEAD) -> Iterator[T]:
    """Yield the items while a thread already makes the next ones: files are read while the device computes.

    Parameters
    ----------
    items : iterable
        Is advanced in another thread only; what it raises is raised here.
    most : int
        Items that may wait.
    """
    waiting: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(most)
    stopped = threading.Event()

    def offer(item: T | None, error: BaseException | None = None) -> bool:
        while not stopped.is_set():
            try:
                # wakes up now and then, to notice that nobody waits any more
                waiting.put((item, error), timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            if all(offer(item) for item in items):
                offer(None, _END)
        except BaseException as error:  # noqa: BLE001 (is raised again where the items are used)
            offer(None, error)

    thread = threading.Thread(target=work, name="eosin-feed", daemon=True)
    thread.start()
    try:
        while True:
            item, error = waiting.get()
            if error is _END:
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        # no thread may read files that the caller closes next
        stopped.set()
        thread.join()


_END = BaseException("no more items")
