"""Every error that eosin raises on purpose.

```
EosinError                      code        what it is
├── SlideError                  slide       one slide cannot be used; carries its path
│   ├── SlideOpenError          unreadable  also OSError
│   ├── MissingResolutionError  no-mpp      also ValueError
│   └── CorruptSlideError       corrupt
├── FeatureFileError            features    one feature or coordinates file cannot be used; also ValueError
│   └── FeatureMismatchError    mismatch    encoder, mpp, tile size or width differ
├── ConfigError                 config      options that make no sense; also ValueError
│   └── UnknownNameError        unknown     a name that is not registered; also KeyError
├── CheckpointError             checkpoint  one model folder or foreign checkpoint cannot be used; also ValueError
├── LabelError                  labels      table of labels or splits; also ValueError
│   └── TableError              table       a file that cannot be read as a table, whatever it states; also ConfigError
├── WorkerError                 crashed     a child process died or gave no answer in time; also RuntimeError
├── MissingPackageError         package     a package that not every user needs is not installed; also ImportError
├── KernelUnavailableError      kernel      a forced kernel backend cannot run here; also RuntimeError
├── OutputError                 output      disk, permission or device stopped the run; also OSError
├── MoreToDo                    more        a time limit ended the run with work left; run it again
└── SeveralErrors               several     all that stands in the way of a command, found before any work
```

A message says what was asked, what was found and what to do. ``code`` is the short, stable reason that
`run.json` stores; the command line turns an error into one line and the documented exit code.
"""

import difflib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

__all__ = [
    "CheckpointError",
    "ConfigError",
    "CorruptSlideError",
    "EosinError",
    "FeatureFileError",
    "FeatureMismatchError",
    "KernelUnavailableError",
    "LabelError",
    "MissingPackageError",
    "MissingResolutionError",
    "OutputError",
    "SlideError",
    "SlideOpenError",
    "TableError",
    "UnknownNameError",
    "WorkerError",
]

MOST_LISTED = 30
"""Names that exist are listed up to this number when a near one can be suggested."""

EXTRAS = {  # a package that not every user needs -> the extra of eosin that installs it
    "aiohttp": "remote",
    "anndata": "anndata",
    "bokeh": "viewer",
    "fsspec": "remote",
    "gcsfs": "remote",
    "geopandas": "spatialdata",
    "huggingface_hub": "encoders",
    "jinja2": "report",
    "matplotlib": "report",
    "openpyxl": "tables",
    "parsl": "cluster",
    "pyarrow": "tables",
    "s3fs": "remote",
    "spatialdata": "spatialdata",
    "tensorboard": "tensorboard",
    "timm": "encoders",
    "torchvision": "encoders",
    "transformers": "hf",
    "zarr": "zarr",
}


class EosinError(Exception):
    """Base of all errors of the package.

    Parameters
    ----------
    message : str
        One sentence: what was asked, what was found, what to do.
    code : str, optional
        Reason code; the class's own unless a finer one is given.
    """

    default_code: ClassVar[str] = "error"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code

    def __str__(self) -> str:
        """Return the message alone, whatever the builtin parent would print."""
        return self.message

    def __reduce__(self) -> tuple[object, ...]:
        """Rebuild from the instance's state: worker processes send errors back by pickle."""
        return _rebuild, (type(self), self.args, dict(self.__dict__))


def _rebuild(kind: type[EosinError], args: tuple[object, ...], state: dict[str, object]) -> EosinError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class _FileBoundError(EosinError):
    def __init__(self, path: Path | str, message: str, *, code: str | None = None) -> None:
        super().__init__(f"{path}: {message}", code=code)
        self.path = Path(path)
        self.detail = message


class _SlideBoundError(_FileBoundError):
    """Of a file of one slide: the message names the file without its folders, which may be called after a patient.

    ``path`` has them, and so has what ``--verbose`` prints.
    """

    def __init__(self, path: Path | str, message: str, *, code: str | None = None) -> None:
        path = Path(path)
        for folder in {str(path.parent), str(path.parent.absolute()), str(path.parent.resolve())}:
            message = message.replace(f"{folder}{os.sep}", "")
        super().__init__(path.name, message, code=code)
        self.path = path


class SlideError(_SlideBoundError):
    """One slide cannot be used."""

    default_code = "slide"


class SlideOpenError(SlideError, OSError):
    """The file is missing, or no reader can open it."""

    default_code = "unreadable"


class MissingResolutionError(SlideError, ValueError):
    """The slide states no usable µm/px and the user gave none."""

    default_code = "no-mpp"


class CorruptSlideError(SlideError):
    """The slide opened, but some of its pixels cannot be decoded."""

    default_code = "corrupt"


class FeatureFileError(_SlideBoundError, ValueError):
    """A feature or coordinates file is damaged, incomplete or of an unknown layout."""

    default_code = "features"


class FeatureMismatchError(FeatureFileError):
    """Features of another encoder, mpp, tile size or width than asked for."""

    default_code = "mismatch"


class ConfigError(EosinError, ValueError):
    """Options that are unknown, out of range or contradict each other."""

    default_code = "config"


class UnknownNameError(ConfigError, KeyError):
    """A name that nothing is registered under.

    Parameters
    ----------
    kind : str
        What was looked up, for the message: "encoder", "aggregator", "option of abmil".
    name : str
        The name that was asked for.
    known : iterable of str
        The names that exist; the nearest are suggested.
    near : sequence of str
        What was probably meant, where that is known better than by its letters.
    """

    default_code = "unknown"

    def __init__(self, kind: str, name: str, known: Iterable[str], *, near: Sequence[str] = ()) -> None:
        names = sorted(known)
        near = list(near) or difflib.get_close_matches(name, names, n=3, cutoff=0.6)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        listed = "" if near and len(names) > MOST_LISTED else f"known: {', '.join(names) or 'none'}"
        super().__init__(f"no {kind} named {name!r}; {hint}{listed}".rstrip())
        self.name, self.near = name, near


class CheckpointError(_FileBoundError, ValueError):
    """A model folder or a foreign checkpoint that cannot be used."""

    default_code = "checkpoint"


class LabelError(EosinError, ValueError):
    """A table of labels or splits that cannot be used: leakage, missing class, unknown slide, duplicate id."""

    default_code = "labels"


class TableError(LabelError, ConfigError):
    """A file that cannot be read as a table: labels, resolutions, options of single slides or features."""

    default_code = "table"


class WorkerError(EosinError, RuntimeError):
    """A child process died (code ``crashed``), or gave no answer in time (code ``timeout``)."""

    default_code = "crashed"


class MoreToDo(EosinError):
    """A time limit ended the run before all was done; the same command, started again, goes on."""

    default_code = "more"


class MissingPackageError(EosinError, ImportError):
    """A package that not every user needs is not installed.

    Parameters
    ----------
    cause : ImportError
        What Python, or a library that wants the package, says.
    """

    default_code = "package"

    def __init__(self, cause: ImportError) -> None:
        name = (cause.name or "").split(".")[0] or next((name for name in EXTRAS if name in str(cause)), "")
        hint = f"the package {name} is not installed; " if name else f"{cause}; "
        super().__init__(hint + (f"pip install 'eosin[{EXTRAS[name]}]'" if name in EXTRAS else "install eosin again"))


class KernelUnavailableError(EosinError, RuntimeError):
    """A kernel backend was forced that cannot run here."""

    default_code = "kernel"


class OutputError(_FileBoundError, OSError):
    """The environment stopped the run: disk full, no permission, device lost."""

    default_code = "output"


class SeveralErrors(EosinError):
    """Several things stand in the way of a command; all were found before any work.

    Parameters
    ----------
    errors : sequence of EosinError
        Each says what to do about it.
    """

    default_code = "several"

    def __init__(self, errors: Sequence[EosinError]) -> None:
        found = "; ".join(f"({number}) {error.message}" for number, error in enumerate(errors, 1))
        super().__init__(f"{len(errors)} problems, nothing was done: {found}")
        self.errors = tuple(errors)
