"""R²T-MIL: tiles are embedded again by attention within regions of the list and between them, then pooled.

Tang, Zhou, Huang, Zhu, Zhang, Liu: Feature re-embedding: towards foundation model-level performance in computational
pathology, CVPR 2024, https://arxiv.org/abs/2402.17228.

1. ``x = act(W x + b)``. The list of tiles is laid out in a square of H × H, H = ⌈√n⌉ raised to a multiple of the
   number R of regions per side, zeros at the end; regions are the R² squares of s² = (H / R)² places.
2. Within each region: ``q, k, v`` are linear in ``LN(x)``, of the zeros their biases; per head ``A = softmax(S +
   conv(S))`` with ``S = q kᵀ / √d`` and a convolution of `taps` weights along the queries (EPEG); ``x ← x + W A v +
   b``. As the convolution of S is S of convolved queries, ``S + conv(S) = (q + conv(q)) kᵀ / √d``.
3. Between regions, `cross_regions` per side whatever R is: ``l = Φ LN(x)``, of the zeros 0, gives each of `tokens`
   tokens of a region by ``softmax(l)`` over its places; the tokens of one number attend to each other over all regions
   as in equation 2, without EPEG. A place gets back ``Σ_t softmax_t(l) · l̃_t · token_t``, l̃ being l scaled to [0, 1]
   within the region; ``x ← x + `` that.
4. ``h = LN(x)``, or LN(x + x_0) with `shortcut`; attention pooling without biases; ``logits = W z + b``.

Deviations from the authors' code. The bias of the convolution, which the softmax takes away, is left out, and so are
parts that the code keeps "only for ablation": other attention, a feed-forward layer, position encodings, the least
number of tiles. Their recipes differ in `taps`, `tokens`, `cross_heads` and `shortcut` from cohort to cohort; here they
are the defaults of the class.

Memory: from `CHECKPOINT_ROWS` tiles on, each layer is computed again in the backward pass; attention within regions
never holds a map. Time grows with n² / R².
"""

import copy
import math
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from eosin.errors import ConfigError
from eosin.mil._attention import by_rows, recomputed
from eosin.mil._closed_forms import ReadoutBag
from eosin.mil._layers import Activation, Attention, AttentionActivation, as_dtype, embedding, initialise
from eosin.mil._recipe import RECIPES, Component, Recipe, Training
from eosin.mil.bags import PackedBags
from eosin.mil.options import Count, Dropout, Whole
from eosin.mil.slots import AGGREGATORS, Aggregator, AttentionOutput
from eosin.mil.subsets import Floats, Value, as_array, slope_of

FLAT = 1e-8  # added to the range of equation 3


@AGGREGATORS.register("rrt")
class Rrt(Aggregator):
    """Re-embedding within and between regions, and attention pooling, equations 1 to 4.

    Parameters
    ----------
    in_dim, n_outputs
        Feature width D and logits K.
    width : int
        Width E of a tile.
    embed_activation, dropout
        Of equation 1.
    layers, heads : int
        Layers of equation 2, and their attention heads, which divide the width.
    regions, cross_regions : int
        Regions per side of equation 2, R, and of equation 3.
    taps : int
        Of equation 2, an odd number; 0 leaves the convolution out.
    cross : bool
        Whether there is equation 3.
    tokens, cross_heads : int
        Of equation 3: tokens per region, and heads, which divide the width.
    scores : {"linear", "deep"}
        Whether Φ is linear or has a hidden layer of a fourth of the width with tanh.
    shortcut : bool
        Of equation 4.
    block_dropout : float
        Behind the projections of equations 2 and 3.
    hidden, gated, pool_activation
        Of the attention pooling.
    """

    output_type = AttentionOutput
    order_dependent = True

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        *,
        width: Count = 512,
        embed_activation: Activation = "relu",
        dropout: Dropout = 0.25,
        layers: Whole = 1,
        heads: Count = 8,
        regions: Count = 8,
        taps: Whole = 15,
        cross: bool = True,
        cross_regions: Count = 8,
        tokens: Count = 3,
        cross_heads: Count = 8,
        scores: Literal["linear", "deep"] = "linear",
        shortcut: bool = False,
        block_dropout: Dropout = 0.1,
        hidden: Count = 128,
        gated: bool = False,
        pool_activation: AttentionActivation = "relu",
    ) -> None:
        for count in (heads, cross_heads):
            if width % count:
                raise ConfigError(f"rrt: {count} heads do not divide the width {width}; choose another width")
        if taps and taps % 2 == 0:
            raise ConfigError(f"rrt: taps {taps} is even; the convolution needs an odd number, or 0 for none")
        super().__init__(in_dim, n_outputs, embed_dim=width)
        self.regions, self.cross_regions = regions, cross_regions
        self.shortcut = shortcut
        self.embed = embedding(in_dim, (width,), activation=embed_activation, dropout=dropout)
        self.within = nn.ModuleList(
            WithinRegions(width, heads=heads, taps=taps, dropout=block_dropout) for _ in range(layers)
        )
        self.between = (
            BetweenRegions(width, heads=cross_heads, tokens=tokens, deep=scores == "deep", dropout=block_dropout)
            if cross
            else None
        )
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, hidden=hidden, gated=gated, activation=pool_activation, bias=False)
        self.classifier = nn.Linear(width, n_outputs)
        initialise(self, "xavier")

    def forward(self, bags: PackedBags) -> AttentionOutput:
        """Return logits, bag embeddings, scores and the tiles of equation 4."""
        return self.aggregate(bags.with_values(by_rows(self.embed, bags.values)))

    def aggregate(self, bags: PackedBags) -> AttentionOutput:
        """Return the output for bags of embedded instances."""
        tiles = torch.cat([self._embedded_again(rows) if len(rows) else rows for rows in bags.unpack()])
        tiles = by_rows(self.norm, tiles + bags.values if self.shortcut else tiles)
        pool = self.attention.pool(tiles, bags)
        bag = as_dtype(pool.pooled[:, 0], self.classifier.weight)
        return AttentionOutput(self.classifier(bag), bag, pool.scores, tiles)

    def _embedded_again(self, tiles: Tensor) -> Tensor:
        """Return the tiles (n, E) of one bag after equations 2 and 3."""
        within, between = (
            region_places(len(tiles), count).to(tiles.device) for count in (self.regions, self.cross_regions)
        )
        for layer in self.within:
            tiles = recomputed(partial(layer, places=within), len(tiles), tiles)
        if self.between is None:
            return tiles
        return recomputed(partial(self.between, places=between), len(tiles), tiles)

    @override
    def weight_gradient(self, bags: PackedBags, value: Value) -> Floats:
        with torch.no_grad():
            output = self(bags)
        scores, values = (part.detach().double().cpu()[:, None] for part in (output.scores, output.instances))
        layer = copy.deepcopy(self.classifier).double().cpu()
        form = ReadoutBag(scores, values, lambda pooled: layer(pooled.flatten(1)))
        return as_array(torch.from_numpy(form.log_weight_gradient()) @ slope_of(output.logits[0], value).double().cpu())


def region_places(n: int, regions: int) -> Tensor:
    """Return the tile at each place of each region, (R², s²) int64; n stands for a zero behind the list."""
    side = -(-(math.isqrt(n - 1) + 1) // regions) * regions
    grid = torch.arange(side * side).view(regions, side // regions, regions, side // regions)
    return grid.permute(0, 2, 1, 3).reshape(regions**2, -1).clamp(max=n)


def laid_out(rows: Tensor, places: Tensor) -> Tensor:
    """Return rows (n, E) by regions, (R², s², E), zeros where there is no tile."""
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])[places]


def listed(regions: Tensor, places: Tensor, n: int) -> Tensor:
    """Return what lies in regions, (R², s², E), as the list of tiles (n, E)."""
    return regions.flatten(0, 1)[places.flatten().argsort(stable=True)[:n]]


class InnerAttention(nn.Module):
    """Attention of equation 2 within each row of tokens.

    Parameters
    ----------
    width, heads, taps
        As of the aggregator.
    """

    def __init__(self, width: int, *, heads: int, taps: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.epeg = (
            nn.Conv2d(heads, heads, (taps, 1), padding=(taps // 2, 0), groups=heads, bias=False) if taps else None
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Attend within each row: (W, P, E) -> (W, P, E)."""
        parts = torch.unflatten(self.qkv(tokens), 2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)  # (W, H, P, d)
        query = query if self.epeg is None else query + self.epeg(query)
        read = functional.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.proj(read.transpose(1, 2).flatten(2))
        return out


class WithinRegions(nn.Module):
    """A layer of equation 2.

    Parameters
    ----------
    width, heads, taps, dropout
        As of the aggregator.
    """

    def __init__(self, width: int, *, heads: int, taps: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attend = InnerAttention(width, heads=heads, taps=taps)
        self.dropout = dropout

    def forward(self, tiles: Tensor, places: Tensor) -> Tensor:
        """Return the tiles (n, E) of one bag, whose regions have these places."""
        read = self.attend(laid_out(self.norm(tiles), places))
        return tiles + functional.dropout(listed(read, places, len(tiles)), self.dropout, self.training)


class BetweenRegions(nn.Module):
    """Equation 3.

    Parameters
    ----------
    width, heads, tokens, dropout
        As of the aggregator.
    deep : bool
        Whether Φ has a hidden layer.
    """

    def __init__(self, width: int, *, heads: int, tokens: int, deep: bool, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        inner = max(1, width // 4)
        self.scores: nn.Module = nn.Linear(width, tokens, bias=False)
        if deep:
            self.scores = nn.Sequential(
                nn.Linear(width, inner, bias=False), nn.Tanh(), nn.Linear(inner, tokens, bias=False)
            )
        self.attend = InnerAttention(width, heads=heads, taps=0)
        self.dropout = dropout

    def forward(self, tiles: Tensor, places: Tensor) -> Tensor:
        """Return the tiles (n, E) of one bag, whose regions have these places."""
        rows = laid_out(self.norm(tiles), places)
        scores = self.scores(rows)  # (R², s², k)
        tokens = scores.softmax(1).mT @ rows  # (R², k, E)
        tokens = functional.dropout(self.attend(tokens.transpose(0, 1)), self.dropout, self.training).transpose(0, 1)
        least, most = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
        shares = scores.softmax(2) * (scores - least) / (most - least + FLAT)
        return tiles + listed(shares @ tokens, places, len(tiles))


RECIPES.add(
    "rrt",
    Recipe(
        aggregator=Component(name="rrt", options={"pool_activation": "tanh"}),
        training=Training(optimizer="adam", lr=2e-4, weight_decay=1e-5, epochs=200, schedule="cosine", patience=20),
    ),
)
