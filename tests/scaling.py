"""How many times a long test does something: `EOSIN_CAMPAIGN` is the share of what `docs/reliability.md` states.

`EOSIN_SEED` chooses other random cases, so that a campaign in pieces does not try the same ones again."""

import os

SCALE = float(os.environ.get("EOSIN_CAMPAIGN", "1"))
SEED = int(os.environ.get("EOSIN_SEED", "0"))


def scaled(count: int, least: int = 1) -> int:
    """Return a count in the proportion of this campaign."""
    return max(least, round(count * SCALE))
