"""What came out of the counterfactual examination of one slide, and what it means in words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy

from eosin.heatmaps._counterfactual import Effect, Origin, SmallestSet, as_probability
from eosin.heatmaps._subject import Look
from eosin.mil.subsets import Direction, Floats, Search, Target

_ROLES: dict[str, str] = {
    "min": "carry {} most",
    "max": "count against {} most",
    "least": "matter least for {}",
}


@dataclass(frozen=True, eq=False)
class Counterfactuals:
    """What came out.

    Parameters
    ----------
    slide_id : str
    class_name : str
        The class that all numbers are about.
    output : int
        Its index among the logits of the search.
    method : str
        How the numbers were made, in a sentence.
    effects : list of Effect
    tile_effects : (n,) float64
        What each tile adds to the log-odds of the class.
    agreement : float
        See `eosin.heatmaps._counterfactual.tile_effects`.
    search : Search
        Greedy removal of the tiles that carry the class.
    smallest : SmallestSet or None
        Fewest tiles whose removal turns the prediction.
    enough_alone : int or None
        Tiles that the model would call the class each by itself: with softmax pooling, one such tile is the smallest
        sufficient set, and so it is with any pooling that a tile alone passes through. None for models that have to be
        run again.
    certificate : (float, float) or None
        Log-odds after the search, and after the best set of the same size.
    curves : DataFrame
        Columns ``order`` (most attended first, greedy, random), ``share``, ``probability``, ``low``, ``high``.
    ranking : (n,) float64
        What "most attended" tiles are chosen by: attention, or the effects where a model has none.
    ranking_name : str
        "most attended" or "most effective".
    sufficient : SmallestSet or None
        Fewest tiles known to be called the class when they are all there is.
    direction : {"min", "max", "least"}
        Of the search.
    """

    slide_id: str
    class_name: str
    output: int
    method: str
    effects: list[Effect]
    tile_effects: Floats
    agreement: float
    search: Search
    smallest: SmallestSet | None
    enough_alone: int | None
    certificate: tuple[float, float] | None
    curves: pd.DataFrame
    ranking: Floats
    ranking_name: str
    sufficient: SmallestSet | None = None
    direction: Direction = "min"

    def __repr__(self) -> str:
        return f"<Counterfactuals of {self.slide_id} for {self.class_name}: {len(self.effects)} effects>"

    @property
    def n_tiles(self) -> int:
        """Number of tiles of the slide."""
        return len(self.tile_effects)

    def table(self) -> pd.DataFrame:
        """Return one row per intervention."""
        return effects_table(self.effects, {"slide": self.slide_id, "class": self.class_name})

    def sentences(self) -> list[str]:
        """Return what came out as sentences for a pathologist."""
        # of the ranking's shares kept alone one is enough to read; sets that were searched have sentences of their own
        ranked = [effect for effect in self.effects if effect.origin is Origin.RANKING and effect.kind == "keep only"]
        told = [e for e in self.effects if not e.origin.is_found and all(e is not other for other in ranked[1:])]
        sentences = [in_words(effect, self.class_name) for effect in told if effect.n_tiles]
        sentences.append(self._search_in_words())
        if self.effects[0].before > 0:
            if self.direction == "min":
                sentences.append(self._smallest_in_words())
            if self.sufficient is not None and self.enough_alone is None:
                alone = self._share_of_tiles(len(self.sufficient.tiles))
                sentences.append(f"In the order of their effects, {alone} alone would be called {self.class_name}.")
        if self.enough_alone is not None:
            alone = (
                f"Each by itself, {self._share_of_tiles(self.enough_alone)}" if self.enough_alone else "No single tile"
            )
            sentences.append(f"{alone} would be called {self.class_name}.")
        if self.agreement < 1:
            sentences.append(
                "The map of single tiles is a first-order estimate; its rank correlation with the exact effects of "
                f"random tiles is {self.agreement:.2f}."
            )
        return [*sentences, self.method]

    def _share_of_tiles(self, count: int) -> str:
        return f"{count} {'tile' if count == 1 else 'tiles'} ({100 * count / self.n_tiles:.2g} %)"

    def _search_in_words(self) -> str:
        rounds = len(self.search.order)
        before, after = (as_probability(value) for value in self._search_ends())
        top = set(np.argsort(-self.ranking, kind="stable")[:rounds].tolist())
        shared = len(top & set(self.search.order.tolist()))
        sentence = (
            f"Taking out the {rounds} tiles that {_ROLES[self.direction].format(self.class_name)}: {before} → {after}; "
            f"{shared} of them are among the {rounds} {self.ranking_name}"
        )
        if self.certificate is None:
            return f"{sentence}."
        best = as_probability(float(scipy.special.expit(self.certificate[1])))
        bound = "below" if self.direction == "min" else "above"
        return f"{sentence}; no other {rounds} tiles would bring it {bound} {best}."

    def _search_ends(self) -> tuple[float, float]:
        target = Target(self.output, "probability")
        return float(target.of(self.search.logits[0])), float(target.of(self.search.logits[-1]))

    def _smallest_in_words(self) -> str:
        if self.smallest is None:
            return f"No tested set of tiles changes the prediction of {self.class_name}."
        count = len(self.smallest.tiles)
        how = "at least" if self.smallest.is_certain else "in the order of the search,"
        return f"To change the prediction of {self.class_name}, {how} {self._share_of_tiles(count)} must be removed."


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
    random = as_probability(float(scipy.special.expit(effect.control_mean)))
    # of tiles that the model weighs most the rank says how attention works, and no more
    is_test = effect.origin.is_given and effect.control_rank is not None
    chance = f" (p = {effect.control_rank:.2g})" if is_test else ""
    return f"{sentence}; with as many random tiles {random}{chance}."


def describe_method(look: Look, search: Search) -> str:
    """Return how the numbers were made, in a sentence that is printed in every output: the method's own."""
    how = look.subsets.how
    return f"{how}; {search.how}." if search.how else f"{how}."
