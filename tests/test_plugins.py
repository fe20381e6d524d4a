"""Methods, encoders and readers of a user's own: found in every way, needed by name, refused in one line."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eosin import plugins
from eosin.errors import ConfigError

TEMPLATE = Path(__file__).parents[1] / "docs/plugin"
POOL = '''
from eosin.mil import AGGREGATORS
from eosin.mil.methods.pooling import MeanPooling

@AGGREGATORS.register("own_pool")
class OwnPool(MeanPooling):
    """Mean of the instances."""
'''
TRAIN = """
import sys
from pathlib import Path
import numpy as np
import eosin
from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.mil._recipe import Component, Recipe, Training

def main(name):
    lines = ["patient_id,slide_id,label"]
    for number in range(8):
        rows = np.full((4, 3), number % 2, np.float32)
        bag = FeatureBag(rows, FeatureSpec(encoder="toy", dim=3), f"s{number}")
        eosin.write_bag(Path("features") / f"s{number}.h5", bag)
        lines.append(f"p{number},s{number},{'ab'[number % 2]}")
    Path("labels.csv").write_text("\\n".join(lines))
    recipe = Recipe(aggregator=Component(name=name), training=Training(epochs=1, select="last"))
    print(eosin.fit(eosin.open_study("features", "labels.csv"), recipe, "model", device="cpu").card.plugins)
"""


def in_a_new_process(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """What an installation of the template leaves in site-packages."""
    folder = tmp_path / "site"
    info = folder / "eosin_template-0.1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "eosin_template").symlink_to(TEMPLATE / "eosin_template")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: eosin-template\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[eosin.plugins]\ntemplate = eosin_template\n")
    return folder


def test_the_template_declares_the_entry_point_that_its_installation_has() -> None:
    text = (TEMPLATE / "pyproject.toml").read_text(encoding="utf-8")
    assert f'[project.entry-points."{plugins.GROUP}"]\ntemplate = "eosin_template"' in text


@pytest.mark.long
def test_an_installed_package_is_found_without_being_asked_for_and_its_model_names_it(
    site: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "slide.npy", np.full((64, 64, 3), 200, np.uint8))
    code = """
from eosin.features import find_encoder
with eosin.open_slide(Path("slide.npy"), mpp=0.5) as slide:
    assert slide.size_px0 == (64, 64)
assert find_encoder("template_vit").dim == 192
assert "template_spread" in eosin.LOSS_TERMS
main("template_pool")
print(eosin.load_model('model')[0].embed_dim)
"""
    (tmp_path / "train.py").write_text(TRAIN + code)
    done = in_a_new_process(tmp_path, sys.executable, "train.py", PYTHONPATH=str(site))
    assert (done.returncode, done.stdout.split("\n")[:2]) == (0, ["('eosin_template',)", "64"]), done.stderr
    load = "import eosin; eosin.load_model('model')"
    lost = in_a_new_process(tmp_path, sys.executable, "-c", load)
    assert "model: needs the plug-in eosin_template, which is not loaded" in lost.stderr


@pytest.mark.long
def test_a_file_is_found_by_the_option_and_by_the_variable_and_its_loss_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(POOL)
    (tmp_path / "train.py").write_text(f"{TRAIN}\nmain('own_pool')\n")
    done = in_a_new_process(tmp_path, sys.executable, "train.py", EOSIN_PLUGINS=str(tmp_path / "own.py"))
    assert (done.returncode, done.stdout.strip()) == (0, "('own.py',)"), done.stderr
    predict = (sys.executable, "-m", "eosin", "predict", "--model", "model", "--features", "features", "--out", "p.csv")
    assert in_a_new_process(tmp_path, *predict, "--plugin", "own.py").returncode == 0
    lost = in_a_new_process(tmp_path, *predict)
    assert (lost.returncode, lost.stdout) == (2, "")
    assert lost.stderr == (
        "error: model: needs the plug-in own.py, which is not loaded; install it, or pass --plugin own.py\n"
    )


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("import no_such_module_at_all", "ModuleNotFoundError"),
        ("1 / 0", "ZeroDivisionError"),
        (None, "no such plug-in"),
    ],
)
def test_a_plug_in_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str | None, told: str
) -> None:
    monkeypatch.setenv(plugins.VARIABLE, "")
    path = tmp_path / f"broken_{abs(hash(told))}.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(ConfigError, match=told) as caught:
        plugins.add_plugin(str(path))
    assert "\n" not in str(caught.value)


def test_a_file_may_not_take_the_name_of_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugins.VARIABLE, "")
    (tmp_path / "json.py").write_text("")
    with pytest.raises(ConfigError, match="there is already a module json"):
        plugins.add_plugin(str(tmp_path / "json.py"))
