"""Arguments and options that several commands take, spelled and explained once."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from eosin.errors import ConfigError

Slides = Annotated[list[Path], typer.Option(help="Slide file, or folder that is searched for slides; repeatable.")]
Job = Annotated[Path, typer.Option(help="Job folder: tiles, features and run.json of all slides.")]
Out = Annotated[Path, typer.Option(help="Folder for the results.")]
FeaturesFolder = Annotated[Path, typer.Option(help="Folder of feature files, one per slide.")]
Labels = Annotated[
    Path, typer.Option(help="Table with one row per slide: slide, patient, label (csv, tsv, xlsx, parquet).")
]
LabelsIfAny = Annotated[
    Path | None, typer.Option(help="Table with one row per slide: slide, patient, label (csv, tsv, xlsx, parquet).")
]
SlideMpp = Annotated[
    str | None,
    typer.Option(
        metavar="X|TABLE",
        help="True µm/px at level 0: one number for all slides, or a table with the columns slide and mpp.",
    ),
]
Scene = Annotated[
    str | None,
    typer.Option(
        metavar="N|all",
        help="Slide to take from a file with several (eosin info lists them). all: each becomes a slide of its own.",
    ),
]
Plane = Annotated[
    int | None,
    typer.Option(metavar="N", help="Focal plane to read when the slide has several.", show_default="the middle one"),
]
Mpp = Annotated[
    float | None, typer.Option(help="µm per pixel of the tiles.", show_default="0.5", rich_help_panel="Tiling")
]
Magnification = Annotated[
    float | None, typer.Option(help="Replaces --mpp: 20 means 0.5 µm/px (10 / 20).", rich_help_panel="Tiling")
]
PatchSize = Annotated[
    int | None, typer.Option(help="Side of a tile, in pixels at --mpp.", show_default="256", rich_help_panel="Tiling")
]
Overlap = Annotated[
    int | None,
    typer.Option(help="Overlap of neighbouring tiles in pixels.", show_default="0", rich_help_panel="Tiling"),
]
MinTissue = Annotated[
    float | None,
    typer.Option(help="Smallest share of tissue in a tile, 0 to 1.", show_default="0.25", rich_help_panel="Tiling"),
]
Edges = Annotated[
    str | None,
    typer.Option(
        metavar="drop|pad",
        help="Tiles that cross the slide's edge: drop them, or pad them with background.",
        show_default="drop",
        rich_help_panel="Tiling",
    ),
]
Contours = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder of tissue outlines from QuPath, <slide>.geojson; they replace automatic tissue detection.",
        rich_help_panel="Tissue",
    ),
]
TissueWeights = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Weights of a DeepLabV3 tissue network (HEST, TRIDENT); it replaces automatic tissue detection.",
        rich_help_panel="Tissue",
    ),
]
Overrides = Annotated[
    Path | None,
    typer.Option(
        metavar="CSV",
        help="Tissue options per slide: a table with the column slide and one column per option (min_stain ...).",
        rich_help_panel="Tissue",
    ),
]
MaxBlur = Annotated[
    float | None,
    typer.Option(
        help="Leave out tiles with more blur than this, 0 to 1; 0.9 is a blur of 1.5 µm.", rich_help_panel="Quality"
    ),
]
MaxPen = Annotated[
    float | None,
    typer.Option(help="Leave out tiles with a larger share of pen ink, 0 to 1.", rich_help_panel="Quality"),
]
MaxFold = Annotated[
    float | None,
    typer.Option(help="Leave out tiles with a larger share of folds and dark dirt, 0 to 1.", rich_help_panel="Quality"),
]
Icc = Annotated[
    bool,
    typer.Option("--icc", help="Convert colours to sRGB by the slide's ICC profile.", rich_help_panel="Tiling"),
]
Preview = Annotated[
    bool,
    typer.Option("--preview", help="Only draw tissue and tiles as pictures in JOB/previews; write no coordinates."),
]
Timeout = Annotated[
    float | None, typer.Option(metavar="SECONDS", help="Stop work on a slide after this time; needs --workers.")
]
EncoderName = Annotated[str, typer.Option(help="Tile encoder; `eosin encoders` lists the names.")]
Weights = Annotated[Path | None, typer.Option(help="File or folder with the encoder's weights; no download.")]
BatchSize = Annotated[int, typer.Option(help="Number of tiles per batch.", min=1)]
Precision = Annotated[str, typer.Option(help="Number format: fp32, bf16 or fp16.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; auto uses a GPU if there is one.")]
Workers = Annotated[
    int, typer.Option(help="Number of child processes; a crash in one loses one slide. 0: none.", min=0)
]
Shard = Annotated[
    str,
    typer.Option(
        metavar="I/N", help="Process part I (from 0) of N: slides I, I+N, I+2N ... Start one command per part."
    ),
]
RecipeName = Annotated[
    str | None,
    typer.Option(help="Training recipe: a name from `eosin methods`, or a YAML file.", show_default="everyday"),
]
TaskKind = Annotated[
    str | None,
    typer.Option(
        "--task",
        help="Kind of label: classification, binary, ordinal, multilabel, regression, survival, cox, multitask.",
        show_default="classification",
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        help="Label column, if it is not `label`. COLUMN=VALUE names the positive class; time,event is for survival; "
        "'er; ordinal:grade' is for multitask."
    ),
]
Group = Annotated[str, typer.Option(help="Unit that stays on one side of a split: patient, slide or site.")]
Level = Annotated[
    str, typer.Option(help="One bag per slide, or one per patient (all slides together): slide or patient.")
]
IdsPolicy = Annotated[
    str, typer.Option(help="Ids that differ in spelling only (P01, p01): ask stops and lists them, merge, exact.")
]
Missing = Annotated[
    str,
    typer.Option(
        help="Rows without a slide or a label: few leaves out up to one row in ten by name, error stops, drop leaves "
        "out all."
    ),
]
Splits = Annotated[
    Path | None,
    typer.Option(
        help="Splits from `eosin split`, CLAM (folder or file), STAMP (splits.json), or a table with a column Split."
    ),
]
StudyName = Annotated[
    str | None, typer.Option("--study", metavar="NAME", help="Name of the study in JOB/studies; see eosin studies.")
]
Run = Annotated[Path, typer.Option(help="Folder for the trained model.")]
TrainPrecision = Annotated[
    str, typer.Option(help="Number format: fp32, bf16, or auto (the faster of both on this machine).")
]
Features = Annotated[Path | None, typer.Option(help="Folder of feature files, or one feature file.")]
Model = Annotated[
    Path, typer.Option(help="Folder of a model or of a cross-validation, or the job folder of eosin run.")
]
SlidesIfAny = Annotated[
    list[Path] | None, typer.Option(help="Slide file, or folder that is searched for slides; repeatable.")
]

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
        raise ConfigError(f"--mpp {mpp:g} and --magnification {magnification:g} exclude each other; pass one of them")
    if magnification <= 0:
        raise ConfigError(f"--magnification {magnification:g}: the value must be greater than 0")
    mpp = MPP_AT_1X / magnification
    typer.echo(f"--magnification {magnification:g} means {mpp:g} µm/px (10 / magnification)", err=True)
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
        raise ConfigError(f"--scene {scene}: expected all or a number from 1; `eosin info SLIDE` lists the scenes")
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
        raise ConfigError(f"--timeout {seconds:g}: the value must be greater than 0")
    if seconds is not None and workers < 1:
        raise ConfigError("--timeout needs child processes; add --workers 1 or more")
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
