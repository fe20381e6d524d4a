"""The figures of an evaluation as SVG that needs nothing from outside: curves, calibration, survival, scatter."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import matplotlib as mpl
import numpy as np
import scipy
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from sklearn.metrics import auc, precision_recall_curve, roc_curve

from eosin.mil._metrics import average_precision, calibration_curve
from eosin.mil._survival_metrics import kaplan_meier, log_rank

Flags = NDArray[np.bool_]
Floats = NDArray[np.float64]

SIZE_IN = (4.0, 4.0)
COLOURS = ("#7a2453", "#1f6f8b", "#c7822b", "#4c7a34", "#5b4b8a", "#8a8a8a", "#b5474b", "#2b8a7a")
FAINT = "0.75"
WILSON_Z = 1.96
DECISION_THRESHOLDS = np.linspace(0.02, 0.98, 49)
DECISION_DRAWS = 200
LOW_SHARE = 0.08  # a count below such a point would lie on the axis
CURVES_BESIDE_LEGEND, LEGEND_COLUMNS, LEGEND_LINE_IN = 2, 2, 0.17


@dataclass(frozen=True, eq=False)
class Curve:
    """Scores of the same cases, and which of them are positive.

    Attributes
    ----------
    name : str
        Legend entry.
    truth : (n,) bool
    score : (n,) float
        Larger means more likely positive; for a calibration curve a probability.
    """

    name: str
    truth: Flags
    score: Floats

    @property
    def is_defined(self) -> bool:
        """Whether both kinds are there."""
        return 0 < int(self.truth.sum()) < len(self.truth)


@dataclass(frozen=True)
class Panel:
    """A figure of the report.

    Attributes
    ----------
    uri : str
        ``data:`` address of the picture.
    title : str
    caption : str
        What it shows, in one sentence.
    """

    uri: str
    title: str
    caption: str = ""


def roc_panel(curves: Sequence[Curve], *, title: str = "ROC") -> Panel | None:
    """Draw sensitivity over 1 - specificity; None without a curve that is defined."""
    drawn = [curve for curve in curves if curve.is_defined]
    if not drawn:
        return None
    figure, axes = _square("1 − specificity", "Sensitivity")
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
    for curve, colour in zip(drawn, _colours(drawn), strict=True):
        false_positive, true_positive, _ = roc_curve(curve.truth, curve.score)
        name = f"{curve.name} (AUC {auc(false_positive, true_positive):.3f})"
        axes.plot(false_positive, true_positive, color=colour, linewidth=1.6, label=name)
    _legend(figure, axes, len(drawn), corner="lower right")
    return Panel(_svg(figure), title, "Dashed: chance.")


def precision_recall_panel(curves: Sequence[Curve], *, title: str = "Precision and recall") -> Panel | None:
    """Draw precision over recall, and the prevalence of a single curve; None without a curve that is defined."""
    drawn = [curve for curve in curves if curve.is_defined]
    if not drawn:
        return None
    figure, axes = _square("Recall", "Precision")
    for curve, colour in zip(drawn, _colours(drawn), strict=True):
        precision, recall, _ = precision_recall_curve(curve.truth, curve.score)
        name = f"{curve.name} (AP {average_precision(curve.score, curve.truth):.3f})"
        axes.step(recall, precision, where="post", color=colour, linewidth=1.6, label=name)
    caption = ""
    if len(drawn) == 1:
        prevalence = float(drawn[0].truth.mean())
        axes.axhline(prevalence, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
        caption = f"Dashed: prevalence, {prevalence:.2f}."
    _legend(figure, axes, len(drawn), corner="lower left")
    return Panel(_svg(figure), title, caption)


def calibration_panel(
    curve: Curve, *, error: float | None, error_of: str = "", title: str = "Calibration"
) -> Panel | None:
    """Draw observed shares over predicted probabilities in ten bins, with Wilson intervals and the counts.

    `error_of` says of what the expected calibration error is, where it is not of the curve.
    """
    if not len(curve.truth):
        return None
    points = calibration_curve(curve.score, curve.truth)
    figure, axes = _square("Predicted probability", "Observed share")
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
    low, high = _wilson(points[:, 1], points[:, 2])
    spread = np.clip([points[:, 1] - low, high - points[:, 1]], 0, None)
    axes.errorbar(
        points[:, 0], points[:, 1], yerr=spread, fmt="o-", color=COLOURS[0], markersize=4, linewidth=1.2, elinewidth=0.8
    )
    for x, y, count in points:
        place = (5, 4) if y < LOW_SHARE else (5, -9)
        axes.annotate(f"{int(count)}", (x, y), xytext=place, textcoords="offset points", fontsize=7, color="0.4")
    said = "" if error is None else f" Expected calibration error{error_of} {error:.3f}."
    caption = f"{curve.name}; bars: 95 % Wilson interval, numbers: slides in the bin.{said}"
    return Panel(_svg(figure), title, caption)


def net_benefit(truth: Flags, score: Floats, thresholds: Floats = DECISION_THRESHOLDS) -> Floats:
    """Return the net benefit of acting where the score reaches each threshold (Vickers and Elkin, 2006), (m,).

    True positives minus false positives, the latter weighed by the odds of the threshold, per case: whoever acts at a
    probability of 20 % takes four needless actions to be as bad as one that was missed.
    """
    acted = score[:, None] >= thresholds
    odds = thresholds / (1 - thresholds)
    return np.asarray((acted & truth[:, None]).mean(0) - odds * (acted & ~truth[:, None]).mean(0))


def net_benefit_band(truth: Flags, score: Floats, patients: Sequence[str]) -> tuple[Floats, Floats] | None:
    """Return the ends of the 95 % interval of the net benefit at each threshold, (m,); None for a single patient.

    Percentiles of a bootstrap that draws patients with all their cases.
    """
    owner = np.unique(np.asarray(patients), return_inverse=True)[1]
    rows = [np.flatnonzero(owner == number) for number in range(owner.max() + 1)]
    if len(rows) < 2:  # every draw would be the same, and the band a line
        return None
    drawn = np.random.default_rng(0).integers(len(rows), size=(DECISION_DRAWS, len(rows)))
    chosen = [np.concatenate([rows[number] for number in draw]) for draw in drawn]
    low, high = np.quantile([net_benefit(truth[one], score[one]) for one in chosen], [0.025, 0.975], axis=0)
    return low, high


def decision_panel(curve: Curve, patients: Sequence[str], *, title: str = "Decision curve") -> Panel | None:
    """Draw the net benefit over the threshold, with a band over patients, beside acting on all and on none."""
    if not curve.is_defined:
        return None
    at, band = DECISION_THRESHOLDS, net_benefit_band(curve.truth, curve.score, patients)
    figure, axes = _square("Threshold probability", "Net benefit")
    everyone = net_benefit(curve.truth, np.ones(len(curve.truth)))
    axes.plot(at, everyone, color=FAINT, linewidth=1.0, label="act on all")
    axes.axhline(0, color="0.4", linewidth=0.8, linestyle=(0, (4, 3)), label="act on none")
    share = top = float(curve.truth.mean())
    said = "no band: all slides are from one patient"
    if band is not None:
        axes.fill_between(at, *band, color=COLOURS[0], alpha=0.15, linewidth=0)
        top = max(top, float(band[1].max()))
        said = f"band: 95 % bootstrap over {len(set(patients))} patients"
    axes.plot(at, net_benefit(curve.truth, curve.score), color=COLOURS[0], linewidth=1.6, label="act by the model")
    axes.set(aspect="auto", ylim=(-0.1 * share - 0.02, 1.05 * top))
    axes.legend(frameon=False, fontsize=8)
    return Panel(_svg(figure), title, f"{curve.name}; {said}.")


def survival_panel(
    high: Flags, time: Floats, event: Flags, *, title: str = "Survival by predicted risk"
) -> Panel | None:
    """Draw Kaplan-Meier curves of patients with higher and with lower risk, numbers at risk, and the log-rank test.

    Parameters
    ----------
    high : (n,) bool
        Whether the risk is above the median of the patients that the same model was tested on.
    time : (n,) float
    event : (n,) bool
    title : str
    """
    if not high.any() or high.all():
        return None
    figure = Figure(figsize=(SIZE_IN[0] * 1.15, SIZE_IN[1]), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    names = ((~high, "lower risk", COLOURS[1]), (high, "higher risk", COLOURS[0]))
    for members, name, colour in names:
        times, survival = kaplan_meier(time[members], event[members])
        axes.step(np.append(0, times), np.append(1, survival), where="post", color=colour, linewidth=1.6, label=name)
        lost = time[members & ~event]
        places = np.searchsorted(times, lost, side="right")
        axes.plot(lost, np.append(1, survival)[places], "|", color=colour, markersize=5, markeredgewidth=0.8)
    ticks = [tick for tick in MaxNLocator(5).tick_values(0, float(time.max())) if 0 <= tick <= time.max()]
    rows = ["  ".join(f"{int((time[members] >= tick).sum())}" for tick in ticks) for members, _, _ in names]
    axes.set(ylim=(0, 1.02), xlim=(0, None), xlabel="Time", ylabel="Survival", xticks=ticks)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right", fontsize=8)
    statistic = log_rank(high.astype(np.int64), time, event)
    p_value = "undefined" if statistic is None else f"{scipy.stats.chi2.sf(statistic, 1):.2g}"
    caption = (
        f"Patients, halved by the median risk of each fold; ticks: censored. Log-rank p = {p_value}. At risk at the "
        f"marked times: lower {', '.join(rows[0].split())}; higher {', '.join(rows[1].split())}."
    )
    return Panel(_svg(figure), title, caption)


def scatter_panel(truth: Floats, predicted: Floats, *, title: str = "Predicted and true") -> Panel | None:
    """Draw predicted over true numbers."""
    if not len(truth):
        return None
    low, high = float(min(truth.min(), predicted.min())), float(max(truth.max(), predicted.max()))
    figure, axes = _square("True", "Predicted", limits=(low, high))
    axes.plot([low, high], [low, high], color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.plot(truth, predicted, "o", color=COLOURS[0], markersize=3.5, alpha=0.6, markeredgewidth=0)
    return Panel(_svg(figure), title, "Dashed: equal.")


def _wilson(share: Floats, count: Floats) -> tuple[Floats, Floats]:
    """Return Wilson's interval of shares of some counts."""
    square = WILSON_Z**2
    centre = (share + square / (2 * count)) / (1 + square / count)
    half = WILSON_Z * np.sqrt(share * (1 - share) / count + square / (4 * count**2)) / (1 + square / count)
    return centre - half, centre + half


def _square(x: str, y: str, *, limits: tuple[float, float] = (0.0, 1.0)) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE_IN, layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    room = 0.015 * ((limits[1] - limits[0]) or 1.0)
    span = (limits[0] - room, limits[1] + room)
    axes.set(xlabel=x, ylabel=y, xlim=span, ylim=span, aspect="equal")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(figure: Figure, axes: Axes, curves: int, *, corner: Literal["lower left", "lower right"]) -> None:
    """Name the curves in a corner where few of them leave one free, else below, where they hide nothing."""
    if curves <= CURVES_BESIDE_LEGEND:
        axes.legend(frameon=False, loc=corner, fontsize=8)
        return
    lines = -(-curves // LEGEND_COLUMNS)
    figure.set_figheight(SIZE_IN[1] + LEGEND_LINE_IN * (lines + 1))
    drawn, names = axes.get_legend_handles_labels()
    figure.legend(drawn, names, frameon=False, loc="outside lower center", fontsize=8, ncols=LEGEND_COLUMNS)


def _colours(drawn: Sequence[object]) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(len(drawn))]


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "eosin", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
