"""How many times a long test does something: `EOSIN_CAMPAIGN` is the share of what `docs/reliability.md` states."""

import os

SCALE = float(os.environ.get("EOSIN_CAMPAIGN", "1"))


def scaled(count: int, least: int = 1) -> int:
    """Return a count in the proportion of this campaign."""
    return max(least, round(count * SCALE))
