import pytest
import torch

from eosin import kernels
from eosin.errors import KernelUnavailableError


@pytest.fixture(autouse=True)
def _nothing_forced(monkeypatch):
    monkeypatch.delenv("EOSIN_KERNELS", raising=False)


def test_cpu_tensors_run_on_torch():
    assert kernels.choose(torch.zeros(1)) == "torch"


def test_block_forces_and_restores():
    with kernels.use_backend("reference"):
        assert kernels.choose(torch.zeros(1)) == "reference"
        with kernels.use_backend("torch"):
            assert kernels.choose(torch.zeros(1)) == "torch"
        assert kernels.choose(torch.zeros(1)) == "reference"
    assert kernels.choose(torch.zeros(1)) == "torch"


def test_environment_forces_and_the_block_wins(monkeypatch):
    monkeypatch.setenv("EOSIN_KERNELS", "reference")
    assert kernels.choose(torch.zeros(1)) == "reference"
    with kernels.use_backend("torch"):
        assert kernels.choose(torch.zeros(1)) == "torch"


def test_unknown_names_are_refused(monkeypatch):
    with (
        pytest.raises(ValueError, match="expected one of reference, torch, triton, given 'cuda'"),
        kernels.use_backend("cuda"),
    ):
        pass
    monkeypatch.setenv("EOSIN_KERNELS", "fast")
    with pytest.raises(ValueError, match="EOSIN_KERNELS"):
        kernels.choose(torch.zeros(1))


def test_forced_triton_refuses_what_it_cannot_run(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with kernels.use_backend("triton"), pytest.raises(KernelUnavailableError, match="on cpu"):
        kernels.choose(torch.zeros(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with kernels.use_backend("triton"), pytest.raises(KernelUnavailableError, match="float64"):
        kernels.choose(torch.zeros(1, dtype=torch.float64))
    with kernels.use_backend("triton"):
        assert kernels.choose(torch.zeros(1)) == "triton"


def test_forced_triton_without_triton_is_refused(monkeypatch):
    monkeypatch.setattr("eosin.kernels._dispatch.HAS_TRITON", False)
    with kernels.use_backend("triton"), pytest.raises(KernelUnavailableError, match="not installed"):
        kernels.choose(torch.zeros(1))
