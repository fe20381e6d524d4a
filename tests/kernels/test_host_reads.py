"""No step of a training waits for a GPU to read a value back: the whole step on a GPU that is pretended."""

import pytest
import torch
from pretended_gpu import OnGpu, PretendedGpu, Waits, may_wait

import eosin.mil.methods  # noqa: F401 (registers)
from eosin import kernels
from eosin.mil._objective import Objective
from eosin.mil._recipe import RECIPES
from eosin.mil.bags import PackedBags
from eosin.mil.methods import patch_gcn, wikg
from eosin.mil.slots import AGGREGATORS
from eosin.mil.tasks._classification import Classification
from eosin.mil.tasks._survival import DiscreteSurvival

DIM, LENGTHS = 16, (70, 1, 33)


@pytest.fixture(autouse=True)
def _triton_is_there(monkeypatch):
    monkeypatch.setattr("eosin.kernels._dispatch.HAS_TRITON", True)  # its operators run by their torch path


def task_of(recipe):
    tasks = {
        "grades": Classification(classes=tuple("012345")),
        "survival": DiscreteSurvival(bins=4, edges=(1.0, 2.0, 3.0)),
    }
    return tasks.get(recipe.strategy.options.get("labels"), Classification(classes=("a", "b", "c")))


def objective_of(recipe, task):
    model = AGGREGATORS.build(recipe.aggregator.name, DIM, task.n_outputs, options=recipe.aggregator.options)
    return Objective(recipe, model, task).train()


def to_gpu(module):
    there = {}
    for part in module.modules():
        for name, value in [*part._parameters.items(), *part._buffers.items()]:
            if value is not None:
                if id(value) not in there:
                    there[id(value)] = value.detach().to("cuda").requires_grad_(value.requires_grad)
                (part._parameters if name in part._parameters else part._buffers)[name] = there[id(value)]


@pytest.mark.parametrize("name", list(RECIPES))
def test_no_step_reads_a_value_on_the_host(name, monkeypatch):
    recipe = RECIPES[name]
    selected = []
    select = may_wait(PackedBags.select)  # how many are left is known to the device alone; its docstring says so
    monkeypatch.setattr(PackedBags, "select", lambda *given: selected.append(1) or select(*given))
    for module in (patch_gcn, wikg):  # places are searched by a tree, on the host, once per step
        monkeypatch.setattr(module, "nearest_tiles", may_wait(module.nearest_tiles))
    task = task_of(recipe)
    objective = objective_of(recipe, task)
    targets = (
        torch.tensor([[1.0, 1], [2, 0], [3, 1]]).double() if isinstance(task, DiscreteSurvival) else torch.arange(3)
    )
    places = [torch.stack([torch.arange(n) * 1.0] * 2, 1) for n in LENGTHS]
    host = PackedBags.pack([torch.randn(n, DIM) for n in LENGTHS], places=places)
    with PretendedGpu():
        to_gpu(objective)
        objective.start_step(0.5)
        total, _, _ = objective(host.to("cuda"), targets.to("cuda"))
        assert isinstance(total, OnGpu)
        total.backward()
    assert len(selected) == (recipe.strategy.name == "mhim")


def test_a_read_is_noticed():
    with PretendedGpu():
        there = torch.zeros(3, device="cuda")
        for read in (there[0].item, there.tolist, there.cpu, lambda: bool(there[0] > 1), lambda: there[there > 0]):
            with pytest.raises(Waits):
                read()
        with pytest.raises(Waits):
            kernels.segment_mean(torch.zeros(3, 2, device="cuda"), torch.tensor([0, 3], dtype=torch.int32).to("cuda"))
        assert kernels.segment_mean(torch.zeros(3, 2, device="cuda"), kernels.bag_offsets([3], "cuda")).is_cuda
