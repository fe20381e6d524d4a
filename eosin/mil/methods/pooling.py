"""Pooling without attention: the bag is the mean, the maximum or the smooth maximum of its instances.

1. ``h = dropout(relu(W x + b))``; of the bag ``z_e = mean_n h_ne``, ``max_n h_ne`` or the smooth maximum ``(1/r) log
   mean_n exp(r h_ne)`` (Pinheiro and Collobert, CVPR 2015, https://arxiv.org/abs/1411.6228, equation 6), which is the
   mean as r goes to 0 and the maximum as r grows; ``logits = W_c z + b_c``.
2. With ``level="instance"`` the logits of the instances are pooled, ``logits = pool_n(W_c h_n + b_c)``: mi-Net of Wang
   et al., Revisiting multiple instance neural networks, 2018, https://arxiv.org/abs/1610.02501, of which equation 1 is
   MI-Net. With the maximum and one logit (`--task binary`) an instance can only ever add to the positive class,
   which is the standard assumption of multiple-instance learning.

Options of all three: `embed_dims`, `embed_activation` and `dropout` are the layers before the pooling, none pools the
features themselves; `level` says whether embedded instances or their logits are pooled.

An empty bag pools to 0. Deviation: the layers of these baselines differ from repository to repository; here they are
those of ABMIL.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from eosin.kernels import segment_logsumexp, segment_max, segment_mean, segment_pool, segment_topk_mask
from eosin.mil._closed_forms import MaxBag, PooledBag, SmoothMaxBag, linear_terms
from eosin.mil._layers import Activation, as_dtype, embedding
from eosin.mil._recipe import RECIPES, Component, Recipe
from eosin.mil.bags import PackedBags
from eosin.mil.layouts import LAYOUTS, Found, Layout, Taker
from eosin.mil.options import Count, Dropout, Positive
from eosin.mil.slots import AGGREGATORS, Aggregator, AggregatorOutput
from eosin.mil.subsets import as_array

Level = Literal["embedding", "instance"]


class Pooling(Aggregator):
    """Embed, pool, classify; a subclass says how instances become a bag.

    Parameters
    ----------
    in_dim, n_outputs
        Feature width D and logits K.
    embed_dims, embed_activation, dropout
        Layers before the pooling; none pools the features themselves.
    level : {"embedding", "instance"}
        What is pooled: embedded instances, or their logits.
    """

    output_type = AggregatorOutput

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        *,
        embed_dims: tuple[Count, ...] = (512,),
        embed_activation: Activation = "relu",
        dropout: Dropout = 0.25,
        level: Level = "embedding",
    ) -> None:
        super().__init__(in_dim, n_outputs, embed_dim=(in_dim, *embed_dims)[-1])
        self.level = level
        self.embed = embedding(in_dim, embed_dims, activation=embed_activation, dropout=dropout)
        self.classifier = nn.Linear(self.embed_dim, n_outputs)

    def forward(self, bags: PackedBags) -> AggregatorOutput:
        """Return logits and bag embeddings."""
        instances = self.embed(bags.values)
        bag = as_dtype(self.pool(instances, bags), self.classifier.weight)
        if self.level == "embedding":
            return AggregatorOutput(self.classifier(bag), bag)
        return AggregatorOutput(self.pool(self.classifier(instances), bags), bag)

    def pool(self, instances: Tensor, bags: PackedBags) -> Tensor:
        """Return the bags (B, E) of embedded instances (N, E)."""
        raise NotImplementedError

    def _rows(self, bags: PackedBags) -> tuple[Tensor, Tensor, Tensor]:
        """Return what is pooled (n, F), and the linear head (K, F) and bias (K,) that follow."""
        rows = self.embed(bags.values)
        if self.level == "instance":
            head = torch.eye(self.n_outputs, dtype=torch.float64)
            return self.classifier(rows).cpu(), head, head.new_zeros(self.n_outputs)
        head, bias = (part.detach().double().cpu() for part in (self.classifier.weight, self.classifier.bias))
        return rows.cpu(), head, bias


@AGGREGATORS.register("mean")
class MeanPooling(Pooling):
    """The mean of the embedded instances."""

    @override
    def pool(self, instances: Tensor, bags: PackedBags) -> Tensor:
        return segment_mean(instances, bags.cu_seqlens)

    @override
    def readout(self, bags: PackedBags, output: AggregatorOutput) -> PooledBag:
        # averaging is attention with equal scores
        terms = linear_terms("ne,ke->nk", self.embed(bags.values), self.classifier.weight)
        bias = as_array(self.classifier.bias)
        if self.level == "instance":
            terms, bias = terms + bias, np.zeros_like(bias)
        how = (
            "All numbers are exact: the model is linear after averaging its tiles, so every prediction follows from a "
            "mean without running it again"
        )
        return PooledBag(np.zeros((len(terms), 1)), terms[:, None], bias, how=how)


@AGGREGATORS.register("max")
class MaxPooling(Pooling):
    """The maximum of the embedded instances, feature by feature.

    Parameters
    ----------
    in_dim, n_outputs, embed_dims, embed_activation, dropout
        Feature width D, logits K, and the options of all poolings.
    level : {"embedding", "instance", "surest"}
        As of all poolings; ``surest`` takes all logits of the one instance that has the highest probability of any
        class, as CLAM's code does for more than two classes (`MIL_fc_mc`).
    """

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        *,
        embed_dims: tuple[Count, ...] = (512,),
        embed_activation: Activation = "relu",
        dropout: Dropout = 0.25,
        level: Literal["embedding", "instance", "surest"] = "embedding",
    ) -> None:
        self.surest = level == "surest"
        super().__init__(
            in_dim,
            n_outputs,
            embed_dims=embed_dims,
            embed_activation=embed_activation,
            dropout=dropout,
            level="instance" if level == "surest" else level,
        )

    @override
    def forward(self, bags: PackedBags) -> AggregatorOutput:
        if not self.surest:
            return super().forward(bags)
        instances = self.embed(bags.values)
        logits = self.classifier(instances)
        surest = logits.log_softmax(1).amax(1, keepdim=True)  # (N, 1)
        chosen = segment_topk_mask(surest, bags.cu_seqlens, 1).to(logits.dtype)
        rows = segment_pool(chosen, logits, bags.cu_seqlens)[:, 0].to(logits.dtype)
        return AggregatorOutput(rows, as_dtype(self.pool(instances, bags), self.classifier.weight))

    @override
    def pool(self, instances: Tensor, bags: PackedBags) -> Tensor:
        return segment_max(instances, bags.cu_seqlens)

    @override
    def readout(self, bags: PackedBags, output: AggregatorOutput) -> MaxBag | None:
        return None if self.surest else MaxBag(*self._rows(bags))


@AGGREGATORS.register("lse")
class LsePooling(Pooling):
    """The smooth maximum of the embedded instances, feature by feature.

    Parameters
    ----------
    in_dim, n_outputs, embed_dims, embed_activation, dropout, level
        Feature width D, logits K, and the options of all poolings.
    sharpness : float
        r of the smooth maximum.
    """

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        *,
        sharpness: Positive = 5.0,
        embed_dims: tuple[Count, ...] = (512,),
        embed_activation: Activation = "relu",
        dropout: Dropout = 0.25,
        level: Level = "embedding",
    ) -> None:
        super().__init__(
            in_dim,
            n_outputs,
            embed_dims=embed_dims,
            embed_activation=embed_activation,
            dropout=dropout,
            level=level,
        )
        self.sharpness = sharpness

    @override
    def pool(self, instances: Tensor, bags: PackedBags) -> Tensor:
        total = segment_logsumexp(instances * self.sharpness, bags.cu_seqlens)  # (B, E), -inf for an empty bag
        lengths = bags.cu_seqlens.diff()[:, None]
        return torch.where(lengths > 0, total - lengths.clamp(min=1).to(total.dtype).log(), 0.0) / self.sharpness

    @override
    def readout(self, bags: PackedBags, output: AggregatorOutput) -> SmoothMaxBag:
        return SmoothMaxBag(*self._rows(bags), self.sharpness)


def _read_fc(taker: Taker) -> Found:
    """Read CLAM's MIL_fc, of whose two logits only the difference counts, and MIL_fc_mc."""
    tensors, widths = taker.embedding("fc")
    several = taker.has(r"classifiers\..*")
    tensors |= taker.linear(
        "classifiers" if several else "classifier", "classifier", None if several else 2, widths[-1]
    )
    if not several:
        tensors |= {name: tensor[1:] - tensor[:1] for name, tensor in tensors.items() if name.startswith("classifier.")}
    options = {"embed_dims": tuple(widths), "level": "surest" if several else "instance"}
    return Found("CLAM's MIL_fc", Component(name="max", options=options), tensors, outputs="softmax")


def _read_head(taker: Taker) -> Found:
    """Read MeanMIL or MaxMIL of MHIM-MIL, PackMIL and MambaMIL: the same tensors, pooled in another way."""
    pooling = taker.ask("pooling", "mean", "max")
    activation = taker.ask("embed_activation", "relu", "gelu", "none")
    first, *later = taker.numbers(r"head\.(\d+)\.weight")
    tensors = taker.linear(f"head.{first}", "embed.0")
    width = len(tensors["embed.0.weight"])
    for last in later:
        tensors |= taker.linear(f"head.{last}", "classifier", None, width)
    options = {"embed_dims": (width,), "embed_activation": activation, "level": "instance"}
    return Found("MeanMIL or MaxMIL", Component(name=pooling, options=options), tensors)


def _read_linear(taker: Taker) -> Found:
    """Read STAMP's linear layer on the mean of the tiles; a single layer does not say what stands before it."""
    pooling = taker.ask("pooling", "mean", "max")
    tensors = taker.linear("fc", "classifier")
    options = {"embed_dims": (), "level": "embedding"}
    return Found(
        "a linear layer", Component(name=pooling, options=options), tensors, reads_features="classifier.weight"
    )


LAYOUTS.add("STAMP Linear", Layout((r"fc\.weight", r"fc\.bias"), _read_linear))
LAYOUTS.add("MeanMIL", Layout((r"head\.0\.weight", r"head\.[23]\.weight"), _read_head))
LAYOUTS.add("CLAM MIL_fc", Layout((r"fc\.0\.weight", r"classifiers?\..*"), _read_fc))

for _name in ("mean", "max", "lse"):
    RECIPES.add(_name, Recipe(aggregator=Component(name=_name)))
