"""Which tiles a model's prediction rests on: one number per tile."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eosin.errors import ConfigError
from eosin.features.bag import FeatureBag
from eosin.heatmaps.heatmap import Heatmap
from eosin.heatmaps.pooled import Target
from eosin.mil.bags import PackedBags
from eosin.mil.methods.acmil import AcmilOutput
from eosin.mil.methods.clam import ClassAttentionOutput
from eosin.mil.methods.dsmil import DsmilOutput
from eosin.mil.slots import Aggregator, AggregatorOutput, AttentionOutput
from eosin.wsi.grid import TileGrid


def attention_weights(model: Aggregator, bag: FeatureBag) -> NDArray[np.float64]:
    """Return the weight of each tile in each branch.

    Parameters
    ----------
    model : Aggregator
        One whose output is an `AttentionOutput`.
    bag : FeatureBag

    Returns
    -------
    (n, H) float64
        Softmax of the scores over the tiles; every column sums to 1.

    Raises
    ------
    ConfigError
        If the model does not weigh instances.
    """
    output = _attention_output(model, bag)
    return np.asarray(torch.softmax(output.scores.double(), dim=0).cpu().numpy())


def attention_map(model: Aggregator, bag: FeatureBag, *, branch: int | None = None) -> Heatmap:
    """Return the attention of one branch, or its mean over the branches.

    The values are weights: they sum to 1 over the slide. `Heatmap.percentile` and `Heatmap.relative` are the two
    scalings for showing them. Attention says what the model looked at and not in which direction it counted.

    Parameters
    ----------
    model : Aggregator
        One whose output is an `AttentionOutput`.
    bag : FeatureBag
        With a tile grid.
    branch : int, optional
        Branch of a model with several; the mean of all weights unless given.

    Raises
    ------
    ConfigError
        If the model does not weigh instances, the branch does not exist or the features have no places.
    """
    weights = attention_weights(model, bag)
    branches = weights.shape[1]
    if branch is None:
        return Heatmap(weights.mean(axis=1), require_grid(bag), "attention", "attention")
    if not 0 <= branch < branches:
        raise ConfigError(f"branch {branch} was asked for; the model has branches 0 to {branches - 1}")
    return Heatmap(weights[:, branch], require_grid(bag), f"attention_{branch}", f"attention of branch {branch}")


def gradient_map(
    model: Aggregator, bag: FeatureBag, target: Target, *, of: str, single_logit_is_second_class: bool = False
) -> Heatmap:
    """Return gradient times input of any model: the first-order share of each tile in the target.

    ``x_i · ∂target/∂x_i``, summed over the features. For a model that is linear in its features the values sum to the
    target without its constant; elsewhere they are a local approximation, unlike the effects of removing tiles.

    Parameters
    ----------
    model : Aggregator
    bag : FeatureBag
        With a tile grid.
    target : Target
    of : str
        Name of the class, for the label.
    single_logit_is_second_class : bool
        Put a logit 0 before the model's only one, so that the target's index is that of a class.
    """
    pack = pack_bag(model, bag)
    values = pack.values.requires_grad_()
    with torch.enable_grad(), in_eval_mode(model):
        logits = model(pack.with_values(values)).logits[0]
        if single_logit_is_second_class:
            logits = torch.cat([torch.zeros_like(logits), logits])
        (gradient,) = torch.autograd.grad(target.of_tensor(logits), values)
    shares = (values.detach() * gradient).sum(1).double().cpu().numpy()
    return Heatmap(shares, require_grid(bag), f"gradient_{of}", f"gradient times input of {of}", signed=True)


@contextmanager
def in_eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Switch a model to evaluation for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def attribution_maps(model: Aggregator, bag: FeatureBag, *, classes: Sequence[str] = ()) -> list[Heatmap]:
    """Return every map that one forward pass of the model gives, the mean attention first.

    Parameters
    ----------
    model : Aggregator
        One whose output is an `AttentionOutput`.
    bag : FeatureBag
        With a tile grid.
    classes : sequence of str
        Names of the model's outputs, for the labels of class-specific maps.

    Returns
    -------
    list of Heatmap
        Mean attention; each branch where there are several, by class where there is one branch per class;
        instance logits by class where the method has them.
    """
    grid, output = require_grid(bag), _attention_output(model, bag)
    return _attention_maps(output, grid, classes) + _instance_maps(output, grid, classes)


def output_maps(
    model: Aggregator, bag: FeatureBag, *, classes: Sequence[str], of: Literal["attention", "instance_logit"]
) -> list[Heatmap]:
    """Return the part of `attribution_maps` that is asked for; of instance logits for models without attention, too.

    Returns
    -------
    list of Heatmap
        Empty when the method has no instance logits.
    """
    if of == "attention":
        return _attention_maps(_attention_output(model, bag), require_grid(bag), classes)
    with torch.no_grad(), in_eval_mode(model):
        return _instance_maps(model(pack_bag(model, bag)), require_grid(bag), classes)


def _attention_maps(output: AttentionOutput, grid: TileGrid, classes: Sequence[str]) -> list[Heatmap]:
    weights = torch.softmax(output.scores.double(), dim=0)
    mean = weights.mean(1).cpu().numpy()
    if isinstance(output, AcmilOutput):  # heads of a branch speak with one voice
        weights = torch.unflatten(weights, 1, (output.branch_logits.shape[1], -1)).mean(2)
    maps = [Heatmap(mean, grid, "attention", "attention")]
    if weights.shape[1] > 1:
        names = _branch_names(output, weights.shape[1], classes)
        maps += [
            Heatmap(weights[:, branch].cpu().numpy(), grid, f"attention_{name}", f"attention of {name}")
            for branch, name in enumerate(names)
        ]
    return maps


def _instance_maps(output: AggregatorOutput, grid: TileGrid, classes: Sequence[str]) -> list[Heatmap]:
    instance_logits: Tensor | None = getattr(output, "instance_logits", None)
    if instance_logits is None:
        return []
    logits = instance_logits.detach().double().cpu().numpy()
    names = class_names(logits.shape[1], classes)
    return [
        Heatmap(logits[:, k], grid, f"instance_logit_{name}", f"tile's own logit of {name}", signed=True)
        for k, name in enumerate(names)
    ]


def class_names(n_outputs: int, classes: Sequence[str]) -> list[str]:
    """Return one name per logit: a single logit of two classes speaks for the second."""
    if len(classes) == n_outputs:
        return list(classes)
    if n_outputs == 1 and len(classes) == 2:
        return [classes[1]]
    return [f"output {k}" for k in range(n_outputs)]


def _branch_names(output: AttentionOutput, branches: int, classes: Sequence[str]) -> list[str]:
    if isinstance(output, ClassAttentionOutput | DsmilOutput):
        return class_names(branches, classes)
    return [f"branch {branch}" for branch in range(branches)]


def require_grid(bag: FeatureBag) -> TileGrid:
    """Return the bag's grid, or raise `ConfigError` when its features have no places on a slide."""
    if bag.grid is None:
        raise ConfigError(f"{bag.slide_id}: the features have no tile coordinates, so there is no map to draw")
    return bag.grid


def pack_bag(model: torch.nn.Module, bag: FeatureBag) -> PackedBags:
    """Return the slide's features as a pack of one bag, on the model's device and in its precision."""
    parameter = next(model.parameters(), torch.empty(0))
    # float16 features and 64-bit models both occur; a copy also frees the tensor from the file's memory map, and torch
    # widens it several times faster than numpy
    values = torch.from_numpy(np.array(bag.features)).to(parameter.device, parameter.dtype)
    coords = None if bag.grid is None else [torch.from_numpy(bag.grid.origins_px0)]
    return PackedBags.pack([values], coords_px0=coords, ids=(bag.slide_id,))


@torch.no_grad()
def _attention_output(model: Aggregator, bag: FeatureBag) -> AttentionOutput:
    if not issubclass(model.output_type, AttentionOutput):
        raise ConfigError(f"{type(model).__name__} does not weigh instances, so it has no attention to show")
    with in_eval_mode(model):
        output = model(pack_bag(model, bag))
    if not isinstance(output, AttentionOutput):
        raise TypeError(f"{type(model).__name__} returned {type(output).__name__}, not the output type it declares")
    return output
