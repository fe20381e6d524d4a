import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from eosin.errors import ConfigError
from eosin.features._bag import FeatureSpec
from eosin.mil._checkpoint import ModelCard, save_model
from eosin.mil._objective import Objective
from eosin.mil._recipe import RECIPES, Recipe
from eosin.mil.bags import PackedBags
from eosin.mil.methods.abmil import Abmil
from eosin.mil.methods.acmil import Acmil
from eosin.mil.methods.clam import ClamMultiBranch
from eosin.mil.methods.dsmil import Dsmil
from eosin.mil.methods.mhim import (
    GlobalRecycle,
    Mhim,
    MhimV2,
    Teacher,
    consistency_loss,
    cosine,
    instance_probability,
    randomly_high,
    rankings,
    voted,
)
from eosin.mil.methods.pooling import MeanPooling
from eosin.mil.methods.transmil import TransMil
from eosin.mil.slots import AGGREGATORS, AttentionOutput
from eosin.mil.tasks._classification import Classification

TASK = Classification(classes=("a", "b", "c"))
LENGTHS = (30, 1, 0, 2, 17)


def model(kind=Abmil, **options):
    torch.manual_seed(0)
    small = {"embed_dims": (6,)} if kind in (Abmil, Dsmil) else {"width": 8}
    return kind(5, 3, **(small | options))


def draw(lengths=LENGTHS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return PackedBags.pack([torch.randn(n, 5, generator=generator) for n in lengths])


def one_bag(n):
    return PackedBags.pack([torch.zeros(n, 5)])


def strategy(**options):
    return Mhim(
        model(), TASK, **({"random_ratio": 0.0, "high_ratio": 0.0, "high_factor": 1.0, "decay": False} | options)
    )


def test_masks_are_the_authors(golden, complete):
    golden = golden("mhim_masks")
    compared = ("ham_mask", "low_mask", "l_ham_mask")
    elsewhere = [name for name in golden if name.startswith(("rand_high", "r_ham", "lr_ham", "head_", "schedule_"))]
    complete(golden, {*compared, *elsewhere, "attention", "ratio_high", "ratio_low"})
    ranks, bags = golden["attention"][:, None], one_bag(101)
    high, low = float(golden["ratio_high"]), float(golden["ratio_low"])
    assert torch.equal(strategy(high_ratio=high).hidden(ranks, bags), golden["ham_mask"])
    assert torch.equal(strategy(low_ratio=low).hidden(ranks, bags), golden["low_mask"])
    assert torch.equal(strategy(high_ratio=high, low_ratio=low).hidden(ranks, bags), golden["l_ham_mask"])


def test_random_masks_have_the_authors_properties(golden):
    golden = golden("mhim_masks")
    ranks, bags = golden["attention"][:, None], one_bag(101)
    drawn, counts = zip(*(randomly_high(ranks, bags, 0.05, 0.5) for _ in range(20)), strict=True)
    assert set(counts[0]) == {int(golden["rand_high_count"])}
    assert all(mask.sum() == 6 and not (mask & ~golden["rand_high_candidates"]).any() for mask in drawn)
    assert torch.equal(torch.stack(drawn).any(0), golden["rand_high_candidates"])
    r_ham = strategy(random_ratio=0.5, high_ratio=0.05, high_factor=0.5).hidden(ranks, bags)
    assert 51 <= r_ham.sum() <= 57
    assert (r_ham & golden["rand_high_candidates"]).sum() >= 6
    for example in (golden["rand_high_mask_example"], drawn[0]):
        assert example.sum() == golden["rand_high_count"]
        assert not (example & ~golden["rand_high_candidates"]).any()
    ours = strategy(random_ratio=0.5, low_ratio=0.2, high_ratio=0.05).hidden(ranks, bags)
    order = golden["attention"].argsort()
    for lr_ham in (ours, golden["lr_ham_mask_example"]):
        assert lr_ham[order[:21]].all()
        assert lr_ham[order[-6:]].all()
        assert 51 <= lr_ham.sum() <= 78
    assert 51 <= golden["r_ham_mask_example"].sum() <= 57


def test_heads_vote(golden):
    golden = golden("mhim_masks")
    k = int(golden["head_k"])
    assert k == math.ceil(golden["head_ratio"] * 101)
    place = golden["head_votes"].sort(descending=True).values[k - 1]
    for hidden in (voted(golden["head_attention"].T, one_bag(101), [k]), golden["head_mask_example"]):
        assert hidden.sum() == k
        assert hidden[golden["head_votes"] > place].all()
        assert not hidden[golden["head_votes"] < place].any()


def test_schedules_are_the_authors(golden):
    golden = golden("mhim_masks")
    for name, start, end in (("high_003_to_0", 0.03, 0.0), ("ema_09997_to_1", 0.9997, 1.0)):
        found = [cosine(start, end, t / 20) for t in range(20)]
        assert found == pytest.approx(golden[f"schedule_{name}_T20"].tolist(), rel=1e-9)


def test_consistency_is_the_authors(golden, same):
    golden = golden("mhim_parts")
    student = golden["cons.student"].requires_grad_()
    loss = consistency_loss(student, golden["cons.teacher"], float(golden["cons.tau_teacher"]))
    loss.backward()
    same({"cons.loss": loss, "cons.grad.student": student.grad}, golden)


def test_the_teacher_moves_as_the_authors(golden, same):
    golden = golden("mhim_parts")
    student = nn.Module()
    student.weight = nn.Parameter(golden["ema.student"])
    teacher = Teacher(student, momentum=float(golden["ema.momentum"]), schedule="constant")
    with torch.no_grad():
        teacher.model.weight.copy_(golden["ema.teacher_before"])
    teacher.follow(student, 0.5)
    same({"ema.teacher_after": teacher.model.weight}, golden)
    rising = Teacher(student, momentum=0.0, schedule="cosine")
    with torch.no_grad():
        rising.model.weight.zero_()
    rising.follow(student, 1.0)
    assert not rising.model.weight.any()  # m is 1 at the end


PARTS = {
    *("cons.student", "cons.teacher", "cons.tau_teacher", "cons.loss", "cons.grad.student"),
    *("ema.student", "ema.teacher_before", "ema.momentum", "ema.teacher_after"),
    *("score.features", "score.attention", "score.classifier.weight", "score.classifier.bias"),
    *("score.official", "score.corrected_bias"),
}


@pytest.mark.parametrize("bias", [False, True])
def test_scores_are_the_authors(golden, same, bias):
    golden = golden("mhim_parts")
    host = Abmil(5, 3, embed_dims=(12,)).double()
    host.classifier.load_state_dict({part: golden[f"score.classifier.{part}"] for part in ("weight", "bias")})
    empty = torch.zeros(1, 3).double()
    output = AttentionOutput(empty, empty, golden["score.attention"].log()[:, None], golden["score.features"])
    found = instance_probability(host, output, one_bag(20), bias=bias)[:, 0]
    same({"score.corrected_bias" if bias else "score.official": found}, golden)


def test_recycling_is_the_authors(golden, same, complete):
    golden = golden("mhim_parts")
    complete({name: golden[name] for name in golden if not name.startswith("grn.")}, PARTS)
    recycle = GlobalRecycle(24, tokens=3, heads=2, head_dim=8, dropout=0.1, momentum=float(golden["grn.momentum"]))
    recycle.double().eval()
    weights = ("norm.weight", "norm.bias", "to_q.weight", "to_kv.weight", "to_out.weight", "to_out.bias")
    recycle.load_state_dict({name: golden[f"grn.{name}"] for name in weights} | {"queries": golden["grn.query_before"]})
    rest = torch.zeros(25, dtype=torch.bool)
    rest[golden["grn.merge_index"]] = True
    bags = PackedBags.pack([golden["grn.x"]])
    left = recycle(bags.values, bags, ~rest, rest, [(5, 20)])
    assert torch.equal(golden["grn.keep_index"].sort().values, torch.nonzero(~rest)[:, 0])
    kept = golden["grn.x"][golden["grn.keep_index"].sort().values]
    torch.testing.assert_close(left.values[:5], kept)
    same({"grn.output": torch.cat([golden["grn.x"][golden["grn.keep_index"]], left.values[5:]])}, golden)
    recycle.follow()
    same({"grn.query_after": recycle.queries}, golden)


def test_bags_of_a_pack_are_recycled_apart():
    torch.manual_seed(0)
    recycle = GlobalRecycle(5, tokens=2, heads=2, head_dim=3, dropout=0.0, momentum=0.9)
    bags = draw((6, 2, 0, 4))
    kept = torch.zeros(12, dtype=torch.bool)
    kept[[1, 4, 6, 7, 9]] = True
    counts = [(2, 4), (2, 0), (0, 0), (1, 3)]
    left = recycle(bags.values, bags, kept, ~kept, counts)
    assert left.lengths == (4, 4, 2, 3)
    rests = [part[~keep] for part, keep in zip(bags.unpack(), kept.split(bags.lengths), strict=True)]
    keeps = [part[keep] for part, keep in zip(bags.unpack(), kept.split(bags.lengths), strict=True)]
    for found, keep, rest in zip(left.unpack(), keeps, rests, strict=True):
        torch.testing.assert_close(found, torch.cat([keep, recycle.read(rest, (len(rest),))[0]]))


def test_tokens_stay_a_minority():
    torch.manual_seed(0)
    recycle = GlobalRecycle(5, tokens=2, heads=2, head_dim=3, dropout=0.0, momentum=0.9, token_share=0.25)
    bags = draw((6, 10, 0, 40))
    kept = torch.cat([torch.arange(n) < keep for n, keep in zip(bags.lengths, (3, 4, 0, 12), strict=True)])
    counts = [(3, 3), (4, 6), (0, 0), (12, 28)]
    left = recycle(bags.values, bags, kept, ~kept, counts)
    assert left.lengths == (3, 5, 0, 14)
    for found, bag, (keep, taken) in zip(left.unpack(), bags.unpack(), counts, strict=True):
        tokens = recycle.read(bag[keep:], (taken,))[0][: len(found) - keep]
        torch.testing.assert_close(found, torch.cat([bag[:keep], tokens]))


def test_what_was_learnt_from_a_few_instances_holds_for_whole_bags():
    """With all tokens beside one or two kept instances the loss on whole bags stays at chance, 0.69."""
    generator = torch.Generator().manual_seed(0)
    bags = PackedBags.pack([torch.randn(12, 5, generator=generator) + number % 2 for number in range(20)])
    target = torch.arange(20) % 2
    task = Classification(classes=("a", "b"))
    torch.manual_seed(0)
    mhim = MhimV2(Abmil(5, 2, embed_dims=(8,), dropout=0.0), task, heads=2, head_dim=4)
    optimizer = torch.optim.Adam(mhim.parameters(), lr=0.01)
    for _ in range(60):
        step = mhim(bags, target)
        optimizer.zero_grad()
        (task.loss(step.output.logits, target) + sum(step.extra.values())).backward()
        optimizer.step()
        mhim.after_step(step)
    assert task.loss(mhim.inference_model()(bags).logits, target) < 0.5


def test_the_student_learns_from_what_is_left():
    mhim = strategy(high_ratio=0.2, low_ratio=0.1, consistency=0.5).train()
    bags = draw()
    step = mhim(bags, torch.zeros(5, dtype=torch.int64))
    assert step.bags.lengths == (21, 1, 0, 2, 11)  # 2 of 2 would be hidden: left whole
    step.output.logits.sum().backward(retain_graph=True)
    step.extra["consistency"].backward()
    assert all(parameter.grad is not None for parameter in mhim.model.parameters())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in mhim.teacher.parameters())
    with torch.no_grad():
        mhim.model.classifier.bias += 1
    before = mhim.teacher.model.classifier.bias.clone()
    mhim.after_step(step)
    torch.testing.assert_close(mhim.teacher.model.classifier.bias, before + 1e-4)
    assert mhim.inference_model() is mhim.model


def test_the_highest_come_back_as_training_ends():
    mhim = strategy(high_ratio=0.2, decay=True)
    ranks, bags = torch.arange(50.0)[:, None], one_bag(50)
    hidden = []
    for progress in (0.0, 0.5, 0.999, 1.0):
        mhim.start_step(progress)
        hidden.append(int(mhim.hidden(ranks, bags).sum()))
    assert hidden == [10, 5, 1, 0]


@pytest.mark.parametrize("random_mask_ratio", [0.0, 0.2, 0.8, 1.0])
def test_the_ratio_of_version_2_is_what_is_removed(random_mask_ratio):
    mhim = MhimV2(model(), TASK, high_ratio=0.1, random_mask_ratio=random_mask_ratio, heads=2, head_dim=4)
    bags = draw((50, 1, 0, 10))
    ranks = torch.rand(61, 1)
    kept, rest, counts = mhim.divide(ranks, bags)
    left = (45, 1, 0, 9)
    keep = [min(n, max(1, math.floor(round((1 - random_mask_ratio) * n, 6)))) for n in left]
    assert counts == [(k, n - k) for k, n in zip(keep, left, strict=True)]
    assert [int(part.sum()) for part in kept.split(bags.lengths)] == keep
    assert [int(part.sum()) for part in rest.split(bags.lengths)] == [n - k for k, n in zip(keep, left, strict=True)]
    gone = ~kept[:50] & ~rest[:50]
    assert ranks[:50][gone].min() >= ranks[:50][~gone].max()


def test_version_2_leaves_small_bags_whole_and_keeps_the_least_that_is_asked_for_of_others():
    mhim = MhimV2(model(), TASK, high_ratio=0.1, random_mask_ratio=0.8, keep_at_least=12, heads=2, head_dim=4)
    bags = draw((100, 50, 13, 12, 1, 0))
    kept, rest, counts = mhim.divide(torch.rand(176, 1), bags)
    assert counts == [(18, 72), (12, 33), (11, 0), (12, 0), (1, 0), (0, 0)]
    assert [int(part.sum()) for part in kept.split(bags.lengths)] == [kept for kept, _ in counts]
    assert [int(part.sum()) for part in rest.split(bags.lengths)] == [rest for _, rest in counts]


@pytest.mark.parametrize("kind", [Abmil, ClamMultiBranch, Dsmil, Acmil, TransMil])
@pytest.mark.parametrize("version", [Mhim, MhimV2])
def test_any_attention_may_be_the_host(kind, version):
    options = {"token_share": None} if version is MhimV2 else {}
    mhim = version(model(kind), TASK, **options).train()
    target = torch.zeros(len(LENGTHS), dtype=torch.int64)
    queries = mhim.recycle.queries.clone() if version is MhimV2 else None
    for seed in range(2):
        step = mhim(draw(seed=seed), target)
        loss = TASK.loss(step.output.logits, target) + sum(step.extra.values())
        loss.backward()
        mhim.after_step(step)
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in mhim.parameters() if p.grad is not None)
    if queries is not None:
        assert mhim.recycle.to_kv.weight.grad.any()
        assert 0 < (mhim.recycle.queries - queries).abs().max() < 1e-2


def test_rows_of_an_embedding_are_compared_apart():
    torch.manual_seed(0)
    mhim = Mhim(model(Dsmil, prediction="mean"), TASK, consistency=0.3, random_ratio=0.0, high_ratio=0.0).train()
    bags = draw((6, 9))
    step = mhim(bags, torch.tensor([0, 1]))
    student, teacher = (network(bags).embedding.view(2, 3, 6) for network in (mhim.model, mhim.teacher.model))
    by_hand = -(functional.softmax(teacher / 0.1, 2) * functional.log_softmax(student, 2)).sum(2).mean()
    torch.testing.assert_close(step.extra["consistency"], 0.3 * by_hand)


def test_version_1_of_dsmil_has_the_loss_of_both_streams():
    recipe = RECIPES["mhim_dsmil"]
    torch.manual_seed(0)
    host = AGGREGATORS.build("dsmil", 5, 3, options=recipe.aggregator.options)
    objective = Objective(recipe, host, TASK).eval()
    objective.strategy.ratios = (0.0, 0.0, 0.0)
    bags, target = draw((6, 9)), torch.tensor([0, 1])
    total, step, _ = objective(bags, target)
    output = host(bags)
    largest = torch.stack([part.amax(0) for part in bags.unpack(output.instance_logits)])
    streams = [functional.cross_entropy(logits, target) for logits in (output.logits, largest)]
    torch.testing.assert_close(total, sum(streams) / 2 + step.extra["consistency"])
    assert RECIPES["mhim_v2_dsmil"].aggregator.options["prediction"] == "mean"


@pytest.mark.parametrize("padding", ["bag", "grid"])
def test_values_of_the_first_layer_weigh_for_transmil(padding):
    bags = draw((16,))
    host = model(TransMil, heads=2, landmarks=8, padding=padding).double().eval()
    with torch.no_grad():
        host.layer1.to_qkv.weight.mul_(6)
    bags = bags.with_values(bags.values.double())
    output = host(bags)
    layer, h = host.layer1, host.embed(bags.values)
    values = (layer.norm(h) @ layer.to_qkv.weight[16:].T).unflatten(1, (2, 4))
    assert (output.weights < 0).any()
    assert torch.equal(rankings(output), output.weights)
    weighted = (values * output.weights[..., None]).flatten(1)
    by_hand = functional.linear(layer.to_out(weighted), host.classifier.weight).softmax(1).amax(1)
    torch.testing.assert_close(instance_probability(host, output, bags)[:, 0], by_hand)


def test_what_instances_are_ranked_by():
    bags = draw((6,))
    dsmil = model(Dsmil)
    output = dsmil(bags)
    assert torch.equal(rankings(output)[:, 0], output.instance_logits.amax(1))
    assert rankings(model(Acmil, branches=3).eval()(bags)).shape == (6, 3)


def test_rows_of_attention_weigh_their_own_class_or_part():
    bags = draw((6,))
    clam = model(ClamMultiBranch).eval()
    output = clam(bags)
    weights, h = output.scores.softmax(0), output.instances
    by_hand = torch.stack([(weights[:, c : c + 1] * h) @ clam.classifier.weight[c] for c in range(3)], 1)
    torch.testing.assert_close(instance_probability(clam, output, bags)[:, 0], by_hand.softmax(1).amax(1))
    heads = model(heads=2).eval()
    output = heads(bags)
    weights, h = output.scores.softmax(0), output.instances
    parts = torch.cat([weights[:, :1] * h, weights[:, 1:] * h], 1)
    by_hand = functional.linear(parts, heads.classifier.weight)
    torch.testing.assert_close(instance_probability(heads, output, bags)[:, 0], by_hand.softmax(1).amax(1))


def test_one_output_counts_as_two_classes():
    bags = draw((6,))
    host = Abmil(5, 1, embed_dims=(6,)).eval()
    output = host(bags)
    logit = (output.scores.softmax(0) * output.instances) @ host.classifier.weight[0]
    torch.testing.assert_close(
        instance_probability(host, output, bags)[:, 0], logit.sigmoid().maximum(1 - logit.sigmoid())
    )


@pytest.mark.parametrize("version", [Mhim, MhimV2])
def test_the_teacher_may_start_from_a_plain_run(tmp_path, version):
    torch.manual_seed(7)
    options = {"embed_dims": (6,), "hidden": 4}
    plain = Abmil(5, 3, **options)
    recipe = Recipe.parse({"aggregator": {"name": "abmil", "options": options}, "training": {"standardize": False}})
    spec = FeatureSpec(encoder="toy", dim=5)
    save_model(tmp_path, plain, ModelCard(recipe=recipe, task=TASK.model_dump(mode="json"), features=spec))
    student = model(hidden=4)
    mhim = version(student, TASK, init_from=tmp_path)
    for name, value in plain.state_dict().items():
        assert torch.equal(mhim.teacher.model.state_dict()[name], value)
        assert torch.equal(student.state_dict()[name], value) == name.startswith("embed.")
    with pytest.raises(ConfigError, match="of another kind or size than the Abmil"):
        version(model(hidden=5), TASK, init_from=tmp_path)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ConfigError, match="MhimV2 needs an aggregator that returns AttentionOutput"):
        MhimV2(MeanPooling(5, 3), TASK)
    with pytest.raises(ConfigError, match=r"low_ratio: .* must be at most 1"):
        Mhim(model(), TASK, low_ratio=1.5)
    with pytest.raises(ConfigError, match=r"temperature: .* must be more than 0"):
        Mhim(model(), TASK, temperature=0.0)
    with pytest.raises(ConfigError, match=r"token_share: .* must be at most 1"):
        MhimV2(model(), TASK, token_share=2.0)
    with pytest.raises(ConfigError, match=r"tokens: .* must be at least 1"):
        MhimV2(model(), TASK, tokens=0)
    whole = model()
    whole.classifier = nn.Sequential(whole.classifier)
    with pytest.raises(ConfigError, match="ranks instances with the bag classifier"):
        MhimV2(whole, TASK)
