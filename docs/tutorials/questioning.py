# %% [markdown]
# # Question a model
#
# A heat map says where a model looked. It does not say what would change its mind. A counterfactual does: remove tiles, keep
# only some, or add tiles of another slide, and predict again.
#
# ## A model
#
# Painted slides with tumour nests whose outlines are known, and a model that has seen slide labels only.

# %%
from pathlib import Path

import pandas as pd

import eosin
from eosin.wsi import Cohort, make_cohort

make_cohort(Path("cohort"), Cohort(n_slides=8, size_um=(500.0, 600.0), min_tumour=0.15))
slides, job = eosin.find_slides("cohort/slides"), eosin.JobFolder(Path("job"))
eosin.tile_slides(slides, job, eosin.Tiling(mpp=0.5, patch_size=128))
eosin.extract(slides, job, "he_texture")
features = "job/0.5mpp_128px_0px_overlap/features_he_texture"
study = eosin.open_study(features, "cohort/labels.csv")
eosin.fit(study, "abmil", "model")

# %% [markdown]
# Choose a slide with tumour. The answer is about a slide that the model was trained on, which is fine for learning how to
# ask, and not for a claim: every output says so (`seen`).

# %%
labels = pd.read_csv("cohort/labels.csv").set_index("slide_id").label
tumour = next(slide for slide in slides if labels[slide.slide_id] == "tumour")
bag = eosin.read_bag(eosin.find_bags(features)[tumour.slide_id])
print(tumour.slide_id, bag.n_instances, "tiles")

# %% [markdown]
# ## Ask
#
# With the outline of the nests (here the painter's, else yours from QuPath), their tiles are removed, and kept alone. Beside
# each set stand random sets of the same size: an effect that random tiles have as well is not about these tiles.

# %%
from eosin.heatmaps import Questions

quick = Questions(fractions=(0.05, 0.2), rounds=10, controls=19)
outline = Path("cohort/truth") / f"{tumour.slide_id}.geojson"
written = eosin.counterfactual("model", bag, "answers", slide_file=tumour, annotation=outline, questions=quick)
print([path.name for path in written])

# %%
answers = pd.read_csv(next(path for path in written if path.suffix == ".csv"))
print(answers.iloc[:, :6].to_string(max_rows=12, max_colwidth=40))

# %% [markdown]
# Open the `.html` beside it: it says the same in sentences. The `.geojson` shows in QuPath how much each tile adds.
#
# ## Ask a cohort
#
# `eosin counterfactual` with a folder of slides asks all of them, compares with models whose weights were shuffled, and
# writes one table. See [heat maps](../heatmaps.md).
