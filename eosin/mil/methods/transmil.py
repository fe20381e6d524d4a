"""TransMIL: a transformer over the bag with Nyström attention and a position convolution on a square grid.

Shao, Bian, Chen, Wang, Zhang, Ji, Zhang: TransMIL: Transformer based correlated multiple instance learning for whole
slide image classification, NeurIPS 2021, https://arxiv.org/abs/2106.00908. Nyström attention: Xiong et al., AAAI
2021, https://arxiv.org/abs/2102.03902.

1. ``h = relu(W x + b)``; with s = ⌈√n⌉ the first s² - n rows are repeated at the end; a learned class token goes
   first.
2. ``t ← t + attention(LN(t))``, ``t ← PPEG(t)``, ``t ← t + attention(LN(t))``, ``logits = W LN(t_class) + b``.
3. Nyström attention with m landmarks, scale 1/√d: zeros are put in front until m divides the length; landmarks are
   the means of consecutive groups of queries and of keys; ``A1 = softmax(Q K̃ᵀ)``, ``A2 = softmax(Q̃ K̃ᵀ)``, ``A3 =
   softmax(Q̃ Kᵀ)``; the result is ``A1 A2⁺ A3 V`` plus a depthwise convolution of V along the sequence (33 taps),
   then the output projection and dropout. The zeros are keys like others.
4. ``A2⁺``: ``Z ← ¼ Z (13 - A Z (15 - A Z (7 - A Z)))`` from ``Z = Aᵀ / (largest row sum · largest column sum)``.
5. PPEG: the tokens but the class token lie on an s × s grid in the order of the list; ``t + conv7(t) + conv5(t) +
   conv3(t)``, depthwise. The three kernels are added up to one, which is the same map.
6. Scores are those of the class token in the first layer, ``log(A1_class A2⁺ A3)`` per head, of an instance and its
   repeat together. The approximation may give negative weights: they count as 0.

Deviations from the authors' code. The starting point of the pseudo-inverse takes the largest sums of its own bag, the
code those of the whole batch, so that results do not depend on what is trained beside it; for one bag they agree. Of
the second layer only the class token is computed, since nothing else is read. The code exports no attention. Training
is with RAdam without Lookahead.

Bags are never padded to each other: landmarks, attention, convolutions and grids are those of each bag. The zeros of
equation 3 are counted, not computed: as keys they add to the sums of the softmax, and the landmarks that are zeros
altogether, nearly all of a small bag's, are equal and stand in the matrices once, with their number as a weight. The
only loop runs over groups of heads, from `CHECKPOINT_ROWS` instances on, to bound memory.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from eosin.errors import ConfigError
from eosin.kernels import ScanOrder, causal_conv
from eosin.mil import attention
from eosin.mil.attention import (
    bag_attention,
    by_rows,
    instance_attention,
    mixed_weights,
    normed_linear,
    recomputed,
)
from eosin.mil.bags import PackedBags
from eosin.mil.layers import embedding
from eosin.mil.recipe import RECIPES, Component, Recipe, Training
from eosin.mil.slots import AGGREGATORS, Aggregator, AttentionOutput

TAPS = 33  # of the convolution of the values along the sequence
PPEG_CHANNELS = 128  # channels that are convolved at once in a large pack


@AGGREGATORS.register("transmil")
class TransMil(Aggregator):
    """Transformer with Nyström attention, equations 1 to 6.

    Parameters
    ----------
    in_dim, n_outputs
        Feature width D and logits K.
    width : int
        Width E of a token.
    heads : int
        Attention heads; divides the width.
    landmarks : int or None
        Landmarks m; None is half the width.
    pinv_iterations : int
        Steps of equation 4.
    dropout : float
        After the output projections.
    """

    output_type = AttentionOutput
    order_dependent = True

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        *,
        width: int = 512,
        heads: int = 8,
        landmarks: int | None = None,
        pinv_iterations: int = 6,
        dropout: float = 0.1,
    ) -> None:
        if width % heads:
            raise ConfigError(f"transmil: {heads} heads do not divide the width {width}; choose another width")
        super().__init__(in_dim, n_outputs, embed_dim=width)
        self.landmarks = max(1, width // 2) if landmarks is None else landmarks
        self.embed = embedding(in_dim, (width,))
        self.cls_token = nn.Parameter(torch.randn(1, width))
        self.layer1, self.layer2 = (
            NystromLayer(width, heads=heads, pinv_iterations=pinv_iterations, dropout=dropout) for _ in range(2)
        )
        self.ppeg = Ppeg(width)
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, n_outputs)

    def forward(self, bags: PackedBags) -> AttentionOutput:
        """Return logits, class tokens, scores of the first layer and instances."""
        return self.aggregate(bags.with_values(by_rows(self.embed, bags.values)))

    def aggregate(self, bags: PackedBags) -> AttentionOutput:
        """Return the output for bags of embedded instances."""
        layout = Layout.of(bags.lengths, self.landmarks, bags.values.device)
        tokens = torch.cat([self.cls_token.to(bags.values.dtype), bags.values])[layout.source]  # (T, E)
        tokens, weights = self.layer1(tokens, layout)
        tokens = self.ppeg(tokens, layout)
        bag = self.norm(self.layer2.class_token(tokens, layout))  # (B, E)
        floor = torch.finfo(weights.dtype).tiny
        scores = layout.per_instance(weights).clamp_min(floor).log()
        return AttentionOutput(self.classifier(bag), bag, scores, bags.values)


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tokens of a pack lie: T tokens, of each bag its class token and s² instances.

    Attributes
    ----------
    source : (T,) int64
        Row of each token in the class token followed by the instances.
    first : (B,) int64
        Row of each class token among the T.
    body : (T - B,) int64
        Rows of the others.
    lengths : tuple of int
        Tokens of each bag.
    offsets : (B + 1,) int32
        Offsets of the bags among the T.
    trailed : ScanOrder
        The bags with half the taps as rows of zeros behind each.
    zeros : (B,) float32
        Rows of zeros in front of each bag, which make its length a multiple of m.
    counts : (B, M) float32
        How many landmarks each place stands for: the first for those of zeros only, each other one for one or none.
    members : (B * M,) int64
        Tokens of the landmarks at each place.
    group : (B,) float32
        Rows, zeros included, that each landmark is the mean of.
    cell : (T - B,) int64
        Cell of each token of `body` in one tall grid that holds the grids of all bags, three rows apart.
    grid : (height, width)
        Of that grid.
    copies, originals : (R,) int64
        Rows among the T of the repeated instances and of what they repeat.
    instances : (N,) int64
        Row of each instance among the T.
    """

    source: Tensor
    first: Tensor
    body: Tensor
    lengths: tuple[int, ...]
    offsets: Tensor
    trailed: ScanOrder
    zeros: Tensor
    counts: Tensor
    members: Tensor
    group: Tensor
    cell: Tensor
    grid: tuple[int, int]
    copies: Tensor
    originals: Tensor
    instances: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], landmarks: int, device: torch.device) -> "Layout":
        """Lay out bags of these lengths; all on the host, from numbers that it knows."""
        length = torch.tensor(lengths, dtype=torch.int64)
        side = torch.tensor([math.isqrt(n - 1) + 1 if n else 0 for n in lengths])
        count = side * side + 1
        bag = torch.repeat_interleave(torch.arange(len(lengths)), count)
        place = torch.arange(len(bag)) - _starts(count)[bag] - 1  # -1 is the class token
        rows = torch.arange(len(bag))
        body = rows[place >= 0]
        wrapped = torch.where(place < length[bag], place, place - length[bag])
        copied = place >= length[bag]
        copied &= place >= 0
        zeros = -count % landmarks
        group = (count + zeros) // landmarks
        counts, members = _places(landmarks, zeros, group)
        top = _starts(side + 3)
        width = max(1, int(side.max()))
        place_b, bag_b = place[body], bag[body]
        cell = (top[bag_b] + place_b // side[bag_b]) * width + place_b % side[bag_b]
        moved = {
            "source": torch.where(place < 0, 0, 1 + _starts(length)[bag] + wrapped),
            "first": _starts(count),
            "body": body,
            "zeros": zeros.float(),
            "counts": counts.float(),
            "members": members.flatten(),
            "group": group.float(),
            "cell": cell,
            "copies": rows[copied],
            "originals": (rows - length[bag])[copied],
            "instances": rows[(place >= 0) & ~copied],
        }
        tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in moved.items()}
        offsets = _offsets(count).to(device)
        trailed = _trailed(count, device)
        height = int((side + 3).sum())
        return cls(lengths=tuple(count.tolist()), offsets=offsets, trailed=trailed, grid=(height, width), **tensors)

    def per_instance(self, weights: Tensor) -> Tensor:
        """Add the weights (T, H) of repeated instances to the instance they repeat: (N, H)."""
        extra = torch.zeros_like(weights).index_copy(0, self.originals, weights[self.copies])
        return (weights + extra)[self.instances]


def _places(landmarks: int, zeros: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many landmarks each place stands for and how many tokens these have, both (B, M).

    Landmarks of zeros only share the first place; the next one may begin with some zeros.
    """
    empty = zeros // group
    shared = (empty > 0).long()
    place = torch.arange(int((landmarks - empty + shared).max()))
    number = place - shared[:, None] + empty[:, None]  # of the landmark at a place, beyond the shared one
    real = (place >= shared[:, None]) & (number < landmarks)
    partial_zeros = torch.where(number == empty[:, None], (zeros - empty * group)[:, None], 0)
    counts = torch.where(place < shared[:, None], empty[:, None], real.long())
    return counts, torch.where(real, group[:, None] - partial_zeros, 0)


def _starts(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts


def _offsets(counts: Tensor) -> Tensor:
    return functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


def _trailed(lengths: Tensor, device: torch.device) -> ScanOrder:
    """Return bags of these lengths with half the taps as rows of zeros behind each."""
    longer = lengths + TAPS // 2
    bag = torch.repeat_interleave(torch.arange(len(lengths)), longer)
    place = torch.arange(len(bag)) - _starts(longer)[bag]
    source = torch.where(place < lengths[bag], _starts(lengths)[bag] + place, -1)
    return ScanOrder(source.to(device), torch.nonzero(source >= 0)[:, 0].to(device), _offsets(longer).to(device))


class NystromLayer(nn.Module):
    """Layer norm, Nyström attention and the residual, equations 3 and 4.

    Parameters
    ----------
    width, heads, pinv_iterations, dropout
        As `TransMil`.
    """

    def __init__(self, width: int, *, heads: int, pinv_iterations: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width)
        self.res_conv = nn.Conv2d(heads, heads, (TAPS, 1), padding=(TAPS // 2, 0), groups=heads, bias=False)
        self.heads = heads
        self.pinv_iterations = pinv_iterations
        self.dropout = dropout
        self.scale = (width // heads) ** -0.5

    def forward(self, tokens: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Return the new tokens (T, E) and the class token's weight of each token (T, H)."""
        values, weights = [], []
        for heads, parts in self._groups(tokens, layout):
            both = recomputed(partial(self._attend, heads=heads, layout=layout), len(tokens), tokens, *parts)
            value, weight = torch.split(both, [both.shape[1] - len(heads), len(heads)], dim=1)
            values.append(value)
            weights.append(weight)
        return tokens + self._project_out(values), torch.cat(weights, 1)

    def class_token(self, tokens: Tensor, layout: Layout) -> Tensor:
        """Return what `forward` makes of the class tokens, (B, E)."""
        values = [
            recomputed(partial(self._attend_class, heads=heads, layout=layout), len(tokens), tokens, *parts)
            for heads, parts in self._groups(tokens, layout)
        ]
        return tokens[layout.first] + self._project_out(values)

    def _project_out(self, values: Sequence[Tensor]) -> Tensor:
        return functional.dropout(self.to_out(torch.cat(list(values), 1)), self.dropout, self.training)

    def landmarks(self, means: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys of landmarks, (B, M, H, d), and A2⁺ for what these read, (B, H, M, M).

        Parameters
        ----------
        means : (B, M, E)
            As `landmark_means`.
        layout : Layout
        """
        query, key = (self._project(means, part) for part in range(2))
        wide = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast(query.device.type, enabled=False):
            scores = query.to(wide).transpose(1, 2) @ key.to(wide).permute(0, 2, 3, 1) * self.scale
            counts = layout.counts.to(wide)
            shares = torch.softmax(scores + counts.log()[:, None, None], -1)  # of all that a place stands for
            single = shares / counts.clamp_min(1)[:, None, None]
            inverse = pseudo_inverse(single, self.pinv_iterations, counts)
            return query, key, inverse * counts[:, None, None]

    def landmark_means(self, tokens: Tensor, layout: Layout) -> Tensor:
        """Return the mean of each landmark's normed rows: (T, E) -> (B, M, E)."""
        sums = torch.segment_reduce(self.norm(tokens), "sum", lengths=layout.members, axis=0)
        return sums.view(len(layout.lengths), -1, tokens.shape[1]) / layout.group.to(sums.dtype)[:, None, None]

    def _groups(self, tokens: Tensor, layout: Layout) -> list[tuple[range, tuple[Tensor, ...]]]:
        """Return the heads that are computed at once, with their landmarks' queries, keys and pseudo-inverse."""
        means = recomputed(partial(self.landmark_means, layout=layout), len(tokens), tokens)
        query, key, inverse = self.landmarks(means, layout)
        size = self.heads if len(tokens) < attention.CHECKPOINT_ROWS else 2
        groups = [range(first, min(first + size, self.heads)) for first in range(0, self.heads, size)]
        return [(h, (query[:, :, _slice(h)], key[:, :, _slice(h)], inverse[:, _slice(h)])) for h in groups]

    def _project(self, rows: Tensor, part: int) -> Tensor:
        """Return the queries (0), keys (1) or values (2) of normed rows: (..., E) -> (..., H, d)."""
        weight = torch.unflatten(self.to_qkv.weight, 0, (3, -1))[part]
        projected: Tensor = torch.unflatten(functional.linear(rows, weight), -1, (self.heads, -1))
        return projected

    def _projections(self, tokens: Tensor, parts: slice, heads: range) -> tuple[Tensor, ...]:
        """Return some of queries, keys and values of some heads, each (T, H, d)."""
        weight = torch.unflatten(self.to_qkv.weight, 0, (3, self.heads, -1))[parts, _slice(heads)]
        joint = normed_linear(tokens, self.norm, weight.flatten(0, 2))
        return torch.unflatten(joint, 1, weight.shape[:3]).unbind(1)

    def _attend(
        self, tokens: Tensor, marks_q: Tensor, marks_k: Tensor, inverse: Tensor, *, heads: range, layout: Layout
    ) -> Tensor:
        """Return the values of some heads and, beside them, the class token's weights: (T, H d + H)."""
        query, key, value = self._projections(tokens, slice(0, 3), heads)
        mixed = self._mixed(marks_q, key, value, inverse, layout)
        out = instance_attention(query, marks_k, mixed, layout.lengths, self.scale, counts=layout.counts)
        out = out + self._convolved(value, heads, layout)  # (T, H, d)
        shares = self._class_shares(query[layout.first], marks_k, layout) @ inverse  # (B, H, 1, M)
        mix = shares[:, :, 0].mT
        weights = mixed_weights(marks_q, key, mix, layout.lengths, self.scale, zeros=layout.zeros)
        return torch.cat([out.flatten(1), weights.to(out.dtype)], 1)

    def _attend_class(
        self, tokens: Tensor, marks_q: Tensor, marks_k: Tensor, inverse: Tensor, *, heads: range, layout: Layout
    ) -> Tensor:
        """Return the class tokens' values of some heads, (B, H d)."""
        key, value = self._projections(tokens, slice(1, 3), heads)
        mixed = self._mixed(marks_q, key, value, inverse, layout).transpose(1, 2)  # (B, H, M, d)
        query = self._project(self.norm(tokens[layout.first]), 0)[:, _slice(heads)]
        out = (self._class_shares(query, marks_k, layout).to(mixed.dtype) @ mixed)[:, :, 0]
        return (out + self._convolved_class(value, heads, layout)).flatten(1)

    def _mixed(self, marks_q: Tensor, key: Tensor, value: Tensor, inverse: Tensor, layout: Layout) -> Tensor:
        read = bag_attention(marks_q, key, value, layout.lengths, self.scale, zeros=layout.zeros).transpose(1, 2)
        return (inverse @ read.to(inverse.dtype)).transpose(1, 2).to(value.dtype)  # (B, M, H, d)

    def _class_shares(self, query: Tensor, marks_k: Tensor, layout: Layout) -> Tensor:
        """Return the class token's row of A1, (B, H, 1, M), of all landmarks that a place stands for."""
        wide = torch.promote_types(query.dtype, torch.float32)
        scores = query[:, :, None] @ marks_k.permute(0, 2, 3, 1) * self.scale
        return torch.softmax(scores.to(wide) + layout.counts.to(wide).log()[:, None, None], -1)

    def _convolved(self, value: Tensor, heads: range, layout: Layout) -> Tensor:
        """Return the convolution along each bag, (T, H, d): a causal one, read half its taps later."""
        weight = torch.repeat_interleave(self.res_conv.weight[_slice(heads), 0, :, 0], value.shape[2], 0)
        order = layout.trailed
        out = causal_conv(value.flatten(1), weight, None, layout.offsets, order=order, activation="none")
        return out[order.place + TAPS // 2].view_as(value)

    def _convolved_class(self, value: Tensor, heads: range, layout: Layout) -> Tensor:
        """Return the convolution at the class tokens, (B, H, d): in front of them are zeros only."""
        reach = TAPS // 2
        near = layout.first[:, None] + torch.arange(reach + 1, device=layout.first.device)  # (B, taps)
        inside = near < layout.offsets[1:, None]
        window = value[torch.where(inside, near, 0)] * inside[..., None, None]  # (B, taps, H, d)
        return torch.einsum("bthd,ht->bhd", window, self.res_conv.weight[_slice(heads), 0, reach:, 0])


class Ppeg(nn.Module):
    """Position encoding by convolution on the grid of each bag, equation 5.

    Parameters
    ----------
    width : int
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv7, self.conv5, self.conv3 = (
            nn.Conv2d(width, width, size, padding=size // 2, groups=width) for size in (7, 5, 3)
        )

    def forward(self, tokens: Tensor, layout: Layout) -> Tensor:
        """Encode positions: (T, E) -> (T, E); class tokens pass unchanged."""
        kernel = self.conv7.weight + functional.pad(self.conv5.weight, (1,) * 4)
        kernel = kernel + functional.pad(self.conv3.weight, (2,) * 4)
        parts = (tokens, kernel, self._bias())
        size = tokens.shape[1] if len(tokens) < attention.CHECKPOINT_ROWS else PPEG_CHANNELS
        columns = zip(*(torch.split(part, size, dim) for part, dim in zip(parts, (1, 0, 0), strict=True)), strict=True)
        coded = [recomputed(partial(_convolved_grid, layout=layout), len(tokens), *column) for column in columns]
        return torch.cat(coded, 1)

    def _bias(self) -> Tensor:
        biases = [layer.bias for layer in (self.conv7, self.conv5, self.conv3) if layer.bias is not None]
        return torch.stack(biases).sum(0)


def _convolved_grid(tokens: Tensor, kernel: Tensor, bias: Tensor, *, layout: Layout) -> Tensor:
    """Add the convolution of some channels on each bag's grid, (T, channels)."""
    height, width = layout.grid
    body = tokens[layout.body]
    grid = body.new_zeros(height * width, tokens.shape[1]).index_copy(0, layout.cell, body)
    image = grid.view(1, height, width, -1).permute(0, 3, 1, 2)
    coded = functional.conv2d(image, kernel, bias, padding=kernel.shape[2] // 2, groups=len(kernel))
    coded = coded.permute(0, 2, 3, 1).flatten(0, 2)[layout.cell]
    return tokens.index_add(0, layout.body, coded.to(tokens.dtype))


def pseudo_inverse(matrix: Tensor, iterations: int, counts: Tensor | None = None) -> Tensor:
    """Approximate the Moore-Penrose inverse of each matrix by equation 4: (B, H, m, m) -> (B, H, m, m).

    The starting point depends on the largest row and column sums over the heads of a bag. With `counts` (B, m) a row
    and column stand for that many equal ones, or for none, of a larger matrix; the result holds one of each of the
    larger result. With C the counts, products of larger matrices are ``X C Y``, so that the iteration is that of
    ``√C X √C``.
    """
    counts = matrix.new_ones(matrix.shape[0], matrix.shape[-1]) if counts is None else counts
    root = counts.sqrt()[:, None, :, None]  # (B, 1, m, 1)
    size = matrix.abs() * (counts > 0)[:, None, :, None]
    rows, columns = (size * counts[:, None, None]).sum(-1), (size * counts[:, None, :, None]).sum(-2)
    largest = rows.flatten(1).amax(1) * columns.flatten(1).amax(1)  # (B,)
    matrix = root * matrix * root.mT
    inverse = matrix.mT / largest[:, None, None, None]
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(iterations):
        product = matrix @ inverse
        inverse = 0.25 * inverse @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product)))
    shrink = torch.where(root > 0, 1 / root, 0)
    return shrink * inverse * shrink.mT


def _slice(heads: range) -> slice:
    return slice(heads.start, heads.stop)


RECIPE = Recipe(
    aggregator=Component(name="transmil"),
    training=Training(
        optimizer="radam",
        lr=2e-4,
        weight_decay=1e-5,
        epochs=200,
        patience=10,
        schedule="constant",
        bags_per_step=2,
    ),
)
RECIPES.add("transmil", RECIPE)
