import numpy as np
import pytest
import torch
from kernel_packs import LENGTHS, error, normal, offsets

from eosin import kernels

BACKENDS = ["reference", "torch"]


def head(n_rows, heads=2, outputs=3, width=4, dtype=torch.float64):
    shapes = [(n_rows, heads), (n_rows, width), (outputs, heads, width), (outputs,)]
    return [normal(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


@pytest.fixture
def hippo(shared):
    """Return the published model's scores, embedded instances, head and expected effects."""
    golden = {k: torch.from_numpy(v) for k, v in np.load(shared / "golden" / "hippo_gated_c2.npz").items()}
    wide = {k: v.double() if v.is_floating_point() else v for k, v in golden.items()}

    def layer(name, x):
        return torch.nn.functional.linear(x, wide[f"w_{name}_weight"], wide[f"w_{name}_bias"])

    def scored(x):
        h = torch.relu(layer("embed", x))
        return layer("att_score", torch.tanh(layer("att_tanh", h)) * torch.sigmoid(layer("att_gate", h))), h

    weight, bias = wide["w_classifier_weight"][:, None], wide["w_classifier_bias"]
    return (*scored(wide["bag"]), weight, bias), wide


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.shared
def test_effects_of_the_published_model(hippo, backend):
    inputs, golden = hippo
    with kernels.use_backend(backend):
        found = kernels.leave_one_out(*inputs, offsets((30,)))
    torch.testing.assert_close(found, golden["loo_logits"], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "worth"),
    [
        ("greedy_min", lambda p, now: p),
        ("greedy_max", lambda p, now: -p),
        ("greedy_small", lambda p, now: (p - now).abs()),
    ],
)
@pytest.mark.shared
def test_greedy_search_of_the_published_model(hippo, name, worth):
    inputs, golden = hippo

    def objective(candidates, now):
        return worth(candidates.softmax(-1)[:, 1], now.softmax(-1)[1])

    path = kernels.greedy_removal(*inputs, rounds=8, objective=objective)
    assert path.order.tolist() == golden[f"{name}_idx"].tolist()
    torch.testing.assert_close(path.logits.softmax(1), golden[f"{name}_out"], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_closed_forms_equal_building_the_bag_again(lengths):
    scores, values, weight, bias = head(sum(lengths))
    cu_seqlens = offsets(lengths)
    found, pooled = [], []
    for backend in BACKENDS:
        with kernels.use_backend(backend):
            found.append(kernels.leave_one_out(scores, values, weight, bias, cu_seqlens))
            pooled.append(kernels.pooled_without(scores, values, cu_seqlens))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(pooled[1], pooled[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dominant", [0.0, 2.0, 12.0, 40.0, 700.0])
def test_an_instance_with_nearly_all_attention_loses_no_digits(dominant, dtype):
    scores, values, weight, bias = head(200, dtype=torch.float64)
    scores[17, 0] += dominant
    scores[[3, 4], 1] = dominant  # a tie
    with kernels.use_backend("reference"):
        exact = kernels.leave_one_out(scores, values, weight, bias, offsets((200,)))
        exact_pooled = kernels.pooled_without(scores, values, offsets((200,)))
    cast = [tensor.to(dtype) for tensor in (scores, values, weight, bias)]
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert error(kernels.leave_one_out(*cast, offsets((200,))), exact) < tolerance
    assert error(kernels.pooled_without(*cast[:2], offsets((200,))), exact_pooled) < tolerance


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_only_instance_leaves_the_bias(backend):
    scores, values, weight, bias = head(1)
    with kernels.use_backend(backend):
        assert torch.equal(kernels.leave_one_out(scores, values, weight, bias, offsets((1,)))[0], bias)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_masked_instance_has_no_effect(backend):
    scores, values, weight, bias = head(6)
    scores[2] = float("-inf")
    rest = [0, 1, 3, 4, 5]
    with kernels.use_backend(backend):
        found = kernels.leave_one_out(scores, values, weight, bias, offsets((6,)))
        alone = kernels.leave_one_out(scores[rest], values[rest], weight, bias, offsets((5,)))
    torch.testing.assert_close(found[rest], alone, rtol=1e-10, atol=1e-12)
    base = torch.einsum("nh,nd,khd->k", scores.softmax(0), values, weight) + bias
    torch.testing.assert_close(found[2], base, rtol=1e-10, atol=1e-12)


def test_chosen_instances_only():
    scores, values, _, _ = head(9)
    some = torch.tensor([8, 0, 4])
    everything = kernels.pooled_without(scores, values, offsets((3, 6)))
    assert torch.equal(kernels.pooled_without(scores, values, offsets((3, 6)), instances=some), everything[some])


def test_greedy_search_can_empty_the_bag():
    scores, values, weight, bias = head(5)
    path = kernels.greedy_removal(scores, values, weight, bias, rounds=5, objective=lambda logits, now: logits[:, 0])
    assert sorted(path.order.tolist()) == [0, 1, 2, 3, 4]
    torch.testing.assert_close(path.logits[-1], bias)


@pytest.mark.parametrize(
    ("position", "change", "words"),
    [
        (0, torch.full((4, 2), float("nan")), "scores: expected no NaN"),
        (0, torch.zeros(3, 2), r"scores: expected shape \(4, H\)"),
        (2, torch.zeros(3, 2), r"weight: expected shape \(K, 2, 4\)"),
        (3, torch.zeros(2), r"bias: expected shape \(3,\)"),
    ],
)
def test_bad_input_names_the_argument(position, change, words):
    inputs = head(4, dtype=torch.float32)
    inputs[position] = change
    with pytest.raises(ValueError, match=words):
        kernels.leave_one_out(*inputs, offsets((4,)))


def test_bad_rows_and_rounds_are_refused():
    inputs = head(4, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"rows in \[0, 4\)"):
        kernels.pooled_without(*inputs[:2], offsets((4,)), instances=torch.tensor([4]))
    with pytest.raises(ValueError, match="rounds: expected from 0 to the 4"):
        kernels.greedy_removal(*inputs, rounds=5, objective=lambda logits, now: logits[:, 0])
