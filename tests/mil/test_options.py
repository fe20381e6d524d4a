"""A range is part of the meaning of an option and stands in its signature."""

import inspect
from typing import get_type_hints

import pytest
from pydantic.fields import FieldInfo

import eosin.mil.methods  # noqa: F401 - registers the methods
from eosin.errors import ConfigError
from eosin.mil._registry import ModuleRegistry
from eosin.mil.options import Count, Dropout, NotNegative, Part, Positive, Share, Whole
from eosin.mil.slots import AGGREGATORS, LOSS_TERMS, STRATEGIES, Aggregator


class Mine(Aggregator):
    """A user's own, whose options are called like those of others."""

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        *,
        start: float = 20.0,
        rank: int = 0,
        k: int = 0,
        floor: float = -1.0,
        gain: float = 0.5,
        momentum: Share = 0.5,
    ) -> None:
        super().__init__(in_dim, n_outputs, embed_dim=4)


@pytest.mark.parametrize(
    "options", [{"start": 20.0}, {"rank": 0}, {"k": -3}, {"floor": -1.0}, {"gain": -7.0}, {"momentum": 1.0}]
)
def test_the_name_of_an_option_means_nothing(options):
    registry = ModuleRegistry("aggregator", "eosin.mil.methods")
    registry.add("mine", Mine)
    assert registry.resolve("mine", options) == registry.defaults("mine") | options
    with pytest.raises(ConfigError, match="momentum"):
        registry.resolve("mine", {"momentum": 1.5})


@pytest.mark.parametrize(
    ("kind", "inside", "outside"),
    [
        (Count, (1, 7), (0, -1)),
        (Whole, (0, 7), (-1,)),
        (Share, (0.0, 1.0), (-0.1, 1.1)),
        (Dropout, (0.0, 0.9), (-0.1, 1.0)),
        (Positive, (1e-9, 7.0), (0.0, -1.0, float("inf"), float("nan"))),
        (NotNegative, (0.0, 7.0), (-1e-9, float("inf"), float("nan"))),
        (Part, (0.1, 0.9), (0.0, 1.0)),
    ],
)
def test_each_type_of_option_has_its_range(kind, inside, outside):
    class Plain(Aggregator):
        def __init__(self, in_dim: int, n_outputs: int, *, value=inside[0]) -> None:
            super().__init__(in_dim, n_outputs, embed_dim=1)

    Plain.__init__.__annotations__["value"] = kind
    registry = ModuleRegistry("aggregator", "eosin.mil.methods")
    registry.add("plain", Plain)
    for value in inside:
        assert registry.resolve("plain", {"value": value}) == {"value": value}
    for value in outside:
        with pytest.raises(ConfigError, match="value"):
            registry.resolve("plain", {"value": value})


def test_every_number_of_every_method_has_a_range():
    unbounded = []
    for registry in (AGGREGATORS, LOSS_TERMS, STRATEGIES):
        for name in registry:
            hints = get_type_hints(registry[name].__init__, include_extras=True)
            for option, parameter in inspect.signature(registry[name].__init__).parameters.items():
                hint = hints.get(option)
                if parameter.kind is not parameter.KEYWORD_ONLY or option in ("embed_dim",):
                    continue
                plain = hint in (int, float, int | None, float | None)
                if plain and not any(isinstance(part, FieldInfo) for part in getattr(hint, "__metadata__", ())):
                    unbounded.append((registry.kind, name, option))
    assert unbounded == []
