"""Nyström attention between the tokens of each bag of a pack, with zeros that are counted instead of computed.

Xiong et al.: Nyströmformer, AAAI 2021, https://arxiv.org/abs/2102.03902, in the form of TransMIL: equations 3 and 4 of
`eosin.mil.methods.transmil`.

Bags are never padded to each other: landmarks, attention and convolution are those of each bag. The zeros in front of a
bag are counted, not computed: as keys they add to the sums of the softmax, and the landmarks that are zeros altogether,
nearly all of a small bag's, are equal and are in the matrices once, with their number as a weight. The only loop runs
over groups of heads, from `CHECKPOINT_ROWS` tokens on, to bound memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from eosin.kernels import ScanOrder, bag_offsets, causal_conv
from eosin.mil import _attention as attention
from eosin.mil._attention import bag_attention, instance_attention, mixed_weights, normed_linear, recomputed
from eosin.mil._rollout import by_head, gather_row, project_third
from eosin.mil.subsets import Floats, as_array

TAPS = 33  # of the convolution of the values along the sequence


@dataclass(frozen=True, eq=False)
class TokenBags:
    """Bags of tokens, T in all, the first of each a class token, and the landmarks of each bag.

    Attributes
    ----------
    lengths : tuple of int
        Tokens of each bag.
    first : (B,) int64
        Row of each class token among the T.
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
    """

    lengths: tuple[int, ...]
    first: Tensor
    offsets: Tensor
    trailed: ScanOrder
    zeros: Tensor
    counts: Tensor
    members: Tensor
    group: Tensor

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], landmarks: int, device: torch.device) -> "TokenBags":
        """Return what holds for bags of so many tokens each; all from numbers that the host knows."""
        count = torch.tensor(lengths, dtype=torch.int64)
        zeros = -count % landmarks
        group = (count + zeros) // landmarks
        counts, members = _places(landmarks, zeros, group)
        return cls(
            lengths=tuple(lengths),
            first=starts(count).to(device, non_blocking=True),
            offsets=bag_offsets(lengths, device),
            trailed=_trailed(count, device),
            zeros=zeros.float().to(device, non_blocking=True),
            counts=counts.float().to(device, non_blocking=True),
            members=members.flatten().to(device, non_blocking=True),
            group=group.float().to(device, non_blocking=True),
        )


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


def starts(counts: Tensor) -> Tensor:
    """Return where each of several runs of these lengths begins."""
    return counts.cumsum(0) - counts


def _trailed(lengths: Tensor, device: torch.device) -> ScanOrder:
    """Return bags of these lengths with half the taps as rows of zeros behind each."""
    longer = lengths + TAPS // 2
    bag = torch.repeat_interleave(torch.arange(len(lengths)), longer)
    place = torch.arange(len(bag)) - starts(longer)[bag]
    source = torch.where(place < lengths[bag], starts(lengths)[bag] + place, -1)
    real = torch.nonzero(source >= 0)[:, 0]
    return ScanOrder(source.to(device), real.to(device), bag_offsets(longer.tolist(), device))


class NystromLayer(nn.Module):
    """Layer norm, Nyström attention and the residual.

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

    def forward(self, tokens: Tensor, bags: TokenBags) -> tuple[Tensor, Tensor]:
        """Return the new tokens (T, E) and the class token's weight of each token (T, H)."""
        values, weights = [], []
        for heads, parts in self._groups(tokens, bags):
            both = recomputed(partial(self._attend, heads=heads, bags=bags), len(tokens), tokens, *parts)
            value, weight = torch.split(both, [both.shape[1] - len(heads), len(heads)], dim=1)
            values.append(value)
            weights.append(weight)
        return tokens + self._project_out(values), torch.cat(weights, 1)

    def class_token(self, tokens: Tensor, bags: TokenBags) -> Tensor:
        """Return what `forward` makes of the class tokens, (B, E)."""
        values = [
            recomputed(partial(self._attend_class, heads=heads, bags=bags), len(tokens), tokens, *parts)
            for heads, parts in self._groups(tokens, bags)
        ]
        return tokens[bags.first] + self._project_out(values)

    def _project_out(self, values: Sequence[Tensor]) -> Tensor:
        return functional.dropout(self.to_out(torch.cat(list(values), 1)), self.dropout, self.training)

    def landmarks(self, means: Tensor, bags: TokenBags) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys of landmarks, (B, M, H, d), and A2⁺ for what these read, (B, H, M, M).

        Parameters
        ----------
        means : (B, M, E)
            As `landmark_means`.
        bags : TokenBags
        """
        query, key = (self._project(means, part) for part in range(2))
        wide = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast(query.device.type, enabled=False):
            scores = query.to(wide).transpose(1, 2) @ key.to(wide).permute(0, 2, 3, 1) * self.scale
            counts = bags.counts.to(wide)
            shares = torch.softmax(scores + counts.log()[:, None, None], -1)  # of all that a place stands for
            single = shares / counts.clamp_min(1)[:, None, None]
            inverse = pseudo_inverse(single, self.pinv_iterations, counts)
            return query, key, inverse * counts[:, None, None]

    def landmark_means(self, tokens: Tensor, bags: TokenBags) -> Tensor:
        """Return the mean of each landmark's normed rows: (T, E) -> (B, M, E)."""
        sums = torch.segment_reduce(self.norm(tokens), "sum", lengths=bags.members, axis=0)
        return sums.view(len(bags.lengths), -1, tokens.shape[1]) / bags.group.to(sums.dtype)[:, None, None]

    def _groups(self, tokens: Tensor, bags: TokenBags) -> list[tuple[range, tuple[Tensor, ...]]]:
        """Return the heads that are computed at once, with their landmarks' queries, keys and pseudo-inverse."""
        means = recomputed(partial(self.landmark_means, bags=bags), len(tokens), tokens)
        query, key, inverse = self.landmarks(means, bags)
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
        self, tokens: Tensor, marks_q: Tensor, marks_k: Tensor, inverse: Tensor, *, heads: range, bags: TokenBags
    ) -> Tensor:
        """Return the values of some heads and, beside them, the class token's weights: (T, H d + H)."""
        query, key, value = self._projections(tokens, slice(0, 3), heads)
        mixed = self._mixed(marks_q, key, value, inverse, bags)
        out = instance_attention(query, marks_k, mixed, bags.lengths, self.scale, counts=bags.counts)
        out = out + self._convolved(value, heads, bags)  # (T, H, d)
        shares = self._class_shares(query[bags.first], marks_k, bags) @ inverse  # (B, H, 1, M)
        mix = shares[:, :, 0].mT
        weights = mixed_weights(marks_q, key, mix, bags.lengths, self.scale, zeros=bags.zeros)
        return torch.cat([out.flatten(1), weights.to(out.dtype)], 1)

    def _attend_class(
        self, tokens: Tensor, marks_q: Tensor, marks_k: Tensor, inverse: Tensor, *, heads: range, bags: TokenBags
    ) -> Tensor:
        """Return the class tokens' values of some heads, (B, H d)."""
        key, value = self._projections(tokens, slice(1, 3), heads)
        mixed = self._mixed(marks_q, key, value, inverse, bags).transpose(1, 2)  # (B, H, M, d)
        query = self._project(self.norm(tokens[bags.first]), 0)[:, _slice(heads)]
        out = (self._class_shares(query, marks_k, bags).to(mixed.dtype) @ mixed)[:, :, 0]
        return (out + self._convolved_class(value, heads, bags)).flatten(1)

    def _mixed(self, marks_q: Tensor, key: Tensor, value: Tensor, inverse: Tensor, bags: TokenBags) -> Tensor:
        read = bag_attention(marks_q, key, value, bags.lengths, self.scale, zeros=bags.zeros).transpose(1, 2)
        return (inverse @ read.to(inverse.dtype)).transpose(1, 2).to(value.dtype)  # (B, M, H, d)

    def _class_shares(self, query: Tensor, marks_k: Tensor, bags: TokenBags) -> Tensor:
        """Return the class token's row of A1, (B, H, 1, M), of all landmarks that a place stands for."""
        wide = torch.promote_types(query.dtype, torch.float32)
        scores = query[:, :, None] @ marks_k.permute(0, 2, 3, 1) * self.scale
        return torch.softmax(scores.to(wide) + bags.counts.to(wide).log()[:, None, None], -1)

    def _convolved(self, value: Tensor, heads: range, bags: TokenBags) -> Tensor:
        """Return the convolution along each bag, (T, H, d): a causal one, read half its taps later."""
        weight = torch.repeat_interleave(self.res_conv.weight[_slice(heads), 0, :, 0], value.shape[2], 0)
        order = bags.trailed
        out = causal_conv(value.flatten(1), weight, None, bags.offsets, order=order, activation="none")
        return out[order.place + TAPS // 2].view_as(value)

    def _convolved_class(self, value: Tensor, heads: range, bags: TokenBags) -> Tensor:
        """Return the convolution at the class tokens, (B, H, d): in front of them are zeros only."""
        reach = TAPS // 2
        near = bags.first[:, None] + torch.arange(reach + 1, device=bags.first.device)  # (B, taps)
        inside = near < bags.offsets[1:, None]
        window = value[torch.where(inside, near, 0)] * inside[..., None, None]  # (B, taps, H, d)
        return torch.einsum("bthd,ht->bhd", window, self.res_conv.weight[_slice(heads), 0, reach:, 0])


@dataclass(frozen=True, eq=False)
class NystromFactors:
    """The three factors of a Nyström layer for one bag: ``A1 A2⁺ A3`` per head, over its T tokens.

    Parameters
    ----------
    normed : (T, E)
        Tokens after the layer's norm.
    marks_query, marks_key : (m, H, d)
        Landmarks, equal ones once.
    inverse : (H, m, m)
        Of all landmarks that each row stands for.
    layer : NystromLayer
    layout : TokenBags
    """

    normed: Tensor
    marks_query: Tensor
    marks_key: Tensor
    inverse: Tensor
    layer: NystromLayer
    layout: TokenBags

    @classmethod
    def of(cls, layer: NystromLayer, tokens: Tensor, layout: TokenBags) -> "NystromFactors":
        """Compute the factors for the tokens (T, E) that a layer was given."""
        query, key, inverse = layer.landmarks(layer.landmark_means(tokens, layout), layout)
        return cls(layer.norm(tokens), query[0], key[0], inverse[0], layer, layout)

    def to_landmarks(self, row: Floats) -> Tensor:
        """Return ``r A1 A2⁺`` per head of a row of tokens (T,): (m, H)."""
        project = partial(project_third, self.layer.to_qkv, 0)
        counts = self.layout.counts[0]
        shares = gather_row(row, self.normed, project, self.marks_key, scale=self.layer.scale, counts=counts)  # (m, H)
        return torch.einsum("mh,hmk->kh", shares, self.inverse.to(shares))

    def from_landmarks(self, mix: Tensor) -> Tensor:
        """Return ``mix A3`` per head of weights of landmarks (m, H): (T, H)."""
        key, query = self.third(1), self.marks_query[None]
        lengths, zeros = self.layout.lengths, self.layout.zeros
        return mixed_weights(query, key, mix[None].to(query), lengths, self.layer.scale, zeros=zeros)

    def third(self, number: int) -> Tensor:
        """Return the queries (0), keys (1) or values (2) of the tokens, (T, H, d)."""
        return by_head(project_third(self.layer.to_qkv, number, self.normed), self.layer.heads)


@torch.no_grad()
def through_landmarks(layer: NystromLayer, tokens: Tensor, bags: TokenBags, row: Floats) -> Floats:
    """Return the row after a Nyström layer, mean over heads; entries may be negative."""
    factors = NystromFactors.of(layer, tokens, bags)
    weights = factors.from_landmarks(factors.to_landmarks(row))
    return as_array(weights.double().mean(1))


def pseudo_inverse(matrix: Tensor, iterations: int, counts: Tensor | None = None) -> Tensor:
    """Approximate the Moore-Penrose inverse of each matrix, equation 4: (B, H, m, m) -> (B, H, m, m).

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
