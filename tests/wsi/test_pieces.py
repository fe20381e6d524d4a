import numpy as np
import pytest
from scipy import ndimage

from eosin.wsi.pieces import find_pieces


@pytest.mark.parametrize("share", [0.0, 0.05, 0.4, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (37, 53)])
def test_pieces_are_those_of_labelling_every_cell(share, shape):
    rng = np.random.default_rng(int(share * 100))
    mask = rng.random(shape) < share
    labels, count = ndimage.label(mask)
    pieces = find_pieces(mask)
    assert pieces.count == count
    assert sorted(pieces.sizes.tolist()) == sorted(np.bincount(labels.ravel())[1:].tolist())
    assert sorted(pieces.boxes(), key=str) == sorted(ndimage.find_objects(labels), key=str)
    seeds = rng.random(shape) < 0.1
    touched, edge = pieces.touching(seeds), pieces.on_edge()
    for number in range(count):
        one = pieces.mask(np.arange(count) == number)
        assert len(np.unique(labels[one])) == 1
        assert one.sum() == (labels == labels[one][0]).sum()
        assert touched[number] == (one & seeds).any()
        assert edge[number] == (one[[0, -1]].any() or one[:, [0, -1]].any())
