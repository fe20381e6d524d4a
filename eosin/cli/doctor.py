"""`eosin doctor`: is this machine fit to run eosin?"""

import platform
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from eosin._claims import check_claims
from eosin._devices import count_cores
from eosin.cli._common import Done, command, console
from eosin.errors import EXTRAS, OutputError

PACKAGES = (
    "eosin", "torch", "numpy", "openslide-python", "openslide-bin", "tifffile", "imagecodecs", "h5py", "scikit-learn",
    "safetensors",
)  # fmt: skip
OPTIONAL = ("triton", *EXTRAS)  # triton exists for Linux only; plain torch takes over elsewhere
GOLDEN_SIZE_PX = 1024
GOLDEN_MPP = 0.5


@command()
def doctor(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            help="More folders to test for writing; the current and the temporary folder are always tested."
        ),
    ] = None,
    *,
    job: Annotated[
        Path | None,
        typer.Option(help="Job folder: try in two processes whether runs can share its work (docs/cluster.md)."),
    ] = None,
) -> Done:
    """Check packages, devices, the slide reader and folders of this machine. Exit code 3: something is broken."""
    from rich.table import Table

    table = Table("check", "result", "detail")
    broken = []
    for name, check in _checks(folders or [], job):
        try:
            table.add_row(name, "ok", check())
        except Exception as error:  # noqa: BLE001 - the doctor reports what is broken, whatever it is
            broken.append(name)
            table.add_row(name, "[red]broken[/red]", f"{type(error).__name__}: {error}")
    console().print(table)
    if broken:
        raise OutputError(
            "this machine", f"cannot run eosin: {', '.join(broken)} broken; the table above gives the cause"
        )
    return Done()


def _checks(folders: list[Path], job: Path | None) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "python", platform.python_version
    for package in PACKAGES:
        yield package, partial(version, package)
    for package in OPTIONAL:
        yield package, partial(_version_if_there, package)
    yield "devices", _devices
    yield "products", _products
    yield "slide reader", _read_golden_slide
    for folder in [Path.cwd(), Path(tempfile.gettempdir()), *folders]:
        yield f"write to {folder}", partial(_write_to, folder)
    if job is not None:
        yield f"claims in {job}", partial(check_claims, job)


def _version_if_there(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed" + (f"; pip install 'eosin\\[{EXTRAS[package]}]'" if package in EXTRAS else "")


def _devices() -> str:
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return (
        f"cpu ({count_cores()} cores, {torch.get_num_threads()} threads){''.join(f', cuda: {name}' for name in names)}"
    )


def _products() -> str:
    """Return what the probe of the machine chose, measured now if it never was."""
    import torch

    from eosin.kernels._rates import of_this_machine, processor

    found = of_this_machine()
    gradients = "convolution" if found.convolves else "BLAS"
    wide, half = max(found.fp32, found.fp32_blas), max(found.bf16, found.bf16_blas)
    layers = "BLAS" if found.layers_by_blas(torch.float32) else "oneDNN"
    return (
        f"{processor()}: {wide:.0f} GFLOP/s a core in fp32, {half:.0f} in bf16; "
        f"layers by {layers}, gradients by {gradients}, --precision auto is {found.precision}"
    )


def _read_golden_slide() -> str:
    """Write a lossless two-level pyramid, read it back through the slide reader and compare every pixel.

    Broken builds of the graphics library below OpenSlide shift or blacken regions without an error.
    """
    import numpy as np
    import tifffile

    from eosin.wsi._slide_file import open_slide

    pixels = np.random.default_rng(0).integers(0, 256, (GOLDEN_SIZE_PX, GOLDEN_SIZE_PX, 3), dtype=np.uint8)
    per_cm = 1e4 / GOLDEN_MPP
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "golden.tiff"
        tifffile.imwrite(
            path, pixels, tile=(256, 256), photometric="rgb", compression="deflate",
            resolution=(per_cm, per_cm), resolutionunit="CENTIMETER",
        )  # fmt: skip
        with open_slide(path) as slide:
            for x, y, size in ((0, 0, GOLDEN_SIZE_PX), (37, 101, 300), (255, 511, 2)):
                read = slide.read((x, y), (size, size), GOLDEN_MPP)
                if not np.array_equal(read, pixels[y : y + size, x : x + size]):
                    raise OutputError("slide reader", f"wrong pixels at ({x}, {y}); reinstall openslide-bin")
            return f"{slide.facts()['reader']}: {GOLDEN_SIZE_PX}×{GOLDEN_SIZE_PX} pixels read back unchanged"


def _write_to(folder: Path) -> str:
    import shutil

    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(b"eosin")
    return f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB free"
