"""Tiles to features: encoders, extraction, the feature file and other tools' files."""

from typing import TYPE_CHECKING

from eosin._lazy import lazy

if TYPE_CHECKING:
    from eosin.features._bag import FeatureBag, FeatureSpec
    from eosin.features._encoders import ENCODERS, EncoderSpec, find_encoder
    from eosin.features._inference import Encoder, load_encoder
    from eosin.features._slide_encoders import SLIDE_ENCODERS, SlideEncoderSpec, find_slide_encoder, load_slide_encoder
    from eosin.features._slide_networks import SlideNetwork
    from eosin.features._store import find_bags, read_bag, verify_bag, write_bag
    from eosin.features._text_towers import TEXT_TOWERS, TextTower, TextTowerSpec, load_text_tower
    from eosin.features._verify import verify_job

__all__ = [
    "ENCODERS",
    "SLIDE_ENCODERS",
    "TEXT_TOWERS",
    "Encoder",
    "EncoderSpec",
    "FeatureBag",
    "FeatureSpec",
    "SlideEncoderSpec",
    "SlideNetwork",
    "TextTower",
    "TextTowerSpec",
    "find_bags",
    "find_encoder",
    "find_slide_encoder",
    "load_encoder",
    "load_slide_encoder",
    "load_text_tower",
    "read_bag",
    "verify_bag",
    "verify_job",
    "write_bag",
]

__getattr__, __dir__ = lazy(__name__)
