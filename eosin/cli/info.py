"""`eosin info`: what slides, coordinates files, feature files and model folders hold."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from eosin.cli._arguments import Plane, Scene, SlideMpp, scene_number, slide_mpp_source
from eosin.cli._common import Done, command
from eosin.cli._progress import say
from eosin.errors import ConfigError, EosinError, SlideError


@command()
def info(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Slides, folders of slides, .h5 files or model folders."),
    ],
    *,
    slide_mpp: SlideMpp = None,
    scene: Scene = None,
    plane: Plane = None,
) -> Done:
    """Print the contents of slides, feature files, coordinates files and model folders.

    Of a slide, every image in the file is listed; names, dates and label images are never shown.
    """
    if len(paths) == 1 and not _is_slide_folder(paths[0]):
        _show(_facts(paths[0], slide_mpp, scene, plane))
        return Done()
    failed = 0
    for path in _each(paths):
        typer.echo(f"--- {path}")  # a YAML document for each file
        try:
            _show(_facts(path, slide_mpp, scene, plane))
        except EosinError as error:
            failed += 1
            _show({"error": error.message, "reason": error.code})
    if failed:
        say(f"{failed} files could not be read; their entries above say why")
    raise typer.Exit(1 if failed else 0)


def _show(facts: Mapping[str, object]) -> None:
    for name, value in facts.items():
        if value != "":
            typer.echo(_line(name, value))


def _line(name: str, value: object) -> str:
    if isinstance(value, Mapping) or (isinstance(value, list) and value and isinstance(value[0], Mapping)):
        import yaml

        shown = dict(value) if isinstance(value, Mapping) else value
        return str(yaml.safe_dump({name: shown}, sort_keys=False, allow_unicode=True)).rstrip()
    return f"{name}: {'unknown' if value is None else value}"


def _is_slide_folder(path: Path) -> bool:
    return path.is_dir() and not (path / "model.json").exists() and not path.name.endswith(".zarr")


def _each(paths: Sequence[Path]) -> Iterator[Path]:
    """Yield files, and of folders the slides in them."""
    from eosin._names import as_url
    from eosin.wsi._slide_file import find_slides

    for path in paths:
        if as_url(path):
            yield from (Path(slide.url) for slide in find_slides([path]))
            continue
        if not path.exists():
            raise ConfigError(f"{path}: no such file or folder; check the path")
        if _is_slide_folder(path):
            yield from (slide.path for slide in find_slides([path]))
        else:
            yield path


def _facts(path: Path, slide_mpp: str | None, scene: str | None, plane: int | None) -> Mapping[str, object]:
    if path.is_dir() and not path.name.endswith(".zarr"):
        return _model_facts(path)
    if path.name.endswith("_patches.h5"):
        return _coordinates_facts(path)
    if path.suffix == ".h5":
        return _feature_facts(path)
    return _slide_facts(path, slide_mpp, scene, plane)


def _slide_facts(path: Path, slide_mpp: str | None, scene: str | None, plane: int | None) -> Mapping[str, object]:
    from eosin.wsi._slide_file import find_slides, open_file
    from eosin.wsi.inventory import listed

    (file, *_) = find_slides([path], slide_mpp=slide_mpp_source(slide_mpp), scene=scene_number(scene), plane=plane)
    file.stage()
    with open_file(file.path) as reader:
        pictures = listed(reader.pictures)
    try:
        with file.open() as slide:
            facts = {"kind": "slide", "slide_id": file.slide_id, **slide.facts(), "notes": "; ".join(slide.notes)}
    except SlideError as error:
        if len(pictures) == 1:
            raise
        facts = {"kind": "slide", "slide_id": file.slide_id, "error": error.message, "reason": error.code}
    return {**facts, "pictures": pictures} if len(pictures) > 1 else facts


def _coordinates_facts(path: Path) -> Mapping[str, object]:
    from eosin.wsi._coordinates import read_footer, read_grid, read_quality
    from eosin.wsi._quality import SCORES

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
        "image": grid.image or None,
        "slide_mpp": grid.slide_mpp,
        "mpp_source": footer.mpp_source,
        **{f"mean_{name}": value for name, value in means.items() if value == value},
        **grid.tiling.model_dump(),
    }


def _feature_facts(path: Path) -> Mapping[str, object]:
    from eosin.features._store import read_bag

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
    from eosin.mil._checkpoint import load_model

    _, card = load_model(path)  # not the card alone: a model whose weights are damaged has no facts
    return {"kind": "model", **card.model_dump(mode="json")}
