"""Attention scores by blocks of rows: nothing of size (N, A) outlives its block, in the forward or the backward pass.

The backward pass projects each block again. Products run in the wider of the instances' and the parameters' types,
the gate and all sums over instances in float32 at least.
"""

from typing import Any

import torch
from torch import Tensor

from eosin.kernels._checks import accumulation_dtype
from eosin.kernels.gated_attention import reference
from eosin.kernels.gated_attention.dropout import keep_mask

ROWS = 8192  # rows per block: 16 MB of float32 projections at A = 256


def gated_attention_scores(
    values: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    u_weight: Tensor | None,
    u_bias: Tensor | None,
    w_weight: Tensor,
    w_bias: Tensor | None,
    *,
    gate_dropout: float = 0.0,
    seed: int = 0,
    activation: str = "tanh",
) -> Tensor:
    """Score every instance for every head, as `reference.gated_attention_scores`."""
    tensors = (values, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias)
    scores: Tensor = _GatedScores.apply(*tensors, gate_dropout, seed, activation)
    return scores


class _GatedScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        tensors, (dropout, seed, activation) = arguments[:7], arguments[7:]
        gate = Gate(*tensors[1:6], dropout=dropout, seed=seed, activation=activation, like=tensors[0])
        values, w_weight, w_bias = tensors[0], tensors[5], tensors[6]
        scores: Tensor = values.new_empty((len(values), len(w_weight)), dtype=gate.dtype)
        for first in range(0, len(values), ROWS):
            hidden = gate.hidden(values[first : first + ROWS], first)
            torch.mm(hidden, w_weight.to(gate.dtype).T, out=scores[first : first + ROWS])
        ctx.save_for_backward(*tensors)
        ctx.options = dropout, seed, activation
        if w_bias is not None:
            scores += w_bias
        return scores

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[:7]
        if torch.is_grad_enabled():  # a second derivative is asked for
            return *_composite_gradient(needs, grad, tensors, ctx.options), None, None, None
        return *_chunked_gradient(needs, grad, tensors, ctx.options), None, None, None


class Gate:
    """The hidden layer of the attention for one block of rows at a time, and its derivative.

    Parameters
    ----------
    v_weight, v_bias, u_weight, u_bias, w_weight
        As in the public function; the two projections run as one product.
    dropout, seed, activation
        As in the reference.
    like : (N, D) Tensor
        The instances, for the type of the products.
    """

    def __init__(
        self,
        v_weight: Tensor,
        v_bias: Tensor | None,
        u_weight: Tensor | None,
        u_bias: Tensor | None,
        w_weight: Tensor,
        *,
        dropout: float,
        seed: int,
        activation: str,
        like: Tensor,
    ) -> None:
        self.width = len(v_weight)
        self.gated = u_weight is not None
        self.dropout, self.seed, self.activation = dropout, seed, activation
        self.product_dtype = torch.promote_types(like.dtype, v_weight.dtype)
        self.dtype = accumulation_dtype(self.product_dtype)
        stacked = v_weight if u_weight is None else torch.cat([v_weight, u_weight])
        self.weight = stacked.to(self.product_dtype)  # (A or 2A, D)
        self.w_weight = w_weight.to(self.dtype)
        self.bias = self._stacked_bias(v_bias, u_bias)

    def _stacked_bias(self, v_bias: Tensor | None, u_bias: Tensor | None) -> Tensor | None:
        if v_bias is None and u_bias is None:
            return None
        parts = [v_bias, u_bias] if self.gated else [v_bias]
        zeros = self.weight.new_zeros(self.width, dtype=self.dtype)
        return torch.cat([zeros if part is None else part.to(self.dtype) for part in parts])

    def branches(self, rows: Tensor, first: int) -> tuple[Tensor, Tensor | None]:
        """Return act(V x + b) and σ(U x + b) of a block, before dropout: (n, D) -> (n, A), (n, A)."""
        projected = (rows.to(self.product_dtype) @ self.weight.T).to(self.dtype)
        if self.bias is not None:
            projected += self.bias
        hidden = projected[:, : self.width]
        hidden = hidden.tanh_() if self.activation == "tanh" else hidden.relu_()
        return hidden, projected[:, self.width :].sigmoid_() if self.gated else None

    def hidden(self, rows: Tensor, first: int) -> Tensor:
        """Return the gated hidden layer of a block whose first row is ``first`` in the pack: (n, D) -> (n, A)."""
        hidden, gate = self.branches(rows, first)
        scale = self._dropout_scales(len(rows), first)
        if gate is not None:
            hidden = hidden * gate
        return hidden if scale is None else hidden * scale

    def derivative(self, rows: Tensor, first: int, d_scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return the hidden layer and the gradient of the projections: -> (n, A), (n, A or 2A)."""
        hidden, gate = self.branches(rows, first)
        scale = self._dropout_scales(len(rows), first)
        d_hidden = d_scores @ self.w_weight
        if scale is not None:
            d_hidden *= scale
        slope = 1 - hidden * hidden if self.activation == "tanh" else (hidden > 0).to(self.dtype)
        if gate is None:
            layer, d_projected = hidden, d_hidden * slope
        else:
            layer = hidden * gate
            d_projected = torch.cat([d_hidden * gate * slope, d_hidden * layer * (1 - gate)], dim=1)
        return (layer if scale is None else layer * scale), d_projected

    def _dropout_scales(self, n_rows: int, first: int) -> Tensor | None:
        """Return what dropout multiplies the product of the branches with; tanh and σ are dropped apart."""
        if self.dropout == 0:
            return None
        scale = torch.ones((), dtype=self.dtype, device=self.weight.device)
        for branch in range(1 + self.gated):
            keep = keep_mask(
                self.seed,
                n_rows,
                self.width,
                self.dropout,
                branch=branch,
                device=self.weight.device,
                first_row=first,
            )
            scale = scale * keep / (1 - self.dropout)
        return scale


def _chunked_gradient(
    needs: tuple[bool, ...], grad: Tensor, tensors: tuple[Any, ...], options: tuple[float, int, str]
) -> tuple[Tensor | None, ...]:
    values, v_weight, v_bias, u_weight, u_bias, w_weight = tensors[:6]
    dropout, seed, activation = options
    gate = Gate(
        v_weight, v_bias, u_weight, u_bias, w_weight, dropout=dropout, seed=seed, activation=activation, like=values
    )
    d_values = torch.empty_like(values) if needs[0] else None
    d_weight = torch.zeros_like(gate.weight, dtype=gate.dtype)
    d_bias = d_weight.new_zeros(len(d_weight))
    d_w = torch.zeros_like(gate.w_weight)
    for first in range(0, len(values), ROWS):
        block = slice(first, first + ROWS)
        hidden, d_projected = gate.derivative(values[block], first, grad[block])
        d_w.addmm_(grad[block].T, hidden)
        d_bias += d_projected.sum(0)
        narrow = d_projected.to(gate.product_dtype)
        d_weight += narrow.T @ values[block].to(gate.product_dtype)
        if d_values is not None:
            d_values[block] = narrow @ gate.weight
    found = (
        d_values,
        d_weight[: gate.width],
        d_bias[: gate.width],
        d_weight[gate.width :],
        d_bias[gate.width :],
        d_w,
        grad.sum(0),
    )
    return tuple(
        gradient.to(tensor.dtype) if need and tensor is not None and gradient is not None else None
        for need, tensor, gradient in zip(needs, tensors, found, strict=True)
    )


def _composite_gradient(
    needs: tuple[bool, ...], grad: Tensor, tensors: tuple[Any, ...], options: tuple[float, int, str]
) -> tuple[Tensor | None, ...]:
    dropout, seed, activation = options
    scores = reference.gated_attention_scores(*tensors, gate_dropout=dropout, seed=seed, activation=activation)
    wanted = [tensor for tensor, need in zip(tensors, needs, strict=True) if need]
    found = iter(torch.autograd.grad(scores, wanted, grad, create_graph=True))
    return tuple(next(found) if need else None for need in needs)
