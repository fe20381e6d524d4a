"""The `eosin` command: the list of its subcommands."""

import re
import sys
from functools import partial
from typing import Annotated, Any, Never

import typer
from typer.core import TyperGroup

from eosin import __version__
from eosin.cli import (
    card,
    check,
    convert,
    counterfactual,
    crossval,
    demo,
    doctor,
    embed,
    encoders,
    export,
    extract,
    heatmap,
    import_,
    info,
    init,
    jobs,
    methods,
    predict,
    probe,
    run,
    split,
    studies,
    tile,
    train,
    verify,
    view,
    zeroshot,
)

OLD_SPELLINGS = {"slide": "slides", "donor-slide": "donor-slides"}


def _spelled(name: str) -> str:
    """Return an option's name as it is spelled now; TRIDENT and CLAM write --patch_size."""
    name = name.replace("_", "-")
    return OLD_SPELLINGS.get(name, name)


UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""Every fault that typer finds in a command line; typer exports its kinds only."""


class OneLine(TyperGroup):
    """The commands; a wrong command line ends as every other error does, in one line and with exit code 2."""

    def main(
        self, args: Any = None, prog_name: str | None = None, *_: Any, standalone_mode: bool = True, **extra: Any
    ) -> Any:
        """Run one command; see `typer.core.TyperGroup.main`."""
        run = partial(super().main, args, prog_name, standalone_mode=False, **extra)
        if not standalone_mode:
            return run()
        try:
            code = run()
        except typer.Abort:
            sys.exit(130)
        except UsageError as error:
            _refuse(error)
        sys.exit(code if isinstance(code, int) else 0)


def _refuse(error: Any) -> Never:
    """End with what typer found."""
    text = re.sub("Input should be ([^,]*).*", r"must be \1", error.format_message()).strip().removesuffix(".")
    if text:  # a bare `eosin` has printed its help, which typer holds for an error without text
        command = error.ctx.command_path if error.ctx else "eosin"
        typer.echo(f"error: {text[:1].lower()}{text[1:]}; see {command} -h", err=True)
    sys.exit(2)


app = typer.Typer(
    name="eosin",
    cls=OneLine,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": _spelled,
    },
)


def _version(wanted: bool) -> None:  # noqa: FBT001 - typer calls it with the flag's value
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def eosin(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Find tissue on slides, encode tiles, train slide-level models, predict, and draw heat maps.

    `eosin COMMAND --help` explains one command. Exit codes: 0 all done, 1 some slides failed, 2 wrong usage or options,
    3 a problem of the machine (disk, device, package), 4 time is over and slides are left, 128+n stopped by signal n.
    """


COMMANDS = {
    "demo": demo.demo,
    "doctor": doctor.doctor,
    "init": init.init,
    "info": info.info,
    "check": check.check,
    "run": run.run,
    "studies": studies.studies,
    "jobs": jobs.jobs,
    "tile": tile.tile,
    "extract": extract.extract,
    "embed": embed.embed,
    "split": split.split,
    "train": train.train,
    "crossval": crossval.crossval,
    "probe": probe.probe,
    "zeroshot": zeroshot.zeroshot,
    "predict": predict.predict,
    "card": card.card,
    "heatmap": heatmap.heatmap,
    "counterfactual": counterfactual.counterfactual,
    "view": view.view,
    "import": import_.import_,
    "export": export.export,
    "convert": convert.convert,
    "verify": verify.verify,
    "encoders": encoders.encoders,
    "methods": methods.methods,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def main() -> None:
    """Run the command line; the entry point of the installed script."""
    app()
