"""Study files that are wrong in every way that we could think of: one plain line for each fault, and no traceback."""

from pathlib import Path

import pytest

from .conftest import Run

LIBRARY_WORDS = ("pydantic", "Extra inputs", "Input should", "unicode string", "NoneType", "dict", "<class", "str type")
PATHS = "slides: none\nlabels: none.csv\njob: j\n"


def told(run: Run, tmp_path: Path, text: str | bytes, command: str = "check") -> str:
    path = tmp_path / "s.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    result = run(command, path)
    assert result.exit_code == 2, result.output
    assert not any(word in result.stderr for word in LIBRARY_WORDS), result.stderr
    assert "unexpected" not in result.stderr
    return result.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty; `eosin init` writes"),
        ("# nothing\n", "is empty"),
        ("- a\n- b\n", "expected lines like `key: value`, found a list"),
        ("hello\n", "found the value 'hello'"),
        ("slides:\n\t- a\n", "line 2: there is a tab; indent with spaces"),
        ("a: b\n  c: d\n", "line 2: there is a second `key:`"),
        ("recipe: {aggregator: abmil\n", "line 1: a bracket is opened and never closed"),
        ('a: b\nlabels: "abc\n', "line 2: a quote is opened and never closed"),
        ("slides: a\nslides: b\n", "line 2: the key 'slides' stands there twice"),
        ("tiling: {mpp: 1, mpp: 2}\n", "the key 'mpp' stands there twice"),
        ("[a, b]: 2\n", "line 1: a list or a group cannot be a key"),
        ("a: !!binary aGVsbG8=\n", "values with a tag (!!) are not allowed"),
        ("a: !!python/object:os.system x\n", "values with a tag (!!) are not allowed"),
        ("slides: s\n---\nlabels: l\n", "a second document begins (---)"),
        ("slides: @home\n", "put it in quotes"),
        ("labels: a\x00b\n", "U+0000"),
        (b"PK\x03\x04\xff\xfe", "not a text file in UTF-8"),
        ("slides: a\n".encode("utf-16"), "not a text file in UTF-8"),
        ("site_name: x\nnav: []\n", "not a study file of eosin"),
        ("version: '3'\nimage: x\n", "not a study file of eosin"),
        ("1: 2\n", "found 1;"),
        ("yes: 2\n", "found yes;"),
        ("Slides: a\nLabels: l\n", "did you mean slides"),
        ("learning_rate: 1e-4\n", "did you mean recipe.training.lr"),
        ("plugins: 3\n", "plugins: 3 is not a list of Python modules"),
        ("plugins: {a: b}\n", "is not a list of Python modules"),
        ("slides:\nlabels:\njob:\n", "--slides, --labels, --job: missing"),
        ("slides: 3\nlabels: l\njob: j\n", "slides: 3 is not a path; put it in quotes"),
        ("slides: ''\nlabels: l\njob: j\n", "slides: the value is empty"),
        ("slides: s\nlabels: [a, b]\njob: {a: b}\n", "job: {'a': 'b'} is not a path"),
    ],
)
def test_files_that_are_no_studies(run: Run, tmp_path: Path, text: str | bytes, said: str) -> None:
    assert said in told(run, tmp_path, text)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("encoder: he_textur", "did you mean he_texture"),
        ("encoder: [he_texture]", "encoder: ['he_texture'] is not text"),
        ("encoder: 3", "encoder: 3 is not text; put it in quotes"),
        ("tiling: 3", "tiling: 3 is not a group of options, like {key: value}"),
        ("tiling: {mmp: 1}", "did you mean mpp"),
        ("tiling: {mpp: fast}", "tiling.mpp: 'fast' is not a number"),
        ("tiling: {mpp: yes}", "mpp: true is not a number"),
        ("tiling: {mpp: .nan}", "tiling.mpp: nan is out of range"),
        ("tiling: {patch_size: [256]}", "tiling.patch_size: [256] is not a whole number"),
        ("quality: {max_blurr: 1}", "did you mean max_blur"),
        ("tissue: {min_stains: 1}", "did you mean min_stain"),
        ("recipe: [abmil]", "recipe: ['abmil'] is not a group of options"),
        ("recipe: {agregator: abmil}", "did you mean aggregator"),
        ("recipe: {aggregator: abmill}", "did you mean abmil"),
        ("recipe: {aggregator: 3}", "aggregator: 3 is not a group"),
        ("recipe: {aggregator: {name: abmil, gated: true}}", "did you mean options.gated"),
        ("recipe: {aggregator: {name: abmil, options: {gate: true}}}", "did you mean gated"),
        ("recipe: {aggregator: {name: abmil, options: {gated: 7}}}", "gated: 7 is not true or false"),
        ("recipe: {training: {learning_rate: 1}}", "did you mean lr"),
        ("recipe: {learning_rate: 1}", "did you mean training.lr"),
        ("recipe: {training: {epochs: ten}}", "training.epochs: 'ten' is not a whole number"),
        ("recipe: {training: {optimizer: adamm}}", "did you mean adam"),
        ("recipe: {training: 3}", "training: 3 is not a group"),
        ("recipe: {terms: attention_entropy}", "terms: 'attention_entropy' is not a list"),
        ("recipe: {terms: [{name: attention_entropy, wieght: 2}]}", "did you mean weight"),
        ("recipe: {terms: [attention_entrop]}", "did you mean attention_entropy"),
        ("recipe: {strategy: superviced}", "did you mean supervised"),
        ("folds: many", "folds: 'many' is not a whole number"),
        ("folds: 0", "folds: 0 is out of range; it must be at least 2"),
        ("formats: pngg", "did you mean png"),
        ("formats: png,geojsn", "did you mean geojson"),
        ("formats: 3", "formats: 3 is not a list"),
        ("maps: [alone, atention]", "did you mean attention"),
        ("second: 3", "second: 3 is not a group"),
        ("second: {tiling: {mmp: 1}}", "did you mean mpp"),
        ("missing: dropp", "did you mean drop"),
        ("workers: -3", "workers: -3 is out of range; it must be at least 0"),
        ("workers: many", "workers: 'many' is not a whole number"),
        ("batch_size: 0", "batch_size: 0 is out of range; it must be at least 1"),
        ("cluster: {a: b}", "cluster: {'a': 'b'} is not a path"),
        ("device: gpu", "device 'gpu' does not exist"),
        ("target: no", "target: false is not text; put it in quotes"),
        ("target: [a, b]", "target: ['a', 'b'] is not text"),
        ("splits: 3", "splits: 3 is not a path"),
    ],
)
def test_values_that_make_no_sense(run: Run, tmp_path: Path, lines: str, said: str) -> None:
    assert said in told(run, tmp_path, f"{PATHS}{lines}\n")


def test_all_wrong_keys_and_values_are_named_at_once(run: Run, tmp_path: Path) -> None:
    assert "2 problems" in told(run, tmp_path, "slidess: a\njob: j\nlabel: l\n")
    assert "2 problems" in told(run, tmp_path, f"{PATHS}workers: many\nbatch_size: 0\n")


def test_text_that_yaml_would_change_stays_text(run: Run, tmp_path: Path) -> None:
    assert "2024-01-31: not a table by its suffix" in told(run, tmp_path, "slides: none\nlabels: 2024-01-31\njob: j\n")


@pytest.mark.parametrize("command", ["tile", "extract", "split", "train", "crossval", "predict", "heatmap", "view"])
def test_every_command_that_reads_a_study_refuses_the_same_way(run: Run, tmp_path: Path, command: str) -> None:
    assert "is empty" in told(run, tmp_path, "", command)
    assert "did you mean slides" in told(run, tmp_path, "slidess: a\njob: j\n", command)
    assert "there is a tab" in told(run, tmp_path, "slides:\n\t- a\n", command)
