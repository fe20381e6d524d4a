import numpy as np
import pytest
import torch
from kernel_packs import LENGTHS, error, normal, offsets

from eosin import kernels
from eosin.kernels.selective_scan import torch_impl

BACKENDS = ["reference", "torch"]
NAMES = ["u", "delta", "a", "b", "c", "d", "z", "delta_bias"]


def scan_inputs(n_rows, width=4, states=3, dtype=torch.float64):
    shapes = [(n_rows, width), (n_rows, width), (width, states), (n_rows, states), (n_rows, states), (width,)]
    shapes += [(n_rows, width), (width,)]
    tensors = dict(zip(NAMES, (normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)), strict=True))
    tensors["a"] = -tensors["a"].exp()
    return tensors


def scan(tensors, cu_seqlens):
    given = dict(tensors)
    positional = [given.pop(name) for name in NAMES[:5]]
    return kernels.selective_scan(*positional, cu_seqlens, **given)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(torch_impl, "STATE_SIZE", 40)
    monkeypatch.setattr(torch_impl, "CHECKPOINT", 3)


@pytest.mark.parametrize("name", ["scan_L37_n16", "scan_L256_n16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.shared
def test_outputs_and_gradients_of_the_published_scan(shared, monkeypatch, backend, name):
    monkeypatch.setattr(torch_impl, "STATE_SIZE", 16 * 16 * 5)
    monkeypatch.setattr(torch_impl, "CHECKPOINT", 4)
    golden = {
        key: torch.from_numpy(array).double() for key, array in np.load(shared / "golden" / f"{name}.npz").items()
    }
    n_bags, _, length = golden["u"].shape
    bags = offsets((length,) * n_bags)

    def packed(key):  # (batch, channels, length) -> (N, channels)
        return golden[key].transpose(1, 2).flatten(0, 1).contiguous()

    tensors = {n: packed(k) for n, k in {"u": "u", "delta": "delta", "b": "B", "c": "C", "z": "z"}.items()}
    tensors |= {"a": golden["A"].clone(), "d": golden["D"].clone(), "delta_bias": golden["delta_bias"].clone()}
    for tensor in tensors.values():
        tensor.requires_grad_()
    with kernels.use_backend(backend):
        out = scan(tensors, bags)
        torch.testing.assert_close(out, packed("y"), rtol=1e-9, atol=1e-10)
        if "y_nogate" in golden:
            ungated = scan({**tensors, "z": None}, bags)
            torch.testing.assert_close(ungated, packed("y_nogate"), rtol=1e-9, atol=1e-10)
        gradients = torch.autograd.grad((out * packed("R")).sum(), list(tensors.values()))
    for key, gradient in zip(tensors, gradients, strict=True):
        stored = {"a": "A", "b": "B", "c": "C", "d": "D"}.get(key, key)
        expected = golden[f"g_{stored}"] if key in ("a", "d", "delta_bias") else packed(f"g_{stored}")
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.shared
def test_float32_is_as_exact_as_the_published_scan_in_float32(shared):
    golden = {key: torch.from_numpy(array) for key, array in np.load(shared / "golden" / "scan_L37_n16.npz").items()}
    packed = {k: golden[k].transpose(1, 2).flatten(0, 1) for k in ("u", "delta", "B", "C", "z", "y", "y_f32")}
    out = kernels.selective_scan(
        packed["u"], packed["delta"], golden["A"], packed["B"], packed["C"], offsets((37, 37)),
        d=golden["D"], z=packed["z"], delta_bias=golden["delta_bias"],
    )  # fmt: skip
    assert error(out, packed["y"]) <= 2 * error(packed["y_f32"], packed["y"])


@pytest.mark.parametrize("lengths", [*LENGTHS, (40, 3, 0, 17)])
@pytest.mark.parametrize("absent", [(), ("d", "z", "delta_bias")])
def test_torch_path_equals_the_definition_in_values_and_all_gradients(small_chunks, lengths, absent):
    inputs = {k: v for k, v in scan_inputs(sum(lengths)).items() if k not in absent}
    upstream = normal(sum(lengths), 4, seed=20)

    def run(backend):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
        with kernels.use_backend(backend):
            out = scan(leaves, offsets(lengths))
        if not sum(lengths):
            return [out]
        return [out, *torch.autograd.grad(out, list(leaves.values()), upstream)]

    for found, expected in zip(run("torch"), run("reference"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bag_in_a_pack_equals_the_bag_alone(small_chunks, backend):
    lengths = (6, 0, 1, 9)
    inputs = scan_inputs(16)
    with kernels.use_backend(backend):
        packed = scan(inputs, offsets(lengths))
        begin = 0
        for length in lengths:
            rows = slice(begin, begin + length)
            begin += length
            part = {k: v if k in ("a", "d", "delta_bias") else v[rows] for k, v in inputs.items()}
            torch.testing.assert_close(packed[rows], scan(part, offsets((length,))), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_and_second_derivatives(small_chunks, backend):
    inputs = scan_inputs(5, width=2, states=2)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    with kernels.use_backend(backend):
        run = lambda *tensors: scan(dict(zip(NAMES, tensors, strict=True)), offsets((2, 3)))  # noqa: E731
        assert torch.autograd.gradcheck(run, leaves)
        assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_path_is_as_exact_as_plain_torch(small_chunks, dtype):
    inputs, upstream = scan_inputs(60, dtype=dtype), normal(60, 4, seed=20)

    def run(backend, cast):
        leaves = {name: tensor.to(cast).requires_grad_() for name, tensor in inputs.items()}
        with kernels.use_backend(backend):
            out = scan(leaves, offsets((50, 10)))
        return [out, *torch.autograd.grad(out, list(leaves.values()), upstream.to(cast))]

    truth = run("reference", torch.float64)
    for fast, plain, exact in zip(run("torch", dtype), run("reference", dtype), truth, strict=True):
        assert fast.dtype == plain.dtype == dtype
        assert error(fast, exact) <= 2 * error(plain, exact) + 1e-7


def test_python_steps_are_those_of_a_chunk(monkeypatch):
    steps = []
    advance = torch_impl.Walk.advance
    monkeypatch.setattr(torch_impl.Walk, "advance", lambda self, *args: (steps.append(1), advance(self, *args))[1])
    monkeypatch.setattr(torch_impl, "STATE_SIZE", 12 * 50)
    scan(scan_inputs(1000), offsets((1000,)))
    assert len(steps) == 2 * 20


@pytest.mark.parametrize("size", [1e-8, 1e4])
def test_extreme_steps_stay_finite(size):
    inputs = scan_inputs(30)
    inputs["delta"] = inputs["delta"].abs() * size
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    out = scan(leaves, offsets((30,)))
    gradients = torch.autograd.grad(out.sum(), list(leaves.values()))
    assert all(tensor.isfinite().all() for tensor in (out, *gradients))


@pytest.mark.shared
def test_strided_order_is_the_published_permutation(shared):
    golden = np.load(shared / "golden" / "sr_permutation.npz")
    for n, rate in golden["pairs"]:
        order = kernels.strided_order(offsets((int(n),)), int(rate))
        assert order.source.tolist() == golden[f"perm_N{n}_r{rate}"].tolist()


@pytest.mark.parametrize("make", [kernels.reversed_order, lambda cu: kernels.strided_order(cu, 3)])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_orders_stay_within_their_bag_and_invert(make, lengths):
    order = make(offsets(lengths))
    assert order.place.numel() == sum(lengths)
    assert torch.equal(order.source[order.place], torch.arange(sum(lengths)))
    bags = kernels.bag_index(offsets(lengths), sum(lengths))
    new_bags = kernels.bag_index(order.cu_seqlens, order.source.numel())
    real = order.source >= 0
    assert torch.equal(bags[order.source[real]], new_bags[real])


@pytest.mark.parametrize(
    ("change", "error_type", "words"),
    [
        ({"delta": torch.zeros(4, 3)}, ValueError, r"delta: expected shape \(5, 4\)"),
        ({"a": torch.zeros(3, 3)}, ValueError, "a: expected shape"),
        ({"c": torch.zeros(5, 2)}, ValueError, r"c: expected shape \(5, 3\)"),
        ({"z": torch.zeros(5, 4).long()}, TypeError, "z: expected a floating-point"),
        ({"delta_bias": torch.zeros(5)}, ValueError, r"delta_bias: expected shape \(4,\)"),
    ],
)
def test_bad_input_names_the_argument(change, error_type, words):
    with pytest.raises(error_type, match=words):
        scan({**scan_inputs(5, dtype=torch.float32), **change}, offsets((5,)))


def test_bad_rate_and_offsets_are_refused():
    with pytest.raises(ValueError, match="rate: expected at least 1"):
        kernels.strided_order(offsets((4,)), 0)
    with pytest.raises(ValueError, match="ascending"):
        kernels.reversed_order(torch.tensor([0, 5, 2, 6], dtype=torch.int32))
