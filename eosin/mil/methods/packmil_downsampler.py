"""PackMIL's attention-driven downsampler: instances are weighed, transformed and, in training, reduced by groups.

Tang, Fang and others: Revisiting pre-processing and batching for multiple instance learning in computational
pathology, 2025, https://arxiv.org/abs/2509.20923; equation 4 of `packmil`, which trains it.

1. ``a = softmax(w tanh(V x))`` within the bag, ``x ← x (1 + a)``, ``h = gelu(W_1 x)``, ``W_2 h`` is what the other
   aggregator reads.
2. In training bags of more than m·r instances are padded with zeros to a multiple of r and shuffled, padding included;
   groups of r rows of h are reduced to one before W_2. Shorter bags and all bags at inference are not reduced.

Deviation from the authors' code: the random reduction picks one row per channel; the code's subset of slots drifts
across channels. The paper takes it for subtyping; the recipes here take the largest, as the paper does for survival.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from eosin.errors import ConfigError
from eosin.kernels import segment_softmax
from eosin.mil import attention
from eosin.mil.attention import recomputed
from eosin.mil.bags import PackedBags
from eosin.mil.layers import Attention
from eosin.mil.slots import AGGREGATORS, Aggregator, AggregatorOutput


@AGGREGATORS.register("downsampled")
class Downsampled(Aggregator):
    """Another aggregator behind the attention-driven downsampler.

    Parameters
    ----------
    in_dim, n_outputs
        Feature width D and logits K.
    host : str
        Name of the other aggregator.
    host_options : dict
        Its options.
    factor : int
        Instances r that become one, in training under `packmil`.
    reduce : {"max", "random"}
        Largest value, or that of a random row of the group, for each channel.
    hidden : int
        Width of the attention's hidden layer.
    """

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        *,
        host: str = "abmil",
        host_options: dict[str, object] | None = None,
        factor: int = 4,
        reduce: Literal["max", "random"] = "max",
        hidden: int = 128,
    ) -> None:
        if factor < 1:
            raise ConfigError(f"downsampled: factor {factor} must be at least 1")
        inner = AGGREGATORS.build(host, in_dim, n_outputs, options=host_options or {})
        super().__init__(in_dim, n_outputs, embed_dim=inner.embed_dim)
        self.attention = Attention(in_dim, hidden=hidden, gated=False)
        self.first = nn.Linear(in_dim, in_dim)
        self.second = nn.Linear(in_dim, in_dim)
        self.host = inner
        self.factor = factor
        self.reduce = reduce
        self.output_type = inner.output_type  # type: ignore[misc]
        self.order_dependent = inner.order_dependent  # type: ignore[misc]

    def forward(self, bags: PackedBags) -> AggregatorOutput:
        """Return the other aggregator's output for all instances."""
        output: AggregatorOutput = self.host(self.downsample(bags, longer_than=None))
        return output

    def downsample(self, bags: PackedBags, *, longer_than: int | None) -> PackedBags:
        """Return the bags it makes, those longer than a limit with groups of `factor` instances reduced to one.

        Parameters
        ----------
        bags : PackedBags
        longer_than : int or None
            The limit; None reduces no bag.
        """
        weights = segment_softmax(self.attention(bags.values), bags.cu_seqlens).to(bags.values.dtype)
        groups = [0] * bags.n_bags
        if longer_than is not None and self.factor > 1:
            groups = [-(-n // self.factor) if n > longer_than else 0 for n in bags.lengths]
        if not any(groups):
            return bags.with_values(self._in_pieces(self._hidden, bags.values, weights))
        length, group = torch.tensor(bags.lengths), torch.tensor(groups)
        values = self._pooled(bags, weights, _group_rows(length, group, self.factor))
        after = torch.where(group > 0, group, length)
        plain = torch.nonzero(torch.repeat_interleave(group == 0, length))[:, 0].to(values.device)
        if len(plain):
            whole = self._in_pieces(self._hidden, bags.values[plain], weights[plain])
            values = torch.cat([values, whole])[_back_in_order(group, after).to(values.device)]
        lengths = tuple(after.tolist())
        ends = functional.pad(after.cumsum(0), (1, 0)).to(bags.cu_seqlens)
        return PackedBags(values, ends, lengths, None, bags.ids)

    def _pooled(self, bags: PackedBags, weights: Tensor, slots: Tensor) -> Tensor:
        """Return one row per group of slots, (G, r) -> (G, D); features are put in order, which needs no gradient."""
        slots = slots.flatten().to(bags.values.device)
        rows = slots.clamp(max=bags.n_instances - 1)
        values = bags.values[rows]
        values[slots == bags.n_instances] = 0
        return self._in_pieces(self._group_of_hidden, values, weights[rows])

    def _in_pieces(self, function: Callable[[Tensor, Tensor], Tensor], values: Tensor, weights: Tensor) -> Tensor:
        """Return ``W_2 f(x, a)`` by pieces of whole groups; what f returns, if much, is computed again in backward."""

        def after(values: Tensor, weights: Tensor) -> Tensor:
            second: Tensor = self.second(function(values, weights))
            return second

        most = max(attention.CHECKPOINT_ROWS // self.factor, 1) * self.factor
        parts = zip(torch.split(values, most), torch.split(weights, most), strict=True)
        pieces = [recomputed(after, len(values), *part) for part in parts]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _hidden(self, values: Tensor, weights: Tensor) -> Tensor:
        """Return ``gelu(W_1 (x (1 + a)) + b_1)``; scaled after the product, a asks for no gradient of the features."""
        product = functional.linear(values, self.first.weight)
        scale, bias = (1 + weights).to(product.dtype), self.first.bias.to(product.dtype)
        return functional.gelu(torch.addcmul(bias, product, scale))

    def _group_of_hidden(self, values: Tensor, weights: Tensor) -> Tensor:
        groups = torch.unflatten(self._hidden(values, weights), 0, (-1, self.factor))  # (G, r, D)
        if self.reduce == "max":
            largest: Tensor = Largest.apply(groups)
            return largest
        choice = torch.randint(self.factor, (len(groups), 1, groups.shape[2]), device=groups.device)
        return groups.gather(1, choice)[:, 0]


class Largest(torch.autograd.Function):
    """The largest of the r rows of a group, channel by channel, the first of ties: (G, r, D) -> (G, D).

    torch's own keeps all rows for the backward pass and goes over them four times there.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, groups: Tensor) -> Tensor:
        """Return the largest."""
        largest = groups[:, 0].clone()
        place = torch.zeros_like(largest, dtype=torch.uint8)
        for number, rows in enumerate(groups.unbind(1)[1:], start=1):
            place = torch.maximum(place, (rows > largest).to(place.dtype) * number)
            torch.maximum(largest, rows, out=largest)
        ctx.save_for_backward(place)
        ctx.factor = groups.shape[1]  # type: ignore[attr-defined]
        return largest

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        """Give the gradient to the row that was largest."""
        (place,) = ctx.saved_tensors  # type: ignore[attr-defined]
        groups = gradient.new_empty(len(gradient), ctx.factor, gradient.shape[1])  # type: ignore[attr-defined]
        for number, rows in enumerate(groups.unbind(1)):
            torch.mul(gradient, place == number, out=rows)
        return groups


def _back_in_order(group: Tensor, after: Tensor) -> Tensor:
    """Return the rows that put groups, then instances of bags that have none, in the order of their bags."""
    bag = torch.repeat_interleave(torch.arange(len(group)), after)
    is_plain = (group == 0)[bag]
    n_groups = int(group.sum())
    return torch.where(is_plain, n_groups + is_plain.cumsum(0), (~is_plain).cumsum(0)) - 1


def _group_rows(length: Tensor, group: Tensor, r: int) -> Tensor:
    """Draw the rows of shuffled groups, padding included: (G, r) int64; the row after the last stands for padding."""
    size = group * r
    bag = torch.repeat_interleave(torch.arange(len(length)), size)
    place = torch.arange(len(bag)) - (size.cumsum(0) - size)[bag]
    rows = torch.where(place < length[bag], (length.cumsum(0) - length)[bag] + place, int(length.sum()))
    order = torch.rand(len(rows)).argsort()
    order = order[bag[order].argsort(stable=True)]
    return rows[order].view(-1, r)
