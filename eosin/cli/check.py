"""`eosin check`: find the problems of a run before it starts."""

from eosin.cli._common import Done, command
from eosin.cli.run import GROUPS, RARE, Plan, planned


@command(*GROUPS, rare=RARE, checks_device=False)
@planned
def check(asked: Plan) -> Done:
    """Check slides, labels, splits, encoder, device and disk for `eosin run`. Nothing is written.

    Every problem is listed with its solution. Exit code 2: there are problems; 3: all are problems of the machine.
    """
    checked = asked.check()
    asked.problems.require()
    return Done(lines=(*checked.lines(), "no problems found"))
