# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The selective scan on a GPU: sequential in time, one channel per lane, its whole state in registers.

The three phases of `torch_impl`, with a program per chunk and 32 channels. The backward kernel runs a chunk forward,
writes what needs the state itself (the gradients of C and z) and leaves every second state in scratch memory that
mostly fits the L2 cache; then it goes back with two states at a time in registers, where four do not fit. Sums over
channels (the gradients of B and C) go to one partial per group of channel blocks, which a program walks one after the
other: nothing is added atomically and every run gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from eosin.kernels._chunks import ChunkTable, chunk_table
from eosin.kernels.selective_scan.torch_impl import Gradients, Inputs

LOG2_E = tl.constexpr(1.4426950408889634)
CHANNELS = 32
GROUPED_BLOCKS = 8  # channel blocks that share one partial of dB and dC
BACKWARD_PROGRAMS = 1056
CARRY_BLOCK = 256


def chunk_rows(n_rows: int) -> int:
    """Return rows per chunk: long where there are enough chunks to fill a GPU, shorter otherwise."""
    for threshold, rows in ((32768, 128), (8192, 64)):
        if n_rows >= threshold:
            return rows
    return 32


def forward(inputs: Inputs, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs (N, D) and the state with which each chunk begins (chunks, S, D)."""
    inputs = _contiguous(inputs)
    n_rows, width = inputs.u.shape
    table = chunk_table(cu_seqlens, chunk_rows(n_rows))
    out = torch.empty_like(inputs.u)
    passed = inputs.a.new_empty(table.n_chunks, *inputs.a.shape)
    totals = inputs.a.new_empty(table.n_chunks, width)
    if not table.n_chunks:
        return out, passed
    grid = (table.n_chunks, triton.cdiv(width, CHANNELS))
    bias = _or_zeros(inputs.delta_bias, inputs)
    chunk_states[grid](
        inputs.u, inputs.delta, bias, inputs.a, inputs.b, table.start, table.end, passed, totals, width,
        n_states=inputs.a.shape[0], **_blocks(inputs),
    )  # fmt: skip
    states = _carried(passed, totals, inputs, table, reverse=False)
    chunk_outputs[grid](
        inputs.u, inputs.delta, bias, inputs.a, inputs.b, inputs.c, _or_zeros(inputs.d, inputs),
        inputs.u if inputs.z is None else inputs.z, states, table.start, table.end, out, width,
        n_states=inputs.a.shape[0], GATED=inputs.z is not None, **_blocks(inputs),
    )  # fmt: skip
    return out, states


def backward(
    upstream: list[Tensor], results: list[Tensor], needs: list[bool], inputs: Inputs, cu_seqlens: Tensor
) -> Gradients:
    """Return all gradients, as `torch_impl.backward`."""
    inputs, (d_out,), (states,) = _contiguous(inputs), upstream, results
    n_rows, width = inputs.u.shape
    n_states = inputs.a.shape[0]
    table = chunk_table(cu_seqlens, chunk_rows(n_rows))
    blocks = triton.cdiv(width, CHANNELS)
    groups = triton.cdiv(blocks, GROUPED_BLOCKS)
    d_b, d_c = (inputs.a.new_zeros(groups, n_rows, n_states) for _ in range(2))
    d_a = inputs.a.new_zeros(table.n_chunks, n_states, width)
    d_d, d_bias = (inputs.a.new_zeros(table.n_chunks, width) for _ in range(2))
    d_u, d_delta = torch.empty_like(inputs.u), torch.empty_like(inputs.delta)
    d_z = inputs.u.new_empty(0) if inputs.z is None else torch.empty_like(inputs.z)
    gradients = Gradients(d_u, d_delta, d_a, d_b, d_c, d_d, d_z, d_bias)
    if table.n_chunks:
        arriving = _arriving_adjoints(d_out, inputs, table)
        _launch_backward(d_out, inputs, table, states, arriving, gradients, groups)
    return Gradients(d_u, d_delta, d_a.sum(0).T, d_b.sum(0), d_c.sum(0), d_d.sum(0), d_z, d_bias.sum(0))


def _arriving_adjoints(d_out: Tensor, inputs: Inputs, table: ChunkTable) -> Tensor:
    """Return the adjoint that reaches each chunk's end from the future: (chunks, S, D)."""
    width = inputs.u.shape[1]
    passed = inputs.a.new_empty(table.n_chunks, *inputs.a.shape)
    totals = inputs.a.new_empty(table.n_chunks, width)
    chunk_adjoints[(table.n_chunks, triton.cdiv(width, CHANNELS))](
        inputs.delta, _or_zeros(inputs.delta_bias, inputs), inputs.a, inputs.c,
        inputs.u if inputs.z is None else inputs.z, d_out, table.start, table.end, passed, totals, width,
        n_states=inputs.a.shape[0], GATED=inputs.z is not None, **_blocks(inputs),
    )  # fmt: skip
    return _carried(passed, totals, inputs, table, reverse=True)


def _launch_backward(
    d_out: Tensor,
    inputs: Inputs,
    table: ChunkTable,
    states: Tensor,
    arriving: Tensor,
    gradients: Gradients,
    groups: int,
) -> None:
    n_rows, width = inputs.u.shape
    items = table.n_chunks * groups
    programs = min(items, BACKWARD_PROGRAMS)
    kept = triton.cdiv(table.rows, 2)
    sizes = _blocks(inputs)
    scratch = inputs.a.new_empty(programs, kept, sizes["STATES"], CHANNELS)
    chunk_gradients[(programs,)](
        inputs.u, inputs.delta, _or_zeros(inputs.delta_bias, inputs), inputs.a, inputs.b, inputs.c,
        _or_zeros(inputs.d, inputs), inputs.u if inputs.z is None else inputs.z, d_out, states, arriving,
        table.start, table.end, scratch, gradients.u, gradients.delta, gradients.a, gradients.b, gradients.c,
        gradients.d, gradients.u if inputs.z is None else gradients.z, gradients.delta_bias,
        n_rows, width, table.n_chunks, items, kept,
        n_states=inputs.a.shape[0], GROUPED=GROUPED_BLOCKS, GATED=inputs.z is not None, **sizes,
    )  # fmt: skip


def _carried(passed: Tensor, totals: Tensor, inputs: Inputs, table: ChunkTable, *, reverse: bool) -> Tensor:
    """Carry what chunks pass on through each bag: (chunks, S, D) -> (chunks, S, D)."""
    carried = torch.empty_like(passed)
    n_states, width = inputs.a.shape
    carry[(table.first.shape[0] - 1, triton.cdiv(n_states * width, CARRY_BLOCK))](
        passed, totals, inputs.a, table.first, carried, n_states * width, width, BLOCK=CARRY_BLOCK, REVERSE=reverse
    )
    return carried


def _blocks(inputs: Inputs) -> dict[str, int]:
    return {"STATES": max(1, triton.next_power_of_2(inputs.a.shape[0])), "CHANNELS": CHANNELS, "num_warps": 1}


def _or_zeros(vector: Tensor | None, inputs: Inputs) -> Tensor:
    return inputs.a.new_zeros(inputs.a.shape[1]) if vector is None else vector.contiguous()


def _contiguous(inputs: Inputs) -> Inputs:
    u, delta, b, c = (tensor.contiguous() for tensor in (inputs.u, inputs.delta, inputs.b, inputs.c))
    z = None if inputs.z is None else inputs.z.contiguous()
    return Inputs(u, delta, inputs.a, b, c, inputs.d, z, inputs.delta_bias)


@triton.jit
def softplus(x):
    """Return log(1 + e^x) without overflow: max(x, 0) + log(1 + e^-|x|)."""
    decayed = tl.exp2(-tl.abs(x) * LOG2_E)
    # log1p: for a small e^-|x| the sum 1 + e^-|x| has lost its digits
    small = decayed * (1 - decayed * (0.5 - decayed * (1 / 3 - decayed * 0.25)))
    return tl.maximum(x, 0.0) + tl.where(decayed < 0.01, small, tl.log(1 + decayed))


@triton.jit
def step_size(delta, bias, row, channels, width, inside):
    """Return δ of one row, 0 where the row or channel takes no part."""
    raw = tl.load(delta + row * width + channels, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, softplus(raw + bias), 0.0)


@triton.jit
def gated(d_out, z, row, channels, width, inside, GATED: tl.constexpr):
    """Return the gradient of y, before the gate, of one row."""
    g = tl.load(d_out + row * width + channels, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        opening = tl.load(z + row * width + channels, mask=inside, other=0.0).to(tl.float32)
        g *= opening * tl.sigmoid(opening)
    return g


@triton.jit
def advanced(h, a, d, x, b, row, states, n_states):
    """Return the state one step on."""
    written = tl.load(b + row * n_states + states, mask=states < n_states, other=0.0).to(tl.float32)
    return tl.exp2(d[None, :] * a) * h + written[:, None] * (d * x)[None, :]


@triton.jit
def chunk_states(
    u, delta, bias, a, b, starts, ends, passed, totals, width,
    n_states: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Run one chunk from a zero state; write its last state and Σδ."""
    chunk = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    states = tl.arange(0, STATES)
    inside = channels < width
    both = (states[:, None] < n_states) & inside[None, :]
    rates = tl.load(a + states[:, None] * width + channels[None, :], mask=both, other=0.0)
    offset = tl.load(bias + channels, mask=inside, other=0.0)
    h = tl.zeros([STATES, CHANNELS], tl.float32)
    total = tl.zeros([CHANNELS], tl.float32)
    for row in range(tl.load(starts + chunk).to(tl.int64), tl.load(ends + chunk).to(tl.int64)):
        d = step_size(delta, offset, row, channels, width, inside)
        x = tl.load(u + row * width + channels, mask=inside, other=0.0).to(tl.float32)
        h = advanced(h, rates, d, x, b, row, states, n_states)
        total += d
    place = (chunk * n_states + states[:, None]) * width + channels[None, :]
    tl.store(passed + place, h, mask=both)
    tl.store(totals + chunk * width + channels, total, mask=inside)


@triton.jit
def carry(passed, totals, a, first, carried, size, width, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    """Write what reaches each chunk of one bag, from its start or from its end, for a block of (state, channel)."""
    bag = tl.program_id(0)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    rates = tl.load(a + places, mask=inside, other=0.0)
    begin, end = tl.load(first + bag).to(tl.int64), tl.load(first + bag + 1).to(tl.int64)
    h = tl.zeros([BLOCK], tl.float32)
    for i in range(begin, end):
        chunk = begin + end - 1 - i if REVERSE else i
        tl.store(carried + chunk * size + places, h, mask=inside)
        total = tl.load(totals + chunk * width + places % width, mask=inside, other=0.0)
        h = tl.load(passed + chunk * size + places, mask=inside, other=0.0) + tl.exp2(total * rates) * h


@triton.jit
def chunk_outputs(
    u, delta, bias, a, b, c, skip, z, first_states, starts, ends, out, width,
    n_states: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Run one chunk from its true first state and write its outputs."""
    chunk = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    states = tl.arange(0, STATES)
    inside = channels < width
    both = (states[:, None] < n_states) & inside[None, :]
    rates = tl.load(a + states[:, None] * width + channels[None, :], mask=both, other=0.0)
    offset = tl.load(bias + channels, mask=inside, other=0.0)
    through = tl.load(skip + channels, mask=inside, other=0.0)
    place = (chunk * n_states + states[:, None]) * width + channels[None, :]
    h = tl.load(first_states + place, mask=both, other=0.0)
    for row in range(tl.load(starts + chunk).to(tl.int64), tl.load(ends + chunk).to(tl.int64)):
        d = step_size(delta, offset, row, channels, width, inside)
        x = tl.load(u + row * width + channels, mask=inside, other=0.0).to(tl.float32)
        h = advanced(h, rates, d, x, b, row, states, n_states)
        read = tl.load(c + row * n_states + states, mask=states < n_states, other=0.0).to(tl.float32)
        y = tl.sum(h * read[:, None], 0) + through * x
        if GATED:
            opening = tl.load(z + row * width + channels, mask=inside, other=0.0).to(tl.float32)
            y *= opening * tl.sigmoid(opening)
        tl.store(out + row * width + channels, y, mask=inside)


@triton.jit
def chunk_adjoints(
    delta, bias, a, c, z, d_out, starts, ends, passed, totals, width,
    n_states: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Run the adjoint of one chunk from zero at its end; write what leaves at its start and Σδ."""
    chunk = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    states = tl.arange(0, STATES)
    inside = channels < width
    both = (states[:, None] < n_states) & inside[None, :]
    rates = tl.load(a + states[:, None] * width + channels[None, :], mask=both, other=0.0)
    offset = tl.load(bias + channels, mask=inside, other=0.0)
    adjoint = tl.zeros([STATES, CHANNELS], tl.float32)
    total = tl.zeros([CHANNELS], tl.float32)
    start, end = tl.load(starts + chunk).to(tl.int64), tl.load(ends + chunk).to(tl.int64)
    for i in range(start, end):
        row = start + end - 1 - i
        d = step_size(delta, offset, row, channels, width, inside)
        g = gated(d_out, z, row, channels, width, inside, GATED)
        read = tl.load(c + row * n_states + states, mask=states < n_states, other=0.0).to(tl.float32)
        adjoint = (adjoint + read[:, None] * g[None, :]) * tl.exp2(d[None, :] * rates)
        total += d
    place = (chunk * n_states + states[:, None]) * width + channels[None, :]
    tl.store(passed + place, adjoint, mask=both)
    tl.store(totals + chunk * width + channels, total, mask=inside)


@triton.jit
def state_gradients(
    h, through, x, g, c, c_partial, z, d_out, d_z, row, channels, width, states, n_states, fresh,
    GATED: tl.constexpr,
):  # fmt: skip
    """Write the gradients of C and z of one row, which need the state after it."""
    inside, taking = channels < width, states < n_states
    place, state_place = row * width + channels, row * n_states + states
    older = tl.load(c_partial + state_place, mask=taking & (states * 0 + fresh == 0), other=0.0)
    tl.store(c_partial + state_place, tl.sum(h * g[None, :], 1) + older, mask=taking)
    if GATED:
        read = tl.load(c + state_place, mask=taking, other=0.0).to(tl.float32)
        opening = tl.load(z + place, mask=inside, other=0.0).to(tl.float32)
        sigma = tl.sigmoid(opening)
        y = tl.sum(h * read[:, None], 0) + through * x
        raw = tl.load(d_out + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_z + place, raw * y * sigma * (1 + opening * (1 - sigma)), mask=inside)


@triton.jit
def step_gradient(
    before, adjoint, sum_a, sum_d, sum_bias, a, offset, through, u, delta, b, c, z, d_out,
    d_u, d_delta, b_partial, row, end, channels, width, states, n_states, fresh, GATED: tl.constexpr,
):  # fmt: skip
    """Write the other gradients of one row, if it lies in the chunk; return the adjoint before it and the sums."""
    inside = (channels < width) & (channels * 0 + row < end)
    taking = (states < n_states) & (states * 0 + row < end)
    place, state_place = row * width + channels, row * n_states + states
    raw = tl.load(delta + place, mask=inside, other=0.0).to(tl.float32) + offset
    d = tl.where(inside, softplus(raw), 0.0)
    x = tl.load(u + place, mask=inside, other=0.0).to(tl.float32)
    g = gated(d_out, z, row, channels, width, inside, GATED)
    adjoint += tl.load(c + state_place, mask=taking, other=0.0).to(tl.float32)[:, None] * g[None, :]
    older = tl.load(b_partial + state_place, mask=taking & (states * 0 + fresh == 0), other=0.0)
    tl.store(b_partial + state_place, tl.sum(adjoint * (d * x)[None, :], 1) + older, mask=taking)
    written = tl.load(b + state_place, mask=taking, other=0.0).to(tl.float32)
    read_back = tl.sum(adjoint * written[:, None], 0)
    adjoint *= tl.exp2(d[None, :] * a)
    product = adjoint * before
    sum_a += product * d[None, :]
    grad_d = tl.where(inside, (tl.sum(product * a, 0) / LOG2_E + x * read_back) * tl.sigmoid(raw), 0.0)
    tl.store(d_u + place, d * read_back + through * g, mask=inside)
    tl.store(d_delta + place, grad_d, mask=inside)
    return adjoint, sum_a, sum_d + g * x, sum_bias + grad_d


@triton.jit
def chunk_gradients(
    u, delta, bias, a, b, c, skip, z, d_out, first_states, arriving, starts, ends, scratch,
    d_u, d_delta, d_a, d_b, d_c, d_d, d_z, d_bias, n_rows, width, n_chunks, items, kept,
    n_states: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr, GROUPED: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """Write all gradients of some chunks, each for one group of channel blocks."""
    states = tl.arange(0, STATES)
    lane = tl.arange(0, CHANNELS)
    own = scratch + tl.program_id(0).to(tl.int64) * kept * STATES * CHANNELS
    tile = states[:, None] * CHANNELS + lane[None, :]
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        chunk, group = item % n_chunks, item // n_chunks
        start, end = tl.load(starts + chunk).to(tl.int64), tl.load(ends + chunk).to(tl.int64)
        b_partial = d_b + (start * 0 + group) * n_rows * n_states
        c_partial = d_c + (start * 0 + group) * n_rows * n_states
        for number in range(GROUPED):
            channels = (group * GROUPED + number) * CHANNELS + lane
            inside = channels < width
            fresh = (number == 0) * 1
            both = (states[:, None] < n_states) & inside[None, :]
            rates = tl.load(a + states[:, None] * width + channels[None, :], mask=both, other=0.0)
            offset = tl.load(bias + channels, mask=inside, other=0.0)
            through = tl.load(skip + channels, mask=inside, other=0.0)
            place = ((start * 0 + chunk) * n_states + states[:, None]) * width + channels[None, :]
            h = tl.load(first_states + place, mask=both, other=0.0)
            for row in range(start, end):
                even = tile * 0 + (row - start) % 2 == 0
                tl.store(own + (row - start) // 2 * STATES * CHANNELS + tile, h, mask=even)
                d = step_size(delta, offset, row, channels, width, inside)
                x = tl.load(u + row * width + channels, mask=inside, other=0.0).to(tl.float32)
                h = advanced(h, rates, d, x, b, row, states, n_states)
                g = gated(d_out, z, row, channels, width, inside, GATED)
                state_gradients(
                    h, through, x, g, c, c_partial, z, d_out, d_z, row, channels, width, states, n_states, fresh, GATED
                )
            tl.debug_barrier()
            adjoint = tl.load(arriving + place, mask=both, other=0.0)
            sum_a = tl.zeros([STATES, CHANNELS], tl.float32)
            sum_d = tl.zeros([CHANNELS], tl.float32)
            sum_bias = tl.zeros([CHANNELS], tl.float32)
            n_pairs = (end - start + 1) // 2
            for i in range(n_pairs):
                pair = n_pairs - 1 - i
                row = start + pair * 2
                h = tl.load(own + pair * STATES * CHANNELS + tile)
                d = step_size(delta, offset, row, channels, width, inside)
                x = tl.load(u + row * width + channels, mask=inside, other=0.0).to(tl.float32)
                adjoint, sum_a, sum_d, sum_bias = step_gradient(
                    advanced(h, rates, d, x, b, row, states, n_states), adjoint, sum_a, sum_d, sum_bias,
                    rates, offset, through, u, delta, b, c, z, d_out, d_u, d_delta, b_partial, row + 1, end,
                    channels, width, states, n_states, fresh, GATED,
                )  # fmt: skip
                adjoint, sum_a, sum_d, sum_bias = step_gradient(
                    h, adjoint, sum_a, sum_d, sum_bias,
                    rates, offset, through, u, delta, b, c, z, d_out, d_u, d_delta, b_partial, row, end,
                    channels, width, states, n_states, fresh, GATED,
                )  # fmt: skip
            tl.store(d_a + place, sum_a, mask=both)
            lane_place = (start * 0 + chunk) * width + channels
            tl.store(d_d + lane_place, sum_d, mask=inside)
            tl.store(d_bias + lane_place, sum_bias, mask=inside)
            tl.debug_barrier()
