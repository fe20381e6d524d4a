import numpy as np
import pytest
import torch
from kernel_packs import LENGTHS, error, normal, offsets

from eosin import kernels
from eosin.kernels.few_query_attention import folds, torch_impl

BACKENDS = ["reference", "torch"]


def query_inputs(n_rows, width=9, n_queries=2, embedded=4, read=6, dtype=torch.float64):
    shapes = [(n_queries, embedded), (n_rows, width), (embedded, width), (embedded,), (read, width), (read,)]
    return [normal(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


def load(shared, name):
    golden = {k: torch.from_numpy(v).double() for k, v in np.load(shared / "golden" / f"{name}.npz").items()}
    weights = {k.removeprefix("w_"): v.clone().requires_grad_() for k, v in golden.items() if k.startswith("w_")}
    return golden, weights


def assert_gradients(golden, out, tensors):
    gradients = torch.autograd.grad((out * golden["R"].reshape(out.shape)).sum(), list(tensors.values()))
    for name, gradient in zip(tensors, gradients, strict=True):
        torch.testing.assert_close(gradient.reshape(golden[name].shape), golden[name], rtol=1e-9, atol=1e-10)


def linear(x, weights, name):
    return torch.nn.functional.linear(x, weights[f"{name}_weight"], weights[f"{name}_bias"])


def finished(query, attended, weights, prefix):
    attended = query + attended
    return attended + torch.relu(linear(attended, weights, f"{prefix}ff"))


def few_queries(query, x, weights, prefix, bags):
    return kernels.few_query_attention(
        query, x,
        weights[f"{prefix}key_weight"], weights[f"{prefix}key_bias"],
        weights[f"{prefix}value_weight"], weights[f"{prefix}value_bias"],
        bags, heads=4, scale=0.25,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.shared
def test_pooling_by_attention_of_the_set_transformer(shared, backend):
    golden, weights = load(shared, "st_pma")
    x = golden["in_X"].flatten(0, 1).requires_grad_()
    prefix = "block_" if "block_query_weight" in weights else ""
    query = linear(weights["seeds"][0], weights, f"{prefix}query")
    with kernels.use_backend(backend):
        attended = few_queries(query, x, weights, prefix, offsets((30, 30)))
    out = finished(query, attended, weights, prefix)
    torch.testing.assert_close(out, golden["out"], rtol=1e-9, atol=1e-10)
    assert_gradients(golden, out, {"gin_X": x, **{f"gw_{k}": w for k, w in weights.items()}})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.shared
def test_inducing_points_of_the_set_transformer(shared, backend):
    golden, weights = load(shared, "st_isab")
    x, bags = golden["in_X"].flatten(0, 1), offsets((30, 30))
    query = linear(weights["inducing_points"][0], weights, "inducing_block_query")
    with kernels.use_backend(backend):
        attended = few_queries(query, x, weights, "inducing_block_", bags)
        points = finished(query, attended, weights, "inducing_block_")
        rows = linear(x, weights, "point_block_query")
        keys, values = (linear(points, weights, f"point_block_{name}") for name in ("key", "value"))
        attended = kernels.few_key_attention(rows, keys, values, bags, heads=4, scale=0.25)
    out = finished(rows, attended, weights, "point_block_")
    torch.testing.assert_close(out, golden["out"].flatten(0, 1), rtol=1e-9, atol=1e-10)
    assert_gradients(golden, out, {f"gw_{k}": w for k, w in weights.items()})


@pytest.fixture
def _small_blocks(monkeypatch):
    monkeypatch.setattr(torch_impl, "ROWS", 8)


def compare(function, inputs, bags, *backends):
    """Compare outputs and the gradients of all inputs."""

    def run(backend):
        leaves = [None if t is None else t.clone().requires_grad_() for t in inputs]
        with kernels.use_backend(backend):
            out = function(*leaves, bags, heads=2, scale=0.5)
        wanted = [leaf for leaf in leaves if leaf is not None]
        return [out, *(torch.autograd.grad(out.square().sum(), wanted) if len(bags) > 1 else [])]

    for found, expected in zip(*map(run, backends), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12, check_dtype=False)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("n_queries", [2, 5])
@pytest.mark.usefixtures("_small_blocks")
def test_blocks_equal_the_definition_in_values_and_all_gradients(lengths, biased, n_queries):
    inputs = query_inputs(sum(lengths), n_queries=n_queries)
    assert folds(inputs[0], inputs[2], inputs[4], 2) == (n_queries == 2)
    if not biased:
        inputs[3] = inputs[5] = None
    compare(kernels.few_query_attention, inputs, offsets(lengths), "torch", "reference")


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.usefixtures("_small_blocks")
def test_reading_few_keys_equals_the_definition(lengths):
    n_bags = len(lengths)
    shapes = [(sum(lengths), 4), (n_bags, 3, 4), (n_bags, 3, 6)]
    inputs = [normal(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    compare(kernels.few_key_attention, inputs, offsets(lengths), "torch", "reference")


@pytest.mark.parametrize("n_queries", [2, 5])
@pytest.mark.parametrize("given", [0, 1])
def test_only_gradients_that_are_needed_are_given(n_queries, given):
    inputs = query_inputs(6, n_queries=n_queries)
    inputs[given].requires_grad_()
    out = kernels.few_query_attention(*inputs, offsets((6,)), heads=2, scale=0.5)
    assert torch.autograd.grad(out.sum(), inputs[given])[0].shape == inputs[given].shape


def test_no_queries_and_no_keys():
    inputs = query_inputs(4, n_queries=0)
    assert kernels.few_query_attention(*inputs, offsets((4,)), heads=2, scale=0.5).shape == (1, 0, 6)
    out = kernels.few_key_attention(normal(4, 4), normal(1, 0, 4), normal(1, 0, 6), offsets((4,)), heads=2, scale=0.5)
    assert out.shape == (4, 6)
    assert not out.any()


@pytest.mark.parametrize("function", ["queries", "keys"])
def test_a_second_run_gives_the_same_bits_and_large_scores_do_not_overflow(function):
    inputs = query_inputs(300, n_queries=5, dtype=torch.float32)
    inputs[0] = inputs[0] * 1e4

    def run():
        if function == "queries":
            return kernels.few_query_attention(*inputs, offsets((290, 10)), heads=2, scale=0.5)
        keys = normal(2, 3, 4, dtype=torch.float32) * 1e4
        rows = inputs[1][:, :4].contiguous()
        return kernels.few_key_attention(rows, keys, keys, offsets((290, 10)), heads=2, scale=0.5)

    first = run()
    assert first.isfinite().all()
    assert torch.equal(first, run())


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_bag_reads_nothing(backend):
    with kernels.use_backend(backend):
        out = kernels.few_query_attention(*query_inputs(4), offsets((0, 4)), heads=2, scale=0.5)
    assert out[0].abs().sum() == 0
    assert out[1].abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_and_second_derivatives(backend):
    leaves = [t.requires_grad_() for t in query_inputs(4, width=3, n_queries=1, embedded=2, read=2)]
    more = [t.requires_grad_() for t in query_inputs(4, width=3, n_queries=4, embedded=2, read=2)]
    rows, keys, values = (normal(*shape).requires_grad_() for shape in [(4, 2), (2, 3, 2), (2, 3, 2)])
    with kernels.use_backend(backend):
        for run, inputs in (
            (lambda *t: kernels.few_query_attention(*t, offsets((1, 3)), heads=2, scale=0.5), leaves),
            (lambda *t: kernels.few_query_attention(*t, offsets((1, 3)), heads=2, scale=0.5), more),
            (lambda *t: kernels.few_key_attention(*t, offsets((1, 3)), heads=2, scale=0.5), [rows, keys, values]),
        ):
            assert torch.autograd.gradcheck(run, inputs)
            assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_is_as_exact_as_projecting(dtype):
    inputs = query_inputs(400, width=32, dtype=dtype)

    def projected(query, x, kw, kb, vw, vb):  # in the inputs' own type, as a module would
        keys, values = x @ kw.T + kb, x @ vw.T + vb
        heads = zip(query.split(2, 1), keys.split(2, 1), values.split(3, 1), strict=True)
        return torch.cat([torch.softmax(q @ k.T * 0.5, 1) @ v for q, k, v in heads], dim=1)[None]

    def folded(*tensors):
        return kernels.few_query_attention(*tensors, offsets((400,)), heads=2, scale=0.5)

    exact = projected(*(tensor.double() for tensor in inputs))
    assert error(folded(*inputs), exact) <= 2 * error(projected(*inputs), exact)


@pytest.mark.parametrize(
    ("position", "change", "words"),
    [
        (0, torch.zeros(2, 5), "k_weight: expected shape"),
        (1, torch.zeros(4, 9, 1), "values: expected shape"),
        (3, torch.zeros(3), "k_bias: expected shape"),
        (4, torch.zeros(5, 9), "v_weight: expected a width that 2 heads divide, given 5"),
    ],
)
def test_bad_input_names_the_argument(position, change, words):
    inputs = query_inputs(4, dtype=torch.float32)
    inputs[position] = change
    inputs[5] = None
    with pytest.raises(ValueError, match=words):
        kernels.few_query_attention(*inputs, offsets((4,)), heads=2, scale=0.5)


def test_keys_of_another_number_of_bags_are_refused():
    with pytest.raises(ValueError, match=r"keys: expected shape \(1, M, 4\)"):
        kernels.few_key_attention(
            torch.zeros(3, 4), torch.zeros(2, 1, 4), torch.zeros(2, 1, 4), offsets((3,)), heads=2, scale=1.0
        )
    with pytest.raises(ValueError, match="heads: expected at least 1"):
        kernels.few_key_attention(
            torch.zeros(3, 4), torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), offsets((3,)), heads=0, scale=1.0
        )
