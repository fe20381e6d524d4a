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
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from eosin.errors import CheckpointError, ConfigError
from eosin.mil import _attention as attention
from eosin.mil._attention import bag_attention, by_rows, mixed_weights, recomputed
from eosin.mil._layers import Activation, Init, embedding, initialise
from eosin.mil._nystrom import TAPS, NystromFactors, NystromLayer, TokenBags, starts, through_landmarks
from eosin.mil._recipe import RECIPES, Component, Recipe, Training
from eosin.mil._rollout import Trace, inputs_of
from eosin.mil.bags import PackedBags
from eosin.mil.layouts import LAYOUTS, Found, Layout, Meaning, Taker, Tensors, without_merging
from eosin.mil.options import Count, Dropout, Whole
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
    layers : int
        Nyström layers; PPEG follows the first.
    heads : int
        Attention heads; divides the width.
    landmarks : int or None
        Landmarks m; None is half the width.
    pinv_iterations : int
        Steps of equation 4.
    dropout : float
        After the output projections.
    embed_layers, embed_activation, embed_dropout
        Of the layers before the attention, all of that width; none takes features of that width as they are.
    positions : {"ppeg", "none"}
        Whether PPEG encodes positions.
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
        layers: Count = 2,
        heads: Count = 8,
        landmarks: Count | None = None,
        pinv_iterations: Count = 6,
        dropout: Dropout = 0.1,
        embed_layers: Whole = 1,
        embed_activation: Activation = "relu",
        embed_dropout: Dropout = 0.0,
        positions: Literal["ppeg", "none"] = "ppeg",
        padding: Padding = "bag",
        init: Init = "default",
    ) -> None:
        landmarks = max(1, width // 2) if landmarks is None else landmarks
        if width % heads:
            raise ConfigError(f"transmil: {heads} heads do not divide the width {width}; choose another width")
        if pinv_iterations > MOST_ITERATIONS:
            raise ConfigError(
                f"transmil: pinv_iterations {pinv_iterations} is more than {MOST_ITERATIONS}; rounding errors "
                "then grow until values are infinite; the paper uses 6"
            )
        super().__init__(in_dim, n_outputs, embed_dim=width)
        self.landmarks = landmarks
        self.padding: Padding = padding
        if not embed_layers and in_dim != width:
            raise ConfigError(
                f"transmil: without embed_layers the width, {width}, must be that of the features, {in_dim}"
            )
        self.embed = embedding(in_dim, (width,) * embed_layers, activation=embed_activation, dropout=embed_dropout)
        self.cls_token = nn.Parameter(torch.randn(1, width))
        for name in self._names(layers):
            layer = NystromLayer(width, heads=heads, pinv_iterations=pinv_iterations, dropout=dropout)
            self.add_module(name, layer)
        self.depth = layers
        self.ppeg = Ppeg(width) if positions == "ppeg" else None
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, n_outputs)
        initialise(self, init)

    def forward(self, bags: PackedBags) -> TransMilOutput:
        """Return logits, class tokens, scores of the first layer and instances."""
        return self.aggregate(bags.with_values(by_rows(self.embed, bags.values)))

    @staticmethod
    def _names(layers: int) -> list[str]:
        return [f"layer{number}" for number in range(1, layers + 1)]

    def _layers(self) -> list[NystromLayer]:
        modules = map(self.get_submodule, self._names(self.depth))
        return [module for module in modules if isinstance(module, NystromLayer)]

    def aggregate(self, bags: PackedBags) -> TransMilOutput:
        """Return the output for bags of embedded instances."""
        layout = self.layout(bags)
        first, *later = self._layers()
        tokens = torch.cat([self.cls_token.to(bags.values.dtype), bags.values])[layout.source]  # (T, E)
        tokens, weights = first(tokens, layout)
        tokens = tokens if self.ppeg is None else self.ppeg(tokens, layout)
        for layer in later[:-1]:
            tokens, _ = layer(tokens, layout)
        bag = self.norm(later[-1].class_token(tokens, layout) if later else tokens[layout.first])  # (B, E)
        weights = layout.per_instance(weights)
        scores = weights.clamp_min(torch.finfo(weights.dtype).tiny).log()
        return TransMilOutput(self.classifier(bag), bag, scores, bags.values, weights)

    def layout(self, bags: PackedBags) -> "TokenLayout":
        """Return where the tokens of a pack lie."""
        return TokenLayout.of(bags.lengths, self.landmarks, bags.values.device, padding=self.padding)

    @override
    @torch.no_grad()
    def trace(self, bags: PackedBags) -> Trace:
        """Go from the class token through all Nyström layers, three factors per head, averaged over heads.

        The product may be negative: those entries are cut to 0. The convolutions are ignored, repeated tiles count for
        their originals, and the class token's own share is left out at the end.
        """
        layers = self._layers()
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
        last = self._layers()[-1]
        with inputs_of([last.norm, self.norm]) as seen:
            self(bags)
        layout = self.layout(bags)
        factors = NystromFactors.of(last, seen[0][0], layout)
        slope = self._class_slope(seen[1][0], value)  # (H, d)
        mix = factors.to_landmarks(layout.class_row())  # (m, H)
        key, values, query = factors.third(1), factors.third(2), factors.marks_query[None]
        scale, zeros = last.scale, layout.zeros
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
        last = self._layers()[-1]
        read: Tensor = torch.unflatten((slope[0] @ last.to_out.weight).detach(), 0, (last.heads, -1))
        return read

    @override
    def instance_values(self, output: AggregatorOutput) -> Tensor:
        """Return what each instance adds to the class token in the first layer, with the layer's dropout: (N, E)."""
        assert isinstance(output, TransMilOutput)  # what the model declares
        layer = self._layers()[0]
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
    """Read TransMIL as its authors have it, and as MambaMIL, MHIM-MIL and PackMIL compare with it."""
    own = taker.has(r"_fc2\..*")
    embed = taker.index(r"(_fc1|feature)\.0\.weight")
    said = {} if own else {"embed_activation": taker.ask("embed_activation", "relu", "gelu", "none")}
    tensors, widths = taker.embedding(embed, dropout="embed_dropout")
    width = widths[-1]
    tensors |= _read_layers(taker, [f"layer{number}." for number in taker.numbers(r"layer(\d+)\.norm\.weight")], width)
    tensors |= taker.norm("norm", "norm", width) | taker.head("_fc2" if own else "classifier", "classifier", width)
    return found("TransMIL", tensors, widths, outputs="softmax" if own or embed == "_fc1" else None, **said)


def _read_millab(taker: Taker) -> Found:
    tensors, widths = taker.embedding("patch_embed", dropout="embed_dropout")
    width = widths[-1]
    blocks = [f"blocks.{number}." for number in taker.numbers(r"blocks\.(\d+)\.norm\.weight")]
    tensors |= _read_layers(taker, blocks, width, attention="attention")
    tensors |= taker.norm("norm", "norm", width) | taker.head("classifier", "classifier", width)
    return found("MIL-Lab's TransMIL", tensors, widths)


def _read_torchmil(taker: Taker) -> Found:
    """Read torchmil's TransMIL, whose attention lacks the projection and the convolution of the values.

    An identity and zeros in their places are the same network. Each layer has a second norm, which is read where a
    multilayer perceptron follows it; that network is not converted.
    """
    heads, landmarks = (int(taker.ask(option)) for option in ("heads", "landmarks"))
    tensors = {"cls_token": taker.take("cls_token", 1, 1, None)[0]}
    width = tensors["cls_token"].shape[1]
    if width % heads:
        raise CheckpointError(taker.path, f"has width {width}, which --option heads={heads} does not divide")
    embedded = taker.has(r"fc1\..*")
    tensors |= taker.linear("fc1", "embed.0", width) if embedded else {}
    numbers = taker.numbers(r"layers\.(\d+)\.norm1\.weight")
    for number, new in zip(numbers, TransMil._names(len(numbers)), strict=True):
        tensors |= taker.norm(f"layers.{number}.norm1", f"{new}.norm", width)
        taker.norm(f"layers.{number}.norm2", "", width)
        tensors[f"{new}.to_qkv.weight"] = taker.take(f"layers.{number}.att_module.qkv_nn.weight", 3 * width, width)
        tensors |= {f"{new}.to_out.weight": torch.eye(width), f"{new}.to_out.bias": torch.zeros(width)}
        tensors[f"{new}.res_conv.weight"] = torch.zeros(heads, 1, TAPS, 1)
    tensors |= _read_ppeg(taker, "pos_layer", width)
    tensors |= taker.norm("norm", "norm", width) | taker.head("classifier", "classifier", width)
    known = found("torchmil's TransMIL", tensors, [width] if embedded else [], embed_activation="none")
    options = known.aggregator.options | {"landmarks": landmarks}
    first = "embed.0.weight" if embedded else "layer1.to_qkv.weight"
    return replace(known, aggregator=Component(name="transmil", options=options), reads_features=first)


def _read_layers(
    taker: Taker,
    layers: Sequence[str],
    width: int,
    *,
    attention: str = "attn",
    before: str = "",
    ppeg: str = "pos_layer",
) -> Tensors:
    """Return the tensors of the class token, the Nyström layers and the position encoding, which may be absent."""
    tensors = {"cls_token": taker.take(f"{before}cls_token", 1, 1, width)[0]}
    for number, old in enumerate(layers, 1):
        new = f"layer{number}"
        tensors |= taker.norm(f"{before}{old}norm", f"{new}.norm", width)
        tensors |= taker.linear(f"{before}{old}{attention}.to_out.0", f"{new}.to_out", width, width)
        tensors[f"{new}.to_qkv.weight"] = taker.take(f"{before}{old}{attention}.to_qkv.weight", 3 * width, width)
        tensors[f"{new}.res_conv.weight"] = taker.take(f"{before}{old}{attention}.res_conv.weight", None, 1, None, 1)
    present = taker.has(re.escape(f"{before}{ppeg}") + r"\..*")
    return tensors | (_read_ppeg(taker, f"{before}{ppeg}", width) if present else {})


def _read_ppeg(taker: Taker, old: str, width: int) -> Tensors:
    """Return the three convolutions of the position encoding."""
    tensors = {}
    for name, new, size in (("proj", "conv7", 7), ("proj1", "conv5", 5), ("proj2", "conv3", 3)):
        tensors[f"ppeg.{new}.weight"] = taker.take(f"{old}.{name}.weight", width, 1, size, size)
        tensors[f"ppeg.{new}.bias"] = taker.take(f"{old}.{name}.bias", width)
    return tensors


def found(tool: str, tensors: Tensors, widths: list[int], *, outputs: Meaning | None = None, **said: str) -> Found:
    """Return TransMIL with these tensors, of which the sizes are read."""
    layers = sum(name.endswith(".to_qkv.weight") for name in tensors)
    options: dict[str, object] = {"width": len(tensors["norm.weight"]), "embed_layers": len(widths), "layers": layers}
    options["heads"] = len(tensors.get("layer1.res_conv.weight", ())) or 1
    options["positions"] = "ppeg" if "ppeg.conv7.weight" in tensors else "none"
    return Found(tool, Component(name="transmil", options=options | said), tensors, outputs=outputs)


def _read_grid(taker: Taker) -> Found:
    """Read the transformer inside MHIM-MIL or PackMIL, in which the grid alone is filled up."""
    packed = taker.has(r"mil\..*")
    before, embed = ("mil.aggregate.", "mil.embed") if packed else ("online_encoder.", "feature")
    activation = taker.ask("embed_activation", "relu", "gelu", *(() if packed else ("none",)))
    if taker.has(r"merge\..*"):
        without_merging(taker)
    tensors, widths = taker.embedding(embed, dropout="embed_dropout")
    width = widths[-1]
    later = "layers." if packed else "layer"
    numbers = taker.numbers(re.escape(before + later) + r"(\d+)\.norm\.weight")
    names = [f"{later}{number}." for number in numbers if packed or number > 1]
    tensors |= _read_layers(taker, ["layer1.", *names], width, before=before, ppeg="pos_embedding")
    last = "fc_norm" if taker.has(r"mil\.aggregate\.fc_norm\..*") else "norm"
    tensors |= taker.norm(f"{before}{last}", "norm", width) | taker.head("predictor", "classifier", width)
    tool = "PackMIL's transformer" if packed else "MHIM-MIL's transformer"
    return found(tool, tensors, widths, embed_activation=activation, padding="grid")


_LAYER = r"layer1\.attn\..*"
LAYOUTS.add("TransMIL", Layout((r"(_fc1|feature)\..*", _LAYER, r"cls_token"), _read))
LAYOUTS.add("MIL-Lab TransMIL", Layout((r"patch_embed\.0\.weight", r"blocks\.0\.attention\..*"), _read_millab))
LAYOUTS.add("torchmil TransMIL", Layout((r"layers\.0\.att_module\.qkv_nn\..*", r"cls_token"), _read_torchmil))
_INSIDE = (r"(online_encoder|mil\.aggregate)\." + _LAYER, r"predictor\..*", r".*\.cls_token")
LAYOUTS.add("TransMIL of MHIM-MIL", Layout(_INSIDE, _read_grid, unused=("predictor_res.",)))

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
