"""A painted cohort."""

from pathlib import Path

import pytest

from eosin.wsi._synthetic import Cohort, make_cohort


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    make_cohort(
        folder, Cohort(n_slides=8, size_um=(440.0, 500.0), fine_fraction=0, pen_fraction=0, min_tumour=0.1, seed=2)
    )
    return folder
