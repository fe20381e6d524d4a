"""Commands in processes of their own, a reader that kills its process, and the arrays of a job."""

import os
import subprocess
import sys
from pathlib import Path

import h5py

RECIPE = ("recipe.training.epochs=3", "recipe.training.select=last", "recipe.training.patience=0")

POISON = """
import os, signal
from eosin.wsi.inventory import Picture
from eosin.wsi.reader import READERS, Reader

@READERS.register
class Poison(Reader):
    name = "poison"

    def __init__(self, path):
        super().__init__(path)
        self.pictures = [Picture("slide", ((512, 512),))]

    @classmethod
    def takes(cls, path, head):
        return path.name.startswith("poison")

    def open(self, picture, plane, mpp):
        with open(os.environ["POISON_LOG"], "a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGSEGV)
"""


def start(*arguments: object, **environment: str) -> "subprocess.Popen[str]":
    """Start a command of eosin as users do."""
    return subprocess.Popen(
        [sys.executable, "-m", "eosin", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def eosin(*arguments: object, code: int = 0, timeout_s: float = 400, **environment: str) -> str:
    """Run a command to its end; return what it said."""
    process = start(*arguments, **environment)
    out, err = process.communicate(timeout=timeout_s)
    assert process.returncode == code, err
    return out + err


def arrays_of(folder: Path) -> dict[str, bytes]:
    """Return what coordinates and features say, by file."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.rglob("*.h5")):
        with h5py.File(path) as file:
            file.visititems(
                lambda name, item, path=path: (
                    found.update({f"{path.relative_to(folder)}/{name}": item[()].tobytes()})
                    if isinstance(item, h5py.Dataset)
                    else None
                )
            )
    return found
