"""Two processes that share the bags of a step train the same model as one that computes them all."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = """
import json
import os
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
from eosin.features.bag import FeatureSpec
from eosin.mil.data import Examples, MemoryBags
from eosin.mil.recipe import Recipe
from eosin.mil.tasks import Classification
from eosin.mil.train import fit

generator = torch.Generator().manual_seed(0)
bags = {str(i): torch.randn(5 + i, 8, generator=generator) + i % 2 for i in range(21)}
ids = tuple(bags)
examples = Examples(MemoryBags(bags, FeatureSpec(encoder="toy", dim=8)), ids, ids, torch.arange(21) % 2)
recipe = Recipe.parse({
    "aggregator": {"name": "abmil", "options": {"embed_dims": [16], "hidden": 8, "dropout": 0.0}},
    "training": {"epochs": 3, "bags_per_step": 4, "max_instances_per_step": 40, "lr": 1e-2, "optimizer": "sgd"},
})
folder = Path(sys.argv[1])


def run(name, **variables):
    pid = os.fork()
    if pid:
        return pid
    os.environ.update(variables)
    fitted = fit(recipe, Classification(classes=("a", "b")), examples.subset(ids[:13]), examples.subset(ids[13:]),
                 folder=folder / name, device="cpu")
    loss = fitted.history[-1]["train_objective"]
    (folder / f"{name}{variables.get('RANK', '')}.json").write_text(json.dumps(loss))
    os._exit(0)


shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[2], "WORLD_SIZE": "2"}
children = [run("two", RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)] + [run("one")]
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_two_processes_train_the_model_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-6, atol=1e-6)
    alone, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two0", "two1"))
    assert first == second
    assert first == pytest.approx(alone, rel=0.2)
