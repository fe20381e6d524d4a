"""Packs of bags for the kernel tests."""

import torch
from torch import Tensor

# float64 runs on the reference and the torch path, Triton in float32
FAST_BACKENDS = ["torch", "triton"]
LENGTHS = [(5,), (1,), (0,), (), (3, 0, 7, 1), (0, 0), (13, 2, 31), (1, 1, 1, 64)]


def offsets(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def gate_parameters(
    width: int, hidden: int, heads: int, *, gated: bool = True, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor | None]:
    scale = width**-0.5
    return {
        "v_weight": normal(hidden, width, seed=1, dtype=dtype, scale=scale),
        "v_bias": normal(hidden, seed=2, dtype=dtype),
        "u_weight": normal(hidden, width, seed=3, dtype=dtype, scale=scale) if gated else None,
        "u_bias": normal(hidden, seed=4, dtype=dtype) if gated else None,
        "w_weight": normal(heads, hidden, seed=5, dtype=dtype),
        "w_bias": normal(heads, seed=6, dtype=dtype),
    }


def error(found: Tensor, expected: Tensor) -> float:
    """Return the relative Frobenius error against a float64 tensor."""
    difference = (found.detach().double() - expected.detach()).norm()
    return float(difference / expected.detach().norm().clamp(min=1e-30))
