"""The feature file: round trip, trust, refusals."""

import itertools
import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from scaling import scaled

from eosin import _seals as seals
from eosin.errors import ConfigError, FeatureFileError, FeatureMismatchError
from eosin.features import _store as store
from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.wsi._grid import TileGrid, Tiling


def make_grid(n: int) -> TileGrid:
    origins = np.stack(np.meshgrid(np.arange(n) * 256, [0]), axis=-1).reshape(-1, 2).astype(np.int64)
    return TileGrid(origins, 256, Tiling(), (256 * (n + 1), 512), 0.5)


def make_bag(
    n: int = 7, dim: int = 5, *, dtype: type = np.float32, with_grid: bool = True, seed: int = 0
) -> FeatureBag:
    features = np.random.default_rng(0).normal(size=(n, dim)).astype(dtype)
    spec = FeatureSpec(encoder="he_texture", weights_hash="abc", dim=dim, mpp=0.5, patch_size=256)
    facts = {"input_fingerprint": "f" * 16, "options_hash": "o" * 16, "note": "µ and ü"}
    return FeatureBag(features, spec, "slide.1", make_grid(n) if with_grid else None, facts)


@pytest.mark.parametrize("n", [0, 1, 7, 3000])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("with_grid", [True, False])
def test_round_trip(tmp_path: Path, n: int, dtype: type, with_grid: bool) -> None:
    bag = make_bag(n, 400, dtype=dtype, with_grid=with_grid)
    store.write_bag(tmp_path / "a.h5", bag)
    back = store.read_bag(tmp_path / "a.h5", verify=True)
    np.testing.assert_array_equal(back.features, bag.features)
    assert back.features.dtype == dtype
    assert (back.spec, back.slide_id, dict(back.provenance)) == (bag.spec, bag.slide_id, dict(bag.provenance))
    assert (back.grid is None) != with_grid
    if back.grid is not None:
        np.testing.assert_array_equal(back.grid.origins_px0, bag.grid.origins_px0)
    assert store.read_spec(tmp_path / "a.h5") == bag.spec
    assert store.read_footer(tmp_path / "a.h5") == store.Footer(n, "f" * 16, "o" * 16)
    store.verify_bag(tmp_path / "a.h5")


def test_rows_are_a_read_only_aligned_map(tmp_path: Path) -> None:
    store.write_bag(tmp_path / "a.h5", make_bag(9))
    features = store.read_bag(tmp_path / "a.h5").features
    assert isinstance(features.base, np.memmap)
    with h5py.File(tmp_path / "a.h5") as file:  # as any other tool reads it
        np.testing.assert_array_equal(file["features"][:], features)
        assert file["coords"].attrs["patch_size_level0"] == 256
    assert features.ctypes.data % store.ALIGNMENT_BYTES == 0
    with pytest.raises(ValueError, match="read-only"):
        features[0, 0] = 1


def test_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    store.write_bag(tmp_path / "a.h5", make_bag())
    time.sleep(1.1)  # HDF5 keeps times in seconds where it is let
    store.write_bag(tmp_path / "b.h5", make_bag())
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_spec_of_features_without_tiles(tmp_path: Path) -> None:
    bag = FeatureBag(np.ones((3, 2), np.float32), FeatureSpec(encoder="npz:musk1", dim=2), "m-0")
    store.write_bag(tmp_path / "m-0.h5", bag)
    assert store.read_spec(tmp_path / "m-0.h5") == bag.spec


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_not_written(tmp_path: Path, bad: float) -> None:
    bag = make_bag()
    bag.features[4, 2] = bad
    with pytest.raises(ValueError, match="row 4"):
        store.write_bag(tmp_path / "a.h5", bag)
    assert list(tmp_path.iterdir()) == []


def test_damage_outside_the_rows_is_found_on_every_opening(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    store.write_bag(path, make_bag(40, 33))
    whole = path.read_bytes()
    with h5py.File(path) as file:
        start = file["features"].id.get_offset()
    outside = [*range(start), *range(start + 40 * 33 * 4, len(whole))]
    for place in outside[::41]:
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        for read in (store.read_bag, store.read_spec, store.read_footer):
            with pytest.raises(FeatureFileError):
                read(path)


@pytest.mark.parametrize("n", [300, pytest.param(scaled(10_000, 301), marks=pytest.mark.slow)])
def test_every_flipped_bit_is_found_by_verify_and_by_the_next_use(tmp_path: Path, n: int) -> None:
    path = tmp_path / "a.h5"
    store.write_bag(path, make_bag(40, 33, dtype=np.float16))
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    places = set(rng.integers(0, 8 * len(whole), n)) | set(range(8 * seals.PREAMBLE.size))
    for number, place in enumerate(sorted(places)):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        os.utime(path, ns=(number, number))  # writes may come faster than the clock of a file system ticks
        for read in (store.verify_bag, store.read_bag):
            with pytest.raises(FeatureFileError):
                read(path)


def edits(rng: np.random.Generator) -> Iterator[Callable[[h5py.File], None]]:
    """Yield edits of the header as somebody would make them with h5py."""

    def set_attribute(file: h5py.File) -> None:
        name = str(rng.choice(sorted(file.attrs)))
        file.attrs[name] = str(rng.choice(["eosin-features", "1.1", "uni_v1", "0", "{}"]))

    def delete_attribute(file: h5py.File) -> None:
        owner = file[str(rng.choice(["/", "coords", "features", "checksums"]))]
        del owner.attrs[str(rng.choice(sorted(owner.attrs)))]

    def add_attribute(file: h5py.File) -> None:
        file[str(rng.choice(["/", "coords"]))].attrs[f"note{rng.integers(1000)}"] = int(rng.integers(1000))

    def move_a_tile(file: h5py.File) -> None:
        file["coords"][rng.integers(len(file["coords"])), rng.integers(2)] += int(rng.integers(1, 500))

    def change_a_checksum(file: h5py.File) -> None:
        file["checksums"][0] += np.uint32(rng.integers(1, 9999))

    def rename_a_member(file: h5py.File) -> None:
        file.move("coords", f"places{rng.integers(1000)}")

    kinds = (set_attribute, delete_attribute, add_attribute, move_a_tile, change_a_checksum, rename_a_member)
    while True:
        yield from kinds


@pytest.mark.parametrize("n", [60, pytest.param(scaled(1_000, 61), marks=pytest.mark.slow)])
def test_every_edit_of_the_header_is_found_by_verify_and_by_the_next_use(tmp_path: Path, n: int) -> None:
    path = tmp_path / "a.h5"
    store.write_bag(path, make_bag(40, 33))
    whole = path.read_bytes()
    changed = 0
    for edit in itertools.islice(edits(np.random.default_rng(2)), n):
        path.write_bytes(whole)
        with h5py.File(path, "r+") as file:
            edit(file)
        if path.read_bytes() == whole:
            continue
        changed += 1
        for read in (store.verify_bag, store.read_bag, store.read_spec, store.read_footer):
            with pytest.raises(FeatureFileError):
                read(path)
    assert changed > 0.9 * n


def test_rows_are_checked_on_the_first_use_and_when_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, checked = tmp_path / "a.h5", []
    store.write_bag(path, make_bag(300, 40))
    check = store._check_rows
    monkeypatch.setattr(store, "_check_rows", lambda *arguments: (checked.append(1), check(*arguments)))
    os.utime(path, ns=(1, 1))  # as a file that this process has not written
    for _ in range(3):
        store.read_bag(path)
    assert len(checked) == 1
    os.utime(path, ns=(2, 2))
    store.read_bag(path)
    assert len(checked) == 2
    store.read_bag(path, verify=True)
    assert len(checked) == 3
    os.utime(path, ns=(3, 3))
    store.read_bag(path, verify=False)
    assert len(checked) == 3


def test_damage_names_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    store.write_bag(path, make_bag(9000, 100))
    with h5py.File(path) as file:
        offset = file["features"].id.get_offset()
    data = bytearray(path.read_bytes())
    data[offset + 5000 * 400] ^= 1
    path.write_bytes(data)
    store.read_bag(path, verify=False)
    with pytest.raises(FeatureFileError, match=r"damaged in rows \d+ to \d+") as caught:
        store.read_bag(path, verify=True)
    first, last = (int(word) for word in caught.value.detail.replace(";", "").split() if word.isdigit())
    assert first <= 5000 <= last
    assert last - first < store.BLOCK_BYTES // 400 + 2


@pytest.mark.parametrize("cut", [1, 100, 4000])
def test_truncated_and_extended_files_are_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.h5"
    store.write_bag(path, make_bag(50, 40))
    whole = path.read_bytes()
    for content in (whole[:-cut], whole + bytes(cut), whole + bytes(2 * store.BLOCK_BYTES)):
        path.write_bytes(content)
        with pytest.raises(FeatureFileError):
            store.verify_bag(path)


@contextmanager
def forged(path: Path, n: int, dim: int) -> Iterator[h5py.File]:
    """Open a file for writing whose header and checksum are right whatever is put into it."""
    with h5py.File(path, "w", libver=("v110", "v110"), userblock_size=store.USER_BLOCK_BYTES) as file:
        header = {"encoding-type": store.ENCODING_TYPE, "encoding-version": store.ENCODING_VERSION, "slide_id": "s"}
        header |= {"encoder": "e", "dim": dim, "n_rows": n, "provenance": "{}"}
        for name, value in (header | {"input_fingerprint": "", "options_hash": ""}).items():
            file.attrs[name] = value
        yield file
    seal(path)


def seal(path: Path, *, version: int = seals.VERSION) -> None:
    data = bytearray(path.read_bytes())
    data[: seals.PREAMBLE.size] = seals.PREAMBLE.pack(seals.MAGIC, version, 0, 0, 0, len(data))
    data[: seals.PREAMBLE.size] = seals.PREAMBLE.pack(seals.MAGIC, version, zlib.crc32(data), 0, 0, len(data))
    path.write_bytes(data)


def test_a_declared_but_empty_array_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.h5"
    with forged(path, 10**6, 8000) as file:
        file.create_dataset("features", (10**6, 8000), "<f4")
    with pytest.raises(FeatureFileError, match="declares"):
        store.read_bag(path)


def test_too_many_rows_and_columns_are_refused(tmp_path: Path) -> None:
    for n, dim in ((store.MAX_ROWS + 1, 1), (1, store.MAX_DIM + 1)):
        with forged(tmp_path / "bomb.h5", n, dim) as file:
            file.create_dataset("features", (n, dim), "<f2")
        with pytest.raises(FeatureFileError, match="declares") as caught:
            store.read_bag(tmp_path / "bomb.h5")
        assert caught.value.code == "unsafe"


def test_a_compression_bomb_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "bomb.h5", "w") as file:
        file.create_dataset("features", data=np.zeros((40000, 256), np.float32), compression="gzip")
    with store.open_hdf5(tmp_path / "bomb.h5") as file, pytest.raises(FeatureFileError, match="declares"):
        store.require_dataset(file, "features", tmp_path / "bomb.h5")


def test_data_in_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(4000))
    store.write_bag(tmp_path / "other.h5", make_bag(10, 10))
    path = tmp_path / "a.h5"
    layout = h5py.VirtualLayout((10, 10), "<f4")
    layout[:] = h5py.VirtualSource(tmp_path / "other.h5", "features", (10, 10))

    def external_link(file: h5py.File) -> None:
        file["features"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "/features")

    def soft_link(file: h5py.File) -> None:
        file["features"] = h5py.SoftLink("/elsewhere")

    def virtual(file: h5py.File) -> None:
        file.create_virtual_dataset("features", layout)

    def external(file: h5py.File) -> None:
        file.create_dataset("features", (10, 10), "<f4", external=[(tmp_path / "secret.bin", 0, 400)])

    for make in (external_link, soft_link, virtual, external):
        with forged(path, 10, 10) as file:
            make(file)
        with pytest.raises(FeatureFileError) as caught:
            store.read_bag(path)
        assert caught.value.code == "unsafe", make.__name__


def test_foreign_and_future_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    path.write_bytes(b"no HDF5 at all")
    with pytest.raises(FeatureFileError, match="not a feature file"):
        store.read_bag(path)
    with h5py.File(path, "w") as file:
        file["features"] = np.zeros((2, 2), np.float32)
    with pytest.raises(FeatureFileError, match="eosin import"):
        store.read_spec(path)
    with forged(path, 2, 2) as file:
        file.attrs["encoding-version"] = "1.1"
        file["features"] = np.zeros((2, 2), np.float32)
    with pytest.raises(FeatureFileError, match=r"eosin-features 1\.1; this eosin reads eosin-features 1\.0"):
        store.read_bag(path)
    seal(path, version=2)
    with pytest.raises(FeatureFileError, match="format version 2"):
        store.read_bag(path)
    with pytest.raises(FeatureFileError, match="no such file"):
        store.read_bag(tmp_path / "none.h5")


def test_find_bags(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        store.find_bags(tmp_path / "none")
    with pytest.raises(ConfigError, match="no feature files"):
        store.find_bags(tmp_path)
    for name in ("b.x", "a"):
        store.write_bag(tmp_path / f"{name}.h5", make_bag())
    (tmp_path / ".a.h5.1234.tmp.h5").touch()
    assert list(store.find_bags(tmp_path)) == ["a", "b.x"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dim": 6}, "width 6, not 5"),
        ({"encoder": "uni_v1"}, "encoder uni_v1, not he_texture"),
        ({"mpp": 1.0}, "mpp 1, not 0.5"),
        ({"patch_size": 512}, "patch size 512, not 256"),
        ({"weights_hash": "other"}, "weights other, not abc"),
    ],
)
def test_mixed_folders_are_refused_with_both_named(tmp_path: Path, change: dict[str, object], named: str) -> None:
    bag = make_bag()
    store.write_bag(tmp_path / "a.h5", bag)
    spec = bag.spec.model_copy(update=change)
    rows = np.ones((bag.n_instances, spec.dim), np.float32)
    store.write_bag(tmp_path / "b.h5", replace(bag, features=rows, spec=spec))
    with pytest.raises(FeatureMismatchError, match=rf"b\.h5.*a\.h5.*{named}"):
        store.read_common_spec(store.find_bags(tmp_path))
    (tmp_path / "b.h5").unlink()
    assert store.read_common_spec(store.find_bags(tmp_path)) == bag.spec
