"""Options are frozen, refuse what they do not know, and say so in one line."""

import pickle
import time
from pathlib import Path

import pytest

from eosin.errors import ConfigError, OutputError, SlideOpenError, UnknownNameError
from eosin.options import Options, override, read_yaml


class Tile(Options):
    """A small group of options."""

    mpp: float = 0.5
    patch_size: int = 256


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"option in tiling named 'patchsize'; did you mean patch_size\?"):
        Tile.parse({"patchsize": 2}, source="tiling")


def test_unknown_key_of_a_group_below_names_the_nearest() -> None:
    class Job(Options):
        tiling: Tile = Tile()

    with pytest.raises(UnknownNameError, match=r"option in job\.tiling named 'patchsize'; did you mean patch_size\?"):
        Job.parse({"tiling": {"patchsize": 2}}, source="job")
    with pytest.raises(ConfigError, match="tiling"):
        Job.parse({"tiling": 3}, source="job")


def test_every_bad_value_is_named_in_one_line() -> None:
    with pytest.raises(ConfigError) as caught:
        Tile.parse({"mpp": "fine", "patch_size": 2.5}, source="tiling")
    assert "mpp" in str(caught.value)
    assert "patch_size" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fingerprint_changes_with_any_option() -> None:
    assert Tile().fingerprint() == Tile(mpp=0.5).fingerprint()
    assert len({Tile().fingerprint(), Tile(mpp=0.25).fingerprint(), Tile(patch_size=224).fingerprint()}) == 3


def test_override_descends_and_reads_values_as_yaml() -> None:
    data = {"training": {"lr": 1.0, "epochs": 3}}
    result = override(data, ["training.lr=1e-4", "name=a=b", "terms=[{name: x}]", "deep.er=true"])
    assert result == {
        "training": {"lr": 1e-4, "epochs": 3},
        "name": "a=b",
        "terms": [{"name": "x"}],
        "deep": {"er": True},
    }
    assert data == {"training": {"lr": 1.0, "epochs": 3}}


@pytest.mark.parametrize("assignment", ["no-equals", "=1", "a.b=1", "x={"])
def test_bad_assignments_are_refused(assignment: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        override({"a": 1}, [assignment])


@pytest.mark.parametrize("text", ["- a list", "{unclosed", "text"])
def test_yaml_that_is_no_mapping_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        read_yaml(tmp_path / "c.yaml")


def test_yaml_never_builds_objects(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("a: !!python/object/apply:os.getcwd []")
    with pytest.raises(ConfigError, match="values with a tag"):
        read_yaml(tmp_path / "c.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert read_yaml(tmp_path / "empty.yaml") == {}
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    "error",
    [
        SlideOpenError("a/b.svs", "cannot be opened"),
        UnknownNameError("encoder", "unii", ["uni", "virchow"]),
        OutputError("/x", "disk full", code="disk-full"),
    ],
)
def test_errors_cross_processes_unchanged(error: ConfigError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), copy.code, vars(copy)) == (str(error), error.code, vars(error))


def test_a_long_number_is_refused_at_once(tmp_path: Path) -> None:
    """YAML 1.1 has numbers to the base of 60, whose value takes the square of their length."""
    (tmp_path / "a.yaml").write_text("a: " + "9:" * 100_000 + "9")
    started = time.process_time()
    with pytest.raises(ConfigError, match="a number of more than 1,000 digits, the limit"):
        read_yaml(tmp_path / "a.yaml")
    assert time.process_time() - started < 1
