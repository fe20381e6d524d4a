"""What every stage is made from, and one function that hashes it.

A result is done when it was made from exactly these inputs. `STAGES` says what the inputs of each stage are, and
`fingerprint` refuses to leave one out, so that no stage can take an old result for a new one. `docs/fingerprints.md` is
the same table for readers.
"""

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from eosin.options import Options

FORMAT = 2
"""Raised when files change so that no result of an earlier version can be kept."""

DIGITS = 16


@dataclass(frozen=True)
class Stage:
    """What one stage reads.

    Attributes
    ----------
    version : int
        Of the algorithm: raised when the same inputs give another result.
    inputs : mapping of str to str
        What of each input is hashed, in words.
    """

    version: int
    inputs: Mapping[str, str]


_SLIDE = "size, first and last MiB of the slide file"

STAGES: Mapping[str, Stage] = {
    "tile": Stage(
        2,
        {
            "slide": _SLIDE,
            "slide_mpp": "the mpp that the user gives for the slide",
            "picture": "which scene and focal plane of the file",
            "tiling": "all options of the grid",
            "tissue": "all options of the tissue of this slide, overrides included, and the version of the search",
            "quality": "all limits of quality, and the version of the scores",
            "outline": "all bytes of the outline that a person drew",
        },
    ),
    "tissue": Stage(
        1,
        {
            "slide": _SLIDE,
            "slide_mpp": "the mpp, scene and focal plane that the user gives for the slide",
            "weights": "hash of all weights of the tissue network",
        },
    ),
    "select": Stage(
        2,
        {
            "slide": _SLIDE,
            "slide_mpp": "the mpp, scene and focal plane that the user gives for the slide",
            "tiling": "all options of the grid",
            "rule": "options of the choice, ids of the models, and whether they have seen the slide",
            "features": "size, first and last MiB of the first stage's feature file: all its checksums",
            "outline": "all bytes of the outline of the tissue",
        },
    ),
    "extract": Stage(
        2,
        {
            "slide": _SLIDE,
            "tiles": "all coordinates, the grid's options, the slide's mpp, and the image if the file holds several",
            "encoder": "name, transform, precision and all other facts of the encoder",
            "weights": "hash of all weights",
        },
    ),
    "embed": Stage(
        1,
        {
            "features": "size, first and last MiB of each feature file: all its checksums",
            "encoder": "name and source of the slide encoder, or id and card of the model",
            "weights": "hash of all weights",
        },
    ),
    "train": Stage(
        2,
        {
            "recipe": "all options of the recipe, with the aggregator's defaults and the weights of models they name",
            "task": "kind, target and classes",
            "features": "encoder, weights, tile size and mpp; of each slide a hash of all rows, and of the places of "
            "its tiles for a model that reads them",
            "train": "ids, patients and targets of the training bags, in their order",
            "validation": "the same of the validation bags",
            "machine": "kind of device and precision",
            "plugins": "source code of methods from outside the package",
        },
    ),
    "predict": Stage(
        2,
        {
            "models": "hash of weights and card of each model",
            "features": "hash of the feature file",
            "row": "every cell of the row itself",
        },
    ),
    "map": Stage(
        3,
        {
            "model": "hash of weights and card",
            "features": "size, first and last MiB of the feature file: all its checksums",
            "slide": _SLIDE,
            "slide_mpp": "the mpp, scene and focal plane that the user gives for the slide",
            "formats": "which files are written",
        },
    ),
    "counterfactual": Stage(
        1,
        {
            "model": "hash of weights and card of the models that answer, and what they have seen of the slide",
            "features": "size, first and last MiB of the feature file: all its checksums",
            "slide": _SLIDE,
            "slide_mpp": "the mpp, scene and focal plane that the user gives for the slide",
            "regions": "all bytes of the slide's GeoJSON",
            "donors": "size, first and last MiB of each donor's features, slide and GeoJSON",
            "questions": "all options of the questions, the class and the classes of regions",
            "formats": "which files are written",
        },
    ),
    "study": Stage(
        1,
        {
            "options": "all options of the run but the formats of its maps",
            "labels": "slide, patient and targets of every labelled slide that is there",
            "splits": "all bytes of given splits",
            "slide_mpp": "the mpp that the user gives, or all bytes of the table of them; scene and focal plane",
            "encoder": "the file of weights and the precision",
        },
    ),
}


def fingerprint(stage: str, /, **inputs: object) -> str:
    """Return 16 hexadecimal digits that change with any input of a stage.

    Parameters
    ----------
    stage : str
        A key of `STAGES`.
    inputs
        Every input that `STAGES` names: texts, numbers, None, bytes, paths, `Options`, mappings and sequences of these.
        The order of a sequence counts, that of a mapping does not.

    Raises
    ------
    TypeError
        If an input is missing, unknown or of another type.
    """
    known = STAGES[stage]
    if set(inputs) != set(known.inputs):
        raise TypeError(f"{stage} is made from {', '.join(known.inputs)}; given were {', '.join(inputs)}")
    whole = [FORMAT, stage, known.version, {name: _plain(value) for name, value in inputs.items()}]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:DIGITS]


def _plain(value: object) -> object:
    """Return JSON that differs whenever the value does."""
    if isinstance(value, Options):
        return value.model_dump(mode="json")
    if isinstance(value, bytes):
        return {"sha256": hashlib.sha256(value).hexdigest()}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"{type(value).__name__} has no fingerprint; give text, numbers, bytes, paths or options")


def content_hash(path: Path) -> str:
    """Return 16 hexadecimal digits over all bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]


def source_hash(kind: type) -> str:
    """Return a hash of the module that defines a class from outside the package; empty for the package's own.

    The code of a plug-in is an input as its options are: its author changes it without a new version.
    """
    module = inspect.getmodule(kind)
    if module is None or kind.__module__.partition(".")[0] == "eosin":
        return ""
    try:
        return hashlib.sha256(inspect.getsource(module).encode()).hexdigest()[:DIGITS]
    except (OSError, TypeError):  # typed into a session: there is no source to read
        return kind.__qualname__
