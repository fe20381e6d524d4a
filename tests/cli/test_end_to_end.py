"""The whole way: `eosin run`, `eosin demo`, and real slides of every kind."""

import json
import re
from pathlib import Path

import pytest

from eosin._records import Report
from eosin.errors import ConfigError
from eosin.features._store import read_bag
from eosin.mil._checkpoint import load_card
from eosin.wsi._job import TissueTiles
from eosin.wsi._quality import QualityLimits
from eosin.wsi._synthetic import Cohort, make_cohort

from .conftest import Run

QUICK = ("--set", "recipe.training.epochs=2", "--set", "recipe.aggregator.options.embed_dims=[16]")
SENTENCE = re.compile(r"^\S.{15,}[^.\s]$")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    make_cohort(folder, Cohort(n_slides=8, size_um=(300.0, 350.0), slides_per_patient=1))
    return folder


def test_run_goes_the_whole_way_and_again_in_no_time(run: Run, small: Path, tmp_path: Path) -> None:
    job = tmp_path / "job"
    command = (
        "run", "--slides", small / "slides", "--labels", small / "labels.csv", "--encoder", "he_texture",
        "--recipe", "abmil", "--job", job, "--folds", 2, "--set", "tiling.patch_size=128", *QUICK,
    )  # fmt: skip
    first = run(*command)
    assert first.exit_code == 0, first.output
    for line in first.stdout.splitlines():
        assert Path(line).exists()
    assert json.loads((job / "crossval/metrics.json").read_text())["n_folds"] == 2
    assert load_card(job / "model").recipe.training.epochs == 2
    assert (job / "report.html").is_file()
    assert len(list((job / "heatmaps").glob("*.png"))) == 8
    model = (job / "model/model.safetensors").read_bytes()
    again = run(*command)
    assert (again.exit_code, again.stdout) == (0, first.stdout)
    assert (job / "model/model.safetensors").read_bytes() == model


@pytest.mark.long
def test_run_names_the_slides_that_failed(run: Run, small: Path, tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    for path in (small / "slides").iterdir():
        (slides / path.name).symlink_to(path)
    (slides / "bad.svs").write_bytes(b"no slide" * 100)
    result = run(
        "run", "--slides", slides, "--labels", small / "labels.csv", "--job", tmp_path / "job", "--folds", 2,
        "--set", "tiling.patch_size=128", "--set", "formats=[csv]", *QUICK,
    )  # fmt: skip
    assert result.exit_code == 1
    assert "failed: bad: " in result.stderr
    assert (tmp_path / "job/report.html").is_file()


def test_run_leaves_tiles_out_for_their_quality(
    run: Run, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = []

    def tile_slides(slides: object, job: object, tiles: TissueTiles, **_: object) -> Report:
        limits.append(tiles.quality)
        raise ConfigError("enough was seen")

    monkeypatch.setattr("eosin.wsi._job.tile_slides", tile_slides)
    result = run(
        "run", "--slides", small / "slides", "--labels", small / "labels.csv", "--job", tmp_path / "job",
        "--folds", 2, "--max-pen", 0.1, "--max-blur", 0.9, "--set", "quality.max_fold=0.5",
    )  # fmt: skip
    assert result.exit_code == 2
    assert limits == [QualityLimits(max_pen=0.1, max_blur=0.9, max_fold=0.5)]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--encoder", "he_textur"], "did you mean he_texture"),
        (["--recipe", "abmill"], "did you mean abmil"),
        (["--set", "tiling.mppp=1"], "tiling named 'mppp'"),
        (["--max-pen", "2"], "max_pen"),
        (["--set", "cohort.n_slides=1"], "no option in --set cohort.n_slides=1 named 'cohort'"),
        (["--target", "grade"], "grade"),
        (["--missing", "ignore"], "known: drop, error"),
    ],
)
def test_run_options_that_make_no_sense(
    refused: Run, small: Path, tmp_path: Path, arguments: list[str], told: str
) -> None:
    base = ("--labels", small / "labels.csv", "--job", tmp_path / "job", "--folds", 2)
    assert told in refused("run", "--slides", small / "slides", *base, *arguments)
    assert not list(tmp_path.glob("job/*"))


@pytest.mark.long
def test_demo_judges_itself_by_the_planted_truth(run: Run, tmp_path: Path) -> None:
    quick = (
        "--set", "cohort.n_slides=8", "--set", "cohort.slides_per_patient=1", "--set", "cohort.size_um=[300,350]",
        "--set", "pipeline.recipe.training.epochs=2", "--set", "pipeline.folds=2",
    )  # fmt: skip
    result = run("demo", "--out", tmp_path, *quick)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-2:] == [str(tmp_path / "summary.json"), str(tmp_path / "report.html")]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {"slide_auc", "localisation_auc", "n_slides", "seconds"} <= set(summary)
    assert summary["n_slides"] == 8
    assert f"slide AUC: {summary['slide_auc']:.3f}" in result.stdout


@pytest.mark.shared
@pytest.mark.parametrize("encoder", ["he_texture", "timm:vit_tiny_patch16_224?random"])
@pytest.mark.long
def test_every_real_file_ends_with_a_record_and_none_stops_the_run(
    run: Run, shared: Path, tmp_path: Path, encoder: str
) -> None:
    slides = shared / "data/slides"
    files = [path for path in slides.rglob("*") if path.is_file()]
    tiled = run("tile", slides, "--job", tmp_path)
    encoded = run("extract", slides, "--job", tmp_path, "--encoder", encoder, "--workers", 0)
    assert (tiled.exit_code, encoded.exit_code) == (1, 1)
    records = json.loads((tmp_path / "run.json").read_text())["records"]
    for stage, result in {"tile": tiled, "extract": encoded}.items():
        ended = {record["slide_id"]: record for record in records if record["stage"].split()[0] == stage}
        assert len(ended) == len(files) - 1  # two of the DICOM files are one series
        assert {record["status"] for record in ended.values()} == {"ok", "empty", "failed"}
        for slide_id, record in ended.items():
            if record["status"] == "failed":
                assert re.fullmatch(r"[a-z]+(-[a-z]+)*", record["reason"])
                assert record["reason"] != "internal"
                assert SENTENCE.match(record["message"])
                assert f"failed: {slide_id}: " in result.stderr
    features = Path(encoded.stdout.strip())
    assert len(read_bag(features / "CMU-1-Small-Region.h5").features) > 30


@pytest.mark.shared
def test_a_model_looks_at_a_real_slide(run: Run, shared: Path, small: Path, tmp_path: Path) -> None:
    job = tmp_path / "job"
    assert run("tile", small / "slides", "--job", job, "--patch-size", 128).exit_code == 0
    assert run("extract", small / "slides", "--job", job, "--encoder", "he_texture", "--workers", 0).exit_code == 0
    features = job / "0.5mpp_128px_0px_overlap/features_he_texture"
    model = tmp_path / "model"
    train = ("train", "--features", features, "--labels", small / "labels.csv", "--out", model, *QUICK)
    assert run(*train).exit_code == 0
    slide = shared / "data/slides/CMU-1-Small-Region.svs"
    new = tmp_path / "new"
    predicted = run("predict", "--model", model, "--slides", slide, "--job", new, "--out", tmp_path / "p.csv")
    assert predicted.exit_code == 0, predicted.output
    assert (tmp_path / "p.csv").read_text().splitlines()[1].startswith("CMU-1-Small-Region,ok,")
    drawn = run("heatmap", "--model", model, "--slide", slide, "--job", new, "--out", tmp_path / "maps")
    assert drawn.exit_code == 0, drawn.output
    png, geojson = map(Path, drawn.stdout.splitlines())
    assert png.stat().st_size > 10_000
    assert len(json.loads(geojson.read_text())["features"]) > 30
