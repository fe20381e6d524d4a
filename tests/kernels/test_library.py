"""The operators as `torch.compile`, `torch.export` and autocast see them."""

import ast
from pathlib import Path

import pytest
import torch
from kernel_packs import gate_parameters, normal, offsets

from eosin import kernels

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def gate_tensors(n_rows=9, width=4, heads=2):
    parameters = gate_parameters(width, 3, heads).values()
    return [normal(n_rows, width).requires_grad_(), *(p.requires_grad_() for p in parameters)]


def scan_tensors(n_rows=9):
    shapes = [(n_rows, 4), (n_rows, 4), (4, 2), (n_rows, 2), (n_rows, 2), (4,), (n_rows, 4), (4,)]
    return [normal(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


def operator_calls():
    bags = offsets((4, 0, 5))
    values, *gate = gate_tensors()
    scores = normal(9, 2, seed=7).requires_grad_()
    options = (0.25, 3, "tanh", True, torch.float64)
    one = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    return {
        "attention_pool": (scores, values, bags, None, "torch"),
        "segment_pool": (scores, values, bags, torch.arange(8, -1, -1), "torch"),
        "gated_scores": (values, *gate, None, *options, "torch"),
        "gated_pool": (
            values,
            None,
            None,
            *gate,
            one,
            None,
            None,
            bags,
            torch.arange(8, -1, -1),
            0.0,
            False,
            *options,
            "torch",
        ),
        "embed_instances": (values, normal(5, 4, seed=8).requires_grad_(), None, 0.25, 3, torch.float64, "torch"),
        "shared_query_attention": (
            normal(2, 3, 2).requires_grad_(),
            values,
            normal(4, 4, seed=1).requires_grad_(),
            normal(6, 4, seed=2).requires_grad_(),
            bags,
            torch.float64,
            "torch",
        ),
        "few_key_attention": (
            values,
            normal(2, 3, 4, seed=1)[[0, 1, 1]].requires_grad_(),
            normal(3, 3, 6, seed=2).requires_grad_(),
            bags,
            2,
            0.5,
            torch.float64,
            "torch",
        ),
        "selective_scan": (*scan_tensors(), bags, "torch"),
        "causal_conv": (values, normal(4, 3).requires_grad_(), None, None, bags, "silu", "torch"),
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own helper reads it
@pytest.mark.parametrize("name", list(operator_calls()))
def test_operators_pass_torchs_own_checks(name):
    torch.library.opcheck(getattr(torch.ops.eosin, name).default, operator_calls()[name], test_utils=CHECKS)


@pytest.mark.parametrize("name", list(operator_calls()))
def test_fake_results_have_the_shape_and_type_of_real_ones(name):
    operator, arguments = getattr(torch.ops.eosin, name), operator_calls()[name]
    torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
def test_a_model_compiles_into_one_graph():
    values, *gate = gate_tensors()
    bags = offsets((4, 5))

    def model(x, *parameters):
        pooled = kernels.gated_attention_pool(x, *parameters, bags)
        return pooled.pooled.sum() + pooled.entropy.sum()

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(model(values, *gate), [values, *gate])
    for found, exact in zip(torch.autograd.grad(compiled(values, *gate), [values, *gate]), expected, strict=True):
        torch.testing.assert_close(found, exact)


def test_autocast_sets_the_type_of_products_and_keeps_sums_wide():
    values, parameters = normal(50, 16, dtype=torch.float32), gate_parameters(16, 8, 1, dtype=torch.float32)
    leaves = {name: tensor.requires_grad_() for name, tensor in parameters.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = kernels.gated_attention_pool(values, **leaves, cu_seqlens=offsets((50,)))
    wide = kernels.gated_attention_pool(values, **leaves, cu_seqlens=offsets((50,)))
    assert narrow.pooled.dtype == narrow.scores.dtype == torch.float32
    difference = (narrow.scores - wide.scores).abs().max().item()
    assert 0 < difference < 0.05
    gradient = torch.autograd.grad(narrow.pooled.sum(), leaves["v_weight"])[0]
    assert gradient.dtype == torch.float32


def test_no_kernel_imports_inside_a_function():
    """Such an import hides a circle; what needs Triton is named by `_library.Later`."""
    for path in Path(kernels.__file__).parent.rglob("*.py"):
        for function in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)):
            hidden = [node for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)]
            assert not hidden, f"{path.name}:{function.name}"
