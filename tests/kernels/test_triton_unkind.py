"""What a GPU would find: any order of programs, dirty memory, addresses outside of tensors, rounded factors."""

import os

import pytest
import torch
from kernel_packs import error, gate_parameters, normal, offsets

from eosin import kernels
from eosin.kernels import gated_attention

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("watches the interpreter", allow_module_level=True)

import sanitizer
import triton
import triton.language as tl

LENGTHS = (33, 0, 1, 40)
N, BAGS = sum(LENGTHS), offsets(LENGTHS)
SHORT = (7, 0, 1, 9)  # for the scan, which takes a step per row
TOLERANCES = {torch.bfloat16: (4e-3, 8e-3), torch.float16: (1e-3, 8e-3), "tf32": (1e-3, 2e-3)}  # those of test_triton


def masked(heads):
    return {"score_mask": normal(N, heads, seed=9), "keep": normal(N, heads, seed=10) > -1}


def seeded():
    return torch.Generator().manual_seed(3)


def scan_tensors():
    n = sum(SHORT)
    shapes = {"u": (n, 34), "delta": (n, 34), "a": (34, 3), "b": (n, 3), "c": (n, 3), "z": (n, 34)}
    tensors = {name: normal(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    return tensors | {"a": -tensors["a"].exp()}


def ordered_conv(**tensors):
    bags = tensors.pop("cu_seqlens")
    return kernels.causal_conv(**tensors, cu_seqlens=bags, order=kernels.strided_order(bags, 5))


INDEX = torch.randperm(2 * N, generator=torch.Generator().manual_seed(0))[:N]
GATE = {"values": normal(N, 24), **gate_parameters(24, 20, 1)}
CASES = {
    "attention pool": (kernels.attention_pool, {"scores": normal(N, 1), "values": normal(N, 20, seed=1)}, {}),
    "attention pool, 3 heads, through an index": (
        kernels.attention_pool,
        {"scores": normal(N, 3), "values": normal(2 * N, 20, seed=1)},
        {"row_index": INDEX},
    ),
    "segment pool": (kernels.segment_pool, {"weights": normal(N, 2), "values": normal(N, 20, seed=1)}, {}),
    "gated pool": (kernels.gated_attention_pool, GATE, masked(1)),
    "gated pool, 3 branches, dropout, nothing kept": (
        kernels.gated_attention_pool,
        {"values": normal(N, 24), **gate_parameters(24, 20, 3)},
        {"gate_dropout": 0.3, "generator": seeded, "memory_budget": 0, **masked(3)},
    ),
    "one pass": (kernels.gated_attention_pool, GATE, masked(1)),
    "few keys": (
        kernels.few_key_attention,
        {"queries": normal(N, 8), "keys": normal(4, 3, 8, seed=1), "values": normal(4, 3, 6, seed=2)},
        {"heads": 2, "scale": 0.4},
    ),
    "scan": (kernels.selective_scan, scan_tensors(), {}),
    "convolution": (ordered_conv, {"x": normal(N, 20), "weight": normal(20, 4, seed=1), "bias": normal(20)}, {}),
}


def results(name, backend, dtype):
    """Return outputs and gradients of a case, given to float64."""
    function, tensors, options = CASES[name]
    options = {key: value() if callable(value) else value for key, value in options.items()}
    leaves = {key: tensor.to(dtype).requires_grad_() for key, tensor in tensors.items()}
    if "score_mask" in options:
        options["score_mask"] = options["score_mask"].to(dtype)
    with kernels.use_backend(backend):
        outputs = function(**leaves, cu_seqlens=offsets(SHORT) if name == "scan" else BAGS, **options)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    outputs = [output.masked_fill(output == float("-inf"), 0) for output in outputs]  # NaN stays
    upstream = [normal(*output.shape, seed=50 + i).to(output) for i, output in enumerate(outputs)]
    return [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), upstream)]


@pytest.fixture
def _one_pass(monkeypatch, request):
    monkeypatch.setattr(gated_attention, "one_pass_pays", lambda *_: "one pass" in request.node.name)


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.usefixtures("_one_pass")
@pytest.mark.long
def test_any_order_on_dirty_memory_within_bounds(name, monkeypatch):
    with sanitizer.unkind(monkeypatch) as launches:
        found = results(name, "triton", torch.float32)
    assert launches.n_programs > 1
    assert not launches.faults
    for got, exact in zip(found, results(name, "reference", torch.float64), strict=True):
        assert error(got, exact) <= 2e-5 or (got - exact).abs().max() < 2e-6


def test_selection_in_any_order_on_dirty_memory(monkeypatch):
    scores = normal(N, 2, dtype=torch.float32).round()
    with sanitizer.unkind(monkeypatch) as launches, kernels.use_backend("triton"):
        mask = kernels.segment_topk_mask(scores, BAGS, 7)
    assert not launches.faults
    assert torch.equal(mask, kernels.segment_topk_mask(scores, BAGS, 7))


@pytest.mark.parametrize("kind", list(TOLERANCES), ids=str)
@pytest.mark.parametrize(
    "name", [name for name in CASES if name not in ("scan", "convolution")]
)  # they multiply nothing
@pytest.mark.usefixtures("_one_pass")
def test_tolerances_hold_where_tensor_cores_round(name, kind, monkeypatch):
    with sanitizer.tensor_cores(monkeypatch, kind):
        found = results(name, "triton", torch.float32)
    forward, backward = TOLERANCES[kind]
    for place, (got, exact) in enumerate(zip(found, results(name, "reference", torch.float64), strict=True)):
        assert error(got, exact) <= max(forward, backward) or (got - exact).abs().max() < 1e-5, place


@triton.jit
def _faulty(source, target, n, KIND: tl.constexpr):
    program = tl.program_id(0)
    here = program * 4 + tl.arange(0, 4)
    if KIND == 0:  # reads beyond the end
        tl.store(target + here, tl.load(source + here + 4))
    elif KIND == 1:  # two programs write one place
        tl.store(target + tl.arange(0, 4), tl.load(source + here))
    elif KIND == 2:  # reads what the other program writes
        tl.store(target + here, tl.load(target + (here + 4) % n))
    elif KIND == 3:  # nothing wrong
        tl.store(target + here, tl.load(source + here))


@pytest.mark.parametrize(
    ("kind", "fault"),
    [(0, "reads outside"), (1, "two programs write"), (2, "a program reads what another"), (3, None)],
)
def test_the_sanitizer_finds_a_fault_of_each_kind(kind, fault, monkeypatch):
    source, target = torch.zeros(8), torch.zeros(8)
    with sanitizer.unkind(monkeypatch) as launches:
        _faulty[(2,)](source, target, 8, KIND=kind)
        assert torch.empty(3).isnan().all()
    assert len(launches.faults) == (fault is not None)
    assert fault is None or launches.faults[0].startswith(fault)
