"""The model card: what a reader must know of a model, filled from its run, with what only a person knows left open.

Items carry their number in the checklists that journals ask for: TRIPOD+AI (Collins et al., BMJ 2024;385:e078378) as T,
and the subject of the item in CLAIM (Tejani et al., Radiology: Artificial Intelligence 2024;6:e240300).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from eosin import __version__
from eosin.mil._checkpoint import ModelCard
from eosin.mil.task import Task, load_task
from eosin.report._card import CardItem, CardPart
from eosin.report._measures import led_by, mean_and_sd, metric_name

SHOWN_TRAINING = ("optimizer", "lr", "weight_decay", "epochs", "select", "seed")


def model_card(
    metrics: Mapping[str, Any], card: ModelCard | None = None, *, notes: Sequence[str] = ()
) -> tuple[CardPart, ...]:
    """Return the card of an evaluated model.

    Parameters
    ----------
    metrics : mapping
        As `eosin.mil._crossval.crossval` returns, or ``metrics.json``.
    card : ModelCard, optional
        Of the model for other slides; of a fold where there is no such model.
    notes : sequence of str
        Limits that the run knows of.
    """
    task = load_task(metrics["task"])
    return (
        CardPart("Use", _use()),
        CardPart("Data", tuple(_data(metrics, card))),
        CardPart("Model", tuple(_model(metrics, card))),
        CardPart("Performance", tuple(_performance(metrics, task))),
        CardPart("Limits", tuple(_limits(notes))),
        CardPart("Open science", tuple(_science(card))),
    )


def _use() -> tuple[CardItem, ...]:
    return (
        CardItem("Intended use and users", "", "T 3b; CLAIM: study goal", "who uses it, for whom, where in care"),
        CardItem("Not for", f"Diagnosis or treatment without approval: eosin {__version__} is for research."),
        CardItem("Groups that may be treated unequally", "", "T 3c, 14", "known inequalities, and checks of fairness"),
    )


def _data(metrics: Mapping[str, Any], card: ModelCard | None) -> Iterator[CardItem]:
    yield CardItem(
        "Source, centres and dates", "", "T 5, 6a; CLAIM: data sources", "where and when slides were collected"
    )
    yield CardItem("Eligibility", "", "T 6b; CLAIM: inclusion and exclusion", "which patients were included")
    flow = metrics.get("cohort", [])
    yield CardItem("Flow", "; ".join(_step(count) for count in flow), "T 20a; CLAIM: flow of participants",
                   "how many slides and patients were lost, and why")  # fmt: skip
    task = metrics["task"]
    classes = f", classes {', '.join(map(str, task['classes']))}" if task.get("classes") else ""
    label = task.get("target") or task.get("kind")
    yield CardItem("Label", f"{task['kind']} of {label}{classes}", "T 8a; CLAIM: reference standard")
    yield CardItem("Who made the labels, and how", "", "T 8b, 8c; CLAIM: annotations", "raters, blinding, agreement")
    yield CardItem("Scanning and staining", "", "CLAIM: image acquisition", "scanners, stains, resolution")
    if card is not None:
        spec = card.features
        size = "" if spec.mpp is None else f", tiles of {spec.patch_size} px at {spec.mpp:g} µm/px"
        features = f"features of {spec.encoder} {spec.weights_hash}".strip()
        yield CardItem("Preparation", features + size, "T 7, 9b; CLAIM: data preparation")
    yield CardItem("Demographics", "", "T 20b; CLAIM: demographics", "age, sex and other facts of each part")


def _step(count: Mapping[str, Any]) -> str:
    lost = ", ".join(f"{number} {reason}" for reason, number in count["lost"].items())
    return f"{count['step']}: {count['slides']} slides of {count['patients']} patients" + (
        f" (lost: {lost})" if lost else ""
    )


def _model(metrics: Mapping[str, Any], card: ModelCard | None) -> Iterator[CardItem]:
    recipe = metrics.get("recipe") or (card.recipe.model_dump(mode="json") if card is not None else None)
    if recipe is not None and not {"aggregator", "terms", "training"} <= set(recipe):  # a probe, or a choice per fold
        shown = (f"{name} {value}" for name, value in recipe.items() if isinstance(value, str | int | float))
        yield CardItem("Model", ", ".join(shown) or "one for each fold", "T 12c, 22; CLAIM: model")
    elif recipe is not None:
        terms = "".join(f" + {term['name']}" for term in recipe["terms"])
        share = 0.0 if card is None else card.training.get("linear_share", 0.0)
        linear = f" with a linear part (weight {share:.2g})" if share else ""
        architecture = f"{recipe['aggregator']['name']}{linear}{terms}, strategy {recipe['strategy']['name']}"
        yield CardItem("Architecture", architecture, "T 12c, 22; CLAIM: model")
        shown = (f"{name} {recipe['training'][name]}" for name in SHOWN_TRAINING)
        yield CardItem("Training", ", ".join(shown), "T 12c; CLAIM: training")
    count = metrics["n_folds"]
    folds = f"{count} folds" if count > 1 else "one split"
    apart = "no patient is on two sides (no slide, where each slide counts as a patient)"
    yield CardItem("Splits", f"{folds}; {apart}", "T 12a; CLAIM: data partitions")
    yield CardItem("Sample size", "", "T 10; CLAIM: sample size", "why this many patients are enough")
    yield CardItem("Software", f"eosin {card.eosin if card else __version__}", "T 12c; CLAIM: software")
    if card is not None:
        yield CardItem("Weights", f"{card.model_id or 'unsaved'} (first digits of their SHA-256)", "T 22")
    threshold = metrics["task"].get("threshold")
    yield CardItem("Output", "decision at " + ("one half" if threshold is None else f"{threshold:.3g}"), "T 15")


def _performance(metrics: Mapping[str, Any], task: Task) -> Iterator[CardItem]:
    names = led_by(task.selection_metric, metrics["out_of_fold"])
    folds = metrics.get("metrics", {})
    for name, found in names.items():
        interval = "" if found["lower"] is None else f" (95 % interval {found['lower']:.3f} to {found['upper']:.3f})"
        spread = mean_and_sd(folds.get(name, {}))
        over = f"; {spread} over folds" if "±" in spread else ""
        value = "undefined" if found["value"] is None else f"{found['value']:.3f}{interval}{over}"
        yield CardItem(metric_name(name), value, "T 23a; CLAIM: performance" if name == task.selection_metric else "")
    yield CardItem("Heterogeneity", "", "T 23b", "performance by centre and by group; see Sites in the report, if any")
    yield CardItem("External test", "", "T 16; CLAIM: external data", "performance on slides of other centres")
    yield CardItem("Failure analysis", "The report shows the worst predictions with their slides.", "CLAIM: failures")


def _limits(notes: Sequence[str]) -> Iterator[CardItem]:
    yield from (CardItem("Of this run", note) for note in notes)
    yield CardItem("Uncertainty", "Intervals count patients, not slides. They do not cover other scanners, stains or "
                   "centres.", "T 12e; CLAIM: uncertainty")  # fmt: skip
    yield CardItem("Heat maps", "A map shows what the model computes of tiles. It does not prove what causes a label.",
                   "CLAIM: explainability")  # fmt: skip
    yield CardItem("Others", "", "T 26; CLAIM: limitations", "bias, sample, what may break it")


def _science(card: ModelCard | None) -> Iterator[CardItem]:
    code = f"eosin {card.eosin if card else __version__}; the recipe is in the model folder"
    yield CardItem("Code", code, "T 18f; CLAIM: code")
    for name, numbers, ask in (
        ("Ethics", "T 17", "approval and consent"),
        ("Registration and protocol", "T 18c, 18d; CLAIM: registration", "where they are"),
        ("Data", "T 18e; CLAIM: data", "who can have them"),
        ("Funding and interests", "T 18a, 18b; CLAIM: funding", "who paid"),
        ("Patients and public", "T 19", "how they took part"),
        ("Contact and licence", "", "who answers, and what is allowed"),
    ):
        yield CardItem(name, "", numbers, ask)
