"""Triton kernels against the definition in float64: outputs and all gradients, interpreted where no GPU is."""

import os

import pytest
import torch
from kernel_packs import error, gate_parameters, normal, offsets

from eosin import kernels
from eosin.kernels import gated_attention

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("neither a GPU nor Triton's interpreter", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BAGS = [(0,), (1,), (31, 0, 33), (300, 1, 257)]
TOLERANCES = {torch.float32: (2e-6, 1e-5), torch.float16: (1e-3, 8e-3), torch.bfloat16: (4e-3, 8e-3)}
DTYPES = list(TOLERANCES)


def on_device(tensors):
    return {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in tensors.items()}


def run(function, tensors, cu_seqlens, backend, dtype, options):
    """Return outputs and the gradients of all tensors for fixed random upstream gradients."""
    leaves = {name: None if t is None else t.to(DEVICE, dtype).requires_grad_() for name, t in tensors.items()}
    with kernels.use_backend(backend):
        outputs = function(**leaves, cu_seqlens=cu_seqlens.to(DEVICE), **options())
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    outputs = [torch.nan_to_num(output, neginf=0.0) for output in outputs]
    upstream = [normal(*o.shape, seed=50 + i).to(DEVICE, o.dtype) for i, o in enumerate(outputs)]
    wanted = [leaf for leaf in leaves.values() if leaf is not None]
    return outputs, torch.autograd.grad(outputs, wanted, upstream)


def assert_exact(function, tensors, lengths, dtype, options=dict):
    """Compare with the definition in float64 on the same rounded inputs."""
    rounded = {name: None if t is None else t.to(dtype) for name, t in tensors.items()}
    bags = offsets(lengths)
    found, gradients = run(function, rounded, bags, "triton", dtype, options)
    exact, exact_gradients = run(function, rounded, bags, "reference", torch.float64, options)
    forward, backward = TOLERANCES[dtype]
    for got, expected in zip(found, exact, strict=True):
        assert got.shape == expected.shape
        assert error(got, expected) <= forward or (got - expected).abs().max() < 1e-6
    for got, expected in zip(gradients, exact_gradients, strict=True):
        slack = 1 if expected.dim() else 5  # one number: a sum over all instances whose terms cancel
        assert error(got, expected) <= slack * backward or (got - expected).abs().max() < 1e-6


@pytest.mark.parametrize("heads", [1, 3, 17])
@pytest.mark.parametrize("lengths", BAGS)
def test_attention_pool(lengths, heads):
    n = sum(lengths)
    tensors = {"scores": normal(n, heads), "values": normal(n, 40, seed=1)}
    assert_exact(kernels.attention_pool, tensors, lengths, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("heads", [1, 5])
def test_attention_pool_in_half_precision(heads, dtype):
    values = normal(90, 40, seed=1, dtype=dtype)
    scores = normal(90, heads)
    found, exact = [], []
    for backend, kind, out in (("triton", None, found), ("reference", torch.float64, exact)):
        with kernels.use_backend(backend):
            out += kernels.attention_pool(
                scores.to(DEVICE, kind or torch.float32), values.to(DEVICE, kind or dtype), offsets((60, 30)).to(DEVICE)
            )
    for got, expected in zip(found, exact, strict=True):
        assert got.dtype == torch.float32
        assert error(got, expected) <= TOLERANCES[dtype][0]


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("lengths", BAGS)
def test_segment_pool(lengths, heads):
    n = sum(lengths)
    tensors = {"weights": normal(n, heads), "values": normal(n, 40, seed=1)}
    assert_exact(kernels.segment_pool, tensors, lengths, torch.float32)


@pytest.mark.parametrize("lengths", BAGS)
@pytest.mark.parametrize("name", ["segment_softmax", "segment_logsumexp", "segment_attention_entropy"])
def test_segment_functions(name, lengths):
    assert_exact(getattr(kernels, name), {"scores": normal(sum(lengths), 2)}, lengths, torch.float32)


def test_segment_sum_and_mean():
    for function in (kernels.segment_sum, kernels.segment_mean):
        assert_exact(function, {"values": normal(64, 20)}, (31, 0, 33), torch.float32)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("k", [0, 1, 7, 1000, torch.tensor([3, 0, 40])])
def test_segment_topk_mask(k, largest):
    scores = normal(90, 2, dtype=torch.float32).mul(3).round().div(3)  # many ties
    scores[5:9] = float("-inf")
    scores[9] = -0.0
    bags = offsets((40, 9, 41)).to(DEVICE)
    masks = []
    for backend in ("triton", "reference"):
        with kernels.use_backend(backend):
            masks.append(kernels.segment_topk_mask(scores.to(DEVICE), bags, k, largest=largest))
    assert torch.equal(*masks)


def test_segment_topk_mask_in_several_blocks(monkeypatch):
    from eosin.kernels.segment_pool import triton_impl

    monkeypatch.setattr(triton_impl, "TOPK_ROWS", 16)
    scores = normal(90, 1, dtype=torch.float32).round()
    with kernels.use_backend("triton"):
        found = kernels.segment_topk_mask(scores.to(DEVICE), offsets((70, 20)).to(DEVICE), 33)
    assert torch.equal(found.cpu(), kernels.segment_topk_mask(scores, offsets((70, 20)), 33))


def test_masked_and_huge_scores():
    scores = normal(70, 2, dtype=torch.float32) * 1e4
    scores[:40] = float("-inf")
    scores[50, 0] = float("-inf")
    values = normal(70, 20, seed=1, dtype=torch.float32)
    with kernels.use_backend("triton"):
        found = kernels.attention_pool(scores.to(DEVICE), values.to(DEVICE), offsets((40, 30)).to(DEVICE))
    exact = kernels.attention_pool(scores.double(), values.double(), offsets((40, 30)))
    for got, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(got.cpu().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", BAGS)
def test_gated_attention_scores(lengths):
    def scores(cu_seqlens, **tensors):
        return kernels.gated_attention_scores(**tensors)

    tensors = {"values": normal(sum(lengths), 24), **gate_parameters(24, 20, 1)}
    assert_exact(scores, tensors, lengths, torch.float32)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("memory_budget", [None, 0])
def test_gated_attention_pool(activation, gated, heads, memory_budget):
    tensors = {"values": normal(90, 24), **gate_parameters(24, 70, heads, gated=gated)}
    tensors |= {"temperature": torch.tensor(0.7, dtype=torch.float64), "score_mask": normal(90, heads, seed=9)}
    keep = (normal(90, seed=10) > -1).to(DEVICE)

    def options():
        generator = torch.Generator().manual_seed(3)
        return {
            "keep": keep,
            "gate_dropout": 0.3,
            "generator": generator,
            "activation": activation,
            "memory_budget": memory_budget,
        }

    assert_exact(kernels.gated_attention_pool, tensors, (60, 0, 30), torch.float32, options)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("lengths", [(1, 0), (63, 0, 65), (260, 1)])
def test_one_pass(lengths, activation, gated, monkeypatch):
    runs = []
    monkeypatch.setattr(gated_attention, "one_pass_pays", lambda tensors, dtype: runs.append(dtype) or True)
    n = sum(lengths)
    tensors = {"values": normal(n, 40), **gate_parameters(40, 70, 1, gated=gated)}
    tensors |= {"temperature": torch.tensor(0.7, dtype=torch.float64), "score_mask": normal(n, seed=9)}
    keep = (normal(n, 1, seed=10) > -1).to(DEVICE)
    options = lambda: {"keep": keep, "activation": activation}  # noqa: E731
    assert_exact(kernels.gated_attention_pool, tensors, lengths, torch.float32, options)
    assert runs


def test_one_pass_is_taken_at_inference_and_for_small_hidden_layers():
    pays = gated_attention.one_pass_pays

    def tensors(hidden, width=512, heads=1, gated=True):
        found = gate_parameters(width, hidden, heads, gated=gated, dtype=torch.bfloat16).values()
        return (torch.zeros(3, width, dtype=torch.bfloat16), *(t if t is None else t.requires_grad_() for t in found))

    assert pays(tensors(96), torch.bfloat16)
    assert not pays(tensors(128), torch.bfloat16)
    assert pays(tensors(192, gated=False), torch.float16)
    with torch.no_grad():
        assert pays(tensors(512), torch.bfloat16)
        assert not pays(tensors(512), torch.float32)
        assert not pays(tensors(64, heads=2), torch.bfloat16)
        assert not pays(tensors(64, width=1536), torch.bfloat16)


def test_one_pass_passes_torchs_own_checks():
    gate = (tensor.requires_grad_() for tensor in gate_parameters(24, 20, 1, dtype=torch.float32).values())
    values, one = normal(9, 24, dtype=torch.float32).requires_grad_(), torch.tensor(1.0, requires_grad=True)
    tensors = (values, None, None, *gate, one, None, None, offsets((4, 0, 5)), torch.arange(8, -1, -1))
    arguments = [None if tensor is None else tensor.to(DEVICE) for tensor in tensors]
    options = (0.0, False, 0.0, 0, "tanh", False, torch.float32, "triton")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.eosin.gated_pool.default, (*arguments, *options), test_utils=checks)


def test_one_pass_in_half_precision():
    values, parameters = normal(90, 24, dtype=torch.bfloat16), gate_parameters(24, 20, 1, dtype=torch.bfloat16)
    bags = offsets((60, 30)).to(DEVICE)
    with kernels.use_backend("triton"), torch.no_grad():
        found = kernels.gated_attention_pool(values.to(DEVICE), **on_device(parameters), cu_seqlens=bags)
    wide = {name: tensor.double() for name, tensor in parameters.items()}
    exact = kernels.gated_attention_pool(values.double(), **wide, cu_seqlens=offsets((60, 30)))
    for got, expected in zip(found, exact, strict=True):
        assert got.dtype == torch.float32
        assert error(got.cpu(), expected) <= 4e-3


def test_gated_attention_pool_with_an_embedding():
    tensors = {"values": normal(90, 24), **gate_parameters(16, 20, 1)}
    tensors |= {"embed_weight": normal(16, 24, seed=30), "embed_bias": normal(16, seed=31)}
    options = lambda: {"embed_dropout": 0.25, "generator": torch.Generator().manual_seed(1)}  # noqa: E731
    assert_exact(kernels.gated_attention_pool, tensors, (60, 0, 30), torch.float32, options)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_gated_attention_scores_in_half_precision(dtype):
    if dtype == torch.float16 and DEVICE == "cpu":
        pytest.skip("products in float16 run in float32 on a CPU")
    tensors = {"values": normal(90, 24), **gate_parameters(24, 20, 1)}
    scores = lambda cu_seqlens, **t: kernels.gated_attention_scores(**t)  # noqa: E731
    assert_exact(scores, tensors, (90,), dtype)


@pytest.mark.parametrize(("n_keys", "width", "read"), [(1, 2, 4), (3, 34, 6), (17, 8, 34)])
@pytest.mark.parametrize("lengths", [(1, 0), (31, 0, 33), (260, 1)])
def test_few_key_attention(lengths, n_keys, width, read, monkeypatch):
    n_bags = len(lengths)
    shapes = {"queries": (sum(lengths), width), "keys": (n_bags, n_keys, width), "values": (n_bags, n_keys, read)}
    tensors = {name: normal(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    assert_exact(kernels.few_key_attention, tensors, lengths, torch.float32, lambda: {"heads": 2, "scale": 0.4})


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_few_key_attention_in_half_precision_is_as_exact_as_plain_torch(dtype):
    if dtype == torch.float16 and DEVICE == "cpu":
        pytest.skip("products in float16 run in float32 on a CPU")
    tensors = {"queries": normal(90, 16), "keys": normal(2, 5, 16, seed=1), "values": normal(2, 5, 16, seed=2)}
    rounded = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    options = lambda: {"heads": 1, "scale": 0.4}  # noqa: E731

    def plain(queries, keys, values, cu_seqlens, heads, scale):
        bags = zip(queries.split((60, 30)), keys, values, strict=True)
        return torch.cat([torch.softmax(q @ k.T * scale, 1) @ v for q, k, v in bags]).float()

    bags = offsets((60, 30))
    found, theirs = (
        run(function, rounded, bags, "triton", dtype, options) for function in (kernels.few_key_attention, plain)
    )
    exact = run(kernels.few_key_attention, rounded, bags, "reference", torch.float64, options)
    for got, other, expected in zip(*([out[0], *grads] for out, grads in (found, theirs, exact)), strict=True):
        assert error(got, expected) <= 2 * error(other, expected)  # the interpreter cuts bits off instead of rounding


def test_keys_that_do_not_fit_a_program_go_by_blocks_of_torch():
    tensors = {"queries": normal(9, 4), "keys": normal(1, 130, 4, seed=1), "values": normal(1, 130, 4, seed=2)}
    assert_exact(kernels.few_key_attention, tensors, (9,), torch.float32, lambda: {"heads": 2, "scale": 0.4})


@pytest.mark.parametrize("n_queries", [2, 40])
def test_few_query_attention(n_queries, monkeypatch):
    from eosin.kernels.few_query_attention import torch_impl

    monkeypatch.setattr(torch_impl, "ROWS", 32)
    shapes = {"queries": (n_queries, 4), "values": (70, 20), "k_weight": (4, 20), "k_bias": (4,)}
    shapes |= {"v_weight": (6, 20), "v_bias": (6,)}
    tensors = {name: normal(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    leaves = {name: tensor for name, tensor in tensors.items() if name != "k_bias"}  # its gradient is 0 or rounding

    def run(**given):
        return kernels.few_query_attention(k_bias=tensors["k_bias"].to(given["values"]), **given)

    assert_exact(run, leaves, (40, 0, 30), torch.float32, lambda: {"heads": 2, "scale": 0.4})


def test_recomputing_in_chunks_changes_no_bit(monkeypatch):
    from eosin.kernels.gated_attention import triton_impl

    monkeypatch.setattr(triton_impl, "RECOMPUTED_ROWS", 32)
    values, parameters = normal(90, 24, dtype=torch.float32), gate_parameters(24, 20, 2, dtype=torch.float32)
    with kernels.use_backend("triton"):
        kept, again = (
            kernels.gated_attention_scores(
                values.to(DEVICE), **on_device(parameters), gate_dropout=0.5,
                generator=torch.Generator().manual_seed(2), memory_budget=budget,
            )
            for budget in (None, 0)
        )  # fmt: skip
    torch.testing.assert_close(kept, again, rtol=1e-6, atol=1e-6)


def test_a_second_run_gives_the_same_bits():
    tensors = {"values": normal(400, 24), **gate_parameters(24, 20, 3)}
    runs = [run(kernels.gated_attention_pool, tensors, offsets((390, 10)), "triton", torch.float32, dict) for _ in "ab"]
    for first, second in zip(runs[0][0] + list(runs[0][1]), runs[1][0] + list(runs[1][1]), strict=True):
        assert torch.equal(first, second)


def scan_tensors(n_rows, width=34, states=3):
    shapes = {"u": (n_rows, width), "delta": (n_rows, width), "a": (width, states), "b": (n_rows, states)}
    shapes |= {"c": (n_rows, states), "d": (width,), "z": (n_rows, width), "delta_bias": (width,)}
    tensors = {name: normal(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    tensors["a"] = -tensors["a"].exp()
    return tensors


@pytest.mark.parametrize(("lengths", "absent"), [((1, 0), ()), ((2, 0, 34), ()), ((7,), ("d", "z", "delta_bias"))])
@pytest.mark.long
def test_selective_scan(lengths, absent):
    tensors = {name: tensor for name, tensor in scan_tensors(sum(lengths)).items() if name not in absent}
    assert_exact(kernels.selective_scan, tensors, lengths, torch.float32)


def test_selective_scan_with_more_channel_blocks_than_a_group(monkeypatch):
    from eosin.kernels.selective_scan import triton_impl

    monkeypatch.setattr(triton_impl, "GROUPED_BLOCKS", 1)
    monkeypatch.setattr(triton_impl, "BACKWARD_PROGRAMS", 1)
    assert_exact(kernels.selective_scan, scan_tensors(6, width=40), (6,), torch.float32)


@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize("ordered", ["no", "reversed", "strided"])
def test_causal_conv(activation, ordered):
    lengths = (37, 0, 1, 30)
    bags = offsets(lengths)
    order = {
        "no": lambda: None,
        "reversed": lambda: kernels.reversed_order(bags.to(DEVICE)),
        "strided": lambda: kernels.strided_order(bags.to(DEVICE), 5),
    }[ordered]
    tensors = {"x": normal(68, 20), "weight": normal(20, 4, seed=1), "bias": normal(20, seed=2)}
    options = lambda: {"order": order(), "activation": activation}  # noqa: E731
    assert_exact(kernels.causal_conv, tensors, lengths, torch.float32, options)


def test_causal_conv_with_few_programs(monkeypatch):
    from eosin.kernels.causal_conv import triton_impl

    monkeypatch.setattr(triton_impl, "BACKWARD_PROGRAMS", 1)
    tensors = {"x": normal(70, 20), "weight": normal(20, 4, seed=1), "bias": None}
    assert_exact(kernels.causal_conv, tensors, (70,), torch.float32)
