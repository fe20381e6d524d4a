"""The command as a whole: names, speed of help, spelling of options."""

import inspect
import subprocess
import sys
import time
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from eosin import __version__
from eosin.cli._settings import options_of
from eosin.cli.app import COMMANDS, app
from eosin.cli.heatmap import DEFAULT_FORMATS
from eosin.mil._recipe import choose_recipe
from eosin.pipeline._run import Pipeline
from eosin.wsi._grid import Tiling

from .conftest import Run

PROMISED = {  # names that scripts rely on
    "demo": "--out",
    "doctor": "",
    "info": "",
    "tile": "--job --mpp --magnification --patch-size --overlap --min-tissue --slide-mpp --workers",
    "extract": "--job --encoder --weights --batch-size --precision --device",
    "split": "--labels --folds --group --out",
    "train": "--features --labels --task --recipe --out --splits --fold",
    "crossval": "--features --labels --task --recipe --out --splits --sweep",
    "predict": "--model --features --slides --out",
    "heatmap": "--model --slides --features --out --format",
    "check": "--slides --labels --encoder --recipe --job",
    "run": "--slides --labels --encoder --recipe --job --study",
    "card": "--job --study --out",
    "studies": "--against",
    "init": "--slides --labels --out",
    "embed": "--features --encoder --model --out",
    "probe": "--features --labels --method --out",
    "zeroshot": "--features --prompts --labels --out",
    "jobs": "",
    "counterfactual": "--model --features --slides --out",
    "view": "--model --features --slides --out --port --html --replay",
    "import": "--out",
    "export": "--to --out",
    "convert": "--encoder --out",
    "verify": "",
    "encoders": "",
    "methods": "",
}
GATHERING = {"check", "run", "crossval", "train", "predict"}
"""Commands that list the device among all else that is wrong."""

HEAVY = {"torch", "numpy", "pandas", "scipy", "h5py", "openslide", "tifffile", "timm", "skimage", "sklearn", "PIL"}


def options(name: str) -> dict[str, Any]:
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    return {option: parameter for parameter in command.params for option in parameter.opts}


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"{__version__}\n"


def test_help_imports_nothing_heavy_and_is_quick() -> None:
    code = (
        "import sys\nfrom eosin.cli.app import COMMANDS, app\n"
        "try:\n    app(['--help'])\nexcept SystemExit as ending:\n    assert ending.code == 0\n"
        f"print('HEAVY', *sorted({HEAVY!r} & set(sys.modules)))"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split() == ["HEAVY"]
    assert time.monotonic() - started < 3.0  # 0.3 s alone; the machine may be busy


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_and_takes_the_shared_options(run: Run, name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"], terminal_width=200)
    assert result.exit_code == 0
    assert {*PROMISED[name].split(), "--config", "--set", "--verbose"} <= set(options(name))


@pytest.mark.parametrize("name", ["heatmap", "counterfactual"])
def test_the_spelling_of_0_1_is_still_taken(run: Run, name: str) -> None:
    assert "No such option" not in run(name, "--slide", "none.svs", "--model", "none", "--out", "none").stderr


@pytest.mark.parametrize("field", ["mpp", "patch_size", "overlap", "min_tissue"])
def test_the_help_states_the_librarys_defaults(field: str) -> None:
    shown = options("tile")[f"--{field.replace('_', '-')}"].show_default
    assert float(shown) == Tiling.model_fields[field].default


def test_the_help_of_the_pipeline_states_its_defaults() -> None:
    for field in ("encoder", "task", "folds"):
        assert options("run")[f"--{field}"].show_default == str(Pipeline.model_fields[field].default)
    assert options("heatmap")["--format"].show_default == ",".join(Pipeline().formats) == ",".join(DEFAULT_FORMATS)
    assert choose_recipe(str(options("run")["--recipe"].show_default)) == Pipeline().recipe


def test_underscores_are_taken_for_dashes(run: Run) -> None:
    result = run("tile", "nowhere", "--job", "j", "--patch_size", "3", "--min_tissue=2")
    assert "tiling: patch_size" in result.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_set_of_an_unknown_group_is_refused_by_every_command(name: str) -> None:
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    needed = [p for p in command.params if p.required]
    arguments = [text for p in needed for text in ([p.opts[0], "1"] if p.opts[0].startswith("-") else ["1"])]
    result = CliRunner().invoke(app, [name, *arguments, "--set", "nonsense.x=1"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: no option in --set nonsense.x=1 named 'nonsense'")


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ("extract --batch-size 0", "invalid value for '--batch-size': must be greater than or equal to 1"),
        ("extract --batch-size x", "invalid value for '--batch-size': must be a valid integer"),
        ("trian", "no such command 'trian'. Did you mean 'train'?"),
        ("train --featrues x", "no such option: --featrues (Possible options: --features)"),
        ("tile --slides", "option '--slides' requires an argument"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments: str, found: str) -> None:
    result = CliRunner().invoke(app, arguments.split())
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {found}; see eosin")
    assert result.stderr.count("\n") == 1


def test_a_bare_eosin_prints_its_help() -> None:
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 2
    assert "tile" in result.output
    assert "error" not in result.output.splitlines()[0]


@pytest.mark.parametrize("device", ["mps", "meta", "cuda:7", "nonsense"])
@pytest.mark.parametrize("name", [name for name in COMMANDS if any("device" in option for option in options(name))])
def test_a_device_that_is_not_there_is_one_line_in_every_command(name: str, device: str) -> None:
    signature = inspect.signature(COMMANDS[name].__wrapped__)  # type: ignore[attr-defined]
    arguments = [text for one in options_of(signature) if one.required for text in (one.flag, "1")]
    for option in {"--device", "--devices"} & set(options(name)):
        result = CliRunner().invoke(app, [name, *arguments, option, device])
        assert result.exit_code == 2
        lines = [line for line in result.stderr.splitlines() if f"device '{device}' " in line]
        assert len(lines) == 1
        if name not in GATHERING:
            assert result.stderr == lines[0] + "\n"
            assert lines[0].startswith("error: ")
