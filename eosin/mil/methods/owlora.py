"""OWLoRA: any aggregator learns one task after another by low-rank updates that keep out of each other's way.

Lee, Lee, Kim, Kim: Continual multiple instance learning with enhanced localization for histopathological whole slide
image analysis (CoMEL), ICCV 2025, https://arxiv.org/abs/2507.02395.

1. Every linear map but heads and maps to one number is ``W x + b + Σ_i B_i (s_i ⊙ A_i x)``; at the start of a task s
   = 1, A is normal with standard deviation 1/r and B = 0. Rank r is 16, three times that where queries, keys and values
   are one map.
2. After the first task W becomes its truncated singular value decomposition with 99 % of the energy, ``U_r S_r V_r``;
   ``B_0 = U_r`` and ``A_0 = V_r`` are its basis.
3. A task trains only the newest A, B, s and its own head. Gradients become ``G_A - G_A Σ_{i<t} A_iᵀ A_i`` and ``G_B -
   Σ_{i<t} B_i B_iᵀ G_B``; the objective gains ``Σ_layers (‖A Aᵀ - 1‖² + ‖Bᵀ B - 1‖²) / r²``.
4. One head per task, its classes after those of the earlier tasks; the prediction is the most probable class of all
   heads, no task is named. Older heads stay as they are.

``eosin train --continue-from RUN`` starts the next task from a model (`eosin/mil/continual`).

Deviations from the authors' code. Its slot 0, meant for the basis of W, is random and never used, so W is not
protected; here the leading part of the basis is, with half of the energy (`protected`). The whole basis leaves no
room: the spectrum of a trained map is nearly flat, so that 99 % of its energy take most directions, and a later task
can only raise its head above the others. Three tasks in a row, learnt by ABMIL, ended at an average accuracy of 0.37
with all of it protected, 0.74 with 0.9 of the energy, 0.89 with 0.5 and with nothing, as in the authors' code
(`benchmarks/continual.py`, docs/methods.md). Adam's moments and weight decay bring forbidden directions back, so A and
B themselves are kept out of the older spans after each step. When a task ends, its update is written as a singular
value decomposition, so that ``A_iᵀ A_i`` and ``B_i B_iᵀ`` project exactly; what the task did not use takes no room.
Where no room is left, a map gets no further update. Of W that needs all its directions for 99 %, all stay; the code
drops the last. Heads are not in the optimizer after their task, and all start as torch's linear layers do, also the
first of a model that `owlora` itself trains; there that one starts like the other maps. The statistics that
standardize features are those of the first task. Layer norms stay as the first task left them.
"""

from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from eosin.errors import CheckpointError, ConfigError
from eosin.mil._attention import by_rows
from eosin.mil._checkpoint import load_model
from eosin.mil._linear import WithLinear
from eosin.mil._recipe import RECIPES, Component, Recipe, Training
from eosin.mil._standardize import Standardized, Standardizer
from eosin.mil.bags import PackedBags
from eosin.mil.options import Count, NotNegative, Share
from eosin.mil.slots import (
    AGGREGATORS,
    STRATEGIES,
    Aggregator,
    AggregatorOutput,
    EmbeddingAggregator,
    Step,
    Strategy,
    Wrapper,
)
from eosin.mil.task import Task

ENERGY = 0.99
UNUSED = 1e-6  # an update's singular values below this share of the largest are not a direction that was learnt
PROTECTED = 0.5


class GrowingHead(nn.Module):
    """A linear head per task, equation 4.

    Parameters
    ----------
    in_features : int
    classes : tuple of int
        Classes of each task.
    """

    def __init__(self, in_features: int, classes: tuple[int, ...]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(in_features, count) for count in classes)

    @property
    def weight(self) -> Tensor:
        """Of all heads, (K, E)."""
        return torch.cat([head.weight for head in self._linear()])

    @property
    def bias(self) -> Tensor:
        """Of all heads, (K,)."""
        return torch.cat([head.bias for head in self._linear()])

    def forward(self, embedding: Tensor) -> Tensor:
        """Return the logits of all classes, (B, K)."""
        return torch.cat([head(embedding) for head in self.heads], 1)

    def _linear(self) -> list[nn.Linear]:
        return [head for head in self.heads if isinstance(head, nn.Linear)]


@AGGREGATORS.register("owlora")
class UpdatedInSequence(Wrapper):
    """Another aggregator after one task or several, equations 1 and 4; standardizes features by itself.

    Parameters
    ----------
    in_dim, n_outputs
        Feature width D and logits K.
    host : str
        Name of the other aggregator; it must end in a linear classifier.
    host_options : dict
        Its options.
    classes : tuple of int or None
        Classes of each task so far, which add up to K; None is a single task.
    rank : int
        r.
    """

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        *,
        host: str = "gdat",
        host_options: dict[str, object] | None = None,
        classes: tuple[Count, ...] | None = None,
        rank: Count = 16,
    ) -> None:
        counts = (n_outputs,) if classes is None else classes
        if sum(counts) != n_outputs:
            raise ConfigError(f"owlora: classes {counts} do not add up to the task's {n_outputs}")
        inner = AGGREGATORS.build(host, in_dim, n_outputs, options=host_options or {})
        head = getattr(inner, "classifier", None)
        if not isinstance(head, nn.Linear) or head.out_features != n_outputs:
            raise ConfigError(
                f"owlora: {host} does not end in one linear classifier that could grow; choose another host"
            )
        if len(counts) > 1:
            _require_growth(host, inner, host_options or {})
        super().__init__(in_dim, n_outputs, inner)
        inner.classifier = GrowingHead(head.in_features, counts)
        self.standardizer = Standardizer(in_dim)
        self.host = inner
        self.rank = rank
        self.layers = _replace_linear(inner)
        for number in range(1, len(counts)):
            self._add_update(number)

    @property
    @override
    def inner(self) -> Aggregator:
        return self.host

    @override
    def prepare(self, bags: PackedBags) -> PackedBags:
        prepared: PackedBags = self.standardizer(bags)
        return prepared

    @override
    def forward(self, bags: PackedBags) -> AggregatorOutput:
        if isinstance(self.host, EmbeddingAggregator):  # standardized features of a large bag never exist all at once
            embed = self.host.embed
            embedded = by_rows(lambda values: embed(self.standardizer.rows(values)), bags.values)
            return self.host.aggregate(bags.with_values(embedded))
        return super().forward(bags)

    @property
    def n_tasks(self) -> int:
        """Tasks so far."""
        return len(self._heads())

    def updated(self) -> "list[OrthogonalLora]":
        """Return the maps that have updates."""
        return [layer for layer in map(self.host.get_submodule, self.layers) if isinstance(layer, OrthogonalLora)]

    def _heads(self) -> nn.ModuleList:
        head = self.host.classifier
        assert isinstance(head, GrowingHead)  # built so
        return head.heads

    def _add_update(self, head: int) -> None:
        self.requires_grad_(False)
        self._heads()[head].requires_grad_(True)
        for name, layer in zip(self.layers, self.updated(), strict=True):
            layer.add_task(3 * self.rank if name.endswith("qkv") else self.rank)

    @torch.no_grad()
    def take_over(self, model: Aggregator, *, energy: float = ENERGY, protected: float = PROTECTED) -> None:
        """Take the weights of the model of the tasks before the last, and leave the last as if it began now.

        Parameters
        ----------
        model : Aggregator
            An `UpdatedInSequence` of one task less, or, for the second task, the host as it was trained; standardized
            or not.
        energy : float
            Equation 2.
        protected : float
            Share of W's energy in the part of its basis that later updates keep out of.

        Raises
        ------
        ConfigError
            If it is another model.
        """
        model = model.aggregator if isinstance(model, WithLinear) else model
        plain = model.aggregator if isinstance(model, Standardized) else model
        fresh = self.n_tasks == 2 and not isinstance(plain, UpdatedInSequence)
        weights = self._renamed(plain.state_dict()) if fresh else plain.state_dict()
        own = self.state_dict()
        if any(name not in own or own[name].shape != value.shape for name, value in weights.items()):
            raise ConfigError(
                f"owlora: {type(plain).__name__} is not the model of {self.n_tasks - 1} tasks before this one"
            )
        self.load_state_dict(weights, strict=False)
        if isinstance(model, Standardized):
            self.standardizer.load_state_dict(model.standardizer.state_dict())
        for layer in self.updated():
            if len(layer.down) == 1:
                layer.truncate(energy, protected=protected)
            else:
                layer.close_task(-2)
            layer.keep_out()

    def _renamed(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of a plain host under the names that they have here."""
        names = {name: f"host.{name}" for name in weights}
        for layer in self.layers:
            for part in ("weight", "bias"):
                names[f"{layer}.{part}"] = f"host.{layer}.base.{part}"
        for part in ("weight", "bias"):
            names[f"classifier.{part}"] = f"host.classifier.heads.0.{part}"
        return {names[name]: value for name, value in weights.items()}


def _require_growth(host: str, inner: Aggregator, options: dict[str, object]) -> None:
    """Refuse a host of which more than the classifier depends on the number of classes."""
    with torch.random.fork_rng(devices=[]):
        larger = AGGREGATORS.build(host, inner.in_dim, inner.n_outputs + 1, options=options).state_dict()
    grown = [name for name, value in inner.state_dict().items() if value.shape != larger[name].shape]
    others = [name for name in grown if not name.startswith("classifier.")]
    if others:
        raise ConfigError(f"owlora: {others[0]} of {host} has a size that depends on the classes; choose another host")


def _replace_linear(host: nn.Module) -> tuple[str, ...]:
    """Put an `OrthogonalLora` in the place of each linear map to more than one number; return their names."""
    names = tuple(
        name
        for name, layer in host.named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features > 1 and not name.startswith("classifier.")
    )
    for name in names:
        parent, _, leaf = name.rpartition(".")
        layer = host.get_submodule(name)
        assert isinstance(layer, nn.Linear)  # chosen so
        setattr(host.get_submodule(parent), leaf, OrthogonalLora(layer, energy=None))
    return names


@STRATEGIES.register("owlora")
class TrainNewestUpdate(Strategy):
    """The plain step for the newest update and head of a model, equation 3.

    Parameters
    ----------
    model : Aggregator
        An `UpdatedInSequence`.
    task : Task
    continue_from : path or None
        Folder of the model of the tasks before; needed from the second task on.
    model_id : str
        Its id, checked when given.
    energy : float
        Equation 2.
    protected : float
        Share of W's energy in the part of its basis that updates keep out of: 1 is the whole basis, 0 nothing, which is
        what the authors' code comes to.
    penalty : float
        Weight of the penalty.
    """

    def __init__(
        self,
        model: Aggregator,
        task: Task,
        *,
        continue_from: Path | None = None,
        model_id: str = "",
        energy: Annotated[float, Field(gt=0, le=1)] = ENERGY,
        protected: Share = PROTECTED,
        penalty: NotNegative = 1.0,
    ) -> None:
        super().__init__(model, task)
        if not isinstance(model, UpdatedInSequence):
            raise ConfigError(
                f"the strategy owlora needs the aggregator owlora, not {type(model).__name__}; set both in the recipe"
            )
        if (continue_from is None) != (model.n_tasks == 1):
            raise ConfigError(
                "owlora: continue_from names the model before the last task; use eosin train --continue-from"
            )
        self.penalty = penalty
        self.updates = model.updated() if model.n_tasks > 1 else []
        if continue_from is not None:
            model.take_over(_saved(continue_from, model_id), energy=energy, protected=protected)
        for layer in self.updates:
            layer.down[-1].register_hook(layer.outside_down)
            layer.up[-1].register_hook(layer.outside_up)

    def forward(self, bags: PackedBags, target: Tensor) -> Step:
        """Run the model; the penalty is 0 in the first task."""
        output = self.model(bags)
        if not self.updates:
            return Step(output, bags)
        penalties = torch.stack([layer.penalty() for layer in self.updates])
        return Step(output, bags, {"orthogonality": self.penalty * penalties.sum()})

    def after_step(self, step: Step) -> None:
        """Keep the newest update out of the older ones, whatever the optimizer added."""
        for layer in self.updates:
            layer.keep_out()


def _saved(folder: Path, model_id: str) -> Aggregator:
    model, card = load_model(folder)
    if model_id and card.model_id != model_id:
        raise CheckpointError(folder, f"holds model {card.model_id}, not {model_id} from which this training continued")
    return model


class OrthogonalLora(nn.Module):
    """A linear layer with low-rank updates, one per task, of which the newest is trained; equations 1 to 3.

    Parameters
    ----------
    base : Linear
        W and b; trained until the first update is added.
    energy : float or None
        Share of W's squared singular values that its basis keeps, see `truncated_basis`; None: W stays as it is and
        has no basis yet.

    Attributes
    ----------
    basis_up, basis_down : (out, m), (m, in)
        ``B_0`` and ``A_0``, zeros beyond the rank of W; m is the smaller of both widths.
    """

    basis_up: Tensor
    basis_down: Tensor

    def __init__(self, base: nn.Linear, *, energy: float | None = ENERGY) -> None:
        super().__init__()
        self.base = base
        m = min(base.weight.shape)
        self.register_buffer("basis_up", base.weight.new_zeros(base.out_features, m))
        self.register_buffer("basis_down", base.weight.new_zeros(m, base.in_features))
        self.down, self.up, self.scales = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        if energy is not None:
            self.truncate(energy)

    @property
    def weight(self) -> Tensor:
        """The map with all updates, (out, in), for code that reads weights."""
        updates = zip(self.down, self.up, self.scales, strict=True)
        return self.base.weight + sum((up * scales @ down for down, up, scales in updates), torch.zeros(()))

    @property
    def bias(self) -> Tensor | None:
        """b."""
        return self.base.bias

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.base.out_features

    @torch.no_grad()
    def truncate(self, energy: float, *, protected: float = 1.0) -> None:
        """Replace W by its truncated decomposition and keep its basis, or the part with less energy, equation 2."""
        up, values, down = truncated_basis(self.base.weight, energy)
        self.base.weight.copy_(up * values @ down)
        kept = n_leading(values, protected)
        self.basis_up.zero_()[:, :kept] = up[:, :kept]
        self.basis_down.zero_()[:kept] = down[:kept]

    def add_task(self, rank: int) -> None:
        """Freeze all there is, and add an update of this rank, or as far as it fits, that changes nothing yet."""
        self.requires_grad_(False)
        like = self.base.weight
        rank = min(rank, *like.shape)
        self.down.append(nn.Parameter(like.new_empty(rank, like.shape[1]).normal_(std=1 / rank)))
        self.up.append(nn.Parameter(like.new_zeros(like.shape[0], rank)))
        self.scales.append(nn.Parameter(like.new_ones(rank)))

    def forward(self, values: Tensor) -> Tensor:
        """Return ``W x + b`` and all updates."""
        out: Tensor = self.base(values)
        for down, up, scales in zip(self.down, self.up, self.scales, strict=True):
            out = out + functional.linear(functional.linear(values, down) * scales, up)
        return out

    def penalty(self) -> Tensor:
        """Return how far the newest update is from orthonormal."""
        down, up = self.down[-1], self.up[-1]
        eye = torch.eye(len(down), dtype=down.dtype, device=down.device)
        squares: Tensor = (down @ down.mT - eye).square().sum() + (up.mT @ up - eye).square().sum()
        return squares / len(down) ** 2

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Take what lies in the spans of the basis and of older updates out of the newest update's gradients."""
        down, up = self.down[-1], self.up[-1]
        if down.grad is not None:
            down.grad = self.outside_down(down.grad)
        if up.grad is not None:
            up.grad = self.outside_up(up.grad)

    @torch.no_grad()
    def keep_out(self) -> None:
        """Take the same out of the newest update itself."""
        self.down[-1].copy_(self.outside_down(self.down[-1]))
        self.up[-1].copy_(self.outside_up(self.up[-1]))

    def outside_down(self, rows: Tensor) -> Tensor:
        """Return (r, in) without what lies in the rows of the basis and of older A."""
        return rows - sum((rows @ old.mT @ old for old in (self.basis_down, *self.down[:-1])), torch.zeros_like(rows))

    def outside_up(self, columns: Tensor) -> Tensor:
        """Return (out, r) without what lies in the columns of the basis and of older B."""
        older = (self.basis_up, *self.up[:-1])
        return columns - sum((old @ (old.mT @ columns) for old in older), torch.zeros_like(columns))

    @torch.no_grad()
    def close_task(self, number: int = -1) -> None:
        """Write an update, the newest unless told, as a singular value decomposition; the map stays the same."""
        down, up, scales = self.down[number], self.up[number], self.scales[number]
        basis_up, core_up = torch.linalg.qr(up.double())
        basis_down, core_down = torch.linalg.qr(down.double().mT)
        left, values, right = torch.linalg.svd(core_up * scales.double() @ core_down.mT)
        used = values > UNUSED * values.amax().clamp_min(torch.finfo(values.dtype).tiny)
        up.copy_(basis_up @ left * used)
        down.copy_(right @ basis_down.mT * used[:, None])
        scales.copy_(values * used)


def truncated_basis(weight: Tensor, energy: float = ENERGY) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular vectors and values of a matrix: the fewest whose squares exceed a share of all.

    Returns
    -------
    up : (out, r)
    values : (r,)
    down : (r, in)
    """
    up, values, down = torch.linalg.svd(weight.detach(), full_matrices=False)
    rank = n_leading(values, energy)
    return up[:, :rank], values[:rank], down[:rank]


def n_leading(values: Tensor, energy: float) -> int:
    """Return how many leading singular values have squares that exceed a share of all; 0 for a share of 0."""
    if not energy:
        return 0
    share = values.square().cumsum(0) / values.square().sum()
    return min(len(values), int((share <= energy).sum()) + 1)


RECIPE = Recipe(
    aggregator=Component(name="owlora", options={"host": "gdat"}),
    strategy=Component(name="owlora"),
    training=Training(optimizer="adam", lr=1e-4, weight_decay=1e-5, epochs=100, patience=0, schedule="cosine"),
)
RECIPES.add("owlora", RECIPE)
