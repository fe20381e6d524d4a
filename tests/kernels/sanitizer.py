"""Triton's interpreter made as unkind as a GPU: any order of programs, dirty memory, and every address watched.

A GPU runs the programs of a kernel in no order, gives memory with whatever was in it, lets one program read what
another is still to write, and rounds what its tensor cores multiply. The interpreter does none of this by itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import numpy as np
import torch
from triton.runtime import interpreter

BUILDER = interpreter.interpreter_builder
ROUNDED = {torch.bfloat16: 8, torch.float16: 11, "tf32": 11}  # bits of the significand


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
        written, writer = gathered(self.written)
        read, reader = gathered(self.read)
        if len(np.unique(np.stack([written, writer]), axis=1)[0]) > len(np.unique(written)):
            self.faults.append("two programs write the same place")
        order = np.argsort(written, kind="stable")
        written, writer = written[order], writer[order]
        place = np.searchsorted(written, read).clip(max=max(len(written) - 1, 0))
        if len(written) and ((written[place] == read) & (writer[place] != reader)).any():
            self.faults.append("a program reads what another writes")


def gathered(touched: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    if not touched:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return np.concatenate([a for a, _ in touched]), np.concatenate([np.full(len(a), p) for a, p in touched])


@contextmanager
def unkind(monkeypatch, seed: int = 0) -> Iterator[Launches]:
    """Run kernels in random order, on memory full of NaN, with every address watched; what a mask keeps out is NaN."""
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

    def watched_load(pointers, mask, other, *rest):
        launches.touch(pointers.data, mask.data, writes=False)
        found = load(pointers, mask, other, *rest)
        if other is None and np.issubdtype(found.data.dtype, np.floating):
            found.data[~mask.data.astype(bool)] = np.nan
        return found

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
        # fills memory that is not set with NaN; the public function imports a compiler for seconds
        torch._C._set_deterministic_algorithms(True)
        try:
            yield launches
        finally:
            torch._C._set_deterministic_algorithms(False)


def rounded(values: np.ndarray, bits: int) -> np.ndarray:
    """Return float32 numbers with so many bits of significand, rounded to the nearest and to even between two."""
    mantissa, exponent = np.frexp(values.astype(np.float64))
    return np.ldexp(np.round(np.ldexp(mantissa, bits)), exponent - bits).astype(np.float32)


@contextmanager
def tensor_cores(monkeypatch, kind: torch.dtype | str) -> Iterator[None]:
    """Round both factors of every product, as tensor cores do that read half precision or TF32; sums stay float32."""
    bits, dot = ROUNDED[kind], BUILDER.create_dot

    def product_of_rounded(a, b, d, *options):
        left, right = (interpreter.TensorHandle(rounded(part.data, bits), part.dtype) for part in (a, b))
        return dot(left, right, d, *options)

    with monkeypatch.context() as patch:
        patch.setattr(BUILDER, "create_dot", product_of_rounded, raising=False)
        yield
