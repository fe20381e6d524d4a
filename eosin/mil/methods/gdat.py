"""GDAT: attention through grouped tokens, the aggregator of CoMEL (`eosin/mil/methods/comel.py`).

Lee, Lee, Kim, Kim: Continual multiple instance learning with enhanced localization for histopathological whole slide
image analysis, ICCV 2025, https://arxiv.org/abs/2507.02395.

1. GDAT (grouped double attention). Padded with zeros to a square of H × H tokens, H = ⌈√n⌉ raised to a multiple of
   the region size R (an even H and one region for n < 10), with group tokens g that are means of H²/R² or R² tokens:
   ``U = softmax(q_g kᵀ / √d) v``, ``out = W (softmax(q k_gᵀ / √d) U + 0.1 v) + b``, one q, k, v projection for both.
   The padding says where tokens lie and takes no part in means and softmaxes (`padding="masked"`).
2. Aggregator: embedding, blocks ``x ← x + GDAT(LN(x))``, ``x ← x + MLP(LN(x))``, ungated attention pooling without
   biases, ``logits = W z + b``.

Deviations from the authors' code. There the zeros of the padding are tokens like all others, which dilutes U and the
group tokens, the more the smaller the bag: `padding="official"`. Groups are, as in the code, tokens at equal offsets of
all regions, a strided sample of the list; the paper describes means within regions: `grouping="spatial"`. Parameters
that never matter (a scalar bias per head, an unused projection) are left out, and so is the dropout of 0.1 that
follows the attention's projection there: each block drops as much in its MLP.

Memory: from `CHECKPOINT_ROWS` instances on, heads are taken a few at a time, and the MLP some rows at a time; between
the passes a block keeps its tokens and what they read, and computes the rest again.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from eosin.errors import ConfigError
from eosin.mil import _attention as attention
from eosin.mil._attention import bag_attention, by_rows, instance_attention, mixed_weights, normed_linear, recomputed
from eosin.mil._layers import Attention, as_dtype, embedding, initialise, pooling_gradient
from eosin.mil._rollout import Trace, by_head, gather_row, inputs_of, project_third
from eosin.mil.bags import PackedBags
from eosin.mil.options import Count, Dropout, Positive
from eosin.mil.slots import AGGREGATORS, Aggregator, AttentionOutput
from eosin.mil.subsets import Floats, Value, as_array, slope_of

OWN_SHARE = 0.1  # of a token's own value in equation 1
HEADS_AT_ONCE = 2  # heads of a large pack that are computed at one time

Grouping = Literal["official", "spatial"]
Padding = Literal["masked", "official"]


@AGGREGATORS.register("gdat")
class Gdat(Aggregator):
    """Blocks of grouped double attention and attention pooling, equations 1 and 2.

    Parameters
    ----------
    in_dim, n_outputs
        Feature width D and logits K.
    width : int
        Width E of an instance.
    layers, heads : int
        Blocks, and their attention heads; heads divide the width.
    region_size : int
        R.
    grouping : {"official", "spatial"}
        Group tokens across regions at equal offsets, or of each region.
    padding : {"masked", "official"}
        Whether the zeros that fill up the square take part.
    qkv_bias : bool
    expansion : int
        Width of the MLP per width.
    hidden : int
        Width of the pooling's hidden layer.
    dropout, block_dropout : float
        After the embedding, and inside the MLPs.
    norm_eps : float
        Of the layer norms.
    """

    output_type = AttentionOutput
    order_dependent = True

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        *,
        width: Count = 512,
        layers: Count = 2,
        heads: Count = 8,
        region_size: Count = 16,
        grouping: Grouping = "official",
        padding: Padding = "masked",
        qkv_bias: bool = False,
        expansion: Count = 4,
        hidden: Count = 256,
        dropout: Dropout = 0.25,
        block_dropout: Dropout = 0.1,
        norm_eps: Positive = 1e-6,
    ) -> None:
        if width % heads:
            raise ConfigError(f"gdat: {heads} heads do not divide the width {width}; choose another width")
        super().__init__(in_dim, n_outputs, embed_dim=width)
        self.region_size = region_size
        self.grouping = grouping
        self.padding = padding
        self.embed = embedding(in_dim, (width,), dropout=dropout)
        self.blocks = nn.ModuleList(
            GdatBlock(
                width, heads=heads, qkv_bias=qkv_bias, expansion=expansion, dropout=block_dropout, norm_eps=norm_eps
            )
            for _ in range(layers)
        )
        self.attention = Attention(width, hidden=hidden, gated=False, bias=False)
        self.classifier = nn.Linear(width, n_outputs)
        initialise(self, "xavier")

    def forward(self, bags: PackedBags) -> AttentionOutput:
        """Return logits, bag embeddings, scores and the instances after the last block."""
        return self.aggregate(bags.with_values(by_rows(self.embed, bags.values)))

    def aggregate(self, bags: PackedBags) -> AttentionOutput:
        """Return the output for bags of embedded instances."""
        device = bags.values.device
        groups = Groups.of(bags.lengths, self.region_size, self.grouping, device, padding=self.padding)
        tokens = bags.values
        for block in self.blocks:
            tokens = block(tokens, groups)
        pool = self.attention.pool(tokens, bags)
        bag = as_dtype(pool.pooled[:, 0], self.classifier.weight)
        return AttentionOutput(self.classifier(bag), bag, pool.scores, tokens)

    @override
    @torch.no_grad()
    def trace(self, bags: PackedBags) -> Trace:
        """Follow the pooling's weights through each block as two factors, tiles to groups and back.

        The tenth of its own value that every tile adds counts as the tile itself; what falls on padding is left out.
        """
        blocks = [block for block in self.blocks if isinstance(block, GdatBlock)]
        with inputs_of([block.norm1 for block in blocks]) as seen:
            output = self(bags)
        groups = Groups.of(bags.lengths, self.region_size, self.grouping, bags.values.device, padding=self.padding)
        layers = [partial(_through_groups, block, calls[0], groups) for block, calls in zip(blocks, seen, strict=True)]
        return Trace(as_array(output.scores[:, 0].double().softmax(0)), layers, lambda row: row)

    @override
    def weight_gradient(self, bags: PackedBags, value: Value) -> Floats:
        with torch.no_grad():
            output = self(bags)
        return pooling_gradient(output.scores, output.instances, self.classifier, slope_of(output.logits[0], value))


@torch.no_grad()
def _through_groups(block: "GdatBlock", tokens: Tensor, groups: "Groups", row: Floats) -> Floats:
    """Return the row after a block: tiles to groups, and these to tiles, plus the tiles' own share."""
    attn = block.attn
    normed = block.norm1(tokens)
    padded = _padded(normed, groups)
    means = torch.segment_reduce(padded, "mean", lengths=groups.sizes, axis=0)[groups.token]  # (1, m, E)
    projections = [partial(project_third, attn.qkv, third) for third in range(2)]
    keys = by_head(projections[1](means[0]), attn.heads)
    shares = gather_row(row, normed, projections[0], keys, scale=attn.scale, counts=groups.present[0])
    query, key = (
        by_head(project(part), attn.heads) for project, part in zip(projections, (means, padded), strict=True)
    )
    mix = shares.mean(1, keepdim=True).expand(-1, attn.heads)[None]
    weights = mixed_weights(query, key, mix.to(query), groups.lengths, attn.scale)[groups.padded]
    return as_array(weights.double().mean(1)) + OWN_SHARE * row


@dataclass(frozen=True, eq=False)
class Groups:
    """How the tokens of each bag, padding included if it takes part, fall into groups; P rows in all, group by group.

    Attributes
    ----------
    padded : (N,) int64
        Row of each instance among the P.
    lengths : tuple of int
        Length of each bag, with the padding that takes part.
    sizes : (G,) int64
        Rows of each group of all bags; without padding, of those that are not empty.
    token : (B, m) int64
        Group of each token of a bag.
    present : (B, m) bool
        Whether the bag has that many.
    """

    padded: Tensor
    lengths: tuple[int, ...]
    sizes: Tensor
    token: Tensor
    present: Tensor

    @property
    def has_padding(self) -> bool:
        """Whether padding takes part, so that P exceeds N."""
        return len(self.padded) < sum(self.lengths)

    @classmethod
    def of(
        cls,
        lengths: tuple[int, ...],
        region_size: int,
        grouping: Grouping,
        device: torch.device,
        *,
        padding: Padding = "official",
    ) -> "Groups":
        """Lay out bags of these lengths; all on the host, from numbers that it knows."""
        n = torch.tensor(lengths)
        side = _sides(n, region_size)
        region = torch.where(n < 10, side.clamp_min(1), region_size)
        regions = torch.div(side, region, rounding_mode="floor")  # per side
        bag = torch.repeat_interleave(torch.arange(len(n)), n)
        place = torch.arange(len(bag)) - (n.cumsum(0) - n)[bag]
        row, column = place // side[bag], place % side[bag]
        inside = (row % region[bag]) * region[bag] + column % region[bag]
        which = (row // region[bag]) * regions[bag] + column // region[bag]
        count, size = (region**2, regions**2) if grouping == "official" else (regions**2, region**2)
        count = torch.where(n > 0, count, 0)
        group, member = (inside, which) if grouping == "official" else (which, inside)
        first = count.cumsum(0) - count  # group of each bag
        numbers = torch.arange(max(1, int(count.max())))
        present = numbers < count[:, None]
        token = torch.where(present, first[:, None] + numbers, 0)
        if padding == "masked":
            return cls._without_padding(lengths, first[bag] + group, count, device)
        total = count * size
        padded = (total.cumsum(0) - total)[bag] + group * size[bag] + member
        sizes = torch.repeat_interleave(size, count)
        return cls._moved(device, padded, tuple(total.tolist()), sizes=sizes, token=token, present=present)

    @classmethod
    def _without_padding(cls, lengths: tuple[int, ...], group: Tensor, count: Tensor, device: torch.device) -> "Groups":
        """Keep instances and the groups that have any; `group` (N,) counts the `count` (B,) groups of each bag."""
        order = torch.argsort(group, stable=True)
        padded = torch.empty_like(order)
        padded[order] = torch.arange(len(order))
        sizes = torch.bincount(group, minlength=int(count.sum()))
        bag = torch.repeat_interleave(torch.arange(len(count)), count)
        filled = torch.bincount(bag[sizes > 0], minlength=len(count))  # (B,) groups of each bag
        numbers = torch.arange(max(1, int(filled.max())))
        present = numbers < filled[:, None]
        token = torch.where(present, (filled.cumsum(0) - filled)[:, None] + numbers, 0)
        return cls._moved(device, padded, lengths, sizes=sizes[sizes > 0], token=token, present=present)

    @classmethod
    def _moved(
        cls,
        device: torch.device,
        padded: Tensor,
        lengths: tuple[int, ...],
        *,
        sizes: Tensor,
        token: Tensor,
        present: Tensor,
    ) -> "Groups":
        rows, sizes, token, present = (t.to(device, non_blocking=True) for t in (padded, sizes, token, present))
        return cls(rows, lengths, sizes, token, present)


def _sides(n: Tensor, region_size: int) -> Tensor:
    """Return H of bags of n instances."""
    root = torch.sqrt(n.double()).ceil().long()
    step = torch.where(n < 10, 2, region_size)
    return (root + step - 1) // step * step


class GroupedDoubleAttention(nn.Module):
    """GDAT, equation 1.

    Parameters
    ----------
    width, heads : int
    qkv_bias : bool
    """

    def __init__(self, width: int, *, heads: int, qkv_bias: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.heads = heads
        self.scale = (width // heads) ** -0.5

    def forward(self, tokens: Tensor, groups: Groups) -> Tensor:
        """Attend: (N, E) -> (N, E)."""
        out: Tensor = self.proj(self.attend(tokens, groups))
        return out

    def attend(self, tokens: Tensor, groups: Groups, norm: nn.LayerNorm | None = None) -> Tensor:
        """Return what `forward` projects, (N, E), for tokens that ``norm`` goes over first.

        The norm is taken here because it is cheaper to compute again than to keep.
        """
        if len(groups.sizes) == 0:
            return tokens
        rows = len(tokens)
        means = recomputed(partial(self._means, groups, norm), rows, tokens)
        size = self.heads if rows < attention.CHECKPOINT_ROWS else HEADS_AT_ONCE
        parts = [
            recomputed(partial(self._attend, groups, slice(first, first + size), norm), rows, tokens, means)
            for first in range(0, self.heads, size)
        ]
        return torch.cat(parts, 1)

    def _means(self, groups: Groups, norm: nn.Module | None, tokens: Tensor) -> Tensor:
        """Return the group tokens, (B, m, E)."""
        padded = _padded(tokens if norm is None else norm(tokens), groups)
        return torch.segment_reduce(padded, "mean", lengths=groups.sizes, axis=0)[groups.token]

    def _attend(self, groups: Groups, heads: slice, norm: nn.LayerNorm | None, tokens: Tensor, means: Tensor) -> Tensor:
        """Return the values of some heads, (N, H d)."""
        weight = torch.unflatten(self.qkv.weight, 0, (3, self.heads, -1))[:, heads]  # (3, H, d, E)
        rows = weight.flatten(0, 2)
        joint = functional.linear(tokens, rows) if norm is None else normed_linear(tokens, norm, rows)
        joint = _padded(joint, groups) if groups.has_padding else joint  # of other rows the order is of no matter
        query, key, value = self._with_bias(joint, slice(0, 3), heads)  # (P, H, d)
        group_query, group_key = self._with_bias(functional.linear(means, weight[:2].flatten(0, 2)), slice(0, 2), heads)
        read = bag_attention(group_query, key, value, groups.lengths, self.scale)
        out = instance_attention(query, group_key, read, groups.lengths, self.scale, counts=groups.present)
        out = torch.add(out, value, alpha=OWN_SHARE)
        return (out[groups.padded] if groups.has_padding else out).flatten(1)

    def _with_bias(self, joint: Tensor, parts: slice, heads: slice) -> tuple[Tensor, ...]:
        """Split products with the weights of some parts and heads, (..., parts H d), and add the bias of each."""
        if self.qkv.bias is not None:
            joint = joint + torch.unflatten(self.qkv.bias, 0, (3, self.heads, -1))[parts, heads].flatten()
        size = self.qkv.out_features // 3 // self.heads
        return torch.unflatten(joint, -1, (parts.stop, -1, size)).unbind(-3)


def _padded(rows: Tensor, groups: Groups) -> Tensor:
    return rows.new_zeros(sum(groups.lengths), rows.shape[1]).index_copy(0, groups.padded, rows)


class GdatBlock(nn.Module):
    """Grouped double attention and an MLP, each behind a layer norm and with a residual, equation 2.

    Parameters
    ----------
    width, heads, qkv_bias, expansion, dropout, norm_eps
        As `Gdat`.
    """

    def __init__(
        self, width: int, *, heads: int, qkv_bias: bool, expansion: int, dropout: float, norm_eps: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = GroupedDoubleAttention(width, heads=heads, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.ff1 = nn.Linear(width, expansion * width)
        self.ff2 = nn.Linear(expansion * width, width)
        self.dropout = dropout

    def forward(self, tokens: Tensor, groups: Groups) -> Tensor:
        """Transform instances: (N, E) -> (N, E)."""
        attended = self.attn.attend(tokens, groups, self.norm1)
        size = max(1, attention.CHECKPOINT_ROWS * self.ff1.in_features // self.ff1.out_features)
        return by_rows(self._finish, tokens, attended, size=size)

    def _finish(self, tokens: Tensor, attended: Tensor) -> Tensor:
        """Project what some tokens read and apply the MLP, each with its residual."""
        tokens = tokens + self.attn.proj(attended)
        hidden = self._drop(functional.gelu(self.ff1(self.norm2(tokens))))
        return tokens + self._drop(self.ff2(hidden))

    def _drop(self, values: Tensor) -> Tensor:
        return functional.dropout(values, self.dropout, self.training)
