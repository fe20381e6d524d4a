"""`eosin encoders`: the registered tile encoders and slide encoders."""

from typing import TYPE_CHECKING, Annotated

import typer

from eosin.cli._common import Done, command, console

if TYPE_CHECKING:
    from eosin.features._encoders import EncoderSpec
    from eosin.features._slide_encoders import SlideEncoderSpec


@command()
def encoders(
    name: Annotated[
        str | None, typer.Argument(help="Show all facts of this encoder; also timm:MODEL, for example timm:resnet18.")
    ] = None,
) -> Done:
    """List the tile encoders for `eosin extract` and the slide encoders for `eosin embed`.

    Every model of timm also works as a tile encoder, as timm:NAME.
    """
    from eosin.features._encoders import ENCODERS, find_encoder
    from eosin.features._slide_encoders import SLIDE_ENCODERS
    from eosin.plugins import load_plugins

    load_plugins()
    if name is None:
        _list(list(ENCODERS.values()))
        _list_slide_encoders(list(SLIDE_ENCODERS.values()))
    else:
        _show(SLIDE_ENCODERS[name] if name in SLIDE_ENCODERS else find_encoder(name))
    return Done()


def _list(specs: "list[EncoderSpec]") -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table("name", "width", "input", "norm", "tiles", "pooling", "weights", "licence", "access", "note")
    for spec in specs:
        access = "on request" if spec.gated else "free"
        source = f"{spec.source}@{spec.revision[:8]}" if spec.revision else spec.source
        facts = (str(spec.dim), _input(spec), spec.statistics, _tiles(spec), spec.pooling)
        table.add_row(spec.name, *facts, source, spec.licence, access, escape(spec.note))
    console().print(table)


def _list_slide_encoders(specs: "list[SlideEncoderSpec]") -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table("slide encoder", "width", "tile encoder", "tiles", "weights", "licence", "access", "code", "note")
    for spec in specs:
        tiles = "any" if spec.mpp is None else f"{spec.tile_px} px at {spec.mpp:g}"
        width = "of the tiles" if spec.dim is None else str(spec.dim)
        access = "on request" if spec.gated else "free"
        code = "needs --allow-remote-code" if spec.runs_foreign_code else "in eosin"
        facts = (width, ", ".join(spec.tile_encoders), tiles, spec.source, spec.licence, access, code)
        table.add_row(spec.name, *facts, escape(spec.note))
    console().print(table)


def _input(spec: "EncoderSpec") -> str:
    """Return what the network is given: 224 bilinear; 224 of 256 bicubic where the centre is cropped."""
    if spec.input_px is None:
        return "any"
    crop = f" of {spec.resize_px}" if spec.resize_px else ""
    return f"{spec.input_px}{crop} {spec.interpolation}"


def _tiles(spec: "EncoderSpec") -> str:
    """Return the tiles that the authors recommend."""
    return "any" if spec.mpp is None else f"{spec.tile_px} px at {spec.mpp:g}"


def _show(spec: "EncoderSpec | SlideEncoderSpec") -> None:
    from dataclasses import fields

    for field in fields(spec):
        value = getattr(spec, field.name)
        if field.name not in ("build", "load", "network") and value not in (None, "", ()):
            typer.echo(f"{field.name}: {value}")
