"""The batch type, bags of any length packed into one matrix, and a bag too large to be in memory whole."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from eosin.kernels import bag_offsets
from eosin.kernels._memory import new_tensor

__all__ = ["BagInPieces", "PackedBags"]

LARGE_BAG = 2**15  # instances of a bag that predictions read in pieces, where it is one bag in one pack
PIECE_ROWS = 3072  # as many rows as the kernels compute at once: answers are those of the whole bag
SLIDE_GAP = 64  # steps of the tile grid between slides that lie in one bag, beyond what any method calls near


@dataclass(frozen=True, eq=False)
class PackedBags:
    """Bags of different lengths, one after the other in one matrix.

    Attributes
    ----------
    values : (N, D) float
        Instances of all bags, bag after bag.
    cu_seqlens : (B + 1,) int32
        Row where each bag starts, then N; on the device of `values`.
    lengths : tuple of int
        Instances per bag: the host's copy of the differences of `cu_seqlens`, so that no step waits for a device.
    coords_px0 : (N, 2) int64 or None
        Top-left corners of the tiles, x then y, level-0 pixels.
    ids : tuple of str
        Names of the bags, or empty.
    places : (N, 2) float32 or None
        Where the tiles lie, x then y in steps of their grid, so that neighbours are 1 apart on every slide; several
        slides of one bag lie side by side. None where the model does not read them, or features have no coordinates.
    """

    values: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    coords_px0: Tensor | None = None
    ids: tuple[str, ...] = ()
    places: Tensor | None = None

    def __post_init__(self) -> None:
        if self.values.ndim != 2:
            raise ValueError(f"values must be (N, D), not {tuple(self.values.shape)}")
        if sum(self.lengths) != self.n_instances or len(self.cu_seqlens) != self.n_bags + 1:
            raise ValueError(f"lengths {self.lengths} do not add up to {self.n_instances} instances")
        for where in (self.coords_px0, self.places):
            if where is not None and len(where) != self.n_instances:
                raise ValueError(f"{len(where)} coordinates for {self.n_instances} instances")
        if self.ids and len(self.ids) != self.n_bags:
            raise ValueError(f"{len(self.ids)} ids for {self.n_bags} bags")

    def __repr__(self) -> str:
        kind = f"{str(self.values.dtype).removeprefix('torch.')} on {self.values.device}"
        return f"<PackedBags: {self.n_bags} bags, {self.n_instances} instances x {self.values.shape[1]}, {kind}>"

    @classmethod
    def pack(
        cls,
        bags: Sequence[Tensor],
        *,
        coords_px0: Sequence[Tensor] | None = None,
        ids: Sequence[str] = (),
        places: Sequence[Tensor] | None = None,
    ) -> Self:
        """Pack (n, D) matrices of one width, dtype and device; a bag may be empty. One alone is not copied."""
        if not bags:
            raise ValueError("a pack needs at least one bag")
        values, lengths = _joined(bags), tuple(len(bag) for bag in bags)
        coords, where = (None if parts is None else torch.cat(list(parts)) for parts in (coords_px0, places))
        return cls(values, bag_offsets(lengths, values.device), lengths, coords, tuple(ids), where)

    @property
    def n_bags(self) -> int:
        """Number of bags B."""
        return len(self.lengths)

    @property
    def n_instances(self) -> int:
        """Number of instances N of all bags together."""
        return len(self.values)

    @property
    def dim(self) -> int:
        """Feature width D."""
        return self.values.shape[1]

    @property
    def max_length(self) -> int:
        """Length of the longest bag."""
        return max(self.lengths, default=0)

    def bag_index(self) -> Tensor:
        """Return the bag of each instance, (N,) int64."""
        lengths = torch.tensor(self.lengths, device=self.values.device)
        return torch.repeat_interleave(
            torch.arange(self.n_bags, device=self.values.device), lengths, output_size=self.n_instances
        )

    def unpack(self, values: Tensor | None = None) -> list[Tensor]:
        """Return one tensor per bag, views of `values` or of any other tensor with N rows."""
        rows = self.values if values is None else values
        return list(torch.split(rows, list(self.lengths)))

    def with_values(self, values: Tensor) -> Self:
        """Return the same bags with other values, (N, any width)."""
        return replace(self, values=values)

    def select(self, keep: Tensor) -> Self:
        """Return the bags without the instances where `keep`, (N,) bool, is false; order stays, a bag may become empty.

        Needs the counts on the host: one device synchronisation.
        """
        counts = torch.zeros(self.n_bags, dtype=torch.int64, device=keep.device).index_add_(
            0, self.bag_index(), keep.to(torch.int64)
        )
        lengths = tuple(counts.tolist())
        coords, places = (None if where is None else where[keep] for where in (self.coords_px0, self.places))
        offsets = bag_offsets(lengths, self.values.device)
        return replace(
            self, values=self.values[keep], cu_seqlens=offsets, lengths=lengths, coords_px0=coords, places=places
        )

    def to_padded(self, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return zero-padded values (B, L, D) and the mask of real instances (B, L); L is the longest bag."""
        rows = self.values if values is None else values
        lengths = torch.tensor(self.lengths, device=rows.device)
        mask = torch.arange(self.max_length, device=rows.device) < lengths[:, None]  # (B, L)
        padded = rows.new_zeros(self.n_bags, self.max_length, *rows.shape[1:])
        return padded.masked_scatter(mask[..., None], rows), mask

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Return the bags on another device, their values in another dtype if one is given."""
        return replace(
            self,
            values=self.values.to(device, dtype, non_blocking=True),
            cu_seqlens=bag_offsets(self.lengths, device),
            coords_px0=None if self.coords_px0 is None else self.coords_px0.to(device, non_blocking=True),
            places=None if self.places is None else self.places.to(device, non_blocking=True),
        )


@dataclass(frozen=True, eq=False)
class BagInPieces:
    """One large bag whose instances are read piece by piece, again each time, so that they never exist all at once.

    Attributes
    ----------
    pieces : iterable of (n_i, D) float
        Instances in their order; may be gone through more than once.
    length : int
        Number of instances.
    id : str
        Name of the bag.
    places : (length, 2) float32 or None
        As of `PackedBags`.
    """

    pieces: Iterable[Tensor]
    length: int
    id: str = ""
    places: Tensor | None = None

    @classmethod
    def of(cls, bag: PackedBags) -> Self:
        """Return a pack of one bag in pieces, views of its values."""
        return cls(torch.split(bag.values, PIECE_ROWS), bag.n_instances, "".join(bag.ids), bag.places)

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return the bag with a function applied to each piece when it is read."""
        return replace(self, pieces=_Mapped(function, self.pieces))

    def pack(self) -> PackedBags:
        """Return the bag as a pack, which holds all instances."""
        values: Tensor | None = None
        first = 0
        for piece in self.pieces:
            if values is None:
                values = new_tensor(piece, (self.length, piece.shape[1]))
            values[first : first + len(piece)] = piece
            first += len(piece)
        if values is None or first != self.length:
            raise ValueError(f"the pieces of {self.id or 'the bag'} have {first} instances, not {self.length}")
        return PackedBags.pack([values], ids=(self.id,), places=None if self.places is None else [self.places])


def is_large(bags: PackedBags) -> bool:
    """Return whether a pack is one large bag of which no gradient is asked."""
    return bags.n_bags == 1 and bags.n_instances > LARGE_BAG and not torch.is_grad_enabled()


@dataclass(frozen=True)
class _Mapped:
    function: Callable[[Tensor], Tensor]
    pieces: Iterable[Tensor]

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.function, self.pieces)


def side_by_side(places: Sequence[Tensor]) -> Tensor:
    """Return places of tiles of several slides as one list, the slides in a row so that no tiles of two are near."""
    moved: list[Tensor] = []
    start = 0.0
    for slide in places:
        if len(slide):
            shift = start - slide[:, 0].min()
            moved.append(slide + torch.stack([shift, shift.new_zeros(())]))
            start = float(moved[-1][:, 0].max()) + SLIDE_GAP
    return torch.cat(moved) if moved else torch.cat(list(places))


def _joined(bags: Sequence[Tensor]) -> Tensor:
    if len(bags) == 1:
        return bags[0]
    if any(bag.requires_grad or bag.dtype != bags[0].dtype for bag in bags):
        return torch.cat(list(bags))  # follows gradients, and takes the widest type
    return torch.cat(list(bags), out=new_tensor(bags[0], (sum(map(len, bags)), *bags[0].shape[1:])))
