import pytest
import torch

from eosin.features._bag import FeatureSpec
from eosin.mil._cohort import Cohort
from eosin.mil._data import MemoryBags, make_examples
from eosin.mil._tables import LabelTable
from eosin.mil.task import make_task

DIM = 12


class Toy:
    """A separable cohort: positive bags hold one instance that is shifted in a few features."""

    def __init__(self, n_bags=60, *, kind="classification", n_classes=2, per_patient=1, shift=5.0, seed=0):
        generator = torch.Generator().manual_seed(seed)
        bags, labels = {}, []
        for number in range(n_bags):
            label = number % n_classes
            bag = torch.randn(int(torch.randint(2, 9, (), generator=generator)), DIM, generator=generator)
            if label:
                bag[0, 3 * label : 3 * label + 3] += shift
            bags[f"s{number:03d}"] = bag
            labels.append(f"c{label}")
        ids = tuple(bags)
        patients = tuple(f"p{number // (n_classes * per_patient)}-{labels[number]}" for number in range(n_bags))
        self.table = LabelTable(ids, patients, {"label": tuple(labels)})
        self.task = make_task(kind, self.table.rows())
        self.bags = MemoryBags(bags, FeatureSpec(encoder="toy", dim=DIM))
        self.examples = make_examples(self.bags, self.table, self.task)
        self.cohort = Cohort(ids, patients, tuple(labels))

    def parts(self, n_val=20):
        ids = self.examples.ids
        return self.examples.subset(ids[:-n_val]), self.examples.subset(ids[-n_val:])


@pytest.fixture
def toy():
    return Toy()


@pytest.fixture
def make_toy():
    return Toy
