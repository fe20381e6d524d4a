"""A plain transformer: a class token and all tiles attend to each other, and the class token answers.

Vaswani et al., Attention is all you need, NeurIPS 2017, https://arxiv.org/abs/1706.03762, with the class token of
Dosovitskiy et al., ICLR 2021, https://arxiv.org/abs/2010.11929; for slides: Wagner et al., Transformer-based biomarker
prediction from colorectal cancer histology, Cancer Cell 2023, https://doi.org/10.1016/j.ccell.2023.08.002, whose
successor STAMP (https://github.com/KatherLab/STAMP) has the layers below.

1. ``h = gelu(W x + b)``; a learned class token goes first.
2. In each layer ``t ← t + attention(LN(t))``, ``t ← t + W_2 gelu(W_1 LN(t))``; ``logits = W LN(t_class) + b``. Of the
   last layer only the class token is computed, since nothing else is read.
3. ``positions="alibi"``: the scores of two tiles are lowered by ``m_h`` times their distance in steps of the tile grid,
   ``m_h = 2^(-8 h / H)`` for heads h = 1 ... H (Press et al., ICLR 2022, https://arxiv.org/abs/2108.12409, with
   distances in the plane); the class token has no place. ``positions="sincos"`` adds to h the sines and cosines of both
   coordinates, a half of the width for each.
4. Scores are those of the class token in the last layer, before the softmax, per head.

Deviations from STAMP's code. Its ALiBi subtracts distances after the softmax, with learned factors, in µm over their
mean, so that far tiles get negative weights; here it is that of Press et al. Its training pads or samples bags to one
length; here bags have their own.

Memory: attention runs over some tokens at a time where a bag is large, and again in the backward pass. Time grows with
the square of the tiles; `training.max_instances_per_bag` bounds it.
"""

from collections.abc import Iterator
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from eosin.errors import ConfigError
from eosin.kernels import attention_pool, bag_offsets
from eosin.mil import _attention as attention
from eosin.mil._attention import by_rows, normed_linear
from eosin.mil._layers import Activation, as_dtype, embedding
from eosin.mil._recipe import RECIPES, Component, Recipe, Training
from eosin.mil._rollout import Trace
from eosin.mil.bags import PackedBags
from eosin.mil.layouts import LAYOUTS, Found, Layout, Taker
from eosin.mil.options import Count, Dropout
from eosin.mil.slots import AGGREGATORS, Aggregator, AttentionOutput
from eosin.mil.subsets import Floats, Value, as_array

LONGEST_WAVE = 10_000.0  # of the sines of equation 3, in steps of the grid over 2 π


@AGGREGATORS.register("transformer")
class Transformer(Aggregator):
    """Self-attention between all tiles of a bag, equations 1 to 4.

    Parameters
    ----------
    in_dim, n_outputs
        Feature width D and logits K.
    width : int
        Width E of a token.
    layers, heads : int
        Layers, and their attention heads; heads divide the width.
    feed_forward : int
        Width inside equation 2.
    embed_activation, dropout
        Of the layer before the attention.
    block_dropout : float
        Inside and after the feed-forward layers.
    positions : {"none", "alibi", "sincos"}
        How places of tiles are used, equation 3.
    """

    output_type = AttentionOutput

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        *,
        width: Count = 512,
        layers: Count = 2,
        heads: Count = 8,
        feed_forward: Count = 512,
        embed_activation: Activation = "gelu",
        dropout: Dropout = 0.25,
        block_dropout: Dropout = 0.25,
        positions: Literal["none", "alibi", "sincos"] = "none",
    ) -> None:
        if width % heads:
            raise ConfigError(f"transformer: {heads} heads do not divide the width {width}; choose another width")
        if positions == "sincos" and width % 4:
            raise ConfigError(f"transformer: positions=sincos needs a width that 4 divides; {width} is not")
        super().__init__(in_dim, n_outputs, embed_dim=width)
        self.positions = positions
        self.reads_places = positions != "none"  # type: ignore[misc]  # of this instance
        self.embed = embedding(in_dim, (width,), activation=embed_activation, dropout=dropout)
        self.cls_token = nn.Parameter(torch.randn(width))
        self.layers = nn.ModuleList(
            Layer(width, heads=heads, feed_forward=feed_forward, dropout=block_dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, n_outputs)

    def forward(self, bags: PackedBags) -> AttentionOutput:
        """Return logits, class tokens, scores of the last layer and instances."""
        return self.aggregate(bags.with_values(by_rows(self.embed, bags.values)))

    def aggregate(self, bags: PackedBags, *, log_weights: Tensor | None = None) -> AttentionOutput:
        """Return the output for bags of embedded instances; `log_weights` (N,) are added to the last scores."""
        tokens, groups = self._tokens(bags)
        *earlier, last = self._layers()
        for layer in earlier:
            tokens = layer(tokens, groups)
        classes, scores = last.class_tokens(tokens, groups, log_weights)
        bag = self.norm(classes)
        return AttentionOutput(self.classifier(bag), bag, scores, bags.values)

    def _tokens(self, bags: PackedBags) -> tuple[Tensor, "Tokens"]:
        values = bags.values
        places = self.require_places(bags) if self.reads_places else None
        if places is not None and self.positions == "sincos":
            values = values + waves(places, values.shape[1]).to(values.dtype)
        tokens = Tokens(bags.lengths, values.device, places if self.positions == "alibi" else None)
        return torch.cat([self.cls_token.to(values.dtype)[None], values])[tokens.source], tokens

    def _layers(self) -> list["Layer"]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    @override
    @torch.no_grad()
    def trace(self, bags: PackedBags) -> Trace:
        """Go from the class token through all layers, each map averaged over heads."""
        tokens, layout = self._tokens(bags.with_values(by_rows(self.embed, bags.values)))
        steps = []
        for layer in self._layers():
            steps.append(partial(layer.read_from, tokens, layout))
            tokens = layer(tokens, layout)
        start = np.zeros(1 + bags.n_instances)
        start[0] = 1.0
        return Trace(start, steps, lambda row: row[1:])

    @override
    def weight_gradient(self, bags: PackedBags, value: Value) -> Floats:
        """Derive by ``scores + log w`` with which the class token of the last layer reads the tiles."""
        with torch.no_grad():
            embedded = bags.with_values(by_rows(self.embed, bags.values))
        with torch.enable_grad():
            leaf = embedded.values.new_zeros(bags.n_instances, requires_grad=True)
            logits = self.aggregate(embedded, log_weights=leaf).logits[0]
            (slope,) = torch.autograd.grad(value(logits), leaf)
        return as_array(slope)


def waves(places: Tensor, width: int) -> Tensor:
    """Return sines and cosines of places (N, 2), (N, E): of x in the first half, of y in the second."""
    rates = LONGEST_WAVE ** -(torch.arange(width // 4, dtype=places.dtype, device=places.device) / (width // 4))
    angles = places[..., None] * rates  # (N, 2, E / 4)
    return torch.cat([angles.sin(), angles.cos()], 2).flatten(1)


class Tokens:
    """The tokens of a pack, of each bag its class token and its tiles, and how many of them are computed at once.

    Parameters
    ----------
    lengths : tuple of int
        Tiles per bag.
    device : torch.device
    places : (N, 2) float, optional
        Where tiles lie, for ALiBi.

    Attributes
    ----------
    source : (T,) int64
        Row of each token in the class token followed by the instances.
    first, tiles : (B,), (N,) int64
        Rows of class tokens and of tiles among the T.
    offsets : (B + 1,) int32
        Where the tokens of each bag begin, then T.
    """

    def __init__(self, lengths: tuple[int, ...], device: torch.device, places: Tensor | None) -> None:
        self.lengths = lengths
        bag = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths) + 1)
        fresh = bag.diff(prepend=torch.tensor([-1])) > 0
        source = torch.where(fresh, 0, torch.arange(len(bag)) - bag)
        self.source, self.first, self.tiles = (
            rows.to(device) for rows in (source, fresh.nonzero()[:, 0], (~fresh).nonzero()[:, 0])
        )
        self.offsets = bag_offsets([1 + n for n in lengths], device)
        self.places = None
        if places is not None:
            self.places = torch.cat([places.new_full((1, 2), torch.nan), places])[self.source]  # a class token has none

    def groups(self, entries: int) -> Iterator["Group"]:
        """Yield groups of neighbouring bags; where there are several, their maps have few entries, b L²."""
        start, lengths = 0, list[int]()
        for count in (1 + n for n in self.lengths):
            if lengths and (len(lengths) + 1) * max(*lengths, count) ** 2 > entries:
                yield Group(start, tuple(lengths), self.source.device)
                start, lengths = start + sum(lengths), []
            lengths.append(count)
        yield Group(start, tuple(lengths), self.source.device)


class Group:
    """Tokens of b neighbouring bags, filled up to the longest of them, L.

    Parameters
    ----------
    start : int
        Row of the first token.
    lengths : tuple of int
        Tokens of each bag.
    device : torch.device

    Attributes
    ----------
    there : (b, L) bool
        False where a bag is filled up.
    """

    def __init__(self, start: int, lengths: tuple[int, ...], device: torch.device) -> None:
        self.rows = slice(start, start + sum(lengths))
        self.lengths = lengths
        self.even = min(lengths) == max(lengths)
        self.there = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]

    def take(self, packed: Tensor) -> Tensor:
        """Return (b, L, ...) of packed rows (T, ...), without a copy where bags are equally long."""
        rows = packed[self.rows]
        if self.even:
            return rows.view(*self.there.shape, *rows.shape[1:])
        return nn.utils.rnn.pad_sequence(list(torch.split(rows, list(self.lengths))), batch_first=True)

    def packed(self, taken: Tensor) -> Tensor:
        """Return (b, L, ...), or a piece of a single bag, as packed rows."""
        flat = taken.flatten(0, 1)
        if self.even:
            return flat
        # how many there are is known, so that no device is asked
        return flat[torch.nonzero_static(self.there.flatten(), size=sum(self.lengths))[:, 0]]


class Layer(nn.Module):
    """One layer of equation 2.

    Parameters
    ----------
    width, heads, feed_forward, dropout
        As of the aggregator.
    """

    slopes: Tensor

    def __init__(self, width: int, *, heads: int, feed_forward: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, feed_forward),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(feed_forward, width),
            nn.Dropout(dropout),
        )
        slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(self, tokens: Tensor, layout: Tokens) -> Tensor:
        """Return the tokens (T, E) after the layer."""
        query, key, value = self._projected(tokens, self.query, self.key, self.value)
        read = []
        for group in layout.groups(attention.CHUNK_ELEMENTS // self.heads):
            queries, keys, values = (group.take(part).transpose(1, 2) for part in (query, key, value))  # (b, H, L, d)
            places = None if layout.places is None else group.take(layout.places)
            # without positions torch's own kernel needs no map; a group of several bags always has one piece, so that
            # pieces follow each other as the tokens do
            step = max(1, attention.CHUNK_ELEMENTS // (self.heads * group.there.numel()))
            step = group.there.shape[1] if places is None else step
            for first in range(0, group.there.shape[1], step):
                piece = slice(first, first + step)
                given = (queries[:, :, piece], keys, values)
                attend = partial(self._attend, places=places, piece=piece, there=None if group.even else group.there)
                large = step < group.there.shape[1] and torch.is_grad_enabled()
                some = checkpoint(attend, *given, use_reentrant=False) if large else attend(*given)
                read.append(group.packed(some.transpose(1, 2)))
        whole = torch.cat(read).flatten(1)
        del read, queries, keys, values  # a large bag fills the memory
        tokens = tokens + by_rows(self.out, whole)
        return tokens + by_rows(self.mlp, tokens)

    def class_tokens(self, tokens: Tensor, layout: Tokens, log_weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the class tokens (B, E) after the layer, and the scores (N, H) with which they read the tiles."""
        first = tokens[layout.first]
        (query,) = self._projected(first, self.query)
        key, value = self._projected(tokens, self.key, self.value)
        keys = torch.split(key, [1 + n for n in layout.lengths])
        products = [torch.einsum("nhd,hd->nh", own, asked) for own, asked in zip(keys, query, strict=True)]
        scores = torch.cat(products) * query.shape[2] ** -0.5  # (T, H)
        if log_weights is not None:
            scores = scores + log_weights.new_zeros(len(scores), 1).index_copy(0, layout.tiles, log_weights[:, None])
        pooled = attention_pool(scores, value.flatten(1), layout.offsets)[0]  # (B, H, E), of which each head has a part
        read = pooled.view(len(first), self.heads, self.heads, -1).diagonal(dim1=1, dim2=2).mT.flatten(1)
        classes = first + self.out(as_dtype(read, first))
        return classes + self.mlp(classes), scores[layout.tiles]

    @torch.no_grad()
    def read_from(self, tokens: Tensor, layout: Tokens, row: Floats) -> Floats:
        """Return ``row @ A`` for a row (T,) and the attention A (T, T) of one bag, averaged over heads."""
        query, key = self._projected(tokens, self.query, self.key)
        weights = torch.from_numpy(row).to(tokens)
        places = None if layout.places is None else layout.places[None]
        total = torch.zeros_like(weights)
        asked = weights.nonzero()[:, 0]
        for piece in torch.split(asked, max(1, attention.CHUNK_ELEMENTS // (self.heads * len(weights)))):
            scores = torch.einsum("qhd,khd->hqk", query[piece], key) * query.shape[2] ** -0.5
            bias = self._bias(places, piece, None)
            maps = (scores if bias is None else scores + bias[0]).softmax(2).mean(0)
            total += weights[piece] @ maps
        return as_array(total)

    def _projected(self, tokens: Tensor, *parts: nn.Linear) -> list[Tensor]:
        """Return queries, keys or values, (T, H, d) each."""
        rows = [normed_linear(tokens, self.norm, part.weight).add_(part.bias) for part in parts]
        return [part.view(len(tokens), self.heads, -1) for part in rows]

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, places: Tensor | None, piece: slice, there: Tensor | None
    ) -> Tensor:
        """Return what some queries (b, H, q, d) read of keys and values (b, H, L, d)."""
        bias = self._bias(places, piece, there)
        mask = None if bias is None else bias.to(query.dtype).expand(-1, -1, query.shape[2], -1)
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    def _bias(self, places: Tensor | None, piece: slice | Tensor, there: Tensor | None) -> Tensor | None:
        """Return what is added to the scores of some tokens (b, q) of a group with all of their bags, or None."""
        bias = None
        if places is not None:
            far = torch.cdist(places[:, piece], places).nan_to_num()  # (b, q, L); class tokens are far from nothing
            bias = -self.slopes[:, None, None] * far[:, None]
        if there is None:
            return bias
        hidden = torch.where(there, 0.0, -torch.inf).to(self.slopes)[:, None, None]
        return hidden if bias is None else bias + hidden


def _read_stamp(taker: Taker) -> Found:
    """Read STAMP's transformer without ALiBi; with it, distances are taken from weights that a softmax has made."""
    heads = taker.ask("heads")
    tensors = {"cls_token": taker.take("class_token", None)}
    width = len(tensors["cls_token"])
    tensors |= taker.linear("project_features.0", "embed.0", width)
    numbers = taker.numbers(r"transformer\.layers\.(\d+)\.0\.norm\.weight")
    for new, number in enumerate(numbers):
        old = f"transformer.layers.{number}"
        thirds = [taker.take(f"{old}.0.mhsa.in_proj_{part}", *shape).chunk(3)
                  for part, shape in (("weight", (3 * width, width)), ("bias", (3 * width,)))]  # fmt: skip
        for name, weight, bias in zip(("query", "key", "value"), *thirds, strict=True):
            tensors |= {f"layers.{new}.{name}.weight": weight, f"layers.{new}.{name}.bias": bias}
        tensors |= taker.norm(f"{old}.0.norm", f"layers.{new}.norm", width)
        tensors |= taker.linear(f"{old}.0.mhsa.out_proj", f"layers.{new}.out", width, width)
        tensors |= taker.norm(f"{old}.1.0", f"layers.{new}.mlp.0", width)
        tensors |= taker.linear(f"{old}.1.1", f"layers.{new}.mlp.1", None, width)
        hidden = len(tensors[f"layers.{new}.mlp.1.weight"])
        tensors |= taker.linear(f"{old}.1.4", f"layers.{new}.mlp.4", width, hidden)
    tensors |= taker.norm("transformer.norm", "norm", width) | taker.head("mlp_head.0", "classifier", width)
    hidden = len(tensors.get("layers.0.mlp.1.weight", ())) or 1
    sizes: dict[str, object] = {"width": width, "layers": len(numbers), "feed_forward": hidden, "heads": int(heads)}
    return Found("STAMP's transformer", Component(name="transformer", options=sizes), tensors)


LAYOUTS.add("STAMP", Layout((r"class_token", r"project_features\.0\..*", r".*\.mhsa\.in_proj_weight"), _read_stamp))

_TRAINING = Training(
    lr=1e-4, weight_decay=1e-2, epochs=50, patience=10, bags_per_step=4, max_instances_per_bag=2048, warmup=2.0
)
"""Of no paper: at most 2,048 tiles of a slide in each pass, because time grows with their square."""
for _name, _positions in (("transformer", "none"), ("transformer_alibi", "alibi"), ("transformer_2d", "sincos")):
    _network = Component(name="transformer", options={"positions": _positions})
    RECIPES.add(_name, Recipe(aggregator=_network, training=_TRAINING))
