"""Set Transformer: attention between the instances of a bag and a few learned tokens, in both directions.

Lee, Lee, Kim, Kosiorek, Choi, Teh: Set Transformer: A framework for attention-based permutation-invariant neural
networks, ICML 2019, https://arxiv.org/abs/1810.00825.

1. ``MAB(X, Y)`` with q, k, v linear maps of X, Y, Y to width d and h heads: ``O_j = q_j + softmax(q_j k_jᵀ / √d)
   v_j`` for each head j, then ``O ← LN(O)``, ``O ← O + relu(W O + b)``, ``O ← LN(O)``; the norms only with
   `layer_norm`.
2. ``SAB(X) = MAB(X, X)``; ``ISAB(X) = MAB(X, MAB(I, X))`` with m learned tokens I; ``PMA(X) = MAB(S, X)`` with
   learned seeds S, and with `pma_ff` ``MAB(S, X + relu(W X + b))``.
3. As a classifier of bags: embedding, `isab_layers` ISAB, PMA, `sab_layers` SAB on the seeds, ``logits = W z + b`` on
   the seeds beside each other.
4. Scores are the PMA's, one row per seed and head.

Where the authors' code differs from the paper, the defaults are the code's: the scale is the root of the whole width
and not of a head's (`scale="model"`), the residual adds the projected query, no map mixes the heads before the
feed-forward layer, which is one linear layer, PMA reads its input directly (the paper has `pma_ff`), and there is no
layer norm. With the norms, which the paper has, the recipe does not find a few instances among thousands: on planted
signals (docs/methods.md) the same training ends at chance with them and at an AUC of 1.00 without. That is a matter of
the ISAB; a PMA alone behind an embedding had 1.00 with the norms and 0.55 without (one seed).

Deviations from the authors' code. The seeds of a bag make its logits together; there each has its own. Their script for
point clouds drops out half before and after the pooling; here dropout follows the embedding, which they do not have.

Learned tokens read the instances by `few_query_attention`, in memory that does not grow with the bag. The instances'
side of every block is computed in chunks with its intermediates forgotten from `CHECKPOINT_ROWS` instances on; the
only loop runs over these chunks. A pack of small bags is read as a whole instead, without a loop over bags and heads,
and where its instances are few beside the learned tokens, the queries are folded into the maps of keys and values as
in the PMA. In the PMA a seed's query is folded into the key map, so that neither keys nor values of the instances are
computed: ``q · (W_k x + b_k) = (W_kᵀ q) · x + q · b_k``, ``Σ a (W_v x + b_v) = W_v Σ a x + b_v``.
"""

import re
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from eosin.errors import ConfigError
from eosin.kernels import attention_pool, few_key_attention, few_query_attention
from eosin.mil import _attention as attention
from eosin.mil._attention import bag_attention, by_rows, instance_attention, mixed_weights, recomputed
from eosin.mil._layers import as_dtype, embedding
from eosin.mil._recipe import RECIPES, Component, Recipe, Training
from eosin.mil._rollout import Trace, by_head, gather_row, inputs_of
from eosin.mil.bags import PackedBags
from eosin.mil.layouts import LAYOUTS, Found, Layout, Taker, Tensors, block_diagonal
from eosin.mil.options import Count, Dropout, Whole
from eosin.mil.slots import AGGREGATORS, Aggregator, AttentionOutput
from eosin.mil.subsets import Floats, Value, as_array

SMALL_BAG = 256  # most instances of the longest bag of a pack that a CPU reads as a whole

Scale = Literal["model", "head"]


@AGGREGATORS.register("set_transformer")
class SetTransformer(Aggregator):
    """Set Transformer for bags, equations 1 to 4.

    Parameters
    ----------
    in_dim, n_outputs
        Feature width D and logits K.
    embed_dims : tuple of int
        Widths of layers before the first block; none lets it read the features.
    width : int
        Width d of all blocks.
    heads : int
        Attention heads; divides the width.
    tokens : int
        Learned tokens m of an ISAB.
    isab_layers, sab_layers : int
        Blocks before and after the pooling.
    seeds : int
        Seeds of the pooling.
    layer_norm : bool
        Norms inside the blocks.
    scale : {"model", "head"}
        Softmax of ``q k / √d`` with d the width, or that of one head.
    pma_ff : bool
        A feed-forward layer before the pooling.
    dropout : float
        After the embedding.
    """

    output_type = AttentionOutput

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        *,
        embed_dims: tuple[Count, ...] = (512,),
        width: Count = 512,
        heads: Count = 8,
        tokens: Count = 64,
        isab_layers: Whole = 2,
        sab_layers: Whole = 0,
        seeds: Count = 1,
        layer_norm: bool = False,
        scale: Scale = "model",
        pma_ff: bool = False,
        dropout: Dropout = 0.0,
    ) -> None:
        if width % heads:
            raise ConfigError(f"set_transformer: {heads} heads do not divide the width {width}; choose another width")
        super().__init__(in_dim, n_outputs, embed_dim=seeds * width)
        self.embed = embedding(in_dim, embed_dims, dropout=dropout)
        first = (in_dim, *embed_dims)[-1]
        build = partial(MultiheadBlock, heads=heads, layer_norm=layer_norm, scale=scale)
        widths = [first, *[width] * isab_layers]
        self.encoder = nn.ModuleList(
            InducedBlock(tokens, build(width, before, width), build(before, width, width)) for before in widths[:-1]
        )
        self.pool = PoolingBlock(seeds, build(width, widths[-1], width), feed_forward=pma_ff)
        self.decoder = nn.ModuleList(build(width, width, width) for _ in range(sab_layers))
        self.classifier = nn.Linear(seeds * width, n_outputs)

    def forward(self, bags: PackedBags) -> AttentionOutput:
        """Return logits, pooled seeds, the pooling's scores and the instances that it reads."""
        return self.aggregate(bags.with_values(by_rows(self.embed, bags.values)))

    def aggregate(self, bags: PackedBags) -> AttentionOutput:
        """Return the output for bags of embedded instances."""
        for block in self.encoder:
            bags = bags.with_values(block(bags))
        seeds, scores, instances = self.pool(bags)  # (B, k, d)
        for block in self._blocks()[1]:
            seeds = block.attend_within(seeds)
        bag = seeds.flatten(1)
        return AttentionOutput(self.classifier(bag), bag, scores, instances)

    def _blocks(self) -> "tuple[list[InducedBlock], list[MultiheadBlock]]":
        """Return encoder and decoder under their own types."""
        encoder = [block for block in self.encoder if isinstance(block, InducedBlock)]
        return encoder, [block for block in self.decoder if isinstance(block, MultiheadBlock)]

    @override
    @torch.no_grad()
    def trace(self, bags: PackedBags) -> Trace:
        """Go from the seeds through their own attention, the pooling's weights, and each ISAB as two factors.

        The factors are tiles to inducing points and back, each averaged over heads.
        """
        encoder, decoder = self._blocks()
        with inputs_of([*encoder, *(block.query for block in decoder)]) as seen:
            output = self(bags)
        inputs = [calls[0] for calls in seen]
        given, seeds = inputs[: len(encoder)], inputs[len(encoder) :]
        read = np.full(self.pool.seeds.shape[1], 1 / self.pool.seeds.shape[1])
        for block, tokens in reversed(list(zip(decoder, seeds, strict=True))):
            read = 0.5 * read + 0.5 * read @ block.attention_within(tokens[0])
        weights = by_head(output.scores.double().softmax(0), len(read)).mean(2)  # (n, k), mean over heads
        layers = [partial(_through_points, *parts) for parts in zip(encoder, given, strict=True)]
        return Trace(as_array(weights) @ read, layers, lambda row: row)

    @override
    def weight_gradient(self, bags: PackedBags, value: Value) -> Floats:
        """Derive by ``scores + log w`` of the pooling, through the seeds' own layers."""
        with torch.no_grad(), inputs_of([self.pool]) as seen:
            self(bags)
        given: PackedBags = seen[0][0]
        with torch.enable_grad():
            seeds, scores, _ = self.pool(given.with_values(given.values.detach().requires_grad_()))
            for block in self._blocks()[1]:
                seeds = block.attend_within(seeds)
            (gradient,) = torch.autograd.grad(value(self.classifier(seeds.flatten(1))[0]), scores)
        return as_array(gradient.double().sum(1))


@torch.no_grad()
def _through_points(block: "InducedBlock", bags: PackedBags, row: Floats) -> Floats:
    """Return the row after an ISAB: tiles to inducing points, and these to tiles."""
    point, inducing, tokens = block.point, block.inducing, block.tokens
    summary = inducing.read_bags(tokens[0], bags)  # (1, m, d)
    keys = by_head(point.key(summary[0]), point.heads)
    shares = gather_row(row, bags.values, point.query, keys, scale=point.scale).mean(1, keepdim=True)  # (m, 1)
    query, key = by_head(inducing.query(tokens), inducing.heads), by_head(inducing.key(bags.values), inducing.heads)
    mix = shares.expand(-1, inducing.heads)[None]
    return as_array(mixed_weights(query, key, mix.to(query), bags.lengths, inducing.scale).double().mean(1))


class MultiheadBlock(nn.Module):
    """The block of equation 1.

    Parameters
    ----------
    query_dim, key_dim, width : int
        Widths of X, of Y and of the result.
    heads, layer_norm, scale
        As `SetTransformer`.
    """

    def __init__(
        self, query_dim: int, key_dim: int, width: int, *, heads: int, layer_norm: bool = False, scale: Scale = "model"
    ) -> None:
        super().__init__()
        self.query = nn.Linear(query_dim, width)
        self.key = nn.Linear(key_dim, width)
        self.value = nn.Linear(key_dim, width)
        self.ff = nn.Linear(width, width)
        self.norm_attn, self.norm_ff = (nn.LayerNorm(width) if layer_norm else nn.Identity() for _ in range(2))
        self.heads = heads
        self.scale = (width if scale == "model" else width // heads) ** -0.5

    def forward(self, query: Tensor, keys: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Let the tokens of each bag read its instances: (B, m, X), (N, Y) -> (B, m, d)."""
        projected = self.query(query)
        read = bag_attention(
            self._split(projected), self._split(self.key(keys)), self._split(self.value(keys)), lengths, self.scale
        )
        return self._finish(projected + read.flatten(2))

    def read_bags(self, query: Tensor, bags: PackedBags) -> Tensor:
        """Let the same tokens read the instances of every bag: (m, X), (N, Y) -> (B, m, d)."""
        projected = self.query(query)
        key, value = self.key, self.value
        if _small(bags):
            tokens = self._split(projected).expand(bags.n_bags, -1, -1, -1)
            keys, values = self._split(key(bags.values)), self._split(value(bags.values))
            return self._finish(projected + bag_attention(tokens, keys, values, bags.lengths, self.scale).flatten(2))
        read = few_query_attention(
            projected,
            bags.values,
            key.weight,
            key.bias,
            value.weight,
            value.bias,
            bags.cu_seqlens,
            heads=self.heads,
            scale=self.scale,
        )
        return self._finish(projected + as_dtype(read, projected))

    def read_tokens(self, query: Tensor, keys: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Let instances read the tokens of their bag: (N, X), (B, m, Y) -> (N, d)."""
        projected = self.query(query)
        read = few_key_attention(
            projected, self.key(keys), self.value(keys), cu_seqlens, heads=self.heads, scale=self.scale
        )
        return self._finish(projected + as_dtype(read, projected))

    def read_small(self, query: Tensor, keys: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Do as `read_tokens` for a pack of small bags."""
        projected = self.query(query)
        heads, (n_bags, m, _), width = self.heads, keys.shape, projected.shape[1]
        if len(query) * (width + heads * m) < n_bags * m * width:
            read = self._read_folded(self._split(projected), keys, lengths)
        else:
            tokens, values = self._split(self.key(keys)), self._split(self.value(keys))
            read = instance_attention(self._split(projected), tokens, values, lengths, self.scale).flatten(1)
        return self._finish(projected + read)

    def _read_folded(self, query: Tensor, keys: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Let queries (N, H, e) read the tokens of their bag, not projected: -> (N, d)."""
        k_weight, v_weight = (torch.unflatten(part.weight, 0, (self.heads, -1)) for part in (self.key, self.value))
        folded = torch.einsum("nhe,hey->nhy", query, k_weight).flatten(0, 1)[:, None]  # every head a row of its own
        tokens = keys[:, :, None]
        rows = tuple(self.heads * length for length in lengths)
        read = instance_attention(folded, tokens, tokens, rows, self.scale).view(*query.shape[:2], keys.shape[2])
        values = torch.einsum("nhy,hey->nhe", read, v_weight).flatten(1) + self.value.bias
        return values + 0 * self.key.bias.sum()  # it shifts all scores alike: its gradient is 0, not missing

    def attend_within(self, tokens: Tensor) -> Tensor:
        """Let the tokens of a bag read each other: (B, k, X) -> (B, k, d)."""
        projected = self.query(tokens)
        query, key, value = (
            self._split(part).transpose(1, 2) for part in (projected, self.key(tokens), self.value(tokens))
        )
        weights = (query @ key.mT * self.scale).softmax(-1)  # (B, H, k, k)
        return self._finish(projected + (weights @ value).transpose(1, 2).flatten(2))

    def attention_within(self, tokens: Tensor) -> Floats:
        """Return the attention of the tokens of one bag (k, X) to each other, mean over heads: (k, k)."""
        query, key = (self._split(part(tokens)).transpose(0, 1) for part in (self.query, self.key))
        return as_array((query @ key.mT * self.scale).softmax(-1).mean(0))

    def fold(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows (m * H, Y) and offsets (m * H,) that give the scores of projected queries (m, d)."""
        query = self._split(query) * self.scale  # (m, H, e)
        weight, bias = (torch.unflatten(part, 0, (self.heads, -1)) for part in (self.key.weight, self.key.bias))
        rows = torch.einsum("mhe,hey->mhy", query, weight)
        return rows.flatten(0, 1), (query * bias).sum(2).flatten()

    def finish_folded(self, query: Tensor, pooled: Tensor) -> Tensor:
        """Return the block's result for queries (m, d) from what each head pooled: (B, m, H, Y) -> (B, m, d)."""
        weight = torch.unflatten(self.value.weight, 0, (self.heads, -1))  # (H, e, Y)
        read = torch.einsum("bmhy,hey->bmhe", pooled, weight).flatten(2) + self.value.bias
        return self._finish(query + read)

    def _split(self, values: Tensor) -> Tensor:
        return torch.unflatten(values, -1, (self.heads, -1))

    def _finish(self, values: Tensor) -> Tensor:
        values = self.norm_attn(values)
        finished: Tensor = self.norm_ff(values + functional.relu(self.ff(values)))
        return finished


class InducedBlock(nn.Module):
    """ISAB: the tokens read the instances, the instances read the tokens; equation 2.

    Parameters
    ----------
    tokens : int
        Learned tokens m.
    inducing, point : MultiheadBlock
        The two blocks; the tokens are as wide as the first one's query.
    """

    def __init__(self, tokens: int, inducing: MultiheadBlock, point: MultiheadBlock) -> None:
        super().__init__()
        self.tokens = _learned(tokens, inducing.query.in_features)
        self.inducing = inducing
        self.point = point

    def forward(self, bags: PackedBags) -> Tensor:
        """Transform instances: (N, X) -> (N, d)."""
        summary = self.inducing.read_bags(self.tokens[0], bags)  # (B, m, d)
        if _small(bags):
            return self.point.read_small(bags.values, summary, bags.lengths)
        sizes, pieces = _row_chunks(bags)
        parts = [
            recomputed(partial(self.point.read_tokens, cu_seqlens=offsets), bags.n_instances, values, summary)
            for offsets, values in zip(pieces, torch.split(bags.values, sizes), strict=True)
        ]
        return torch.cat(parts)


class PoolingBlock(nn.Module):
    """PMA: learned seeds read the instances; equation 2.

    Parameters
    ----------
    seeds : int
    block : MultiheadBlock
    feed_forward : bool
        Apply a residual feed-forward layer to the instances first.
    """

    def __init__(self, seeds: int, block: MultiheadBlock, *, feed_forward: bool = False) -> None:
        super().__init__()
        self.seeds = _learned(seeds, block.query.in_features)
        self.block = block
        key_dim = block.key.in_features
        self.ff = nn.Linear(key_dim, key_dim) if feed_forward else None

    def forward(self, bags: PackedBags) -> tuple[Tensor, Tensor, Tensor]:
        """Return pooled seeds (B, k, d), scores (N, k * H) and the instances that they weigh (N, X)."""
        instances = bags.values
        if self.ff is not None:
            instances = instances + functional.relu(self.ff(instances))
        query = self.block.query(self.seeds[0])  # (k, d)
        scores = functional.linear(instances, *self.block.fold(query))
        pooled, _, _ = attention_pool(scores, instances, bags.cu_seqlens)  # (B, k * H, X)
        pooled = torch.unflatten(as_dtype(pooled, self.block.value.weight), 1, (len(query), -1))
        return self.block.finish_folded(query, pooled), scores, instances


def _learned(count: int, width: int) -> nn.Parameter:
    """Return tokens with the authors' initial spread: Xavier uniform of a (1, m, d) tensor."""
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, count, width)))


def _small(bags: PackedBags) -> bool:
    return bags.values.is_cpu and bags.max_length <= SMALL_BAG


def _row_chunks(bags: PackedBags) -> tuple[list[int], list[Tensor]]:
    """Cut a pack at every `CHECKPOINT_ROWS` rows: rows of each chunk, and the offsets of the bags within it."""
    rows = bags.n_instances
    size = max(1, attention.CHECKPOINT_ROWS)
    if rows <= size:
        return [rows], [bags.cu_seqlens]
    firsts = range(0, rows, size)
    offsets = [(bags.cu_seqlens - first).clamp(0, min(size, rows - first)) for first in firsts]
    return [min(size, rows - first) for first in firsts], offsets


def _read(taker: Taker) -> Found:
    """Read the authors' model; the outputs of its seeds, each read from its own seed, lie beside each other."""
    heads = taker.ask("heads")
    inducing = taker.take("enc.0.I", 1, None, None)
    tokens, width = inducing.shape[1:]
    taker.rest["enc.0.I"] = inducing
    tensors: Tensors = {}
    encoder = taker.numbers(r"enc\.(\d+)\.I")
    before: int | None = None
    for layer in encoder:
        tensors[f"encoder.{layer}.tokens"] = taker.take(f"enc.{layer}.I", 1, tokens, width)
        tensors |= _block(taker, f"enc.{layer}.mab0", f"encoder.{layer}.inducing", width, reads=(width, before))
        before = tensors[f"encoder.{layer}.inducing.key.weight"].shape[1]
        tensors |= _block(taker, f"enc.{layer}.mab1", f"encoder.{layer}.point", width, reads=(before, width))
        before = width
    tensors["pool.seeds"] = taker.take("dec.0.S", 1, None, width)
    seeds = tensors["pool.seeds"].shape[1]
    tensors |= _block(taker, "dec.0.mab", "pool.block", width, reads=(width, width))
    decoder = [layer for layer in taker.numbers(r"dec\.(\d+)\.mab\.fc_q\.weight") if layer]
    for number, layer in enumerate(decoder):
        tensors |= _block(taker, f"dec.{layer}.mab", f"decoder.{number}", width, reads=(width, width))
    last = taker.linear(f"dec.{len(decoder) + 1}", "", None, width)
    tensors["classifier.weight"] = block_diagonal([last[".weight"]] * seeds)
    tensors["classifier.bias"] = last[".bias"].repeat(seeds)
    options = {
        "embed_dims": (),
        "width": width,
        "heads": int(heads),
        "tokens": tokens,
        "isab_layers": len(encoder),
        "sab_layers": len(decoder),
        "seeds": seeds,
        "layer_norm": "pool.block.norm_attn.weight" in tensors,
    }
    first = "encoder.0.inducing.key.weight"
    return Found("Set Transformer", Component(name="set_transformer", options=options), tensors, reads_features=first)


def _block(taker: Taker, old: str, new: str, width: int, *, reads: tuple[int, int | None]) -> Tensors:
    """Return a block whose queries and keys have these widths."""
    query, key = reads
    tensors = taker.linear(f"{old}.fc_q", f"{new}.query", width, query)
    tensors |= taker.linear(f"{old}.fc_k", f"{new}.key", width, key)
    tensors |= taker.linear(f"{old}.fc_v", f"{new}.value", width, key) | taker.linear(
        f"{old}.fc_o", f"{new}.ff", width, width
    )
    for norm, ours in (("ln0", "norm_attn"), ("ln1", "norm_ff")):
        if taker.has(re.escape(f"{old}.{norm}") + r"\..*"):
            tensors |= taker.norm(f"{old}.{norm}", f"{new}.{ours}", width)
    return tensors


LAYOUTS.add("Set Transformer", Layout((r"enc\.0\.I", r"dec\.0\.S"), _read))

RECIPE = Recipe(
    aggregator=Component(
        name="set_transformer",
        options={"embed_dims": (), "width": 128, "heads": 4, "tokens": 32, "sab_layers": 2},
    ),
    training=Training(optimizer="adam", lr=1e-4, weight_decay=1e-5, epochs=50, patience=10, schedule="cosine"),
)
RECIPES.add("set_transformer", RECIPE)
