"""Trained aggregators of other tools become model folders.

A foreign file is read with ``weights_only=True``, without fallback: it can hold tensors and nothing that runs. Which
network it is follows from the names and shapes of its tensors; a tensor that nothing here explains is an error, never
left out in silence.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from eosin.errors import CheckpointError
from eosin.features.bag import FeatureSpec
from eosin.mil.checkpoint import ModelCard, build_model, save_model
from eosin.mil.recipe import Component, Recipe, Training
from eosin.mil.tasks import Binary, Classification, Task

Tensors = dict[str, Tensor]
TRAINING_ONLY = ("instance_loss_fn.", "instance_classifiers.")


@dataclass(frozen=True, eq=False)
class Found:
    """What a foreign checkpoint is.

    Attributes
    ----------
    tool : str
        Where it is from, for a person to read.
    aggregator : Component
    tensors : dict of str to Tensor
        Under our names.
    """

    tool: str
    aggregator: Component
    tensors: Tensors

    @property
    def n_outputs(self) -> int:
        """Number of logits."""
        return len(self.tensors["classifier.bias"])

    @property
    def dim(self) -> int:
        """Width of the features it was trained on."""
        first = self.tensors.get("embed.0.weight", self.tensors.get("instance_classifier.weight"))
        return self.tensors["classifier.weight"].shape[1] if first is None else first.shape[1]


def convert_checkpoint(path: Path, out: Path, *, features: FeatureSpec, classes: Sequence[str]) -> ModelCard:
    """Turn a checkpoint of CLAM, DSMIL, MIL-Lab, HIPPO or PackMIL into a model folder.

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
        model = build_model(recipe, task, features.dim)
    try:
        model.load_state_dict(found.tensors)
    except RuntimeError as error:
        raise CheckpointError(path, f"does not fill the model: {' '.join(str(error).split())}") from None
    facts = {"converted_from": found.tool, "file": path.name}
    card = ModelCard(recipe=recipe, task=task.model_dump(mode="json"), features=features, training=facts)
    return save_model(out, model.eval(), card)


def _task(n_outputs: int, classes: Sequence[str], path: Path) -> Task:
    expected = max(n_outputs, 2)
    if len(classes) != expected:
        raise CheckpointError(path, f"has {n_outputs} outputs; name {expected} classes, not {len(classes)}")
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
        raise CheckpointError(path, "is no dictionary of tensors; save the model's state_dict")
    return {re.sub(r"(^|\.)module\.", r"\1", name): tensor for name, tensor in loaded.items()}


def recognise(tensors: Mapping[str, Tensor], path: Path) -> Found:
    """Return which network the tensors are of, under our names.

    Raises
    ------
    CheckpointError
        If no known network has such tensors, or there are others besides.
    """
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(TRAINING_ONLY)}
    for marks, read in _LAYOUTS:
        if all(any(re.fullmatch(mark, name) for name in kept) for mark in marks):
            rest = dict(kept)
            found = read(_Taker(rest, path))
            if rest:
                raise CheckpointError(
                    path, f"looks like {found.tool}, but nothing explains {', '.join(sorted(rest)[:5])}"
                )
            return found
    raise CheckpointError(path, f"is of no network that is known here; it holds {', '.join(sorted(kept)[:5])}")


class _Taker:
    """Takes tensors out of a dictionary by their old names."""

    def __init__(self, rest: Tensors, path: Path) -> None:
        self.rest = rest
        self.path = path

    def take(self, name: str) -> Tensor:
        if name not in self.rest:
            raise CheckpointError(self.path, f"lacks the tensor {name}; it is only a part of a model")
        return self.rest.pop(name)

    def linear(self, old: str, new: str) -> Tensors:
        """Return weight and bias of a linear layer under its new name."""
        return {f"{new}.{part}": self.take(f"{old}.{part}") for part in ("weight", "bias")}

    def index(self, pattern: str) -> str:
        """Return the group of the first name that matches."""
        return next(match[1] for name in self.rest if (match := re.fullmatch(pattern, name)))


def _clam(taker: _Taker) -> Found:
    place = taker.index(r"attention_net\.(\d)\.attention_a\.0\.weight")
    tensors = taker.linear("attention_net.0", "embed.0") | _gated(taker, f"attention_net.{place}")
    single = "classifiers.weight" in taker.rest
    if single:
        tensors |= taker.linear("classifiers", "classifier")
    else:
        heads = [taker.linear(f"classifiers.{k}", "") for k in range(len(tensors["attention.w.bias"]))]
        tensors |= {f"classifier{part}": torch.cat([head[part] for head in heads]) for part in (".weight", ".bias")}
    options = {"width": len(tensors["embed.0.bias"]), "hidden": len(tensors["attention.V.bias"])}
    return Found("CLAM", Component(name="clam_sb" if single else "clam_mb", options=options), tensors)


def _gated(taker: _Taker, prefix: str) -> Tensors:
    return (
        taker.linear(f"{prefix}.attention_a.0", "attention.V")
        | taker.linear(f"{prefix}.attention_b.0", "attention.U")
        | taker.linear(f"{prefix}.attention_c", "attention.w")
    )


def _dsmil(taker: _Taker) -> Found:
    instance = "i_classifier.fc.0" if "i_classifier.fc.0.weight" in taker.rest else "i_classifier.fc"
    tensors = taker.linear(instance, "instance_classifier")
    nonlinear = "b_classifier.q.0.weight" in taker.rest
    if nonlinear:
        tensors |= taker.linear("b_classifier.q.0", "query.0") | taker.linear("b_classifier.q.2", "query.2")
    else:
        tensors |= taker.linear("b_classifier.q", "query.0")
    passing = "b_classifier.v.1.weight" in taker.rest
    if passing:
        tensors |= taker.linear("b_classifier.v.1", "value.1")
    tensors |= taker.linear("b_classifier.fcc", "classifier")
    tensors["classifier.weight"] = tensors["classifier.weight"].flatten(1)  # (K, K, D) convolution
    options = {"hidden": len(tensors["query.0.bias"]), "nonlinear": nonlinear, "passing_v": passing}
    return Found("DSMIL", Component(name="dsmil", options=options), tensors)


def _attention(tool: str, names: Mapping[str, str]) -> Callable[[_Taker], Found]:
    """Return a reader of gated attention pooling whose layers have these names."""

    def read(taker: _Taker) -> Found:
        tensors: Tensors = {}
        for old, new in names.items():
            tensors |= taker.linear(old, new)
        options = {
            "embed_dims": (len(tensors["embed.0.bias"]),),
            "hidden": len(tensors["attention.V.bias"]),
            "embed_activation": "gelu" if tool == "PackMIL" else "relu",
        }
        return Found(tool, Component(name="abmil", options=options), tensors)

    return read


_MILLAB = {
    "model.patch_embed.0": "embed.0",
    "model.global_attn.attention_a.0": "attention.V",
    "model.global_attn.attention_b.0": "attention.U",
    "model.global_attn.attention_c": "attention.w",
    "model.classifier": "classifier",
}
_HIPPO = {
    "encoder.0": "embed.0",
    "attention_weights.attention_V.0": "attention.V",
    "attention_weights.attention_U.0": "attention.U",
    "attention_weights.attention_weights": "attention.w",
    "head": "classifier",
}
_PACKMIL = {
    "feature.0": "embed.0",
    "attention_a.0": "attention.V",
    "attention_b.0": "attention.U",
    "attention_c": "attention.w",
    "classifier.0": "classifier",
}
_LAYOUTS: tuple[tuple[tuple[str, ...], Callable[[_Taker], Found]], ...] = (
    ((r"attention_net\.\d\.attention_a\.0\.weight",), _clam),
    ((r"b_classifier\..*",), _dsmil),
    ((r"model\.global_attn\.attention_a\.0\.weight",), _attention("MIL-Lab", _MILLAB)),
    ((r"attention_weights\.attention_V\.0\.weight",), _attention("HIPPO", _HIPPO)),
    ((r"attention_a\.0\.weight", r"feature\.0\.weight"), _attention("PackMIL", _PACKMIL)),
)
