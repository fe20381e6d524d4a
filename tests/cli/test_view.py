import json
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from eosin.viewer._catalogue import open_catalogue
from eosin.viewer._saved import save_session
from eosin.viewer._session import Edited
from eosin.wsi._slide_file import find_slides


@pytest.fixture(scope="module")
def model(cohort, features, run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("view") / "model"
    done = run(
        "train", "--features", features, "--labels", cohort / "labels.csv", "--recipe", "abmil", "--out", folder,
        "--set", "recipe.training.epochs=2",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return folder


def slide(cohort, number):
    return next(iter(sorted((cohort / "slides").glob(f"S00{number}*"))))


def test_a_page_is_written_and_slides_without_features_are_listed(run, cohort, features, model, tmp_path):
    some = tmp_path / "some"
    some.mkdir()
    (some / "S000.h5").symlink_to(features / "S000.h5")
    done = run(
        "view", "--model", model, "--features", some, "--slides", slide(cohort, 0), "--slides", slide(cohort, 1),
        "--html", tmp_path / "page.html",
    )  # fmt: skip
    assert done.exit_code == 1, done.output
    assert "failed: S001: " in done.stderr
    assert "has no feature file" in done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "page.html")]
    assert (tmp_path / "page.html").stat().st_size > 10**5


def test_a_session_runs_again(run, cohort, features, model, tmp_path):
    catalogue = open_catalogue(model, [features], find_slides([slide(cohort, 0)]))
    edited = Edited.untouched(catalogue.study(catalogue.shown[0].key)).act("remove", np.array([1, 2, 5]))
    session = save_session(catalogue, edited, "tumour", tmp_path)[0]
    catalogue.slides.close()
    arguments = ["view", "--model", model, "--features", features, "--slides", slide(cohort, 0), "--replay", session]
    done = run(*arguments, "--out", tmp_path / "again")
    assert done.exit_code == 0, done.output
    words, path = done.stdout.splitlines()
    assert re.match(r"S000: Without 3 tiles .* the model still .*\[as saved\]", words)
    assert json.loads(Path(path).read_text())["after"] == json.loads(session.read_text())["after"]


def test_slides_that_cannot_be_shown_are_refused_in_one_line(refused, cohort, features, model, tmp_path):
    (tmp_path / "none").mkdir()
    show = ["view", "--model", model, "--no-browser"]
    here = ["--features", features, "--slides", slide(cohort, 0)]
    assert "no feature files" in refused(*show, "--features", tmp_path / "none", "--slides", slide(cohort, 0))
    assert "no such file or folder" in refused(*show, "--features", features, "--slides", tmp_path / "S000.tiff")
    assert "is not a model folder" in refused("view", "--model", tmp_path, *here)
    other = tmp_path / "S000.tiff"
    other.symlink_to(slide(cohort, 3))
    assert "the slide that they came from" in refused(*show, "--features", features, "--slides", other)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} cannot be used" in refused(*show, *here, "--port", port)
    assert "not a saved session" in refused(*show, *here, "--replay", model / "model.json")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_the_server_prints_its_address_and_ends_by_one_signal(cohort, features, model, number, code):
    command = [sys.executable, "-c", "from eosin.cli.app import main; main()"]
    arguments = ["view", "--model", model, "--features", features, "--slides", slide(cohort, 0), "--no-browser"]
    process = subprocess.Popen(
        [*command, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        url = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{32}/", url), process.stderr.read()
        with urllib.request.urlopen(url, timeout=20) as page:
            assert b"bokeh" in page.read()
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(url.rsplit("/", 2)[0] + "/", timeout=20)
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert "Ctrl+C" in err
