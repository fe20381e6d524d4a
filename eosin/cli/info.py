"""`eosin info`: the facts of one slide, coordinates file, feature file or model folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from eosin.cli._arguments import SlideMpp, slide_mpp_source
from eosin.cli._common import Done, command


@command()
def info(
    path: Annotated[Path, typer.Argument(help="Slide, .h5 file of features or coordinates, or model folder.")],
    *,
    slide_mpp: SlideMpp = None,
) -> Done:
    """Print the facts of a file; of slides only what identifies nobody."""
    for name, value in _facts(path, slide_mpp).items():
        if value != "":
            typer.echo(_line(name, value))
    return Done()


def _line(name: str, value: object) -> str:
    if isinstance(value, Mapping):
        import yaml

        return yaml.safe_dump({name: dict(value)}, sort_keys=False, allow_unicode=True).rstrip()
    return f"{name}: {'unknown' if value is None else value}"


def _facts(path: Path, slide_mpp: str | None) -> Mapping[str, object]:
    if path.is_dir():
        return _model_facts(path)
    if path.name.endswith("_patches.h5"):
        return _coordinates_facts(path)
    if path.suffix == ".h5":
        return _feature_facts(path)
    return _slide_facts(path, slide_mpp)


def _slide_facts(path: Path, slide_mpp: str | None) -> Mapping[str, object]:
    from eosin.wsi.slide import find_slides, open_slide

    (file,) = find_slides([path], slide_mpp=slide_mpp_source(slide_mpp))
    with open_slide(file.path, mpp=file.mpp) as slide:
        return {"kind": "slide", "slide_id": file.slide_id, **slide.facts()}


def _coordinates_facts(path: Path) -> Mapping[str, object]:
    from eosin.wsi.coordinates import read_footer, read_grid, read_quality
    from eosin.wsi.quality import SCORES

    grid, footer, quality = read_grid(path), read_footer(path), read_quality(path)
    means = (
        {name: round(float(getattr(quality, name).mean()), 4) for name in SCORES} if quality and grid.n_tiles else {}
    )
    return {
        "kind": "coordinates",
        "slide_id": footer.slide_id,
        "n_tiles": grid.n_tiles,
        "tile_px0": grid.tile_px0,
        "slide_size_px0": grid.slide_size_px0,
        "slide_mpp": grid.slide_mpp,
        "mpp_source": footer.mpp_source,
        **{f"mean_{name}": value for name, value in means.items() if value == value},
        **grid.tiling.model_dump(),
    }


def _feature_facts(path: Path) -> Mapping[str, object]:
    from eosin.features.store import read_bag

    bag = read_bag(path)
    return {
        "kind": "features",
        "slide_id": bag.slide_id,
        "n_tiles": len(bag.features),
        "dtype": bag.features.dtype,
        **bag.spec.model_dump(),
        **bag.provenance,
    }


def _model_facts(path: Path) -> Mapping[str, object]:
    from eosin.mil.checkpoint import load_model

    _, card = load_model(path)  # not the card alone: a model whose weights are damaged has no facts
    return {"kind": "model", **card.model_dump(mode="json")}
