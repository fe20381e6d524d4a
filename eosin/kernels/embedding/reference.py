"""Definition of the embedding of instances: ``h = dropout(relu(W x + b))``, as in CLAM (Lu et al., 2021).

Dropout zeroes entries of h with probability p and scales the rest by 1 / (1 - p).
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from eosin.kernels._checks import accumulation_dtype
from eosin.kernels._dropout import EMBEDDING_BRANCH, dropped


def embed_instances(values: Tensor, weight: Tensor, bias: Tensor | None, *, dropout: float, seed: int) -> Tensor:
    """Embed every instance: (N, D) -> (N, E)."""
    dtype = accumulation_dtype(torch.promote_types(values.dtype, weight.dtype))
    bias = None if bias is None else bias.to(dtype)
    embedded = torch.relu(linear(values.to(dtype), weight.to(dtype), bias))
    return dropped(embedded, seed, dropout, branch=EMBEDDING_BRANCH)
