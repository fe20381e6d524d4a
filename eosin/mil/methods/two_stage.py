"""Two stages: attention at a low magnification chooses the tiles that a second model sees at a higher one.

Li, Li, Gertych, Knudsen, Speier, Arnold: An attention-based multi-resolution model for prostate whole slide image
classification and localization, 2019, https://arxiv.org/abs/1905.13208.

1. Both stages: ``a = softmax(w tanh(V h))``, ``z = Σ a h``, ``logits = W z + b``; cross-entropy.
2. Instance dropout (strategy `instance_dropout`): in training each tile is replaced, with probability p, by the mean
   of the data, so that the number of tiles stays the same.
3. Selection (`eosin.mil._selection.select_tiles`): principal components of a slide's features, k-means, saliency of a
   cluster = its mean weight ``ā_c``; of a budget B cluster c gives ``round(B ā_c / Σ ā)`` tiles, at most its own
   number, what is left over goes to the next most salient; within a cluster the most attended first.
4. A tile at the low magnification covers ratio × ratio tiles at the higher one (`child_grid`).

``eosin run --recipe two_stage`` runs both stages; ``eosin tile --from RUN --mpp 1.0 --budget 64`` is the step between
the stages. Both take care that the tiles of a slide are chosen by first-stage models that have not seen its patient:
a model that has been trained on a slide attends there to what it remembers, and the second stage would learn from that.

Deviations from the authors. The constants (p = ½, 32 components, 4 clusters) are not printed in what could be read and
are options. The mean of the data is 0 in standardized features, which is what replaces a tile here; the authors
replace pixels before their network. The number of tiles changes a raw weight, but neither quotas nor ranks within a
slide. Features are frozen in both stages; the authors train their networks end to end. The second stage reads every
slide: a slide that the first one misses is not lost, and benign is a class like others. The authors grade only what
the first calls cancer. Components and clusters of a slide with more than 10,000 tiles are fitted to that many, evenly
spaced.
"""

import torch
from torch import Tensor

from eosin.mil._recipe import RECIPES, Component, Recipe, Training
from eosin.mil.bags import PackedBags
from eosin.mil.options import Dropout
from eosin.mil.slots import STRATEGIES, Aggregator, Step, Strategy
from eosin.mil.task import Task


@STRATEGIES.register("instance_dropout")
class InstanceDropout(Strategy):
    """Replace instances by the mean of the standardized features while training, equation 2.

    Parameters
    ----------
    model : Aggregator
    task : Task
    p : float
        Chance of an instance to be replaced.
    """

    def __init__(self, model: Aggregator, task: Task, *, p: Dropout = 0.5) -> None:
        super().__init__(model, task)
        self.p = p

    def forward(self, bags: PackedBags, target: Tensor) -> Step:
        """Replace and run the model."""
        keep = torch.rand(bags.n_instances, 1, device=bags.values.device) >= self.p
        dropped = bags.with_values(bags.values * keep)
        return Step(self.model(dropped), dropped)


RECIPE = Recipe(
    aggregator=Component(name="abmil", options={"gated": False, "dropout": 0.0}),
    strategy=Component(name="instance_dropout"),
    training=Training(optimizer="adam", lr=1e-4, weight_decay=1e-5, epochs=50, patience=10, schedule="constant"),
)
RECIPES.add("two_stage", RECIPE)
