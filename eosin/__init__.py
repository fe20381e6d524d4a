"""eosin: computational pathology from slide pixels to explained predictions.

The names below are what a script needs; they are imported when they are first used.
"""

from typing import TYPE_CHECKING

from eosin import _moved
from eosin._lazy import lazy

if TYPE_CHECKING:
    from eosin.errors import ConfigError, EosinError, SlideError
    from eosin.features._bag import FeatureBag
    from eosin.features._encoders import find_encoder
    from eosin.features._extract import extract
    from eosin.features._store import find_bags, read_bag, write_bag
    from eosin.features._verify import verify_job
    from eosin.features.interop import export_bag, import_file
    from eosin.heatmaps._heatmap import Heatmap
    from eosin.heatmaps._maps import attention_map
    from eosin.mil._checkpoint import ModelCard, load_model
    from eosin.mil._convert import convert_checkpoint
    from eosin.mil._predict import predict
    from eosin.mil._probe import Probe
    from eosin.mil._probe import probe_study as probe
    from eosin.mil._recipe import Recipe, choose_recipe
    from eosin.mil._study import Study, open_study
    from eosin.mil._study import crossval_study as crossval
    from eosin.mil._study import fit_study as fit
    from eosin.mil.bags import PackedBags
    from eosin.mil.slots import AGGREGATORS, LOSS_TERMS, STRATEGIES, Aggregator, AttentionOutput, LossTerm, Strategy
    from eosin.pipeline._deploy import Machine, predict_slides
    from eosin.pipeline._embed import embed_slides as embed
    from eosin.pipeline._explain import explain_slide as explain
    from eosin.pipeline._question import question_slide as counterfactual
    from eosin.pipeline._result import Result
    from eosin.pipeline._run import Pipeline, run_pipeline
    from eosin.pipeline._zeroshot import zeroshot_slides as zeroshot
    from eosin.wsi._grid import TileGrid, Tiling, make_grid
    from eosin.wsi._job import JobFolder, tile_slides
    from eosin.wsi._slide_file import find_slides, open_slide
    from eosin.wsi._tiles import iterate_tiles
    from eosin.wsi._tissue import find_tissue

__all__ = [
    "AGGREGATORS",
    "LOSS_TERMS",
    "STRATEGIES",
    "Aggregator",
    "AttentionOutput",
    "ConfigError",
    "EosinError",
    "FeatureBag",
    "Heatmap",
    "JobFolder",
    "LossTerm",
    "Machine",
    "ModelCard",
    "PackedBags",
    "Pipeline",
    "Probe",
    "Recipe",
    "Result",
    "SlideError",
    "Strategy",
    "Study",
    "TileGrid",
    "Tiling",
    "__version__",
    "attention_map",
    "choose_recipe",
    "convert_checkpoint",
    "counterfactual",
    "crossval",
    "embed",
    "explain",
    "export_bag",
    "extract",
    "find_bags",
    "find_encoder",
    "find_slides",
    "find_tissue",
    "fit",
    "import_file",
    "iterate_tiles",
    "load_model",
    "make_grid",
    "open_slide",
    "open_study",
    "predict",
    "predict_slides",
    "probe",
    "read_bag",
    "run_pipeline",
    "tile_slides",
    "verify_job",
    "write_bag",
    "zeroshot",
]
__version__ = "0.2.0.dev0"


__getattr__, __dir__ = lazy(__name__)
_moved.install()
