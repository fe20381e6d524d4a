# %% [markdown]
# # Your own method as a plug-in
#
# A new way to pool the tiles of a slide is one class in one file. Training, cross-validation, prediction, maps and
# counterfactuals take it as they take the published ones. Here: the mean of the k tiles that score highest.
#
# ## Write the method
#
# `forward` receives several slides at once as `PackedBags`: the rows of all tiles one below the other, and where each slide
# begins. The functions of `eosin.kernels` compute on every slide separately: a method needs neither a loop nor padding. The
# signature of the constructor is the list of options; `Count` says that `k` is a whole number from 1.

# %%
from pathlib import Path

Path("top_pool.py").write_text(
    '''
"""The mean of the k highest-scoring tiles."""

import torch
from torch import nn

from eosin import AGGREGATORS, Aggregator, PackedBags
from eosin.mil.options import Count
from eosin.mil.slots import AggregatorOutput


@AGGREGATORS.register("top_pool")
class TopPool(Aggregator):
    """Mean logits of the ``k`` tiles with the highest sum of logits; of a smaller slide, of all tiles."""

    output_type = AggregatorOutput

    def __init__(self, in_dim: int, n_outputs: int, *, k: Count = 8) -> None:
        super().__init__(in_dim, n_outputs, embed_dim=in_dim)
        self.k = k
        self.score = nn.Linear(in_dim, n_outputs)

    def forward(self, bags: PackedBags) -> AggregatorOutput:
        logits, embeddings = [], []
        for rows in bags.values.split(list(bags.lengths)):
            scores = self.score(rows)
            top = scores.abs().sum(1).topk(min(self.k, len(rows))).indices
            logits.append(scores[top].mean(0) if len(rows) else scores.new_zeros(self.n_outputs))
            embeddings.append(rows[top].mean(0) if len(rows) else rows.new_zeros(self.in_dim))
        return AggregatorOutput(torch.stack(logits), torch.stack(embeddings))
''',
    encoding="utf-8",
)

# %% [markdown]
# ## Use it
#
# On the command line, `--plugin top_pool.py` loads it for one command. In Python, `add_plugin` does the same.

# %%
import numpy as np

import eosin
from eosin.plugins import add_plugin

add_plugin("top_pool.py")
print(eosin.AGGREGATORS["top_pool"].__doc__)

# %% [markdown]
# Data that you can make in a second show whether it learns at all: 40 slides of 200 tiles with 16 features, and in half of
# the slides three tiles that differ.

# %%
rng = np.random.default_rng(0)
spec = eosin.features.FeatureSpec(encoder="npz:toy", dim=16)
rows = ["slide_id,patient_id,label"]
for number in range(40):
    tiles = rng.normal(size=(200, 16)).astype(np.float32)
    if number % 2:
        tiles[:3, 0] += 6
    eosin.write_bag(Path(f"toy/s{number:02}.h5"), eosin.FeatureBag(tiles, spec, f"s{number:02}"))
    rows.append(f"s{number:02},p{number:02},{'tumour' if number % 2 else 'normal'}")
Path("toy.csv").write_text("\n".join(rows), encoding="utf-8")

# %%
study = eosin.open_study("toy", "toy.csv")
results = {}
for name in ("top_pool", "mean"):
    recipe = eosin.Recipe(aggregator=name, training={"epochs": 20, "lr": 0.02})
    results[name] = eosin.crossval(study, recipe, f"crossval_{name}")["metrics"]["auc"]
    print(name, results[name])

# %% [markdown]
# ## Next
#
# - Return an `AttentionOutput` with `scores`, and the method has attention maps.
# - Define `readout`, and counterfactuals become exact; [plug-ins](../plugins.md) and `CONTRIBUTING.md` tell what a method
#   can offer.
# - `docs/plugin/` is a package to copy, with an encoder and a slide reader besides.
