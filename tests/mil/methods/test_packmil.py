import pytest
import torch
from torch import nn
from torch.nn import functional

from eosin.errors import ConfigError
from eosin.mil import _attention as attention
from eosin.mil.bags import PackedBags
from eosin.mil.methods.abmil import Abmil
from eosin.mil.methods.packmil import (
    PRESETS,
    PRIMARY,
    SECONDARY,
    Downsampled,
    Largest,
    PackMil,
    asymmetric_loss,
    choose_labels,
    class_logs,
    class_shares,
    focal_loss,
    hyperslide_grade,
    hyperslide_survival,
    membership,
    merged,
    next_fit,
    random_rank,
    residual_loss,
    survival_loss,
)
from eosin.mil.methods.pooling import MeanPooling
from eosin.mil.methods.transmil import TransMil
from eosin.mil.slots import AGGREGATORS, Aggregator, AggregatorOutput
from eosin.mil.tasks._classification import Binary, Classification, Ordinal
from eosin.mil.tasks._cox import Cox
from eosin.mil.tasks._multilabel import MultiLabel
from eosin.mil.tasks._regression import Regression
from eosin.mil.tasks._survival import DiscreteSurvival

TASK = Classification(classes=("a", "b", "c"))
GRADES = Classification(classes=tuple("012345"))


class Mean(Aggregator):
    """Logits that say which instances were read: the mean of the bag."""

    def __init__(self, in_dim, n_outputs):
        super().__init__(in_dim, n_outputs, embed_dim=in_dim)
        self.scale = nn.Parameter(torch.ones(()))
        self.seen = []

    def forward(self, bags):
        self.seen.append(bags)
        mean = torch.stack([bag.sum(0) / max(len(bag), 1) for bag in bags.unpack()]) * self.scale
        return AggregatorOutput(mean[:, : self.n_outputs], mean)


def numbered(*lengths):
    """Bags whose first feature is the row in the pack."""
    values = torch.zeros(sum(lengths), 3)
    values[:, 0] = torch.arange(len(values))
    return PackedBags.pack(list(values.split(lengths)))


def rows(bags):
    return [bag[:, 0].tolist() for bag in bags.unpack()]


def run(bags, n_targets=None, task=TASK, **options):
    torch.manual_seed(0)
    strategy = PackMil(Mean(3, task.n_outputs), task, **({"min_length": 0} | options))
    step = strategy(bags, torch.arange(n_targets or bags.n_bags) % task.n_outputs)
    return strategy, step


def test_packed_bags_and_hyperslides_are_the_authors(golden, same, complete):
    golden = golden("packmil_abmil")
    model = Abmil(20, 3, embed_dims=(24,), embed_activation="gelu", hidden=12, gated=False, dropout=0).double()
    files = {name: name.replace("embed.0", "embed") for name in model.state_dict()}
    model.load_state_dict({name: golden[file] for name, file in files.items()})
    bags = PackedBags.pack([golden[f"bag{number}"] for number in range(3)])
    packs = next_fit(bags.lengths, int(golden["L_multi"]))
    assert packs == golden["multi.pack_of_bag"].tolist()
    output = model(bags)
    loss = functional.cross_entropy(output.logits, golden["labels"])
    loss.backward()
    found = {"logits": output.logits, "multi.logits": output.logits, "loss": loss}
    found["hyperslide.logits"] = model(merged(bags, packs)).logits
    found |= {f"grad.{files[name]}": value.grad for name, value in model.named_parameters()}
    found |= padded("one", bags, [0, 0, 0]) | padded("multi", bags, packs)
    same(found, golden)
    read = {"bag0", "bag1", "bag2", "labels", "L_multi", "multi.pack_of_bag", *files.values()}
    complete(golden, {*found, *read})


def padded(name, bags, packs):
    """The authors' rectangles, from our packs: values, number of the bag in its pack, and padding."""
    values, real = merged(bags, packs).to_padded()
    places = torch.tensor([packs[:i].count(pack) for i, pack in enumerate(packs)])
    numbers, _ = merged(bags, packs).to_padded(places[bags.bag_index()][:, None])
    return {f"{name}.patches": values, f"{name}.segment_ids": numbers[..., 0], f"{name}.pad_mask": ~real}


def test_packs_are_filled_as_the_authors_do(golden):
    golden = golden("packmil_labels")
    assert next_fit(golden["seq_lengths"].tolist(), int(golden["seq_L"])) == golden["seq_pack_id"].tolist()


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("weighted", [False, True])
def test_class_labels_are_the_authors(golden, same, case, weighted):
    golden = golden("packmil_labels")
    name = f"subtype{case}"
    wanted = golden[f"{name}.multilabel"]
    labels, weights = golden[f"{name}.labels"], golden[f"{name}.counts"] if weighted else 1
    members = membership([0] * len(labels), wanted) * weights
    classes = functional.one_hot(labels, len(wanted)).double()
    suffix = "_weighted" if weighted else ""
    found = {
        f"{name}.multilabel{suffix}": class_shares(members, classes)[0],
        f"{name}.singlelabel{suffix}": class_shares(members, classes, of="sum")[0],
    }
    same(found, golden)


def test_every_label_of_the_golden_file_is_compared(golden, complete):
    subtypes = [
        f"subtype{case}.{kind}{suffix}"
        for case in range(3)
        for kind in ("multilabel", "singlelabel")
        for suffix in ("", "_weighted")
    ]
    grades = [f"grade{case}.{part}" for case in range(7) for part in ("labels", "counts", "two_hot", "hard")]
    survival = ["surv.Y", "surv.c", "surv.Y_censored", "surv.logits", "surv.loss", "surv.grad.logits"]
    focal = [f"focal.{part}" for part in ("logits", "targets", "loss", "grad.logits")]
    read = ["seq_lengths", "seq_L", "seq_pack_id"]
    read += [f"subtype{case}.{part}" for case in range(3) for part in ("labels", "counts")]
    read += [f"surv{case}.bin_and_censored" for case in range(4)]
    complete(golden("packmil_labels"), {*subtypes, *grades, *survival, *focal, *read})


def test_one_output_counts_the_other_class_too():
    member = membership([0, 0, 0, 1, 1], torch.zeros(()))
    positive = torch.tensor([1.0, 0, 0, 1, 1])[:, None]
    assert class_shares(member, positive).tolist() == [[0.5], [1.0]]
    torch.testing.assert_close(class_shares(member, positive, of="sum"), torch.tensor([[1 / 3], [1.0]]))


@pytest.mark.parametrize("case", range(7))
def test_grades_are_the_authors(golden, case):
    golden = golden("packmil_labels")
    labels, counts = golden[f"grade{case}.labels"], golden[f"grade{case}.counts"]
    member = membership([0] * len(labels), counts)
    found = hyperslide_grade(member, labels, counts, benign_is_zero=False)[0]
    torch.testing.assert_close(found, golden[f"grade{case}.two_hot"], rtol=0, atol=1e-6)
    assert found.argmax() == golden[f"grade{case}.hard"]
    ours = hyperslide_grade(member, labels, counts)[0]
    assert ours.argmax() == (0 if not labels.any() else golden[f"grade{case}.hard"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_mean_patterns_are_equal_whatever_the_counts(dtype):
    for grades, counts in (([4, 2, 4, 3, 2], [4, 3, 1, 5, 2]), ([3, 2, 4, 3], [2, 3, 1, 1])):
        weight, member = torch.tensor(counts, dtype=dtype), torch.ones(1, len(counts), dtype=dtype)
        found = hyperslide_grade(member, torch.tensor(grades), weight)[0]
        patterns = torch.tensor([(PRIMARY[grade], SECONDARY[grade]) for grade in grades], dtype=dtype)
        primary, secondary = weight @ patterns
        assert primary == secondary
        between = (primary + secondary) / weight.sum() - 7  # from 2 at a sum of 7 to 4 at 8
        assert float(found @ torch.arange(6, dtype=dtype)) == pytest.approx(2 + 2 * float(between), abs=1e-5)


def test_survival_labels_and_loss_are_the_authors(golden, same):
    golden = golden("packmil_labels")
    slides = [golden[f"surv{case}.bin_and_censored"] for case in range(4)]
    packs = [case for case, table in enumerate(slides) for _ in table]
    table = torch.cat(slides)
    member = membership(packs, golden["surv.Y"])
    parts = hyperslide_survival(member, table[:, 0], table[:, 1])
    logits = golden["surv.logits"].requires_grad_()
    loss = survival_loss(logits, *parts)
    loss.backward()
    names = ("surv.Y", "surv.c", "surv.Y_censored")
    found = {name: part[:, None] for name, part in zip(names, parts, strict=True)}
    same(found | {"surv.loss": loss, "surv.grad.logits": logits.grad}, golden)


def test_focal_loss_is_the_authors(golden, same):
    golden = golden("packmil_labels")
    logits = golden["focal.logits"].requires_grad_()
    loss = focal_loss(logits, golden["focal.targets"])
    loss.backward()
    same({"focal.loss": loss, "focal.grad.logits": logits.grad}, golden)


def test_asymmetric_loss_is_the_published_one():
    logits, target = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 2, 5, 2])
    p = logits.softmax(1)[torch.arange(4), target]
    found = asymmetric_loss(class_logs(GRADES, logits), target)
    torch.testing.assert_close(found, ((p - 1) * p.log()).mean())
    timm = pytest.importorskip("timm.loss")
    torch.testing.assert_close(found, timm.AsymmetricLossSingleLabel(gamma_pos=1, gamma_neg=4, eps=0.0)(logits, target))


def test_steps_of_ordered_classes_give_probabilities():
    ordered = Ordinal(classes=tuple("012345"))
    logits = torch.randn(7, 5, dtype=torch.float64)
    torch.testing.assert_close(class_logs(ordered, logits).exp(), torch.from_numpy(ordered.activate(logits)))


def test_other_ordered_classes_are_averaged():
    member = membership([0, 0, 1], torch.zeros(()))
    grades = hyperslide_grade(member, torch.tensor([1, 3, 2]), torch.tensor([3.0, 1.0, 5.0]), n_grades=4)
    torch.testing.assert_close(grades, torch.tensor([[0, 0.5, 0.5, 0], [0, 0, 1.0, 0]]))


def test_shares_are_soft_targets():
    logits = torch.randn(1, 3)
    found = residual_loss(TASK, "shares", logits, torch.tensor([0, 2, 2]), pack_of=[0, 0, 0], weights=[1, 1, 2])
    wanted = functional.cross_entropy(logits, torch.tensor([[0.25, 0.0, 0.75]]))
    torch.testing.assert_close(found, wanted)


def test_labels_suit_the_task():
    years = DiscreteSurvival(edges=(1.0, 2.0, 3.0))
    ordered = Ordinal(classes=tuple("abcd"))
    several = MultiLabel(targets=("x", "y"), positives=("1", "1"), negatives=("0", "0"))
    for task, labels in ((TASK, "classes"), (several, "classes"), (ordered, "grades"), (years, "survival")):
        assert choose_labels(task, "auto") == labels
    for task, labels in (
        (Cox(), "auto"),
        (ordered, "classes"),
        (several, "shares"),
        (TASK, "grades"),
        (years, "shares"),
    ):
        with pytest.raises(ConfigError, match="packmil labels hyperslides by"):
            choose_labels(task, labels)
    with pytest.raises(ConfigError, match="residual_weight 0"):
        PackMil(Mean(3, 1), Regression.model_construct(kind="regression"))


def test_slides_of_a_hyperslide_may_count_by_their_instances():
    bags = PackedBags.pack(list(torch.randn(40, 3).split((30, 10))))
    losses = {}
    for weights in ("slides", "instances"):
        strategy, step = run(bags, label_weights=weights, residual_weight=1.0)
        logits = Mean(3, 3)(strategy.model.seen[1]).logits
        losses[weights] = step.extra["residual"], logits
    by_slide, by_instance = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[1.0, 1 / 3, 0.0]])
    torch.testing.assert_close(losses["slides"][0], focal_loss(losses["slides"][1], by_slide))
    torch.testing.assert_close(losses["instances"][0], focal_loss(losses["instances"][1], by_instance))


def test_ordered_classes_train_every_part():
    ordered = Ordinal(classes=tuple("012345"))
    strategy = PackMil(Abmil(3, 5, embed_dims=(4,)), ordered, **PRESETS["panda"])
    step = strategy(PackedBags.pack([torch.randn(n, 3) for n in (20, 30, 8)]), torch.tensor([0, 3, 5]))
    step.extra["residual"].backward()
    assert all(parameter.grad is not None for parameter in strategy.parameters())


def test_the_sides_of_a_slide_are_random_halves_that_share_nothing():
    bags = numbered(10, 7, 40)
    firsts = []
    for _ in range(2):
        strategy, step = run(bags, main_fraction=0.4)
        main, hyper = strategy.model.seen
        assert step.bags is main
        assert main.lengths == (4, 2, 16)
        assert hyper.lengths == (35,)
        both = sorted(row for bag in rows(main) + rows(hyper) for row in bag)
        assert both == list(range(57))
        assert all(bag == sorted(bag) for bag in rows(main))  # order within a side is kept
        firsts.append(rows(main))
    torch.manual_seed(1)
    ranks = torch.stack([random_rank(bags) for _ in range(400)])
    for part in ranks.split(bags.lengths, dim=1):
        assert all(sorted(row) == list(range(len(row))) for row in part[:5].tolist())
        assert (part.float().mean(0) - (part.shape[1] - 1) / 2).abs().max() < part.shape[1] * 0.1


def test_small_slides_go_whole_to_both_branches():
    strategy, _ = run(numbered(9, 10, 1, 0), min_length=10)
    main, hyper = strategy.model.seen
    assert main.lengths == (9, 5, 1, 0)
    assert hyper.lengths == (9 + 5 + 1 + 0,)
    strategy, _ = run(numbered(3, 1), main_fraction=0.1)  # a side would be empty
    assert strategy.model.seen[0].lengths == (3, 1)


def test_short_sides_are_topped_up():
    strategy, _ = run(numbered(12, 30), min_length=10, top_up=True, main_fraction=0.4)
    main, hyper = strategy.model.seen
    assert main.lengths == (10, 12)
    assert hyper.lengths == (10 + 18,)
    assert len(set(rows(hyper)[0])) == 28


def test_long_sides_are_cut_and_packs_stay_below_the_limit():
    strategy, _ = run(numbered(30, 8, 8, 8), pack_length=20)
    main, hyper = strategy.model.seen
    assert main.lengths == (15, 4, 4, 4)
    assert hyper.lengths == (19, 8)
    strategy, _ = run(numbered(100), pack_length=20, overflow=1)  # ⌊100 · ½⌋ > 20: the limit doubles for this step
    assert strategy.model.seen[0].lengths == (40,)
    for length, limit in ((167, 20), (168, 40)):  # without a downsampler the authors' factor 4 still counts
        strategy, _ = run(numbered(length), pack_length=20)
        assert strategy.model.seen[0].lengths == (limit,)


def test_the_residual_loss_is_that_of_the_hyperslides():
    bags = PackedBags.pack(list(torch.randn(40, 3).split((20, 10, 10))))
    strategy, step = run(bags, pack_length=16, residual_weight=0.7)
    hyper = strategy.model.seen[1]
    assert hyper.lengths == (15, 5)
    logits = Mean(3, 3)(hyper).logits
    wanted = focal_loss(logits, torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    torch.testing.assert_close(step.extra["residual"], 0.7 * wanted)
    assert not run(bags, residual_weight=0.0)[1].extra
    own, step = run(bags, own_classifier=True)
    step.extra["residual"].backward()
    assert own.classifier.weight.grad.any()
    assert run(numbered(6, 8), task=GRADES, labels="grades")[1].extra["residual"].isfinite()
    binary = PackMil(Mean(3, 1), Binary(classes=("a", "b")), min_length=0)
    assert binary(numbered(6, 8), torch.tensor([0, 1])).extra["residual"].isfinite()


def test_survival_reads_bins_from_the_task():
    years = DiscreteSurvival(edges=(1.0, 2.0))
    strategy = PackMil(Mean(3, 3), years, min_length=0)
    step = strategy(numbered(8, 10), torch.tensor([[2.5, 1.0], [1.5, 0.0]]))  # event in bin 2, censored in bin 1
    logits = Mean(3, 3)(strategy.model.seen[1]).logits
    wanted = survival_loss(logits, torch.tensor([2]), torch.tensor([0.5]), torch.tensor([1]))
    torch.testing.assert_close(step.extra["residual"], 0.2 * wanted)


SMALL = {"embed_dims": (8,), "width": 16, "hidden": 8}


@pytest.mark.parametrize("name", list(AGGREGATORS))
def test_slides_of_a_pack_never_mix_whatever_the_aggregator(name):
    """Executed on the authors' code, a TransMIL slide answers to its neighbour and not to itself.

    A training step: sampled, packed, with a residual branch; the draws are the same each time.
    """
    torch.manual_seed(0)
    options = {key: value for key, value in SMALL.items() if AGGREGATORS.defaults(name).get(key)}
    host = AGGREGATORS.build(name, 6, 3, options=options).double().eval()
    if host.reads_places:
        with pytest.raises(ConfigError, match="reads where tiles lie; pass residual_weight=0"):
            PackMil(host, TASK)
        PackMil(host, TASK, residual_weight=0)
        return
    strategy = PackMil(host, TASK, min_length=4, pack_length=30)
    bags = [torch.randn(n, 6, dtype=torch.float64) for n in (9, 14, 3, 6)]

    def logits(bags):
        torch.manual_seed(1)
        places = [
            torch.stack([torch.arange(len(bag)), torch.zeros(len(bag))], 1) for bag in bags
        ]  # some methods read them
        return strategy(PackedBags.pack(bags, places=places), torch.tensor([0, 1, 2, 0])).output.logits

    before = logits(bags)
    moved = torch.stack(
        [(logits([bag + (j == i) for i, bag in enumerate(bags)]) - before).abs().amax(1) for j in range(4)]
    )
    assert torch.equal(moved > 1e-12, torch.eye(4, dtype=torch.bool))


@pytest.mark.parametrize("rows_at_once", [2**15, 5])
def test_the_downsampler_scores_and_transforms_every_instance(rows_at_once, monkeypatch):
    monkeypatch.setattr(attention, "CHECKPOINT_ROWS", rows_at_once)
    torch.manual_seed(0)
    model = Downsampled(4, 3, host="mean", host_options={"embed_dims": ()}, hidden=3)
    bags = PackedBags.pack([torch.randn(n, 4) for n in (7, 0, 9)])
    found = model.downsample(bags, longer_than=None)
    for part, bag in zip(found.unpack(), bags.unpack(), strict=True):
        weights = model.attention(bag).softmax(0)
        torch.testing.assert_close(part, model.second(functional.gelu(model.first(bag * (1 + weights)))))
    torch.testing.assert_close(model(bags).logits, model.host(found).logits)


@pytest.mark.parametrize("reduce", ["max", "random"])
def test_groups_of_long_bags_are_reduced(reduce):
    torch.manual_seed(0)
    model = Downsampled(4, 3, host="mean", host_options={"embed_dims": ()}, factor=3, reduce=reduce)
    model.second = nn.Identity()
    bags = PackedBags.pack([torch.randn(n, 4) for n in (7, 5, 0, 9)])
    whole = model.downsample(bags, longer_than=None).unpack()
    reduced = model.downsample(bags, longer_than=5)
    assert reduced.lengths == (3, 5, 0, 3)
    torch.testing.assert_close(reduced.unpack()[1], whole[1])
    blank = functional.gelu(model.first(torch.zeros(1, 4)))
    for number, padding in ((0, 2), (3, 0)):
        rows_, pool = reduced.unpack()[number], torch.cat([whole[number], blank.expand(padding, 4)])
        matches = torch.isclose(rows_[:, None], pool).any(1)
        assert matches.all()  # every value is that channel's value of some row
        if reduce == "max":
            torch.testing.assert_close(rows_.amax(0), pool.amax(0))


def test_the_largest_of_a_group_gets_the_gradient():
    torch.manual_seed(0)
    groups = torch.randn(50, 4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 3, dtype=torch.float64)
    found, wanted = Largest.apply(groups), groups.amax(1)
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad((result * weight).sum(), groups)[0] for result in (found, wanted)]
    torch.testing.assert_close(*gradients)
    tied = torch.zeros(1, 3, 1, requires_grad=True)
    Largest.apply(tied).sum().backward()
    assert tied.grad.flatten().tolist() == [1, 0, 0]


@pytest.mark.parametrize("rows_at_once", [2**15, 6])
def test_weights_of_the_downsampler_get_the_gradient_of_the_plain_equations(rows_at_once, monkeypatch):
    monkeypatch.setattr(attention, "CHECKPOINT_ROWS", rows_at_once)
    torch.manual_seed(0)
    model = Downsampled(4, 3, host="mean", host_options={"embed_dims": ()}, factor=3, hidden=3).double()
    bags = PackedBags.pack([torch.randn(n, 4, dtype=torch.float64) for n in (9, 5, 12)])
    model.downsample(bags, longer_than=5).unpack()[1].square().sum().backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    plain = bags.unpack()[1]
    hidden = functional.gelu(model.first(plain * (1 + model.attention(plain).softmax(0))))
    model.second(hidden).square().sum().backward()
    assert len(found) == 8
    torch.testing.assert_close(
        found, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    )


def test_the_strategy_reduces_and_inference_does_not():
    torch.manual_seed(0)
    model = Downsampled(3, 3, host="abmil", host_options={"embed_dims": (4,), "hidden": 2}, factor=4)
    strategy = PackMil(model, TASK, min_length=2).train()
    bags = PackedBags.pack([torch.randn(n, 3) for n in (40, 12, 4)])
    step = strategy(bags, torch.tensor([0, 1, 2]))
    assert step.bags.lengths == (5, 6, 4)
    assert step.output.scores.shape[0] == 15
    (TASK.loss(step.output.logits, torch.tensor([0, 1, 2])) + step.extra["residual"]).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in strategy.parameters())
    assert strategy.inference_model() is model
    assert model.eval()(bags).scores.shape[0] == 56


@pytest.mark.parametrize("kind", [MeanPooling, TransMil])
def test_any_aggregator_may_be_the_host(kind):
    options = {"width": 16} if kind is TransMil else {}
    strategy = PackMil(kind(5, 3, **options), TASK, min_length=2).train()
    bags = PackedBags.pack([torch.randn(n, 5) for n in (20, 1, 0, 7)])
    step = strategy(bags, torch.tensor([0, 1, 2, 1]))
    loss = TASK.loss(step.output.logits, torch.tensor([0, 1, 2, 1])) + step.extra["residual"]
    loss.backward()
    assert loss.isfinite()


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ConfigError, match=r"main_fraction: .* must be less than 1"):
        PackMil(Mean(3, 3), TASK, main_fraction=1.0)
    with pytest.raises(ConfigError, match="needs a task with ordered classes, or six"):
        PackMil(Mean(3, 3), TASK, labels="grades")
    with pytest.raises(ConfigError, match="needs a task with survival times"):
        PackMil(Mean(3, 3), TASK, labels="survival")
    with pytest.raises(ConfigError, match=r"factor: .* must be at least 1"):
        Downsampled(3, 3, factor=0)
    PackMil(Mean(3, 3), TASK, labels="grades", residual_weight=0.0)
