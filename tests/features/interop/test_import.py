"""Files of other tools: recognised, converted, refused with one sentence."""

import json
import os
import pickle
import re
import resource
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from eosin.errors import ConfigError, EosinError, FeatureFileError, FeatureMismatchError
from eosin.features import _foreign_hdf5 as foreign_hdf5
from eosin.features._store import find_bags, read_bag
from eosin.features.interop import Imported, ImportOptions, find_files, group_files, import_file, import_slide
from eosin.wsi._coordinates import read_grid
from eosin.wsi._grid import TileGrid
from eosin.wsi._synthetic import make_slide

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(5, 8)).astype(np.float32)
CORNERS = np.stack([np.arange(5) * 512, np.arange(5) * 256], axis=1).astype(np.int64)
CLAM_ATTRIBUTES = {
    "patch_size": 256,
    "patch_level": 1,
    "downsample": np.array([2.0, 2.0]),
    "level_dim": np.array([2000, 1500]),
    "name": "s.1",
}
TRIDENT_ATTRIBUTES = {
    "patch_size": 256,
    "patch_size_level0": 512.0,
    "overlap": 16,
    "name": "s.1",
    "level0_width": 4000,
    "level0_height": 3000,
    "target_magnification": 20,
    "savetodir": "None",
}


def write_h5(path: Path, datasets: dict[str, np.ndarray], **attributes: dict[str, object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file.create_dataset(name, data=values, chunks=(1, *values.shape[1:]) if values.ndim > 1 else None)
        for name, values in attributes.items():
            (file if name == "root" else file[name]).attrs.update(values)
    return path


def grid_of(done: Imported) -> TileGrid:
    return read_grid(done.paths[0])


def test_clam_coordinates(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "x.h5", {"coords": CORNERS}, coords=CLAM_ATTRIBUTES)
    with pytest.raises(FeatureFileError, match="--slide-mpp") as caught:
        import_file(path, tmp_path / "out")
    assert caught.value.code == "incomplete"
    done = import_file(path, tmp_path / "out", ImportOptions(slide_mpp=0.25))
    assert done.paths == (tmp_path / "out" / "0.5mpp_256px_0px_overlap" / "patches" / "s.1_patches.h5",)
    grid = grid_of(done)
    np.testing.assert_array_equal(grid.origins_px0, CORNERS)
    assert (grid.tile_px0, grid.slide_size_px0, grid.slide_mpp, grid.tiling.mpp) == (512, (4000, 3000), 0.25, 0.5)


def test_clam_features_with_and_without_places(tmp_path: Path) -> None:
    coords = write_h5(tmp_path / "patches" / "a.h5", {"coords": CORNERS}, coords=CLAM_ATTRIBUTES)
    path = write_h5(tmp_path / "a.h5", {"features": ROWS, "coords": CORNERS.astype(np.int32)})
    with pytest.raises(FeatureFileError, match="--encoder"):
        import_file(path, tmp_path / "out")
    bare = read_bag(import_file(path, tmp_path / "out", ImportOptions(encoder="resnet50_trunc")).paths[0])
    assert (bare.spec.encoder, bare.spec.mpp, bare.grid) == ("resnet50", None, None)
    options = ImportOptions(encoder="resnet50", coords=coords, slide_mpp=0.25)
    bag = read_bag(import_file(path, tmp_path / "out", options).paths[0], verify=True)
    np.testing.assert_array_equal(bag.features, ROWS)
    assert (bag.slide_id, bag.spec.mpp, bag.spec.patch_size) == ("a", 0.5, 256)
    other = write_h5(tmp_path / "b.h5", {"features": ROWS, "coords": CORNERS.astype(np.int32) + 1})
    with pytest.raises(FeatureFileError, match="other coordinates"):
        import_file(other, tmp_path / "out", options)


def test_trident_tile_features(tmp_path: Path) -> None:
    path = write_h5(
        tmp_path / "features_uni_v1" / "s.1.h5",
        {"features": ROWS.astype(np.float16), "coords": CORNERS},
        coords=TRIDENT_ATTRIBUTES,
    )
    done = import_file(path, tmp_path / "out", ImportOptions(slide_mpp=0.25))
    assert done.kind == "file of TRIDENT"
    bag = read_bag(done.paths[0])
    assert bag.features.dtype == np.float16
    assert (bag.spec.encoder, bag.spec.mpp, bag.spec.patch_size) == ("uni_v1", 0.5, 256)
    assert bag.grid is not None
    assert (bag.grid.tile_px0, bag.grid.tiling.overlap, bag.grid.slide_size_px0) == (512, 16, (4000, 3000))


def test_trident_coordinates_and_slide_features(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "s.1_patches.h5", {"coords": CORNERS}, coords=TRIDENT_ATTRIBUTES | {"name": "None"})
    done = import_file(path, tmp_path / "out", ImportOptions(slide_mpp=0.25))
    assert done.paths[0].name == "s.1_patches.h5"
    whole = write_h5(
        tmp_path / "slide_features_titan" / "s.1.h5",
        {"features": ROWS[0], "coords": CORNERS},
        coords=TRIDENT_ATTRIBUTES,
    )
    bag = read_bag(import_file(whole, tmp_path / "out").paths[0])
    assert (bag.features.shape, bag.spec.encoder, bag.grid) == ((1, 8), "titan", None)


def test_stamp(tmp_path: Path) -> None:
    root = {"extractor": "uni2-h", "unit": "um", "tile_size_um": 256.0, "tile_size_px": 224, "stamp_version": "2.5.0"}
    um = (CORNERS * 0.25).astype(np.float32)
    path = write_h5(tmp_path / "s.h5", {"feats": ROWS.astype(np.float16), "coords": um}, root=root)
    with pytest.raises(FeatureFileError, match="--slide-mpp"):
        import_file(path, tmp_path / "out")
    bag = read_bag(import_file(path, tmp_path / "out", ImportOptions(slide_mpp=0.25)).paths[0])
    assert bag.grid is not None
    np.testing.assert_array_equal(bag.grid.origins_px0, CORNERS)
    assert (bag.grid.tile_px0, bag.spec.patch_size, bag.spec.encoder) == (1024, 224, "uni_v2")
    assert bag.spec.mpp == pytest.approx(256 / 224, abs=1e-5)
    whole = write_h5(tmp_path / "p.h5", {"feats": ROWS[0]}, root={"encoder": "titan", "feat_type": "slide"})
    assert read_bag(import_file(whole, tmp_path / "whole").paths[0]).features.shape == (1, 8)


def test_old_stamp(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "s.h5", {"feats": ROWS, "coords": CORNERS // 512 * 224}, root={"extractor": "ctp"})
    bag = read_bag(import_file(path, tmp_path / "out", ImportOptions(slide_mpp=0.5)).paths[0])
    assert bag.grid is not None
    assert bag.grid.tile_px0 == 512
    np.testing.assert_array_equal(bag.grid.origins_px0[:, 0], CORNERS[:, 0])


def test_acmil(tmp_path: Path) -> None:
    path = tmp_path / "all.h5"
    with h5py.File(path, "w") as file:
        for i in range(3):
            group = file.create_group(f"s{i}")
            group["feat"], group["coords"] = ROWS[: i + 1], CORNERS[: i + 1]
            group.attrs["label"] = i % 2
    done = import_file(path, tmp_path / "out", ImportOptions(encoder="x"))
    assert [len(read_bag(bag).features) for bag in find_bags(tmp_path / "out" / "features").values()] == [1, 2, 3]
    assert done.paths[-1].read_text().splitlines()[:2] == ["patient_id,slide_id,label", "s0,s0,0"]


def test_wsinfer(tmp_path: Path) -> None:
    attributes = {"patch_size": 350, "patch_level": 0, "patch_spacing_um_px": 0.5}
    path = write_h5(tmp_path / "s.h5", {"coords": CORNERS}, coords=attributes)
    grid = grid_of(import_file(path, tmp_path / "out", ImportOptions(slide_mpp=0.25)))
    assert (grid.tile_px0, grid.tiling.patch_size, grid.tiling.mpp) == (350, 175, 0.5)


def test_tensors(tmp_path: Path) -> None:
    torch.save(torch.from_numpy(ROWS), tmp_path / "s.pt")
    coords = write_h5(tmp_path / "c.h5", {"coords": CORNERS}, coords=TRIDENT_ATTRIBUTES)
    options = ImportOptions(encoder="uni", coords=coords, slide_mpp=0.25)
    bag = read_bag(import_file(tmp_path / "s.pt", tmp_path / "out", options).paths[0])
    assert bag.grid is not None
    assert bag.spec.encoder == "uni_v1"
    torch.save({"a": 1}, tmp_path / "d.pt")
    with pytest.raises(EosinError, match="holds a dict"):
        import_file(tmp_path / "d.pt", tmp_path / "out", options)


def test_slideflow(tmp_path: Path) -> None:
    torch.save(torch.from_numpy(ROWS), tmp_path / "s.pt")
    np.savez(tmp_path / "s.index.npz", CORNERS + 256)
    config = {"extractor": {"class": "uni"}, "tile_px": 256, "tile_um": 128.0}
    (tmp_path / "bags_config.json").write_text(json.dumps(config))
    bag = read_bag(import_file(tmp_path / "s.pt", tmp_path / "out", ImportOptions(slide_mpp=0.25)).paths[0])
    assert bag.grid is not None
    np.testing.assert_array_equal(bag.grid.origins_px0, CORNERS)
    assert (bag.grid.tile_px0, bag.spec.encoder, bag.spec.mpp) == (512, "uni_v1", 0.5)


def deep_config(folder: Path) -> None:
    (folder / "bags_config.json").write_text("[" * 100_000)


def broken_index(folder: Path) -> None:
    (folder / "s.index.npz").write_bytes(b"PK\x03\x04 and no more")


def large_index(folder: Path) -> None:
    with zipfile.ZipFile(folder / "s.index.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", bytes(64 * 2**20))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(deep_config, "64 levels"), (broken_index, "cannot be read"), (large_index, "would unpack to")],
)
def test_the_files_beside_a_tensor_are_measured_too(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    torch.save(torch.from_numpy(ROWS), tmp_path / "s.pt")
    np.savez(tmp_path / "s.index.npz", CORNERS + 256)
    config = {"extractor": {"class": "uni"}, "tile_px": 256, "tile_um": 128.0}
    (tmp_path / "bags_config.json").write_text(json.dumps(config))
    spoil(tmp_path)
    with pytest.raises(FeatureFileError, match=message):
        import_file(tmp_path / "s.pt", tmp_path / "out", ImportOptions(slide_mpp=0.25))


@pytest.mark.parametrize("with_header", [True, False])
def test_dsmil_table(tmp_path: Path, with_header: bool) -> None:
    lines = [",".join(f"{value:.4f}" for value in row) for row in ROWS]
    header = [",".join(map(str, range(8)))] if with_header else []
    (tmp_path / "s.csv").write_text("\n".join(header + lines))
    bag = read_bag(import_file(tmp_path / "s.csv", tmp_path / "out", ImportOptions(encoder="x")).paths[0])
    np.testing.assert_allclose(bag.features, ROWS, atol=1e-4)


def test_old_clam_pixels_give_their_coordinates(tmp_path: Path) -> None:
    attributes = {"patch_level": 0, "wsi_name": "s", "downsample": np.array([1.0, 1.0])}
    path = write_h5(tmp_path / "s.h5", {"imgs": np.zeros((5, 64, 64, 3), np.uint8), "coords": CORNERS}, imgs=attributes)
    assert grid_of(import_file(path, tmp_path / "out", ImportOptions(slide_mpp=0.5))).tile_px0 == 64


@pytest.mark.parametrize("name", ["../../evil", "a/b", ".hidden", "", "a\\b"])
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    path = write_h5(tmp_path / "x.h5", {"coords": CORNERS}, coords=CLAM_ATTRIBUTES | {"name": name})
    with pytest.raises(FeatureFileError, match="cannot be a file name"):
        import_file(path, tmp_path / "out", ImportOptions(slide_mpp=0.25))
    assert not (tmp_path / "out").exists()


def test_refusals(tmp_path: Path) -> None:
    options = ImportOptions(encoder="x", slide_mpp=0.5)
    bad_rows = ROWS.copy()
    bad_rows[1, 1] = np.nan
    cases = {
        "attention": write_h5(tmp_path / "a.h5", {"attention_scores": ROWS, "coords": CORNERS}),
        "that eosin reads": write_h5(tmp_path / "b.h5", {"x": ROWS}),
        "infinite or NaN": write_h5(tmp_path / "c.h5", {"features": bad_rows, "coords": CORNERS}),
        "6 rows|5 rows of features for 4": write_h5(
            tmp_path / "d.h5", {"features": ROWS, "coords": CORNERS[:4]}, coords=TRIDENT_ATTRIBUTES
        ),
        "incomplete": write_h5(tmp_path / "e.h5", {"coords": CORNERS}, coords={"patch_level": 0}),
        "below 0": write_h5(tmp_path / "f.h5", {"coords": CORNERS - 9}, coords=CLAM_ATTRIBUTES),
        "cannot be read": tmp_path / "g.h5",
        "neither a table of features": tmp_path / "h.csv",
        "predictions of wsinfer": tmp_path / "i.csv",
        "cannot be imported": tmp_path / "j.parquet",
    }
    (tmp_path / "g.h5").write_bytes(b"damaged")
    (tmp_path / "h.csv").write_text("slide,label\na,b\n")
    (tmp_path / "i.csv").write_text("minx,miny,width,height,prob_a\n0,0,1,1,0.5\n")
    (tmp_path / "j.parquet").write_bytes(b"PAR1")
    for message, path in cases.items():
        with pytest.raises(FeatureFileError, match=message):
            import_file(path, tmp_path / "out", options)


def test_a_pickle_in_a_tensor_file_never_runs(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "canary"),)

    (tmp_path / "s.pt").write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(EosinError, match="never executes"):
        import_file(tmp_path / "s.pt", tmp_path / "out", ImportOptions(encoder="x"))
    assert not (tmp_path / "canary").exists()


def bomb_of_rows(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("feats", (10**9, 1024), "f4", chunks=(1000, 1024), compression="gzip")
        file.attrs.update({"extractor": "x", "unit": "um", "tile_size_um": 256.0})


def bomb_of_columns(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("features", (10, 10**9), "f4", chunks=(1, 1000))
        file.create_dataset("coords", data=CORNERS).attrs.update(TRIDENT_ATTRIBUTES)


def bomb_of_zeros(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("feats", data=np.zeros((60_000, 128), np.float32), chunks=(6_000, 128), compression="gzip")


def bomb_of_places(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("coords", (10**9, 2), "i8", chunks=(1000, 2)).attrs.update(CLAM_ATTRIBUTES)


def bomb_of_an_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("instances.npy", bytes(64 * 2**20))


def bomb_of_a_tensor(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"")
        archive.writestr("archive/data/0", bytes(64 * 2**20))


def bomb_of_a_stride(path: Path) -> None:
    torch.save(torch.zeros(1, 1).expand(10**7, 8192), path)


def bomb_of_text(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(3 * 2**30)


@pytest.mark.parametrize(
    ("name", "make"),
    [("a.h5", bomb_of_rows), ("b.h5", bomb_of_columns), ("c.h5", bomb_of_zeros), ("d.h5", bomb_of_places),
     ("e.npz", bomb_of_an_archive), ("f.pt", bomb_of_a_tensor), ("g.pt", bomb_of_a_stride), ("h.csv", bomb_of_text)],
)  # fmt: skip
def test_bombs_are_refused_before_anything_is_read(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    make(tmp_path / name)
    options = ImportOptions(encoder="x", slide_mpp=0.5)
    started, peak = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(EosinError, match=r"declares|would unpack|larger than") as caught:
        import_file(tmp_path / name, tmp_path / "out", options)
    assert caught.value.code == "unsafe"
    assert time.perf_counter() - started < 10  # most of it to start the process that reads
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200 * 1024  # KiB
    assert not (tmp_path / "out").exists()


def test_folders_of_features_coordinates_and_slides(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b.1")):
        places = CORNERS // 8 + 128 * number
        level = {"name": name, "level_dim": np.array([256, 256])}
        write_h5(tmp_path / "patches" / f"{name}.h5", {"coords": places}, coords=CLAM_ATTRIBUTES | level)
        write_h5(tmp_path / "h5_files" / f"{name}.h5", {"features": ROWS, "coords": places.astype(np.int32)})
        make_slide(tmp_path / "slides" / f"{name}.tiff", size_px0=(512, 512), mpp=0.25, seed=number)
    files = find_files([tmp_path / "h5_files"])
    assert [file.stem for file in files] == ["a", "b.1"]
    options = ImportOptions(encoder="x", coords=tmp_path / "patches", slide=tmp_path / "slides")
    for number, file in enumerate(files):
        bag = read_bag(import_file(file, tmp_path / "out", options).paths[0])
        assert bag.grid is not None
        np.testing.assert_array_equal(bag.grid.origins_px0, CORNERS // 8 + 128 * number)
        assert bag.spec.mpp == pytest.approx(0.5, rel=0.01)
        assert len(bag.provenance["input_fingerprint"]) == 16
    other = write_h5(tmp_path / "c.h5", {"features": ROWS, "coords": CORNERS.astype(np.int32)})
    with pytest.raises(FeatureFileError, match=r"has no slide called c in .*slides") as caught:
        import_file(other, tmp_path / "out", options)
    assert caught.value.code == "incomplete"
    with pytest.raises(FeatureFileError, match=r"has no coords called c in .*patches"):
        import_file(other, tmp_path / "out", ImportOptions(encoder="x", coords=tmp_path / "patches"))
    with pytest.raises(ConfigError, match="no file that eosin can import"):
        find_files([tmp_path / "slides"])


def write_acmil(path: Path, labels: dict[str, str]) -> Path:
    with h5py.File(path, "w") as file:
        for name, label in labels.items():
            group = file.create_group(name)
            group["feat"], group["coords"] = ROWS, CORNERS
            group.attrs["label"] = label
    return path


def test_labels_of_several_files_are_put_together(tmp_path: Path) -> None:
    options, out = ImportOptions(encoder="x"), tmp_path / "out"
    import_file(write_acmil(tmp_path / "a.h5", {"s1": "tumour", "s2": "normal"}), out, options)
    import_file(write_acmil(tmp_path / "b.h5", {"s3": "tumour", "s2": "normal"}), out, options)
    assert (out / "labels.csv").read_text() == ("patient_id,slide_id,label\ns1,s1,tumour\ns2,s2,normal\ns3,s3,tumour\n")
    assert sorted(find_bags(out / "features")) == ["s1", "s2", "s3"]
    before = (out / "labels.csv").read_bytes()
    with pytest.raises(FeatureFileError, match=r"c\.h5: labels s1 as 'normal', .*as 'tumour'") as caught:
        import_file(write_acmil(tmp_path / "c.h5", {"s4": "normal", "s1": "normal"}), out, options)
    assert caught.value.code == "labels"
    assert (out / "labels.csv").read_bytes() == before
    assert sorted(find_bags(out / "features")) == ["s1", "s2", "s3"], "nothing of the file was written"


def test_patients_that_a_user_has_filled_in_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "labels.csv").write_text("patient_id,slide_id,label\np7,s1,tumour\n")
    import_file(write_acmil(tmp_path / "a.h5", {"s1": "tumour", "s2": "normal"}), out, ImportOptions(encoder="x"))
    assert (out / "labels.csv").read_text() == "patient_id,slide_id,label\np7,s1,tumour\ns2,s2,normal\n"
    (out / "labels.csv").write_text("slide,grade\ns1,3\n")
    with pytest.raises(FeatureFileError, match="choose another --out"):
        import_file(write_acmil(tmp_path / "b.h5", {"s3": "tumour"}), out, ImportOptions(encoder="x"))


def test_features_of_two_kinds_do_not_come_into_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name, rows in (("a", ROWS), ("b", ROWS[:, :7]), ("c", ROWS)):
        np.savetxt(tmp_path / f"{name}.csv", rows, delimiter=",")
    import_file(tmp_path / "a.csv", out, ImportOptions(encoder="x"))
    with pytest.raises(FeatureMismatchError, match=r"b\.h5: .*a\.h5 expects: width 7, not 8"):
        import_file(tmp_path / "b.csv", out, ImportOptions(encoder="x"))
    with pytest.raises(FeatureMismatchError, match=r"c\.h5: .*a\.h5 expects: encoder y, not x"):
        import_file(tmp_path / "c.csv", out, ImportOptions(encoder="y"))
    import_file(tmp_path / "a.csv", out, ImportOptions(encoder="y"))
    assert list(find_bags(out / "features")) == ["a"]


def test_our_own_files_are_recognised(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "x.h5", {"coords": CORNERS}, coords=CLAM_ATTRIBUTES)
    ours = import_file(path, tmp_path / "out", ImportOptions(slide_mpp=0.25)).paths[0]
    with pytest.raises(FeatureFileError, match="already a file of eosin"):
        import_file(ours, tmp_path / "again")


@pytest.mark.shared
def test_real_coordinates_of_clam(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "interop" / "clam_h5"
    slide = shared / "data" / "slides" / "CMU-1-Small-Region.svs"
    done = import_file(folder / "CMU-1-Small-Region.patch_level0.h5", tmp_path, ImportOptions(slide=slide))
    grid = grid_of(done)
    assert (grid.n_tiles, grid.tile_px0, grid.slide_size_px0) == (50, 256, (2220, 2967))
    assert grid.slide_mpp == pytest.approx(0.499)
    other = folder / "tcga-cr-7395-01a-01-ts1.patch_level0.h5"
    with pytest.raises(FeatureFileError, match="--slide-mpp"):
        import_file(other, tmp_path)
    assert grid_of(import_file(other, tmp_path, ImportOptions(slide_mpp=0.5))).n_tiles == 169


@pytest.mark.shared
def test_real_outputs_of_other_pipelines(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "interop" / "pipeline_outputs"
    grid = grid_of(import_file(folder / "hs2p-test-wsi.coordinates.npz", tmp_path))
    assert (grid.n_tiles, grid.tile_px0, grid.tiling.patch_size) == (459, 444, 224)
    assert grid.slide_mpp == pytest.approx(0.252)
    assert grid.tiling.mpp == pytest.approx(0.5, rel=0.002)
    grid = grid_of(import_file(folder / "luna-123.tiles.csv", tmp_path, ImportOptions(slide_mpp=0.25)))
    assert (grid.tile_px0, grid.tiling.patch_size, grid.tiling.mpp) == (512, 256, 0.5)
    bag = read_bag(
        import_file(folder / "slide2vec-test-wsi.pt", tmp_path, ImportOptions(encoder="virchow_cls")).paths[0]
    )
    assert bag.features.shape == (1, 1280)
    for name in ("luna-123.tiles.h5", "luna-123.tiles.parquet", "luna-tile_scores_and_labels.csv",
                 "wsinfer-breast-tumor-resnet34.purple.csv"):  # fmt: skip
        with pytest.raises(FeatureFileError):
            import_file(folder / name, tmp_path, ImportOptions(encoder="x", slide_mpp=0.5))


TRIDENT_40X = TRIDENT_ATTRIBUTES | {"level0_magnification": 40}


def trident(tmp_path: Path, coords: np.ndarray = CORNERS, **changes: object) -> Path:
    return write_h5(
        tmp_path / "features_uni_v1" / "s.1.h5", {"features": ROWS, "coords": coords}, coords=TRIDENT_40X | changes
    )


def contradiction(path: Path, out: Path, **options: object) -> str:
    """Import what contradicts itself; return the message, after it has been forced and the result says so."""
    with pytest.raises(FeatureFileError, match="--force") as caught:
        import_file(path, out, ImportOptions(**options))
    assert caught.value.code == "contradiction"
    assert not out.exists()
    done = import_file(path, out, ImportOptions(**options, force=True))
    assert done.notes
    bag = read_bag(done.paths[0])
    assert bag.provenance["forced"]
    assert bag.provenance["forced"] in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("stated", [{"level0_magnification": 40}, {"level0_magnification": "None"}])
def test_an_mpp_that_contradicts_a_magnification_is_refused(tmp_path: Path, stated: dict[str, object]) -> None:
    path = trident(tmp_path, **stated)
    message = contradiction(path, tmp_path / "out", slide_mpp=0.5)
    assert "level 0 is 40x, about 0.25 µm/px, but --slide-mpp says 0.5 µm/px" in message
    for mpp in (0.25, 0.2325, 0.2743):
        assert read_bag(import_file(path, tmp_path / "true", ImportOptions(slide_mpp=mpp)).paths[0]).grid is not None


def test_the_magnification_that_a_file_states_is_named_where_the_mpp_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FeatureFileError, match=r"states 40x, and .*--slide-mpp 0\.25 or --slides"):
        import_file(trident(tmp_path), tmp_path / "out")


def test_sizes_that_contradict_the_magnifications_are_refused(tmp_path: Path) -> None:
    message = contradiction(trident(tmp_path, patch_size_level0=2048), tmp_path / "out", slide_mpp=0.25)
    assert "are 512 px of level 0, and 2048 px of it" in message


def test_an_encoder_that_contradicts_the_file_is_refused(tmp_path: Path) -> None:
    assert "states the encoder uni_v1, but --encoder says conch_v1" in contradiction(
        trident(tmp_path), tmp_path / "out", slide_mpp=0.25, encoder="conch_v1"
    )
    # another name of the same encoder, and one that eosin cannot know
    import_file(trident(tmp_path), tmp_path / "same", ImportOptions(slide_mpp=0.25, encoder="uni"))


def test_a_tile_size_that_contradicts_the_file_is_refused_and_wins_where_it_is_forced(tmp_path: Path) -> None:
    asked = {"slide_mpp": 0.25, "tile_size": 300}
    message = contradiction(trident(tmp_path), tmp_path / "out", **asked)
    assert "states tiles of 512 px of level 0, but --tile-size says 300" in message
    assert read_bag(tmp_path / "out/features/s.1.h5").grid.tile_px0 == 300
    import_file(trident(tmp_path), tmp_path / "same", ImportOptions(slide_mpp=0.25, tile_size=512))


@pytest.mark.parametrize("force", [False, True])
def test_coordinates_that_are_not_numbers_are_refused(tmp_path: Path, force: bool) -> None:
    path = trident(tmp_path, np.where(np.arange(len(CORNERS))[:, None] == 1, np.nan, CORNERS))
    with pytest.raises(FeatureFileError, match=r"coordinates (are not|that are not) numbers"):
        import_file(path, tmp_path / "out", ImportOptions(slide_mpp=0.25, force=force))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c + np.array([4000, 0]), r"5 of 5 tiles outside the slide of 4000 x 3000 px, the first at 4000, 0"),
        (lambda c: c - np.array([0, 1]), r"1 of 5 tiles with corners below 0, the first at 0, -1"),
        (lambda c: np.concatenate([c[:3], c[:2]]), r"2 of 5 tiles at the place of another one"),
        (lambda c: c + np.array([0.5, 0]), r"5 of 5 tiles between pixels, the first at 0\.5, 0"),
    ],
)
def test_places_that_cannot_be_are_refused(
    tmp_path: Path, change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    path = trident(tmp_path, change(CORNERS))
    if "-1" in message:
        with pytest.raises(FeatureFileError, match=message):
            import_file(path, tmp_path / "out", ImportOptions(slide_mpp=0.25))
        return
    assert re.search(message, contradiction(path, tmp_path / "out", slide_mpp=0.25))


def test_the_last_tiles_of_a_slide_may_reach_beyond_it(tmp_path: Path) -> None:
    corners = CORNERS + np.array([3999 - CORNERS[-1, 0], 0])
    import_file(trident(tmp_path, corners), tmp_path / "out", ImportOptions(slide_mpp=0.25))


def test_a_slide_of_another_size_or_scale_is_refused(tmp_path: Path) -> None:
    make_slide(tmp_path / "slides/s.1.tiff", size_px0=(512, 512), mpp=0.5, seed=0)
    with pytest.raises(FeatureFileError) as caught:
        import_file(trident(tmp_path), tmp_path / "out", ImportOptions(slide=tmp_path / "slides"))
    assert "was made from a slide of 4000 x 3000 px, but that of --slides" in caught.value.message
    assert "level 0 is 40x" in caught.value.message


def test_a_level_of_clam_gives_the_size_of_the_slide_to_its_own_rounding(tmp_path: Path) -> None:
    make_slide(tmp_path / "s.1.tiff", size_px0=(2047, 1535), mpp=0.25, seed=0)
    level = {"downsample": np.array([3.998, 3.997]), "patch_level": 1, "level_dim": np.array([512, 384])}
    path = write_h5(tmp_path / "s.1.h5", {"coords": CORNERS[:4] // 4}, coords=CLAM_ATTRIBUTES | level)
    grid = grid_of(import_file(path, tmp_path / "out", ImportOptions(slide=tmp_path / "s.1.tiff")))
    assert (grid.tile_px0, grid.slide_size_px0) == (1024, (2047, 1535))
    wrong = write_h5(tmp_path / "w.h5", {"coords": CORNERS}, coords=CLAM_ATTRIBUTES | {"patch_level": 0})
    with pytest.raises(FeatureFileError, match="states level 0 and a downsample of 2"):
        import_file(wrong, tmp_path / "out", ImportOptions(slide_mpp=0.25))


LATTICE = np.array([[768, 0], [1024, 0], [768, 256], [1024, 256], [1280, 768]])


def clam_folders(tmp_path: Path, *, rows: np.ndarray = ROWS, patches: bool = False) -> Path:
    clam = tmp_path / "clam"
    write_h5(clam / "h5_files/a.h5", {"features": ROWS, "coords": LATTICE.astype(np.int32)})
    (clam / "pt_files").mkdir()
    torch.save(torch.from_numpy(rows), clam / "pt_files/a.pt")
    if patches:
        write_h5(clam / "patches/a.h5", {"coords": LATTICE}, coords=CLAM_ATTRIBUTES | {"name": "a"})
    return clam


def test_features_and_places_of_one_slide_in_several_folders_are_joined(tmp_path: Path) -> None:
    clam = clam_folders(tmp_path, patches=True)
    (group,) = group_files(find_files([clam]))
    assert len(group) == 3
    done = import_slide(group, tmp_path / "out", ImportOptions(encoder="x", slide_mpp=0.25))
    bag = read_bag(done.paths[0])
    assert bag.grid is not None
    np.testing.assert_array_equal(bag.grid.origins_px0, LATTICE)
    assert (bag.grid.tile_px0, bag.spec.mpp) == (512, 0.5)
    np.testing.assert_array_equal(bag.features, ROWS)
    assert len(done.notes) == 2


@pytest.mark.parametrize(
    ("options", "side", "note"),
    [
        ({"slide_mpp": 0.25}, 256, "the distance of neighbours"),
        ({"slide_mpp": 0.25, "tile_size": 512}, 512, "as --tile-size says"),
        ({}, None, r"neighbours are 256 px apart\), so its places are left out"),
    ],
)
def test_places_without_a_tile_size_are_reported(
    tmp_path: Path, options: dict[str, float], side: int | None, note: str
) -> None:
    (group,) = group_files(find_files([clam_folders(tmp_path)]))
    done = import_slide(group, tmp_path / "out", ImportOptions(encoder="x", **options))
    grid = read_bag(done.paths[0]).grid
    assert (grid.tile_px0 if grid else None) == side
    assert re.search(note, " ".join(done.notes))


@pytest.mark.parametrize(
    ("rows", "message"),
    [(ROWS[:4], r"holds other features of the slide than .*\(5 x 8 and 4 x 8\)"), (ROWS + 1, "holds other features")],
)
def test_files_of_one_slide_that_disagree_are_refused(tmp_path: Path, rows: np.ndarray, message: str) -> None:
    (group,) = group_files(find_files([clam_folders(tmp_path, rows=rows)]))
    with pytest.raises(FeatureFileError, match=message) as caught:
        import_slide(group, tmp_path / "out", ImportOptions(encoder="x"))
    assert caught.value.code == "contradiction"
    assert not (tmp_path / "out").exists()


def test_features_of_two_encoders_are_not_put_over_each_other(tmp_path: Path) -> None:
    for name in ("uni_v1", "conch_v1"):
        data = {"features": ROWS if name == "uni_v1" else ROWS[::-1], "coords": CORNERS}
        write_h5(tmp_path / f"features_{name}/s.h5", data, coords=TRIDENT_40X | {"name": "s"})
    (group,) = group_files(find_files([tmp_path]))
    with pytest.raises(FeatureFileError, match=r"holds features of \w+, but .* of \w+; import one of them"):
        import_slide(group, tmp_path / "out", ImportOptions(slide_mpp=0.25))


def test_a_file_on_which_hdf5_hangs_is_a_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_h5(tmp_path / "s.h5", {"coords": CORNERS}, coords=CLAM_ATTRIBUTES)
    monkeypatch.setattr(foreign_hdf5, "_copy", hang)
    monkeypatch.setattr(foreign_hdf5, "READ_S", 0.2)
    with pytest.raises(FeatureFileError, match="gave no answer for") as caught:
        import_file(path, tmp_path / "out", ImportOptions(slide_mpp=0.25))
    assert caught.value.code == "damaged"
    monkeypatch.undo()
    import_file(path, tmp_path / "out", ImportOptions(slide_mpp=0.25))  # by a process that took over


def hang(_path: Path) -> None:
    time.sleep(100)


def test_the_real_inputs_that_contradict_or_lie_in_two_folders(shared: Path, tmp_path: Path) -> None:
    cases = shared / "cases/import"
    assert "40x" in contradiction(cases / "trident_wrongmpp.h5", tmp_path / "out", slide_mpp=0.5)
    (group,) = group_files(find_files([cases / "clam-layout"]))
    bag = read_bag(import_slide(group, tmp_path / "b", ImportOptions(encoder="x", slide_mpp=0.499)).paths[0])
    assert bag.grid is not None
    assert (bag.n_instances, bag.grid.tile_px0) == (45, 256)


def test_a_script_without_a_guard_may_import(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "s.h5", {"coords": CORNERS}, coords=CLAM_ATTRIBUTES)
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\nfrom eosin.features._foreign_hdf5 import read_foreign\n"
        f"print(read_foreign(Path({str(path)!r})).array('coords', Path()).shape)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("(5, 2)\n", 0), done.stderr
