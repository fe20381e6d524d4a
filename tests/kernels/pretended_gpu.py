"""A device that is not there: tensors that say they are on a GPU, and fail where a real one would have to wait.

The numbers lie on the CPU. What asks for the device is told ``cuda:0``, so that code takes the way it takes there, and
the operators of eosin run by their torch path. Whatever needs a value on the host raises `Waits`.
"""

from contextvars import ContextVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda", 0)
READS = {
    *("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "masked_select"),
    *("unique", "unique_consecutive", "bincount", "equal", "__array__", "is_nonzero", "allclose"),
}


class Waits(AssertionError):
    """The host reads a value of a tensor on the device."""


allowed = ContextVar("allowed", default=False)


def may_wait(function):
    """Return the function with permission to wait."""

    def run(*args):
        token = allowed.set(True)
        try:
            return function(*args)
        finally:
            allowed.reset(token)

    return run


class OnGpu(Tensor):
    """A tensor on the pretended GPU."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def run(function, args, kwargs):
    name = getattr(function, "__name__", "")
    property_of = getattr(getattr(function, "__self__", None), "__name__", "")
    leaves = tree_flatten((args, kwargs))[0]
    there = any(isinstance(leaf, OnGpu) for leaf in leaves)
    first = args[0] if args else None
    if name == "__get__" and isinstance(first, OnGpu):
        if property_of in ("device", "is_cuda", "is_cpu"):
            return {"device": CUDA, "is_cuda": True, "is_cpu": False}[property_of]
    elif there:
        refuse(function, name, args, kwargs)
    goes, comes = destination(name, args, kwargs, there)
    if goes is not None:
        args, kwargs = tree_map(host_device, (args, kwargs))
    if "eosin" in str(getattr(function, "namespace", "")):
        args = tuple("torch" if arg == "triton" else arg for arg in args)
    with torch._C.DisableTorchFunctionSubclass():
        found = function(*args, **kwargs)
    return tree_map(moved, found) if comes else found


def refuse(function, name, args, kwargs):
    first = args[0] if args else None
    reads = name in READS and isinstance(first, OnGpu)
    if name == "repeat_interleave" and len(args) > 1:
        reads = isinstance(args[1], OnGpu) and kwargs.get("output_size") is None
    elif name in ("__getitem__", "__setitem__"):
        picks = args[1] if isinstance(args[1], tuple) else (args[1],)
        by_mask = any(isinstance(pick, OnGpu) and pick.dtype == torch.bool for pick in picks)
        reads = by_mask and (name == "__getitem__" or isinstance(args[2], Tensor))  # a number is filled in by the mask
    elif name == "where":
        reads = len(args) == 1
    if reads and not allowed.get():
        raise Waits(f"{name} waits for the device")


def destination(name, args, kwargs, there):
    """Return the device that is named, if one is, and whether the result is on the GPU."""
    if name == "to" and len(args) > 1 and isinstance(args[1], Tensor):
        return CUDA, isinstance(args[1], OnGpu)
    named = [given for given in (*args, *kwargs.values()) if is_device(given)]
    if not named or name == "__get__":
        return None, there
    on_gpu = torch.device(named[0]).type == "cuda"
    if there and not on_gpu and name == "to" and not allowed.get():
        raise Waits("to(cpu) waits for the device")
    return named[0], on_gpu


def is_device(value):
    return isinstance(value, torch.device) or (isinstance(value, str) and value.startswith("cuda"))


def host_device(value):
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return "cpu" if isinstance(value, str) and value.startswith("cuda") else value


def moved(value):
    return value.as_subclass(OnGpu) if isinstance(value, Tensor) and not isinstance(value, OnGpu) else value


class PretendedGpu(TorchFunctionMode):
    """While it is entered, ``cuda`` is a device that holds `OnGpu` tensors."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})
