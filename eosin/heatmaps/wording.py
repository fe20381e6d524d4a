"""Effects as tables and as sentences for a pathologist."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.special import expit

from eosin.heatmaps.counterfactual import Effect, as_probability
from eosin.heatmaps.pooled import Search
from eosin.heatmaps.subsets import Look


def effects_table(effects: Sequence[Effect], columns: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Return one row per effect: the fields of `Effect`, probabilities and change; `columns` are put in front."""
    rows = [
        {
            **(columns or {}),
            "kind": effect.kind,
            "tiles": effect.what,
            "n_tiles": effect.n_tiles,
            "probability_before": effect.probability_before,
            "probability_after": effect.probability_after,
            "log_odds_before": effect.before,
            "log_odds_after": effect.after,
            "change": effect.change,
            "control_mean": effect.control_mean,
            "control_low": effect.control_low,
            "control_high": effect.control_high,
            "control_rank": effect.control_rank,
            "n_controls": effect.n_controls,
            "effect_size": effect.effect_size,
        }
        for effect in effects
    ]
    return pd.DataFrame(rows)


def in_words(effect: Effect, class_name: str) -> str:
    """Return an effect as a sentence for a pathologist."""
    how = {
        "remove": f"Without the {effect.what}",
        "keep only": f"With the {effect.what} alone",
        "add": f"With the {effect.what} added",
    }[effect.kind]
    before, after = (as_probability(value) for value in (effect.probability_before, effect.probability_after))
    says = "still says" if effect.before > 0 else "still does not say"
    turned = "no longer says" if effect.before > 0 else "now says"
    verdict = f"{says if effect.is_still_predicted else turned} {class_name}"
    sentence = f"{how} ({effect.n_tiles}) the model {verdict}: {before} → {after}"
    if effect.control_mean is None:
        return f"{sentence}."
    random = as_probability(float(expit(effect.control_mean)))
    return f"{sentence}; with as many random tiles {random} (p = {effect.control_rank:.2g})."


def describe_method(look: Look, search: Search) -> str:
    """Return how the numbers were made, in a sentence that stands in every output."""
    if look.method == "closed form":
        return (
            "All numbers are exact: the model is linear after its softmax pooling, so every prediction follows from "
            "its sums without running it again."
        )
    if look.method == "closed form but for critical tiles":
        return (
            "All numbers are exact: predictions follow from the sums of the model's softmax pooling, and the model was "
            "run again where a tile is taken that it compares all others with."
        )
    largest = int(np.diff(search.removed).max(initial=1))
    at_once = "one tile" if largest == 1 else f"{largest} tiles"
    how = f"the search removed {at_once} at a time"
    if not search.evaluations:
        return (
            f"Every number is the model run again on the tiles that remain; {how} in the order of first-order guesses."
        )
    return (
        f"Every number is the model run again on the tiles that remain; {how} and judged {search.evaluations} "
        "candidates, shortlisted by first-order guesses."
    )
