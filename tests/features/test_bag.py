"""Bags and what features must agree on."""

from pathlib import Path

import numpy as np
import pytest

from eosin.errors import FeatureMismatchError
from eosin.features._bag import FeatureBag, FeatureSpec

SPEC = FeatureSpec(encoder="uni_v1", weights_hash="aa", dim=4, mpp=0.5, patch_size=256)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"encoder": "uni_v2"}, "encoder uni_v2, not uni_v1"),
        ({"weights_hash": "bb"}, "weights bb, not aa"),
        ({"dim": 5}, "width 5, not 4"),
        ({"mpp": 0.25}, "mpp 0.25, not 0.5"),
        ({"mpp": None}, "mpp none, not 0.5"),
        ({"patch_size": 224}, "patch size 224, not 256"),
    ],
)
def test_each_difference_is_named(change: dict[str, object], named: str) -> None:
    other = SPEC.model_copy(update=change)
    with pytest.raises(FeatureMismatchError, match=named) as caught:
        SPEC.require_match(other, Path("x.h5"))
    assert "--encoder uni_v1 --mpp 0.5 --patch-size 256" in str(caught.value)


@pytest.mark.parametrize("change", [{}, {"weights_hash": ""}, {"mpp": 0.5049}])
def test_small_and_unknown_differences_pass(change: dict[str, object]) -> None:
    SPEC.require_match(SPEC.model_copy(update=change), Path("x.h5"))


@pytest.mark.parametrize(
    "features", [np.ones((3, 5), np.float32), np.ones(4, np.float32), np.ones((3, 4), np.float64), np.ones((3, 4), int)]
)
def test_contradictions_are_refused(features: np.ndarray) -> None:
    with pytest.raises(ValueError, match="features of s"):
        FeatureBag(features, SPEC, "s")
