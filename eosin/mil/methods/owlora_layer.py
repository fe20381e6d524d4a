"""The linear map of OWLoRA: frozen weights with their basis, and low-rank updates that keep out of each other's way.

Equations 1 to 3 and the deviations from the authors' code stand in `eosin/mil/methods/owlora.py`, which puts these maps
in the place of an aggregator's own and trains them.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

ENERGY = 0.99
UNUSED = 1e-6  # an update's singular values below this share of the largest are not a direction that was learnt


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
