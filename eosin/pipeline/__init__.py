"""Stages in a row: slides to features, features to models, models to predictions, maps and a report."""

from typing import TYPE_CHECKING

from eosin._lazy import lazy

if TYPE_CHECKING:
    from eosin.pipeline._cohort_questions import question_cohort
    from eosin.pipeline._demo import Demo, run_demo
    from eosin.pipeline._deploy import Machine, encode_slides, predict_slides
    from eosin.pipeline._embed import Embedded, embed_slides
    from eosin.pipeline._explain import explain_slide
    from eosin.pipeline._question import question_slide
    from eosin.pipeline._result import Result, make_report
    from eosin.pipeline._run import Pipeline, run_pipeline
    from eosin.pipeline._run import run_pipeline as run_stages  # noqa: F401 - its name in 0.1
    from eosin.pipeline._selection import Selection, tile_selected
    from eosin.pipeline._two_stage import SecondStage, TwoStageResult, run_two_stage
    from eosin.pipeline._zeroshot import Prompts, ZeroShotResult, zeroshot_slides
    from eosin.wsi._job import TissueTiles

__all__ = [
    "Demo",
    "Embedded",
    "Machine",
    "Pipeline",
    "Prompts",
    "Result",
    "SecondStage",
    "Selection",
    "TissueTiles",
    "TwoStageResult",
    "ZeroShotResult",
    "embed_slides",
    "encode_slides",
    "explain_slide",
    "make_report",
    "predict_slides",
    "question_cohort",
    "question_slide",
    "run_demo",
    "run_pipeline",
    "run_two_stage",
    "tile_selected",
    "zeroshot_slides",
]

__getattr__, __dir__ = lazy(__name__)
