# %% [markdown]
# # From foreign features to a published aggregator
#
# A colleague sends features that CLAM has computed: a folder `h5_files` and a table of labels. You want to train TransMIL
# and CLAM on them, without the slides.
#
# ## What a colleague sends
#
# To have such files, the cell below paints slides, and writes their features as CLAM does. Skip it if you have files.

# %%
from pathlib import Path

import eosin
from eosin.wsi import Cohort, make_cohort

make_cohort(Path("cohort"), Cohort(n_slides=8, size_um=(400.0, 500.0)))
slides, own = eosin.find_slides("cohort/slides"), eosin.JobFolder(Path("own"))
eosin.tile_slides(slides, own, eosin.Tiling(mpp=0.5, patch_size=128))
eosin.extract(slides, own, "he_texture")
for path in eosin.find_bags("own/0.5mpp_128px_0px_overlap/features_he_texture").values():
    eosin.export_bag(path, "from_colleague", "clam")
print(sorted(path.name for path in Path("from_colleague").iterdir()))

# %% [markdown]
# ## Import
#
# The layout is recognised by the content of the files. What they do not say, you must: CLAM's files do not name the encoder
# or the resolution. If you guess wrong, nothing warns you later, so ask the colleague.

# %%
from eosin.features.interop import ImportOptions

facts = ImportOptions(encoder="he_texture", slide_mpp=0.5, tile_size=128)
for path in sorted(Path("from_colleague/h5_files").glob("*.h5")):
    imported = eosin.import_file(path, "study", facts)
print(imported.kind)
for note in imported.notes:
    print("-", note)

# %% [markdown]
# On the command line: `eosin import from_colleague --out study --encoder he_texture --slide-mpp 0.5 --tile-size 128`.
#
# ## Train a published method
#
# `eosin methods` lists them. A recipe holds the options of the paper; each can be changed by name.

# %%
study = eosin.open_study("study/features", "cohort/labels.csv")
for name in ("clam_mb", "transmil"):
    recipe = eosin.choose_recipe(name)
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"epochs": 3})})
    fitted = eosin.fit(study, recipe, f"model_{name}")
    print(name, sum(weight.numel() for weight in fitted.model.parameters()), "weights")

# %% [markdown]
# ## Use a checkpoint that somebody published
#
# `eosin convert` (in Python `eosin.convert_checkpoint`) reads checkpoints of CLAM, TransMIL, ABMIL, DSMIL and others, and
# refuses what it does not recognise: [methods](../methods.md) lists them. The features have to be those that the checkpoint
# was trained on, with the same encoder at the same resolution. The result is a model folder like the two above.
