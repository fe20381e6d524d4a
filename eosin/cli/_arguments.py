"""Arguments and options that several commands take, spelled and explained once."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from eosin.errors import ConfigError

Slides = Annotated[list[Path], typer.Option(help="Slide, or folder that is searched; repeatable.")]
Job = Annotated[Path, typer.Option(help="Job folder; holds the results of every slide.")]
Out = Annotated[Path, typer.Option(help="Folder for the results.")]
FeaturesFolder = Annotated[Path, typer.Option(help="Folder of feature files, one per slide.")]
Labels = Annotated[Path, typer.Option(help="Table of slides, patients and labels (csv, tsv, xlsx, parquet).")]
SlideMpp = Annotated[
    str | None,
    typer.Option(metavar="X|TABLE", help="µm/px of all slides, or a CSV table with the columns slide and mpp."),
]
Scene = Annotated[
    str | None,
    typer.Option(
        metavar="N|all", help="Which slide of files that hold several (eosin info lists them); all makes each a slide."
    ),
]
Plane = Annotated[
    int | None, typer.Option(metavar="N", help="Which focal plane of slides that have several; default the middle one.")
]
Mpp = Annotated[
    float | None, typer.Option(help="µm per pixel of the tiles.", show_default="0.5", rich_help_panel="Tiling")
]
Magnification = Annotated[
    float | None, typer.Option(help="Instead of --mpp; 20 is taken as 0.5 µm/px.", rich_help_panel="Tiling")
]
PatchSize = Annotated[
    int | None, typer.Option(help="Side of a tile in pixels.", show_default="256", rich_help_panel="Tiling")
]
Overlap = Annotated[
    int | None, typer.Option(help="Pixels that neighbours share.", show_default="0", rich_help_panel="Tiling")
]
MinTissue = Annotated[
    float | None,
    typer.Option(help="Smallest share of a tile that is tissue.", show_default="0.25", rich_help_panel="Tiling"),
]
Edges = Annotated[
    str | None,
    typer.Option(
        metavar="drop|pad",
        help="Tiles that stick out of the slide: leave them out, or fill them up with background.",
        show_default="drop",
        rich_help_panel="Tiling",
    ),
]
Contours = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Outlines <slide>.geojson drawn or edited in QuPath; they replace the tissue that would be found.",
        rich_help_panel="Tissue",
    ),
]
Overrides = Annotated[
    Path | None,
    typer.Option(
        metavar="CSV",
        help="Tissue options of single slides: the column slide, and one per option (min_stain, remove_pen ...).",
        rich_help_panel="Tissue",
    ),
]
MaxBlur = Annotated[
    float | None,
    typer.Option(help="Leave out tiles of more blur, 0 to 1; 0.9 is a blur of 1.5 µm.", rich_help_panel="Quality"),
]
MaxPen = Annotated[
    float | None, typer.Option(help="Leave out tiles with a larger share of ink.", rich_help_panel="Quality")
]
MaxFold = Annotated[
    float | None,
    typer.Option(help="Leave out tiles with a larger share of folds and dark dirt.", rich_help_panel="Quality"),
]
Icc = Annotated[
    bool,
    typer.Option("--icc", help="Convert colours to sRGB by the slide's ICC profile.", rich_help_panel="Tiling"),
]
Preview = Annotated[
    bool,
    typer.Option("--preview", help="Only draw tissue and tiles, to JOB/previews; no coordinates are written."),
]
Timeout = Annotated[
    float | None, typer.Option(metavar="SECONDS", help="Give a slide up after this time; needs --workers.")
]
EncoderName = Annotated[str, typer.Option(help="Encoder by name; `eosin encoders` lists them.")]
Weights = Annotated[Path | None, typer.Option(help="File or folder with the encoder's weights, for work offline.")]
BatchSize = Annotated[int, typer.Option(help="Tiles that are encoded at once.")]
Precision = Annotated[str, typer.Option(help="fp32, bf16 or fp16.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; auto takes a GPU when there is one.")]
Workers = Annotated[int, typer.Option(help="Child processes; a crash in one costs one slide. 0: none.")]
Shard = Annotated[
    str, typer.Option(metavar="I/N", help="Take every N-th slide, starting with number I (from 0): one job of many.")
]
RecipeName = Annotated[
    str | None,
    typer.Option(help="Recipe by name (`eosin methods` lists them) or a YAML file.", show_default="abmil"),
]
TaskKind = Annotated[
    str | None,
    typer.Option("--task", help="What the labels mean: classification, survival ...", show_default="classification"),
]
Target = Annotated[
    str | None,
    typer.Option(
        help="Column of the label, if not label; label=VALUE says which of two classes is the positive one; time,event "
        "for survival; 'er; ordinal:grade' for multitask."
    ),
]
Group = Annotated[str, typer.Option(help="What is never split: patient, slide (each on its own) or site.")]
Level = Annotated[str, typer.Option(help="What a bag is: a slide, or all slides of a patient.")]
IdsPolicy = Annotated[
    str, typer.Option(help="Ids that look alike, such as P01 and p01: ask (stop and list them), merge or exact.")
]
Missing = Annotated[
    str, typer.Option(help="Labels of slides without features, and slides without a label: error or drop.")
]
Splits = Annotated[
    Path | None,
    typer.Option(help="Of `eosin split` or CLAM (folder or file), of STAMP (splits.json), or a table's column Split."),
]
Run = Annotated[Path, typer.Option(help="Folder for the trained model.")]
TrainPrecision = Annotated[str, typer.Option(help="auto (the faster here), fp32 or bf16.")]
Features = Annotated[Path | None, typer.Option(help="Folder of feature files, or one file.")]
Model = Annotated[Path, typer.Option(help="Model folder.")]
SlidesIfAny = Annotated[list[Path] | None, typer.Option(help="Slide, or folder that is searched; repeatable.")]

MPP_AT_1X = 10.0


def tile_mpp(mpp: float | None, magnification: float | None) -> float | None:
    """Return the µm/px of the tiles from the two ways to ask for it.

    Raises
    ------
    ConfigError
        If both are given, or the magnification is not positive.
    """
    if magnification is None:
        return mpp
    if mpp is not None:
        raise ConfigError(f"--mpp {mpp:g} and --magnification {magnification:g} were both given; give one")
    if magnification <= 0:
        raise ConfigError(f"--magnification {magnification:g}: must be more than 0")
    mpp = MPP_AT_1X / magnification
    typer.echo(f"--magnification {magnification:g} is taken as {mpp:g} µm/px (10 / magnification)", err=True)
    return mpp


def scene_number(scene: str | None) -> "int | Literal['all'] | None":
    """Return --scene as `eosin.wsi._slide_file.find_slides` takes it.

    Raises
    ------
    ConfigError
        If it is neither a number from 1 nor ``all``.
    """
    if scene is None or scene == "all":
        return None if scene is None else "all"
    if not scene.isdigit() or int(scene) < 1:
        raise ConfigError(f"--scene {scene}: give a number from 1, as eosin info lists them, or all")
    return int(scene)


def slide_mpp_source(text: str | None) -> float | Path | None:
    """Return the value of --slide-mpp: a number, or the path of a table."""
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        return Path(text)


def slide_timeout(seconds: float | None, workers: int) -> float | None:
    """Return the value of --timeout.

    Raises
    ------
    ConfigError
        If it is not positive, or there are no child processes that could be stopped.
    """
    if seconds is not None and seconds <= 0:
        raise ConfigError(f"--timeout {seconds:g}: must be more than 0")
    if seconds is not None and workers < 1:
        raise ConfigError("--timeout works on child processes; add --workers 1 or more")
    return seconds


def shard_numbers(text: str) -> tuple[int, int]:
    """Return index and count of ``I/N``.

    Raises
    ------
    ConfigError
        If the text is not two numbers, the first below the second.
    """
    index, slash, count = text.partition("/")
    if not slash or not index.isdecimal() or not count.isdecimal() or int(index) >= int(count):
        raise ConfigError(f"--shard {text!r}: expected I/N, for example 0/4, 1/4, 2/4 and 3/4 for four jobs")
    return int(index), int(count)
