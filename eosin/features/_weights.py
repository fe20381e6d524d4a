"""Weights from files: found, read without running anything, identified by content."""

import argparse
import hashlib
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eosin.errors import CheckpointError

FILE_NAMES = ("model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin", "model.pth")
WRAPPERS = ("teacher", "ema", "state_dict_ema", "model_ema", "state_dict", "model", "student")
PREFIXES = ("module.", "backbone.", "model.", "encoder.", "trunk.", "vit.", "dinov2.", "dinov2_with_registers.")
TEACHERS = ("teacher.", "teacher_backbone.", "ema.", "momentum_encoder.")
HEADS = ("head.", "head_dist.", "fc.", "fc_norm.", "classifier.", "dino_head.", "ibot_head.", "decoder")
SHOWN_KEYS = 3
MAX_UNPACKING, MIN_UNPACKED = 10, 2**20


def find_weights(path: Path, file: str = "", *, source: str = "") -> Path:
    """Return the file of weights that a path means.

    Parameters
    ----------
    path : Path
        A ``.safetensors`` or torch file, or a folder that holds one; a folder of the Hugging Face cache
        (``models--owner--name``) or the whole cache, too.
    file : str
        Name of the file in such a folder; the usual names are tried when empty.
    source : str
        Repository that is looked for in a whole cache.

    Raises
    ------
    CheckpointError
        When there is no such file, or a folder holds several candidates.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(path, "no such file or folder of weights", code="missing")
    folder = _snapshot(_in_cache(path, source))
    for name in (file, *FILE_NAMES):
        if name and (folder / name).is_file():
            return folder / name
    files = [found for pattern in ("*.safetensors", "*.pth", "*.pt", "*.bin") for found in folder.glob(pattern)]
    if len(files) != 1:
        raise CheckpointError(folder, f"holds {len(files)} weight files; pass the path of one of them")
    return files[0]


def _in_cache(path: Path, source: str) -> Path:
    name = f"models--{source.partition('@')[0].replace('/', '--')}"
    return next((folder for folder in (path / name, path / "hub" / name) if folder.is_dir()), path)


def _snapshot(path: Path) -> Path:
    """Return the folder of the revision that a cached repository points at; other folders are what they are."""
    revisions = sorted(path.glob("snapshots/*"))
    current = path / "refs" / "main"
    if len(revisions) > 1 and current.is_file():
        named = path / "snapshots" / current.read_text(encoding="utf-8").strip()
        revisions = [named] if named in revisions else revisions
    if len(revisions) > 1:
        raise CheckpointError(path, f"holds {len(revisions)} revisions; pass one of its folders snapshots/<revision>")
    return revisions[0] if revisions else path


def revision_of(path: Path) -> str:
    """Return the commit that a file of the Hugging Face cache is of; empty for other files."""
    return path.parent.name if path.parent.parent.name == "snapshots" else ""


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file of weights; nothing in the file is ever executed.

    Parameters
    ----------
    path : Path
        ``.safetensors``, or a torch file, which is read with ``weights_only=True`` and no fallback.

    Returns
    -------
    dict of str to Tensor
        Names without the wrappers of training code (``teacher``, ``model``, ``state_dict``; ``module.``,
        ``backbone.``); of a teacher and a student the teacher.

    Raises
    ------
    CheckpointError
        When the file holds anything but tensors and plain values, or no tensors at all.
    """
    return _without_prefixes(read_tensors(path))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file of weights under the names that they have within the wrappers of training code.

    Raises
    ------
    CheckpointError
        As of `read_state`.
    """
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(path, f"holds a {type(content).__name__}; pass a state dict of the encoder")
    state = _unwrapped(content)
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(path, "holds no tensors; pass a state dict of the encoder")
    return tensors


def _read_safetensors(path: Path) -> Mapping[str, object]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(path, f"cannot be read as safetensors ({error})") from error


def _read_torch(path: Path) -> object:
    _refuse_bomb(path)
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # about formats that it then refuses
            torch.serialization.safe_globals([argparse.Namespace]),  # DINO and iBOT keep their settings in one
        ):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            path,
            "holds Python objects besides tensors, which eosin never executes; convert it to safetensors on a machine "
            "where you trust the file",
            code="unsafe",
        ) from error
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise CheckpointError(path, f"cannot be read as a torch file ({reason})") from error
    return content


def _refuse_bomb(path: Path) -> None:
    """Refuse an archive that unpacks to far more than it is; torch itself compresses nothing."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        declared = sum(member.file_size for member in archive.infolist())
    if declared > MAX_UNPACKING * max(path.stat().st_size, MIN_UNPACKED):
        raise CheckpointError(
            path,
            f"would unpack to {declared} bytes, which is more than a checkpoint of this size "
            "can hold; check the file's source",
            code="unsafe",
        )


def read_tensor_file(path: Path) -> NDArray[np.generic]:
    """Read a torch file that is one tensor; nothing in it is ever executed.

    Raises
    ------
    CheckpointError
        When it holds anything else.
    """
    content = _read_torch(path)
    if not isinstance(content, Tensor):
        raise CheckpointError(path, f"holds a {type(content).__name__}; expected one tensor of features")
    if content.numel() * content.element_size() > content.untyped_storage().nbytes():
        raise CheckpointError(
            path, f"declares {tuple(content.shape)} values but stores fewer; check the file's source", code="unsafe"
        )
    array: NDArray[np.generic] = (content.float() if content.is_floating_point() else content).numpy()
    return array


def _unwrapped(content: Mapping[str, object]) -> Mapping[str, object]:
    """Descend into the first wrapper that training code puts around a state dict; a teacher is what is deployed."""
    for name in WRAPPERS:
        inner = content.get(name)
        if isinstance(inner, Mapping):
            return _unwrapped(inner)
    return content


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for start in TEACHERS:
        teacher = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
        if teacher:
            return _without_prefixes(teacher)
    for prefix in PREFIXES:
        inside = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        outside = [name for name in state if not name.startswith(prefix) and not name.startswith(HEADS)]
        if inside and not outside:
            return _without_prefixes(inside)
    return state


def load_strictly(network: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load weights into a network; only heads that the network does not have may be left over.

    Raises
    ------
    CheckpointError
        Naming the first keys that are missing, left over or of another shape.
    """
    wanted = network.state_dict()
    usable = {name: value for name, value in state.items() if name in wanted or not name.startswith(HEADS)}
    faults = [f"{name} is missing" for name in wanted if name not in usable]
    faults += [f"{name} is not part of it" for name in usable if name not in wanted]
    faults += [
        f"{name} is {tuple(usable[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in usable and usable[name].shape != tensor.shape
    ]
    if faults:
        more = f" and {len(faults) - SHOWN_KEYS} more" if len(faults) > SHOWN_KEYS else ""
        raise CheckpointError(path, f"does not fit the encoder: {'; '.join(faults[:SHOWN_KEYS])}{more}")
    network.load_state_dict(usable)


def hash_state(state: Mapping[str, Tensor]) -> str:
    """Return 16 hexadecimal digits of the SHA-256 over names, types, shapes and values, whatever the file format."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
