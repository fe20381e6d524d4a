"""One task after another: new classes are learnt, and what is forgotten is counted."""

from eosin.mil.continual._metrics import ContinualMetrics, continual_metrics
from eosin.mil.continual._sequence import (
    SEQUENCE,
    TABLE,
    Source,
    TaskRecord,
    TaskSequence,
    base_recipe,
    continued,
    measures,
    read_sequence,
    record_task,
    summary,
)

__all__ = [
    "SEQUENCE",
    "TABLE",
    "ContinualMetrics",
    "Source",
    "TaskRecord",
    "TaskSequence",
    "base_recipe",
    "continual_metrics",
    "continued",
    "measures",
    "read_sequence",
    "record_task",
    "summary",
]
