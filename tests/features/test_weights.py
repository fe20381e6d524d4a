"""Weights from files: found, safe, unwrapped."""

import argparse
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eosin.errors import CheckpointError
from eosin.features._weights import find_weights, hash_state, load_strictly, read_state, revision_of

STATE = {"patch.weight": torch.arange(6.0).reshape(2, 3), "norm.bias": torch.ones(2)}


def same(found: dict[str, torch.Tensor]) -> bool:
    return set(found) == set(STATE) and all(torch.equal(found[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"state_dict": STATE, "epoch": 3},
        {"model": {f"module.{name}": value for name, value in STATE.items()}},
        {"student": {"x": torch.zeros(1)}, "teacher": {f"backbone.{name}": value for name, value in STATE.items()}},
        {
            "teacher": {f"module.backbone.{name}": value for name, value in STATE.items()}
            | {"module.head.mlp.0.weight": torch.zeros(1)},
            "student": {},
        },
        {f"encoder.{name}": value for name, value in STATE.items()},
        {
            "model": {f"teacher.backbone.{name}": value for name, value in STATE.items()}
            | {f"student.backbone.{name}": value + 1 for name, value in STATE.items()}
            | {"student.dino_head.x": torch.zeros(1)}
        },
        {
            "state_dict": {f"teacher_backbone.{name}": value for name, value in STATE.items()}
            | {f"student_backbone.{name}": value + 1 for name, value in STATE.items()}
        },
        {
            "student": {f"module.backbone.{name}": value + 1 for name, value in STATE.items()},
            "teacher": {f"backbone.{name}": value for name, value in STATE.items()},
            "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
            "epoch": 3,
            "args": argparse.Namespace(arch="vit_base", patch_size=16),
            "dino_loss": {"center": torch.zeros(1, 2)},
        },
        {f"dinov2.{name}": value for name, value in STATE.items()} | {"classifier.weight": torch.zeros(2, 2)},
    ],
    ids=["plain", "state_dict", "module", "dino", "ibot", "encoder", "dinov2", "lightly", "dino-run", "transformers"],
)
def test_training_code_wraps_in_many_ways(tmp_path: Path, content: dict[str, object]) -> None:
    torch.save(content, tmp_path / "w.pth")
    found = read_state(tmp_path / "w.pth")
    assert same({name: value for name, value in found.items() if not name.startswith(("head.", "classifier."))})


def test_safetensors_and_torch_have_one_hash(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "w.pth")
    save_file(STATE, tmp_path / "w.safetensors")
    hashes = {hash_state(read_state(tmp_path / name)) for name in ("w.pth", "w.safetensors")}
    assert hashes == {hash_state(STATE)}
    assert hash_state(STATE) != hash_state(STATE | {"norm.bias": torch.zeros(2)})
    assert hash_state({"a": torch.ones(1, dtype=torch.bfloat16)}) != hash_state({"a": torch.ones(1)})


class Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_pickle_payload_never_runs(tmp_path: Path, legacy: bool) -> None:
    content = {"a": torch.ones(1), "b": Payload(tmp_path / "canary")}
    if legacy:
        (tmp_path / "w.pth").write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="never executes") as caught:
        read_state(tmp_path / "w.pth")
    assert caught.value.code == "unsafe"
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x80\x04."])
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError):
        read_state(tmp_path / name)


def test_files_without_tensors(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "a.pth")
    torch.save([1, 2], tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match="no tensors"):
        read_state(tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="holds a list"):
        read_state(tmp_path / "b.pth")


def test_finding_the_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such"):
        find_weights(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="holds 0 weight files"):
        find_weights(tmp_path)
    (tmp_path / "a.pth").touch()
    assert find_weights(tmp_path) == tmp_path / "a.pth"
    (tmp_path / "b.pth").touch()
    with pytest.raises(CheckpointError, match="holds 2 weight files"):
        find_weights(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert find_weights(tmp_path) == tmp_path / "model.safetensors"


def test_a_folder_of_the_hub_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blob = snapshot.parents[1] / "blobs" / "0123"
    blob.parent.mkdir()
    blob.touch()
    (snapshot / "pytorch_model.bin").symlink_to(blob)
    for folder in (snapshot, snapshot.parents[1]):
        assert find_weights(folder) == snapshot / "pytorch_model.bin"
    for whole in (tmp_path, tmp_path / "hub"):
        assert find_weights(whole, source="owner/name") == snapshot / "pytorch_model.bin"
        with pytest.raises(CheckpointError, match="holds 0 weight files"):
            find_weights(whole, source="owner/other")
    assert revision_of(snapshot / "pytorch_model.bin") == "abc"
    assert revision_of(tmp_path / "pytorch_model.bin") == ""
    (snapshot.parent / "def").mkdir()
    with pytest.raises(CheckpointError, match="2 revisions"):
        find_weights(snapshot.parents[1])
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    assert find_weights(snapshot.parents[1]) == snapshot / "pytorch_model.bin"


def test_the_file_that_a_row_names_comes_first(tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "teacher_checkpoint_load.pt"):
        (tmp_path / name).touch()
    assert find_weights(tmp_path).name == "pytorch_model.bin"
    assert find_weights(tmp_path, "teacher_checkpoint_load.pt").name == "teacher_checkpoint_load.pt"


def test_what_does_not_fit_is_named() -> None:
    network = torch.nn.Linear(3, 2)
    for state, message in (
        ({"weight": torch.zeros(2, 3)}, "bias is missing"),
        ({"weight": torch.zeros(3, 3), "bias": torch.zeros(2)}, r"weight is \(3, 3\) instead of \(2, 3\)"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "extra": torch.zeros(1)}, "extra is not part"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_strictly(network, state, Path("w.pth"))
    load_strictly(network, {"weight": torch.ones(2, 3), "bias": torch.ones(2), "head.x": torch.ones(1)}, Path("w"))
    assert network.weight.sum() == 6
