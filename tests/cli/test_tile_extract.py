"""`eosin tile` and `eosin extract` on small slides: results, resumption, and every bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile

from eosin.features._store import find_bags, read_bag, verify_bag
from eosin.wsi._coordinates import read_grid
from eosin.wsi._synthetic import make_slide

from .conftest import Run

TILING = "0.5mpp_128px_0px_overlap"


def records(job: Path) -> dict[tuple[str, str], dict[str, object]]:
    listed = json.loads((job / "run.json").read_text())["records"]
    return {(record["stage"].split()[0], record["slide_id"]): record for record in listed}


def content(folder: Path) -> dict[str, tuple[bytes, bytes]]:
    bags = {name: read_bag(path) for name, path in find_bags(folder).items()}
    return {name: (bag.features.tobytes(), bag.grid.origins_px0.tobytes()) for name, bag in bags.items() if bag.grid}


def plain_tiff(path: Path, *, resolution: tuple[float, float] | None = None) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8)
    unit = None if resolution is None else "CENTIMETER"
    tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb", resolution=resolution, resolutionunit=unit)
    return path


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    path = tmp_path / "slides/a.tiff"
    path.parent.mkdir()
    make_slide(path, size_px0=(512, 512), mpp=0.5)
    return path


def test_tile_writes_the_documented_files(job: Path) -> None:
    assert {path.name for path in job.iterdir() if not path.name.startswith(".")} == {
        "thumbnails", "contours", "contours_geojson", TILING, "run.json",
    }  # fmt: skip
    assert (job / "thumbnails/S000.jpg").is_file()
    assert json.loads((job / "contours_geojson/S000.geojson").read_text())["type"] == "FeatureCollection"
    assert read_grid(job / TILING / "patches/S000_patches.h5").n_tiles > 3


def test_extract_writes_one_verified_file_per_slide(job: Path, features: Path) -> None:
    bags = find_bags(features)
    assert sorted(bags) == [f"S{number:03d}" for number in range(12)]
    for path in bags.values():
        verify_bag(path)
    assert {(stage, record["status"]) for (stage, _), record in records(job).items()} == {
        ("tile", "ok"),
        ("extract", "ok"),
    }


def test_the_result_folders_are_printed(run: Run, slide: Path, tmp_path: Path) -> None:
    job = tmp_path / "job"
    assert run("tile", slide, "--job", job).stdout == f"{job}/0.5mpp_256px_0px_overlap\n"
    done = run("extract", slide, "--job", job, "--encoder", "he_texture", "--workers", 0)
    assert done.stdout == f"{job}/0.5mpp_256px_0px_overlap/features_he_texture\n"
    assert done.stderr == "1 slide: 1 ok\n"


def test_a_second_run_skips_and_changes_nothing(run: Run, slide: Path, tmp_path: Path) -> None:
    job = tmp_path / "job"
    for _ in range(2):
        tiled = run("tile", slide, "--job", job, "--patch-size", 128)
        encoded = run("extract", slide, "--job", job, "--encoder", "he_texture", "--workers", 0)
    assert (tiled.exit_code, tiled.stderr) == (0, "1 slide: 1 skipped\n")
    assert (encoded.exit_code, encoded.stderr) == (0, "1 slide: 1 skipped\n")


def test_all_ways_to_give_an_option_mean_the_same(run: Run, slide: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("tiling: {mpp: 1.0, patch_size: 64}\ntissue: {min_area_um2: 100}\n")
    ways = [
        ["--mpp", 1.0, "--patch-size", 64],
        ["--magnification", 10, "--patch_size", 64],
        ["--set", "tiling.mpp=1.0", "--set", "tiling.patch_size=64"],
        ["--config", config],
        ["--config", config, "--set", "tiling.patch_size=32", "--patch-size", 64],
    ]
    for number, way in enumerate(ways):
        assert run("tile", slide, "--job", tmp_path / str(number), *way).exit_code == 0
        assert (tmp_path / str(number) / "1mpp_64px_0px_overlap").is_dir()


def test_shards_share_the_work_and_the_job(run: Run, cohort: Path, tmp_path: Path) -> None:
    for number in range(3):
        result = run("tile", cohort / "slides", "--job", tmp_path, "--patch-size", 128, "--shard", f"{number}/3")
        assert result.stderr.splitlines()[-1] == "4 slides: 4 ok"
    assert len(records(tmp_path)) == 12


def test_workers_give_the_same_grids(run: Run, cohort: Path, job: Path, tmp_path: Path) -> None:
    assert run("tile", cohort / "slides", "--job", tmp_path, "--patch-size", 128, "--workers", 1).exit_code == 0
    for path in (job / TILING / "patches").glob("*.h5"):
        again = read_grid(tmp_path / TILING / "patches" / path.name)
        assert np.array_equal(again.origins_px0, read_grid(path).origins_px0)


def test_slide_mpp_as_number_and_as_table(run: Run, tmp_path: Path) -> None:
    slide = plain_tiff(tmp_path / "a.tif")
    table = tmp_path / "mpp.csv"
    table.write_text("slide,mpp\na.tif,0.5\n")
    for number, value in enumerate((0.5, table)):
        job = tmp_path / str(number)
        assert run("tile", slide, "--job", job, "--slide-mpp", value, "--patch-size", 128).exit_code == 0
        assert read_grid(job / TILING / "patches/a_patches.h5").slide_mpp == 0.5


def test_verify_passes_a_sound_job_and_names_a_damaged_file(run: Run, slide: Path, tmp_path: Path) -> None:
    job = tmp_path / "job"
    assert run("tile", slide, "--job", job).exit_code == 0
    assert run("extract", slide, "--job", job, "--encoder", "he_texture", "--workers", 0).exit_code == 0
    sound = run("verify", job)
    assert (sound.exit_code, sound.stdout) == (0, "")
    (path,) = job.glob("*/features_he_texture/*.h5")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    damaged = run("verify", job)
    assert damaged.exit_code == 1
    assert f"failed: {path.relative_to(job)}: " in damaged.stderr


def test_verify_of_something_else(refused: Run, tmp_path: Path) -> None:
    assert "not a job folder" in refused("verify", tmp_path)


# bad input


def test_a_missing_file(refused: Run, tmp_path: Path) -> None:
    line = refused("tile", tmp_path / "missing.svs", "--job", tmp_path / "job")
    assert "missing.svs: no such file" in line
    assert not (tmp_path / "job").exists()


def test_a_folder_without_slides(refused: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no slide in this folder" in refused("tile", tmp_path / "empty", "--job", tmp_path / "job")


def test_two_slides_of_one_name(refused: Run, slide: Path, tmp_path: Path) -> None:
    other = tmp_path / "slides/sub/a.tiff"
    other.parent.mkdir()
    other.write_bytes(slide.read_bytes())
    line = refused("tile", tmp_path / "slides", "--job", tmp_path / "job")
    assert "a (a.tiff, a.tiff); --verbose names the folders" in line


@pytest.mark.parametrize(
    ("resolution", "reason", "told"),
    [(None, "no-mpp", "--slide-mpp"), ((28.3, 28.3), "bad-mpp", "--slide-mpp")],
)
def test_a_slide_without_a_believable_mpp_fails_alone(
    run: Run, slide: Path, tmp_path: Path, resolution: tuple[float, float] | None, reason: str, told: str
) -> None:
    plain_tiff(slide.with_name("b.tiff"), resolution=resolution)
    result = run("tile", slide.parent, "--job", tmp_path / "job")
    assert result.exit_code == 1
    failed = [line for line in result.stderr.splitlines() if line.startswith("failed: b: ")]
    assert len(failed) == 1
    assert told in failed[0]
    assert records(tmp_path / "job")["tile", "b"]["reason"] == reason
    assert records(tmp_path / "job")["tile", "a"]["status"] == "ok"


def test_a_broken_slide_fails_alone(run: Run, slide: Path, tmp_path: Path) -> None:
    slide.with_name("b.svs").write_bytes(b"no slide" * 1000)
    result = run("tile", slide.parent, "--job", tmp_path / "job")
    assert result.exit_code == 1
    assert "failed: b: " in result.stderr
    assert "2 slides: 1 ok, 1 failed" in result.stderr


@pytest.mark.parametrize("value", ["-1", "0", "nan", "352.8", "inf"])
def test_a_nonsense_mpp_of_the_user_is_refused_or_fails_the_slide(
    run: Run, slide: Path, tmp_path: Path, value: str
) -> None:
    result = run("tile", slide, "--job", tmp_path / "job", "--slide-mpp", value)
    assert result.exit_code in (1, 2)
    assert "mpp" in result.stderr or "µm/px" in result.stderr
    assert not list(tmp_path.glob("job/*/patches/*.h5"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--mpp", "0"], "tiling: mpp"),
        (["--mpp", "nan"], "tiling: mpp"),
        (["--overlap", "256"], "overlap 256 must be smaller"),
        (["--mpp", "0.5", "--magnification", "20"], "pass one"),
        (["--magnification", "0"], "must be greater than 0"),
        (["--shard", "4/4"], "expected I/N"),
        (["--set", "tiling.patchsize=3"], "did you mean patch_size"),
        (["--set", "tissue.mp=3"], "did you mean mpp"),
        (["--set", "recipe.training.lr=3"], "no option in --set recipe.training.lr=3 named 'recipe'"),
        (["--slide-mpp", "mpp.csv"], "mpp.csv: cannot be read"),
    ],
)
def test_tile_options_that_make_no_sense(
    refused: Run, slide: Path, tmp_path: Path, arguments: list[str], told: str
) -> None:
    assert told in refused("tile", slide, "--job", tmp_path / "job", *arguments)
    assert not (tmp_path / "job").exists()


def test_a_typo_in_the_command_line_is_a_usage_error(run: Run) -> None:
    assert run("tile", "--patchsize", "3").exit_code == 2
    assert run("tyle").exit_code == 2


@pytest.mark.parametrize("command", [["tile"], ["extract", "--encoder", "he_texture"]])
def test_an_output_folder_that_cannot_be_written_to(
    refused: Run, slide: Path, tmp_path: Path, command: list[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    code = 3 if command == ["tile"] else 2  # nothing was tiled into that job, which extract notices first
    line = refused(command[0], slide, "--job", tmp_path / "file/job", *command[1:], code=code)
    assert "error: job: " in line


def test_extract_before_tile(refused: Run, slide: Path, tmp_path: Path) -> None:
    line = refused("extract", slide, "--job", tmp_path / "job", "--encoder", "he_texture", "--workers", 0)
    assert "run `eosin tile`" in line


def test_a_slide_that_was_not_tiled_fails_alone(run: Run, slide: Path, tmp_path: Path) -> None:
    job = tmp_path / "job"
    assert run("tile", slide, "--job", job).exit_code == 0
    make_slide(slide.with_name("b.tiff"), size_px0=(512, 512))
    result = run("extract", slide.parent, "--job", job, "--encoder", "he_texture", "--workers", 0)
    assert result.exit_code == 1
    assert "failed: b: " in result.stderr
    assert records(job)["extract", "b"]["reason"] == "not-tiled"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--encoder", "he_textur"], "did you mean he_texture"),
        (["--encoder", "he_texture", "--precision", "fp8"], "fp8"),
        (["--encoder", "he_texture", "--device", "toaster"], "toaster"),
        (["--encoder", "he_texture", "--weights", "w.pt"], "remove --weights"),
        (["--encoder", "he_texture", "--tiling", "9mpp"], "has no tiling 9mpp"),
        (["--encoder", "kaiko_vits16", "--weights", "nowhere"], "nowhere"),
    ],
)
def test_extract_options_that_make_no_sense(
    refused: Run, cohort: Path, job: Path, arguments: list[str], told: str
) -> None:
    assert told in refused("extract", cohort / "slides", "--job", job, *arguments)


def test_several_tilings_must_be_told_apart(run: Run, refused: Run, slide: Path, tmp_path: Path) -> None:
    job = tmp_path / "job"
    for size in (128, 256):
        assert run("tile", slide, "--job", job, "--patch-size", size).exit_code == 0
    assert "--tiling" in refused("extract", slide, "--job", job, "--encoder", "he_texture", "--workers", 0)
    assert (
        run("extract", slide, "--job", job, "--encoder", "he_texture", "--tiling", TILING, "--workers", 0).exit_code
        == 0
    )


def eosin(*arguments: object) -> list[str]:
    return [str(Path(sys.executable).with_name("eosin")), *map(str, arguments)]


@pytest.mark.long
def test_a_killed_extract_continues_and_ends_with_identical_features(
    cohort: Path, job: Path, features: Path, tmp_path: Path, run: Run
) -> None:
    again = tmp_path / "job"
    assert run("tile", cohort / "slides", "--job", again, "--patch-size", 128).exit_code == 0
    command = eosin("extract", cohort / "slides", "--job", again, "--encoder", "he_texture", "--workers", 0)
    folder = again / TILING / "features_he_texture"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not list(folder.glob("S*.h5")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
    before = content(folder)
    assert 0 < len(before) < 12, "the process was not killed in the middle"
    result = run("extract", cohort / "slides", "--job", again, "--encoder", "he_texture", "--workers", 0)
    assert result.exit_code == 0
    assert f"{len(before)} skipped" in result.stderr
    assert content(folder) == content(features)
    left = [path for path in folder.iterdir() if path.suffix != ".h5"]
    assert not [path for path in left if path.suffix != ".lock" or path.stat().st_size]  # a claim ends with its process


@pytest.mark.long
def test_a_full_disk_stops_the_run_with_3_and_leaves_no_partial_file(
    cohort: Path, job: Path, features: Path, tmp_path: Path, run: Run
) -> None:
    again = tmp_path / "job"
    assert run("tile", cohort / "slides", "--job", again, "--patch-size", 128).exit_code == 0
    command = eosin("extract", cohort / "slides", "--job", again, "--encoder", "he_texture", "--workers", 0)
    limit = min(path.stat().st_size for path in features.glob("*.h5")) - 100
    shell = f"ulimit -f {limit // 1024}; exec {' '.join(command)}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    folder = again / TILING / "features_he_texture"
    assert not folder.exists() or list(folder.glob("*")) == []
    assert run("extract", cohort / "slides", "--job", again, "--encoder", "he_texture", "--workers", 0).exit_code == 0
    assert content(folder) == content(features)
