"""One SIGTERM, SIGINT or SIGHUP ends every long command, wherever it arrives, and the next run finishes the work."""

import inspect
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from scaling import scaled
from typer.testing import Result

from eosin import _processes as processes
from eosin.cli import _common
from eosin.cli._settings import options_of
from eosin.cli.app import COMMANDS
from eosin.features.interop import export_bag

from .conftest import Run

FEW, MANY = 2, scaled(40, 4)
QUICK = ("--set", "recipe.training.epochs=3", "--set", "recipe.aggregator.options.embed_dims=[16]")
MOST_S = 30.0  # a tenth of a second alone; the machine may be busy


@pytest.fixture(scope="module")
def model(cohort: Path, features: Path, run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "run"
    arguments = ("--features", features, "--labels", cohort / "labels.csv", "--recipe", "abmil", "--out", folder)
    assert run("train", *arguments, *QUICK).exit_code == 0
    return folder


DEMO = ("--set", "cohort.n_slides=8", "--set", "cohort.size_um=[400, 440]", "--set", "pipeline.folds=2", *QUICK)


def imported(features: Path, out: Path) -> list[object]:
    """Return the arguments that import what another tool would have written."""
    theirs = out.parent / "theirs"
    if not theirs.exists():
        for path in sorted(features.glob("*.h5")):
            export_bag(path, theirs, "trident")
    return [theirs, "--slide-mpp", 0.5]


def commands(cohort: Path, job: Path, features: Path, model: Path) -> dict[str, Callable[[Path], list[object]]]:
    slides, labels, tiling = cohort / "slides", cohort / "labels.csv", features.parent.name
    study = ["--features", features, "--labels", labels, "--recipe", "abmil", *QUICK]
    explained = ["--model", model, "--features", features]

    def extract(out: Path) -> list[object]:
        (out / "job").mkdir(parents=True, exist_ok=True)
        if not (out / "job" / tiling).exists():
            (out / "job" / tiling).mkdir()
            (out / "job" / tiling / "patches").symlink_to(job / tiling / "patches")
        return ["extract", slides, "--job", out / "job", "--encoder", "he_texture"]

    return {
        "tile": lambda out: ["tile", slides, "--job", out / "job", "--patch-size", 128, "--workers", 0],
        "tile in processes": lambda out: ["tile", slides, "--job", out / "job", "--patch-size", 128, "--workers", 1],
        "extract": lambda out: [*extract(out), "--workers", 0],
        "extract in processes": lambda out: [*extract(out), "--workers", 1],
        "train": lambda out: ["train", *study, "--out", out / "model"],
        "crossval": lambda out: ["crossval", *study, "--folds", 2, "--out", out / "cv"],
        "predict": lambda out: ["predict", "--model", model, "--features", features, "--out", out / "p.csv"],
        "heatmap": lambda out: ["heatmap", *explained, "--slide", slides / "S003.tiff", "--out", out / "maps"],
        "counterfactual": lambda out: ["counterfactual", *explained, "--slide", slides, "--out", out / "why"],
        "run": lambda out: ["run", slides, "--labels", labels, "--job", out / "all", "--encoder", "he_texture",
                            "--set", "tiling.mpp=1.0", "--set", "tiling.patch_size=128", "--folds", 2, *QUICK],
        "export": lambda out: ["export", features, "--to", "trident", "--out", out / "export"],
        "import": lambda out: ["import", *imported(features, out), "--out", out / "import"],
        "verify": lambda out: ["verify", job],
        "check": lambda out: ["check", "--slides", slides, "--labels", labels, "--job", out / "job"],
        "demo": lambda out: ["demo", "--out", out / "demo", *DEMO],
    }  # fmt: skip


NAMES = list(commands(*[Path()] * 4))


def struck(run: Run, arguments: list[object], number: signal.Signals, delay_s: float) -> tuple[Result, float]:
    """Run a command and send a signal after a while; return its result and how long it went on."""
    sent: list[float] = []

    def strike() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), number)

    before = signal.signal(number, signal.SIG_IGN if delay_s < 0 else lambda *_: None)  # it may come after the end
    timer = threading.Timer(delay_s, strike)
    timer.start()
    try:
        result = run(*arguments)
        return result, time.monotonic() - sent[0] if sent else 0.0
    finally:
        timer.cancel()
        timer.join()
        signal.signal(number, before)


def strike_often(name: str, rounds: int, run: Run, arguments: Callable[[Path], list[object]], folder: Path) -> None:
    started = time.monotonic()
    assert run(*arguments(folder / "whole")).exit_code == 0
    duration = time.monotonic() - started
    rng = random.Random(name)
    stopped = 0
    for turn in range(rounds):
        number = rng.choice(sorted(processes.STOPPING))
        delay = 0.9 * duration * (turn + rng.random()) / rounds
        result, seconds = struck(run, arguments(folder / "again"), number, delay)
        assert result.exit_code in (0, 128 + number), result.output
        assert seconds < MOST_S
        if result.exit_code:
            stopped += 1
            assert result.stderr.splitlines()[-1] == f"error: stopped by {number.name}; finished results are kept"
    assert run(*arguments(folder / "again")).exit_code == 0
    assert stopped or rounds < MANY


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE_S", 60.0)  # the hard end would be that of the tests


@pytest.mark.parametrize("number", sorted(processes.STOPPING))
@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_before_its_work_ends_every_command(
    run: Run, monkeypatch: pytest.MonkeyPatch, name: str, number: signal.Signals
) -> None:
    monkeypatch.setattr(_common, "_clear_leftovers", lambda _: os.kill(os.getpid(), number))
    signature = inspect.signature(COMMANDS[name].__wrapped__)  # type: ignore[attr-defined]
    flags = {option.parameter: option.flag for option in options_of(signature)}
    own = [one for one in signature.parameters.values() if one.name != "settings" and one.default is one.empty]
    needed = [flags.get(one.name, "") for one in own]
    result = run(name, *(text for flag in needed for text in (flag, "1") if text))
    assert result.exit_code == 128 + number, result.output
    assert result.stderr == f"error: stopped by {number.name}; finished results are kept\n"


@pytest.mark.parametrize("name", ["tile", "extract in processes", "train", "heatmap"])
@pytest.mark.long
def test_a_signal_ends_a_command(
    run: Run, cohort: Path, job: Path, features: Path, model: Path, tmp_path: Path, name: str
) -> None:
    strike_often(name, FEW, run, commands(cohort, job, features, model)[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_signals_at_any_time_end_a_command(
    run: Run, cohort: Path, job: Path, features: Path, model: Path, tmp_path: Path, name: str
) -> None:
    strike_often(name, MANY, run, commands(cohort, job, features, model)[name], tmp_path)
