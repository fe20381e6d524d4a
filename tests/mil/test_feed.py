import threading
import time

import pytest
import torch

from eosin.features._bag import FeatureSpec
from eosin.mil._data import MemoryBags
from eosin.mil._feed import DeviceBags, EvaluationPacks, ahead, group_by_budget, pack_bags


def source(**lengths):
    bags = {name: torch.arange(n * 2.0).reshape(n, 2).half() for name, n in lengths.items()}
    return MemoryBags(bags, FeatureSpec(encoder="toy", dim=2))


def test_budgets_group_every_bag_once():
    assert group_by_budget([3, 4, 9, 1, 1], 8) == [[0, 1], [2], [3, 4]]
    assert group_by_budget([3, 4], 0) == [[0, 1]]
    assert group_by_budget([], 5) == []


def test_a_large_bag_is_stood_for_by_a_sample_in_order():
    bags = source(a=3, b=50)
    pack = pack_bags(bags, ["b", "a"], most_per_bag=10, generator=torch.Generator().manual_seed(0))
    assert pack.lengths == (10, 3)
    assert pack.ids == ("b", "a")
    sample = pack.unpack()[0][:, 0]
    assert sample.diff().min() > 0
    again = pack_bags(bags, ["b", "a"], most_per_bag=10, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(pack.values, again.values)


def test_small_parts_are_packed_once_and_kept():
    packs = EvaluationPacks(source(a=3, b=0, c=4), ["a", "b", "c"], torch.device("cpu"), most_instances=5)
    first, second = list(packs), list(packs)
    assert [pack.ids for pack in first] == [("a", "b"), ("c",)]
    assert all(one is two for one, two in zip(first, second, strict=True))
    assert first[0].values.dtype == torch.float32


def test_items_are_made_ahead_in_another_thread_and_in_order():
    makers = []

    def make():
        for number in range(20):
            makers.append(threading.current_thread().name)
            yield number

    assert list(ahead(make())) == list(range(20))
    assert set(makers) == {"eosin-feed"}


def test_no_more_is_made_than_may_wait_and_leaving_ends_the_thread():
    made = []

    def make():
        for number in range(1000):
            made.append(number)
            yield number

    items = ahead(make(), most=2)
    assert next(items) == 0
    time.sleep(0.3)
    assert len(made) <= 4
    items.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "eosin-feed"]


def test_what_goes_wrong_while_reading_is_raised_where_it_is_used():
    def make():
        yield 1
        raise OSError("disk gone")

    items = ahead(make())
    assert next(items) == 1
    with pytest.raises(OSError, match="disk gone"):
        next(items)


def test_bags_stay_on_the_device_as_long_as_the_budget_lasts():
    plain = source(a=3, b=5, c=1)
    bags = DeviceBags(plain, torch.device("meta"), 3 * 2 * 2 + 1 * 2 * 2)
    first = {name: bags.load(name) for name in plain.ids}
    assert all(bag.device.type == "meta" and bag.dtype == torch.float16 for bag in first.values())
    assert [bags.load(name) is first[name] for name in plain.ids] == [True, False, True]
    assert bags.load("b", torch.tensor([0, 2])).shape == (2, 2)
    assert (bags.length("b"), bags.ids, bags.spec) == (5, plain.ids, plain.spec)
    host = DeviceBags(plain, torch.device("cpu"), 10**6)
    for _ in range(2):
        assert torch.equal(host.load("b", torch.tensor([0, 2])), plain.load("b")[[0, 2]])
        assert torch.equal(host.load("b"), plain.load("b"))
