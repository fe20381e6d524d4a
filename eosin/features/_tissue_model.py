"""Tissue by a trained network, whose weights the user has: outlines that tiling reads as those of a person.

The network is torchvision's DeepLabV3 with a ResNet-50 and two outputs, glass and tissue, on fields of 512 px at 1
µm/px; the weights that come with HEST and TRIDENT are of this kind.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from eosin._batch import Outcome, Record, Report, run_batch
from eosin._devices import choose_device
from eosin._files import write_text
from eosin._fingerprints import fingerprint
from eosin._seals import is_intact, read_json, sealed
from eosin.errors import SlideError
from eosin.features._weights import find_weights, hash_state, load_strictly, read_tensors
from eosin.wsi._geojson import outline_to_geojson, qupath_origin
from eosin.wsi._job import JobFolder, TissueTiles
from eosin.wsi._slide import Slide
from eosin.wsi._slide_file import SlideFile, copy_ahead
from eosin.wsi._tissue import TissueMask

FOLDER = "tissue_by_network"
"""Of the outlines in a job."""
MPP, FIELD_PX, CELL_PX = 1.0, 512, 8
MAX_UPSAMPLING = 1.1
TISSUE = 1
MADE_FROM = "eosin"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, on which the ResNet was trained first."""


@dataclass(frozen=True)
class TissueModel:
    """A network that tells tissue from glass.

    Attributes
    ----------
    network : Module
        (1, 3, 512, 512) to ``out`` (1, 2, 512, 512), in evaluation mode.
    weights_hash : str
    device : torch.device
    """

    network: nn.Module
    weights_hash: str
    device: torch.device

    @torch.inference_mode()
    def is_tissue(self, rgb: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Return which cells of a (512, 512, 3) field are more likely tissue than glass, (64, 64)."""
        pixels = torch.from_numpy(rgb).to(self.device).permute(2, 0, 1)[None].float() / 255
        mean, std = (torch.tensor(value, device=self.device)[None, :, None, None] for value in (MEAN, STD))
        chance = self.network((pixels - mean) / std)["out"].softmax(dim=1)[:, TISSUE : TISSUE + 1]
        cells: NDArray[np.bool_] = (nn.functional.avg_pool2d(chance, CELL_PX)[0, 0] > 0.5).cpu().numpy()
        return cells


def load_tissue_model(path: Path, device: torch.device) -> TissueModel:
    """Build the network with weights from a file.

    Raises
    ------
    CheckpointError
        If the file is not of such a network.
    MissingPackageError
        Without torchvision, which `pip install 'eosin[encoders]'` brings.
    """
    from torchvision.models.segmentation import deeplabv3_resnet50

    network = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=2)
    found = find_weights(path)
    state = {name.removeprefix("module.").removeprefix("model."): value for name, value in read_tensors(found).items()}
    # the second head served training only
    state = {name: value for name, value in state.items() if not name.startswith("aux_classifier.")}
    load_strictly(network, state, found)
    return TissueModel(network.eval().to(device), hash_state(state), device)


def segment_slide(slide: Slide, model: TissueModel) -> TissueMask:
    """Find the tissue of an open slide.

    Raises
    ------
    SlideError
        Code ``too-coarse`` if the slide has fewer pixels than the network was trained on.
    """
    if slide.mpp > MPP * MAX_UPSAMPLING:
        why = f"the slide has {slide.mpp:.3g} µm/px, the tissue network needs {MPP:g}; leave out --tissue-weights"
        raise SlideError(slide.path, why, code="too-coarse")
    side_px0 = FIELD_PX * MPP / slide.mpp
    across, down = (int(np.ceil(side / side_px0)) for side in slide.size_px0)
    cells = FIELD_PX // CELL_PX
    mask = np.zeros((down * cells, across * cells), np.bool_)
    for row in range(down):
        for column in range(across):
            corner = (round(column * side_px0), round(row * side_px0))
            found = model.is_tissue(slide.read(corner, (FIELD_PX, FIELD_PX), MPP))
            mask[row * cells : (row + 1) * cells, column * cells : (column + 1) * cells] = found
    step = side_px0 / cells
    height, width = (
        int(np.ceil(side / step)) for side in slide.size_px0[::-1]
    )  # cells beyond the slide are not tissue
    return TissueMask(mask[:height, :width], (step, step), slide.size_px0, slide.mpp)


def outline_slides(
    slides: Sequence[SlideFile],
    model: TissueModel,
    folder: Path,
    *,
    run_json: Path | None = None,
    progress: Callable[[Record], None] | None = None,
) -> Report:
    """Write the outline of the tissue of every slide, ``<slide>.geojson``; those that are there already stay
    unless they were changed.

    Parameters
    ----------
    slides : sequence of SlideFile
    model : TissueModel
    folder : Path
        Made when it is missing.
    run_json : Path, optional
        Receives the records of the stage ``tissue``.
    progress : callable, optional
    """

    def output(slide: SlideFile) -> Path:
        return folder / f"{slide.slide_id}.geojson"

    def made_from(slide: SlideFile) -> str:
        return fingerprint("tissue", slide=slide.version(), slide_mpp=slide.reading, weights=model.weights_hash)

    def is_done(slide: SlideFile) -> bool:
        try:
            outline = read_json(output(slide))
            return bool(is_intact(outline) and outline[MADE_FROM] == made_from(slide))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False

    def work(slide: SlideFile) -> Outcome:
        origin = made_from(slide)
        with slide.open() as opened:
            mask = segment_slide(opened, model)
            corner = qupath_origin(opened.bounds_px0)
        text = outline_to_geojson(mask.contours(), slide_id=slide.slide_id, qupath_origin_px0=corner)
        write_text(output(slide), json.dumps(sealed({**json.loads(text), MADE_FROM: origin})))
        return Outcome(message=f"{mask.area_um2 / 1e6:.3g} mm² of tissue by the network of --tissue-weights")

    return run_batch(
        slides, work, key=lambda slide: slide.slide_id, stage="tissue", is_done=is_done, output=output,
        run_json=run_json, progress=progress, ahead=copy_ahead,
    )  # fmt: skip


@dataclass(frozen=True)
class NetworkTiles:
    """The tiles on the tissue that a network finds; in place of `TissueTiles` wherever a stage writes tiles.

    Attributes
    ----------
    tiles : TissueTiles
        Everything else that decides the tiles.
    weights : Path
        Of the network.
    device : str
        ``auto``, ``cpu``, ``cuda``.
    """

    tiles: TissueTiles
    weights: Path
    device: str = "auto"

    @property
    def folder(self) -> str:
        """Name of the folder of the coordinates in a job."""
        return self.tiles.folder

    def write(
        self,
        slides: Sequence[SlideFile],
        job: JobFolder,
        *,
        workers: int = 0,
        progress: Callable[[Record], None] | None = None,
    ) -> Report:
        """Outline the tissue of every slide, and write the coordinates file of those that could be outlined."""
        outlines = job.root / FOLDER
        model = load_tissue_model(self.weights, choose_device(self.device))
        drawn = outline_slides(slides, model, outlines, run_json=job.run_json)
        lost = {record.slide_id for record in drawn.failed}
        rest = [slide for slide in slides if slide.slide_id not in lost]
        return drawn.then(replace(self.tiles, contours=outlines).write(rest, job, workers=workers, progress=progress))
