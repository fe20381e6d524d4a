"""TransMIL: a transformer over the bag with Nyström attention and a position convolution on a square grid.

Shao, Bian, Chen, Wang, Zhang, Ji, Zhang: TransMIL: Transformer based correlated multiple instance learning for whole
slide image classification, NeurIPS 2021, https://arxiv.org/abs/2106.00908.

1. ``h = relu(W x + b)``; with s = ⌈√n⌉ the first s² - n rows are repeated at the end; a learned class token goes
   first.
2. ``t ← t + attention(LN(t))``, ``t ← PPEG(t)``, ``t ← t + attention(LN(t))``, ``logits = W LN(t_class) + b``.
3. Nyström attention with m landmarks, scale 1/√d (Xiong et al., AAAI 2021, https://arxiv.org/abs/2102.03902): zeros
   are put in front until m divides the length; landmarks are the means of consecutive groups of queries and of keys;
   ``A1 = softmax(Q K̃ᵀ)``, ``A2 = softmax(Q̃ K̃ᵀ)``, ``A3 = softmax(Q̃ Kᵀ)``; the result is ``A1 A2⁺ A3 V`` plus a
   depthwise convolution of V along the sequence (33 taps), then the output projection and dropout. The zeros are keys
   like others.
4. ``A2⁺``: ``Z ← ¼ Z (13 - A Z (15 - A Z (7 - A Z)))`` from ``Z = Aᵀ / (largest row sum · largest column sum)``.
5. PPEG: the tokens but the class token lie on an s × s grid in the order of the list; ``t + conv7(t) + conv5(t) +
   conv3(t)``, depthwise. The three kernels are added up to one, which is the same map.
6. Scores are those of the class token in the first layer, ``log(A1_class A2⁺ A3)`` per head, of an instance and its
   repeat together. The approximation may give negative weights: in the scores they count as 0.
7. With ``padding="grid"`` the bag has no repeats: only the grid of PPEG does, which is 7 × 7 at least, zeros filling
   what the repeats leave, and the cells of repeats and zeros are dropped. This is another model than the authors', that
   of MHIM-MIL and PackMIL, which also have dropout after the embedding and another start.

Deviations from the authors' code. The starting point of the pseudo-inverse takes the largest sums of its own bag, the
code those of the whole batch, so that results do not depend on what is trained beside it; for one bag they agree. Of
the second layer only the class token is computed, since nothing else is read. The code exports no attention. Training
is with RAdam without Lookahead. Bags are never padded to each other (`eosin.mil._nystrom`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from eosin.errors import ConfigError
from eosin.mil import _attention as attention
from eosin.mil._attention import bag_attention, by_rows, mixed_weights, recomputed
from eosin.mil._layers import Activation, Init, embedding, initialise
from eosin.mil._nystrom import NystromFactors, NystromLayer, TokenBags, starts, through_landmarks
from eosin.mil._recipe import RECIPES, Component, Recipe, Training
from eosin.mil._rollout import Trace, inputs_of
from eosin.mil.bags import PackedBags
from eosin.mil.layouts import LAYOUTS, Found, Layout, Taker, Tensors
from eosin.mil.options import Count, Dropout
from eosin.mil.slots import AGGREGATORS, Aggregator, AggregatorOutput, AttentionOutput
from eosin.mil.subsets import Floats, Value, as_array

Padding = Literal["bag", "grid"]

PPEG_CHANNELS = 128  # channels that are convolved at once in a large pack
MOST_ITERATIONS = 30  # of the pseudo-inverse; with 40 float32 overflows on small bags
SMALLEST_GRID = 7  # side of the grid that has the repeats for itself, equation 7


@dataclass(frozen=True, eq=False)
class TransMilOutput(AttentionOutput):
    """Output of TransMIL: scores are logarithms of the weights, of the smallest number where these are negative.

    Attributes
    ----------
    weights : (N, H) float
        Of the class token in the first layer, per head, of an instance and its repeat together; of any sign.
    """

    weights: Tensor

    @property
    @override
    def ranks(self) -> Tensor:
        # as they are, negative ones below all others
        return self.weights


@AGGREGATORS.register("transmil")
class TransMil(Aggregator):
    """Transformer with Nyström attention, equations 1 to 7.

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
    embed_activation, embed_dropout
        Of the layer before the attention.
    padding : {"bag", "grid"}
        What the first instances are repeated in to fill a square: the bag, or only the grid of PPEG, equation 7.
    init : {"default", "xavier"}
        torch's initial weights, or Xavier normal with zero bias for all linear layers.
    """

    output_type = TransMilOutput
    order_dependent = True

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        *,
        width: Count = 512,
        heads: Count = 8,
        landmarks: Count | None = None,
        pinv_iterations: Count = 6,
        dropout: Dropout = 0.1,
        embed_activation: Activation = "relu",
        embed_dropout: Dropout = 0.0,
        padding: Padding = "bag",
        init: Init = "default",
    ) -> None:
        landmarks = max(1, width // 2) if landmarks is None else landmarks
        if width % heads:
            raise ConfigError(f"transmil: {heads} heads do not divide the width {width}; choose another width")
        if pinv_iterations > MOST_ITERATIONS:
            raise ConfigError(
                f"transmil: pinv_iterations {pinv_iterations} is more than {MOST_ITERATIONS}, from where on rounding "
                "errors grow until nothing is finite; the paper takes 6"
            )
        super().__init__(in_dim, n_outputs, embed_dim=width)
        self.landmarks = landmarks
        self.padding: Padding = padding
        self.embed = embedding(in_dim, (width,), activation=embed_activation, dropout=embed_dropout)
        self.cls_token = nn.Parameter(torch.randn(1, width))
        self.layer1, self.layer2 = (
            NystromLayer(width, heads=heads, pinv_iterations=pinv_iterations, dropout=dropout) for _ in range(2)
        )
        self.ppeg = Ppeg(width)
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, n_outputs)
        initialise(self, init)

    def forward(self, bags: PackedBags) -> TransMilOutput:
        """Return logits, class tokens, scores of the first layer and instances."""
        return self.aggregate(bags.with_values(by_rows(self.embed, bags.values)))

    def aggregate(self, bags: PackedBags) -> TransMilOutput:
        """Return the output for bags of embedded instances."""
        layout = self.layout(bags)
        tokens = torch.cat([self.cls_token.to(bags.values.dtype), bags.values])[layout.source]  # (T, E)
        tokens, weights = self.layer1(tokens, layout)
        tokens = self.ppeg(tokens, layout)
        bag = self.norm(self.layer2.class_token(tokens, layout))  # (B, E)
        weights = layout.per_instance(weights)
        scores = weights.clamp_min(torch.finfo(weights.dtype).tiny).log()
        return TransMilOutput(self.classifier(bag), bag, scores, bags.values, weights)

    def layout(self, bags: PackedBags) -> "TokenLayout":
        """Return where the tokens of a pack lie."""
        return TokenLayout.of(bags.lengths, self.landmarks, bags.values.device, padding=self.padding)

    @override
    @torch.no_grad()
    def trace(self, bags: PackedBags) -> Trace:
        """Go from the class token through both Nyström layers, three factors per head, averaged over heads.

        The product may be negative: those entries are cut to 0. The convolutions are ignored, repeated tiles count for
        their originals, and the class token's own share is left out at the end.
        """
        layers = (self.layer1, self.layer2)
        with inputs_of([layer.norm for layer in layers]) as seen:
            self(bags)
        layout = self.layout(bags)
        steps = [partial(through_landmarks, layer, calls[0], layout) for layer, calls in zip(layers, seen, strict=True)]

        def to_tiles(row: Floats) -> Floats:
            return as_array(layout.per_instance(torch.from_numpy(row)[:, None].to(layout.instances.device))[:, 0])

        return Trace(layout.class_row(), steps, to_tiles)

    @override
    @torch.no_grad()
    def weight_gradient(self, bags: PackedBags, value: Value) -> Floats:
        """Derive by ``scores + log w`` with which the landmarks of the last layer read its keys.

        Landmarks, queries and convolution are held fixed.
        """
        with inputs_of([self.layer2.norm, self.norm]) as seen:
            self(bags)
        layout = self.layout(bags)
        factors = NystromFactors.of(self.layer2, seen[0][0], layout)
        slope = self._class_slope(seen[1][0], value)  # (H, d)
        mix = factors.to_landmarks(layout.class_row())  # (m, H)
        key, values, query = factors.third(1), factors.third(2), factors.marks_query[None]
        scale, zeros = self.layer2.scale, layout.zeros
        read = bag_attention(query, key, values, layout.lengths, scale, zeros=zeros)[0]  # (m, H, d)
        level = mix * torch.einsum("mhd,hd->mh", read, slope)
        own = torch.einsum("phd,hd->ph", values, slope)
        shared = mixed_weights(query, key, mix[None].to(query), layout.lengths, scale, zeros=zeros)
        lost = mixed_weights(query, key, level[None].to(query), layout.lengths, scale, zeros=zeros)
        return as_array(layout.per_instance((shared * own - lost).double().sum(1, keepdim=True))[:, 0])

    def _class_slope(self, class_token: Tensor, value: Value) -> Tensor:
        """Return the derivative of the value by what the class token read in the last layer, per head: (H, d)."""
        with torch.enable_grad():
            leaf = class_token.detach().requires_grad_()  # (1, E)
            (slope,) = torch.autograd.grad(value(self.classifier(self.norm(leaf))[0]), leaf)
        read: Tensor = torch.unflatten((slope[0] @ self.layer2.to_out.weight).detach(), 0, (self.layer2.heads, -1))
        return read

    @override
    def instance_values(self, output: AggregatorOutput) -> Tensor:
        """Return what each instance adds to the class token in the first layer, with the layer's dropout: (N, E)."""
        assert isinstance(output, TransMilOutput)  # what the model declares
        layer = self.layer1
        values = functional.linear(layer.norm(output.instances), layer.to_qkv.weight.chunk(3)[2])
        by_head = torch.unflatten(values, 1, (layer.heads, -1)) * output.weights[..., None]  # (N, H, d)
        out = layer.to_out(by_head.flatten(1).to(values.dtype))
        return functional.dropout(out, layer.dropout, layer.training)


@dataclass(frozen=True, eq=False)
class TokenLayout(TokenBags):
    """Where the tokens of a pack lie: T tokens, of each bag its class token and its instances, some of them twice.

    Attributes
    ----------
    source : (T,) int64
        Row of each token in the class token followed by the instances.
    body : (T - B,) int64
        Rows of all tokens but the class tokens.
    cell : (T - B,) int64
        Cell of each token of `body` in one tall grid that holds the grids of all bags, three rows apart.
    grid : (height, width)
        Of that grid.
    placed, placed_cell : (P,) int64
        Rows and cells of all that lies on the grid: `body` and `cell`, and with ``padding="grid"`` the repeats.
    copies, originals : (R,) int64
        Rows among the T of the repeated instances and of what they repeat.
    instances : (N,) int64
        Row of each instance among the T.
    """

    source: Tensor
    body: Tensor
    cell: Tensor
    grid: tuple[int, int]
    placed: Tensor
    placed_cell: Tensor
    copies: Tensor
    originals: Tensor
    instances: Tensor

    @classmethod
    def of(
        cls, lengths: Sequence[int], landmarks: int, device: torch.device, *, padding: Padding = "bag"
    ) -> "TokenLayout":
        """Lay out bags of these lengths; all on the host, from numbers that it knows."""
        length = torch.tensor(lengths, dtype=torch.int64)
        side = torch.tensor([math.isqrt(n - 1) + 1 if n else 0 for n in lengths])
        square = side * side
        if padding == "grid":
            side = torch.where(length > 0, side.clamp(min=SMALLEST_GRID), 0)
        body = square if padding == "bag" else length
        bag, place = _places(1 + body)
        instance = place - 1  # -1 is the class token
        wrapped = instance - torch.where(instance < length[bag], 0, length[bag])
        rows = torch.arange(len(bag))
        copied = instance >= length[bag]
        on, at = _places(square)  # bags, and numbers in them, of what lies on the grid
        own = at < body[on]
        placed = starts(1 + body)[on] + 1 + at - torch.where(own, 0, length[on])
        width = max(1, int(side.max()))
        placed_cell = (starts(side + 3)[on] + at // side[on]) * width + at % side[on]
        moved = {
            "source": torch.where(instance < 0, 0, 1 + starts(length)[bag] + wrapped),
            "body": placed[own],
            "cell": placed_cell[own],
            "placed": placed,
            "placed_cell": placed_cell,
            "copies": rows[copied],
            "originals": (rows - length[bag])[copied],
            "instances": rows[(instance >= 0) & ~copied],
        }
        tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in moved.items()}
        tokens = vars(TokenBags.of_lengths((1 + body).tolist(), landmarks, device))
        return cls(**tokens, **tensors, grid=(int((side + 3).sum()), width))  # type: ignore[arg-type]

    def class_row(self) -> Floats:
        """Return a row of tokens (T,) of one bag that is 1 at its class token."""
        row = np.zeros(len(self.source))
        row[int(self.first[0])] = 1.0
        return row

    def per_instance(self, weights: Tensor) -> Tensor:
        """Add the weights (T, H) of repeated instances to the instance they repeat: (N, H)."""
        extra = torch.zeros_like(weights).index_copy(0, self.originals, weights[self.copies])
        return (weights + extra)[self.instances]


def _places(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bag of each of so many rows per bag, and its number in the bag."""
    bag = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return bag, torch.arange(len(bag)) - starts(counts)[bag]


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

    def forward(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
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


def _convolved_grid(tokens: Tensor, kernel: Tensor, bias: Tensor, *, layout: TokenLayout) -> Tensor:
    """Add the convolution of some channels on each bag's grid, (T, channels)."""
    height, width = layout.grid
    placed = tokens[layout.placed]
    grid = placed.new_zeros(height * width, tokens.shape[1]).index_copy(0, layout.placed_cell, placed)
    image = grid.view(1, height, width, -1).permute(0, 3, 1, 2)
    coded = functional.conv2d(image, kernel, bias, padding=kernel.shape[2] // 2, groups=len(kernel))
    coded = coded.permute(0, 2, 3, 1).flatten(0, 2)[layout.cell]
    return tokens.index_add(0, layout.body, coded.to(tokens.dtype))


def _read(taker: Taker) -> Found:
    tensors, widths = taker.embedding("_fc1", dropout="embed_dropout")
    width = widths[-1]
    tensors |= taker.norm("norm", "norm", width) | taker.head("_fc2", "classifier", width)
    tensors["cls_token"] = taker.take("cls_token", 1, 1, width)[0]
    for layer in ("layer1", "layer2"):
        tensors |= read_layer(taker, f"{layer}.norm", f"{layer}.attn", layer, width)
    tensors |= read_ppeg(taker, "pos_layer", width)
    options = {"width": width, "heads": len(tensors["layer1.res_conv.weight"])}
    return Found("TransMIL", Component(name="transmil", options=options), tensors, outputs="softmax")


def read_layer(taker: Taker, norm: str, attention: str, new: str, width: int) -> Tensors:
    """Return the tensors of a Nyström layer."""
    tensors = taker.norm(norm, f"{new}.norm", width) | taker.linear(f"{attention}.to_out.0", f"{new}.to_out", width)
    tensors[f"{new}.to_qkv.weight"] = taker.take(f"{attention}.to_qkv.weight", None, width)
    tensors[f"{new}.res_conv.weight"] = taker.take(f"{attention}.res_conv.weight", None, 1, None, 1)
    return tensors


def read_ppeg(taker: Taker, old: str, width: int) -> Tensors:
    """Return the three convolutions of the position encoding."""
    tensors = {}
    for name, new, size in (("proj", "conv7", 7), ("proj1", "conv5", 5), ("proj2", "conv3", 3)):
        tensors[f"ppeg.{new}.weight"] = taker.take(f"{old}.{name}.weight", width, 1, size, size)
        tensors[f"ppeg.{new}.bias"] = taker.take(f"{old}.{name}.bias", width)
    return tensors


LAYOUTS.add("TransMIL", Layout((r"_fc1\..*", r"layer1\..*"), _read))

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
