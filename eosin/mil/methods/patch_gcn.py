"""Patch-GCN: a graph of tiles that lie next to each other on the slide, and attention pooling over all its layers.

Chen, Lu, Shaban, Chen, Chen, Williamson, Mahmood: Whole slide images are 2D point clouds: context-aware survival
prediction using patch-based graph convolutional networks, MICCAI 2021, https://arxiv.org/abs/2107.13048; its layer is
GENConv of Li, Xiong, Thabet, Ghanem: DeeperGCN, 2020, https://arxiv.org/abs/2006.07739.

1. ``x_0 = relu(W x + b)``. Each tile i reads the `neighbours` tiles N(i) that lie nearest to it on the slide.
2. GENConv: ``m_j = relu(x_j) + 1e-7``; ``a_i = Σ_j softmax_j(t m_j) m_j`` over N(i), each channel with weights of its
   own, and a learned temperature t of the layer; ``g(x)_i = W_2 relu(LN(W_1 (x_i + a_i)))``, of twice the width inside.
3. ``x_1 = g_1(x_0)``; then ``x_l = x_(l-1) + relu(LN(g_l(x_(l-1))))``.
4. ``h = relu(W_φ [x_0, ..., x_L] + b)``; gated attention pooling of h with a hidden layer of the width of h;
   ``logits = W relu(W_ρ z + b_ρ) + b``.

Deviations from the authors' code. There the tiles N(i) are those that have i among their nearest, which on a full grid
are the same; here every tile with a neighbour reads some. The code's nearest tiles come from an approximate search, and
of equally near ones any; here from an exact one, by direction. Its latent graph, of tiles with similar features, is
`wikg` with ``edges: similar``. Layers inside equation 2 have no biases, as in torch_geometric 2.6, unless `conv_bias`.
Of equation 3 the code never uses the norm of the first layer, which is left out. The paper's loss is that of
`--task survival`; the aggregator takes any task.

Memory: equation 2 is computed for some tiles at a time, and again in the backward pass. The neighbours of 200,000 tiles
are found in less than a second.
"""

import copy
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from eosin.mil._attention import by_rows
from eosin.mil._closed_forms import ReadoutBag
from eosin.mil._layers import Attention, as_dtype, embedding
from eosin.mil._neighbours import nearest_tiles
from eosin.mil._recipe import RECIPES, Component, Recipe, Training
from eosin.mil.bags import PackedBags
from eosin.mil.options import Count, Dropout
from eosin.mil.slots import AGGREGATORS, Aggregator, AttentionOutput
from eosin.mil.subsets import Floats, Value, as_array, slope_of

LEAST_MESSAGE = 1e-7  # of equation 2
NODE_ROWS = 2**13  # tiles whose neighbours are read at once in a large pack


@AGGREGATORS.register("patch_gcn")
class PatchGcn(Aggregator):
    """Graph convolutions between neighbouring tiles and attention pooling, equations 1 to 4.

    Parameters
    ----------
    in_dim, n_outputs
        Feature width D and logits K.
    width : int
        Width E of a tile in each layer.
    layers : int
        Graph convolutions L.
    neighbours : int
        Tiles that a tile reads.
    conv_bias : bool
        Whether the linear layers of equation 2 have biases.
    dropout, block_dropout : float
        After the embedding, h and inside the attention; after equation 3.
    """

    output_type = AttentionOutput
    reads_places = True

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        *,
        width: Count = 128,
        layers: Count = 3,
        neighbours: Count = 8,
        conv_bias: bool = False,
        dropout: Dropout = 0.25,
        block_dropout: Dropout = 0.1,
    ) -> None:
        whole = width * (layers + 1)
        super().__init__(in_dim, n_outputs, embed_dim=whole)
        self.neighbours = neighbours
        self.block_dropout = block_dropout
        self.embed = embedding(in_dim, (width,), dropout=dropout)
        self.convs = nn.ModuleList(GenConv(width, bias=conv_bias) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers - 1))
        self.phi = embedding(whole, (whole,), dropout=dropout)
        self.attention = Attention(whole, hidden=whole, gate_dropout=dropout)
        self.classifier = nn.Sequential(nn.Linear(whole, whole), nn.ReLU(), nn.Linear(whole, n_outputs))

    def forward(self, bags: PackedBags) -> AttentionOutput:
        """Return logits, bag embeddings, scores and the tiles h of equation 4."""
        found, there = nearest_tiles(self.require_places(bags), bags.lengths, 1 + self.neighbours)
        near, there = found[:, 1:], there[:, 1:]
        states = [by_rows(self.embed, bags.values)]
        for number, conv in enumerate(self.convs):
            read = by_rows(partial(conv, states[-1]), states[-1], near, there, size=NODE_ROWS)
            states.append(read if not number else by_rows(partial(self._added, number - 1), states[-1], read))
        tiles = by_rows(lambda *parts: self.phi(torch.cat(parts, 1)), *states)
        pool = self.attention.pool(tiles, bags)
        bag = as_dtype(pool.pooled[:, 0], next(self.classifier.parameters()))
        return AttentionOutput(self.classifier(bag), bag, pool.scores, tiles)

    def _added(self, number: int, tiles: Tensor, read: Tensor) -> Tensor:
        """Return equation 3 for some tiles, of what a convolution made of them."""
        return functional.dropout(tiles + functional.relu(self.norms[number](read)), self.block_dropout, self.training)

    @override
    def weight_gradient(self, bags: PackedBags, value: Value) -> Floats:
        with torch.no_grad():
            output = self(bags)
        scores, values = (part.detach().double().cpu()[:, None] for part in (output.scores, output.instances))
        layers = copy.deepcopy(self.classifier).double().cpu()
        form = ReadoutBag(scores, values, lambda pooled: layers(pooled.flatten(1)))
        return as_array(torch.from_numpy(form.log_weight_gradient()) @ slope_of(output.logits[0], value).double().cpu())


class GenConv(nn.Module):
    """Equation 2.

    Parameters
    ----------
    width : int
    bias : bool
    """

    def __init__(self, width: int, *, bias: bool) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(1))
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width, bias=bias),
            nn.LayerNorm(2 * width),
            nn.ReLU(),
            nn.Linear(2 * width, width, bias=bias),
        )

    def forward(self, tiles: Tensor, own: Tensor, near: Tensor, there: Tensor) -> Tensor:
        """Return (c, E) for some tiles `own` (c, E), the rows `near` (c, k) of their neighbours among all `tiles`."""
        messages = functional.relu(tiles[near]) + LEAST_MESSAGE  # (c, k, E)
        hidden = ~there[..., None]
        # finite, because a tile that is alone in its bag has no neighbour at all, and reads nothing
        least = torch.finfo(messages.dtype).min
        weights = (messages * self.temperature).masked_fill(hidden, least).softmax(1)
        read = (weights * messages).masked_fill(hidden, 0).sum(1)
        out: Tensor = self.mlp(own + read)
        return out


RECIPES.add(
    "patch_gcn",
    Recipe(
        aggregator=Component(name="patch_gcn"),
        training=Training(
            optimizer="adam", lr=2e-4, weight_decay=1e-5, epochs=20, schedule="constant", patience=0, bags_per_step=32
        ),
    ),
)
