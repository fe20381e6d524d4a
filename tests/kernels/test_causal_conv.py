import numpy as np
import pytest
import torch
from kernel_packs import LENGTHS, error, normal, offsets

from eosin import kernels
from eosin.kernels.causal_conv import torch_impl

BACKENDS = ["reference", "torch"]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(torch_impl, "ROWS", 5)


def orders(lengths):
    return [None, kernels.reversed_order(offsets(lengths)), kernels.strided_order(offsets(lengths), 3)]


@pytest.mark.parametrize("lengths", [*filter(None, LENGTHS), (5, 5, 2, 9)])
@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize("taps", [1, 4, 13])
def test_torch_path_equals_the_definition_in_values_and_all_gradients(small_blocks, lengths, activation, taps):
    inputs = [normal(sum(lengths), 3), normal(3, taps, seed=1), normal(3, seed=2)]

    def run(backend, order):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        with kernels.use_backend(backend):
            out = kernels.causal_conv(*leaves, offsets(lengths), order=order, activation=activation)
        return [out, *torch.autograd.grad(out, leaves, normal(*out.shape, seed=5))]

    for order in orders(lengths):
        for found, expected in zip(run("torch", order), run("reference", order), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_bag_equals_torchs_own_convolution(small_blocks, backend):
    x, weight, bias = normal(12, 3), normal(3, 4, seed=1), normal(3, seed=2)
    padded = torch.nn.functional.pad(x.T, (3, 0))
    expected = torch.nn.functional.conv1d(padded[None], weight[:, None], bias, groups=3)[0].T
    with kernels.use_backend(backend):
        found = kernels.causal_conv(x, weight, bias, offsets((12,)), activation="none")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_order_equals_a_copy_in_that_order(small_blocks, backend):
    lengths = (7, 0, 11)
    x, weight, bias = normal(18, 3), normal(3, 4, seed=1), normal(3, seed=2)
    for order in orders(lengths)[1:]:
        copied = torch.where((order.source >= 0)[:, None], x[order.source.clamp(min=0)], 0)
        with kernels.use_backend(backend):
            found = kernels.causal_conv(x, weight, bias, offsets(lengths), order=order)
            expected = kernels.causal_conv(copied, weight, bias, order.cu_seqlens)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_and_second_derivatives(small_blocks, backend):
    leaves = [t.requires_grad_() for t in (normal(7, 2), normal(2, 4, seed=1), normal(2, seed=2))]
    order = kernels.strided_order(offsets((3, 4)), 2)
    with kernels.use_backend(backend):
        run = lambda *tensors: kernels.causal_conv(*tensors, offsets((3, 4)), order=order)  # noqa: E731
        assert torch.autograd.gradcheck(run, leaves)
        assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torch_path_is_as_exact_as_plain_torch(dtype):
    inputs = [normal(50, 8, dtype=dtype), normal(8, 4, seed=1, dtype=dtype), normal(8, seed=2, dtype=dtype)]

    def run(backend, cast):
        leaves = [tensor.to(cast).requires_grad_() for tensor in inputs]
        with kernels.use_backend(backend):
            out = kernels.causal_conv(*leaves, offsets((50,)))
        return [out, *torch.autograd.grad(out, leaves, normal(50, 8, seed=3, dtype=cast))]

    truth = run("reference", torch.float64)
    for fast, plain, exact in zip(run("torch", dtype), run("reference", dtype), truth, strict=True):
        assert fast.dtype == dtype
        assert error(fast, exact) <= 2 * error(plain, exact) + 1e-7


@pytest.mark.parametrize("name", ["mamba", "srmamba"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.shared
def test_blocks_of_mambamil(shared, small_blocks, backend, name):
    golden = {k: torch.from_numpy(v).double() for k, v in np.load(shared / "golden" / f"{name}_block.npz").items()}
    x = golden["x"].flatten(0, 1)
    bags = offsets((37,) * len(golden["x"]))
    weights = {key.removeprefix("w_"): value for key, value in golden.items() if key.startswith("w_")}
    projected = x @ weights["in_proj_weight"].T
    inner = projected.shape[1] // 2
    rows, gate = projected[:, :inner], projected[:, inner:]

    def branch(prefix, order):
        own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        rank, states = own["dt_proj_weight"].shape[1], own["A_log"].shape[1]
        u = kernels.causal_conv(rows, own["conv_weight"][:, 0], own["conv_bias"], bags, order=order)
        delta, b, c = (u @ own["select_proj_weight"].T).split((rank, states, states), dim=1)
        packed = bags if order is None else order.cu_seqlens
        y = kernels.selective_scan(
            u, delta @ own["dt_proj_weight"].T, -own["A_log"].exp(), b, c, packed,
            d=own["D"], delta_bias=own["dt_proj_bias"],
        )  # fmt: skip
        return y if order is None else y[order.place]

    with kernels.use_backend(backend):
        y = branch("", None)
        if name == "srmamba":
            y = y + branch("branch2_", kernels.strided_order(bags, 5))
    out = (y * torch.nn.functional.silu(gate)) @ weights["out_proj_weight"].T
    torch.testing.assert_close(out, golden["out"].flatten(0, 1), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "error_type", "words"),
    [
        ({"weight": torch.zeros(4, 2)}, ValueError, r"weight: expected shape \(3, K\)"),
        ({"bias": torch.zeros(2)}, ValueError, r"bias: expected shape \(3,\)"),
        ({"activation": "relu"}, ValueError, "activation: expected silu or none"),
        ({"order": kernels.reversed_order(offsets((4,)))}, ValueError, r"order.place: expected shape \(5,\)"),
    ],
)
def test_bad_input_names_the_argument(change, error_type, words):
    arguments = {"x": torch.zeros(5, 3), "weight": torch.zeros(3, 2), "bias": None, "cu_seqlens": offsets((5,))}
    with pytest.raises(error_type, match=words):
        kernels.causal_conv(**{**arguments, **change})
