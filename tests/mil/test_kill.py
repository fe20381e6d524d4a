"""A training that is killed with SIGKILL at any moment and started again ends with the same weights, bit by bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from scaling import scaled

SCRIPT = """
import hashlib, itertools, json, os, random, signal, sys, time
from pathlib import Path

import torch

torch.set_num_threads(1)
from eosin.features._bag import FeatureSpec
from eosin.mil._checkpoint import load_model
from eosin.mil._data import Examples, MemoryBags
from eosin.mil._recipe import Recipe
from eosin.mil.tasks._classification import Classification
from eosin.mil._train import fit

folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
generator = torch.Generator().manual_seed(0)
bags = {str(i): torch.randn(20, 8, generator=generator) + i % 2 for i in range(24)}
ids = tuple(bags)
examples = Examples(MemoryBags(bags, FeatureSpec(encoder="toy", dim=8)), ids, ids, torch.arange(24) % 2)
recipe = Recipe.parse({
    "aggregator": {"name": "abmil", "options": {"embed_dims": [16], "hidden": 8}},
    "training": {"epochs": 8, "bags_per_step": 4, "patience": 0, "ema": 0.9, "lr": 1e-3},
})


def run(name):
    fit(recipe, Classification(classes=("a", "b")), examples.subset(ids[:16]), examples.subset(ids[16:]),
        folder=folder / name, device="cpu", state_interval_s=0)


def attempt(name, limit_s):
    pid = os.fork()
    if not pid:
        run(name)
        os._exit(0)
    started = time.monotonic()
    while time.monotonic() - started < limit_s:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return True
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def digest(name):
    model, card = load_model(folder / name)
    log = (folder / name / "log.csv").read_text()
    return card.weights_hash, hashlib.sha256(log.encode()).hexdigest()


run("straight")  # in this process: what a first training imports need not be imported after each fork
started = time.monotonic()
assert attempt("timed", 600)
whole_s = time.monotonic() - started
draw = random.Random(seed)
killed = 0
for round in itertools.count():
    name = f"run{round}"
    while killed < kills and not attempt(name, draw.uniform(0, whole_s)):
        killed += 1
    if killed == kills:
        break
assert attempt(name, 600)
runs = [f"run{number}" for number in range(round + 1)]
left = sorted(path.name for run in runs for path in (folder / run).iterdir())
killed_runs = [digest(run) for run in runs]
print(json.dumps({"straight": digest("straight"), "killed": killed_runs, "kills": killed, "left": left}))
"""


def kill_repeatedly(folder: Path, kills: int, seed: int) -> dict:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(folder), str(kills), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kills", [20, pytest.param(scaled(200, 21), marks=pytest.mark.slow)])
@pytest.mark.long
def test_killed_training_ends_with_the_same_weights(tmp_path, kills):
    found = kill_repeatedly(tmp_path, kills, seed=1)
    assert found["kills"] == kills
    assert all(run == found["straight"] for run in found["killed"])
    assert {name for name in found["left"] if not name.startswith(".")} == {
        "events.out.tfevents.0.eosin", "log.csv", "metrics.jsonl", "model.json", "model.safetensors", "seen.csv",
    }  # fmt: skip
