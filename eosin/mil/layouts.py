"""Which networks of other tools are known: by the names of their tensors, each in the file of its own method.

A method adds a `Layout` to `LAYOUTS`; `eosin.mil._convert` reads the file, finds the layout and writes the model
folder. A reader takes every tensor with a `Taker`, which checks shapes, and asks it for what tensors cannot say.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from eosin.errors import CheckpointError
from eosin.mil._recipe import Component
from eosin.mil._registry import METHODS, Registry

__all__ = ["LAYOUTS", "Found", "Layout", "Taker"]

Tensors = dict[str, Tensor]
BATCH_NORM_EPS = 1e-5  # torch's own, which no public model here changes

Meaning = Literal["softmax", "sigmoid"]


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
    outputs : {"softmax", "sigmoid"} or None
        What the authors' own class makes of several outputs; None where that is left to whoever trains it.
    """

    tool: str
    aggregator: Component
    tensors: Tensors
    reads_features: str = "embed.0.weight"
    outputs: Meaning | None = None

    @property
    def n_outputs(self) -> int | None:
        """Number of logits; None for a network without its last layer."""
        last = re.compile(r"(.*\.)?classifier(\.\d+)?\.bias")
        found = [name for name in self.tensors if last.fullmatch(name)]
        return len(self.tensors[max(found)]) if found else None

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
    stated : mapping of str to str
        What the user says of options that tensors do not show.
    """

    def __init__(self, rest: Tensors, path: Path, stated: Mapping[str, str] | None = None) -> None:
        self.rest = rest
        self.path = path
        self.stated = dict(stated or {})
        self.questions: dict[str, Sequence[str]] = {}

    def take(self, name: str, *shape: int | None) -> Tensor:
        """Return a tensor that must be there, of this shape; None stands for any size."""
        if name not in self.rest:
            raise CheckpointError(self.path, f"lacks the tensor {name}; it is only a part of a model")
        tensor = self.rest.pop(name)
        if len(tensor.shape) != len(shape) or any(
            size == 0 or size != (size if wanted is None else wanted)
            for size, wanted in zip(tensor.shape, shape, strict=True)
        ):
            wanted = " x ".join("any" if size is None else str(size) for size in shape)
            raise CheckpointError(self.path, f"holds {name} of shape {_by(tensor.shape)}, where {wanted} belongs")
        return tensor

    def has(self, pattern: str) -> bool:
        """Return whether a name matches."""
        return any(re.fullmatch(pattern, name) for name in self.rest)

    def linear(
        self, old: str, new: str, outputs: int | None = None, inputs: int | None = None, *, bias: bool = True
    ) -> Tensors:
        """Return weight and bias of a linear layer, of these sizes where they are known, under its new name."""
        weight = self.take(f"{old}.weight", outputs, inputs)
        tensors = {f"{new}.weight": weight}
        return tensors | ({f"{new}.bias": self.take(f"{old}.bias", len(weight))} if bias else {})

    def embedding(self, old: str, *, bias: bool = True, dropout: str = "dropout") -> tuple[Tensors, list[int]]:
        """Return the linear layers of a sequence as our `embed`, and the width of each.

        Our own layers are counted with those of dropout, which are there when the user states the option.
        """
        step = 2 if self.stated.get(dropout, "0") in ("0", "0.0") else 3
        tensors: Tensors = {}
        widths: list[int] = []
        for place, number in enumerate(self.numbers(re.escape(old) + r"\.(\d+)\.weight")):
            layer = self.linear(
                f"{old}.{number}", f"embed.{step * place}", None, widths[-1] if widths else None, bias=bias
            )
            tensors |= layer
            widths.append(len(layer[f"embed.{step * place}.weight"]))
        if not widths:
            raise CheckpointError(self.path, f"lacks the layers {old}; it is only a part of a model")
        return tensors, widths

    def attention(self, v: str, u: str | None, w: str, width: int, *, heads: int = 1, bias: bool = True) -> Tensors:
        """Return the layers of `eosin.mil._layers.Attention` on instances of this width."""
        tensors = self.linear(v, "attention.V", None, width, bias=bias)
        hidden = len(tensors["attention.V.weight"])
        tensors |= {} if u is None else self.linear(u, "attention.U", hidden, width, bias=bias)
        return tensors | self.linear(w, "attention.w", heads, hidden, bias=bias)

    def gate(self, before: str) -> tuple[str, str | None, str]:
        """Return the names of V, U and w as CLAM has them, below this prefix; U is None where there is no gate.

        Without a gate they are the first and last layer of a sequence, whose places depend on dropout between them.
        """
        if self.has(re.escape(before) + r"attention_a\.0\.weight"):
            return f"{before}attention_a.0", f"{before}attention_b.0", f"{before}attention_c"
        places = self.numbers(re.escape(before) + r"(\d+)\.weight")
        if len(places) != 2:
            raise CheckpointError(self.path, f"lacks the layers of the attention {before.rstrip('.')}")
        return f"{before}{places[0]}", None, f"{before}{places[1]}"

    def head(self, old: str, new: str, inputs: int, outputs: int | None = None) -> Tensors:
        """Return a last layer, which published networks may lack; nothing when the file has none of it."""
        return self.linear(old, new, outputs, inputs) if self.has(re.escape(old) + r"\.(weight|bias)") else {}

    def norm(self, old: str, new: str, width: int) -> Tensors:
        """Return scale and shift of a layer norm."""
        return {f"{new}.{part}": self.take(f"{old}.{part}", width) for part in ("weight", "bias")}

    def batch_norm(self, old: str) -> tuple[Tensor, Tensor] | None:
        """Return the scale and the shift (float64) that a batch norm is at inference; None where there is none."""
        if not self.has(re.escape(old) + r"\.running_mean"):
            return None
        mean = self.take(f"{old}.running_mean", None).double()
        spread, weight, bias = (
            self.take(f"{old}.{part}", len(mean)).double() for part in ("running_var", "weight", "bias")
        )
        if (spread < 0).any():
            raise CheckpointError(self.path, f"is damaged: {old}.running_var holds negative numbers")
        scale = weight / (spread + BATCH_NORM_EPS).sqrt()
        return scale, bias - mean * scale

    def stack(self, old: str, new: str, count: int, outputs: int | None = None, inputs: int | None = None) -> Tensors:
        """Return `count` linear layers, one per branch and with its number for ``*`` in the name, as one."""
        if not count:
            raise CheckpointError(self.path, f"lacks the layers {old}; it is only a part of a model")
        layers = []
        for branch in range(count):
            layer = self.linear(old.replace("*", str(branch)), "", outputs, inputs)
            outputs, inputs = layer[".weight"].shape
            layers.append(layer)
        return {f"{new}{part}": torch.stack([layer[part] for layer in layers]) for part in (".weight", ".bias")}

    def count(self, pattern: str) -> int:
        """Return how many names match."""
        return sum(re.fullmatch(pattern, name) is not None for name in self.rest)

    def index(self, pattern: str) -> str:
        """Return the group of the first name that matches."""
        found = next((match[1] for name in self.rest if (match := re.fullmatch(pattern, name))), None)
        if found is None:
            raise CheckpointError(self.path, f"lacks a tensor {pattern.replace(chr(92), '')}; it is a part of a model")
        return found

    def numbers(self, pattern: str) -> list[int]:
        """Return the numbers that the first groups of matching names hold, in their order."""
        return sorted({int(match[1]) for name in self.rest if (match := re.fullmatch(pattern, name))})

    def ask(self, option: str, *choices: str) -> str:
        """Return what the user says of an option that tensors do not show; without a word of it a question is left.

        Parameters
        ----------
        option : str
            Of the aggregator, as `eosin methods` names it.
        *choices : str
            Without any, a whole number.
        """
        said = self.stated.pop(option, None)
        if said is None:
            self.questions[option] = choices or ("N",)
            return choices[0] if choices else "1"
        if (choices and said not in choices) or not (choices or (said.isdecimal() and int(said) > 0)):
            fitting = " or ".join(choices) if choices else "a whole number"
            raise CheckpointError(self.path, f"--option {option}={said} does not fit; {option} is {fitting}")
        return said


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
        return kept if all(any(re.fullmatch(mark, name) for name in tensors) for mark in self.marks) else None


def folded(tensors: Tensors, layer: str, norm: tuple[Tensor, Tensor]) -> Tensors:
    """Return a linear layer that does what a batch norm and that layer behind it do at inference."""
    scale, shift = norm
    weight = tensors[f"{layer}.weight"].double()
    bias = weight @ shift + tensors.get(f"{layer}.bias", torch.zeros(len(weight)))
    return {f"{layer}.weight": (weight * scale).float(), f"{layer}.bias": bias.float()}


def without_merging(taker: Taker) -> None:
    """Drop the network that merges instances while MHIM-MIL trains; refuse one that reads its tokens at inference.

    With `merge_test` the authors' model also reads the merged tokens, which are of no tile: no map could show them.
    """
    if taker.ask("merge_test", "false", "true") == "true":
        raise CheckpointError(taker.path, "reads merged tokens at inference (merge_test), which no model of eosin does")
    for name in [name for name in taker.rest if name.startswith("merge.")]:
        del taker.rest[name]


def block_diagonal(weights: Sequence[Tensor]) -> Tensor:
    """Return the layer that applies each of these to its own part of the input, and lays the results side by side."""
    layer: Tensor = torch.block_diag(*weights)  # type: ignore[no-untyped-call]
    return layer


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a single number"


LAYOUTS: Registry[Layout] = Registry("checkpoint layout", METHODS)
