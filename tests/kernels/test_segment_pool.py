import pytest
import torch
from kernel_packs import LENGTHS, error, normal, offsets

from eosin import kernels

BACKENDS = ["reference", "torch"]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_segment_pool_is_the_weighted_sum_of_each_bag(lengths):
    weights, values = normal(sum(lengths), 2), normal(sum(lengths), 3, seed=1)
    pooled = kernels.segment_pool(weights, values, offsets(lengths))
    assert pooled.shape == (len(lengths), 2, 3)
    for bag, (w, v) in enumerate(zip(weights.split(lengths), values.split(lengths), strict=True)):
        torch.testing.assert_close(pooled[bag], w.T @ v, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_pool_of_packed_bags_equals_each_bag_alone(backend, lengths):
    scores, values = normal(sum(lengths), 2), normal(sum(lengths), 3, seed=1)
    with kernels.use_backend(backend):
        pooled, lse, entropy = kernels.attention_pool(scores, values, offsets(lengths))
    assert (pooled.shape, lse.shape, entropy.shape) == ((len(lengths), 2, 3), (len(lengths), 2), (len(lengths), 2))
    for bag, (s, v) in enumerate(zip(scores.split(lengths), values.split(lengths), strict=True)):
        weights = s.softmax(0)
        torch.testing.assert_close(pooled[bag], weights.T @ v, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse[bag], s.logsumexp(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(entropy[bag], -(weights * weights.log()).sum(0), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("output", [0, 1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_output_has_first_and_second_derivatives(backend, output):
    bags = offsets((4, 0, 1, 3))
    scores, values = normal(8, 2).requires_grad_(), normal(8, 3, seed=1).requires_grad_()

    def pool(s, v):
        return torch.nan_to_num(kernels.attention_pool(s, v, bags)[output], neginf=0.0)

    with kernels.use_backend(backend):
        if output == 0:
            assert torch.autograd.gradcheck(pool, (scores, values))
            assert torch.autograd.gradgradcheck(pool, (scores, values))
        else:
            assert torch.autograd.gradcheck(lambda s: pool(s, values.detach()), scores)
            assert torch.autograd.gradgradcheck(lambda s: pool(s, values.detach()), scores)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_instances_take_no_part(backend):
    scores = normal(9, 2)
    scores[2:5] = float("-inf")
    scores[7:] = float("-inf")
    scores.requires_grad_()
    values = normal(9, 3, seed=1).requires_grad_()
    with kernels.use_backend(backend):
        outputs = kernels.attention_pool(scores, values, offsets((7, 2)))
        gradients = torch.autograd.grad(
            sum(o[:1].square().sum() + o[1:].nan_to_num(neginf=0).sum() for o in outputs), (scores, values)
        )
    kept = [0, 1, 5, 6]
    expected = kernels.attention_pool(scores[kept], values[kept], offsets((4,)))
    for found, alone in zip(outputs, expected, strict=True):
        torch.testing.assert_close(found[:1], alone)
    assert outputs[0][1].abs().sum() == 0
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert gradient[[2, 3, 4, 7, 8]].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torch_path_is_as_exact_as_plain_torch(dtype):
    lengths = (3000, 1, 700)
    bags = offsets(lengths)
    scores, values = normal(sum(lengths), 3, dtype=torch.float32), normal(sum(lengths), 16, seed=1, dtype=dtype)
    upstream = [normal(3, 3, 16, seed=2), normal(3, 3, seed=3), normal(3, 3, seed=4)]

    def run(backend, cast):
        s, v = scores.to(cast or torch.float32).requires_grad_(), values.to(cast or dtype).requires_grad_()
        with kernels.use_backend(backend):
            outputs = kernels.attention_pool(s, v, bags)
        grads = [g.to(o.dtype) for g, o in zip(upstream, outputs, strict=True)]
        return [*outputs, *torch.autograd.grad(outputs, (s, v), grads)]

    truth = run("reference", torch.float64)
    for fast, plain, exact in zip(run("torch", None), run("reference", None), truth, strict=True):
        assert fast.dtype == plain.dtype
        assert error(fast, exact) <= 2 * error(plain, exact) + 1e-7


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_of_any_size_stay_finite(backend):
    scores = torch.tensor([[1e4], [-1e4], [1e4], [0.0]])
    values = normal(4, 3, dtype=torch.float32)
    with kernels.use_backend(backend):
        pooled, lse, entropy = kernels.attention_pool(scores, values, offsets((4,)))
    torch.testing.assert_close(pooled[0, 0], (values[0] + values[2]) / 2)
    assert lse.item() == pytest.approx(1e4 + 0.6931, rel=1e-6)
    assert entropy.item() == pytest.approx(0.6931472, rel=1e-6)


@pytest.mark.parametrize("function", [kernels.segment_pool, kernels.attention_pool])
def test_bad_input_names_the_argument(function):
    values, bags = torch.zeros(4, 3), offsets((4,))
    with pytest.raises(ValueError, match=r"expected shape \(4, H\), given \(3, 1\)"):
        function(torch.zeros(3, 1), values, bags)
    with pytest.raises(ValueError, match="values: expected shape"):
        function(torch.zeros(4, 1), torch.zeros(4), bags)
    with pytest.raises(TypeError, match="values: expected a floating-point tensor"):
        function(torch.zeros(4, 1), values.long(), bags)
    with pytest.raises(ValueError, match="expected on cpu like the values, given on meta"):
        function(torch.zeros(4, 1, device="meta"), values, bags)


def test_nan_scores_are_refused():
    with pytest.raises(ValueError, match="NaN in row 1"):
        kernels.attention_pool(torch.tensor([[0.0], [float("nan")]]), torch.zeros(2, 3), offsets((2,)))
