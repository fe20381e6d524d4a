"""Instances read through an index give what their copies give, in every path and for every gradient."""

import pytest
import torch
from kernel_packs import gate_parameters, normal, offsets

from eosin import kernels
from eosin.kernels import _rows
from eosin.kernels.segment_pool import torch_impl as pool_impl

BAGS = (9, 0, 5, 1)
INDEX = torch.tensor([7, 3, 3, 0, 29, 12, 11, 10, 9, 1, 2, 4, 5, 6, 29])  # row 3 twice in a bag, row 29 in two
BACKENDS = ["reference", "torch"]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(_rows, "ROWS", 4)
    monkeypatch.setattr(pool_impl, "ROWS", 4)


def scores(values, per_head, row_index):
    return kernels.gated_attention_scores(values, **gate_parameters(6, 5, 2), row_index=row_index)


def gated(values, per_head, row_index, **options):
    parameters = gate_parameters(6, 5, 2)
    return kernels.gated_attention_pool(
        values, **parameters, cu_seqlens=offsets(BAGS), score_mask=per_head, row_index=row_index, **options
    )


def embedded(values, per_head, row_index):
    weight = normal(6, 6, seed=20)
    return gated(values, per_head, row_index, embed_weight=weight, embed_bias=normal(6, seed=21))


def recomputed(values, per_head, row_index):
    return gated(values, per_head, row_index, memory_budget=0)


def attention(values, per_head, row_index):
    return kernels.attention_pool(per_head, values, offsets(BAGS), row_index=row_index)


def weighted(values, per_head, row_index):
    return kernels.segment_pool(per_head, values, offsets(BAGS), row_index=row_index)


FUNCTIONS = [scores, gated, embedded, recomputed, attention, weighted]


def outputs_and_gradients(function, values, index, backend):
    values, per_head = values.clone().requires_grad_(), normal(len(INDEX), 2, seed=9).requires_grad_()
    with kernels.use_backend(backend):
        if index is None:
            outputs = function(values.index_select(0, INDEX), per_head, None)
        else:
            outputs = function(values, per_head, index)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    total = sum((o.nan_to_num(neginf=0) * normal(*o.shape, seed=30 + i)).sum() for i, o in enumerate(outputs))
    return [*outputs, *torch.autograd.grad(total, (values, per_head), allow_unused=True)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_index_gives_what_a_copy_gives(function, backend):
    values = normal(30, 6)
    found = outputs_and_gradients(function, values, INDEX, backend)
    expected = outputs_and_gradients(function, values, None, "reference")
    for got, wanted in zip(found, expected, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("function", [gated, attention, weighted])
@pytest.mark.long
def test_second_derivatives_follow_the_index(function):
    values = normal(30, 6).requires_grad_()
    per_head = normal(len(INDEX), 2, seed=9).requires_grad_()

    def pooled(values, per_head):
        result = function(values, per_head, INDEX)
        return result if isinstance(result, torch.Tensor) else result[0 if function is attention else 1]

    assert torch.autograd.gradgradcheck(pooled, (values, per_head))


@pytest.mark.parametrize(
    ("index", "kind", "words"),
    [
        (INDEX.int(), TypeError, "row_index: expected an int64 tensor, given torch.int32"),
        (INDEX[:, None], ValueError, r"row_index: expected shape \(M,\)"),
        (INDEX + 1, ValueError, r"row_index: expected rows in \[0, 30\), given 1 to 30"),
        (INDEX - 1, ValueError, r"row_index: expected rows in \[0, 30\), given -1 to 28"),
        ([1, 2], TypeError, "row_index: expected an int64 tensor, given list"),
    ],
)
def test_a_bad_index_is_refused(index, kind, words):
    with pytest.raises(kind, match=words):
        gated(normal(30, 6), None, index)
    with pytest.raises(kind, match=words):
        attention(normal(30, 6), normal(len(INDEX), 2), index)
