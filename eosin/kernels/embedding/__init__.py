"""Embedding of instances: a linear layer, relu and dropout in one pass over the rows."""

import torch
from torch import Tensor

from eosin.kernels._checks import check_floating, check_unit_interval
from eosin.kernels._dispatch import choose
from eosin.kernels._dropout import draw_seed
from eosin.kernels._library import Operator
from eosin.kernels._products import product_dtype
from eosin.kernels.embedding import reference, torch_impl
from eosin.kernels.embedding.torch_impl import Embedding


def embed_instances(
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Embed every instance: ``h = dropout(relu(W x + b))``.

    Parameters
    ----------
    values : (N, D) floating
        Instances.
    weight, bias : (E, D), (E,) or None
        The linear layer.
    dropout : float, optional
        Chance of an entry of h to be dropped; 0 outside training.
    generator : torch.Generator, optional
        Draws the seed of the dropout mask, which is a hash of seed, row and column, equal on all devices.

    Returns
    -------
    (N, E)
        In the type of the products, which is autocast's where it is on. Only h is kept for the backward pass.
        Differentiable in all tensors. On a GPU plain torch computes the same: its library's product is hard to better.

    Raises
    ------
    TypeError, ValueError
        Wrong type, shape or device; the message names the argument.
    """
    check_floating("values", values, ("N", "D"))
    check_floating("weight", weight, ("E", values.shape[1]), values)
    if bias is not None:
        check_floating("bias", bias, (weight.shape[0],), values)
    check_unit_interval("dropout", dropout)
    seed = draw_seed(generator) if dropout else 0
    backend = "torch" if choose(values) == "torch" else "reference"
    embedded: Tensor = _embed(values, weight, bias, dropout, seed, product_dtype(values, weight), backend=backend)
    return embedded


def _prepared(
    values: Tensor, weight: Tensor, bias: Tensor | None, dropout: float, seed: int, dtype: torch.dtype
) -> tuple[Tensor, Embedding]:
    return values, Embedding.make(weight, bias, dropout=dropout, seed=seed, dtype=dtype)


_embed = Operator(
    "embed_instances",
    "(Tensor values, Tensor weight, Tensor? bias, float dropout, int seed, ScalarType product_dtype) -> Tensor",
    reference=reference.embed_instances,
    differentiable=3,
    prepare=_prepared,
    empty=lambda values, embedding: values.new_empty(
        (values.shape[0], embedding.weight.shape[0]), dtype=embedding.dtype
    ),
    reads_results=True,
    torch=(torch_impl.forward, torch_impl.backward),
)
