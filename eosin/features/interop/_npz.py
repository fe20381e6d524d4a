"""Classic multiple-instance data sets in ``.npz`` files become features, labels and folds.

Read are the arrays ``instances`` (n, d), ``bag_index`` (n,), ``bag_label`` (bags,) and, where present,
``cv_train_mask`` (repeats, folds, bags), True where a bag belongs to the training part.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eosin._files import write_text
from eosin._filesets import begin_set, finish_set
from eosin.errors import FeatureFileError
from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.features._store import (
    FREE_EXPANSION_BYTES,
    MAX_BYTES,
    MAX_DIM,
    MAX_EXPANSION,
    MAX_ROWS,
    SUFFIX,
    write_bag,
)
from eosin.features.interop._foreign import merged_labels, require_same_kind, table_text

REQUIRED = ("instances", "bag_index", "bag_label")


def read_npz(path: Path) -> dict[str, NDArray[np.generic]]:
    """Read the arrays of an archive that is measured before it is unpacked.

    Raises
    ------
    FeatureFileError
        If it would unpack to more than eosin reads, is damaged, or holds objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            declared = sum(member.file_size for member in archive.infolist())
        expanded = declared > FREE_EXPANSION_BYTES and declared > MAX_EXPANSION * path.stat().st_size
        if declared > MAX_BYTES or expanded:
            raise FeatureFileError(
                path, f"would unpack to {declared} bytes, more than eosin reads; check the file's source", code="unsafe"
            )
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FeatureFileError:
        raise
    except Exception as error:  # archives and the headers in them fail in a dozen ways
        words = " ".join(str(error).split()) or type(error).__name__
        raise FeatureFileError(path, f"cannot be read as .npz ({words}); make it again") from error


def is_bags(names: Mapping[str, object]) -> bool:
    """Tell whether the arrays of an ``.npz`` file are a data set of bags."""
    return all(name in names for name in REQUIRED)


def import_bags(arrays: Mapping[str, NDArray[np.generic]], path: Path, out: Path) -> list[Path]:
    """Write ``OUT/features/*.h5``, ``OUT/labels.csv`` and, for data with folds, ``OUT/splits/splits_<i>.csv``.

    Parameters
    ----------
    arrays : mapping of str to array
        Content of the file.
    path : Path
        Its name, which becomes part of the bags' ids: ``musk1-000``, ``musk1-001`` ...
    out : Path
        Folder of the results.

    Returns
    -------
    list of Path
        What was written, the folder of features first. Fold ``i`` is ``repeat * folds + fold``; its validation
        column is empty, because training draws a validation part from the training column.

    Raises
    ------
    FeatureFileError
        When the arrays contradict each other.
    """
    instances, index, labels = _checked(arrays, path)
    width = len(str(len(labels) - 1))
    ids = [f"{path.stem}-{bag:0{width}d}" for bag in range(len(labels))]
    starts = np.searchsorted(index, np.arange(len(labels) + 1))
    spec = FeatureSpec(encoder=f"npz:{path.stem}", dim=instances.shape[1])
    table = out / "labels.csv"
    text = merged_labels(table, dict(zip(ids, map(str, labels), strict=True)), path)
    require_same_kind(out / "features" / f"{ids[0]}{SUFFIX}", spec)
    for bag, slide_id in enumerate(ids):
        rows = instances[starts[bag] : starts[bag + 1]]
        write_bag(out / "features" / f"{slide_id}{SUFFIX}", FeatureBag(rows, spec, slide_id))
    write_text(table, text)
    written = [out / "features", table]
    if "cv_train_mask" in arrays:
        _write_splits(_checked_folds(arrays["cv_train_mask"], len(labels), path), ids, out / "splits")
        written.append(out / "splits")
    return written


def _checked(
    arrays: Mapping[str, NDArray[np.generic]], path: Path
) -> tuple[NDArray[np.float32], NDArray[np.int64], list[int]]:
    instances, index, labels = (arrays[name] for name in REQUIRED)
    if instances.ndim != 2 or index.shape != instances.shape[:1] or labels.ndim != 1:
        raise FeatureFileError(
            path,
            f"instances {instances.shape}, bag_index {index.shape} and bag_label {labels.shape} do not fit together; "
            "expected (n, d), (n,) and (bags,)",
        )
    if len(instances) > MAX_ROWS or instances.shape[1] > MAX_DIM or instances.nbytes > MAX_BYTES:
        raise FeatureFileError(
            path, f"instances {instances.shape} are more than eosin reads from one file", code="unsafe"
        )
    if not np.isfinite(instances).all():
        raise FeatureFileError(path, "instances hold infinite or NaN values")
    if (np.diff(index) < 0).any() or (len(index) and not 0 <= index[0] <= index[-1] < len(labels)):
        raise FeatureFileError(path, f"bag_index must ascend from 0 to at most {len(labels) - 1}")
    return instances.astype(np.float32), index.astype(np.int64), [int(label) for label in labels]


def _checked_folds(masks: NDArray[np.generic], n_bags: int, path: Path) -> NDArray[np.bool_]:
    if masks.ndim != 3 or masks.shape[2] != n_bags or masks.dtype != np.bool_:
        raise FeatureFileError(path, f"cv_train_mask is {masks.shape} of {masks.dtype}; expected (r, f, {n_bags}) bool")
    return masks.reshape(-1, n_bags).astype(np.bool_)


def _write_splits(masks: NDArray[np.bool_], ids: list[str], folder: Path) -> None:
    names = [f"splits_{number}.csv" for number in range(len(masks))]
    begin_set(folder, names, pattern=r"splits_\d+\.csv")
    for name, mask in zip(names, masks, strict=True):
        train = [slide_id for slide_id, trains in zip(ids, mask, strict=True) if trains]
        test = [slide_id for slide_id, trains in zip(ids, mask, strict=True) if not trains]
        write_text(folder / name, _split_table(train, test))
    finish_set(folder, names)


def _split_table(train: list[str], test: list[str]) -> str:
    rows = []
    for row in range(max(len(train), len(test))):
        rows.append([row, *("".join(part[row : row + 1]) for part in (train, [], test))])
    return table_text(["", "train", "val", "test"], rows)
