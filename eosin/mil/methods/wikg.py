"""WiKG: a graph with edges from each tile to a few others, over which tiles exchange what they know.

Li, Chen, Chu, Sun, Guan, Han, He: Dynamic graph representation with knowledge-aware attention for histopathology whole
slide image analysis, CVPR 2024, https://arxiv.org/abs/2403.07719.

1. ``x = lrelu(W x + b)``, then ``x ← (x + mean of the bag) / 2``; each tile has a head ``h = W_h x`` and a tail ``t =
   W_t x``.
2. Edges go to the `neighbours` tiles j with the largest ``w_ij = h_i · t_j / √E`` (``edges="similar"``, the
   paper), or to the tile itself and those that lie nearest (``edges="near"``, of equally near ones by direction), a
   graph of tile neighbourhoods. ``p_i = softmax_j(w_ij)`` over the edges of a tile.
3. ``r_ij = p_ij t_j + (1 - p_ij) h_i``; ``k_ij = Σ t_j · Σ tanh(h_i + r_ij)``, both sums over the width;
   ``m_i = Σ_j softmax_j(k_ij) t_j``; ``z_i = lrelu(W_1 (h_i + m_i)) + lrelu(W_2 (h_i ⊙ m_i))``.
4. Attention pooling with scores ``w · lrelu(V z)``, then ``logits = W LN(z_bag) + b``.

Deviations from the authors' code. The product of two sums in equation 3 is that of the code, and so is the choice of
``bi-interaction`` and attention pooling among several. Its layers `gate_U`, `gate_V` and `gate_W` are never called, and
left out. Bags of fewer tiles than edges have fewer edges. ``near`` is not in the code.

Memory: edges are found for some tiles at a time, and equation 3 is computed again in the backward pass. Time grows with
the square of the tiles for `similar` edges.
"""

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from eosin.kernels import attention_pool, segment_mean
from eosin.mil import _attention as attention
from eosin.mil._attention import by_rows
from eosin.mil._layers import as_dtype
from eosin.mil._neighbours import nearest_tiles
from eosin.mil._recipe import RECIPES, Component, Recipe
from eosin.mil.bags import PackedBags
from eosin.mil.options import Count, Dropout
from eosin.mil.slots import AGGREGATORS, Aggregator, AttentionOutput

EDGE_ROWS = 2**12  # tiles whose edges are computed at once in a large pack


@AGGREGATORS.register("wikg")
class WiKg(Aggregator):
    """A graph of tiles and attention pooling, equations 1 to 4.

    Parameters
    ----------
    in_dim, n_outputs
        Feature width D and logits K.
    width : int
        Width E of a tile.
    neighbours : int
        Edges of a tile.
    edges : {"similar", "near"}
        Whether they go to the tiles that answer it best, or to those that lie nearest on the slide.
    dropout : float
        After equation 3.
    """

    output_type = AttentionOutput

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        *,
        width: Count = 512,
        neighbours: Count = 6,
        edges: Literal["similar", "near"] = "similar",
        dropout: Dropout = 0.3,
    ) -> None:
        super().__init__(in_dim, n_outputs, embed_dim=width)
        self.neighbours = neighbours
        self.reads_places = edges == "near"  # type: ignore[misc]  # of this instance
        self.embed = nn.Linear(in_dim, width)
        self.head, self.tail, self.sums, self.products = (nn.Linear(width, width) for _ in range(4))
        self.scores = nn.Sequential(
            nn.Linear(width, max(1, width // 2)), nn.LeakyReLU(), nn.Linear(max(1, width // 2), 1)
        )
        self.dropout = dropout
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, n_outputs)

    def forward(self, bags: PackedBags) -> AttentionOutput:
        """Return logits, bag embeddings, scores and the tiles after the exchange."""
        values = by_rows(lambda rows: functional.leaky_relu(self.embed(rows)), bags.values)
        mean = segment_mean(values, bags.cu_seqlens).to(values.dtype)
        values = (values + mean[bags.bag_index()]) / 2
        head, tail = by_rows(self.head, values), by_rows(self.tail, values)
        to, there = self._edges(bags, head, tail)
        tiles = by_rows(partial(self._exchanged, tail), head, to, there, size=EDGE_ROWS)
        tiles = functional.dropout(tiles, self.dropout, self.training)
        scores = by_rows(self.scores, tiles)
        pooled = attention_pool(scores, tiles, bags.cu_seqlens)[0][:, 0]
        bag = self.norm(as_dtype(pooled, self.classifier.weight))
        return AttentionOutput(self.classifier(bag), bag, scores, tiles)

    @torch.no_grad()
    def _edges(self, bags: PackedBags, head: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows (N, k) of the tiles that edges go to, and which edges there are, (N, k) bool."""
        if self.reads_places:
            return nearest_tiles(self.require_places(bags), bags.lengths, self.neighbours)
        found = torch.arange(bags.n_instances, device=head.device)[:, None].repeat(1, self.neighbours)
        there = torch.zeros_like(found, dtype=torch.bool)
        start = 0
        for length, theirs in zip(bags.lengths, bags.unpack(tail), strict=True):
            count = min(length, self.neighbours)
            for piece in torch.split(
                torch.arange(start, start + length), max(1, attention.CHUNK_ELEMENTS // max(1, length))
            ):
                rows = slice(int(piece[0]), int(piece[-1]) + 1) if len(piece) else slice(start, start)
                found[rows, :count] = start + (head[rows] @ theirs.T).topk(count, 1).indices
                there[rows, :count] = True
            start += length
        return found, there

    def _exchanged(self, tail: Tensor, head: Tensor, to: Tensor, there: Tensor) -> Tensor:
        """Return equation 3 for some tiles (c, E) with edges (c, k)."""
        tails, hidden = tail[to], ~there  # (c, k, E)
        heads = head[:, None]
        weights = ((heads * tails).sum(2) * head.shape[1] ** -0.5).masked_fill(hidden, -torch.inf).softmax(1)[..., None]
        gate = torch.tanh(heads + weights * tails + (1 - weights) * heads)
        known = (tails.sum(2) * gate.sum(2)).masked_fill(hidden, -torch.inf).softmax(1)
        message = (known[..., None] * tails).sum(1)
        sums, products = self.sums(head + message), self.products(head * message)
        return functional.leaky_relu(sums) + functional.leaky_relu(products)


RECIPES.add("wikg", Recipe(aggregator=Component(name="wikg")))
RECIPES.add("wikg_near", Recipe(aggregator=Component(name="wikg", options={"edges": "near", "neighbours": 9})))
