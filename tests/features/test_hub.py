"""What stands between a user and gated weights is one sentence."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError

from eosin.errors import ConfigError
from eosin.features._hub import download_weights


def response(status: int) -> SimpleNamespace:
    return SimpleNamespace(status_code=status, headers={}, request=None)


def raising(error: Exception) -> object:
    def download(*_: object, **__: object) -> str:
        raise error

    return download


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (GatedRepoError("no", response=response(403)), "gated: ask for access at https://huggingface.co/o/n"),
        (LocalEntryNotFoundError("offline"), "cannot be fetched"),
        (RuntimeError("whatever the HTTP library raises"), "cannot be fetched"),
        (OSError("disk"), "cannot be fetched"),
    ],
)
def test_obstacles(monkeypatch: pytest.MonkeyPatch, error: Exception, words: str) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", raising(error))
    with pytest.raises(ConfigError, match=words) as caught:
        download_weights("o/n", gated=True)
    assert "--weights FILE" in caught.value.message
    assert "https://huggingface.co/o/n" in caught.value.message
    assert "\n" not in caught.value.message


def test_the_next_name_is_tried_until_there_is_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def download(repository: str, name: str, *, revision: str | None) -> str:
        asked.append((name, revision))
        if name != "pytorch_model.bin":
            raise EntryNotFoundError("no such file")
        return "/cache/pytorch_model.bin"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert download_weights("o/n", revision="abc") == Path("/cache/pytorch_model.bin")
    assert asked[0] == ("model.safetensors", "abc")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", raising(EntryNotFoundError("no")))
    with pytest.raises(ConfigError, match=r"no file named GPFM\.pth"):
        download_weights("o/n", file="GPFM.pth")


def test_the_cache_needs_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda _, name, **__: f"/c/{name}" if "bin" in name else None
    )
    monkeypatch.setattr("huggingface_hub.hf_hub_download", raising(AssertionError("asked the network")))
    assert download_weights("o/n").name == "open_clip_pytorch_model.bin"
