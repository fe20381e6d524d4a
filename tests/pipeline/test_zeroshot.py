"""Classes from sentences, with a small CLIP of random weights that the package transformers builds."""

import csv
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from eosin.errors import ConfigError, LabelError, UnknownNameError
from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.features._store import write_bag
from eosin.features._text_towers import embed_classes, load_text_tower
from eosin.mil._study import open_study
from eosin.pipeline._zeroshot import Prompts, slide_scores, zeroshot_slides

PROMPTS = "tumour: [a tumour, tumour cells]\nnormal: normal tissue\n"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a CLIP with a tokenizer of letters."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {name: k for k, name in enumerate([*letters, *(f"{one}</w>" for one in letters),
                                                    "<|startoftext|>", "<|endoftext|>"])}  # fmt: skip
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[])
    side = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**side, "vocab_size": len(vocabulary), "bos_token_id": vocabulary["<|startoftext|>"],
            "eos_token_id": vocabulary["<|endoftext|>"], "pad_token_id": vocabulary["<|endoftext|>"]}  # fmt: skip
    torch.manual_seed(0)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=text, vision_config={**side, "image_size": 8, "patch_size": 4}, projection_dim=6
        )
    )
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(folder: Path, name: str, rows: np.ndarray, encoder: str = "plip") -> Path:
    spec = FeatureSpec(encoder=encoder, dim=rows.shape[1])
    write_bag(folder / f"{name}.h5", FeatureBag(rows.astype(np.float32), spec, name))
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.yaml").write_text(PROMPTS)
    return tmp_path / "prompts.yaml"


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.long  # importing transformers
def test_a_slide_of_one_tile_is_what_the_library_says_of_the_picture(clip: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "p.yaml").write_text("one: a tumour\nother: normal tissue\n")
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
    tokens = tokenizer(["a tumour", "normal tissue"], padding=True, return_tensors="pt")
    with torch.no_grad():
        said = model(**tokens, pixel_values=torch.rand(1, 3, 8, 8))
    write(tmp_path / "features", "s", 3 * said.image_embeds.numpy())
    zeroshot_slides(tmp_path / "features", tmp_path / "p.yaml", tmp_path / "out", weights=clip)
    (row,) = table(tmp_path / "out/scores.csv")
    wanted = said.logits_per_image.softmax(1)[0]
    assert [float(row["prob_one"]), float(row["prob_other"])] == pytest.approx(wanted.tolist(), abs=1e-5)


@pytest.mark.long  # importing transformers
def test_classes_are_means_of_prompts_of_length_one(clip: Path) -> None:
    tower = load_text_tower("plip", weights=clip)
    classes = embed_classes(tower, [["a tumour", "tumour cells"], ["normal"]])
    rows = torch.nn.functional.normalize(tower.embed(["a tumour", "tumour cells"]).detach(), dim=1).mean(0)
    torch.testing.assert_close(classes[0], rows / rows.norm())
    torch.testing.assert_close(classes.norm(dim=1), torch.ones(2))


def test_a_slide_is_the_mean_of_its_most_alike_tiles() -> None:
    rows = np.array([[1, 0], [0, 2], [3, 3], [-1, 0]], np.float32)
    classes = np.eye(2, dtype=np.float32)
    half = np.sqrt(0.5)
    np.testing.assert_allclose(slide_scores(rows, classes, 1), [1, 1], atol=1e-6)
    np.testing.assert_allclose(slide_scores(rows, classes, 2), [(1 + half) / 2] * 2, atol=1e-6)
    np.testing.assert_allclose(slide_scores(rows, classes, 99), [half / 4, (1 + half) / 4], atol=1e-6)


@pytest.mark.long  # importing transformers
def test_labels_add_an_evaluation_and_bad_slides_are_rows(clip: Path, prompts: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "features"
    for k in range(6):
        write(folder, f"s{k}", rng.normal(size=(k + 1, 6)))
    write(folder, "empty", np.zeros((0, 6)))
    (folder / "bad.h5").write_bytes(b"x")
    labels = "".join(f"s{k},p{k},{('tumour', 'normal')[k % 2]}\n" for k in range(6))
    (tmp_path / "labels.csv").write_text("slide_id,patient_id,label\n" + labels)
    study = open_study({f"s{k}": folder / f"s{k}.h5" for k in range(6)}, tmp_path / "labels.csv")
    made = zeroshot_slides(folder, prompts, tmp_path / "out", weights=clip, top_k=2, study=study)
    rows = {row["slide_id"]: row for row in table(tmp_path / "out/scores.csv")}
    assert [rows[name]["status"] for name in ("s0", "empty", "bad")] == ["ok", "empty", "failed"]
    assert made.metrics is not None
    for row in table(tmp_path / "out/predictions.csv"):
        for name in ("tumour", "normal"):  # by name, whatever the order of the table and of the file
            assert float(row[f"prob_{name}"]) == pytest.approx(float(rows[row["slide_id"]][f"prob_{name}"]))
        assert row["predicted"] == rows[row["slide_id"]]["predicted"]
    (tmp_path / "other.yaml").write_text("tumor: a\nnormal: b\n")
    with pytest.raises(LabelError, match="the names of both must be the same"):
        zeroshot_slides(folder, tmp_path / "other.yaml", tmp_path / "no", weights=clip, study=study)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("tumour: a tumour\n", "at least two classes are needed, found tumour"),
        ("{}\n", "at least two classes"),
        ("a: x\nb: []\n", "b needs a sentence"),
        ("a: x\nb: [1, 2]\n", "b needs a sentence"),
        ("- a\n- b\n", "expected lines"),
        ("classes: {a: x, b: y}\ntemplates: [an image]\n", "does not contain CLASSNAME"),
        ("classes: [a, b]\ntemplates: [a CLASSNAME]\n", "at least two classes are needed, found list"),
    ],
)
def test_prompts_that_cannot_be_used(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ConfigError, match=told):
        Prompts.read(tmp_path / "p.yaml")


def test_templates_are_filled_with_every_name(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(
        "classes: {luad: [adenocarcinoma, LUAD], lusc: squamous}\ntemplates: [CLASSNAME., an image of CLASSNAME]\n"
    )
    assert Prompts.read(tmp_path / "p.yaml").classes == {
        "luad": ("adenocarcinoma.", "LUAD.", "an image of adenocarcinoma", "an image of LUAD"),
        "lusc": ("squamous.", "an image of squamous"),
    }


@pytest.mark.long  # importing transformers
def test_refusals_before_any_work(clip: Path, prompts: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "uni", "s", np.ones((2, 6)), "uni_v1")
    vectors = write(tmp_path / "mean", "s", np.ones((1, 6)), "mean(plip)")
    keep = write(tmp_path / "keep", "s", np.ones((2, 6)), "keep")
    for folder in (other, vectors):
        with pytest.raises(UnknownNameError, match="tile encoder with a text tower"):
            zeroshot_slides(folder, prompts, tmp_path / "out", weights=clip)
    with pytest.raises(ConfigError, match="--allow-remote-code"):
        zeroshot_slides(keep, prompts, tmp_path / "out")
    plip = write(tmp_path / "plip", "s", np.ones((2, 6)))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        zeroshot_slides(plip, prompts, tmp_path / "out", weights=tmp_path)
    with pytest.raises(ConfigError, match="top-k 0"):
        zeroshot_slides(plip, prompts, tmp_path / "out", top_k=0)
    (tmp_path / "out/fold_0").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds the models of a cross-validation"):
        zeroshot_slides(plip, prompts, tmp_path / "out", weights=clip)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["fold_0"]


def test_conch_is_asked_by_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The package is a stand-in; its names are those of the authors' page."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logit_scale = torch.nn.Parameter(torch.tensor(2.0).log())

        def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
            return tokens.float()

    package = types.ModuleType("conch.open_clip_custom")
    package.create_model_from_pretrained = lambda name, place: (Model(), None)
    package.get_tokenizer = lambda: "letters"
    package.tokenize = lambda texts, tokenizer: torch.tensor([[len(text), 1] for text in texts])
    monkeypatch.setitem(sys.modules, "conch", types.ModuleType("conch"))
    monkeypatch.setitem(sys.modules, "conch.open_clip_custom", package)
    tower = load_text_tower("conch_v1_contrast")
    assert tower.scale == pytest.approx(2.0)
    assert tower.embed(["abc", "d"]).tolist() == [[3, 1], [1, 1]]
