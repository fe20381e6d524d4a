"""Which networks of other tools are known: by the names of their tensors, each in the file of its own method.

A method adds a `Layout` to `LAYOUTS`; `eosin.mil._convert` reads the file, finds the layout and writes the model
folder.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eosin.errors import CheckpointError
from eosin.mil._recipe import Component
from eosin.mil._registry import METHODS, Registry

__all__ = ["LAYOUTS", "Found", "Layout", "Taker"]

Tensors = dict[str, Tensor]


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
    reads_features : str
        The tensor whose columns are the features.
    """

    tool: str
    aggregator: Component
    tensors: Tensors
    reads_features: str = "embed.0.weight"

    @property
    def n_outputs(self) -> int | None:
        """Number of logits; None for a network without its last layer."""
        bias = self.tensors.get("classifier.bias")
        return None if bias is None else len(bias)

    @property
    def dim(self) -> int:
        """Width of the features it was trained on."""
        return self.tensors[self.reads_features].shape[1]


class Taker:
    """Takes tensors out of a dictionary by their old names; what is left in the end is not explained.

    Parameters
    ----------
    rest : dict of str to Tensor
    path : Path
        For messages.
    """

    def __init__(self, rest: Tensors, path: Path) -> None:
        self.rest = rest
        self.path = path

    def take(self, name: str) -> Tensor:
        """Return a tensor that must be there."""
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


@dataclass(frozen=True, eq=False)
class Layout:
    """A network of another tool.

    Attributes
    ----------
    marks : tuple of str
        Regular expressions, each of which a tensor's name must match as a whole.
    read : callable
        Takes every tensor of the network and says what they are.
    unused : tuple of str
        How names of tensors begin that served the training alone.
    """

    marks: tuple[str, ...]
    read: Callable[[Taker], Found]
    unused: tuple[str, ...] = ()

    def of(self, tensors: Tensors) -> Tensors | None:
        """Return the tensors of the network itself, or None when these are of another one."""
        kept = {name: value for name, value in tensors.items() if not name.startswith(self.unused)}
        return kept if all(any(re.fullmatch(mark, name) for name in kept) for mark in self.marks) else None


LAYOUTS: Registry[Layout] = Registry("checkpoint layout", METHODS)
