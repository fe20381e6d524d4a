"""How a sequence of tasks was learnt, R[i, j] the metric of task j after training task i.

Average after the last task; forgetting ``mean_{j<T} (max_{i<T} R[i, j] - R[T, j])``; backward transfer ``mean_{j<T}
(R[T, j] - R[j, j])``.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eosin.errors import ConfigError


@dataclass(frozen=True)
class ContinualMetrics:
    """How a sequence of tasks was learnt.

    Attributes
    ----------
    final_average, incremental_average : float
        Mean over the tasks after the last; mean over time of the mean over the tasks so far.
    forgetting : float
        Mean over the earlier tasks of the best metric before the last task minus that after it.
    backward_transfer : float
        Mean over the earlier tasks of the metric after the last task minus that right after the task itself.
    """

    final_average: float
    incremental_average: float
    forgetting: float
    backward_transfer: float


def continual_metrics(results: NDArray[np.float64]) -> ContinualMetrics:
    """Return the metrics of a sequence of tasks.

    Parameters
    ----------
    results : (T, T) float64
        Row i, column j: metric of task j after training task i; what lies above the diagonal is not read.

    Raises
    ------
    ConfigError
        If there are fewer than two tasks or the table is not square.
    """
    if results.ndim != 2 or results.shape[0] != results.shape[1] or len(results) < 2:
        raise ConfigError(f"results must be (T, T) with at least 2 tasks, not {results.shape}")
    last = results[-1]
    so_far = [float(row[: number + 1].mean()) for number, row in enumerate(results)]
    best = np.array([results[task:-1, task].max() for task in range(len(results) - 1)])
    return ContinualMetrics(
        final_average=float(last.mean()),
        incremental_average=float(np.mean(so_far)),
        forgetting=float((best - last[:-1]).mean()),
        backward_transfer=float((last - results.diagonal())[:-1].mean()),
    )
