"""ILRA: tiles are rewritten through a few learned tokens, a low-rank bottleneck, and read out by a learned seed.

Xiang, Zhang: Exploring low-rank property in multiple instance learning for whole slide image classification, ICLR 2023,
https://openreview.net/forum?id=01KmhBsEPFO.

1. A block of multi-head attention: ``o = LN(q + W_o attention(W_q q, W_k k, W_v v))`` with ``q = F_q Q``, ``k = F_k
   K``, ``v = F_v K`` (two linear maps after each other, as in the code), then ``o ← LN(o + relu(F_o o))``, and, where
   it is gated, ``o ← o ⊙ silu(G Q)``. Without `layer_norm`, LN is left out.
2. A gated attention block: learned tokens L (m × E) read the bag, ``H = block(L, X)``, and every tile reads these,
   ``X ← block(X, H)``, both gated. Cost and memory grow with n m, not with n².
3. After all blocks a learned seed reads the bag by an ungated block, and ``logits = W z + b``. Scores are those of the
   seed, per head.

Deviations from the authors' code: the pretraining of the encoder, the other half of the paper, is not part of it.
Biases start at 0.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from eosin.errors import ConfigError
from eosin.kernels import attention_pool
from eosin.mil._attention import bag_attention, by_rows, instance_attention
from eosin.mil._layers import as_dtype, initialise
from eosin.mil._recipe import RECIPES, Component, Recipe, Training
from eosin.mil._rollout import by_head
from eosin.mil.bags import PackedBags
from eosin.mil.options import Count
from eosin.mil.slots import AGGREGATORS, Aggregator, AttentionOutput


@AGGREGATORS.register("ilra")
class Ilra(Aggregator):
    """Low-rank blocks and pooling by a learned seed, equations 1 to 3.

    Parameters
    ----------
    in_dim, n_outputs
        Feature width D and logits K.
    width : int
        Width E of a tile after the first block.
    layers, heads : int
        Blocks of equation 2, and attention heads, which divide the width.
    tokens : int
        Rank m.
    layer_norm : bool
        Of equation 1.
    """

    output_type = AttentionOutput

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        *,
        width: Count = 256,
        layers: Count = 2,
        heads: Count = 8,
        tokens: Count = 2,
        layer_norm: bool = False,
    ) -> None:
        if width % heads:
            raise ConfigError(f"ilra: {heads} heads do not divide the width {width}; choose another width")
        super().__init__(in_dim, n_outputs, embed_dim=width)
        widths = (in_dim, *[width] * (layers - 1))
        self.blocks = nn.ModuleList(
            LowRank(fan_in, width, heads=heads, tokens=tokens, layer_norm=layer_norm) for fan_in in widths
        )
        self.seed = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, width)))
        self.pool = Block(width, width, width, heads=heads, layer_norm=layer_norm, gated=False)
        self.classifier = nn.Linear(width, n_outputs)
        initialise(self, "xavier")

    def forward(self, bags: PackedBags) -> AttentionOutput:
        """Return logits, bag embeddings, scores of the seed and rewritten instances."""
        for block in self.blocks:
            bags = bags.with_values(block(bags))
        key, value = (by_rows(part, bags.values) for part in (self.pool.keys, self.pool.values))  # (N, H, d)
        query = self.pool.queries(self.seed)[0]  # (H, d)
        scores = torch.einsum("nhd,hd->nh", key, query) * query.shape[1] ** -0.5
        heads = scores.shape[1]
        pooled = attention_pool(scores, value.flatten(1), bags.cu_seqlens)[
            0
        ]  # (B, H, E), of which each head has a part
        read = pooled.view(bags.n_bags, heads, heads, -1).diagonal(dim1=1, dim2=2).mT.flatten(1)
        bag = self.pool.finish(self.seed, as_dtype(read, self.classifier.weight))
        return AttentionOutput(self.classifier(bag), bag, scores, bags.values)


class LowRank(nn.Module):
    """A block of equation 2.

    Parameters
    ----------
    in_dim, width, heads, tokens, layer_norm
        Width of its instances, and the options of the aggregator.
    """

    def __init__(self, in_dim: int, width: int, *, heads: int, tokens: int, layer_norm: bool) -> None:
        super().__init__()
        self.tokens = nn.Parameter(nn.init.xavier_uniform_(torch.empty(tokens, width)))
        self.gather = Block(width, in_dim, width, heads=heads, layer_norm=layer_norm, gated=True)
        self.spread = Block(in_dim, width, width, heads=heads, layer_norm=layer_norm, gated=True)

    def forward(self, bags: PackedBags) -> Tensor:
        """Return rewritten instances (N, E)."""
        values, lengths = bags.values, bags.lengths
        key, value = (by_rows(part, values) for part in (self.gather.keys, self.gather.values))
        query = self.gather.queries(self.tokens).to(key.dtype).expand(bags.n_bags, -1, -1, -1)
        read = bag_attention(query, key, value, lengths, key.shape[2] ** -0.5).flatten(2)  # (B, m, E)
        hidden = self.gather.finish(self.tokens, read)
        query = by_rows(self.spread.queries, values)
        key, value = self.spread.keys(hidden), self.spread.values(hidden)  # (B, m, H, d)
        read = instance_attention(query, key, value, lengths, query.shape[2] ** -0.5).flatten(1)
        return by_rows(self.spread.finish, values, read)


class Block(nn.Module):
    """Multi-head attention of equation 1, around an attention that its user computes.

    Parameters
    ----------
    query_dim, key_dim, width : int
    heads, layer_norm
        Of the aggregator.
    gated : bool
    """

    def __init__(self, query_dim: int, key_dim: int, width: int, *, heads: int, layer_norm: bool, gated: bool) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(query_dim, width)
        self.key, self.value = (nn.Linear(key_dim, width) for _ in range(2))
        self.inner_query, self.inner_key, self.inner_value, self.inner_out, self.ff = (
            nn.Linear(width, width) for _ in range(5)
        )
        self.norm_attn, self.norm_ff = (nn.LayerNorm(width) if layer_norm else nn.Identity() for _ in range(2))
        self.gate = nn.Linear(query_dim, width) if gated else None

    def queries(self, rows: Tensor) -> Tensor:
        """Return queries (..., H, d)."""
        return by_head(self.inner_query(self.query(rows)), self.heads)

    def keys(self, rows: Tensor) -> Tensor:
        """Return keys (..., H, d)."""
        return by_head(self.inner_key(self.key(rows)), self.heads)

    def values(self, rows: Tensor) -> Tensor:
        """Return values (..., H, d)."""
        return by_head(self.inner_value(self.value(rows)), self.heads)

    def finish(self, asked: Tensor, read: Tensor) -> Tensor:
        """Return the block's output (..., E) for what was asked with (..., Q) and what attention returned (..., E)."""
        out = self.norm_attn(self.query(asked) + self.inner_out(read))
        out = self.norm_ff(out + functional.relu(self.ff(out)))
        gated: Tensor = out if self.gate is None else out * functional.silu(self.gate(asked))
        return gated


RECIPE = Recipe(
    aggregator=Component(name="ilra", options={"tokens": 1, "layer_norm": True}),
    training=Training(optimizer="adam", lr=1e-4, weight_decay=0.0, epochs=100, patience=20, schedule="cosine"),
)
RECIPES.add("ilra", RECIPE)
