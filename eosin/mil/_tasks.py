"""The tasks by name: what a label means. Nothing else in the package knows.

A task is a frozen options object, so a model folder stores it as JSON and builds it again.
"""

from collections.abc import Sequence

from eosin.mil._classification import Binary as Binary
from eosin.mil._classification import Classification as Classification
from eosin.mil._classification import Ordinal as Ordinal
from eosin.mil._classification import sorted_labels as sorted_labels
from eosin.mil._cox import Cox as Cox
from eosin.mil._multilabel import MultiLabel as MultiLabel
from eosin.mil._multitask import MultiTask as MultiTask
from eosin.mil._regression import Regression as Regression
from eosin.mil._survival import DiscreteSurvival as DiscreteSurvival
from eosin.mil.task import TASKS, require_values
from eosin.mil.task import Columns as Columns
from eosin.mil.task import Row as Row
from eosin.mil.task import Task as Task
from eosin.mil.task import load_task as load_task
from eosin.mil.task import wide as wide


def make_task(kind: str, rows: Sequence[Row], *, target: str = "label") -> Task:
    """Make the task that a label table poses.

    Parameters
    ----------
    kind : str
        ``classification``, ``binary``, ``ordinal``, ``multilabel``, ``regression``, ``survival``, ``cox`` or
        ``multitask``.
    rows : sequence of mappings
        Rows of the label table, values as text.
    target : str
        The label column; ``label=tumor`` to name the positive of two classes, ``grade=low<medium<high`` for grades
        whose order is not that of a number, ``a,b,c`` for the columns of ``multilabel``, ``time,event`` or
        ``time,event=VALUE`` for survival, and for ``multitask`` several of these with their kinds, ``er; ordinal:grade;
        cox:time,event``.

    Raises
    ------
    UnknownNameError
        If there is no such task.
    LabelError
        If a column does not exist, a value is missing, or the labels do not pose such a task.
    """
    task = TASKS[kind]
    require_values(rows, task.named_columns(target), all_of_them=not task.may_be_incomplete)
    return task.from_rows(rows, target)
