"""How much memory an aggregator takes per instance, forward and backward, so that 200,000 instances fit into 6 GB.

Bags are small here, and so is everything that is computed at one time; what grows with the bag does so all the same.
"""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import eosin.mil.methods  # noqa: F401 (registers)
from eosin.mil import _attention as attention
from eosin.mil.bags import PackedBags
from eosin.mil.methods import mambamil, patch_gcn, set_transformer, transmil, wikg
from eosin.mil.slots import AGGREGATORS

WIDTH = 64
BUDGET = 6e9 / 200_000 / 4 / 512  # numbers per instance and unit of the default width
GDAT = {"width": WIDTH, "heads": 8, "hidden": 16, "region_size": 4}
MODELS = {
    "downsampled": {"host_options": {"embed_dims": (WIDTH // 2,), "hidden": 8}, "hidden": 8},
    "gdat": GDAT,
    "ilra": {"width": WIDTH, "heads": 8, "tokens": 2, "layer_norm": True},
    "mambamil": {"width": WIDTH, "hidden": 16, "d_state": 2},
    "owlora": {"host_options": GDAT},
    "patch_gcn": {"width": WIDTH // 4},
    "rrt": {"width": WIDTH, "hidden": 16, "regions": 2, "cross_regions": 2},
    "set_transformer": {"embed_dims": (WIDTH,), "width": WIDTH, "heads": 8, "tokens": 4},
    "wikg": {"width": WIDTH, "neighbours": 4},
    "transformer": {"width": WIDTH, "heads": 8, "feed_forward": WIDTH},
    "transmil": {"width": WIDTH, "heads": 8, "landmarks": 16},
}
LIMITS = {
    "downsampled": 2.5,
    "gdat": 6.5,
    "ilra": 11.5,
    "mambamil": 10,
    "owlora": 6.5,
    "patch_gcn": 7,
    "rrt": 11.5,
    "set_transformer": 4,
    "transformer": 11.5,
    "wikg": 8,
    "transmil": 10,
}
IN_DIMS = {"downsampled": WIDTH, "owlora": 2 * WIDTH}  # features matter where copies of them are made


class PeakMemory(TorchDispatchMode):
    """The most bytes that results of operations hold at one time, as long as it is entered."""

    def __init__(self):
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bound = self.peak = 0  # the bound counts what is no longer held, until it matters

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if torch.is_tensor(leaf) and (storage := leaf.untyped_storage())._cdata not in self.given(args, kwargs):
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.bound += storage.nbytes()
        if self.bound > self.peak:
            self.live = {key: held for key, held in self.live.items() if not held[0].expired()}
            self.bound = sum(size for _, size in self.live.values())
            self.peak = max(self.peak, self.bound)
        return out

    @staticmethod
    def given(args, kwargs):
        return {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}


def peak_bytes(name, n):
    torch.manual_seed(0)
    in_dim = IN_DIMS.get(name, 4)
    model = AGGREGATORS.build(name, in_dim, 2, options=MODELS[name]).train()
    places = torch.stack([torch.arange(n) % 16, torch.arange(n) // 16], 1).float()
    bag = PackedBags.pack([torch.randn(n, in_dim)], places=[places])
    with PeakMemory() as memory:
        model(bag).logits.square().sum().backward()
    return memory.peak


@pytest.fixture
def _small_pieces(monkeypatch):
    for size in ("BLOCK_ROWS", "CHECKPOINT_ROWS", "NORM_ROWS"):
        monkeypatch.setattr(attention, size, 64)
    monkeypatch.setattr(attention, "CHUNK_ELEMENTS", 2**13)
    monkeypatch.setattr(set_transformer, "SMALL_BAG", 0)
    monkeypatch.setattr(wikg, "EDGE_ROWS", 64)
    monkeypatch.setattr(patch_gcn, "NODE_ROWS", 16)
    monkeypatch.setattr(mambamil, "GROUP_ELEMENTS", 2**14)
    monkeypatch.setattr(transmil, "PPEG_CHANNELS", WIDTH // 4)


def numbers_per_instance(name):
    """Return how many numbers an instance takes, in units of the width."""
    few, many = 128, 256
    return (peak_bytes(name, many) - peak_bytes(name, few)) / (many - few) / 4 / WIDTH


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("_small_pieces")
def test_200_000_instances_fit_into_6_gb(name, monkeypatch):
    assert numbers_per_instance(name) < LIMITS[name] < BUDGET
    monkeypatch.setattr(attention, "CHECKPOINT_ROWS", 2**15)  # all intermediates are kept
    assert numbers_per_instance(name) > LIMITS[name]


def test_memory_is_what_is_held_at_one_time():
    with PeakMemory() as memory:
        first = torch.zeros(100)
        second = first + 1
        del first
        second.sum().item()
        torch.zeros(50)
    assert memory.peak == 800
