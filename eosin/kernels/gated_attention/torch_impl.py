"""Attention scores and pooling by blocks of rows: nothing of size (N, A) outlives its block unless asked to.

Each block is projected, gated, scored and added to its bags' running sums while it is in the cache. The state of a
bag is (m, l, e, Z) = (max s, Σ e^(s-m), Σ e^(s-m)(s-m), Σ e^(s-m) h), and two states merge associatively. The backward
pass goes over the same blocks; what was not kept is computed again. Products run in one type, the gate's derivative,
the softmax and all sums over instances in float32 at least.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from eosin.kernels._affine_gradient import AffineGradient, product_into
from eosin.kernels._bags import NEVER
from eosin.kernels._checks import accumulation_dtype, host_offsets
from eosin.kernels._dropout import GATE_BRANCH, drop_, gate_probability
from eosin.kernels._memory import new_tensor
from eosin.kernels._products import affine, product, transposed_product
from eosin.kernels._rows import Rows, blocks, longest_block
from eosin.kernels.embedding.torch_impl import Embedding


@dataclass(frozen=True)
class Gate:
    """The hidden layer of the attention for one block of rows at a time, and its derivative.

    Parameters
    ----------
    v_weight, v_bias, u_weight, u_bias, w_weight, w_bias
        As in the public function, the first and third in the type of the products.
    dropout, seed, activation
        As in the reference.
    """

    v_weight: Tensor
    v_bias: Tensor | None
    u_weight: Tensor | None
    u_bias: Tensor | None
    w_weight: Tensor
    w_bias: Tensor | None
    dropout: float
    seed: int
    activation: str

    @classmethod
    def make(
        cls, parameters: tuple[Tensor | None, ...], dropout: float, seed: int, activation: str, dtype: torch.dtype
    ) -> "Gate":
        """Return the hidden layer from its six tensors in any type; products run in ``dtype``."""
        wide = accumulation_dtype(dtype)
        kinds = (dtype, wide, dtype, wide, wide, wide)
        v_weight, v_bias, u_weight, u_bias, w_weight, w_bias = (
            None if tensor is None else tensor.to(kind) for tensor, kind in zip(parameters, kinds, strict=True)
        )
        assert v_weight is not None
        assert w_weight is not None
        return cls(v_weight, v_bias, u_weight, u_bias, w_weight, w_bias, dropout, seed, activation)

    def branches(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return act(V h + b) and σ(U h + b) before dropout, in the type of the products: -> (n, A), (n, A)."""
        hidden = affine(rows, self.v_weight, self.v_bias, self.activation)
        return hidden, None if self.u_weight is None else affine(rows, self.u_weight, self.u_bias, "sigmoid")

    def scores(self, hidden: Tensor, gate: Tensor | None, first: int) -> Tensor:
        """Return the raw scores of a block from its branches: (n, A), (n, A) -> (n, H)."""
        layer = self.layer(hidden, gate, torch.empty_like(hidden), first)
        scores = layer.to(self.w_weight.dtype) @ self.scaled_w.T
        return scores if self.w_bias is None else scores.add_(self.w_bias)

    def through_activation(self, gradient: Tensor, hidden: Tensor) -> Tensor:
        """Turn the gradient of act(x) into that of x, in place, from act(x): (n, A), (n, A) -> (n, A)."""
        if self.activation == "relu":
            torch.ops.aten.threshold_backward.grad_input(gradient, hidden, 0, grad_input=gradient)
        else:
            torch.ops.aten.tanh_backward.grad_input(gradient, hidden, grad_input=gradient)
        return gradient

    @property
    def drop_probability(self) -> float:
        """How often dropout drops an entry of the layer that w reads, the product of both branches."""
        return gate_probability(self.dropout, gated=self.u_weight is not None)

    @property
    def scaled_w(self) -> Tensor:
        """w times what dropout scales kept entries with."""
        return self.w_weight / (1 - self.drop_probability)

    def layer(self, hidden: Tensor, gate: Tensor | None, place: Tensor, first: int) -> Tensor:
        """Return what w reads, in the place given unless it is there: (n, A), (n, A) -> (n, A)."""
        if gate is not None:
            return self.drop_(torch.mul(hidden, gate, out=place), first)
        return self.drop_(place.copy_(hidden), first) if self.dropout else hidden

    def drop_(self, layer: Tensor, first: int) -> Tensor:
        """Drop entries of a block of what w reads, in place and without scaling the others: (n, A)."""
        if self.dropout:
            drop_(layer, self.seed, self.drop_probability, branch=GATE_BRANCH, first_row=first)
        return layer


@dataclass(frozen=True)
class Masks:
    """What turns raw scores into scores: ``s = r / temperature + added``, -inf where not kept."""

    temperature: Tensor
    added: Tensor | None
    keep: Tensor | None

    def scores(self, raw: Tensor, block: slice) -> Tensor:
        """Return the scores of a block from its raw ones."""
        scores = raw / self.temperature
        if self.added is not None:
            scores += _per_head(self.added[block])
        return scores if self.keep is None else scores.masked_fill_(~_per_head(self.keep[block]), NEVER)

    def unmasked(self, scores: Tensor) -> Tensor:
        """Return ``r / temperature`` from the scores, 0 where an instance is dropped."""
        unmasked = scores if self.added is None else scores - _per_head(self.added)
        return torch.where(scores == NEVER, 0, unmasked)

    def gradients(self, d_scores: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of what is added to all raw scores of a head, of the temperature and of the mask."""
        d_raw = d_scores / self.temperature
        one_mask = self.added is not None and self.added.dim() == 1
        d_temperature = -(d_raw * self.unmasked(scores)).sum()
        return d_raw.sum(0), d_temperature, d_scores.sum(1) if one_mask else d_scores

    def passed(self, d_scores: Tensor, block: slice) -> Tensor:
        """Return the gradient of a block's scores with nothing where an instance is dropped."""
        return d_scores if self.keep is None else d_scores.masked_fill_(~_per_head(self.keep[block]), 0)


class GateGradients:
    """Running sums of the gradients of a gate's parameters, V and U in one matrix (2A, E).

    What a block needs beside its branches has its place for all blocks: memory that is new for each costs as much as
    the arithmetic.

    Parameters
    ----------
    gate : Gate
        The hidden layer.
    n_rows : int
        Rows of the longest block.
    """

    def __init__(self, gate: Gate, n_rows: int) -> None:
        self.gate = gate
        self.projections = gate.v_weight if gate.u_weight is None else torch.cat([gate.v_weight, gate.u_weight])
        self.sums = AffineGradient(self.projections, gate.w_weight.dtype)
        self._w_weight = torch.zeros_like(gate.w_weight)
        self._narrow_w = gate.scaled_w.to(gate.v_weight.dtype)
        self._layer, self._d_layer = (gate.v_weight.new_empty(n_rows, len(gate.v_weight)) for _ in range(2))
        self._d_branches = gate.v_weight.new_empty(n_rows, len(self.projections))
        self._d_rows = gate.v_weight.new_empty(n_rows, self.projections.shape[1])

    def add(self, d_scores: Tensor, rows: Tensor, hidden: Tensor, opening: Tensor | None, first: int) -> Tensor:
        """Add a block; return the gradients of V h + b and U h + b side by side: (n, A or 2A), valid until the next."""
        d_layer = self._through_scores(d_scores.to(hidden.dtype), hidden, opening, first)
        d_branches = self._d_branches[: len(rows)]
        if opening is None:
            self.gate.through_activation(d_branches.copy_(d_layer), hidden)
        else:
            d_hidden, d_opening = d_branches.chunk(2, dim=1)
            torch.mul(d_layer, hidden, out=d_opening)
            torch.ops.aten.sigmoid_backward.grad_input(d_opening, opening, grad_input=d_opening)
            self.gate.through_activation(torch.mul(d_layer, opening, out=d_hidden), hidden)
        self.sums.add(d_branches, rows)
        return d_branches

    def _through_scores(self, d_scores: Tensor, hidden: Tensor, opening: Tensor | None, first: int) -> Tensor:
        """Add the gradient of w; return that of the layer that w reads: (n, H), (n, A), (n, A) -> (n, A)."""
        layer, d_layer = self._layer[: len(hidden)], self._d_layer[: len(hidden)]
        if len(self._narrow_w) == 1:
            torch.mul(d_scores, self._narrow_w, out=d_layer)
        else:
            d_layer.copy_(product(d_scores, self._narrow_w))
        self._w_weight += transposed_product(d_scores, self.gate.layer(hidden, opening, layer, first))
        return self.gate.drop_(d_layer, first)

    def to_rows(self, d_branches: Tensor) -> Tensor:
        """Return the gradient of a block's instances, valid until the next: (n, A or 2A) -> (n, E)."""
        return product_into(self._d_rows[: len(d_branches)], d_branches, self.projections)

    def parameters(self) -> tuple[Tensor, ...]:
        """Return the gradients of v_weight, v_bias, u_weight, u_bias and w_weight."""
        w_weight = self._w_weight / (1 - self.gate.drop_probability)
        return *halves(self.sums.weight, self.sums.bias, len(self.gate.v_weight)), w_weight


def halves(weight: Tensor, bias: Tensor, hidden: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split what belongs to V and U, one below the other; the half of U is empty where there is no gate."""
    return weight[:hidden], bias[:hidden], weight[hidden:], bias[hidden:]


@dataclass(frozen=True)
class Kept:
    """What the forward pass leaves for the backward pass; a buffer of 0 rows is computed again instead.

    Parameters
    ----------
    instances : (N, E) or (0, E)
        Embedded instances.
    branches : (N, A or 2A) or (0, ...)
        act(V h + b) and σ(U h + b).
    """

    instances: Tensor
    branches: Tensor

    @classmethod
    def make(cls, source: Rows, gate: Gate, *, instances: bool, branches: bool) -> "Kept":
        """Return buffers for what is to be kept."""
        hidden, width = gate.v_weight.shape
        n_branches = hidden if gate.u_weight is None else 2 * hidden
        sizes = ((len(source) if instances else 0, width), (len(source) if branches else 0, n_branches))
        return cls(*(new_tensor(source.values, size, gate.v_weight.dtype) for size in sizes))

    def put_instances(self, block: slice, rows: Tensor) -> None:
        """Store a block's instances if they are kept."""
        if len(self.instances):
            self.instances[block] = rows

    def put_branches(self, block: slice, hidden: Tensor, opening: Tensor | None) -> None:
        """Store a block's branches if they are kept."""
        if len(self.branches):
            self.branches[block, : hidden.shape[1]] = hidden
            if opening is not None:
                self.branches[block, hidden.shape[1] :] = opening

    def instances_of(self, block: slice, values: Rows, embedding: Embedding) -> Tensor:
        """Return a block's instances, kept or computed again."""
        return self.instances[block] if len(self.instances) else embedding.rows(values[block], block.start)

    def branches_of(self, block: slice, rows: Tensor, gate: Gate) -> tuple[Tensor, Tensor | None]:
        """Return a block's branches, kept or computed again."""
        if not len(self.branches):
            return gate.branches(rows)
        width = len(gate.v_weight)
        return self.branches[block, :width], None if gate.u_weight is None else self.branches[block, width:]


class Widened:
    """Rows in the type of the sums; one place serves every block, as new memory costs more than the conversion."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._place = torch.empty(0)

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the rows in the type of the sums, valid until the next call: (n, E)."""
        if rows.dtype == self.dtype:
            return rows
        if len(self._place) < len(rows):
            self._place = torch.empty_like(rows, dtype=self.dtype)
        return self._place[: len(rows)].copy_(rows)


class SoftmaxGradient:
    """The gradient of pooling within each bag.

    Parameters
    ----------
    upstream : list of Tensor
        Gradients of pooled (B, H, E), log-sum-exp (B, H) and entropy (B, H).
    results : list of Tensor
        The three themselves.
    """

    def __init__(self, upstream: list[Tensor], results: list[Tensor]) -> None:
        self.d_pooled, d_lse, self.d_entropy = upstream
        pooled, lse, entropy = results
        self.level = d_lse - (pooled * self.d_pooled).sum(2)  # (B, H)
        self.lse = torch.where(lse == NEVER, 0, lse)
        self.middle = entropy - self.lse
        self._widened = Widened(lse.dtype)

    def scores(self, bag: int, scores: Tensor, rows: Tensor) -> Tensor:
        """Return the gradient of scores of one bag: (n, H), (n, E) -> (n, H)."""
        weights = (scores - self.lse[bag]).exp_()
        surprise = torch.where(weights > 0, scores + self.middle[bag], 0)
        projected = self._widened(rows) @ self.d_pooled[bag].T
        return weights * (projected + self.level[bag] - self.d_entropy[bag] * surprise)

    def add_rows(self, bag: int, scores: Tensor, d_rows: Tensor) -> None:
        """Add the gradient of the pooled instances of one bag: (n, H), to (n, E)."""
        weights = (scores - self.lse[bag]).exp_().to(d_rows.dtype)
        d_pooled = self.d_pooled[bag].to(d_rows.dtype)
        if len(d_pooled) == 1:
            d_rows.addcmul_(weights, d_pooled)
        else:
            d_rows.addmm_(weights, d_pooled)


class BagStates:
    """Running (m, l, e, Z) of every bag while blocks of rows go by.

    Parameters
    ----------
    n_bags, heads, width : int
        B, H and E.
    like : Tensor
        A tensor on the device and of the accumulation type.
    """

    def __init__(self, n_bags: int, heads: int, width: int, like: Tensor) -> None:
        self.top = like.new_full((n_bags, heads), NEVER)
        self.total, self.spread = like.new_zeros(n_bags, heads), like.new_zeros(n_bags, heads)
        self.weighted = like.new_zeros(n_bags, heads, width)
        self._widened = Widened(like.dtype)

    def add(self, bag: int, scores: Tensor, rows: Tensor) -> None:
        """Merge rows of one bag into its state: (n, H), (n, E)."""
        old = self.top[bag].clone()
        top = torch.maximum(old, scores.amax(0))
        shift = torch.where(top == NEVER, 0, top)
        weights = (scores - shift).exp_()
        relative = torch.where(weights > 0, scores - shift, 0)  # 0 · -inf would be NaN
        decay = (old - shift).exp_()
        lowered = torch.where(decay > 0, old - shift, 0)
        self.spread[bag] = (self.spread[bag] + lowered * self.total[bag]) * decay + (weights * relative).sum(0)
        self.total[bag] = self.total[bag] * decay + weights.sum(0)
        self.weighted[bag].mul_(decay[:, None]).add_(weights.T @ self._widened(rows))
        self.top[bag] = top

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return pooled (B, H, E), log-sum-exp (B, H) and entropy (B, H)."""
        seen = self.total > 0
        total = torch.where(seen, self.total, 1)
        lse = torch.where(seen, self.top + total.log(), NEVER)
        return self.weighted / total[:, :, None], lse, total.log() - self.spread / total


def pieces(offsets: list[int], block: slice) -> Iterator[tuple[int, slice]]:
    """Yield the bags that a block of rows touches, each with its rows within the block."""
    bag = bisect_right(offsets, block.start) - 1
    while bag < len(offsets) - 1 and offsets[bag] < block.stop:
        begin, end = max(offsets[bag], block.start), min(offsets[bag + 1], block.stop)
        if begin < end:
            yield bag, slice(begin - block.start, end - block.start)
        bag += 1


def score_forward(values: Rows, gate: Gate, keep_branches: bool) -> tuple[Tensor, Tensor]:  # noqa: FBT001
    """Return raw scores and the branches, if they are to be kept: (N, D) -> (N, H), (N or 0, A or 2A)."""
    kept = Kept.make(values, gate, instances=False, branches=keep_branches)
    scores = gate.w_weight.new_empty((len(values), len(gate.w_weight)))
    for block in blocks(len(values)):
        branches = gate.branches(values[block].to(gate.v_weight.dtype))
        scores[block] = gate.scores(*branches, block.start)
        kept.put_branches(block, *branches)
    return scores, kept.branches


def score_backward(
    upstream: list[Tensor],
    results: list[Tensor],
    needs: list[bool],
    values: Rows,
    gate: Gate,
    keep_branches: bool,  # noqa: FBT001
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the values (if needed) and of the six tensors of the gate."""
    (d_scores,), kept = upstream, Kept(results[0][:0], results[0])
    d_values = values.new_gradient() if needs[0] else None
    gradients = GateGradients(gate, longest_block(len(values)))
    for block in blocks(len(values)):
        rows = values[block].to(gate.v_weight.dtype)
        hidden, opening = kept.branches_of(block, rows, gate)
        d_branches = gradients.add(d_scores[block], rows, hidden, opening, block.start)
        if d_values is not None:
            values.add_gradient(d_values, block, gradients.to_rows(d_branches))
    return d_values, *gradients.parameters(), d_scores.sum(0)


@dataclass(frozen=True)
class Pooling:
    """What turns the instances of a pack into pooled bags."""

    values: Rows
    embedding: Embedding
    gate: Gate
    masks: Masks
    cu_seqlens: Tensor
    keep_instances: bool
    keep_branches: bool

    def new_kept(self) -> Kept:
        """Return buffers for what the backward pass reads again."""
        return Kept.make(self.values, self.gate, instances=self.keep_instances, branches=self.keep_branches)


def pool_forward(pooling: Pooling) -> tuple[Tensor, ...]:
    """Return scores (N, H), pooled (B, H, E), lse (B, H), entropy (B, H), and kept instances and branches."""
    values, embedding, gate, masks = pooling.values, pooling.embedding, pooling.gate, pooling.masks
    offsets, kept = host_offsets(pooling.cu_seqlens), pooling.new_kept()
    heads, width = gate.w_weight.shape[0], gate.v_weight.shape[1]
    scores = gate.w_weight.new_empty((len(values), heads))
    states = BagStates(len(offsets) - 1, heads, width, like=scores)
    for block in blocks(len(values)):
        rows = embedding.rows(values[block], block.start)
        hidden, opening = gate.branches(rows)
        scores[block] = masks.scores(gate.scores(hidden, opening, block.start), block)
        for bag, part in pieces(offsets, block):
            states.add(bag, scores[block][part], rows[part])
        kept.put_instances(block, rows)
        kept.put_branches(block, hidden, opening)
    return scores, *states.finish(), kept.instances, kept.branches


def pool_backward(
    upstream: list[Tensor], results: list[Tensor], needs: list[bool], pooling: Pooling
) -> tuple[Tensor | None, ...]:
    """Return the gradients of values, embedding (2), gate (6), temperature and mask.

    With c = h·g_z, ``ds = a (c - z·g_z + g_lse - g_E (s - lse + E)) + g_s``: the sum over instances in the softmax's
    gradient is z·g_z and needs no pass of its own.
    """
    values, embedding, gate, masks = pooling.values, pooling.embedding, pooling.gate, pooling.masks
    offsets, kept = host_offsets(pooling.cu_seqlens), Kept(*results[4:])
    softmax = SoftmaxGradient(upstream[1:], results[1:4])
    gradients, d_scores = GateGradients(gate, longest_block(len(values))), torch.empty_like(results[0])
    d_values = values.new_gradient() if needs[0] else None
    embedder = None if embedding.weight is None else AffineGradient(embedding.weight, d_scores.dtype)
    needs_rows = needs[0] or embedder is not None
    for block in blocks(len(values)):
        rows = kept.instances_of(block, values, embedding)
        hidden, opening = kept.branches_of(block, rows, gate)
        for bag, part in pieces(offsets, block):
            d_scores[block][part] = softmax.scores(bag, results[0][block][part], rows[part])
        d_scores[block] = masks.passed(d_scores[block] + upstream[0][block], block)
        d_branches = gradients.add(d_scores[block] / masks.temperature, rows, hidden, opening, block.start)
        if not needs_rows:
            continue
        d_rows = gradients.to_rows(d_branches)
        for bag, part in pieces(offsets, block):
            softmax.add_rows(bag, results[0][block][part], d_rows[part])
        if embedder is not None:
            d_rows = embedding.backward(d_rows, rows, out=d_rows)
            embedder.add(d_rows, values[block].to(embedding.dtype))
        if d_values is not None:
            values.add_gradient(d_values, block, embedding.to_values(d_rows))
    embedded = (None, None) if embedder is None else embedding.parameters(embedder)
    return d_values, *embedded, *gradients.parameters(), *masks.gradients(d_scores, results[0])


def _per_head(mask: Tensor) -> Tensor:
    return mask[:, None] if mask.dim() == 1 else mask
