import numpy as np
import pytest
import torch
from kernel_packs import LENGTHS, error, gate_parameters, normal, offsets

from eosin import kernels
from eosin.kernels import _rows
from eosin.kernels._dropout import Kept, drop_, keep_mask

BACKENDS = ["reference", "torch"]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(_rows, "ROWS", 4)
    monkeypatch.setattr(_rows, "cached_entries", lambda: 10)  # tiles of one or two rows


@pytest.mark.parametrize("name", ["abmil_plain", "abmil_gated", "aem"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.shared
def test_scores_and_gradients_of_the_published_models(shared, small_blocks, backend, name):
    golden = {key: torch.from_numpy(array) for key, array in np.load(shared / "golden" / f"{name}.npz").items()}
    values = (golden["x"] @ golden["embed.weight"].T).relu() if name == "aem" else golden["x"].clone().requires_grad_()
    keys = {
        "v_weight": "attention.V.weight",
        "v_bias": "attention.V.bias",
        "u_weight": "attention.U.weight",
        "u_bias": "attention.U.bias",
        "w_weight": "attention.w.weight",
        "w_bias": "attention.w.bias",
    }
    parameters = {role: golden[key].clone().requires_grad_() if key in golden else None for role, key in keys.items()}
    with kernels.use_backend(backend):
        result = kernels.gated_attention_pool(values, **parameters, cu_seqlens=offsets((len(values),)))
    torch.testing.assert_close(result.scores[:, 0], golden["attention_logits"], rtol=1e-9, atol=1e-10)
    if name == "aem":
        logits = result.pooled[:, 0] @ golden["classifier.weight"].T + golden["classifier.bias"]
        torch.testing.assert_close(logits, golden["logits"], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(-result.entropy.squeeze(), golden["neg_entropy"], rtol=1e-9, atol=1e-10)
        loss = torch.nn.functional.cross_entropy(logits, golden["label"]) - golden["lam"] * result.entropy.squeeze()
    else:
        torch.testing.assert_close(result.pooled[0, 0], golden["bag_embedding"], rtol=1e-9, atol=1e-10)
        logit = result.pooled[:, 0] @ golden["classifier.weight"].T + golden["classifier.bias"]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logit[0], golden["label"])
    for role, parameter in parameters.items():
        if parameter is not None:
            (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True)
            torch.testing.assert_close(gradient, golden[f"grad.{keys[role]}"], rtol=1e-9, atol=1e-10)
    if name != "aem":
        torch.testing.assert_close(torch.autograd.grad(loss, values)[0], golden["grad.x"], rtol=1e-9, atol=1e-10)


@pytest.mark.shared
def test_entropy_of_many_rows_and_of_masked_rows(shared):
    golden = {key: torch.from_numpy(array) for key, array in np.load(shared / "golden" / "aem.npz").items()}
    rows = golden["multi.attention_logits"].clone().requires_grad_()
    entropy = kernels.segment_attention_entropy(rows.reshape(-1, 1), offsets((50,) * 8))
    torch.testing.assert_close(-entropy.mean(), golden["multi.neg_entropy"], rtol=1e-9, atol=1e-10)
    (gradient,) = torch.autograd.grad(-entropy.mean(), rows)
    torch.testing.assert_close(gradient, golden["multi.grad.attention_logits"], rtol=1e-9, atol=1e-10)
    masked = kernels.segment_attention_entropy(golden["masked.attention_logits"].T, offsets((5,)))
    torch.testing.assert_close(-masked.squeeze(), golden["masked.neg_entropy"], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bag_in_a_pack_equals_the_bag_alone(small_blocks, backend, lengths):
    values, parameters = normal(sum(lengths), 6), gate_parameters(6, 5, 2)
    with kernels.use_backend(backend):
        packed = kernels.gated_attention_pool(values, **parameters, cu_seqlens=offsets(lengths))
        for bag, part in enumerate(values.split(lengths)):
            alone = kernels.gated_attention_pool(part, **parameters, cu_seqlens=offsets((len(part),)))
            for found, expected in zip(packed[1:], alone[1:], strict=True):
                torch.testing.assert_close(found[bag], expected[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_torch_path_equals_the_definition_in_values_and_all_gradients(small_blocks, gated, activation, dropout):
    lengths = (7, 0, 1, 11)
    values, parameters = normal(19, 6), gate_parameters(6, 5, 3, gated=gated)
    temperature, mask = torch.tensor(0.7, dtype=torch.float64), normal(19, 3, seed=9)
    keep = normal(19, seed=10) > -1

    def run(backend):
        leaves = [
            t.clone().requires_grad_() for t in (values, *parameters.values(), temperature, mask) if t is not None
        ]
        given = iter(leaves)
        v = next(given)
        p = {name: None if t is None else next(given) for name, t in parameters.items()}
        with kernels.use_backend(backend):
            result = kernels.gated_attention_pool(
                v,
                **p,
                cu_seqlens=offsets(lengths),
                temperature=next(given),
                score_mask=next(given),
                keep=keep,
                gate_dropout=dropout,
                generator=torch.Generator().manual_seed(3),
                activation=activation,
            )
        finite = [torch.nan_to_num(output, neginf=0.0) for output in result]
        upstream = [normal(*output.shape, seed=20 + i) for i, output in enumerate(finite)]
        return [*finite, *torch.autograd.grad(finite, leaves, upstream)]

    for found, expected in zip(run("torch"), run("reference"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_and_second_derivatives(small_blocks, backend):
    parameters = gate_parameters(3, 2, 2)
    inputs = [t.requires_grad_() for t in (normal(5, 3), *parameters.values())]

    def pool(*tensors):
        result = kernels.gated_attention_pool(*tensors, offsets((2, 3)))
        return tuple(result)

    with kernels.use_backend(backend):
        assert torch.autograd.gradcheck(pool, inputs)
        assert torch.autograd.gradgradcheck(pool, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torch_path_is_as_exact_as_eager_torch(dtype):
    values, parameters = normal(1500, 32, dtype=dtype), gate_parameters(32, 16, 2, dtype=dtype)
    upstream = normal(1500, 2, seed=8)

    def eager(v, vw, vb, uw, ub, ww, wb):
        linear = torch.nn.functional.linear
        return linear(torch.tanh(linear(v, vw, vb)) * torch.sigmoid(linear(v, uw, ub)), ww, wb)

    def run(function, cast):
        leaves = [t.to(cast).requires_grad_() for t in (values, *parameters.values())]
        scores = function(*leaves)
        return [scores, *torch.autograd.grad(scores, leaves, upstream.to(scores.dtype))]

    truth = run(eager, torch.float64)
    for fast, plain, exact in zip(run(kernels.gated_attention_scores, dtype), run(eager, dtype), truth, strict=True):
        assert error(fast, exact) <= 2 * error(plain, exact)


def test_half_precision_instances_meet_float32_parameters():
    values, parameters = normal(20, 8, dtype=torch.float16), gate_parameters(8, 4, 1, dtype=torch.float32)
    found = kernels.gated_attention_scores(values, **parameters)
    expected = kernels.gated_attention_scores(values.float(), **parameters)
    torch.testing.assert_close(found, expected)


def test_dropout_mask_depends_on_seed_row_column_and_branch_only():
    whole = keep_mask(5, (100, 7), 0.3, branch=0, device=torch.device("cpu"))
    block = keep_mask(5, (40, 7), 0.3, branch=0, device=torch.device("cpu"), first_row=60)
    assert torch.equal(whole[60:], block)
    for other in (
        keep_mask(6, (100, 7), 0.3, branch=0, device=torch.device("cpu")),
        keep_mask(5, (100, 7), 0.3, branch=1, device=torch.device("cpu")),
    ):
        assert (whole != other).float().mean() > 0.3


def test_dropout_mask_is_statistically_independent():
    keep = keep_mask(11, (20_000, 64), 0.25, branch=0, device=torch.device("cpu")).double()
    assert keep.mean().item() == pytest.approx(0.75, abs=0.002)
    centred = keep - keep.mean()
    columns = (centred.T @ centred) / len(keep) / 0.1875
    assert (columns - torch.eye(64)).abs().max() < 0.04
    lagged = (centred[1:] * centred[:-1]).mean() / 0.1875
    assert abs(lagged) < 0.005
    counts = centred.sum(1)
    assert counts.var().item() == pytest.approx(64 * 0.1875, rel=0.05)  # as of 64 independent draws
    triples = (centred[:, :-2] * centred[:, 1:-1] * centred[:, 2:]).mean() / 0.1875**1.5
    assert abs(triples) < 0.005


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dropping_in_place_follows_the_mask(dtype):
    values = normal(300, 200, dtype=dtype)
    keep = keep_mask(3, (300, 200), 0.4, branch=1, device=values.device, first_row=7)
    found = drop_(values.clone(), Kept.of(3, (300, 200), 0.4, branch=1, device=values.device, first_row=7)[:])
    assert torch.equal(found, values * keep)


def test_one_mask_drops_the_product_of_both_branches_as_often_as_two():
    values, parameters = normal(3000, 6), gate_parameters(6, 5, 1)
    reads_one = {**parameters, "w_weight": torch.zeros(1, 5).index_fill(1, torch.tensor([2]), 1.0).to(values)}
    for gated, kept in ((True, 0.7**2), (False, 0.7)):
        plain = {"u_weight": None, "u_bias": None} if not gated else {}
        options = {**reads_one, **plain, "w_bias": None}
        scores = kernels.gated_attention_scores(values, **options, gate_dropout=0.3)
        whole = kernels.gated_attention_scores(values, **options)
        assert (scores != 0).double().mean().item() == pytest.approx(kept, abs=0.03)
        torch.testing.assert_close(scores[scores != 0], whole[scores != 0] / kept)


def test_generator_makes_dropout_repeatable():
    values, parameters = normal(30, 6), gate_parameters(6, 5, 1)
    runs = [
        kernels.gated_attention_scores(
            values, **parameters, gate_dropout=0.5, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize(
    ("change", "error_type", "words"),
    [
        ({"v_weight": torch.zeros(5, 7)}, ValueError, r"v_weight: expected shape \(A, 6\), given \(5, 7\)"),
        ({"u_weight": None}, ValueError, "u_bias: expected None"),
        ({"u_weight": torch.zeros(4, 6)}, ValueError, r"u_weight: expected shape \(5, 6\)"),
        ({"w_bias": torch.zeros(3)}, ValueError, r"w_bias: expected shape \(2,\)"),
        ({"w_weight": torch.zeros(2, 5).long()}, TypeError, "w_weight: expected a floating-point"),
        ({"w_bias": torch.zeros(2, dtype=torch.float64)}, TypeError, "w_bias: expected torch.float32 like v_weight"),
        ({"activation": "gelu"}, ValueError, "activation: expected tanh or relu"),
        ({"gate_dropout": 1.0}, ValueError, "gate_dropout"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"score_mask": torch.zeros(5)}, ValueError, r"score_mask: expected shape \(4,\)"),
        ({"score_mask": torch.full((4,), float("nan"))}, ValueError, "score_mask: expected no NaN"),
        ({"keep": torch.zeros(4)}, TypeError, "keep: expected a bool"),
        ({"values": torch.zeros(4, 6, 1)}, ValueError, r"values: expected shape \(N, D\)"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, ValueError, "cu_seqlens"),
    ],
)
def test_bad_input_names_the_argument(change, error_type, words):
    arguments = {
        "values": torch.zeros(4, 6),
        **gate_parameters(6, 5, 2, dtype=torch.float32),
        "cu_seqlens": offsets((4,)),
        **change,
    }
    with pytest.raises(error_type, match=words):
        kernels.gated_attention_pool(**arguments)
