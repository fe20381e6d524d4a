"""HDF5 files of other tools, read in another process: HDF5 can hang or crash on one that is damaged or hostile.

What a reader of a layout may look at is copied out of the file: its attributes, the names and shapes of everything in
it, and the arrays that layouts know. The readers then work on the copy.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from eosin._processes import Helper, limit_memory
from eosin.errors import FeatureFileError, WorkerError
from eosin.features._store import open_hdf5, require_dataset

ARRAYS = ("coords", "features", "feats", "feat", "patch_embeddings")
READ_S = 30.0
SLOWEST_BYTES_PER_S = 10 * 2**20
BASE_BYTES = 2**30
MOST_EXPANSION = 16  # of floats; `require_dataset` refuses what declares far more than it stores
MAX_MEMBERS = 100_000


@dataclass(frozen=True, eq=False)
class Array:
    """A dataset: what it says of itself, and its values where layouts know its name.

    Attributes
    ----------
    shape : tuple of int
    attrs : mapping of str to object
    values : array or None
    """

    shape: tuple[int, ...]
    attrs: Mapping[str, object] = field(default_factory=dict)
    values: NDArray[np.generic] | None = None


@dataclass(frozen=True, eq=False)
class Group(Mapping[str, "Array | Group"]):
    """A group, the file itself first of all.

    Attributes
    ----------
    members : mapping of str to Array or Group
    attrs : mapping of str to object
    """

    members: Mapping[str, "Array | Group"]
    attrs: Mapping[str, object] = field(default_factory=dict)

    def __getitem__(self, name: str) -> "Array | Group":
        return self.members[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)

    def attributes(self, name: str) -> Mapping[str, object]:
        """Return the attributes of a member; none where there is no such member."""
        return self.members[name].attrs if name in self.members else {}

    def array(self, name: str, path: Path) -> NDArray[np.generic]:
        """Return the values of an array; `FeatureFileError` where there is none of this name."""
        member = self.members.get(name)
        if not isinstance(member, Array) or member.values is None:
            raise FeatureFileError(path, f"has no dataset {name!r}")
        return member.values


_reader = Helper()  # one process for all files: a new one takes longer to start than most files to read


def read_foreign(path: Path) -> Group:
    """Copy what layouts know out of a file.

    Parameters
    ----------
    path : Path

    Raises
    ------
    FeatureFileError
        When the file is missing, damaged, declares more than it can hold, or its reading hangs, crashes or takes more
        memory than such a file needs (code ``damaged``).
    """
    if not path.is_file():
        raise FeatureFileError(path, "no such file", code="missing")
    patience = round(READ_S + path.stat().st_size / SLOWEST_BYTES_PER_S, 1)
    try:
        return _reader.call(_copy, path, timeout_s=patience)
    except WorkerError as error:
        message = f"cannot be read: the process that tried {error.message}; make the file again"
        raise FeatureFileError(path, message, code="damaged") from None


def _copy(path: Path) -> Group:
    limit_memory(BASE_BYTES + MOST_EXPANSION * path.stat().st_size)
    with open_hdf5(path) as file:
        return _group(file, path, depth=2)


def _group(group: h5py.Group, path: Path, *, depth: int) -> Group:
    if len(group) > MAX_MEMBERS:
        raise FeatureFileError(path, f"has {len(group)} members, more than the limit of {MAX_MEMBERS}", code="unsafe")
    members: dict[str, Array | Group] = {}
    for name, member in group.items():
        if isinstance(member, h5py.Dataset):
            known = name in ARRAYS
            values = require_dataset(group, name, path)[()] if known else None
            members[name] = Array(tuple(member.shape or ()), _attributes(member), values)
        elif isinstance(member, h5py.Group) and depth > 1:
            members[name] = _group(member, path, depth=depth - 1)
    return Group(members, _attributes(group))


def _attributes(owner: h5py.Dataset | h5py.Group) -> dict[str, object]:
    """Return attributes as numbers, texts and arrays of numbers: HDF5's references mean nothing outside of the file."""
    found: dict[str, object] = {}
    for name, value in owner.attrs.items():
        plain = isinstance(value, str | bytes | np.generic) or (isinstance(value, np.ndarray) and value.dtype != object)
        found[name] = value if plain else str(value)
    return found
