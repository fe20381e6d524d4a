# %% [markdown]
# # A first cohort
#
# From slides and one label per slide to a model, its figures, and a map of what it looks at. The slides are painted, so
# that nothing has to be downloaded and the right answer is known. With your own slides, begin at *Tiles*.

# %%
from pathlib import Path

import eosin
from eosin.wsi import Cohort, make_cohort

easy = Cohort(
    n_slides=16, slides_per_patient=1, size_um=(600.0, 700.0), min_tumour=0.15, pen_fraction=0, fine_fraction=0
)
make_cohort(Path("cohort"), easy)
slides = eosin.find_slides("cohort/slides")
print(len(slides), "slides;", Path("cohort/labels.csv").read_text().splitlines()[:3])

# %% [markdown]
# ## Tiles
#
# A `JobFolder` holds everything that is computed of slides. Tiles are squares of `patch_size` pixels at `mpp` µm per pixel;
# tissue is found first, and tiles with too little of it are left out. The report counts what became of the slides: a slide
# that cannot be read is listed, and never stops the others.

# %%
job = eosin.JobFolder(Path("job"))
report = eosin.tile_slides(slides, job, eosin.Tiling(mpp=0.5, patch_size=128))
print(report.summary())

# %% [markdown]
# ## Features
#
# An encoder turns every tile into a row of numbers. `he_texture` measures colour and texture and needs no weights. For a
# real study take a foundation model: `eosin encoders` lists them with their licences.

# %%
print(eosin.extract(slides, job, "he_texture").summary())
features = Path("job/0.5mpp_128px_0px_overlap/features_he_texture")

# %% [markdown]
# ## Train and test
#
# `open_study` joins features and labels, and reports what does not fit. All slides of a patient stay on one side of every
# split. `crossval` trains one model per fold and tests it on patients that it has not seen.

# %%
study = eosin.open_study(features, "cohort/labels.csv")
recipe = eosin.choose_recipe("abmil")
recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"epochs": 15})})
summary = eosin.crossval(study, recipe, "crossval")
for name in ("auc", "balanced_accuracy"):
    print(name, summary["metrics"][name])

# %% [markdown]
# Look at the interval before the number: with so few patients it is wide, and there is none where all folds agree. Painted
# slides are easy; the result shows that the software works.
#
# ## Predict and look
#
# Of a cross-validation, the fold answers that has not seen the patient (`seen` is `no`). A slide's map shows what the model
# says of each tile alone: evidence for the second class is dark red, evidence against it is light blue.

# %%
files = eosin.find_bags(features)
eosin.predict("crossval", files, "predictions.csv")
print(Path("predictions.csv").read_text().splitlines()[0])
print(
    eosin.explain("crossval", slides[0], eosin.read_bag(files[slides[0].slide_id]), "maps", formats=("png", "geojson"))
)

# %% [markdown]
# ## The same on the command line
#
# ```
# eosin tile     --slides cohort/slides --job job --mpp 0.5 --patch-size 128
# eosin extract  --slides cohort/slides --job job --encoder he_texture
# eosin crossval --features job/0.5mpp_128px_0px_overlap/features_he_texture --labels cohort/labels.csv --out crossval
# eosin predict  --model crossval --features job/0.5mpp_128px_0px_overlap/features_he_texture --out predictions.csv
# ```
#
# or all at once: `eosin run --slides cohort/slides --labels cohort/labels.csv --job job`.
