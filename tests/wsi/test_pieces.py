import numpy as np
import pytest
from scipy import ndimage

from eosin.wsi._pieces import find_pieces


def spiral(side):
    mask = np.zeros((side, side), bool)
    for ring in range(0, side // 2, 2):
        mask[ring, max(0, ring - 2) : side - ring] = True
        mask[ring : side - ring, side - ring - 1] = True
        mask[side - ring - 1, ring : side - ring] = True
        mask[ring + 2 : side - ring, ring] = True
    return mask


def test_a_long_way_round_is_one_piece():
    comb = np.zeros((400, 401), bool)
    comb[:, ::2] = True
    comb[-1] = True
    for mask in (spiral(401), spiral(401)[::-1], comb, comb[::-1], comb.T, np.ascontiguousarray(comb.T[:, ::-1])):
        assert find_pieces(mask).count == ndimage.label(mask)[1] == 1


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
