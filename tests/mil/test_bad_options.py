"""What every method does with options and bags that make no sense: a clear error when built, or a defined result."""

import itertools

import pytest
import torch

import eosin.mil.methods  # noqa: F401 (registers)
from eosin.errors import ConfigError, EosinError, LabelError, UnknownNameError
from eosin.mil._checkpoint import build_model
from eosin.mil._objective import Objective
from eosin.mil._recipe import RECIPES, Component, Recipe, Term
from eosin.mil.bags import PackedBags
from eosin.mil.slots import AGGREGATORS, LOSS_TERMS, STRATEGIES, Aggregator
from eosin.mil.task import make_task
from eosin.mil.tasks._classification import Binary, Classification
from eosin.mil.tasks._cox import Cox
from eosin.mil.tasks._regression import Regression

DIM = 10
TASK = Classification(classes=("a", "b", "c"))
REGISTRIES = {"aggregator": AGGREGATORS, "loss term": LOSS_TERMS, "strategy": STRATEGIES}
PARTS = [(kind, name) for kind, registry in REGISTRIES.items() for name in registry]
NARROW = {"embed_dims": (12,), "width": 16, "hidden": 4}
COUNTS = {
    "k",
    "mask_k",
    "factor",
    "tokens",
    "seeds",
    "rate",
    "sample",
    "queue_size",
    "region_size",
    "rank",
    "min_length",
}
CHANCES = {"p", "mask_p", "random_ratio", "low_ratio", "high_ratio", "random_mask_ratio", "main_fraction", "dropout"}
CHANCES |= {"gate_dropout", "value_dropout", "block_dropout", "token_dropout"}


def narrow(component):
    """Return a component with narrow layers, for speed."""
    small = {key: value for key, value in NARROW.items() if AGGREGATORS.defaults(component.name).get(key)}
    if component.name in ("owlora", "downsampled"):
        small["host"] = "abmil"
        small["host_options"] = {"embed_dims": (12,), "hidden": 4}
        return Component(name=component.name, options=component.options | small)
    return Component(name=component.name, options=small | component.options)


def recipe_with(kind, name, options=None):
    """Return a recipe that has the part, with these options instead of its own."""
    part = Component(name=name, options=options or {})
    if kind == "aggregator":
        return Recipe(aggregator=narrow(part))
    for own in map(RECIPES.__getitem__, RECIPES):
        if kind == "strategy" and own.strategy.name == name:
            kept = part.model_copy(update={"options": own.strategy.options | part.options})
            return own.model_copy(update={"aggregator": narrow(own.aggregator), "strategy": kept})
        if kind == "loss term" and name in [term.name for term in own.terms]:
            terms = tuple(
                Term(name=name, options=term.options | part.options) for term in own.terms if term.name == name
            )
            return own.model_copy(update={"aggregator": narrow(own.aggregator), "terms": terms})
    raise AssertionError(f"no recipe has the {kind} {name}")


def built(recipe, task=TASK):
    torch.manual_seed(0)
    return Objective(recipe, build_model(recipe, task, DIM), task).train()


def packed(bags):
    """A pack of tiles in a row, for the methods that read where tiles lie."""
    return PackedBags.pack(bags, places=[torch.stack([torch.arange(len(bag)) * 1.0] * 2, 1) for bag in bags])


def step(objective, lengths, target=None):
    generator = torch.Generator().manual_seed(0)
    bags = packed([torch.randn(n, DIM, generator=generator) for n in lengths])
    total, step, _ = objective(bags, torch.arange(len(lengths)) % 3 if target is None else target)
    total.backward()
    objective.strategy.after_step(step)
    return total


def sound(recipe, lengths, task=TASK, target=None):
    """Return whether the recipe trains and predicts; False when it is refused, in one sentence, while it is built."""
    try:
        objective = built(recipe, task)
    except EosinError:
        return False
    assert step(objective, lengths, target).isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in objective.parameters())
    model = objective.strategy.inference_model().eval()
    assert model(packed([torch.randn(n, DIM) for n in lengths])).logits.isfinite().all()
    return True


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_an_unknown_option_lists_those_that_exist_and_the_nearest(kind, name):
    registry = REGISTRIES[kind]
    known = list(registry.defaults(name))
    with pytest.raises(UnknownNameError) as caught:
        registry.resolve(name, {"no_such_option": 1})
    assert all(option in caught.value.message for option in known)
    for option in known:
        with pytest.raises(UnknownNameError, match=f"did you mean .*{option}"):
            registry.resolve(name, {f"{option}x": 1})


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_a_value_of_the_wrong_kind_names_its_option(kind, name):
    for option, value in REGISTRIES[kind].defaults(name).items():
        if isinstance(value, int | float):
            with pytest.raises(ConfigError, match=option):
                REGISTRIES[kind].resolve(name, {option: "many"})


NUMBERED = [
    (kind, name, option)
    for kind, name in PARTS
    for option, value in REGISTRIES[kind].defaults(name).items()
    if option in COUNTS and isinstance(value, int)
]
SHARES = [
    (kind, name, option) for kind, name in PARTS for option in REGISTRIES[kind].defaults(name) if option in CHANCES
]


@pytest.mark.parametrize(("kind", "name", "option"), NUMBERED)
def test_a_count_beyond_the_bag_is_cut_or_refused(kind, name, option):
    sound(recipe_with(kind, name, {option: 50}), (7, 2, 1, 0))


@pytest.mark.parametrize(("kind", "name", "option"), NUMBERED)
@pytest.mark.parametrize("value", [0, -1])
def test_a_count_below_one_is_refused_or_harmless(kind, name, option, value):
    sound(recipe_with(kind, name, {option: value}), (7, 2, 1))


@pytest.mark.parametrize(("kind", "name", "option"), SHARES)
@pytest.mark.parametrize("value", [1.0, 1.5, -0.1])
def test_a_share_that_leaves_nothing_is_refused_or_leaves_something(kind, name, option, value):
    fine = sound(recipe_with(kind, name, {option: value}), (7, 2, 1, 0))
    assert not fine or value == 1.0, f"{name} takes {option}={value}"


BEYOND = {
    **dict.fromkeys(("temperature", "tau", "sharpness", "norm_eps", "floor"), (0.0, -1.0)),
    **dict.fromkeys(("momentum", "key_momentum", "prototype_momentum", "token_momentum"), (1.5, -0.1)),
    **dict.fromkeys(("confidence", "start", "phi_start", "phi_end", "quality_weight"), (1.5, -0.1)),
    **dict.fromkeys(("instance_weight", "contrast_weight", "residual_weight", "penalty"), (-1.0, float("nan"))),
    **dict.fromkeys(("dt_rank", "landmarks"), (0, -1)),
}


@pytest.mark.parametrize(
    ("kind", "name", "option"),
    [(kind, name, option) for kind, name in PARTS for option in REGISTRIES[kind].defaults(name) if option in BEYOND],
)
def test_a_value_without_a_meaning_names_its_option(kind, name, option):
    for value in BEYOND[option]:
        with pytest.raises(ConfigError, match=option):
            REGISTRIES[kind].resolve(name, {option: value})


@pytest.mark.parametrize("positive", [(), (3,), (-1, 1)])
def test_pseudo_labels_are_of_classes_that_exist(positive):
    with pytest.raises(ConfigError, match=r"comel_bppl: positive .* classes 0 to 2"):
        built(recipe_with("loss term", "comel_bppl", {"positive": positive}))


@pytest.mark.parametrize(
    ("registry", "name", "option"),
    [
        (LOSS_TERMS, "clam_instance", "margin"),
        (STRATEGIES, "mhim", "consistency"),
        (STRATEGIES, "mhim_v2", "consistency"),
        (STRATEGIES, "packmil", "residual_weight"),
    ],
)
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_weight_is_finite_and_not_negative(registry, name, option, value):
    with pytest.raises(ConfigError, match=option):
        registry.resolve(name, {option: value})
    assert registry.resolve(name, {option: 0.0})[option] == 0


def test_the_overflow_is_at_least_one():
    for value in (0, -1):
        with pytest.raises(ConfigError, match="overflow"):
            STRATEGIES.resolve("packmil", {"overflow": value})


@pytest.mark.parametrize("name", list(RECIPES))
def test_one_output_is_trained_or_refused(name):
    recipe = RECIPES[name].model_copy(update={"aggregator": narrow(RECIPES[name].aggregator)})
    task = Binary(classes=("a", "b"))
    sound(recipe, (7, 2, 1), task, torch.tensor([0, 1, 1]))


@pytest.mark.parametrize("name", list(RECIPES))
@pytest.mark.parametrize("task", [Regression(mean=0.0, deviation=1.0), Cox()])
def test_a_task_without_classes_is_trained_or_refused(name, task):
    recipe = RECIPES[name].model_copy(update={"aggregator": narrow(RECIPES[name].aggregator)})
    target = torch.rand(3, dtype=torch.float64)
    target = target if isinstance(task, Regression) else torch.stack([1 + target, torch.ones(3).double()], 1)
    sound(recipe, (7, 2, 1), task, target)


def test_a_single_class_is_refused_where_the_task_is_made():
    rows = [{"label": "a"}, {"label": "a"}]
    for kind in ("classification", "binary", "ordinal"):
        with pytest.raises(LabelError, match="at least two classes"):
            make_task(kind, rows)
    with pytest.raises(ConfigError):
        Classification.parse({"classes": ["a"]})


KINDS = ("abmil", "acmil", "clam_mb", "dsmil", "ins", "mean", "owlora")  # one per kind of output or of model
ANY = [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in AGGREGATORS]


@pytest.mark.parametrize("aggregator", ANY)
@pytest.mark.parametrize(("kind", "name"), [part for part in PARTS if part[0] != "aggregator"])
def test_every_combination_trains_or_is_refused_when_built(aggregator, kind, name):
    own = recipe_with(kind, name)
    recipe = own.model_copy(update={"aggregator": narrow(Component(name=aggregator))})
    part = REGISTRIES[kind][name]
    if sound(recipe, (9, 4, 6)):
        return
    try:
        built(recipe)
    except EosinError as error:
        needed = part.requires.__name__
        reason = error.message
    model = build_model(recipe, TASK, DIM)
    assert not issubclass(model.output_type, part.requires) or "choose" in reason or "set both" in reason, reason
    assert issubclass(model.output_type, part.requires) or f"needs an aggregator that returns {needed}" in reason


def test_options_that_no_default_needs_are_still_checked():
    class Plain(Aggregator):
        def __init__(self, in_dim, n_outputs, *, depth: int):
            super().__init__(in_dim, n_outputs, embed_dim=depth)

    registry = type(AGGREGATORS)("aggregator", "eosin.mil.methods")
    registry.add("plain", Plain)
    with pytest.raises(ConfigError, match="depth"):
        registry.resolve("plain", {})


def test_no_name_serves_two_slots_by_accident():
    both = [
        name for first, second in itertools.combinations(REGISTRIES.values(), 2) for name in first if name in second
    ]
    assert set(both) <= {"ins", "mi_max", "owlora"}  # a paper's aggregator and the strategy that trains it
