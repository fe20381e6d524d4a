"""The model card: what a run can state of itself, and what it leaves open."""

import pytest

from eosin.report._card import CardItem, CardPart, card_markdown, open_items
from eosin.report._model_card import model_card

from .test_evaluation import TARGETS, judged


@pytest.mark.parametrize("kind", TARGETS)
def test_a_card_states_figures_with_intervals_and_asks_for_the_rest(kind):
    task, _, summary = judged(kind)
    parts = model_card(summary, notes=("A limit.",))
    text = card_markdown("Model card: x", parts)
    found = summary["out_of_fold"][task.selection_metric]
    assert f"{found['value']:.3f} (95 % interval {found['lower']:.3f} to {found['upper']:.3f})" in text
    assert "3 folds; no patient is on two sides (no slide," in text
    assert "A limit." in text
    for heading in ("Use", "Data", "Model", "Performance", "Limits", "Open science", "Open"):
        assert f"## {heading}\n" in text
    assert text.count("- [ ]") == len(open_items(parts)) > 10


def test_what_a_table_says_does_not_become_markup():
    text = card_markdown("x", (CardPart("Data", (CardItem("Flow", "a\n# b <img> [c](d) *e*"),)),))
    assert "\n# b" not in text
    assert "\\<img>" in text
    assert "\\[c]" in text
    assert "## Open" not in text
