"""Triton kernels on every mix of bags, on rows beyond 2^31 numbers, and read through an index."""

import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_packs import error, gate_parameters, normal, offsets

from eosin import kernels
from eosin.kernels import gated_attention

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("neither a GPU nor Triton's interpreter", allow_module_level=True)

from eosin.kernels._chunks import ChunkTable
from eosin.kernels._rows import Rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH = 1024
KERNELS = sorted((Path(kernels.__file__).parent).rglob("triton_impl.py"))
# nothing, one, a block and its neighbours, primes, and one bag that is longer than all others together
skewed = st.lists(st.sampled_from([0, 1, 2, 13, 31, 32, 33, 63, 64, 65, 127, 257]), min_size=1, max_size=4)
DRAWN = (Phase.explicit, Phase.generate)  # the interpreter is too slow to look for smaller examples
few = settings(max_examples=4, deadline=None, derandomize=True, phases=DRAWN)


def compared(function, tensors, lengths, **options):
    """Assert outputs and gradients of all tensors against the definition in float64."""
    runs = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = {name: tensor.to(DEVICE, dtype).requires_grad_() for name, tensor in tensors.items()}
        with kernels.use_backend(backend):
            outputs = function(**leaves, cu_seqlens=offsets(tuple(lengths)).to(DEVICE), **options)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        total = sum((o.nan_to_num(neginf=0) * normal(*o.shape, seed=9).to(o)).sum() for o in outputs)
        wanted = list(leaves.values())
        found = torch.autograd.grad(total, wanted, allow_unused=True)  # a pack without instances uses nothing
        gradients = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(wanted, found, strict=True)]
        runs.append([*(o.nan_to_num(neginf=0) for o in outputs), *gradients])
    for found, exact in zip(*runs, strict=True):
        assert error(found.cpu(), exact.cpu()) <= 2e-5 or (found.cpu() - exact.cpu()).abs().max() < 2e-6


@given(lengths=skewed, seed=st.integers(0, 99))
@few
def test_attention_pool(lengths, seed):
    n = sum(lengths)
    compared(kernels.attention_pool, {"scores": normal(n, 2, seed=seed), "values": normal(n, 20, seed=1)}, lengths)


@given(lengths=skewed, seed=st.integers(0, 99))
@few
def test_gated_attention_pool(lengths, seed):
    tensors = {"values": normal(sum(lengths), 20, seed=seed), **gate_parameters(20, 17, 1)}
    compared(kernels.gated_attention_pool, tensors, lengths)


@given(lengths=st.lists(st.sampled_from([0, 1, 2, 13, 31, 32, 33]), min_size=1, max_size=3), seed=st.integers(0, 99))
@settings(max_examples=2, deadline=None, derandomize=True, phases=DRAWN)
def test_selective_scan(lengths, seed):
    n = sum(lengths)
    shapes = {"u": (n, 5), "delta": (n, 5), "a": (5, 3), "b": (n, 3), "c": (n, 3), "z": (n, 5)}
    tensors = {name: normal(*shape, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())}
    tensors["a"] = -tensors["a"].exp()
    compared(kernels.selective_scan, tensors, lengths)


@given(lengths=skewed, seed=st.integers(0, 99))
@few
def test_few_key_attention(lengths, seed):
    shapes = {"queries": (sum(lengths), 8), "keys": (len(lengths), 3, 8), "values": (len(lengths), 3, 6)}
    tensors = {name: normal(*shape, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())}
    compared(kernels.few_key_attention, tensors, lengths, heads=2, scale=0.4)


@pytest.mark.parametrize("heads", [1, 3])
def test_rows_are_read_through_an_index(heads):
    index = torch.randperm(90, generator=torch.Generator().manual_seed(0))[:70]
    index[3] = index[40]
    tensors = {"scores": normal(70, heads), "values": normal(90, 20, seed=1)}
    compared(kernels.attention_pool, tensors, (40, 30), row_index=index.to(DEVICE))
    tensors = {"values": normal(90, 20), **gate_parameters(20, 17, heads)}
    compared(kernels.gated_attention_pool, tensors, (40, 30), row_index=index.to(DEVICE))


def test_one_pass_reads_rows_through_an_index(monkeypatch):
    monkeypatch.setattr(gated_attention, "one_pass_pays", lambda *_: True)
    index = torch.randperm(90, generator=torch.Generator().manual_seed(0))[:70]
    tensors = {"values": normal(90, 20), **gate_parameters(20, 17, 1)}
    compared(kernels.gated_attention_pool, tensors, (40, 30), row_index=index.to(DEVICE))


@pytest.mark.parametrize("dropped", ["bag", "instance"])
def test_one_pass_with_masks_and_huge_scores(dropped, monkeypatch):
    monkeypatch.setattr(gated_attention, "one_pass_pays", lambda *_: True)
    keep = torch.ones(70, dtype=torch.bool)
    keep[slice(0, 40) if dropped == "bag" else 3] = False
    tensors = {"values": normal(70, 20), **gate_parameters(20, 17, 1)}
    tensors["w_weight"] = tensors["w_weight"] * 30
    compared(kernels.gated_attention_pool, tensors, (40, 30), keep=keep.to(DEVICE))
    tensors["w_weight"] = tensors["w_weight"] * 1e3
    leaves = {name: tensor.to(DEVICE, torch.float32) for name, tensor in tensors.items()}
    with kernels.use_backend("triton"):
        found = kernels.gated_attention_pool(**leaves, cu_seqlens=offsets((40, 30)).to(DEVICE), keep=keep.to(DEVICE))
    assert found.scores.abs().nan_to_num(posinf=0).max() > 1e4
    assert all(part.isfinite().all() for part in (found.pooled, found.entropy))


@pytest.fixture
def far_rows(monkeypatch):
    """Return a pack of more than 2^31 numbers, of which only the last rows are ever touched, and its last rows."""
    n_rows = (1 << 31) // WIDTH + 70
    values = torch.empty(n_rows, WIDTH, dtype=torch.bfloat16, device=DEVICE)  # the system gives memory when touched
    last = normal(40, WIDTH, dtype=torch.bfloat16).to(DEVICE)
    values[-40:] = last

    def only_the_last(cu_seqlens, rows):
        bag, start, end, first = ([0], [n_rows - 40], [n_rows], [0, 1])
        return ChunkTable(
            rows, *(torch.tensor(part, dtype=torch.int32, device=DEVICE) for part in (bag, start, end, first))
        )

    from eosin.kernels.few_query_attention import triton_impl as few_impl
    from eosin.kernels.gated_attention import triton_impl as gated_impl
    from eosin.kernels.segment_pool import triton_impl as pool_impl

    for module in (pool_impl, few_impl, gated_impl):
        monkeypatch.setattr(module, "chunk_table", only_the_last)
    return values, last


def test_pooling_beyond_two_to_the_31_numbers(far_rows):
    from eosin.kernels.segment_pool import triton_impl

    values, last = far_rows
    bags, near = offsets((len(values),)).to(DEVICE), offsets((40,)).to(DEVICE)
    scores = torch.zeros(len(values), 1, device=DEVICE)
    scores[-40:] = normal(40, 1, seed=3, dtype=torch.float32).to(DEVICE)
    exact = kernels.attention_pool(scores[-40:].double(), last.double(), near)
    found = triton_impl.forward(scores, Rows(values, None), bags)
    for got, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    upstream = [normal(*part.shape, seed=5, dtype=torch.float32).to(DEVICE) for part in found]
    gradients = triton_impl.backward(upstream, list(found), [True, True], scores, Rows(values, None), bags)
    leaves = [scores[-40:].double().requires_grad_(), last.double().requires_grad_()]
    expected = torch.autograd.grad(kernels.attention_pool(*leaves, near), leaves, [u.double() for u in upstream])
    for got, wanted in zip(gradients, expected, strict=True):
        assert error(got[-40:], wanted) < 8e-3


def test_few_keys_beyond_two_to_the_31_numbers(far_rows):
    from eosin.kernels.few_query_attention import triton_impl

    values, last = far_rows
    keys = normal(1, 3, WIDTH, seed=2, dtype=torch.bfloat16).to(DEVICE)
    arguments = (keys, keys, offsets((len(values),)).to(DEVICE), 16, 0.1, torch.bfloat16)
    got = triton_impl.key_forward(values, *arguments)[-40:]
    wide = (last.double(), keys.double(), keys.double(), offsets((40,)).to(DEVICE))
    exact = kernels.few_key_attention(*wide, heads=16, scale=0.1)
    assert error(got, exact) < 8e-3


def test_rows_are_multiplied_as_64_bit_integers():
    """What the programs of the other kernels do with rows, which their grids would take hours to reach here."""
    for path in KERNELS:
        for line in path.read_text().splitlines():
            assert not re.search(r"\b(rows|later|again)\[:, None\] \*", line), f"{path.parent.name}: {line}"
            assert not re.search(r"\brows \* (width|hidden|heads|n_states)", line), f"{path.parent.name}: {line}"
