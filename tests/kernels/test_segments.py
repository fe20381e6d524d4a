import pytest
import torch
from kernel_packs import LENGTHS, normal, offsets

from eosin import kernels

REDUCTIONS = [kernels.segment_sum, kernels.segment_mean, kernels.segment_max]
SCORE_FUNCTIONS = [kernels.segment_softmax, kernels.segment_logsumexp, kernels.segment_attention_entropy]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_bag_index_names_each_instances_bag(lengths):
    expected = [bag for bag, length in enumerate(lengths) for _ in range(length)]
    assert kernels.bag_index(offsets(lengths), sum(lengths)).tolist() == expected


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("function", REDUCTIONS)
def test_reductions_of_packed_bags_equal_each_bag_alone(function, lengths):
    values = normal(sum(lengths), 3)
    expected = torch.zeros(len(lengths), 3, dtype=torch.float64)
    plain = {"segment_sum": torch.sum, "segment_mean": torch.mean, "segment_max": torch.amax}[function.__name__]
    for bag, part in enumerate(values.split(lengths)):
        if len(part):
            expected[bag] = plain(part, 0)
    torch.testing.assert_close(function(values, offsets(lengths)), expected, rtol=1e-12, atol=1e-12)


def test_softmax_and_logsumexp_agree_with_torch():
    lengths = (4, 9, 1)
    scores = normal(14, 2)
    weights = kernels.segment_softmax(scores, offsets(lengths))
    lse = kernels.segment_logsumexp(scores, offsets(lengths))
    for bag, (part, found) in enumerate(zip(scores.split(lengths), weights.split(lengths), strict=True)):
        torch.testing.assert_close(found, part.softmax(0), rtol=1e-12, atol=0)
        torch.testing.assert_close(lse[bag], part.logsumexp(0), rtol=1e-12, atol=0)


def test_entropy_is_minus_sum_a_log_a():
    scores = normal(20, 3, scale=3)
    weights = scores.softmax(0)
    expected = -(weights * weights.log()).sum(0)
    found = kernels.segment_attention_entropy(scores, offsets((20,)))[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_entropy_of_huge_equal_scores_keeps_its_digits_in_float32():
    scores = torch.full((8, 1), 1e4)
    entropy = kernels.segment_attention_entropy(scores, offsets((8,)))
    assert entropy.item() == pytest.approx(2.0794415, rel=1e-6)


@pytest.mark.parametrize("function", SCORE_FUNCTIONS)
def test_empty_and_fully_masked_bags_are_defined_and_have_no_gradient(function):
    scores = torch.tensor([[float("-inf")], [float("-inf")], [1.0], [2.0]], dtype=torch.float64, requires_grad=True)
    found = function(scores, offsets((2, 0, 2)))
    if function is kernels.segment_softmax:
        assert found[:2].tolist() == [[0.0], [0.0]]
    else:
        expected = float("-inf") if function is kernels.segment_logsumexp else 0.0
        assert found[0].item() == found[1].item() == expected
    finite = torch.where(found.isfinite(), found, 0)
    (gradient,) = torch.autograd.grad(finite.square().sum(), scores)
    assert gradient[:2].tolist() == [[0.0], [0.0]]
    assert gradient.isfinite().all()


@pytest.mark.parametrize("function", [*SCORE_FUNCTIONS, *REDUCTIONS])
def test_first_and_second_derivatives(function):
    scores = normal(9, 2).requires_grad_()
    bags = offsets((4, 0, 5))
    keep_finite = lambda s: torch.nan_to_num(function(s, bags), neginf=0.0)  # noqa: E731
    assert torch.autograd.gradcheck(keep_finite, scores)
    assert torch.autograd.gradgradcheck(keep_finite, scores)


@pytest.mark.parametrize("function", SCORE_FUNCTIONS)
def test_half_precision_scores_give_float32(function):
    scores = normal(6, 2, dtype=torch.bfloat16)
    assert function(scores, offsets((2, 4))).dtype == torch.float32


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("k", [0, 1, 3, 100])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_topk_chooses_the_first_of_equal_scores(lengths, k, largest):
    scores = normal(sum(lengths), 2).mul(2).round().div(2)  # many ties
    mask = kernels.segment_topk_mask(scores, offsets(lengths), k, largest=largest)
    for part, found in zip(scores.split(lengths), mask.split(lengths), strict=True):
        order = part.sort(dim=0, descending=largest, stable=True).indices
        expected = torch.zeros_like(found).scatter(0, order[:k], True)
        assert torch.equal(found, expected)


def test_topk_takes_a_count_per_bag():
    mask = kernels.segment_topk_mask(normal(10, 1), offsets((4, 6)), torch.tensor([1, 5]))
    assert [part.sum().item() for part in mask.split((4, 6))] == [1, 5]


@pytest.mark.parametrize(
    ("scores", "cu_seqlens", "error", "words"),
    [
        (torch.zeros(3, 1), torch.tensor([0, 3]), TypeError, "cu_seqlens: expected an int32"),
        (torch.zeros(3, 1), torch.tensor([0, 2], dtype=torch.int32), ValueError, "given 0 to 2"),
        (torch.zeros(3, 1), torch.tensor([0, 3, 1, 3], dtype=torch.int32), ValueError, "ascending"),
        (torch.zeros(3, 1), torch.tensor([], dtype=torch.int32), ValueError, "leading 0"),
        (torch.zeros(3), torch.tensor([0, 3], dtype=torch.int32), ValueError, "scores: expected shape"),
        (torch.zeros(3, 1).long(), torch.tensor([0, 3], dtype=torch.int32), TypeError, "scores: expected a floating"),
        (torch.full((3, 1), float("nan")), torch.tensor([0, 3], dtype=torch.int32), ValueError, "NaN in row 0"),
        ([1.0], torch.tensor([0, 1], dtype=torch.int32), TypeError, "given list"),
    ],
)
def test_bad_input_names_the_argument(scores, cu_seqlens, error, words):
    with pytest.raises(error, match=words):
        kernels.segment_softmax(scores, cu_seqlens)


@pytest.mark.parametrize("k", [-1, torch.tensor([1.0]), torch.tensor([1, 2])])
def test_bad_k_is_refused(k):
    with pytest.raises(ValueError, match="k: expected"):
        kernels.segment_topk_mask(torch.zeros(3, 1), offsets((3,)), k)
