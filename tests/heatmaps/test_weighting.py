import numpy as np
import pytest
import torch
from torch.nn import functional

from eosin import kernels
from eosin.mil import _nystrom as nystrom
from eosin.mil.bags import PackedBags
from eosin.mil.methods import set_transformer
from eosin.mil.methods.transmil import TokenLayout
from eosin.mil.slots import AGGREGATORS
from eosin.mil.subsets import Target

DIM, N, STEP = 7, 23, 1e-5
MODELS = {
    "gdat": {"width": 8, "heads": 2, "region_size": 2, "hidden": 6},
    "mambamil": {"width": 8, "d_state": 4, "hidden": 6},
    "set_transformer": {"embed_dims": (8,), "width": 8, "heads": 2, "tokens": 3, "sab_layers": 1, "seeds": 2},
    "transmil": {"width": 8, "heads": 2, "landmarks": 4},
}


class Weighted:
    """Tile weights at the place where a model reads its bag out."""

    def __init__(self, monkeypatch, name, model):
        self.log_weights = torch.zeros(N, dtype=torch.float64)
        self.calls = 0
        self.model = model
        if name == "set_transformer":
            monkeypatch.setattr(set_transformer, "attention_pool", self.seeds)
        elif name == "transmil":
            monkeypatch.setattr(nystrom, "bag_attention", self.keys(nystrom.bag_attention))
        else:
            monkeypatch.setattr(model.attention, "pool", self.pool)

    def seeds(self, scores, instances, cu_seqlens):
        return kernels.attention_pool(scores + self.log_weights[:, None], instances, cu_seqlens)

    def pool(self, instances, bags):
        scores = self.model.attention(instances) + self.log_weights[:, None]
        return kernels.AttentionPool(scores, *kernels.attention_pool(scores, instances, bags.cu_seqlens))

    def keys(self, bag_attention):
        def weighted(query, key, value, lengths, scale, *, zeros):
            self.calls += 1
            if self.calls % 2:
                return bag_attention(query, key, value, lengths, scale, zeros=zeros)  # the first layer
            layout = TokenLayout.of((N,), 4, key.device)
            per_token = torch.zeros(len(layout.source), dtype=key.dtype)
            per_token[layout.instances] = self.log_weights
            per_token[layout.copies] = per_token[layout.originals]
            column = per_token[:, None, None].expand(-1, key.shape[1], 1)
            ones = torch.full((*query.shape[:3], 1), 1 / scale, dtype=query.dtype)
            query, key = torch.cat([query, ones], 3), torch.cat([key, column], 2)
            return bag_attention(query, key, value, lengths, scale, zeros=zeros)

        return weighted


@pytest.mark.parametrize("name", MODELS)
def test_gradient_is_the_slope_of_weights_where_the_bag_is_read(monkeypatch, name):
    torch.manual_seed(2)
    model = AGGREGATORS.build(name, DIM, 2, options=MODELS[name]).double().eval()
    pack = PackedBags.pack([torch.from_numpy(np.random.default_rng(0).normal(size=(N, DIM)))])
    target = Target(1)
    gradient = model.weight_gradient(pack, target.of_tensor)
    weighted = Weighted(monkeypatch, name, model)
    for tile in (0, 5, N - 1):
        ends = []
        for sign in (-1, 1):
            weighted.log_weights = sign * STEP * functional.one_hot(torch.tensor(tile), N).double()
            with torch.no_grad():
                ends.append(float(target.of(model(pack).logits[0].numpy())))
        assert gradient[tile] == pytest.approx((ends[1] - ends[0]) / (2 * STEP), rel=1e-5, abs=1e-9)
    assert weighted.calls == (12 if name == "transmil" else 0)
