"""Which implementation of a kernel runs: forced by the caller or the environment, else chosen from the tensors."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from eosin.errors import KernelUnavailableError

Backend = Literal["reference", "torch", "triton"]
BACKENDS: tuple[str, ...] = get_args(Backend)
HAS_TRITON = find_spec("triton") is not None
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_forced: ContextVar[Backend | None] = ContextVar("eosin_kernels_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one implementation for every kernel called inside the ``with`` block.

    Parameters
    ----------
    name : {"reference", "torch", "triton"}
        ``reference`` is the plain definition, ``torch`` the memory-bounded path for any device,
        ``triton`` the GPU kernels (or their interpreter when ``TRITON_INTERPRET=1``).

    Raises
    ------
    ValueError
        The name is none of the three.
    """
    token = _forced.set(_known(name, "use_backend(name)"))
    try:
        yield
    finally:
        _forced.reset(token)


def choose(*tensors: Tensor) -> Backend:
    """Return the implementation that runs for these tensors.

    A forced one (`use_backend`, then the variable ``EOSIN_KERNELS``) or refusal; otherwise Triton for
    CUDA tensors of float32, float16 or bfloat16 where Triton is installed, and torch for the rest.

    Raises
    ------
    KernelUnavailableError
        The forced implementation cannot run on these tensors.
    """
    forced = _forced.get()
    if forced is None and os.environ.get("EOSIN_KERNELS"):
        forced = _known(os.environ["EOSIN_KERNELS"], "the variable EOSIN_KERNELS")
    obstacle = _triton_obstacle(tensors)
    if forced == "triton" and obstacle:
        raise KernelUnavailableError(f"the triton kernels were forced, but {obstacle}; force torch or nothing")
    if forced is not None:
        return forced
    on_gpu = all(tensor.is_cuda for tensor in tensors)
    return "triton" if on_gpu and obstacle is None else "torch"


def interpreting() -> bool:
    """Return whether Triton kernels run in Triton's Python interpreter instead of on a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _known(name: str, where: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"{where}: expected one of {', '.join(BACKENDS)}, given {name!r}")
    return cast("Backend", name)


def _triton_obstacle(tensors: tuple[Tensor, ...]) -> str | None:
    if not HAS_TRITON:
        return "triton is not installed"
    for tensor in tensors:
        if not tensor.is_cuda and not interpreting():
            return f"a tensor is on {tensor.device}"
        if tensor.is_floating_point() and tensor.dtype not in TRITON_DTYPES:
            return f"a tensor is {tensor.dtype}"
    return None
