"""What labels mean, one kind of label per file; importing the package registers all of them.

A task is a frozen options object, so a model folder stores it as JSON and builds it again (`eosin.mil.task`).
"""

from eosin.mil.task import Columns, Row, Task, load_task, make_task, wide  # noqa: F401 - where 0.1 had them
from eosin.mil.tasks._classification import Binary, Classification, Ordinal, sorted_labels  # noqa: F401
from eosin.mil.tasks._cox import Cox
from eosin.mil.tasks._multilabel import MultiLabel
from eosin.mil.tasks._multitask import MultiTask
from eosin.mil.tasks._regression import Regression
from eosin.mil.tasks._survival import DiscreteSurvival

__all__ = [
    "Binary",
    "Classification",
    "Cox",
    "DiscreteSurvival",
    "MultiLabel",
    "MultiTask",
    "Ordinal",
    "Regression",
    "Task",
    "make_task",
]
