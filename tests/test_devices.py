"""One device chooser for every command, and the cores of the job instead of those of the machine."""

import os
from pathlib import Path

import pytest
import torch

from eosin import _devices as devices
from eosin._devices import choose_device, count_cores, parse_devices
from eosin.errors import ConfigError


def test_auto_takes_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cuda")


@pytest.mark.parametrize(
    "name", ["cuda", "cuda:7", "cuda:-1", "mps", "meta", "xpu:0", "tpuu", "", "CPU", "cpu:x", "hpu"]
)
def test_a_device_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=f"device '{name}' .*; use ") as caught:
        choose_device(name)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="device"):
        parse_devices(f"cpu,{name or 'x'}")


def test_a_gpu_is_counted_and_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert choose_device("cpu:0") == torch.device("cpu")
    with pytest.raises(ConfigError, match="'cuda:2' cannot be used here: this machine has 2 GPUs"):
        choose_device("cuda:2")


def test_devices_by_name_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert parse_devices("cuda:0, cuda:3") == ("cuda:0", "cuda:3")
    assert parse_devices("cpu,cpu") == ("cpu", "cpu")
    assert parse_devices("2") == ("cuda:0", "cuda:1")
    assert len(parse_devices("all")) == 4
    for text in ("5", "0"):
        with pytest.raises(ConfigError, match="this machine has 4 GPUs"):
            parse_devices(text)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="this machine has 0 GPUs"):
        parse_devices("all")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/job/step", {"job/step/cpu.max": "max 100000", "job/cpu.max": "150000 100000"}, [1.5]),
        ("0::/job", {"cpu.max": "300000 100000"}, [3.0]),
        ("0::/", {}, []),
        ("0::/job", {"job/cpu.max": "damaged"}, []),
        (
            "4:memory:/m\n3:cpu,cpuacct:/job\n0::/",
            {
                "cpu,cpuacct/job/cpu.cfs_quota_us": "50000",
                "cpu,cpuacct/job/cpu.cfs_period_us": "100000",
                "cpu,cpuacct/cpu.cfs_quota_us": "-1",
                "cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            [0.5],
        ),
    ],
)
def test_quotas_of_control_groups_count(
    tmp_path: Path, membership: str, files: dict[str, str], cores: list[float]
) -> None:
    write(tmp_path / "cgroup", membership + "\n")
    for name, text in files.items():
        write(tmp_path / "root" / name, text)
    assert list(devices._cgroup_cores(tmp_path / "cgroup", tmp_path / "root")) == cores
    assert list(devices._cgroup_cores(tmp_path / "none", tmp_path / "root")) == []


@pytest.mark.parametrize(
    ("environment", "cores"),
    [
        ({"SLURM_CPUS_PER_TASK": "3", "SLURM_CPUS_ON_NODE": "12"}, [3]),
        ({"SLURM_CPUS_ON_NODE": "12"}, [12]),
        ({"NSLOTS": "4"}, [4]),
        ({"SLURM_CPUS_ON_NODE": "2(x3)"}, []),
        ({}, []),
    ],
)
def test_what_a_batch_system_granted_counts(environment: dict[str, str], cores: list[int]) -> None:
    assert devices._scheduled_cores(environment) == cores


def test_cores_are_the_least_of_all_and_at_least_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in devices.SCHEDULER_CORES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(8)), raising=False)
    monkeypatch.setattr(devices, "_cgroup_cores", lambda *_: [2.9])
    try:
        count_cores.cache_clear()
        assert count_cores() == 2
        monkeypatch.setattr(devices, "_cgroup_cores", lambda *_: [0.5])
        count_cores.cache_clear()
        assert count_cores() == 1
    finally:
        count_cores.cache_clear()
