import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from eosin.wsi._cache import ENTRY_BYTES, SegmentCache


def test_the_arrays_used_last_are_kept_within_the_bound():
    cache, made = SegmentCache(3 * (100 + ENTRY_BYTES)), []

    def get(key):
        return cache.get(key, lambda: made.append(key) or np.full(100, key, np.uint8))

    for key in (1, 2, 3, 1, 4, 1, 2):
        assert get(key)[0] == key
    assert made == [1, 2, 3, 4, 2]  # 2 went when 4 came, 1 was used in between


def test_what_is_larger_than_the_bound_is_still_delivered():
    cache = SegmentCache(10)
    assert len(cache.get(1, lambda: np.zeros(100, np.uint8))) == 100
    assert len(cache.get(2, lambda: np.zeros(200, np.uint8))) == 200


def test_many_threads_make_each_array_once():
    cache, lock, made = SegmentCache(10**6), threading.Lock(), []

    def make(key):
        threading.Event().wait(0.005)
        with lock:
            made.append(key)
        return np.full(10, key, np.uint8)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: cache.get(i % 7, lambda: make(i % 7))[0], range(200)))
    assert found == [i % 7 for i in range(200)]
    assert sorted(made) == list(range(7))


def test_a_failure_reaches_everyone_who_waits_and_is_not_kept():
    cache, started = SegmentCache(100), threading.Event()

    def fail():
        started.set()
        threading.Event().wait(0.05)
        raise OSError("made up")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.get, 1, fail)
        started.wait()
        second = pool.submit(cache.get, 1, fail)
        for waiting in (first, second):
            with pytest.raises(OSError, match="made up"):
                waiting.result()
    assert cache.get(1, lambda: np.ones(3, np.uint8)).sum() == 3
