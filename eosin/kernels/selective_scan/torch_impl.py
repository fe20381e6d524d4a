"""The selective scan with all chunks of all bags advancing together.

Bags are cut into chunks. Phase 1 runs every chunk from a zero state and keeps its last state and Σδ; phase 2 carries
states across the chunks of a bag, where a chunk's decay is exp(A Σδ); phase 3 runs every chunk from its true first
state and writes the outputs. The backward pass does the same with the adjoint, from the end. So Python takes as many
steps as a chunk is long. Steps beyond a chunk's end have δ = 0 and change nothing. States are kept every few steps;
the backward pass computes those between again. Powers run in base 2, which the CPU computes several times faster.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import e, log2
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from eosin.kernels._checks import accumulation_dtype, host_offsets

STATE_SIZE = 1 << 17  # numbers that advance together: 512 KB of float32, inside the L2 cache
CHECKPOINT = 48  # steps between kept states
LOG2_E = log2(e)


@dataclass(frozen=True)
class Inputs:
    """The tensors of one scan, as in the public function; ``a`` and ``d`` in the accumulation type."""

    u: Tensor
    delta: Tensor
    a: Tensor  # (S, D), times log2(e)
    b: Tensor
    c: Tensor
    d: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None

    @classmethod
    def make(cls, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, *optional: Tensor | None) -> "Inputs":
        """Return the inputs from those of the public function."""
        d, z, delta_bias = optional
        wide = accumulation_dtype(u.dtype)
        d, delta_bias = (None if vector is None else vector.to(wide) for vector in (d, delta_bias))
        return cls(u, delta, (a.to(wide).T * LOG2_E).contiguous(), b, c, d, z, delta_bias)


@dataclass(frozen=True)
class Chunk:
    """Rows of one bag that are scanned in one go."""

    start: int
    length: int
    follows: bool  # the chunk before belongs to the same bag
    is_followed: bool


def chunks_of(cu_seqlens: Tensor, state_size: int) -> list[Chunk]:
    """Cut bags into chunks of about equal length, as many as fill `STATE_SIZE` with states of this size."""
    offsets = host_offsets(cu_seqlens)
    at_once = max(1, STATE_SIZE // state_size)
    longest = max(1, -(-offsets[-1] // at_once))
    chunks = []
    for begin, end in pairwise(offsets):
        count = -(-(end - begin) // longest)
        cuts = [begin + (end - begin) * part // count for part in range(count + 1)] if count else []
        for part, (first, last) in enumerate(pairwise(cuts)):
            chunks.append(Chunk(first, last - first, follows=part > 0, is_followed=part < count - 1))
    return chunks


class Walk:
    """Chunks that advance together, one row each per step.

    Parameters
    ----------
    chunks : list of Chunk
        G chunks.
    inputs : Inputs
        Where the rows are read.
    """

    def __init__(self, chunks: list[Chunk], inputs: Inputs) -> None:
        device = inputs.u.device
        self.inputs = inputs
        self.starts = torch.tensor([chunk.start for chunk in chunks], device=device)
        self.lengths = torch.tensor([chunk.length for chunk in chunks], device=device)
        self.shortest = min(chunk.length for chunk in chunks)
        self.n_steps = max(chunk.length for chunk in chunks)

    def new_state(self) -> Tensor:
        """Return a zero state for every chunk: (G, S, D)."""
        return self.inputs.a.new_zeros(len(self.starts), *self.inputs.a.shape)

    def read(self, packed: Tensor, step: int) -> Tensor:
        """Return each chunk's row, 0 beyond its end, in the accumulation type: (N, D) -> (G, D)."""
        if step < self.shortest:
            return packed.index_select(0, self.starts + step).to(self.inputs.a.dtype)
        inside = self.lengths > step
        rows = (self.starts + step) * inside
        return packed.index_select(0, rows).to(self.inputs.a.dtype) * inside[:, None]

    def write(self, packed: Tensor, step: int, rows: Tensor) -> None:
        """Write each chunk's row unless the step is beyond its end: (G, D) into (N, D)."""
        if step < self.shortest:
            packed.index_copy_(0, self.starts + step, rows.to(packed.dtype))
        else:
            inside = self.lengths > step
            packed.index_copy_(0, (self.starts + step)[inside], rows[inside].to(packed.dtype))

    def delta(self, step: int) -> Tensor:
        """Return δ, which is 0 beyond a chunk's end: (G, 1, D)."""
        inputs = self.inputs
        delta = self.read(inputs.delta, step)
        delta = softplus(delta if inputs.delta_bias is None else delta + inputs.delta_bias)
        if step >= self.shortest:
            delta = delta * (self.lengths > step)[:, None]
        return delta[:, None]

    def decay(self, delta: Tensor) -> Tensor:
        """Return exp(δ A): (G, 1, D) -> (G, S, D)."""
        return (delta * self.inputs.a).exp2_()

    def advance(self, state: Tensor, step: int) -> Tensor:
        """Move the state one step on, in place; return δ."""
        delta = self.delta(step)
        drive = delta * self.read(self.inputs.u, step)[:, None]
        state.mul_(self.decay(delta)).addcmul_(self.read(self.inputs.b, step)[:, :, None], drive)
        return delta

    def output_gradient(self, d_out: Tensor, step: int) -> Tensor:
        """Return the gradient of y, before the gate: (G, 1, D)."""
        gradient = self.read(d_out, step)
        if self.inputs.z is not None:
            gradient = gradient * silu(self.read(self.inputs.z, step))
        return gradient[:, None]


def forward(inputs: Inputs, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs (N, D) and the kept states (rows of all walks' checkpoints, S, D)."""
    chunks = chunks_of(cu_seqlens, inputs.a.numel())
    first_states = _carry(chunks, inputs, _last_states, towards_end=True)
    out = torch.empty_like(inputs.u)
    kept = []
    for group in _groups(chunks, inputs):
        walk = Walk(chunks[group], inputs)
        state = first_states[group].clone()
        for step in range(walk.n_steps):
            if step % CHECKPOINT == 0:
                kept.append(state.clone())
            walk.advance(state, step)
            walk.write(out, step, _output(walk, state, step))
    return out, torch.cat(kept) if kept else inputs.a.new_zeros(0, *inputs.a.shape)


class Gradients(NamedTuple):
    """Gradients of the scan's inputs; ``z`` is empty without a gate."""

    u: Tensor
    delta: Tensor
    a: Tensor  # (S, D) while they are summed, then (D, S)
    b: Tensor
    c: Tensor
    d: Tensor
    z: Tensor
    delta_bias: Tensor


def backward(
    upstream: list[Tensor], results: list[Tensor], needs: list[bool], inputs: Inputs, cu_seqlens: Tensor
) -> Gradients:
    """Return all gradients.

    With λ_t = C_t g_t + μ_t and μ_{t-1} = exp(δ_t A) λ_t, the adjoint that arrives from the future:
    ``dC = Σ g h``, ``dB = Σ λ δ u``, ``du = D g + δ (B·λ)``, ``dδ = Σ A μ_{t-1} h_{t-1} + u (B·λ)``.
    """
    (d_out,), (kept,) = upstream, results
    chunks = chunks_of(cu_seqlens, inputs.a.numel())

    def first_adjoints(walk: Walk) -> tuple[Tensor, Tensor]:
        return _first_adjoints(walk, d_out)

    arriving = _carry(chunks, inputs, first_adjoints, towards_end=False)
    gradients = _empty_gradients(inputs)
    position = 0
    for group in _groups(chunks, inputs):
        walk = Walk(chunks[group], inputs)
        n_blocks = -(-walk.n_steps // CHECKPOINT)
        states = kept[position : position + n_blocks * len(walk.starts)].view(n_blocks, *walk.new_state().shape)
        position += n_blocks * len(walk.starts)
        adjoint = arriving[group].clone()
        for block in reversed(range(n_blocks)):
            steps = range(block * CHECKPOINT, min((block + 1) * CHECKPOINT, walk.n_steps))
            adjoint = _block_backward(walk, steps, states[block], adjoint, d_out, gradients)
    return gradients._replace(a=gradients.a.T)


def _carry(
    chunks: list[Chunk], inputs: Inputs, run: Callable[[Walk], tuple[Tensor, Tensor]], *, towards_end: bool
) -> Tensor:
    """Return the state with which each chunk begins (or the adjoint that reaches its end): (chunks, S, D).

    ``run`` gives what a chunk passes on from zero, and its Σδ.
    """
    givers = [i for i, chunk in enumerate(chunks) if (chunk.is_followed if towards_end else chunk.follows)]
    passed = [run(Walk([chunks[i] for i in part], inputs)) for part in _split(givers, inputs)]
    if not passed:
        return inputs.a.new_zeros(len(chunks), *inputs.a.shape)
    given, totals = (torch.cat(parts) for parts in zip(*passed, strict=True))
    carried = inputs.a.new_zeros(len(chunks), *inputs.a.shape)
    order = range(len(givers)) if towards_end else reversed(range(len(givers)))
    for place in order:
        giver = givers[place]
        receiver = giver + 1 if towards_end else giver - 1
        decay = (totals[place] * inputs.a).exp2_()
        carried[receiver] = given[place] + decay * carried[giver]
    return carried


def _last_states(walk: Walk) -> tuple[Tensor, Tensor]:
    """Run chunks from zero; return their last states (G, S, D) and Σδ (G, 1, D)."""
    state = walk.new_state()
    total = walk.delta(0).clone().zero_()
    for step in range(walk.n_steps):
        total += walk.advance(state, step)
    return state, total


def _first_adjoints(walk: Walk, d_out: Tensor) -> tuple[Tensor, Tensor]:
    """Run the adjoint of chunks from zero; return what leaves at their start (G, S, D) and Σδ (G, 1, D)."""
    adjoint = walk.new_state()
    total = walk.delta(0).clone().zero_()
    for step in reversed(range(walk.n_steps)):
        delta = walk.delta(step)
        adjoint.addcmul_(walk.read(walk.inputs.c, step)[:, :, None], walk.output_gradient(d_out, step))
        adjoint.mul_(walk.decay(delta))
        total += delta
    return adjoint, total


def _output(walk: Walk, state: Tensor, step: int) -> Tensor:
    """Return the output of every chunk: (G, D)."""
    out = _ungated(walk, state, step)
    return out if walk.inputs.z is None else out * silu(walk.read(walk.inputs.z, step))


def _ungated(walk: Walk, state: Tensor, step: int) -> Tensor:
    out = torch.bmm(walk.read(walk.inputs.c, step)[:, None], state)[:, 0]
    return out if walk.inputs.d is None else out.addcmul_(walk.inputs.d, walk.read(walk.inputs.u, step))


def _block_backward(
    walk: Walk, steps: range, first: Tensor, adjoint: Tensor, d_out: Tensor, gradients: Gradients
) -> Tensor:
    """Go back over one block of steps from the adjoint at its end; return the adjoint at its start."""
    states = [first]
    for step in steps:
        states.append(states[-1].clone())
        walk.advance(states[-1], step)
    d_a = torch.zeros_like(adjoint)
    for step in reversed(steps):
        after, before = states[step - steps.start + 1], states[step - steps.start]
        _step_backward(walk, step, before, after, adjoint, d_out, gradients, d_a)
    gradients.a.add_(d_a.sum(0))
    return adjoint


def _step_backward(
    walk: Walk,
    step: int,
    before: Tensor,
    after: Tensor,
    adjoint: Tensor,
    d_out: Tensor,
    gradients: Gradients,
    d_a: Tensor,
) -> None:
    inputs = walk.inputs
    delta, u, b = walk.delta(step), walk.read(inputs.u, step)[:, None], walk.read(inputs.b, step)
    gradient = walk.output_gradient(d_out, step)
    adjoint.addcmul_(walk.read(inputs.c, step)[:, :, None], gradient)
    walk.write(gradients.c, step, (after * gradient).sum(2))
    walk.write(gradients.b, step, (adjoint * (delta * u)).sum(2))
    read_back = torch.bmm(b[:, None], adjoint)
    adjoint.mul_(walk.decay(delta))
    product = adjoint * before
    d_a.addcmul_(product, delta)
    d_delta = (product.mul_(inputs.a).sum(1, keepdim=True) / LOG2_E).addcmul_(u, read_back)
    d_delta *= -torch.expm1(-delta)  # the slope of softplus
    d_u = delta * read_back
    if inputs.d is not None:
        d_u.addcmul_(gradient, inputs.d)
        gradients.d.add_((gradient * u).sum((0, 1)))
    walk.write(gradients.u, step, d_u[:, 0])
    walk.write(gradients.delta, step, d_delta[:, 0])
    gradients.delta_bias.add_(d_delta.sum((0, 1)))
    if inputs.z is not None:
        walk.write(gradients.z, step, _gate_gradient(walk, after, step, d_out, inputs.z))


def _gate_gradient(walk: Walk, state: Tensor, step: int, d_out: Tensor, gate: Tensor) -> Tensor:
    """Return the gradient of z: ``do y σ(z) (1 + z (1 - σ(z)))``: (G, D)."""
    z = walk.read(gate, step)
    opening = z.sigmoid()
    slope = opening * (1 + z * (1 - opening))
    return walk.read(d_out, step) * _ungated(walk, state, step) * slope


def _groups(chunks: list[Chunk], inputs: Inputs) -> list[slice]:
    return [slice(part[0], part[-1] + 1) for part in _split(list(range(len(chunks))), inputs)]


def _split(indices: list[int], inputs: Inputs) -> list[list[int]]:
    """Cut a list into runs of as many chunks as advance together."""
    at_once = max(1, STATE_SIZE // inputs.a.numel())
    return [indices[first : first + at_once] for first in range(0, len(indices), at_once)]


def _empty_gradients(inputs: Inputs) -> Gradients:
    width = inputs.u.shape[1]
    return Gradients(
        u=torch.empty_like(inputs.u),
        delta=torch.empty_like(inputs.delta),
        a=torch.zeros_like(inputs.a),
        b=torch.empty_like(inputs.b),
        c=torch.empty_like(inputs.c),
        d=inputs.a.new_zeros(width),
        z=inputs.u.new_empty(0) if inputs.z is None else torch.empty_like(inputs.z),
        delta_bias=inputs.a.new_zeros(width),
    )
