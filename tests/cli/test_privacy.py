"""What a slide says of a patient stays in the slide: nothing of it is in any output, log or message of a whole run.

The canaries: pixels of label and macro, description, XMP and OME-XML of a TIFF, tags of a DICOM file, and the name of
the folder that holds the slides.
"""

import inspect
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from typer.testing import CliRunner

from eosin.cli._folders import Folders
from eosin.cli._settings import options_of
from eosin.cli.app import COMMANDS, app
from eosin.wsi._slide_file import open_slide
from eosin.wsi._synthetic import Cohort, make_cohort

from .conftest import Run

FOLDER = "Canary_Doe, Jane 1961"
WORDS = ("Canary", "canary", "CANARY", "Doe, Jane", "Doe^Jane")
LABEL_RGB, MACRO_RGB = (255, 0, 254), (0, 254, 255)
TILING = ("--set", "tiling.mpp=1.0", "--set", "tiling.patch_size=64")
RUN = ("--encoder", "he_texture", *TILING, "--folds", 2, "--set", "recipe.training.epochs=2")


def read_pixels(path: Path) -> NDArray[np.uint8]:
    with open_slide(path) as slide:
        return slide.read_level(0, (0, 0), slide.size_px0)


def flat(colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    return np.full((120, 160, 3), colour, np.uint8)


def write_scan(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Write a slide as a scanner of Aperio does, with label, macro and names."""
    words = (
        "Aperio Image Library v12\n{} |AppMag = 20|MPP = 0.5|User = Canary-User|Filename = Canary-File|Date = 01/02/61"
    )
    xmp = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'><name>Canary-XMP</name></x:xmpmeta>"
    tiles = {"tile": (256, 256), "compression": "jpeg", "photometric": "rgb", "metadata": None}
    beside = {"photometric": "rgb", "metadata": None}
    tags = [(700, "B", len(xmp), xmp, True)]
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(pixels, description=words.format("level"), extratags=tags, **tiles)
        tiff.write(pixels[::4, ::4], description=words.format("low"), **tiles)
        tiff.write(flat(LABEL_RGB), subfiletype=1, description=words.format("label 160x120"), **beside)
        tiff.write(flat(MACRO_RGB), subfiletype=9, description=words.format("macro 160x120"), **beside)


def write_ome(path: Path, pixels: NDArray[np.uint8]) -> None:
    height, width = pixels.shape[:2]
    xml = f"""<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">
    <Experimenter ID="Experimenter:0" LastName="Canary-OME"/><Image ID="Image:0" Name="Canary-Image">
    <Description>Canary-Description</Description><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8"
    SizeX="{width}" SizeY="{height}" SizeC="3" SizeZ="1" SizeT="1" PhysicalSizeX="0.5" PhysicalSizeY="0.5">
    <Channel ID="Channel:0:0" SamplesPerPixel="3"/><TiffData/></Pixels></Image></OME>"""
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(pixels, tile=(256, 256), photometric="rgb", metadata=None, description=xml)


def write_dicom(path: Path, pixels: NDArray[np.uint8]) -> None:
    side = 256
    height, width = pixels.shape[:2]
    padded = np.pad(pixels, ((0, -height % side), (0, -width % side), (0, 0)), "edge")
    frames = [padded[y : y + side, x : x + side] for y in range(0, height, side) for x in range(0, width, side)]
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.77.1.6"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.PatientName, data.PatientID, data.AccessionNumber = "Doe^Jane", "Canary-ID", "Canary-Accession"
    data.ContainerIdentifier, data.LabelText, data.InstitutionName = "Canary-Container", "Canary-Label", "Canary-House"
    data.SeriesInstanceUID, data.FrameOfReferenceUID = generate_uid(), generate_uid()
    data.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    data.Rows = data.Columns = side
    data.TotalPixelMatrixRows, data.TotalPixelMatrixColumns = height, width
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PlanarConfiguration = 3, "RGB", 0
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation, data.NumberOfFrames = 7, 0, len(frames)
    data.DimensionOrganizationType = "TILED_FULL"
    measures, shared = Dataset(), Dataset()
    measures.PixelSpacing = [0.0005, 0.0005]
    shared.PixelMeasuresSequence = [measures]
    data.SharedFunctionalGroupsSequence = [shared]
    data.PixelData = b"".join(np.ascontiguousarray(frame).tobytes() for frame in frames)
    data.save_as(path, enforce_file_format=True)


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Slides in a folder with a patient's name, one of them cut short; labels and a job elsewhere."""
    root = tmp_path_factory.mktemp("clinic")
    slides = root / FOLDER
    slides.mkdir()
    make_cohort(root / "painted", Cohort(n_slides=8, slides_per_patient=1, size_um=(400.0, 440.0)))
    writers = [(write_scan, ".svs")] * 4 + [(write_ome, ".ome.tiff"), (write_dicom, ".dcm")] * 2
    for number, ((write, suffix), path) in enumerate(
        zip(writers, sorted((root / "painted/slides").iterdir()), strict=True)
    ):
        write(slides / f"S{number:03d}{suffix}", read_pixels(path))
    whole = (slides / "S000.svs").read_bytes()
    (slides / "S008.svs").write_bytes(whole[: len(whole) // 3])
    table = pd.read_csv(root / "painted/labels.csv")
    extra = pd.DataFrame({"patient_id": ["P008"], "slide_id": ["S008"], "label": ["normal"]})
    pd.concat([table, extra]).to_csv(slides / "labels.csv", index=False)
    return SimpleNamespace(root=root, slides=slides, labels=slides / "labels.csv", out=root / "out", told="")


def eosin(clinic: SimpleNamespace, *arguments: object, codes: tuple[int, ...] = (0,)) -> None:
    """Run a command in a process of its own and keep everything that it says."""
    done = subprocess.run(
        [sys.executable, "-m", "eosin", *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=clinic.root, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode in codes, done.stderr
    clinic.told += done.stdout + done.stderr


@pytest.mark.slow
def test_nothing_of_a_patient_leaves_the_slides(clinic: SimpleNamespace) -> None:
    job = clinic.out / "job"
    eosin(clinic, "run", "--slides", clinic.slides, "--labels", clinic.labels, "--job", job, *RUN, codes=(1,))
    features = next(job.glob("*/features_he_texture"))
    model = ("--model", job / "model", "--features", features)
    one = ("--slide", clinic.slides / "S001.svs")
    eosin(clinic, "predict", *model, "--out", clinic.out / "p.parquet")
    eosin(clinic, "heatmap", *model, *one, "--out", clinic.out / "maps")
    eosin(clinic, "counterfactual", *model, *one, "--class", "tumour", "--out", clinic.out / "why")
    eosin(clinic, "export", features, "--to", "trident", "--out", clinic.out / "export")
    eosin(clinic, "view", *model, "--slides", clinic.slides, "--html", clinic.out / "page.html", codes=(0, 1))
    eosin(clinic, "verify", job)
    assert json.loads((job / "run.json").read_text())["records"]
    assert "S008" in clinic.told
    found = [f"messages: {line}" for line in clinic.told.splitlines() if any(word in line for word in WORDS)]
    files = [path for path in clinic.out.rglob("*") if path.is_file()]
    assert len(files) > 60
    for path in files:
        found += [
            f"{path.relative_to(clinic.out)}: {word}" for word in WORDS if word in str(path.name) + words_of(path)
        ]
        found += [
            f"{path.relative_to(clinic.out)}: pixels of a label" for picture in pictures_of(path) if is_beside(picture)
        ]
    assert found == []


def words_of(path: Path) -> str:
    """Return all text of a file, however it is stored."""
    text = path.read_bytes().decode("latin-1")
    if path.suffix == ".parquet":
        text += pd.read_parquet(path).to_csv()
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            said = [str(dict(file.attrs))]
            file.visititems(lambda name, item: said.append(str((name, dict(item.attrs)))))
            text += "".join(said)
    return text


def pictures_of(path: Path) -> list[NDArray[np.uint8]]:
    """Return the pictures of a file, those inside a page of HTML included."""
    data = path.read_bytes()
    if path.suffix in (".jpg", ".png"):
        return [np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))]
    if path.suffix != ".html":
        return []
    import base64
    import re

    stored = re.findall(rb"data:image/(?:png|jpeg);base64,([A-Za-z0-9+/=]+)", data)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one))).convert("RGB")) for one in stored]


def is_beside(picture: NDArray[np.uint8]) -> bool:
    """Return whether a picture has a patch of the label's or the macro's colour."""
    near = [np.abs(picture.astype(int) - colour).max(axis=2) < 24 for colour in (LABEL_RGB, MACRO_RGB)]
    return any(int(one.sum()) > 40 for one in near)


def test_the_check_sees_a_label() -> None:
    assert is_beside(flat(LABEL_RGB))
    assert is_beside(np.asarray(Image.fromarray(flat(MACRO_RGB)).resize((40, 30))))
    assert not is_beside(np.full((50, 50, 3), 240, np.uint8))


WRONG = {
    "nothing": lambda path: None,
    "a folder without files": lambda path: path.mkdir(),
    "a text": lambda path: path.write_text("see the other disk\n"),
    "a name below a file": lambda path: path.parent.write_text("x"),
}


@dataclass(frozen=True)
class Given:
    """A path that a command takes: after its flag, or without one."""

    name: str
    flag: str
    is_needed: bool


def paths_of(command: Callable[..., None]) -> list[Given]:
    signature = inspect.signature(command)
    flags = {option.parameter: option.flag for option in options_of(signature)}
    own = inspect.signature(command.__wrapped__)  # type: ignore[attr-defined]
    needed = [option.parameter for option in options_of(own) if option.required]
    return [
        Given(name, flags.get(name, ""), name in needed or name not in flags)
        for name, parameter in signature.parameters.items()
        if "Path" in str(parameter.annotation) and name not in ("study", "site")
    ]


PATHS = {name: paths_of(command) for name, command in COMMANDS.items() if name not in ("demo", "doctor")}


def refuses(name: str, option: Given, kind: str, suffix: str, run: Run, root: Path) -> str:
    """Return what a command says of a wrong path, with what it needs beside it as wrong as that."""
    folder = root / FOLDER / ("file" if "below" in kind else "")
    (folder.parent if "below" in kind else folder).mkdir(parents=True)
    path = folder / f"wrong{suffix}"
    WRONG[kind](path)
    flags = {option.flag, *(one.flag for one in PATHS[name] if one.is_needed)}
    result = run(name, *(part for flag in sorted(flags) for part in (flag, path) if part))
    assert result.exit_code in (0, 2, 3), result.output
    assert not any(word in result.stderr for word in WORDS), (option.flag, result.stderr)
    return result.stderr


COMMANDS_WITH_PATHS = [name for name, paths in PATHS.items() if paths]


@pytest.mark.parametrize("name", COMMANDS_WITH_PATHS)
def test_errors_of_usage_do_not_repeat_folders(name: str, run: Run, tmp_path: Path) -> None:
    """Each path of each command in turn, wrong in one way."""
    said = ""
    for number, option in enumerate(PATHS[name]):
        kind, suffix = list(WRONG)[number % len(WRONG)], ("", ".csv")[number % 3 == 0]
        said += refuses(name, option, kind, suffix, run, tmp_path / str(number))
    assert "error: " in said


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS_WITH_PATHS)
def test_no_error_of_usage_repeats_folders(name: str, run: Run, tmp_path: Path) -> None:
    cases = [(option, kind, suffix) for option in PATHS[name] for kind in WRONG for suffix in ("", ".csv", ".svs")]
    for number, case in enumerate(cases):
        refuses(name, *case, run, tmp_path / str(number))


def test_folders_are_named_when_that_is_asked_for(run: Run, tmp_path: Path) -> None:
    wrong = ("tile", "--slides", tmp_path / FOLDER / "a.svs", "--job", tmp_path / "job")
    assert run(*wrong).stderr == ("error: a.svs: no such file or folder; check the path; --verbose names the folders\n")
    done = CliRunner().invoke(app, [*map(str, wrong), "--verbose"])
    assert f"error: {tmp_path / FOLDER}/a.svs: no such" in done.stderr


@pytest.mark.parametrize(
    ("said", "left"),
    [
        ("{root}/Doe, Jane/s.svs: bad", "s.svs: bad"),
        ("{root}: no slide", "<slides>: no slide"),
        ("run `eosin tile --slides {root}`", "run `eosin tile --slides <slides>`"),
        ("{root}/Doe, J/a.svs and {root}/Dr Roe/b/a.svs are", "a.svs and a.svs are"),
        ("2 slides: 2 ok", "2 slides: 2 ok"),
        ("labels: slides: column 'Slide'", "labels: slides: column 'Slide'"),
        ("{root}2/s.svs", "slides2/s.svs"),
        ("{job}/records/x.json", "job/records/x.json"),
        ("{root.parent} is full", "<folder> is full"),
    ],
)
def test_what_is_left_out_of_a_line(said: str, left: str, tmp_path: Path) -> None:
    root, job = tmp_path / FOLDER / "slides", tmp_path / FOLDER / "job"
    root.mkdir(parents=True)
    folders = Folders()
    folders.add({"slides": [root, Path("slides")], "job": job, "shard": "0/2"})
    assert folders.left_out(said.format(root=root, job=job)) == left
