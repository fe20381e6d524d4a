"""The flow diagram of a cohort, as STARD and CONSORT ask for: how many slides were given, lost and used, and why."""

import textwrap
from collections.abc import Iterator
from html import escape

from eosin.mil._flow import STEPS, Count, Flow

BOX_W, SIDE_W, GAP_X, GAP_Y, LINE_H, PAD = 230, 300, 30, 24, 19, 12
CHARACTERS = 38
"""As many fit into a line of a side box, also in a wide font."""


def flow_svg(flow: Flow) -> str:
    """Return the diagram as SVG, which takes its colours from the page that it stands in.

    Boxes on the left count what is left after each step that lost a slide; boxes on the right name the reasons.
    """
    counts = flow.counts()
    parts: list[str] = []
    y = 1
    for number, count in enumerate(counts):
        last = number == len(counts) - 1
        side = [] if last else list(_reasons(counts[number + 1]))
        height = 2 * LINE_H + PAD
        parts += _box(1, y, BOX_W, [_title(count, last=last), _amount(count)], bold=True)
        if last:
            y += height
            break
        below = y + height + max(GAP_Y, len(side) * LINE_H + PAD + 2 * GAP_Y)
        middle = (y + height + below) // 2
        x = BOX_W // 2
        parts.append(_arrow(x, y + height, x, below))
        parts.append(_arrow(x, middle, BOX_W + GAP_X, middle))
        parts += _box(BOX_W + GAP_X, middle - (len(side) * LINE_H + PAD) // 2, SIDE_W, side)
        y = below
    width = BOX_W + GAP_X + SIDE_W + 2 if len(counts) > 1 else BOX_W + 2
    return (
        f'<svg class="flow" role="img" viewBox="0 0 {width} {y + 1}" width="{width}" height="{y + 1}" '
        f'xmlns="http://www.w3.org/2000/svg" font-family="inherit" font-size="14" fill="none" stroke="currentColor">'
        f"<title>Flow of the cohort: {escape('; '.join(flow.lines()))}</title>"
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="currentColor" stroke="none"/></marker></defs>' + "".join(parts) + "</svg>"
    )


def _title(count: Count, *, last: bool) -> str:
    if count.step == "given":
        return "Slides given and used" if last else "Slides given"
    return "Used in the analysis" if last else f"Slides {STEPS[count.step]}"


def _amount(count: Count) -> str:
    of = f", {_counted(count.patients, 'patient')}" if count.patients else ""
    return f"{_counted(count.slides, 'slide')}{of}"


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _reasons(count: Count) -> Iterator[str]:
    yield f"{sum(count.lost.values()):,} lost"
    for reason, number in count.lost.items():
        yield from textwrap.wrap(f"{number:,}: {reason}", CHARACTERS, subsequent_indent="\N{NO-BREAK SPACE}" * 4)


def _box(x: int, y: int, width: int, lines: list[str], *, bold: bool = False) -> Iterator[str]:
    yield f'<rect x="{x}" y="{y}" width="{width}" height="{len(lines) * LINE_H + PAD}" rx="4"/>'
    for number, line in enumerate(lines):
        weight = ' font-weight="600"' if bold and number == 0 else ""
        at = y + PAD // 2 + (number + 1) * LINE_H - 5
        yield f'<text x="{x + PAD}" y="{at}" fill="currentColor" stroke="none"{weight}>{escape(line)}</text>'


def _arrow(x: int, y: int, to_x: int, to_y: int) -> str:
    return f'<path d="M{x} {y}L{to_x} {to_y}" marker-end="url(#head)"/>'
