"""Put known faults back into a copy of the package, one at a time: the named tests must fail, else they have a hole.

Run: ``python tests/mutants.py [NUMBER ...]``; a part of ``make campaign``. Exit code 1 when a mutant lives.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HANG_S = 300.0
ROOT = Path(__file__).parents[1]
MUTANTS = [  # what is wrong, module, code, what it becomes, tests that must fail
    ("files are not synced", "_files.py", "os.fsync(file.fileno())", "file.fileno()", "test_files.py -k power"),
    ("folders are not synced", "_files.py", "_sync_folder(path.parent)", "pass", "test_files.py -k power"),
    ("val and test may share patients", "mil/_splits.py", ', ("val", "test")):', "):",
     "mil/test_splits.py -k two_sides"),
    ("a training does not know its labels", "mil/_train.py", ", targets.numpy().tobytes()]", "]",
     "test_fingerprints.py -k train"),
    ("the viewer binds all addresses", "viewer/_server.py", "bind((ADDRESS, port))", 'bind(("", port))',
     "viewer/test_server.py -k address"),
    ("a full disk is a bad slide", "_batch.py", "error.errno in ENVIRONMENT_ERRNOS", "error.errno in ()",
     "test_batch.py -k disk"),
    ("x and y of the exact lattice are exchanged", "heatmaps/_heatmap.py", "[places, places + 1]",
     "[places[:, ::-1], places[:, ::-1] + 1]", "heatmaps/test_heatmap.py -k line"),
    ("the exact lattice is looked for with x and y exchanged", "heatmaps/_heatmap.py",
     "np.round(grid.origins_px0 / step)", "np.round(grid.origins_px0[:, ::-1] / step)",
     "heatmaps/test_heatmap.py -k line"),
    ("checksums of JSON always fit", "_seals.py", "return data.get(KEY) ==", "return True or data.get(KEY) ==",
     "test_mutants.py -k model.json"),
    ("checksums of HDF5 always fit", "_seals.py", "if checksum != stated:", "if False:",
     "features/test_store.py -k every_opening"),
    ("cells are not shielded", "_tables.py", "return f\"'{cell}\" if is_run else cell", "return cell",
     "test_tables.py -k spreadsheet"),
    ("levels of JSON are not counted", "_seals.py", "        raise too_deep\n", "        pass\n",
     "test_seals.py -k levels"),
    ("strangers are not limited", "viewer/_server.py", "strangers[0].close()", "pass",
     "viewer/test_server.py -k token_keep"),
    ("an answer that has begun may take for ever", "_processes.py", "watch.start()", "pass",
     "test_processes.py -k midst"),
    ("a training does not know its features", "mil/_train.py",
     "[examples.bags.content_hash(name) for name in examples.ids]", "[]", "test_fingerprints.py -k train"),
    ("a training does not know its patients", "mil/_train.py", "return [examples.ids, slides,",
     "return [examples.ids,", "test_fingerprints.py -k train"),
    ("folders are named in messages", "cli/_folders.py", "re.sub(pattern, self._rules[pattern], text)", "text",
     "cli/test_privacy.py -k left_out"),
    ("a signal is heard at the end of a loop alone", "cli/_common.py", "                require_running()\n", "",
     "cli/test_signals.py -k before_its_work"),
    ("an older set is not cleared", "_filesets.py", "shutil.rmtree(path) if path.is_dir() else path.unlink()", "pass",
     "mil/test_splits.py -k fewer_splits"),
    ("locks that are held are removed", "_files.py", "_is_free(path)", "True", "test_files.py -k dead_runs"),
]  # fmt: skip


def lives(module: str, code: str, becomes: str, tests: str) -> bool:
    """Return whether tests pass with a fault in a copy of the package."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        shutil.copytree(ROOT / "eosin", copy / "eosin", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        text = (copy / "eosin" / module).read_text(encoding="utf-8")
        if text.count(code) < 1:
            raise SystemExit(f"{module} has no {code!r} any more: bring tests/mutants.py up to date")
        (copy / "eosin" / module).write_text(text.replace(code, becomes), encoding="utf-8")
        first, *rest = tests.split()
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/{first}", *rest]
        environment = os.environ | {"PYTHONPATH": name}
        try:
            done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, check=False, timeout=HANG_S)
        except subprocess.TimeoutExpired:  # nobody would call that passed
            return False
        if done.returncode not in (0, 1):
            raise SystemExit(done.stdout.decode()[-3000:])
        return done.returncode == 0


def main() -> None:
    """Try the mutants and print which live."""
    chosen = [int(number) for number in sys.argv[1:]] or range(len(MUTANTS))
    alive = 0
    for number in chosen:
        what, *mutant = MUTANTS[number]
        found = lives(*mutant)
        alive += found
        sys.stdout.write(f"{'LIVES' if found else 'dies':6}{number:3}  {what}  ({mutant[-1]})\n")
        sys.stdout.flush()
    sys.exit(alive > 0)


if __name__ == "__main__":
    main()
