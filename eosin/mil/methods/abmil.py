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

import re

from torch import nn
from typing_extensions import override

from eosin.mil._closed_forms import PooledBag, linear_terms
from eosin.mil._layers import (
    Activation,
    Attention,
    AttentionActivation,
    DropoutAfter,
    Init,
    as_dtype,
    embedding,
    initialise,
)
from eosin.mil._recipe import EVERYDAY, RECIPES, Component, Recipe, Training
from eosin.mil.bags import PackedBags
from eosin.mil.layouts import LAYOUTS, Found, Layout, Taker, Tensors
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
        self.classifier = nn.Linear(self.embed_dim, n_outputs)
        initialise(self, init)

    def forward(self, bags: PackedBags) -> AttentionOutput:
        """Return logits, bag embeddings, scores and instances."""
        return self.aggregate(bags.with_values(self.embed(bags.values)))

    def aggregate(self, bags: PackedBags) -> AttentionOutput:
        """Return the output for bags of embedded instances."""
        pool = self.attention.pool(bags.values, bags)
        bag = as_dtype(pool.pooled.flatten(1), self.classifier.weight)  # (B, H * E)
        return AttentionOutput(self.classifier(bag), bag, pool.scores, bags.values)

    @override
    def readout(self, bags: PackedBags, output: AggregatorOutput) -> PooledBag:
        assert isinstance(output, AttentionOutput)  # what the model declares
        heads = output.scores.shape[1]
        weights = self.classifier.weight.view(self.n_outputs, heads, -1)  # (K, H, E)
        terms = linear_terms("ne,khe->nhk", output.instances, weights)
        return PooledBag(as_array(output.scores), terms, as_array(self.classifier.bias))


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
