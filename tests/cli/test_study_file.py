"""One file of paths and options for every command, and how commands name things."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner, Result

from eosin.cli._arguments import Features, Job, Labels, Model, Out, SlideMpp, Slides
from eosin.cli._common import Done, command
from eosin.cli._settings import Settings
from eosin.cli.app import COMMANDS, OLD_SPELLINGS, app

MOST_FLAGS = 12


def run(function: Callable[..., Done], *arguments: str, **declared: object) -> Result:
    small = typer.Typer(pretty_exceptions_enable=False)
    small.command()(command("tiling", "recipe", **declared)(function))  # type: ignore[arg-type]
    return CliRunner().invoke(small, list(arguments))


def read(tmp_path: Path, text: str, *arguments: str) -> dict[str, object] | Result:
    seen: list[dict[str, object]] = []

    def go(*, slides: Slides, job: Job, slide_mpp: SlideMpp = None, workers: int = 0, settings: Settings) -> Done:
        seen.append({**settings.data, "slides": slides, "job": job, "slide_mpp": slide_mpp, "workers": workers})
        return Done()

    (tmp_path / "study.yaml").write_text(text)
    result = run(go, str(tmp_path / "study.yaml"), *arguments, bare="slides")
    return seen[0] if seen else result


def test_a_study_file_holds_paths_and_options_and_its_paths_are_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "mpp.csv").write_text("slide,mpp\n")
    found = read(tmp_path, "slides: My slides\njob: out\nslide-mpp: mpp.csv\nworkers: 2\ntiling: {mpp: 1.0}\n")
    assert isinstance(found, dict)
    assert found["slides"] == [tmp_path / "My slides"]
    assert found["job"] == tmp_path / "out"
    assert found["slide_mpp"] == str(tmp_path / "mpp.csv")
    assert found["workers"] == 2
    assert found["tiling"] == {"mpp": 1.0}


def test_flags_win_over_assignments_and_those_over_the_file(tmp_path: Path) -> None:
    text = "slides: [a, b]\njob: out\nworkers: 2\nslide_mpp: 0.25\n"
    found = read(tmp_path, text, "--set", "workers=3", "--set", "job=here", "--slide-mpp", "0.5", "c.svs")
    assert isinstance(found, dict)
    assert (found["workers"], found["job"], found["slide_mpp"]) == (3, Path("here"), "0.5")
    assert found["slides"] == [Path("c.svs")]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("slidess: a\n", "did you mean slides"),
        ("job: out\n", "--slides: missing"),
        ("workers: 2\n", "--slides, --job: missing"),
        ("learning_rate: 0.1\n", "did you mean recipe.training.lr"),
        ("slides: a\njob: out\nworkers: many\n", "workers: 'many' is not a whole number"),
        ("slides: a\njob: {}\n", "job: {} is not a path"),
    ],
)
def test_what_is_missing_or_wrong_in_a_study_file_is_one_line(tmp_path: Path, text: str, told: str) -> None:
    result = read(tmp_path, text)
    assert isinstance(result, Result)
    assert result.exit_code == 2
    assert told in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_file_may_hold_what_other_commands_read(tmp_path: Path) -> None:
    assert isinstance(read(tmp_path, "slides: a\njob: out\nlabels: l.csv\nseed: 3\n"), dict)


def test_what_stands_below_the_job_needs_no_line(tmp_path: Path) -> None:
    seen = []

    def go(*, model: Model, labels: Labels, features: Features = None, out: Out) -> Done:
        seen.append((model, out, features))
        return Done()

    (tmp_path / "s.yaml").write_text("job: job\nlabels: l.csv\n")
    result = run(go, str(tmp_path / "s.yaml"), "--out", "o", of_job={"model": "model", "out": "maps"})
    assert result.exit_code == 0, result.stderr
    assert seen == [(tmp_path / "job/model", Path("o"), None)]


def test_features_follow_from_job_tiling_and_encoder(tmp_path: Path) -> None:
    seen = []

    def go(*, features: Annotated[Path, typer.Option()]) -> Done:
        seen.append(features)
        return Done()

    (tmp_path / "s.yaml").write_text("job: job\nencoder: he_texture\ntiling: {mpp: 1.0}\n")
    assert run(go, str(tmp_path / "s.yaml")).exit_code == 0
    assert seen == [tmp_path / "job/1mpp_256px_0px_overlap/features_he_texture"]


def test_a_recipe_is_a_name_a_name_with_changes_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("")
    for recipe, found in (
        ("acmil", ("acmil", {})),
        ({"name": "acmil", "training": {"epochs": 3}}, ("acmil", {"training": {"epochs": 3}})),
        ("mine.yaml", (str(tmp_path / "mine.yaml"), {})),
        ({"training": {"epochs": 3}}, (None, {"training": {"epochs": 3}})),
    ):
        assert Settings({"recipe": recipe}, tmp_path, frozenset({"recipe"})).named("recipe") == found


def test_a_path_without_an_option_is_refused_where_none_is_expected() -> None:
    result = run(lambda: Done(), "slide.svs")
    assert (result.exit_code, "slide.svs: not a study file (.yaml)" in result.stderr) == (2, True)


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_lists_more_than_twelve_options(name: str) -> None:
    parameters = typer.main.get_command(app).commands[name].params  # type: ignore[attr-defined]
    visible = [one.name for one in parameters if one.param_type_name == "option" and not one.hidden]
    assert len(visible) <= MOST_FLAGS, visible


@pytest.mark.parametrize("name", COMMANDS)
def test_slides_features_model_and_out_are_called_the_same_everywhere(name: str) -> None:
    parameters = typer.main.get_command(app).commands[name].params  # type: ignore[attr-defined]
    named = {option for one in parameters for option in one.opts}
    assert not named & {f"--{old}" for old in OLD_SPELLINGS}
    assert not {one.name for one in parameters if one.param_type_name == "argument"} & {"slides", "features", "model"}


def test_old_spellings_still_work(tmp_path: Path) -> None:
    for arguments in (
        ["heatmap", "--model", "no", "--slide", "no.svs", "--out", "o"],
        ["tile", "no.svs", "--job", str(tmp_path)],
        ["export", "no.h5", "--to", "clam", "--out", str(tmp_path)],
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert "missing" not in result.stderr.replace("is missing", "")
        assert "No such option" not in result.stderr
