"""What the probe of a machine decides, and that it is kept."""

import json

import pytest
import torch
from kernel_packs import error, gate_parameters, normal, offsets

from eosin import kernels
from eosin.kernels import _layers, _rows
from eosin.kernels import _rates as rates
from eosin.kernels._layers import AffineGradient, product_into
from eosin.kernels._rates import Rates

AMD = Rates(60, 30, fp32_gradient=30, fp32_convolution=55, bf16=0, bf16_blas=0, bf16_gradient=0)
INTEL = Rates(105, 110, fp32_gradient=110, fp32_convolution=90, bf16=120, bf16_blas=115, bf16_gradient=100)
WITH_AMX = Rates(105, 110, fp32_gradient=110, fp32_convolution=90, bf16=480, bf16_blas=500, bf16_gradient=340)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rates.of_this_machine.cache_clear()
    yield tmp_path / "eosin" / "rates.json"
    rates.of_this_machine.cache_clear()


@pytest.mark.parametrize(
    ("found", "convolves", "precision"), [(AMD, True, "fp32"), (INTEL, False, "fp32"), (WITH_AMX, False, "bf16")]
)
def test_rates_decide(found, convolves, precision):
    assert (found.convolves, found.precision) == (convolves, precision)


def test_a_machine_is_measured_once(cache, monkeypatch):
    monkeypatch.setattr(rates, "measure", lambda: AMD)
    assert rates.of_this_machine() == AMD
    monkeypatch.setattr(rates, "measure", lambda: INTEL)
    rates.of_this_machine.cache_clear()  # as in another process
    assert rates.of_this_machine() == AMD
    monkeypatch.setattr(rates, "processor", lambda: "another processor")
    rates.of_this_machine.cache_clear()
    assert rates.of_this_machine() == INTEL
    assert len(json.loads(cache.read_text())) == 2


@pytest.mark.parametrize("spoilt", ["", "[]", "{", '{"k": 1}'])
def test_a_spoilt_file_is_measured_again(cache, monkeypatch, spoilt):
    cache.parent.mkdir()
    cache.write_text(spoilt)
    monkeypatch.setattr(rates, "measure", lambda: AMD)
    assert rates.of_this_machine() == AMD


def test_the_probe_measures_every_way_and_leaves_the_threads_alone():
    before = torch.get_num_threads()
    found = rates.measure()
    assert min(found.fp32, found.fp32_gradient) > 0
    assert torch.get_num_threads() == before
    assert rates.processor()


@pytest.mark.parametrize("found", [AMD, INTEL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same_by_either_library(found, dtype, monkeypatch):
    monkeypatch.setattr(_layers.rates, "of_this_machine", lambda: found)
    generator = torch.Generator().manual_seed(0)
    upstream, rows = (torch.randn(3072, n, generator=generator).to(dtype) for n in (6, 10))
    total = AffineGradient(torch.zeros(6, 10), torch.float32)
    for _ in range(2):
        total.add(upstream, rows)
        total.add_bias(upstream)
    exact = 2 * (upstream.double().T @ rows.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (total.weight - exact).norm() <= tolerance * exact.norm()
    assert (total.bias - 2 * upstream.double().sum(0)).norm() <= tolerance * upstream.double().sum(0).norm() * 4
    product = product_into(torch.empty(3072, 10, dtype=dtype), upstream, total.weight.to(dtype))
    assert torch.allclose(product.float(), upstream.float() @ total.weight.to(dtype).float(), rtol=2e-2, atol=2)


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("found", [AMD, INTEL], ids=["oneDNN", "BLAS"])
def test_attention_is_the_same_by_either_library(found, dtype, tolerance, dropout, budget, monkeypatch):
    asked = []
    layers = _layers.layers_by_blas
    monkeypatch.setattr(_layers.rates, "of_this_machine", lambda: found)
    for module in (kernels.gated_attention.torch_impl, kernels.embedding.torch_impl):
        monkeypatch.setattr(module, "layers_by_blas", lambda rows: asked.append(layers(rows)) or asked[-1])
    monkeypatch.setattr(_rows, "ROWS", 16)
    monkeypatch.setattr(_rows, "cached_entries", lambda: 60)
    tensors = {"values": normal(45, 12), **gate_parameters(10, 8, 1)}
    tensors |= {"embed_weight": normal(10, 12, seed=11, scale=0.3), "embed_bias": normal(10, seed=12)}
    results = []
    for backend, kind in (("torch", dtype), ("reference", torch.float64)):
        leaves = {name: tensor.to(dtype).to(kind).requires_grad_() for name, tensor in tensors.items()}
        options = {"gate_dropout": dropout, "embed_dropout": dropout, "generator": torch.Generator().manual_seed(4)}
        with kernels.use_backend(backend):
            pool = kernels.gated_attention_pool(
                **leaves, cu_seqlens=offsets((20, 0, 25)), memory_budget=budget, **options
            )
        grads = torch.autograd.grad(pool.pooled.square().sum() + pool.scores.sum(), list(leaves.values()))
        results.append([pool.scores, pool.pooled, *grads])
    for got, exact in zip(*results, strict=True):
        assert error(got, exact) <= tolerance or (got - exact).abs().max() < tolerance
    if dtype == torch.float32 and torch.backends.mkldnn.is_available():
        assert set(asked) == {found is INTEL}
