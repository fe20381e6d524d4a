"""The report: tables and figures of an evaluation, and the page that shows them beside the heat maps."""

from typing import TYPE_CHECKING

from eosin._lazy import lazy

if TYPE_CHECKING:
    from eosin.report._evaluation import evaluation_report, report_crossval
    from eosin.report._page import ReportData, write_report

__all__ = [
    "ReportData",
    "evaluation_report",
    "report_crossval",
    "write_report",
]

__getattr__, __dir__ = lazy(__name__)
