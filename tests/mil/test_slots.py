from typing import Literal

import pytest
import torch
from torch import nn

from eosin.errors import ConfigError, UnknownNameError
from eosin.mil._registry import ModuleRegistry
from eosin.mil.bags import PackedBags
from eosin.mil.slots import Aggregator, AggregatorOutput, AttentionOutput, LossTerm, SupervisedStrategy
from eosin.mil.tasks._classification import Classification


class Sum(Aggregator):
    def __init__(self, in_dim: int, n_outputs: int, *, embed_dim: int = 8, act: Literal["relu", "gelu"] = "relu"):
        super().__init__(in_dim, n_outputs, embed_dim=embed_dim)
        self.head = nn.Linear(in_dim, n_outputs)

    def forward(self, bags):
        pooled = torch.stack([bag.sum(0) for bag in bags.unpack()])
        return AggregatorOutput(self.head(pooled), pooled)


class NeedsAttention(LossTerm):
    requires = AttentionOutput


@pytest.fixture
def registry():
    registry = ModuleRegistry("aggregator", "eosin.mil.methods")
    registry.register("sum")(Sum)
    return registry


def test_options_are_the_constructors_signature(registry):
    assert registry.defaults("sum") == {"embed_dim": 8, "act": "relu"}
    assert registry.build("sum", 3, 2, options={"embed_dim": 5}).embed_dim == 5


def test_unknown_names_and_options_list_the_known(registry):
    with pytest.raises(UnknownNameError, match=r"no aggregator named 'sun'; did you mean sum\?"):
        registry.build("sun", 3, 2)
    with pytest.raises(UnknownNameError, match=r"option in aggregator sum named 'embed'.*act, embed_dim"):
        registry.build("sum", 3, 2, options={"embed": 5})


def test_values_of_the_wrong_kind_are_refused(registry):
    with pytest.raises(ConfigError, match="act: 'tanh' is not one of 'relu' or 'gelu'"):
        registry.build("sum", 3, 2, options={"act": "tanh"})


def test_a_notebook_cell_may_run_twice_but_a_name_is_not_stolen(registry):
    registry.register("sum")(type("Sum", (Sum,), {"__qualname__": Sum.__qualname__}))
    with pytest.raises(ConfigError, match="is taken"):
        registry.register("sum")(NeedsAttention)


def test_a_part_that_needs_attention_refuses_a_model_without():
    task = Classification(classes=("a", "b"))
    with pytest.raises(ConfigError, match="NeedsAttention needs an aggregator that returns AttentionOutput"):
        NeedsAttention(Sum(3, 2), task)


def test_the_supervised_step_is_the_model():
    model = Sum(3, 2)
    bags = PackedBags.pack([torch.randn(4, 3), torch.randn(0, 3)])
    step = SupervisedStrategy(model, Classification(classes=("a", "b")))(bags, torch.tensor([0, 1]))
    assert torch.equal(step.output.logits, model(bags).logits)
    assert step.bags is bags
    assert not step.extra
