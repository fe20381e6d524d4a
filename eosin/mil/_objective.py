"""What training minimises, put together from the three slots."""

import torch
from torch import Tensor, nn

from eosin.mil._recipe import Recipe
from eosin.mil.bags import PackedBags
from eosin.mil.slots import LOSS_TERMS, STRATEGIES, Aggregator, Step, Strategy
from eosin.mil.task import Task


class Objective(nn.Module):
    """What is minimised: the strategy's step, the task's loss and the loss terms, with all their parameters.

    Parameters
    ----------
    recipe : Recipe
    model : Aggregator
    task : Task
    """

    def __init__(self, recipe: Recipe, model: Aggregator, task: Task) -> None:
        super().__init__()
        self.strategy: Strategy = STRATEGIES.build(recipe.strategy.name, model, task, options=recipe.strategy.options)
        self.terms = nn.ModuleList(
            LOSS_TERMS.build(term.name, model, task, options=term.options) for term in recipe.terms
        )
        self._names = [term.name for term in recipe.terms]
        self._weights = [term.weight for term in recipe.terms]
        self._bag_weight = recipe.bag_weight
        self._task = task
        self.bag_losses = torch.zeros(0)

    def forward(
        self, bags: PackedBags, target: Tensor, weights: Tensor | None = None
    ) -> tuple[Tensor, Step, dict[str, Tensor]]:
        """Return the objective, the step, and each part by name; `weights` (B,) weigh the bag losses."""
        step: Step = self.strategy(bags, target)
        losses = self._task.bag_losses(step.output.logits, target)
        self.bag_losses = losses.detach()
        bag = losses.mean() if weights is None else (losses * weights).mean()
        parts = {"bag": bag, **step.extra}
        total = self._bag_weight * bag + sum(step.extra.values(), start=torch.zeros_like(bag))
        for name, weight, term in zip(self._names, self._weights, self.terms, strict=True):
            parts[name] = term(step.output, step.bags, target)
            total = total + weight * parts[name]
        return total, step, {name: part.detach() for name, part in parts.items()}

    def start_step(self, progress: float) -> None:
        """Tell the strategy and the terms which fraction of the training is done."""
        for part in (self.strategy, *self.terms):
            part.start_step(progress)
