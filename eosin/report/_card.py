"""The parts of a model card, for a page and as Markdown; `eosin.report._model_card` fills them."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CardItem:
    """One statement of a card.

    Attributes
    ----------
    name : str
    text : str
        Empty where the run cannot say it.
    guideline : str
        Numbers of the items in TRIPOD+AI and CLAIM.
    ask : str
        What a person must write.
    """

    name: str
    text: str = ""
    guideline: str = ""
    ask: str = ""


@dataclass(frozen=True)
class CardPart:
    """Items under one heading."""

    heading: str
    items: tuple[CardItem, ...]


def card_markdown(title: str, parts: Sequence[CardPart]) -> str:
    """Return a card as Markdown, with a check list of what is open at its end."""
    lines = [f"# {title}", "", "In brackets: items of TRIPOD+AI (T) and CLAIM that ask for it.", ""]
    for part in parts:
        lines += [f"## {part.heading}", ""]
        lines += [
            f"- **{item.name}**{_numbers(item)}: {_plain(item.text) or f'*open: {item.ask}*'}" for item in part.items
        ]
        lines += [""]
    left = open_items(parts)
    if left:
        lines += ["## Open", "", *(f"- [ ] {item.name}{_numbers(item)}: {item.ask}" for item in left), ""]
    return "\n".join(lines)


def open_items(parts: Sequence[CardPart]) -> list[CardItem]:
    """Return the items that a person must write."""
    return [item for part in parts for item in part.items if not item.text]


def _numbers(item: CardItem) -> str:
    return f" ({item.guideline})" if item.guideline else ""


def _plain(text: str) -> str:
    """Return text on one line, so that no value of a table makes a heading or a tag of a card."""
    one_line = " ".join(text.split())
    for mark in "\\`*_<[":
        one_line = one_line.replace(mark, f"\\{mark}")
    return one_line
