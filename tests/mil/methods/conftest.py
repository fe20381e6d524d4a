from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

Golden = dict[str, torch.Tensor]


@pytest.fixture
def golden(shared) -> Callable[[str], Golden]:
    """Read a file of numbers from the authors' implementations, as float64 and int64 tensors."""

    def read(name: str) -> Golden:
        with np.load(shared / f"golden/{name}.npz") as arrays:
            tensors = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        return {key: value.double() if value.is_floating_point() else value for key, value in tensors.items()}

    return read


@pytest.fixture
def same() -> Callable[[dict[str, torch.Tensor], Golden], None]:
    """Compare named tensors with a golden file's, to the accuracy of float64."""

    def check(found: dict[str, torch.Tensor], wanted: Golden, *, rtol: float = 1e-9, atol: float = 1e-10) -> None:
        for name, value in found.items():
            np.testing.assert_allclose(value.detach().numpy(), wanted[name].numpy(), rtol, atol, err_msg=name)

    return check


@pytest.fixture
def complete() -> Callable[[Golden, Iterable[str]], None]:
    """Fail when an array of a golden file was neither read nor compared."""

    def check(wanted: Golden, used: Iterable[str]) -> None:
        left = set(wanted) - set(used)
        assert not left, f"nothing looks at {sorted(left)}"

    return check


@pytest.fixture
def authors() -> Callable[[str], Golden]:
    """Read what the public class of a method answers, see `authors/README.md`: floats as float64."""

    def read(name: str) -> Golden:
        tensors = load_file(Path(__file__).parent / "authors" / f"{name}.safetensors")
        return {key: value.double() if value.is_floating_point() else value for key, value in tensors.items()}

    return read
