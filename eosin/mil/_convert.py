"""Trained aggregators of other tools become model folders.

A foreign file is read with ``weights_only=True``, without fallback: it can hold tensors and nothing that runs. Which
network it is follows from the names and shapes of its tensors; a tensor that nothing here explains is an error, never
left out in silence, and so is a layer that is missing unless the caller wants it filled.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from eosin.errors import CheckpointError
from eosin.features._bag import FeatureSpec
from eosin.mil._checkpoint import ModelCard, build_model, save_model
from eosin.mil._recipe import Recipe, Training
from eosin.mil.layouts import LAYOUTS, Found, Layout, Taker, Tensors
from eosin.mil.slots import Aggregator
from eosin.mil.task import Task
from eosin.mil.tasks._classification import Binary, Classification

WRAPPERS = ("model.", "net.")


def convert_checkpoint(
    path: Path, out: Path, *, features: FeatureSpec, classes: Sequence[str], partial: bool = False
) -> ModelCard:
    """Turn a checkpoint of CLAM, ACMIL, DSMIL, TransMIL, MIL-Lab, HIPPO or PackMIL into a model folder.

    Parameters
    ----------
    path : Path
        ``.pt``, ``.pth`` or ``.safetensors`` with a plain state dictionary, or with one under ``model`` or
        ``state_dict``.
    out : Path
        The model folder.
    features : FeatureSpec
        What the model was trained on, which no such file says; its width must be the checkpoint's.
    classes : sequence of str
        Names of the classes; two for a model with one output, whose logit speaks for the second.
    partial : bool
        Give layers that the file lacks fresh weights, the same every time; the model card names them. For networks that
        are published without their last layer (Feather) or as a start for training (DSMIL).

    Raises
    ------
    CheckpointError
        If the file cannot be read safely, is of no known network, or does not fit `features` or `classes`.
    """
    found = recognise(read_tensors(path), path)
    if found.dim != features.dim:
        raise CheckpointError(
            path, f"was trained on features of width {found.dim}, not {features.dim}; name its encoder"
        )
    task = _task(found.n_outputs, classes, path)
    recipe = Recipe(aggregator=found.aggregator, training=Training(standardize=False))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = build_model(recipe, task, features.dim)
    facts = {"converted_from": found.tool, "file": path.name}
    untrained = _fill(model, found.tensors, path, partial=partial)
    if untrained:
        facts["untrained"] = ", ".join(untrained)
    card = ModelCard(recipe=recipe, task=task.model_dump(mode="json"), features=features, training=facts)
    return save_model(out, model.eval(), card)


def _fill(model: Aggregator, tensors: Tensors, path: Path, *, partial: bool) -> list[str]:
    """Load the tensors; return the layers that the file lacks."""
    try:
        missing, surplus = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise CheckpointError(path, f"does not fill the model: {' '.join(str(error).split())}") from None
    layers = sorted({name.rpartition(".")[0] for name in missing})
    if surplus or (layers and not partial):
        fault = f"has {', '.join(surplus)} besides" if surplus else f"lacks the layers {', '.join(layers)}"
        raise CheckpointError(path, f"{fault}; pass --partial where fresh, untrained layers are wanted")
    return layers


def _task(n_outputs: int | None, classes: Sequence[str], path: Path) -> Task:
    expected = len(classes) if n_outputs is None else max(n_outputs, 2)
    if len(classes) != expected or expected < 2:
        outputs = "no last layer" if n_outputs is None else f"{n_outputs} outputs"
        raise CheckpointError(path, f"has {outputs}; name {max(expected, 2)} classes, not {len(classes)}")
    return (Binary if n_outputs == 1 else Classification).parse({"classes": tuple(classes)})


def read_tensors(path: Path) -> Tensors:
    """Read the tensors of a foreign checkpoint, without the ``module.`` that data parallelism leaves in names.

    Raises
    ------
    CheckpointError
        If the file is missing, holds anything but tensors and plain values, or no tensors.
    """
    try:
        loaded: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except FileNotFoundError:
        raise CheckpointError(path, "no such file") from None
    except UnpicklingError:
        raise CheckpointError(
            path, "holds more than tensors, which is never loaded; save its state_dict alone"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, SafetensorError) as error:
        raise CheckpointError(path, f"cannot be read ({' '.join(str(error).split())})") from None
    for key in ("model", "state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(path, "is not a dictionary of tensors; save the model's state_dict")
    return {re.sub(r"(^|\.)module\.", r"\1", name): tensor for name, tensor in loaded.items()}


def recognise(tensors: Mapping[str, Tensor], path: Path) -> Found:
    """Return which network the tensors are of, under our names.

    Raises
    ------
    CheckpointError
        If no known network has such tensors, or there are others besides.
    """
    for prefix in ("", *WRAPPERS):
        inside = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        if len(inside) < len(tensors):
            continue
        fitting = [(layout, kept) for layout in map(LAYOUTS.__getitem__, LAYOUTS) if (kept := layout.of(inside))]
        if fitting:
            return _explained(*max(fitting, key=lambda pair: len(pair[0].marks)), path)
    raise CheckpointError(path, f"is of no network that is known here; it holds {', '.join(sorted(tensors)[:5])}")


def _explained(layout: Layout, tensors: Tensors, path: Path) -> Found:
    found = layout.read(Taker(tensors, path))
    if tensors:
        raise CheckpointError(path, f"looks like {found.tool}, but nothing explains {', '.join(sorted(tensors)[:5])}")
    return found
