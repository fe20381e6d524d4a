import json

import pytest
import torch

from eosin._seals import sealed
from eosin.errors import CheckpointError, OutputError
from eosin.features._bag import FeatureSpec
from eosin.mil._checkpoint import ModelCard, load_card, load_model, save_model
from eosin.mil._recipe import Recipe
from eosin.mil._standardize import Standardized, Standardizer
from eosin.mil.methods.abmil import Abmil
from eosin.mil.tasks._classification import Classification

TASK = Classification(classes=("a", "b"))


@pytest.fixture
def folder(tmp_path):
    card = ModelCard(recipe=Recipe(), task=TASK.model_dump(mode="json"), features=FeatureSpec(encoder="toy", dim=4))
    save_model(tmp_path, Standardized(Standardizer(4), Abmil(4, 2)), card)
    return tmp_path


def test_a_folder_holds_two_files_and_every_option(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.safetensors"]
    card = json.loads((folder / "model.json").read_text())
    assert card["recipe"]["aggregator"]["options"]["hidden"] == 128
    assert card["task"]["classes"] == ["a", "b"]
    model, loaded = load_model(folder)
    assert not model.training
    assert loaded.model_id == card["weights_hash"][:16]
    assert loaded.load_task() == TASK


def test_loading_leaves_torchs_generator_alone(folder):
    before = torch.get_rng_state()
    load_model(folder)
    assert torch.equal(before, torch.get_rng_state())


def damage(folder, name, change):
    path = folder / name
    data = json.loads(path.read_text())
    change(data)
    data.pop("checksum")
    path.write_text(json.dumps(sealed(data)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema_version=9), "schema version 9, this eosin .* reads 2"),
        (lambda d: d.update(surprise=1), "is damaged: .*surprise"),
        (lambda d: d["recipe"]["aggregator"].update(name="abmill"), "no aggregator named 'abmill'"),
        (lambda d: d["features"].update(dim=5), "size mismatch"),
        (lambda d: d.update(weights_hash="0"), "is not the file that model.json describes"),
        (lambda d: d["task"].update(kind="other"), "description of the task"),
    ],
)
def test_a_folder_that_was_changed_is_refused_in_one_line(folder, change, message):
    damage(folder, "model.json", change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_every_byte_of_the_card_counts(folder):
    text = (folder / "model.json").read_text()
    card = load_card(folder)
    for place in range(len(text)):
        for other in ("0", "a", '"'):
            (folder / "model.json").write_text(text[:place] + other + text[place + 1 :])
            try:
                assert load_card(folder) == card
            except CheckpointError:
                continue


def test_exchanged_classes_are_refused(folder):
    data = json.loads((folder / "model.json").read_text())
    data["task"]["classes"].reverse()
    (folder / "model.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="damaged or was changed by hand"):
        load_model(folder)


def test_a_card_of_0_1_has_no_checksum_and_is_read(folder):
    card = load_card(folder)
    data = json.loads((folder / "model.json").read_text())
    for name in ("checksum", "files"):
        del data[name]
    (folder / "model.json").write_text(json.dumps(data | {"schema_version": 1}))
    assert load_card(folder).recipe == card.recipe
    (folder / "model.json").write_text(json.dumps(data))  # of today, without a checksum
    with pytest.raises(CheckpointError, match="damaged"):
        load_card(folder)


def test_missing_and_truncated_files_are_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"is not a model folder \(no model.json\)"):
        load_card(tmp_path / "nothing")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="is not the file"):
        load_model(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        load_model(folder)
    (folder / "model.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(folder)


def test_a_folder_that_cannot_be_written_stops_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    card = ModelCard(recipe=Recipe(), task=TASK.model_dump(mode="json"), features=FeatureSpec(encoder="toy", dim=4))
    with pytest.raises(OutputError):
        save_model(tmp_path / "file", Abmil(4, 2), card)
