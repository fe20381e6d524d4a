"""A model with the same weights in another order: what a method finds in models that have learnt nothing."""

import copy

import torch

from eosin.mil.slots import Aggregator


@torch.no_grad()
def shuffle_weights(model: Aggregator, seed: int) -> Aggregator:
    """Return a copy whose weights are shuffled within each parameter; buffers, such as those of scaling, stay.

    Sizes of weights are kept, so that predictions are on the same scale, and everything that was learnt is lost. Of a
    model whose weights are random, shuffled copies cannot be told from it: a figure of the model that is larger than
    those of R copies has a p value of 1 / (R + 1).

    Parameters
    ----------
    model : Aggregator
    seed : int
    """
    shuffled = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in shuffled.parameters():
        order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
        parameter.copy_(parameter.flatten()[order].reshape(parameter.shape))
    return shuffled
