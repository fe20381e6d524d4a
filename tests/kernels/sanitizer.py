"""Triton's interpreter made as unkind as a GPU: programs in any order, memory that holds anything, and every address watched.

A GPU runs the programs of a kernel in no order, gives memory with whatever was in it, lets one program read what another
is still to write, and rounds what its tensor cores multiply. The interpreter does none of this by itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import numpy as np
import torch
from triton.runtime import interpreter

BUILDER = interpreter.interpreter_builder
DIRTY = 1e30  # a number that spoils what it is added to, but not what it is masked from


class Launches:
    """What the launches of a block did: addresses read and written by each program."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.n_programs = 0
        self.spans = np.zeros((0, 2), np.int64)
        self.faults: list[str] = []

    def begin(self, arguments: list[torch.Tensor]) -> None:
        """Begin a launch with these tensors."""
        spans = [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in arguments]
        self.spans = np.array(sorted({(start, start + size) for start, size in spans if size}), np.int64).reshape(-1, 2)
        self.read: list[tuple[np.ndarray, int]] = []
        self.written: list[tuple[np.ndarray, int]] = []

    def grid(self, sizes: tuple[int, ...]) -> None:
        """Draw an order of the programs."""
        places = np.array(list(product(*map(range, sizes))))
        self.order = iter(self.rng.permutation(places))

    def touch(self, pointers: np.ndarray, mask: np.ndarray, *, writes: bool) -> None:
        """Note addresses of the running program; one outside every tensor of the launch is a fault."""
        addresses = np.unique(pointers[mask.astype(bool)].astype(np.int64))
        after = np.searchsorted(self.spans[:, 0], addresses, side="right") - 1
        inside = (after >= 0) & (addresses < self.spans[after.clip(0), 1]) if len(self.spans) else addresses < 0
        if not inside.all():
            self.faults.append(f"{'writes' if writes else 'reads'} outside of every tensor")
        (self.written if writes else self.read).append((addresses, self.n_programs))

    def end(self) -> None:
        """Compare what the programs of a launch touched: none may write where another reads or writes."""
        owner, by = gathered(self.written)
        keys = np.unique(np.stack([owner, by]), axis=1)
        addresses, counts = np.unique(keys[0], return_counts=True)
        if (counts > 1).any():
            self.faults.append("two programs write the same place")
        read, reader = gathered(self.read)
        place = np.searchsorted(addresses, read)
        known = (place < len(addresses)) & (addresses[place.clip(max=max(len(addresses) - 1, 0))] == read) if len(addresses) else read < 0
        writer = dict(zip(keys[0].tolist(), keys[1].tolist(), strict=True))
        if any(writer[address] != program for address, program in zip(read[known].tolist(), reader[known].tolist(), strict=True)):
            self.faults.append("a program reads what another writes")


def gathered(touched: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    if not touched:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return np.concatenate([a for a, _ in touched]), np.concatenate([np.full(len(a), p) for a, p in touched])


@contextmanager
def unkind(monkeypatch, seed: int = 0) -> Iterator[Launches]:
    """Run kernels in random order, on memory full of NaN, with every address watched."""
    launches = Launches(seed)
    set_idx, set_dim = BUILDER.set_grid_idx, BUILDER.set_grid_dim
    load, store = BUILDER.create_masked_load, BUILDER.create_masked_store
    launch, init = interpreter.GridExecutor.__call__, interpreter.GridExecutor._init_args_hst

    def in_any_order(x, y, z):
        launches.n_programs += 1
        set_idx(*(int(place) for place in next(launches.order)))

    def dims(*sizes):
        launches.grid(sizes)
        set_dim(*sizes)

    def watched_load(pointers, mask, *rest):
        launches.touch(pointers.data, mask.data, writes=False)
        return load(pointers, mask, *rest)

    def watched_store(pointers, value, mask, *rest):
        launches.touch(pointers.data, mask.data, writes=True)
        return store(pointers, value, mask, *rest)

    def arguments(self, given, named):
        hosts = init(self, given, named)
        launches.begin([a for a in (*hosts[0], *hosts[1].values()) if isinstance(a, torch.Tensor)])
        return hosts

    def launched(self, *args, **options):
        found = launch(self, *args, **options)
        launches.end()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(BUILDER, "set_grid_idx", in_any_order, raising=False)
        patch.setattr(BUILDER, "set_grid_dim", dims, raising=False)
        patch.setattr(BUILDER, "create_masked_load", watched_load, raising=False)
        patch.setattr(BUILDER, "create_masked_store", watched_store, raising=False)
        patch.setattr(interpreter.GridExecutor, "_init_args_hst", arguments)
        patch.setattr(interpreter.GridExecutor, "__call__", launched)
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)  # fills memory that is not set with NaN
        try:
            yield launches
        finally:
            torch.use_deterministic_algorithms(deterministic)
