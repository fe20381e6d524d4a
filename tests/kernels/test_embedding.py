"""The embedding of instances against its definition: values, every gradient, blocks, half precision, bad input."""

import pytest
import torch
from kernel_packs import error, normal

from eosin import kernels
from eosin.kernels import _layers, _products, _rows
from eosin.kernels._rates import Rates

SIZES = [0, 1, 7, 8, 9, 23]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(_rows, "ROWS", 8)
    monkeypatch.setattr(_rows, "cached_entries", lambda: 10)  # tiles of one or two rows


def layer(n_rows, dtype=torch.float64, *, bias=True):
    tensors = [normal(n_rows, 5), normal(6, 5, seed=1), normal(6, seed=2) if bias else None]
    return [None if tensor is None else tensor.to(dtype).requires_grad_() for tensor in tensors]


def run(backend, tensors, dropout=0.0):
    with kernels.use_backend(backend):
        out = kernels.embed_instances(*tensors, dropout=dropout, generator=torch.Generator().manual_seed(4))
    wanted = [tensor for tensor in tensors if tensor is not None]
    return [out, *torch.autograd.grad(out, wanted, normal(*out.shape, seed=9).to(out.dtype))]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n_rows", SIZES)
def test_blocks_compute_the_definition(n_rows, bias, dropout, small_blocks):
    tensors = layer(n_rows, bias=bias)
    for found, expected in zip(run("torch", tensors, dropout), run("reference", tensors, dropout), strict=True):
        assert found.shape == expected.shape
        assert error(found, expected) <= 1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_whole_blocks_sum_gradients_by_convolution(dtype, tolerance, monkeypatch):
    ways = []
    convolves = _layers._convolves
    monkeypatch.setattr(_layers.rates, "of_this_machine", lambda: Rates(2, 1, 1, 2, 0, 0, 0))  # convolution is faster
    monkeypatch.setattr(_layers, "_convolves", lambda *factors: ways.append(convolves(*factors)) or ways[-1])
    tensors = layer(_rows.ROWS + 100, dtype)
    dropout = 0.5  # a power of two, by which bfloat16 weights are scaled without being rounded again
    exact = run("reference", [tensor.detach().double().requires_grad_() for tensor in tensors], dropout)
    for found, expected in zip(run("torch", tensors, dropout), exact, strict=True):
        assert error(found.double(), expected) <= tolerance
    assert ways == [dtype == torch.float32 and _products.uses_onednn(tensors[0]), False]


def test_rows_drop_the_same_entries_in_any_block(monkeypatch):
    tensors = layer(23)
    whole = run("torch", tensors, 0.5)[0]
    monkeypatch.setattr(_rows, "ROWS", 4)
    assert torch.equal(run("torch", tensors, 0.5)[0] == 0, whole == 0)
    assert 0.5 < (whole == 0).double().mean() < 0.9  # half is dropped, half of the rest is negative before relu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nan_is_not_hidden(dtype):
    values, weight, bias = (tensor.detach() for tensor in layer(9, dtype))
    values[4, 2] = float("nan")
    found = kernels.embed_instances(values, weight, bias)
    assert found.isnan().all(1).tolist() == [row == 4 for row in range(9)]


def test_second_derivatives():
    tensors = layer(4)
    double = lambda *leaves: kernels.embed_instances(*leaves).square()  # noqa: E731
    assert torch.autograd.gradgradcheck(double, tensors)


def test_autocast_sets_the_type_of_the_instances():
    values, weight, bias = layer(9, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = kernels.embed_instances(values, weight, bias)
    assert out.dtype == torch.bfloat16
    gradients = torch.autograd.grad(out.float().sum(), (values, weight, bias))
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 3


def test_only_the_instances_are_kept_for_the_backward_pass():
    kept = []
    values, weight, bias = layer(50, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = kernels.embed_instances(values, weight, bias, dropout=0.25)
    addresses = {tensor.data_ptr() for tensor in kept}
    assert addresses == {tensor.data_ptr() for tensor in (values, weight, bias, out)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": normal(6, 4)}, "weight"),
        ({"bias": normal(5)}, "bias"),
        ({"dropout": 1.5}, "dropout"),
        ({"values": normal(3, 5, 2)}, "values"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"values": normal(3, 5), "weight": normal(6, 5), "bias": normal(6)} | change
    with pytest.raises(ValueError, match=message):
        kernels.embed_instances(**arguments)
