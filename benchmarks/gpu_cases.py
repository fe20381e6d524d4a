"""Cases of the kernel benchmark on a GPU: work, floor and alternatives, in the order of the table in docs/kernels.md.

Floors are what the memory or the tensor cores of an H200 allow: 4.3 TB/s, 790 TFLOP/s in bf16, 3.7e12 exponentials per
second. Everything is bf16 unless a variant says otherwise.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor
from torch.nn.functional import conv1d, linear, scaled_dot_product_attention, silu, softplus

from eosin import kernels
from eosin.kernels import gated_attention

BYTES, FLOPS, EXPONENTIALS = 4.3e12, 790e12, 3.7e12
DEVICE = "cuda"
BF16, FP32 = torch.bfloat16, torch.float32
Work = Callable[[], object]


@dataclass(frozen=True)
class GpuCase:
    """One row of the table: variants of the same work; ``floor_s`` seconds at least, ``bag_bytes`` of instances."""

    name: str
    floor_s: float
    floor: str
    bag_bytes: int
    variants: dict[str, Work]


def normal(*size: int, dtype: torch.dtype = BF16, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Return random numbers that do not depend on the device."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(*size, generator=generator, device=DEVICE, dtype=FP32) * scale).to(dtype)


def bags_of(*lengths: int) -> Tensor:
    """Return offsets on the device."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)


def step(run: Callable[[], Tensor], leaves: list[Tensor]) -> Work:
    """Return forward and backward of the sum of squares."""
    return lambda: torch.autograd.grad(run().float().square().sum(), leaves)


def inference(run: Callable[[], object]) -> Work:
    """Return the forward pass without gradients."""

    def work() -> object:
        with torch.no_grad():
            return run()

    return work


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the function under `torch.compile`, or itself where a rehearsal has no GPU to compile for."""
    return torch.compile(function, dynamic=False) if DEVICE == "cuda" else function


def without_one_pass(run: Work) -> Work:
    """Return the same with projection, gate and pooling as kernels of their own."""

    def work() -> object:
        chosen, gated_attention.one_pass_pays = gated_attention.one_pass_pays, lambda *_: False
        try:
            return run()
        finally:
            gated_attention.one_pass_pays = chosen

    return work


class Gate:
    """Weights of a gated or plain attention, and its published form for one bag."""

    def __init__(self, width: int, hidden: int, heads: int = 1, *, gated: bool = True, dtype: torch.dtype = BF16):
        sizes = [(hidden, width), (hidden,)] * 2 + [(heads, hidden), (heads,)]
        weights = [normal(*s, dtype=dtype, scale=s[-1] ** -0.5, seed=i).requires_grad_() for i, s in enumerate(sizes)]
        if not gated:
            weights[2:4] = [None, None]
        self.all = weights
        self.leaves = [weight for weight in weights if weight is not None]

    def published(self, x: Tensor) -> Tensor:
        """Return the pooled bag (H, D)."""
        v, bv, u, bu, w, b = self.all
        hidden = torch.tanh(linear(x, v, bv))
        if u is not None:
            hidden = hidden * torch.sigmoid(linear(x, u, bu))
        return torch.softmax(linear(hidden, w, b).T, 1) @ x

    def eosin(self, x: Tensor, bags: Tensor, budget: int | None = None) -> Tensor:
        """Return the pooled bags (B, H, D)."""
        return kernels.gated_attention_pool(x, *self.all, bags, memory_budget=budget).pooled


def gated(name: str, n: int, width: int, hidden: int, *, heads: int = 1, is_gated: bool = True) -> Iterator[GpuCase]:
    """Yield inference, training with frozen instances, and training with their gradient."""
    x, bags = normal(n, width), bags_of(n)
    gate, wide = (Gate(width, hidden, heads, gated=is_gated, dtype=dtype) for dtype in (BF16, FP32))
    fast, x32 = compiled(gate.published), x.float()
    product = 2.0 * n * width * hidden * (2 if is_gated else 1) / FLOPS
    read = n * width * 2 / BYTES
    size = n * width * 2
    yield GpuCase(
        f"{name}, inference",
        max(product, read),
        "max(2 N D A', one read)",
        size,
        {
            "eager bf16": inference(lambda: gate.published(x)),
            "eager fp32": inference(lambda: wide.published(x32)),
            "torch.compile bf16": inference(lambda: fast(x)),
            "eosin": inference(lambda: gate.eosin(x, bags)),
            "eosin, several kernels": without_one_pass(inference(lambda: gate.eosin(x, bags))),
        },
    )
    yield GpuCase(
        f"{name}, training",
        max(2 * product, 2 * read),
        "max(4 N D A', two reads)",
        size,
        {
            "eager bf16": step(lambda: gate.published(x), gate.leaves),
            "eager fp32": step(lambda: wide.published(x32), wide.leaves),
            "torch.compile bf16": step(lambda: fast(x), gate.leaves),
            "eosin": step(lambda: gate.eosin(x, bags), gate.leaves),
            "eosin, nothing kept": step(lambda: gate.eosin(x, bags, 0), gate.leaves),
        },
    )
    leaf = x.clone().requires_grad_()
    yield GpuCase(
        f"{name}, training with gradients of the instances",
        max(3 * product, 2 * read),
        "max(6 N D A', two reads)",
        size,
        {
            "eager bf16": step(lambda: gate.published(leaf), [leaf, *gate.leaves]),
            "torch.compile bf16": step(lambda: fast(leaf), [leaf, *gate.leaves]),
            "eosin": step(lambda: gate.eosin(leaf, bags), [leaf, *gate.leaves]),
        },
    )


def clam(n: int) -> Iterator[GpuCase]:
    """Yield CLAM's step: fc 1024→512, gate 256, features frozen."""
    width, embedded, hidden = 1024, 512, 256
    x, bags, gate = normal(n, width), bags_of(n), Gate(embedded, hidden)
    w1 = normal(embedded, width, scale=width**-0.5, seed=7).requires_grad_()
    b1 = normal(embedded, seed=8).requires_grad_()
    published = lambda: gate.published(torch.relu(linear(x, w1, b1)))  # noqa: E731
    fast = compiled(lambda x: gate.published(torch.relu(linear(x, w1, b1))))
    leaves = [w1, b1, *gate.leaves]

    def eosin() -> Tensor:
        return kernels.gated_attention_pool(x, *gate.all, bags, embed_weight=w1, embed_bias=b1).pooled

    flop = 2.0 * n * (2 * width * embedded + 3 * 2 * hidden * embedded)
    variants = {"eager bf16": step(published, leaves), "torch.compile bf16": step(lambda: fast(x), leaves)}
    yield GpuCase("CLAM step", flop / FLOPS, "all products", n * width * 2, variants | {"eosin": step(eosin, leaves)})


def packed(mean: int) -> Iterator[GpuCase]:
    """Yield 16 bags of log-normal lengths in one pack, beside one after the other."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(16, generator=generator).mul(0.8).exp() * mean).long().tolist()
    n, width, hidden = sum(lengths), 1024, 256
    x, bags, gate = normal(n, width), bags_of(*lengths), Gate(width, hidden)
    floor = max(2 * 2.0 * n * width * hidden * 2 / FLOPS, 2 * n * width * 2 / BYTES)
    variants = {
        "eager bf16": step(lambda: torch.stack([gate.published(bag) for bag in x.split(lengths)]), gate.leaves),
        "eosin": step(lambda: gate.eosin(x, bags), gate.leaves),
    }
    yield GpuCase(f"16 bags, {n} instances, training", floor, "max(4 N D A', two reads)", n * width * 2, variants)


def pooling(n: int) -> Iterator[GpuCase]:
    """Yield pooling with given scores, for one and five heads."""
    width = 1024
    x, bags = normal(n, width), bags_of(n)
    for heads in (1, 5):
        scores = normal(n, heads, dtype=FP32)
        variants = {
            "eager bf16": inference(lambda s=scores: torch.softmax(s.T, 1).to(BF16) @ x),
            "eosin": inference(lambda s=scores: kernels.attention_pool(s, x, bags)),
        }
        yield GpuCase(f"pooling, {heads} heads", n * width * 2 / BYTES, "one read", n * width * 2, variants)


def few_queries(n: int) -> Iterator[GpuCase]:
    """Yield pooling by 16 queries of 8 heads, and the way back from 16 and 64 keys."""
    width, heads, seeds = 1024, 8, 16
    x, bags, scale = normal(n, width), bags_of(n), width**-0.5
    sizes = [(seeds, width), (width, width), (width,), (width, width), (width,)]
    weights = [normal(*s, scale=width**-0.5, seed=i).requires_grad_() for i, s in enumerate(sizes)]

    def projected() -> Tensor:
        query, kw, kb, vw, vb = weights
        split = [
            t.unflatten(1, (heads, -1)).transpose(0, 1)[None] for t in (query, linear(x, kw, kb), linear(x, vw, vb))
        ]
        return scaled_dot_product_attention(*split, scale=scale)

    def folded() -> Tensor:
        return kernels.few_query_attention(weights[0], x, *weights[1:], bags, heads=heads, scale=scale)

    flop = 4.0 * n * seeds * heads * width
    name, floor = "16 queries, 8 heads", "4 N M H D"
    variants = {"project and SDPA bf16": inference(projected), "eosin": inference(folded)}
    yield GpuCase(f"{name}, inference", flop / FLOPS, floor, n * width * 2, variants)
    variants = {"project and SDPA bf16": step(projected, weights), "eosin": step(folded, weights)}
    yield GpuCase(f"{name}, training", 2 * flop / FLOPS, "8 N M H D", n * width * 2, variants)
    yield from few_keys(n, 16)
    yield from few_keys(n, 64)


def few_keys(n: int, n_keys: int) -> Iterator[GpuCase]:
    """Yield attention from every instance to few keys, 8 heads of 64."""
    width, heads = 512, 8
    query = normal(n, width).requires_grad_()
    key, value = (normal(1, n_keys, width, seed=seed).requires_grad_() for seed in (1, 2))
    bags, scale = bags_of(n), 0.125

    def sdpa() -> Tensor:
        return scaled_dot_product_attention(
            *(t.reshape(1, -1, heads, width // heads).transpose(1, 2) for t in (query, key, value)), scale=scale
        )

    def written_out() -> Tensor:
        q, k, v = (t.reshape(-1, heads, width // heads).transpose(0, 1) for t in (query, key, value))
        return torch.softmax(q @ k.mT * scale, 2) @ v

    def eosin() -> Tensor:
        return kernels.few_key_attention(query, key, value, bags, heads=heads, scale=scale)

    runs = {"SDPA bf16": sdpa, "matrices written out bf16": written_out, "eosin": eosin}
    leaves, size = [query, key, value], n * width * 2
    variants = {name: inference(run) for name, run in runs.items()}
    yield GpuCase(f"{n_keys} keys, inference", 2 * size / BYTES, "read Q, write O", size, variants)
    variants = {name: step(run, leaves) for name, run in runs.items()}
    yield GpuCase(f"{n_keys} keys, training", 5 * size / BYTES, "Q twice, O, dO, dQ", size, variants)


def scans(n: int) -> Iterator[GpuCase]:
    """Yield the selective scan, 16 states."""
    for length, width in ((n, 1024), (n, 512), (n // 100, 512)):
        yield from scan(length, width)


def scan(n: int, width: int) -> Iterator[GpuCase]:
    """Yield forward, and forward with backward, of one scan."""
    states, bags = 16, bags_of(n)
    u, delta, z = (normal(n, width, seed=i).requires_grad_() for i in range(3))
    b, c = (normal(n, states, seed=3 + i).requires_grad_() for i in range(2))
    a = -normal(width, states, dtype=FP32, seed=5).exp()
    d, bias = (normal(width, dtype=FP32, seed=6 + i) for i in range(2))
    leaves = [u, delta, b, c, z]

    def eosin() -> Tensor:
        return kernels.selective_scan(u, delta, a, b, c, bags, d=d, z=z, delta_bias=bias)

    def published() -> Tensor:
        steps = softplus(delta.float() + bias)
        decays, drives = torch.exp(steps[:, :, None] * a), (steps * u)[:, :, None] * b[:, None]
        state, outputs = torch.zeros_like(a), []
        for i in range(n):
            state = decays[i] * state + drives[i]
            outputs.append(state @ c[i].float())
        return (torch.stack(outputs) + u * d) * silu(z)

    runs = {"eosin": (eosin, leaves)}
    if n <= 2_000:
        runs["published reference, step by step"] = (published, leaves)
    runs |= _mamba(u, delta, a, b, c, d, z, bias)
    elements, size = float(n) * width * states, n * width * 2
    variants = {name: inference(run) for name, (run, _) in runs.items()}
    yield GpuCase(f"scan {n} x {width}, forward", elements / EXPONENTIALS, "N D S exponentials", size, variants)
    variants = {name: step(run, own) for name, (run, own) in runs.items()}
    name = f"scan {n} x {width}, forward and backward"
    yield GpuCase(name, 4 * elements / EXPONENTIALS, "4 N D S exponentials", size, variants)


def _mamba(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, z: Tensor, bias: Tensor
) -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
    """Return the scan of mamba_ssm and its leaves, where it is installed; it wants channels first."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return {}
    own = [t.detach().T[None].contiguous().requires_grad_() for t in (u, delta, b, c, z)]
    run = lambda: selective_scan_fn(own[0], own[1], a, own[2], own[3], d, own[4], bias, delta_softplus=True)  # noqa: E731
    return {"mamba_ssm": (run, own)}


def convolution(n: int) -> Iterator[GpuCase]:
    """Yield the causal convolution with SiLU, in the order of the bag and reordered."""
    width, rate = 1024, 5
    x, bags = normal(n, width).requires_grad_(), bags_of(n)
    weight, bias = normal(width, 4, seed=1).requires_grad_(), normal(width, seed=2).requires_grad_()
    order = kernels.strided_order(bags, rate)

    def plain() -> Tensor:
        return silu(conv1d(x.T[None], weight[:, None], bias, padding=3, groups=width)[0, :, :n]).T

    runs = {
        "conv1d and silu bf16": plain,
        "eosin": lambda: kernels.causal_conv(x, weight, bias, bags),
        "eosin, reordered": lambda: kernels.causal_conv(x, weight, bias, bags, order=order),
    }
    size = n * width * 2
    variants = {name: inference(run) for name, run in runs.items()}
    yield GpuCase("convolution, inference", 2 * size / BYTES, "read x, write u", size, variants)
    variants = {name: step(run, [x, weight, bias]) for name, run in runs.items()}
    yield GpuCase("convolution, training", 5 * size / BYTES, "x twice, u, du, dx", size, variants)


def selection(n: int) -> Iterator[GpuCase]:
    """Yield the mask of the 10 highest scores of each of 5 branches, and of 80 %."""
    heads = 5
    scores, bags = normal(n, heads, dtype=FP32), bags_of(n)
    for k in (10, ceil(0.8 * n)):
        variants = {
            "topk and scatter": inference(
                lambda k=k: torch.zeros_like(scores, dtype=torch.bool).scatter_(
                    0, scores.topk(k, 0).indices, value=True
                )
            ),
            "eosin": inference(lambda k=k: kernels.segment_topk_mask(scores, bags, k)),
        }
        yield GpuCase(f"top {k} of {n}", n * heads * 5 / BYTES, "read scores, write mask", n * heads * 4, variants)


def effects(n: int) -> Iterator[GpuCase]:
    """Yield all leave-one-out effects, beside the model without each of 20 instances, and greedy removal."""
    width, sample = 1024, 20
    x, bags, gate = normal(n, width), bags_of(n), Gate(width, 256)
    head = normal(2, width, seed=9)
    scores = kernels.gated_attention_scores(x, *gate.all).detach()

    def brute() -> Tensor:
        return torch.stack([gate.published(torch.cat([x[:i], x[i + 1 :]])) @ head.T for i in range(sample)])

    variants = {
        f"model run again, {sample} of {n}": inference(brute),
        "eosin, all": inference(lambda: kernels.leave_one_out(scores, x, head[:, None], None, bags)),
    }
    yield GpuCase("leave one out", n * width * 2 / BYTES, "one read", n * width * 2, variants)

    def greedy() -> object:
        return kernels.greedy_removal(
            scores, x, head[:, None], None, rounds=min(1000, n), objective=lambda new, _: new[:, 0]
        )

    yield GpuCase("greedy removal, 1,000 rounds", 0.006, "goal", n * width * 2, {"eosin": inference(greedy)})


def all_cases(n: int = 200_000) -> Iterator[GpuCase]:
    """Yield every case for bags of this many instances; tensors of a case are freed before the next."""
    yield from gated("gated, A = 256", n, 1024, 256)
    yield from clam(n)
    yield from gated("plain, A = 128", n, 1024, 128, is_gated=False)
    yield from gated("gated, A = 256, 5 branches", n, 1024, 256, heads=5)
    yield from gated("gated, A = 256, small bag", n // 200, 1024, 256)
    yield from packed(n // 16)
    yield from pooling(n)
    yield from few_queries(n)
    yield from scans(n)
    yield from convolution(n)
    yield from selection(n)
    yield from effects(n)
