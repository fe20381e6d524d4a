"""The precision that ``auto`` chooses, once per folder of results."""

import json

import torch

from eosin.mil import _train as train
from eosin.mil._train import settled_precision


def test_auto_is_chosen_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.delenv("EOSIN_PRECISION")
    monkeypatch.setattr(train, "faster_precision", lambda device: "bf16")
    assert settled_precision("auto", "cpu", tmp_path / "run") == "bf16"
    monkeypatch.setattr(train, "faster_precision", lambda device: "fp32")
    assert settled_precision("auto", "cpu", tmp_path / "run") == "bf16"  # as it began
    assert settled_precision("auto", "cpu", tmp_path / "other") == "fp32"
    kept = json.loads((tmp_path / "run" / "precision.json").read_text())
    assert kept["precision"] == "bf16"
    assert kept["device"] == "cpu"


def test_a_named_one_and_the_variable_decide_before_it(tmp_path, monkeypatch):
    assert settled_precision("bf16", "cpu", tmp_path) == "bf16"
    monkeypatch.setenv("EOSIN_PRECISION", "fp32")
    assert settled_precision("auto", "cpu", tmp_path) == "fp32"
    assert not list(tmp_path.iterdir())


def test_a_gpu_without_bf16_takes_fp32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert train.faster_precision(torch.device("cuda")) == "fp32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert train.faster_precision(torch.device("cuda")) == "bf16"
