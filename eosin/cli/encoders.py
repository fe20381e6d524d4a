"""`eosin encoders`: the registered tile encoders."""

from typing import TYPE_CHECKING, Annotated

import typer

from eosin.cli._common import Done, command, console

if TYPE_CHECKING:
    from eosin.features.encoders import EncoderSpec


@command()
def encoders(
    name: Annotated[
        str | None, typer.Argument(help="Show all that is known of this one, e.g. timm:resnet18, which has no row.")
    ] = None,
) -> Done:
    """List the encoders that `eosin extract --encoder` knows; any timm model is timm:NAME."""
    from eosin.features.encoders import ENCODERS, find_encoder

    if name is None:
        _list(list(ENCODERS.values()))
    else:
        _show(find_encoder(name))
    return Done()


def _list(specs: "list[EncoderSpec]") -> None:
    from rich.table import Table

    table = Table("name", "width", "input px", "mpp", "pooling", "weights", "licence", "access", "note")
    for spec in specs:
        access = "on request" if spec.gated else "free"
        numbers = (str(spec.dim), str(spec.input_px or "any"), str(spec.mpp or "any"))
        table.add_row(spec.name, *numbers, spec.pooling, spec.source, spec.licence, access, spec.note)
    console().print(table)


def _show(spec: "EncoderSpec") -> None:
    from dataclasses import fields

    for field in fields(spec):
        value = getattr(spec, field.name)
        if field.name != "build" and value not in (None, "", ()):
            typer.echo(f"{field.name}: {value}")
