"""Survival: what a time and an event mean, and the loss of hazards in bins of time (the other is in `_cox.py`).

Orientation. Internally 1 is an event that was seen and 0 is censored. The values decide where they are words (dead,
alive, censored), and ``time,status=2`` names the value that is the event. Of a column of 0 and 1 the name decides:
``death``, ``event``, ``uncensored`` have 1 for the event; ``censorship`` (as in the CLAM family of tables), ``alive``,
``survived`` have 1 for censored and are turned round. A name that says neither is a question to the user, with both
readings and their counts, for the two answers give opposite models.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from eosin._names import STROKES, plain_word
from eosin.errors import LabelError
from eosin.mil._intervals import Support
from eosin.mil._metrics import Floats, Metrics
from eosin.mil._survival_metrics import concordance, concordance_ipcw, discordance, integrated_brier, time_auc
from eosin.mil._tables import shown
from eosin.mil._target import quoted
from eosin.mil.task import TASKS, Columns, Row, Task, numbers, rank_bins, to_numpy, wide

SMALLEST_PROBABILITY = 1e-7
YES = frozenset({
    "1", "1.0", "true", "yes", "y", "ja", "j", "oui", "si", "sim", "wahr", "vrai", "verdadero", "vero", "tak", "evet",
    "да", "是", "はい",
})  # fmt: skip
NO = frozenset({
    "0", "0.0", "false", "no", "n", "nein", "non", "nao", "nee", "falsch", "faux", "falso", "nie", "hayir", "нет", "否",
    plain_word("いいえ"),
})  # fmt: skip
EVENT = frozenset({
    "dead", "deceased", "died", "event", "tot", "verstorben", "gestorben", "mort", "decede", "muerto", "fallecido",
    "fallecida", "muerta", "morto", "morta", "deceduto", "deceduta", "decedee", "overleden", "zgon", "zmarl",
    "zmarla", "zmarly", "oldu", "olmus", "vefat", "exitus", "умер", "умерла", "死亡",
})  # fmt: skip
CENSORED = frozenset({
    "alive", "living", "censored", "lebend", "lebt", "zensiert", "vivant", "vivante", "censure", "vivo", "viva",
    "censurado", "levend", "zyje", "zywy", "zywa", "sag", "hayatta", "yasiyor", "жив", "жива", "存活", "生存",
})  # fmt: skip
BINS = 4
TWO = 2
THIRDS = ("early", "middle", "late")
EVENT_NAMES = frozenset({
    "event", "events", "dead", "death", "died", "deceased", "relapse", "relapsed", "recurrence", "recurred",
    "progression", "progressed", "metastasis", "failure", "failed", "mortality", "observed", "tod", "tot", "exitus",
    "gestorben", "verstorben", "ereignis", "rezidiv", "evenement", "deces", "decede", "mort", "evento", "muerte",
    "muerto", "fallecido", "morto", "morte", "deceduto", "obito", "overleden", "overlijden", "gebeurtenis", "zgon",
    "smierc", "zmarl", "olum", "oldu", "vefat", "смерть", "умер", "死亡", "复发", "事件",
})  # fmt: skip
ENDPOINTS = frozenset({"os", "pfs", "dfs", "dss", "pfi", "dfi", "efs", "rfs", "bcr", "css", "dmfs", "ttp"})
"""Abbreviations that name an indicator with 1 for the event, as in the tables of TCGA."""

CENSORED_NAMES = frozenset({
    "censor", "censored", "censoring", "censorship", "cens", "alive", "living", "lives", "survived", "survivor",
    "survivors", "surviving", "lebend", "lebt", "uberlebt", "ueberlebt", "zensiert", "vivant", "vivants",
    "censure", "vivo", "viva", "vivos", "censurado", "censurato", "levend", "gecensureerd", "zyje", "zywy",
    "hayatta", "yasiyor", "жив", "存活", "生存", "删失",
})  # fmt: skip
DEATHS = frozenset({
    "dead", "death", "died", "deceased", "mortality", "tod", "tot", "exitus", "gestorben", "verstorben", "mort",
    "muerte", "muerto", "deces", "decede", "morto", "fallecido", "overleden", "zgon", "smierc", "zmarl", "olum", "oldu",
    "vefat", "смерть", "умер", "死亡",
})  # fmt: skip
LIVES = frozenset({
    "alive", "living", "lives", "survived", "lebend", "lebt", "vivo", "vivant", "levend", "zyje", "yasiyor", "жив",
    "存活",
})  # fmt: skip
NEGATIONS = frozenset({
    "not", "no", "non", "un", "without", "free", "never", "nicht", "kein", "keine", "ohne", "frei", "pas", "sans",
    "sin", "senza", "sem", "niet", "geen", "zonder", "nao",
})  # fmt: skip
SURVIVAL_WORDS = frozenset({"survival", "uberleben", "ueberleben", "survie", "supervivencia", "sopravvivenza"})
NUMBERED = re.compile(r"([01]):.+")
"""As cBioPortal writes them: ``1:DECEASED``, ``0:Censored``; 1 is the event."""


class SurvivalTask(Task):
    """What both survival tasks share: the columns and their orientation, and the times at which they are judged.

    Targets are (B, 2) float64: time, and 1 for an event or 0 for censored.
    """

    selection_metric: ClassVar[str] = "cindex"
    learnt: ClassVar[frozenset[str]] = frozenset({"edges"})
    time: str = "time"
    event: str = "event"
    one_is_censored: bool = False
    event_value: str = ""
    censored_value: str = ""
    edges: tuple[float, ...] = ()

    @classmethod
    def named_columns(cls, target: str) -> tuple[str, ...]:
        """Return the columns of ``time,event`` or ``time,event=VALUE``."""
        time, comma, event = (part.strip() for part in target.partition(","))
        if not comma:
            raise LabelError(
                f"survival needs two columns, time and event; pass --target TIME,EVENT instead of {target!r}"
            )
        event = event.partition("=")[0].strip()
        if time == event:
            raise LabelError(f"{time!r} cannot be both time and event; pass two columns (--target TIME,EVENT)")
        return time, event

    @classmethod
    def from_rows(cls, rows: Sequence[Row], target: str) -> Self:
        """Make the task of ``time,event``; ``time,event=2`` says which value is the event."""
        time, event = cls.named_columns(target)
        value = target.partition("=")[2].strip()
        options: dict[str, Any] = {"time": time, "event": event}
        if value:
            options |= {"event_value": value, "censored_value": _other(rows, event, value)}
        else:
            options["one_is_censored"] = _one_is_censored(rows, time, event)
        task = cls.parse(options)
        if not task.encode(rows)[:, 1].any():
            raise LabelError(
                f"column {event!r} holds no event, 1 being {'censored' if task.one_is_censored else 'the event'}; "
                f"if it is the other way round, say which value is the event (--target {time},{event}=VALUE)"
            )
        return task

    def describe(self, rows: Sequence[Row]) -> str:
        """Return the columns, their orientation, and how many rows have an event."""
        seen = [self._is_event(row[self.event]) for row in rows]
        values = sorted({row[self.event].strip() for row, event in zip(rows, seen, strict=True) if event})
        value = f"{self.event_value!r}" if self.event_value else " or ".join(values)
        turned = "; turned round, because its name says that 1 is censored" if value == "0" else ""
        counted = f"{sum(seen)} of {len(rows)} have one"
        return f"label: time in {self.time!r}; {self.event!r} with {value} for an event, {counted}{turned}"

    def fit_to(self, target: Tensor) -> Self:
        """Return the task with the quantiles of the times of these targets' events, `n_bins` - 1 of them."""
        times = target[target[:, 1] == 1, 0]
        parts = torch.arange(1, self.n_bins, dtype=times.dtype) / self.n_bins
        return self.model_copy(update={"edges": tuple(torch.quantile(times, parts).tolist())})

    @property
    def n_bins(self) -> int:
        """Number of bins that the edges make."""
        return BINS

    @property
    def columns(self) -> tuple[str, ...]:
        """Time and event."""
        return (self.time, self.event)

    def encode(self, rows: Sequence[Row]) -> Tensor:
        """Return time and event, (B, 2) float64; `LabelError` for a negative time or a value of no meaning."""
        times = numbers(rows, self.time)
        negative = [row[self.time] for row, time in zip(rows, times, strict=True) if time < 0]
        if negative:
            raise LabelError(f"{shown(list(map(repr, negative)))} in column {self.time!r}: a time cannot be negative")
        events = [float(self._is_event(row[self.event])) for row in rows]
        return torch.tensor(list(zip(times, events, strict=True)), dtype=torch.float64).reshape(-1, 2)

    def _is_event(self, text: str) -> bool:
        value = plain_value(text)
        if self.event_value:
            if value not in (plain_value(self.event_value), plain_value(self.censored_value)):
                raise LabelError(
                    f"{text!r} in column {self.event!r} is neither {self.event_value!r} nor {self.censored_value!r}"
                )
            return value == plain_value(self.event_value)
        if value in EVENT | CENSORED:
            return value in EVENT
        if NUMBERED.fullmatch(value):
            return value.startswith("1")
        if value not in YES | NO:
            raise LabelError(
                f"{text!r} in column {self.event!r} is neither 0 nor 1, nor a known word for event or censored; "
                f"correct it, or state which value is the event (--target {self.time},{self.event}=VALUE)"
            )
        return (value in YES) != self.one_is_censored

    def decode(self, target: NDArray[Any]) -> list[NDArray[Any]]:
        """Return times, and events in the table's orientation; words that `target` did not name become 1 and 0."""
        if self.event_value:
            return [target[:, 0], np.where(target[:, 1] == 1, self.event_value, self.censored_value)]
        events = 1 - target[:, 1] if self.one_is_censored else target[:, 1]
        return [target[:, 0], events.astype(np.int64)]

    def require_trainable(self, target: Tensor) -> None:
        """Refuse targets without an event."""
        if not target[:, 1].any():
            raise LabelError("no training slide has an event; use fewer folds")

    def risk(self, outputs: Floats) -> Floats:
        """Return a number that is higher for an earlier event, (B,)."""
        raise NotImplementedError

    def metrics(
        self,
        outputs: Floats,
        target: NDArray[Any],
        decided: NDArray[np.int64] | None = None,
        *,
        folds: NDArray[np.int64] | None = None,
    ) -> Metrics:
        """Return cindex and cindex_ipcw, which are Harrell's and Uno's, and time_auc over `edges`.

        See `eosin.mil._survival_metrics`.
        """
        time, event, risk = target[:, 0], target[:, 1] == 1, self.risk(outputs)
        groups = self._groups(folds)
        area = time_auc(risk, time, event, np.asarray(self.edges), groups=groups) if self.edges else None
        return {
            "cindex": concordance(risk, time, event, groups=groups),
            "cindex_ipcw": concordance_ipcw(risk, time, event, groups=groups),
            "time_auc": area,
        }

    def supports(self, target: NDArray[Any]) -> dict[str, Support]:
        """Return events and everybody for concordance, early events and those who live longer for time_auc."""
        time, event = target[:, 0], target[:, 1] == 1
        concordant = Support((event, np.ones(len(time), bool)))
        found = {"cindex": concordant, "cindex_ipcw": concordant}
        if not self.edges:
            return found
        return found | {"time_auc": Support((event & (time <= self.edges[-1]), time > self.edges[0]))}

    def surprise(self, outputs: Floats, target: NDArray[Any], *, folds: NDArray[np.int64] | None = None) -> Floats:
        """Return the share of the pairs with others that can be compared in which the risk is on the wrong side."""
        return discordance(self.risk(outputs), target[:, 0], target[:, 1] == 1, groups=self._groups(folds))

    def _groups(self, folds: NDArray[np.int64] | None) -> NDArray[np.int64] | None:
        """Return the folds when risks of different models have no common scale."""
        return None

    def pooled(self, tasks: Sequence[Self], outputs: Sequence[Floats]) -> tuple[Self, Floats]:
        """Return the task with the median of the edges; the outputs stay."""
        edges = np.median([task.edges for task in tasks], axis=0)
        return self.model_copy(update={"edges": tuple(edges.tolist())}), np.concatenate(outputs)

    def strata(self, rows: Sequence[Row]) -> list[str]:
        """Return event or censored, in thirds of the time by rank."""
        target = self.encode(rows).numpy()
        thirds = [THIRDS[int(third)] for third in rank_bins(target[:, 0], len(THIRDS))]
        return [f"{third} {'event' if seen else 'censored'}" for (_, seen), third in zip(target, thirds, strict=True)]

    def soft_strata(self, rows: Sequence[Row]) -> frozenset[str]:
        """Return all of them."""
        return frozenset(self.strata(rows))


@TASKS.register("survival")
class DiscreteSurvival(SurvivalTask):
    """Survival in a few bins of time: one logit per bin, the hazard of an event in it.

    ``h = σ(logits + base)``, ``S_k = Π_{j<=k} (1 - h_j)``. Loss of a bag with an event in bin Y:
    ``-log S_{Y-1} - log h_Y``; of a censored one: ``-(1 - alpha) log S_Y``; each argument at least 1e-7 (Zadeh and
    Schmid, 2020; the form that MHIM v2 and PackMIL use, with alpha 0 and without a base).

    Attributes
    ----------
    edges : tuple of float
        Upper ends of all bins but the last: quantiles of the times of events of the training part, see `fit_to`.
    base : tuple of float
        Log-odds of the hazards of the training part without regard to the bags, added to the logits. A model then
        starts from what is known of the average patient and learns who differs; without it the level of the hazards,
        which all bags share, is learnt first and takes most passes of a training. Empty adds nothing.
    bins : int
        Number of bins.
    alpha : float
        Takes weight from the censored.
    time, event : str
        Columns.
    one_is_censored : bool
        Orientation of the event column in the table.
    """

    kind: Literal["survival"] = "survival"
    learnt: ClassVar[frozenset[str]] = frozenset({"edges", "base"})
    base: tuple[float, ...] = ()
    bins: int = Field(default=BINS, ge=2)
    alpha: float = Field(default=0.0, ge=0, le=1)

    @property
    def n_bins(self) -> int:
        """Number of bins."""
        return self.bins

    @property
    def n_outputs(self) -> int:
        """One logit per bin."""
        return self.bins

    def fit_to(self, target: Tensor) -> Self:
        """Return the task with `edges` and `base` of these targets."""
        binned = super().fit_to(target)
        return binned.model_copy(update={"base": binned._average(target)})

    def _average(self, target: Tensor) -> tuple[float, ...]:
        """Return the logits that minimise the loss when all bags have the same, with half an event more and less."""
        place, seen = self._place(target)[:, None], target[:, 1:] == 1  # (B, 1)
        bins = torch.arange(self.bins)
        events = ((place == bins) & seen).sum(0)
        survived = torch.where(seen, place > bins, (place >= bins) * (1 - self.alpha)).sum(0)
        # a bin without an event has no logarithm of its hazard
        return tuple(((events + 0.5) / (survived + 0.5)).double().log().tolist())

    def _place(self, target: Tensor) -> Tensor:
        """Return the bin of each time, (B,); a time on an edge opens the next bin."""
        edges = torch.tensor(self.edges, dtype=target.dtype, device=target.device)
        return torch.bucketize(target[:, 0].contiguous(), edges, right=True)

    def _hazard_logits(self, logits: Tensor) -> Tensor:
        values = wide(logits)
        return values + torch.tensor(self.base, dtype=values.dtype, device=values.device) if self.base else values

    def bag_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the negative log-likelihood of each bag."""
        return survival_losses(self._hazard_logits(logits), self._place(target), target[:, 1], alpha=self.alpha)

    def activate(self, logits: Tensor) -> Floats:
        """Return the probability of surviving each bin, (B, K)."""
        return to_numpy((1 - self._hazard_logits(logits).sigmoid()).cumprod(1))

    def without_scale(self) -> Self:
        """Return the task without a base."""
        return self.model_copy(update={"base": ()})

    def mean_logits(self, tasks: Sequence[Self], logits: Sequence[Tensor]) -> Tensor:
        """Return the logits of the hazards of the mean survival at the edges of this task."""
        curves = [task._survival_at(own, self.edges) for task, own in zip(tasks, logits, strict=True)]
        survival = functional.pad(torch.stack(curves).mean(0), (1, 0), value=1.0)
        lost = (survival[:, :-1] - survival[:, 1:]).clamp(min=SMALLEST_PROBABILITY**2)
        return lost.log() - survival[:, 1:].clamp(min=SMALLEST_PROBABILITY**2).log()

    def _survival_at(self, logits: Tensor, times: Sequence[float]) -> Tensor:
        """Return survival at other edges than those of the task, (B, K) float64, as `pooled` does."""
        own = functional.logsigmoid(-self._hazard_logits(logits).double()).cumsum(1).exp()
        # interpolation is linear in the curve, so that curves with a single 1, moved, are the rows of its matrix
        edges, wanted = np.asarray(self.edges), np.asarray(times)
        from_start = _moved(np.zeros((1, self.bins)), edges, wanted)
        matrix = _moved(np.eye(self.bins), edges, wanted) - from_start
        start, moving = (torch.from_numpy(part).to(own.device) for part in (from_start, matrix))
        return start + own @ moving

    def risk(self, outputs: Floats) -> Floats:
        """Return minus the sum of the survival probabilities."""
        return np.asarray(-outputs.sum(1))

    @property
    @override
    def verdicts(self) -> tuple[str, ...]:
        return ("risk",)

    def table(self, outputs: Floats) -> Columns:
        """Return ``risk``, ``survival_<bin>`` and, of all bins but the last, ``until_<bin>``: its upper end."""
        ends = {f"until_{k + 1}": np.full(len(outputs), edge) for k, edge in enumerate(self.edges)}
        survival = {f"survival_{k + 1}": outputs[:, k] for k in range(self.bins)}
        return {"risk": self.risk(outputs)} | survival | ends

    def read_outputs(self, columns: Mapping[str, Sequence[str]]) -> Floats:
        """Return the probabilities of surviving each bin, at the `edges` of this task where rows have others."""
        survival = _numbers(columns, [f"survival_{k + 1}" for k in range(self.bins)])
        ends = [f"until_{k + 1}" for k in range(len(self.edges))]
        if not ends or any(name not in columns for name in ends):
            return survival
        edges = _numbers(columns, ends)
        # each fold has the quantiles of its own training part
        for own in np.unique(edges, axis=0):
            rows = (edges == own).all(1)
            survival[rows] = _moved(survival[rows], own, np.asarray(self.edges))
        return survival

    def metrics(
        self,
        outputs: Floats,
        target: NDArray[Any],
        decided: NDArray[np.int64] | None = None,
        *,
        folds: NDArray[np.int64] | None = None,
    ) -> Metrics:
        """Return cindex, cindex_ipcw, time_auc and integrated_brier over `edges`."""
        times = np.asarray(self.edges)
        brier = integrated_brier(outputs[:, : len(times)], target[:, 0], target[:, 1] == 1, times)
        return super().metrics(outputs, target, folds=folds) | {"integrated_brier": brier}

    def pooled(self, tasks: Sequence[Self], outputs: Sequence[Floats]) -> tuple[Self, Floats]:
        """Return the task with the median of the edges, and survival at these, linear between those of each task."""
        task, _ = super().pooled(tasks, outputs)
        moved = [
            _moved(rows, np.asarray(own.edges), np.asarray(task.edges))
            for own, rows in zip(tasks, outputs, strict=True)
        ]
        return task, np.concatenate(moved)


def _numbers(columns: Mapping[str, Sequence[str]], names: Sequence[str]) -> Floats:
    return np.stack([np.asarray(columns[name], np.float64) for name in names], 1)


def _moved(survival: Floats, edges: Floats, times: Floats) -> Floats:
    """Return survival curves, known at `edges` and 1 at time 0, at other times; the last column stays."""
    known = np.append(0.0, edges)
    values = np.concatenate([np.ones((len(survival), 1)), survival[:, : len(edges)]], 1)
    inside = [np.interp(times, known, row) for row in values]
    return np.concatenate([np.reshape(inside, (-1, len(times))), survival[:, len(edges) :]], 1)


def _one_is_censored(rows: Sequence[Row], time: str, event: str) -> bool:
    """Return the orientation of a column of 0 and 1; of one of words it is of no effect."""
    spelled = {plain_value(row[event]): row[event].strip() for row in reversed(rows)}
    unsaid = [value for value in spelled if value not in EVENT | CENSORED and not NUMBERED.fullmatch(value)]
    said, flags = says_event(event), all(value in YES | NO for value in unsaid)
    if not unsaid or (flags and said is not None):
        return said is False
    if not flags and (len(spelled) != TWO or len(unsaid) < len(spelled)):
        return False  # the first value that means nothing is reported with its column
    counts = Counter(plain_value(row[event]) for row in rows)
    ones, zeros = ([value for value in unsaid if value in words] for words in (YES, NO))
    groups = [group for group in (ones, zeros) if group] if flags else [[value] for value in sorted(unsaid)]
    shown = {spelled[group[0]]: sum(counts[value] for value in group) for group in groups}
    readings = "; ".join(f"if it is {value}, {count} of {len(rows)} have one" for value, count in shown.items())
    ways = " or ".join(f"--target {quoted(f'{time},{event}={value}')}" for value in shown)
    raise LabelError(
        f"column {event!r} holds {' and '.join(shown)}, and its name does not say which of them is the event: "
        f"{readings}; say which ({ways})"
    )


def says_event(column: str) -> bool | None:
    """Return whether 1 in a column of that name is the event; None where the name does not say.

    >>> says_event("uncensored"), says_event("OS_censorship"), says_event("vital")
    (True, False, None)
    """
    letters = "".join(one for one in unicodedata.normalize("NFKD", column) if not unicodedata.combining(one))
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", letters.translate(STROKES))]
    words += re.findall(r"[^\W\d_a-z]+", plain_word(letters))  # in other alphabets
    if DEATHS & set(words) and LIVES & set(words):  # "dead_or_alive" names both
        return None
    meant: set[bool] = set()
    negated = False
    for word in words:
        root = next(
            (word[len(no) :] for no in ("non", "un", "not") if word.startswith(no) and _meaning(word[len(no) :])), ""
        )
        negated ^= word in NEGATIONS or bool(root)
        meaning = _meaning(root or word)
        if meaning:
            meant.add(meaning == "event")
    if not meant:
        # "status" and "OS_STATUS" have 1 for the event by convention, but of a vital status 1 is often alive
        by_convention = words and set(words) <= {*ENDPOINTS, "status"}
        return True if by_convention else None
    # "progression_free_survival" spells out the name of an endpoint, and does not count those who are free of it
    if SURVIVAL_WORDS & set(words) and negated and False not in meant:
        return None
    # "OS_censorship", "event_censored": the name of the endpoint comes along, and what is censored decides
    return (False not in meant) ^ negated


def _meaning(word: str) -> Literal["event", "censored", ""]:
    if word in CENSORED_NAMES:
        return "censored"
    return "event" if word in EVENT_NAMES else ""


def plain_value(text: str) -> str:
    """Return a value as it is compared: without capitals, accents, and the ``.0`` of spreadsheets."""
    return re.sub(r"^(\d+)\.0+$", r"\1", plain_word(text))


def _other(rows: Sequence[Row], column: str, value: str) -> str:
    """Return the value of a column that is not the event."""
    found = sorted({row[column].strip() for row in rows})
    others = [text for text in found if plain_value(text) != plain_value(value)]
    if len(others) == len(found) or len({plain_value(text) for text in others}) > 1:
        raise LabelError(f"column {column!r} holds {', '.join(found)}; the event was said to be {value!r}, one of two")
    return others[0] if others else ""


def survival_losses(logits: Tensor, place: Tensor, event: Tensor, *, alpha: float = 0.0) -> Tensor:
    """Return the discrete-time negative log-likelihood of each bag.

    Parameters
    ----------
    logits : (B, K) float
    place : (B,) int64
        Bin of the event or of the censoring.
    event : (B,) float
        1 for an event, 0 for censored.
    alpha : float
        Weight that is taken from the censored.
    """
    hazard = logits.sigmoid()
    survival = (1 - hazard).cumprod(1)
    before = torch.cat([torch.ones_like(survival[:, :1]), survival], 1)  # (B, K + 1): S_{-1} ... S_{K-1}

    def log_at(values: Tensor, index: Tensor) -> Tensor:
        return values.gather(1, index[:, None])[:, 0].clamp(min=SMALLEST_PROBABILITY).log()

    seen = event.to(logits.dtype)
    happened = -(log_at(before, place) + log_at(hazard, place)) * seen
    censored = -log_at(before, place + 1) * (1 - seen)
    return happened + (1 - alpha) * censored
