"""`eosin check`: what stands in the way of a run, in seconds."""

from eosin.cli._common import Done, command, say
from eosin.cli.run import GROUPS, RARE, Plan, planned


@command(*GROUPS, rare=RARE, checks_device=False)
@planned
def check(asked: Plan) -> Done:
    """Check slides, labels, splits, encoder, device and disk for `eosin run`; takes the same options, writes nothing.

    Every problem is listed with its cure, and the exit code is 2, or 3 where the machine alone is to blame.
    """
    checked = asked.check()
    for warning in asked.problems.warnings:
        say(f"warning: {warning}")
    asked.problems.require()
    return Done(lines=(*checked.lines(), "nothing stands in the way"))
