"""Two processes that share the bags of a step train the same model as one that computes them all."""

import contextlib
import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from eosin.errors import ConfigError
from eosin.mil import _parallel
from eosin.mil._parallel import own_device

SCRIPT = """
import json
import os
import sys
from pathlib import Path

import torch

import torch._dynamo  # noqa: F401 - here and not in every child at its first step

torch.set_num_threads(1)
from eosin.features._bag import FeatureSpec
from eosin.mil._data import Examples, MemoryBags
from eosin.mil._recipe import Recipe
from eosin.mil.task import make_task
from eosin.mil._train import fit

generator = torch.Generator().manual_seed(0)
bags = {str(i): torch.randn(5 + i, 8, generator=generator) + i % 2 for i in range(21)}
ids = tuple(bags)
rows = [{"label": "ab"[i % 2], "time": str(i * 8 % 21), "event": str(int(i % 4 != 0))} for i in range(21)]
recipe = Recipe.parse({
    "aggregator": {"name": "abmil", "options": {"embed_dims": [16], "hidden": 8, "dropout": 0.0}},
    "training": {"epochs": 3, "bags_per_step": 4, "max_instances_per_step": 40, "lr": 1e-2, "optimizer": "sgd"},
})
folder = Path(sys.argv[1])


def run(name, kind, target, **variables):
    pid = os.fork()
    if pid:
        return pid
    os.environ.update(variables)
    task = make_task(kind, rows, target=target)
    examples = Examples(MemoryBags(bags, FeatureSpec(encoder="toy", dim=8)), ids, ids, task.encode(rows))
    train, val = examples.subset(ids[:13]), examples.subset(ids[13:])
    if name == "other":
        own = recipe.training.model_copy(update={"lr": 0.01 + int(variables["RANK"])})
        try:
            fit(recipe.model_copy(update={"training": own}), task, train, val, device="cpu")
        except Exception as error:
            (folder / f"refused{variables['RANK']}.txt").write_text(f"{type(error).__name__}: {error}")
        os._exit(0)
    fitted = fit(recipe, task, train, val, folder=folder / kind / name, device="cpu")
    loss = fitted.history[-1]["train_objective"]
    (folder / kind / f"{name}{variables.get('RANK', '')}.json").write_text(json.dumps(loss))
    os._exit(0)


children = []
for kind, target, port in json.loads(sys.argv[2]):
    (folder / kind).mkdir()
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    children += [run("two", kind, target, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]
    children.append(run("one", kind, target))
shared["MASTER_PORT"] = sys.argv[3]
children += [run("other", kind, target, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""


TASKS = {"classification": "label", "cox": "time,event", "multitask": "label; cox:time,event"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in (*TASKS, "other")]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        ports = [str(free.getsockname()[1]) for free in sockets]
    asked = json.dumps([(kind, target, port) for (kind, target), port in zip(TASKS.items(), ports[1:], strict=True)])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(folder), asked, ports[0]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.long
def test_two_processes_train_the_model_of_one(runs, kind):
    folder = runs / kind
    one, two = (load_file(folder / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-6, atol=1e-6)
    alone, first, second = (json.loads((folder / f"{name}.json").read_text()) for name in ("one", "two0", "two1"))
    assert first == second
    assert first == pytest.approx(alone, rel=0.2)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
@pytest.mark.long
def test_processes_that_would_train_different_models_are_refused(runs):
    for rank in range(2):
        told = (runs / f"refused{rank}.txt").read_text()
        assert told.startswith("ConfigError: the processes would train different models: recipe,")


STEP = {
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "gpu[03-05,07],big1", "SLURM_JOB_ID": "12345",
    "SLURM_STEP_ID": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
}  # fmt: skip


def test_tasks_of_a_batch_system_are_one_training_only_where_the_recipe_asks():
    environment = dict(STEP)
    assert _parallel._processes(environment, 1) == 1
    assert environment == STEP
    assert _parallel._processes(environment, 4) == 4
    assert {name: value for name, value in environment.items() if name not in STEP} == {
        "MASTER_ADDR": "gpu03", "MASTER_PORT": "20347", "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4",
    }  # fmt: skip


@pytest.mark.parametrize("environment", [{}, STEP, {"WORLD_SIZE": "4"}])
def test_processes_that_were_not_started_are_missed(environment):
    with pytest.raises(ConfigError, match=r"asks for 3 processes, and . started; start the command with torchrun"):
        _parallel._processes(dict(environment), 3)


@pytest.mark.parametrize(
    ("nodes", "host"), [("n1", "n1"), ("n1,n2", "n1"), ("gpu[3,5]", "gpu3"), ("a-b[001-100]", "a-b001")]
)
def test_the_first_machine_is_where_all_meet(nodes, host):
    assert _parallel.meeting_point(STEP | {"SLURM_STEP_NODELIST": nodes})[0] == host


def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda _device: None)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert own_device(torch.device("cuda")) == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device(torch.device("cuda")) == torch.device("cuda:3")
    assert own_device(torch.device("cuda:1")) == torch.device("cuda:1")
    assert own_device(torch.device("cpu")) == torch.device("cpu")
