"""The attention of a transformer's layers for one slide, as factors that carry a row without an n × n matrix.

A forward pass is listened to (`inputs_of`), the factors of each layer are computed from what the layer was given, and
`Trace.row` carries the weights with which the bag is read out down to the tiles (`eosin.heatmaps.rollout`):

- Set Transformer: from the seeds through their own attention, then the pooling's weights, then each ISAB as two
  factors, tiles to inducing points and back, each averaged over heads.
- GDAT: from the pooling's weights through each block as two factors, tiles to groups and back; the tenth of its own
  value that every tile adds counts as the tile itself, what falls on padding is left out.
- TransMIL: from the class token through both Nyström layers, three factors per head, averaged over heads. The product
  may be negative: those entries are cut to 0. The convolutions are ignored, repeated tiles count for their
  originals, and the class token's own share is left out at the end.

A method joins by ``@trace_attention.register``.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, singledispatch
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eosin.heatmaps.rollout import Floats, rollout_row
from eosin.mil.attention import mixed_weights
from eosin.mil.bags import PackedBags
from eosin.mil.methods.gdat import Gdat, GdatBlock, Groups
from eosin.mil.methods.packmil_downsampler import Downsampled
from eosin.mil.methods.set_transformer import InducedBlock, MultiheadBlock, SetTransformer
from eosin.mil.methods.transmil import TransMil
from eosin.mil.nystrom import NystromLayer, TokenBags
from eosin.mil.slots import AttentionOutput
from eosin.mil.standardize import Standardized

ROWS_PER_STEP = 16_384
GDAT_OWN_SHARE = 0.1

Step = Callable[[Floats], Floats]


@dataclass(frozen=True, eq=False)
class Trace:
    """What a rollout follows.

    Parameters
    ----------
    start : (t,) float64
        Weights with which the tokens of the last layer are read out.
    layers : sequence of callables
        Input side first; each returns ``r @ A`` of a row r (t,).
    to_tiles : callable
        From a row of tokens (t,) to tiles (n,).
    """

    start: Floats
    layers: Sequence[Step]
    to_tiles: Step

    def row(self) -> Floats:
        """Return the rollout of the slide's representation to its tiles, (n,) non-negative with sum 1."""
        tiles = self.to_tiles(rollout_row(self.start, self.layers))
        return np.asarray(tiles / tiles.sum())


@singledispatch
def trace_attention(model: nn.Module, pack: PackedBags) -> Trace | None:
    """Return the trace of one bag, or None for a model without layers of attention between tiles."""
    return None


@trace_attention.register(Standardized)
def _of_standardized(model: Standardized, pack: PackedBags) -> Trace | None:
    return trace_attention(model.aggregator, model.standardizer(pack))


@trace_attention.register(Downsampled)
def _of_host(model: Downsampled, pack: PackedBags) -> Trace | None:
    with torch.no_grad():
        return trace_attention(model.host, model.downsample(pack, longer_than=None))


@contextmanager
def inputs_of(modules: Sequence[nn.Module]) -> Iterator[list[list[Any]]]:
    """Collect, for each module, the first argument of every call while the block runs."""
    seen: list[list[Any]] = [[] for _ in modules]

    def listen(place: int, _module: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen[place].append(arguments[0])

    handles = [module.register_forward_pre_hook(partial(listen, place)) for place, module in enumerate(modules)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@trace_attention.register(SetTransformer)
@torch.no_grad()
def _of_set_transformer(model: SetTransformer, pack: PackedBags) -> Trace:
    encoder = [block for block in model.encoder if isinstance(block, InducedBlock)]
    decoder = [block for block in model.decoder if isinstance(block, MultiheadBlock)]
    with inputs_of([*encoder, *(block.query for block in decoder)]) as seen:
        output = model(pack)
    inputs = [calls[0] for calls in seen]
    given, seeds = inputs[: len(encoder)], inputs[len(encoder) :]
    read = np.full(model.pool.seeds.shape[1], 1 / model.pool.seeds.shape[1])
    for block, tokens in reversed(list(zip(decoder, seeds, strict=True))):
        read = 0.5 * read + 0.5 * read @ _seed_attention(block, tokens[0])
    start = _pooling_weights(output, heads=model.pool.block.heads) @ read
    layers = [partial(_through_points, *parts) for parts in zip(encoder, given, strict=True)]
    return Trace(start, layers, lambda row: row)


def _pooling_weights(output: AttentionOutput, *, heads: int) -> Floats:
    """Return the weights of the tiles for each seed, mean over heads: (n, k)."""
    weights = torch.unflatten(output.scores.double().softmax(0), 1, (-1, heads)).mean(2)
    return np.asarray(weights.cpu().numpy())


def _seed_attention(block: MultiheadBlock, tokens: Tensor) -> Floats:
    """Return the attention of the seeds of a bag (k, X) to each other, mean over heads: (k, k)."""
    query, key = (_by_head(part(tokens), block.heads).transpose(0, 1) for part in (block.query, block.key))
    return np.asarray((query @ key.mT * block.scale).softmax(-1).mean(0).double().cpu().numpy())


@torch.no_grad()
def _through_points(block: InducedBlock, bags: PackedBags, row: Floats) -> Floats:
    """Return the row after an ISAB: tiles to inducing points, and these to tiles."""
    tokens = block.tokens
    summary = block.inducing.read_bags(tokens[0], bags)  # (1, m, d)
    point, inducing = block.point, block.inducing
    keys = _by_head(point.key(summary[0]), point.heads)
    shares = gather_row(row, bags.values, point.query, keys, scale=point.scale).mean(1, keepdim=True)  # (m, 1)
    query, key = _by_head(inducing.query(tokens), inducing.heads), _by_head(inducing.key(bags.values), inducing.heads)
    mix = shares.expand(-1, inducing.heads)[None]
    weights = mixed_weights(query, key, mix.to(query), bags.lengths, inducing.scale)
    return np.asarray(weights.double().mean(1).cpu().numpy())


def gather_row(
    row: Floats,
    values: Tensor,
    project: Callable[[Tensor], Tensor],
    keys: Tensor,
    *,
    scale: float,
    counts: Tensor | None = None,
) -> Tensor:
    """Return ``Σ_n r_n softmax_m(q_n k_m)`` for tokens that read m others, (m, H), in steps that bound memory.

    Parameters
    ----------
    row : (n,) float64
    values : (n, E)
        Tokens.
    project : callable
        Tokens (c, E) to queries (c, H · d).
    keys : (m, H, d)
    scale : float
    counts : (m,) bool or float, optional
        How many equal keys each one stands for; 0 for none.
    """
    total = keys.new_zeros(keys.shape[:2])
    weights = torch.from_numpy(row).to(keys)
    for part, share in zip(torch.split(values, ROWS_PER_STEP), torch.split(weights, ROWS_PER_STEP), strict=True):
        scores = torch.einsum("nhd,mhd->nmh", _by_head(project(part), keys.shape[1]), keys) * scale
        if counts is not None:
            scores = scores + counts.to(scores.dtype).log()[:, None]
        total += torch.einsum("n,nmh->mh", share, scores.softmax(1))
    return total


def _by_head(values: Tensor, heads: int) -> Tensor:
    split: Tensor = torch.unflatten(values, -1, (heads, -1))
    return split


@trace_attention.register(Gdat)
@torch.no_grad()
def _of_gdat(model: Gdat, pack: PackedBags) -> Trace:
    blocks = [block for block in model.blocks if isinstance(block, GdatBlock)]
    with inputs_of([block.norm1 for block in blocks]) as seen:
        output = model(pack)
    groups = Groups.of(pack.lengths, model.region_size, model.grouping, pack.values.device, padding=model.padding)
    layers = [partial(_through_groups, block, calls[0], groups) for block, calls in zip(blocks, seen, strict=True)]
    return Trace(_pooling_weights(output, heads=1)[:, 0], layers, lambda row: row)


@torch.no_grad()
def _through_groups(block: GdatBlock, tokens: Tensor, groups: Groups, row: Floats) -> Floats:
    """Return the row after a GDAT block: tiles to groups, and these to tiles, plus the tiles' own tenth."""
    attention = block.attn
    normed = block.norm1(tokens)
    padded = normed.new_zeros(sum(groups.lengths), normed.shape[1]).index_copy(0, groups.padded, normed)
    means = torch.segment_reduce(padded, "mean", lengths=groups.sizes, axis=0)[groups.token]  # (1, m, E)
    projections = [partial(_project_third, attention.qkv, third) for third in range(2)]
    keys = _by_head(projections[1](means[0]), attention.heads)
    counts = groups.present[0]
    shares = gather_row(row, normed, projections[0], keys, scale=attention.scale, counts=counts)
    query, key = (
        _by_head(project(part), attention.heads) for project, part in zip(projections, (means, padded), strict=True)
    )
    mix = shares.mean(1, keepdim=True).expand(-1, attention.heads)[None]
    weights = mixed_weights(query, key, mix.to(query), groups.lengths, attention.scale)[groups.padded]
    return np.asarray(weights.double().mean(1).cpu().numpy()) + GDAT_OWN_SHARE * row


def _project_third(qkv: nn.Linear, third: int, values: Tensor) -> Tensor:
    """Return the queries (0), keys (1) or values (2) of a joint projection."""
    width = qkv.out_features // 3
    chosen = slice(third * width, (third + 1) * width)
    bias = None if qkv.bias is None else qkv.bias[chosen]
    return torch.nn.functional.linear(values, qkv.weight[chosen], bias)


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
        project = partial(_project_third, self.layer.to_qkv, 0)
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
        return _by_head(_project_third(self.layer.to_qkv, number, self.normed), self.layer.heads)


@trace_attention.register(TransMil)
@torch.no_grad()
def _of_transmil(model: TransMil, pack: PackedBags) -> Trace:
    layers = (model.layer1, model.layer2)
    with inputs_of([layer.norm for layer in layers]) as seen:
        model(pack)
    layout = model.layout(pack)
    steps = [partial(_through_landmarks, layer, calls[0], layout) for layer, calls in zip(layers, seen, strict=True)]
    start = np.zeros(len(layout.source))
    start[int(layout.first[0])] = 1.0

    def to_tiles(row: Floats) -> Floats:
        return np.asarray(layout.per_instance(torch.from_numpy(row)[:, None].to(layout.instances.device))[:, 0].cpu())

    return Trace(start, steps, to_tiles)


@torch.no_grad()
def _through_landmarks(layer: NystromLayer, tokens: Tensor, layout: TokenBags, row: Floats) -> Floats:
    """Return the row after a Nyström layer, mean over heads; entries may be negative."""
    factors = NystromFactors.of(layer, tokens, layout)
    weights = factors.from_landmarks(factors.to_landmarks(row))
    return np.asarray(weights.double().mean(1).cpu().numpy())
