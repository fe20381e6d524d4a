"""Trained aggregators of other tools become model folders.

A foreign file is read with ``weights_only=True``, without fallback: it can hold tensors and nothing that runs. Which
network it is follows from the names and shapes of its tensors; a tensor that nothing here explains is an error, never
left out in silence, and so is a layer that is missing unless the caller wants it filled.
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
from eosin.mil.slots import Aggregator
from eosin.mil.tasks import Binary, Classification, Task

Tensors = dict[str, Tensor]
TRAINING_ONLY = ("instance_loss_fn.", "instance_classifiers.")
WRAPPERS = ("model.", "net.")


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
    def n_outputs(self) -> int | None:
        """Number of logits; None for a network without its last layer."""
        bias = self.tensors.get("classifier.bias")
        return None if bias is None else len(bias)

    @property
    def dim(self) -> int:
        """Width of the features it was trained on."""
        return self.tensors["embed.0.weight" if "embed.0.weight" in self.tensors else "query.0.weight"].shape[1]


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
        kept = {name: value for name, value in inside.items() if not name.startswith(TRAINING_ONLY)}
        for marks, read in _LAYOUTS:
            if len(inside) == len(tensors) and all(any(re.fullmatch(mark, name) for name in kept) for mark in marks):
                return _explained(kept, read, path)
    raise CheckpointError(path, f"is of no network that is known here; it holds {', '.join(sorted(tensors)[:5])}")


def _explained(tensors: Tensors, read: "Callable[[_Taker], Found]", path: Path) -> Found:
    found = read(_Taker(tensors, path))
    if tensors:
        raise CheckpointError(path, f"looks like {found.tool}, but nothing explains {', '.join(sorted(tensors)[:5])}")
    return found


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
        """Return weight and bias of a linear layer under its new name; nothing when the file has neither."""
        parts = [part for part in ("weight", "bias") if f"{old}.{part}" in self.rest]
        return {f"{new}.{part}": self.take(f"{old}.{part}") for part in (("weight", "bias") if parts else ())}

    def stack(self, old: str, new: str, count: int) -> Tensors:
        """Return `count` linear layers, one per branch and with its number for ``*`` in the name, as one."""
        layers = [self.linear(old.replace("*", str(branch)), "") for branch in range(count)]
        return {f"{new}{part}": torch.stack([layer[part] for layer in layers]) for part in layers[0]}

    def count(self, pattern: str) -> int:
        """Return how many names match."""
        return sum(re.fullmatch(pattern, name) is not None for name in self.rest)

    def index(self, pattern: str) -> str:
        """Return the group of the first name that matches."""
        return next(match[1] for name in self.rest if (match := re.fullmatch(pattern, name)))


def _clam(taker: _Taker) -> Found:
    tensors = taker.linear("attention_net.0", "embed.0")
    gated = taker.count(r"attention_net\.\d\.attention_a\.0\.weight") == 1
    place = taker.index(r"attention_net\.(\d)\.(?:attention_a\.)?0\.weight")
    tensors |= _gated(taker, f"attention_net.{place}") if gated else _ungated(taker, f"attention_net.{place}")
    single = taker.count(r"classifiers\.\d+\.weight") == 0
    if single:
        tensors |= taker.linear("classifiers", "classifier")
    else:
        heads = taker.stack("classifiers.*", "", len(tensors["attention.w.bias"]))
        tensors |= {f"classifier{part}": torch.cat(list(heads[part])) for part in (".weight", ".bias")}
    options = {"width": len(tensors["embed.0.bias"]), "hidden": len(tensors["attention.V.bias"]), "gated": gated}
    return Found("CLAM", Component(name="clam_sb" if single else "clam_mb", options=options), tensors)


def _gated(taker: _Taker, prefix: str) -> Tensors:
    return (
        taker.linear(f"{prefix}.attention_a.0", "attention.V")
        | taker.linear(f"{prefix}.attention_b.0", "attention.U")
        | taker.linear(f"{prefix}.attention_c", "attention.w")
    )


def _ungated(taker: _Taker, prefix: str) -> Tensors:
    last = 3 if f"{prefix}.3.weight" in taker.rest else 2  # with and without dropout between
    return taker.linear(f"{prefix}.0", "attention.V") | taker.linear(f"{prefix}.{last}", "attention.w")


def _acmil_common(taker: _Taker, branches: int) -> Tensors:
    tensors = {"embed.0.weight": taker.take("dimreduction.fc1.weight")} | taker.linear(
        "Slide_classifier.fc", "classifier"
    )
    return tensors | taker.stack("classifier.*.fc", "branch_classifier", branches)


def _acmil(taker: _Taker) -> Found:
    branches = taker.count(r"classifier\.\d+\.fc\.weight")
    tensors = _acmil_common(taker, branches)
    for old, new in (("attention_V.0", "V"), ("attention_U.0", "U"), ("attention_weights", "w")):
        tensors |= taker.linear(f"attention.{old}", f"attention.{new}")
    options = {
        "width": len(tensors["embed.0.weight"]), "hidden": len(tensors["attention.V.bias"]), "branches": branches,
    }  # fmt: skip
    return Found("ACMIL", Component(name="acmil", options=options), tensors)


def _acmil_mha(taker: _Taker) -> Found:
    queries = taker.take("q")[0]
    branches = len(queries)
    tensors = _acmil_common(taker, branches) | {"queries": queries}
    parts = {"q_proj": "query", "k_proj": "key", "v_proj": "read.value", "out_proj": "read.out"}
    for old, new in parts.items():
        tensors |= taker.stack(f"sub_attention.*.{old}", new, branches)
    norm = taker.stack("sub_attention.*.layer_norm", "", branches)
    tensors |= {"read.scale": norm[".weight"], "read.shift": norm[".bias"]}
    for old, new in (("v_proj", "value"), ("out_proj", "out")):
        tensors |= {
            name: value[None] for name, value in taker.linear(f"bag_attention.{old}", f"read_bag.{new}").items()
        }
    for part, new in (("weight", "scale"), ("bias", "shift")):
        tensors[f"read_bag.{new}"] = taker.take(f"bag_attention.layer_norm.{part}")[None]
    for unused in [name for name in taker.rest if re.match(r"bag_attention\.[qk]_proj\.", name)]:
        taker.take(unused)  # the bag takes its weights from the branches
    options = {"width": queries.shape[1], "branches": branches}
    return Found("ACMIL", Component(name="acmil_mha", options=options), tensors)


def _transmil(taker: _Taker) -> Found:
    tensors = taker.linear("_fc1.0", "embed.0") | taker.linear("norm", "norm") | taker.linear("_fc2", "classifier")
    tensors["cls_token"] = taker.take("cls_token")[0]
    for layer in ("layer1", "layer2"):
        tensors |= taker.linear(f"{layer}.norm", f"{layer}.norm")
        tensors |= taker.linear(f"{layer}.attn.to_out.0", f"{layer}.to_out")
        for part in ("to_qkv", "res_conv"):
            tensors[f"{layer}.{part}.weight"] = taker.take(f"{layer}.attn.{part}.weight")
    for old, new in (("proj", "conv7"), ("proj1", "conv5"), ("proj2", "conv3")):
        tensors |= taker.linear(f"pos_layer.{old}", f"ppeg.{new}")
    options = {"width": len(tensors["embed.0.bias"]), "heads": len(tensors["layer1.res_conv.weight"])}
    return Found("TransMIL", Component(name="transmil", options=options), tensors)


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
    tensors |= {  # a convolution (K, K, D)
        name: value.flatten(1) if value.ndim == 3 else value
        for name, value in taker.linear("b_classifier.fcc", "classifier").items()
    }
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
    ((r"attention_net\.0\.weight",), _clam),
    ((r"dimreduction\.fc1\.weight", r"sub_attention\.0\.q_proj\.weight"), _acmil_mha),
    ((r"dimreduction\.fc1\.weight", r"attention\.attention_V\.0\.weight"), _acmil),
    ((r"_fc1\.0\.weight", r"layer1\.attn\.to_qkv\.weight"), _transmil),
    ((r"b_classifier\..*",), _dsmil),
    ((r"model\.global_attn\.attention_a\.0\.weight",), _attention("MIL-Lab", _MILLAB)),
    ((r"attention_weights\.attention_V\.0\.weight",), _attention("HIPPO", _HIPPO)),
    ((r"attention_a\.0\.weight", r"feature\.0\.weight"), _attention("PackMIL", _PACKMIL)),
)
