"""Attention scores and pooling by blocks of rows: nothing of size (N, A) outlives its block unless asked to.

Each block is projected, gated, scored and added to its bags' running sums while it is in the cache. The state of a
bag is (m, l, e, Z) = (max s, Σ e^(s-m), Σ e^(s-m)(s-m), Σ e^(s-m) h), and two states merge associatively. The backward
pass goes over the same blocks; what was not kept is computed again. Products run in one type, the gate's derivative,
the softmax and all sums over instances in float32 at least.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from eosin.kernels._bags import NEVER
from eosin.kernels._checks import accumulation_dtype, host_offsets
from eosin.kernels._dropout import GATE_BRANCH, drop_, gate_probability
from eosin.kernels._dropout import Kept as KeptEntries
from eosin.kernels._layers import AffineGradient, layers_by_blas, product_into
from eosin.kernels._memory import new_tensor
from eosin.kernels._products import affine, product, transposed_product
from eosin.kernels._rows import Rows, blocks, longest_block, tiles
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

    @cached_property
    def projections(self) -> Tensor:
        """V and U, one below the other: (A or 2A, E)."""
        return self.v_weight if self.u_weight is None else torch.cat([self.v_weight, self.u_weight])

    def branches(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return act(V h + b) and σ(U h + b) before dropout, in the type of the products: -> (n, A), (n, A)."""
        hidden, opening, is_done = self._projected(rows, None)
        for tile in tiles(hidden) if not is_done else ():
            self._finish(hidden[tile], None if opening is None else opening[tile])
        return hidden, opening

    def scored(self, rows: Tensor, first: int, place: Tensor | None) -> Tensor:
        """Return the raw scores of a block, its branches left in the place (n, A or 2A), if one is given: -> (n, H)."""
        hidden, opening, is_done = self._projected(rows, place)
        weight, wide = self.scaled_w.T, self.w_weight.dtype
        scores = hidden.new_empty((len(hidden), weight.shape[1]), dtype=wide)
        kept, room = self.kept(hidden, first), torch.empty_like(hidden)
        for tile in tiles(hidden):
            gate = None if opening is None else opening[tile]
            if not is_done:
                self._finish(hidden[tile], gate)
            layer = self.layer(hidden[tile], gate, None if kept is None else kept[tile], room)
            torch.mm(layer.to(wide), weight, out=scores[tile])
        return scores if self.w_bias is None else scores.add_(self.w_bias)

    def _projected(self, rows: Tensor, place: Tensor | None) -> tuple[Tensor, Tensor | None, bool]:
        """Return both products, and whether biases and activations are applied already, as oneDNN does."""
        if layers_by_blas(rows):
            place = rows.new_empty(len(rows), len(self.projections)) if place is None else place
            return *self.split(torch.mm(rows, self.projections.T, out=place)), False
        hidden = affine(rows, self.v_weight, self.v_bias, self.activation)
        opening = None if self.u_weight is None else affine(rows, self.u_weight, self.u_bias, "sigmoid")
        if place is not None:
            there, gate = self.split(place)
            there.copy_(hidden)
            if opening is not None and gate is not None:
                gate.copy_(opening)
        return hidden, opening, True

    def _finish(self, hidden: Tensor, opening: Tensor | None) -> None:
        """Add the biases to the products of a tile and apply the activations, in place: (n, A), (n, A)."""
        _finish_(hidden, self.v_bias, self.activation)
        if opening is not None:
            _finish_(opening, self.u_bias, "sigmoid")

    def split(self, branches: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return both branches from where they lie side by side; without a gate the second is None."""
        width = len(self.v_weight)
        return branches[:, :width], None if self.u_weight is None else branches[:, width:]

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

    def kept(self, hidden: Tensor, first: int) -> KeptEntries | None:
        """Return which entries of a block dropout keeps, None where it keeps all."""
        if not self.dropout:
            return None
        shape, chance, device = hidden.shape, self.drop_probability, hidden.device
        return KeptEntries.of(self.seed, shape, chance, branch=GATE_BRANCH, device=device, first_row=first)

    def layer(self, hidden: Tensor, gate: Tensor | None, kept: Tensor | None, place: Tensor) -> Tensor:
        """Return what w reads, dropped entries 0 and the others not scaled: (n, A), (n, A) -> (n, A).

        It lies in the first rows of the place, unless it is ``hidden`` itself.
        """
        place = place[: len(hidden)]
        layer = torch.mul(hidden, gate, out=place) if gate is not None else hidden
        if kept is None:
            return layer
        return drop_(place.copy_(layer) if gate is None else layer, kept)


def _finish_(part: Tensor, bias: Tensor | None, activation: str) -> None:
    """Add the bias and apply tanh, sigmoid or relu in place; halves are widened, torch's own way is slow."""
    is_half = part.dtype in (torch.float16, torch.bfloat16)
    wide = part.float() if is_half else part
    if bias is not None:
        wide += bias
    getattr(torch, activation + "_")(wide)
    if is_half:
        part.copy_(wide)


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
    the arithmetic. The passes between the products go by tiles, whose few tensors stay in the cache.

    Parameters
    ----------
    gate : Gate
        The hidden layer.
    n_rows : int
        Rows of the longest block.
    """

    def __init__(self, gate: Gate, n_rows: int) -> None:
        self.gate = gate
        self.sums = AffineGradient(gate.projections, gate.w_weight.dtype)
        self._w_weight = torch.zeros_like(gate.w_weight)
        self._narrow_w = gate.scaled_w.to(gate.v_weight.dtype)
        self._layer, self._d_layer = (gate.v_weight.new_empty(n_rows, len(gate.v_weight)) for _ in range(2))
        self._d_branches = gate.v_weight.new_empty(n_rows, len(gate.projections))
        self._d_rows = gate.v_weight.new_empty(n_rows, gate.projections.shape[1])

    def add(self, d_scores: Tensor, rows: Tensor, hidden: Tensor, opening: Tensor | None, first: int) -> Tensor:
        """Add a block; return the gradients of V h + b and U h + b side by side: (n, A or 2A), valid until the next."""
        d_scores, d_branches = d_scores.to(hidden.dtype), self._d_branches[: len(rows)]
        kept = self.gate.kept(hidden, first)
        for tile in tiles(hidden):
            gate = None if opening is None else opening[tile]
            mask = None if kept is None else kept[tile]
            self._through_layer(d_scores[tile], hidden[tile], gate, mask, d_branches[tile])
            self.sums.add_bias(d_branches[tile])
        self.sums.add(d_branches, rows)
        return d_branches

    def _through_layer(
        self, d_scores: Tensor, hidden: Tensor, opening: Tensor | None, kept: Tensor | None, d_branches: Tensor
    ) -> None:
        """Write the gradients of both branches of a tile; add that of w: (n, H), (n, A), (n, A), to (n, A or 2A)."""
        layer = self.gate.layer(hidden, opening, kept, self._layer)
        if len(self._w_weight) == 1 and layer.dtype == self._w_weight.dtype:
            self._w_weight[0].addmv_(layer.T, d_scores[:, 0])
        else:
            self._w_weight += transposed_product(d_scores, layer)
        d_layer = self._through_w(d_scores)
        if kept is not None:
            drop_(d_layer, kept)
        d_hidden, d_opening = self.gate.split(d_branches)
        if opening is None or d_opening is None:
            self.gate.through_activation(d_hidden.copy_(d_layer), hidden)
            return
        torch.mul(d_layer, hidden, out=d_opening)
        torch.ops.aten.sigmoid_backward.grad_input(d_opening, opening, grad_input=d_opening)
        self.gate.through_activation(torch.mul(d_layer, opening, out=d_hidden), hidden)

    def _through_w(self, d_scores: Tensor) -> Tensor:
        """Return the gradient of what w reads, valid until the next: (n, H) -> (n, A)."""
        place = self._d_layer[: len(d_scores)]
        if len(self._narrow_w) == 1:
            return torch.mul(d_scores, self._narrow_w, out=place)
        return place.copy_(product(d_scores, self._narrow_w))

    def to_rows(self, d_branches: Tensor) -> Tensor:
        """Return the gradient of a block's instances, valid until the next: (n, A or 2A) -> (n, E)."""
        return product_into(self._d_rows[: len(d_branches)], d_branches, self.gate.projections)

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

    def place_of_instances(self, block: slice) -> Tensor | None:
        """Return where a block's instances are kept."""
        return self.instances[block] if len(self.instances) else None

    def place_of_branches(self, block: slice) -> Tensor | None:
        """Return where a block's branches are kept."""
        return self.branches[block] if len(self.branches) else None

    def instances_of(self, block: slice, values: Rows, embedding: Embedding) -> Tensor:
        """Return a block's instances, kept or computed again."""
        return self.instances[block] if len(self.instances) else embedding.rows(values[block], block.start)

    def branches_of(self, block: slice, rows: Tensor, gate: Gate) -> tuple[Tensor, Tensor | None]:
        """Return a block's branches, kept or computed again."""
        return gate.split(self.branches[block]) if len(self.branches) else gate.branches(rows)


class Widened:
    """Products of rows in the type of the sums: rows of another type are converted a tile at a time, into one place."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._place = torch.empty(0)

    def product(self, rows: Tensor, right: Tensor) -> Tensor:
        """Return rows right: (n, E), (E, H) -> (n, H)."""
        if rows.dtype == self.dtype:
            return rows @ right
        result = right.new_empty(len(rows), right.shape[1])
        for tile in tiles(rows):
            torch.mm(self._widen(rows[tile]), right, out=result[tile])
        return result

    def transposed_product(self, weights: Tensor, rows: Tensor) -> Tensor:
        """Return weightsᵀ rows: (n, H), (n, E) -> (H, E)."""
        if rows.dtype == self.dtype:
            return weights.T @ rows
        result = weights.new_zeros(weights.shape[1], rows.shape[1])
        for tile in tiles(rows):
            result.addmm_(weights[tile].T, self._widen(rows[tile]))
        return result

    def _widen(self, rows: Tensor) -> Tensor:
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
        projected = self._widened.product(rows, self.d_pooled[bag].T)
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
        self.weighted[bag].mul_(decay[:, None]).add_(self._widened.transposed_product(weights, rows))
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
        rows = values[block].to(gate.v_weight.dtype)
        scores[block] = gate.scored(rows, block.start, kept.place_of_branches(block))
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
        rows = embedding.rows(values[block], block.start, kept.place_of_instances(block))
        scores[block] = masks.scores(gate.scored(rows, block.start, kept.place_of_branches(block)), block)
        for bag, part in pieces(offsets, block):
            states.add(bag, scores[block][part], rows[part])
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
        for tile in tiles(d_rows):
            here = slice(block.start + tile.start, block.start + tile.stop)
            for bag, part in pieces(offsets, here):
                softmax.add_rows(bag, results[0][here][part], d_rows[tile][part])
            if embedder is not None:
                embedder.add_bias(embedding.backward(d_rows[tile], rows[tile], out=d_rows[tile]))
        if embedder is not None:
            embedder.add(d_rows, values[block].to(embedding.dtype))
        if d_values is not None:
            values.add_gradient(d_values, block, embedding.to_values(d_rows))
    embedded = (None, None) if embedder is None else embedding.parameters(embedder)
    return d_values, *embedded, *gradients.parameters(), *masks.gradients(d_scores, results[0])


def _per_head(mask: Tensor) -> Tensor:
    return mask[:, None] if mask.dim() == 1 else mask
