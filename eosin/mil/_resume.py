"""The state of an unfinished training, in one file that is whole or absent: tensors, and facts as JSON beside them."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from eosin._files import write_bytes
from eosin._seals import KEY

STATE = "state.safetensors"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class State:
    """Everything from which a training continues to the same weights.

    Attributes
    ----------
    tensors : mapping of str to Tensor
    facts : mapping
        JSON; ``fingerprint`` says which training it is of.
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


def write_state(folder: Path, state: State) -> None:
    """Write the state; `OutputError` when the folder cannot be written."""
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.tensors.items()}
    facts = json.dumps(dict(state.facts), allow_nan=False)
    metadata = {"state": json.dumps({"facts": facts, KEY: _checksum(facts, tensors)})}
    data = save(tensors, metadata)
    write_bytes(folder / STATE, data)


def _checksum(facts: str, tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of everything from which a training continues."""
    digest = hashlib.sha256(facts.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def forget_state(folder: Path) -> None:
    """Remove the state of a training that is finished."""
    (folder / STATE).unlink(missing_ok=True)


def read_state(folder: Path, fingerprint: str) -> State | None:
    """Read the state of this very training; None when there is none, or it is of other options, bags or labels."""
    path = folder / STATE
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            stated = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        if stated[KEY] != _checksum(stated["facts"], tensors):
            raise ValueError("it is damaged")
        facts = json.loads(stated["facts"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        logger.warning("%s cannot be read (%s); training starts from the beginning", path, error)
        return None
    if facts.get("fingerprint") != fingerprint:
        logger.warning("%s belongs to another training run; training starts from the beginning", path)
        return None
    return State(tensors, facts)
