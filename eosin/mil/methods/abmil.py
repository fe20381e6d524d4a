"""ABMIL: the bag is the attention-weighted mean of its instances.

Ilse, Tomczak, Welling: Attention-based deep multiple instance learning, ICML 2018, https://arxiv.org/abs/1802.04712.

1. ``h = embed(x)``; ``s = w · (tanh(V h + b_V) ⊙ σ(U h + b_U)) + b_w``; plain attention is without the gate σ(·).
2. ``a = softmax(s)`` within the bag, ``z = Σ_n a_n h_n``, ``logits = W z + b``.

Deviations from the authors' code: several attention heads are concatenated before the classifier, where the code does
not run; the probability is not clamped to [1e-5, 1 - 1e-5], which takes the gradient from confident errors, since the
loss reads logits.

`PRESETS` are the networks that other repositories call ABMIL; they differ in more than their names. Those of methods
that stand here (ACMIL, MHIM-MIL, PackMIL) are in the files of these.
"""

import copy
import re
from typing import cast

import torch
from torch import nn
from typing_extensions import override

from eosin.errors import CheckpointError, ConfigError
from eosin.mil._closed_forms import PooledBag, ReadoutBag, linear_terms
from eosin.mil._layers import (
    Activation,
    Attention,
    AttentionActivation,
    DropoutAfter,
    Init,
    as_dtype,
    embedding,
    head,
    initialise,
)
from eosin.mil._recipe import DEFAULT, EVERYDAY, RECIPES, Component, Recipe, Training
from eosin.mil.bags import PackedBags
from eosin.mil.layouts import LAYOUTS, Found, Layout, Taker, Tensors, block_diagonal
from eosin.mil.options import Count, Dropout
from eosin.mil.slots import AGGREGATORS, Aggregator, AggregatorOutput, AttentionOutput
from eosin.mil.subsets import as_array


@AGGREGATORS.register("abmil")
class Abmil(Aggregator):
    """Attention pooling.

    Parameters
    ----------
    in_dim, n_outputs
        Feature width D and logits K.
    embed_dims : tuple of int
        Widths of the layers before the attention; none pools the features themselves.
    embed_activation, embed_bias, dropout
        Of those layers.
    dropout_after : {"each", "last"}
        Whether dropout follows every one of them or only the last.
    gated, hidden, attention_activation, attention_bias, gate_dropout, heads
        Of the attention; see `eosin.mil._layers.Attention`.
    head_dims, head_activations
        Widths and activations of layers between the pooled bag and the last layer; the authors have none.
    init : {"default", "xavier"}
        torch's initial weights, or Xavier normal with zero bias.
    """

    output_type = AttentionOutput

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        *,
        embed_dims: tuple[Count, ...] = (512,),
        embed_activation: Activation = "relu",
        embed_bias: bool = True,
        dropout: Dropout = 0.25,
        dropout_after: DropoutAfter = "each",
        gated: bool = True,
        hidden: Count = 128,
        attention_activation: AttentionActivation = "tanh",
        attention_bias: bool = True,
        gate_dropout: Dropout = 0.0,
        heads: Count = 1,
        head_dims: tuple[Count, ...] = (),
        head_activations: tuple[Activation, ...] = (),
        init: Init = "default",
    ) -> None:
        width = (in_dim, *embed_dims)[-1]
        super().__init__(in_dim, n_outputs, embed_dim=heads * width)
        self.embed = embedding(
            in_dim,
            embed_dims,
            activation=embed_activation,
            bias=embed_bias,
            dropout=dropout,
            dropout_after=dropout_after,
        )
        self.attention = Attention(
            width,
            hidden=hidden,
            heads=heads,
            gated=gated,
            activation=attention_activation,
            bias=attention_bias,
            gate_dropout=gate_dropout,
        )
        if len(head_dims) != len(head_activations):
            raise ConfigError(f"abmil: {len(head_dims)} head_dims need as many head_activations")
        self.classifier = head(self.embed_dim, head_dims, head_activations, n_outputs)
        initialise(self, init)

    def forward(self, bags: PackedBags) -> AttentionOutput:
        """Return logits, bag embeddings, scores and instances."""
        return self.aggregate(bags.with_values(self.embed(bags.values)))

    def aggregate(self, bags: PackedBags) -> AttentionOutput:
        """Return the output for bags of embedded instances."""
        pool = self.attention.pool(bags.values, bags)
        bag = as_dtype(pool.pooled.flatten(1), next(self.classifier.parameters()))  # (B, H * E)
        return AttentionOutput(self.classifier(bag), bag, pool.scores, bags.values)

    @override
    def readout(self, bags: PackedBags, output: AggregatorOutput) -> PooledBag | ReadoutBag:
        assert isinstance(output, AttentionOutput)  # what the model declares
        heads = output.scores.shape[1]
        if isinstance(self.classifier, nn.Sequential):
            layers = copy.deepcopy(self.classifier).double().cpu()
            scores, values = (part.detach().double().cpu()[:, None] for part in (output.scores, output.instances))
            return ReadoutBag(scores, values.expand(-1, heads, -1), lambda pooled: layers(pooled.flatten(1)))
        linear = cast("nn.Linear", self.classifier)  # or what a strategy put in its place, with its weight and bias
        weights = linear.weight.view(self.n_outputs, heads, -1)  # (K, H, E)
        terms = linear_terms("ne,khe->nhk", output.instances, weights)
        return PooledBag(as_array(output.scores), terms, as_array(linear.bias))


def _found(tool: str, tensors: Tensors, **options: object) -> Found:
    """Return attention pooling with these tensors, of which the sizes are read."""
    widths = tuple(len(tensors[name]) for name in sorted(tensors) if re.fullmatch(r"embed\.\d+\.weight", name))
    sizes = {
        "embed_dims": widths,
        "hidden": len(tensors["attention.V.weight"]),
        "gated": "attention.U.weight" in tensors,
    }
    first = "embed.0.weight" if widths else "attention.V.weight"
    return Found(tool, Component(name="abmil", options=sizes | options), tensors, reads_features=first)


def _read_millab(taker: Taker) -> Found:
    tensors, widths = taker.embedding("patch_embed")
    tensors |= taker.attention(*taker.gate("global_attn."), widths[-1])
    return _found("MIL-Lab's ABMIL", tensors | taker.head("classifier", "classifier", widths[-1]))


def _read_hippo(taker: Taker) -> Found:
    tensors, widths = taker.embedding("encoder")
    gated = taker.has(r"attention_weights\.attention_V\.0\.weight")
    v, u, w = (f"attention_weights.attention_{part}" for part in ("V.0", "U.0", "weights"))
    # with several heads HIPPO returns one row of logits per head, and no rule for the slide
    tensors |= taker.attention(*((v, u, w) if gated else taker.gate("attention_weights.")), widths[-1])
    return _found("HIPPO", tensors | taker.head("head", "classifier", widths[-1]))


def _read_deepmil(taker: Taker) -> Found:
    """Read what stands behind the convolutions of AttentionDeepMIL, whose output is a probability."""
    tensors, widths = taker.embedding("feature_extractor_part2")
    gated = taker.has(r"attention_V\..*")
    names = ("attention_V.0", "attention_U.0", "attention_w") if gated else taker.gate("attention.")
    tensors |= taker.attention(*names, widths[-1])
    return _found("AttentionDeepMIL", tensors | taker.head("classifier.0", "classifier", widths[-1], 1))


def _read_torchmil(taker: Taker) -> Found:
    """Read ABMIL, or CLAM with one branch, of torchmil; its `feat_ext` may be any network, of which a sequence fits."""
    activation = taker.ask("attention_activation", "tanh", "relu", "gelu")
    embedded = taker.has(r"feat_ext\..*")
    said = {"embed_activation": taker.ask("embed_activation", "relu", "gelu", "none")} if embedded else {}
    tensors, widths = taker.embedding("feat_ext") if embedded else ({}, [])
    tensors |= taker.linear("pool.fc1", "attention.V", None, widths[-1] if widths else None)
    hidden, width = tensors["attention.V.weight"].shape
    if taker.has(r"pool\.fc_gated\..*"):
        tensors |= taker.linear("pool.fc_gated", "attention.U", hidden, width)
    tensors |= taker.linear("pool.fc2", "attention.w", 1, hidden, bias=False) | {"attention.w.bias": torch.zeros(1)}
    tensors |= taker.head("classifier", "classifier", width)
    return _found("torchmil", tensors, attention_activation=activation, **said)


def _read_trident(taker: Taker) -> Found:
    """Read TRIDENT's slide encoder and the classifier of its tutorial.

    Every head has layers of its own, which lie beside each other here; the layer that joins the heads is linear, as is
    the one behind it, so that both are one.
    """
    below = "feature_encoder.model." if taker.has(r"feature_encoder\.model\..*") else ""
    tensors, widths = taker.embedding(f"{below}pre_attention_layers")
    width, pooler = widths[-1], f"{below}image_pooler"
    heads = taker.count(re.escape(pooler) + r"\.attention_heads\.\d+\.0\.weight")
    for old, new in (("attention_heads", "V"), ("gating_layers", "U")):
        if old == "gating_layers" and not taker.has(re.escape(pooler) + r"\.gating_layers\..*"):
            continue
        layers = taker.stack(f"{pooler}.{old}.*.0", "", heads, None, width)
        tensors |= {f"attention.{new}{part}": layers[part].flatten(0, 1) for part in (".weight", ".bias")}
    scores = taker.stack(f"{pooler}.branching_layers.*", "", heads, 1)
    tensors["attention.w.weight"] = block_diagonal(list(scores[".weight"]))
    tensors["attention.w.bias"] = scores[".bias"].flatten()
    after = taker.linear(f"{below}post_attention_layers.0", "", width, width)
    if heads > 1:
        joined = taker.linear(f"{pooler}.condensing_layer", "", width, heads * width)
        weight, bias = (joined[part].double() for part in (".weight", ".bias"))
        after[".bias"] = (after[".weight"].double() @ bias + after[".bias"]).float()
        after[".weight"] = (after[".weight"].double() @ weight).float()
    tensors |= {f"classifier.0{part}": after[part] for part in (".weight", ".bias")}
    hidden: list[int] = []
    if taker.has(r"classifier\..*"):
        first = taker.linear("classifier.0", "classifier.2", None, width)
        hidden = [len(first["classifier.2.weight"])]
        tensors |= first | taker.linear("classifier.2", "classifier.4", None, hidden[0])
    return _found(
        "TRIDENT",
        tensors,
        embed_activation="gelu",
        heads=heads,
        head_dims=(width, *hidden),
        head_activations=("gelu", *["relu" for _ in hidden]),
    )


def _read_stamp_mlp(taker: Taker) -> Found:
    """Read STAMP's multilayer perceptron on the mean of the tiles: attention whose scores are all 0."""
    numbers = taker.numbers(r"mlp\.(\d+)\.weight")
    tensors: Tensors = {}
    widths: list[int] = []
    for place, number in enumerate(numbers):
        tensors |= taker.linear(f"mlp.{number}", f"classifier.{2 * place}", None, widths[-1] if widths else None)
        widths.append(len(tensors[f"classifier.{2 * place}.weight"]))
    if len(widths) < 2:
        raise CheckpointError(taker.path, "lacks layers of mlp; it is only a part of a model")
    dim = tensors["classifier.0.weight"].shape[1]
    tensors |= {"attention.V.weight": torch.zeros(1, dim), "attention.V.bias": torch.zeros(1)}
    tensors |= {"attention.w.weight": torch.zeros(1, 1), "attention.w.bias": torch.zeros(1)}
    hidden = tuple(widths[:-1])
    return _found("STAMP's perceptron", tensors, head_dims=hidden, head_activations=("relu",) * len(hidden))


LAYOUTS.add("STAMP MLP", Layout((r"mlp\.0\.weight", r"mlp\.3\.weight"), _read_stamp_mlp))
LAYOUTS.add("TRIDENT", Layout((r"(feature_encoder\.model\.)?image_pooler\..*",), _read_trident))
LAYOUTS.add("torchmil", Layout((r"pool\.fc1\..*", r"pool\.fc2\..*"), _read_torchmil, unused=("inst_classifiers.",)))
LAYOUTS.add(
    "AttentionDeepMIL",
    Layout((r"feature_extractor_part2\.0\..*",), _read_deepmil, unused=("feature_extractor_part1.",)),
)
LAYOUTS.add("MIL-Lab ABMIL", Layout((r"patch_embed\.0\.weight", r"global_attn\..*"), _read_millab))
LAYOUTS.add("HIPPO", Layout((r"encoder\.0\.weight", r"attention_weights\..*"), _read_hippo))

_CLAM: dict[str, object] = {"hidden": 256, "dropout": 0.25, "gate_dropout": 0.25}
PRESETS: dict[str, dict[str, object]] = {
    "ilse": {"embed_dims": (), "hidden": 128, "dropout": 0.0},
    "ilse_plain": {"embed_dims": (), "hidden": 128, "dropout": 0.0, "gated": False},
    "classic": {
        "embed_dims": (256, 128, 64),
        "hidden": 64,
        "dropout": 0.5,
        "dropout_after": "last",
        "init": "xavier",
    },
    "clam": _CLAM,
    "clam_big": _CLAM | {"hidden": 384},
    "millab": {"hidden": 384, "dropout": 0.25, "gate_dropout": 0.25},
}

RECIPE = Recipe(aggregator=Component(name="abmil"))
RECIPES.add("abmil", RECIPE)
RECIPES.add(DEFAULT, RECIPE.model_copy(update={"linear_below": 200}))
_ILSE = Training(optimizer="adam", lr=5e-4, weight_decay=1e-4, epochs=20, schedule="constant", patience=0)
CLASSIC = Training(
    optimizer="sgd", lr=5e-4, betas=(0.9, 0.999), weight_decay=0.01, epochs=50, schedule="constant", select="last"
)
"""The training of the classic tables (MUSK, FOX, TIGER) as released by Wang et al. (Revisiting multiple instance
neural networks, 2018, https://arxiv.org/abs/1610.02501), whose layers Ilse et al. took for these sets: no validation,
the model after the last pass. Keras' L2 penalty of 0.005 is a weight decay of 0.01; its Nesterov momentum and 1e-4
decay of the rate are left out. Rate and penalty are those of MUSK1 and TIGER; `benchmarks/mil_datasets.py` has the
others."""
_OWN_TRAINING = {"ilse": _ILSE, "ilse_plain": _ILSE, "classic": CLASSIC}
for _name, _options in PRESETS.items():
    _network = Component(name="abmil", options=_options)
    RECIPES.add(f"abmil_{_name}", Recipe(aggregator=_network, training=_OWN_TRAINING.get(_name, EVERYDAY)))
