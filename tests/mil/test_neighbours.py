import torch

from eosin.mil._neighbours import nearest_tiles


def by_hand(places, count):
    """The nearest by distance, then x, then y."""
    x, y = (places[:, axis].tolist() for axis in range(2))
    found = []
    for me in range(len(places)):
        far = [((x[i] - x[me]) ** 2 + (y[i] - y[me]) ** 2, x[i], y[i], i) for i in range(len(places)) if i != me]
        found.append([me, *(i for *_, i in sorted(far)[: count - 1])])
    return found


def test_of_equally_near_tiles_the_one_with_smaller_x_then_y_comes_first():
    places = torch.tensor([(x, y) for y in range(5) for x in range(6) if (x + y) % 4], dtype=torch.float32)
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))
    for count in (1, 4, 9):
        found, there = nearest_tiles(places[order], [len(places)], count)
        assert found.tolist() == by_hand(places[order], count)
        assert there.all()


def test_bags_are_apart_and_small_ones_have_fewer():
    places = torch.tensor([(0, 0), (1, 0), (0, 0), (1, 0), (2, 0)], dtype=torch.float32)
    found, there = nearest_tiles(places, [2, 0, 3], 3)
    assert found.tolist() == [[0, 1, 0], [1, 0, 1], [2, 3, 4], [3, 2, 4], [4, 3, 2]]
    assert there.tolist() == [[True, True, False]] * 2 + [[True] * 3] * 3


def test_tiles_in_one_place_come_first_in_their_own_list():
    found, _ = nearest_tiles(torch.zeros(4, 2), [4], 2)
    assert found[:, 0].tolist() == [0, 1, 2, 3]
    assert (found[:, 1] != found[:, 0]).all()
