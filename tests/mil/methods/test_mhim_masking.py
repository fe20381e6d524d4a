import torch

from eosin.mil.bags import PackedBags
from eosin.mil.methods.mhim import fraction_counts, leaves_some, random_subset, randomly_high, rows_where, voted

LENGTHS = (9, 1, 0, 4)
BAGS = PackedBags.pack([torch.zeros(n, 2) for n in LENGTHS])


def per_bag(mask):
    return [int(part.sum()) for part in BAGS.unpack(mask)]


def test_fractions_are_rounded_up():
    assert fraction_counts(BAGS, 0.3) == [3, 1, 0, 2]
    assert fraction_counts(BAGS, 0.0) == [0, 0, 0, 0]


def test_a_random_subset_has_the_asked_size_and_keeps_to_what_it_may_take():
    torch.manual_seed(0)
    among = torch.arange(14) % 2 == 0
    for _ in range(20):
        drawn = random_subset(BAGS, [3, 1, 0, 2], among=among)
        assert per_bag(drawn) == [3, 1, 0, 2]  # nothing of the second bag may be taken; its size stays known
        assert not (drawn & ~among)[:9].any()
    often = torch.stack([random_subset(BAGS, [3, 0, 0, 2]) for _ in range(600)]).float().mean(0)
    torch.testing.assert_close(often[:9], torch.full((9,), 1 / 3), atol=0.08, rtol=0)
    torch.testing.assert_close(often[10:], torch.full((4,), 0.5), atol=0.08, rtol=0)


def test_columns_vote_and_earlier_instances_win_ties():
    ranks = torch.zeros(14, 2)
    ranks[4] = 2.0
    ranks[7, 0], ranks[2, 1] = 1.0, 1.0
    chosen = voted(ranks, BAGS, [2, 1, 0, 1])
    assert torch.nonzero(chosen)[:, 0].tolist() == [2, 4, 9, 10]
    lowest = voted(torch.arange(14.0)[:, None], BAGS, [2, 0, 0, 1], largest=False)
    assert torch.nonzero(lowest)[:, 0].tolist() == [0, 1, 10]


def test_a_share_wider_than_the_bag_is_the_bag():
    ranks = torch.arange(14.0)[:, None]
    chosen, counts = randomly_high(ranks, BAGS, 0.6, 0.5)  # 1.2 of the bag as candidates
    assert counts == [6, 1, 0, 3]
    assert per_bag(chosen) == counts
    assert per_bag(randomly_high(ranks, BAGS, 0.3, 1.0)[0]) == [3, 1, 0, 2]
    assert not randomly_high(ranks, BAGS, 0.3, 0.0)[0].any()


def test_what_is_left_is_known_per_instance():
    hidden = torch.zeros(14, dtype=torch.bool)
    hidden[:3] = True
    hidden[9] = True
    assert leaves_some(hidden, BAGS).tolist() == [True] * 9 + [False] + [True] * 4
    assert rows_where(hidden, 4).tolist() == [0, 1, 2, 9]
