"""What came out of the counterfactual examination of one slide, and what it means in words."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import expit

from eosin.heatmaps.counterfactual import Effect, SmallestSet, as_probability
from eosin.heatmaps.pooled import Direction, Floats, Search, Target
from eosin.heatmaps.wording import effects_table, in_words

SEARCHED, NECESSARY, SUFFICIENT, BEST = (
    "tiles of the search",
    "smallest necessary set",
    "smallest sufficient set",
    "best set of the search's size",
)
OWN_SETS = (SEARCHED, NECESSARY, SUFFICIENT, BEST)
_ROLES: dict[str, str] = {
    "min": "carry {} most",
    "max": "speak against {} most",
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
        See `eosin.heatmaps.counterfactual.tile_effects`.
    search : Search
        Greedy removal of the tiles that carry the class.
    smallest : SmallestSet or None
        Fewest tiles whose removal turns the prediction.
    enough_alone : int or None
        Tiles that the model would call the class each by itself: with softmax pooling, one such tile is the smallest
        sufficient set. None for models that have to be run again.
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

    @property
    def n_tiles(self) -> int:
        """Number of tiles of the slide."""
        return len(self.tile_effects)

    def table(self) -> pd.DataFrame:
        """Return one row per intervention."""
        return effects_table(self.effects, {"slide": self.slide_id, "class": self.class_name})

    def sentences(self) -> list[str]:
        """Return what came out as sentences for a pathologist."""
        first_kept = next((effect for effect in self.effects if effect.kind == "keep only"), None)
        told = [e for e in self.effects if e.kind != "keep only" or e is first_kept or self.ranking_name not in e.what]
        told = [e for e in told if not e.what.startswith(OWN_SETS)]  # these have sentences of their own
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
                "The map of single tiles is a first-order guess; its rank correlation with the exact effects of "
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
        best = as_probability(float(expit(self.certificate[1])))
        bound = "below" if self.direction == "min" else "above"
        return f"{sentence}; no other {rounds} tiles would bring it {bound} {best}."

    def _search_ends(self) -> tuple[float, float]:
        target = Target(self.output, "probability")
        return float(target.of(self.search.logits[0])), float(target.of(self.search.logits[-1]))

    def _smallest_in_words(self) -> str:
        if self.smallest is None:
            return f"No set of tiles that was tried turns the prediction away from {self.class_name}."
        count = len(self.smallest.tiles)
        how = "at least" if self.smallest.is_certain else "in the order of the search,"
        return f"To turn the prediction away from {self.class_name}, {how} {self._share_of_tiles(count)} must go."
