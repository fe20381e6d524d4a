# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The gate of the attention on a GPU, between two products that the vendor's library runs.

The projections ``P = [V h, U h]`` are one matrix product; a kernel turns a block of P's rows into raw scores. The
backward kernel turns P and the scores' gradient into the gradient of P, from which two products give the rest. With
P kept nothing is projected twice; without, rows go by in chunks that stay in the L2 cache and are projected again.

`one_pass` projects, scores and pools in one kernel, which reads a block of instances twice, but only once from memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from eosin.kernels._chunks import chunk_table
from eosin.kernels._dispatch import interpreting
from eosin.kernels._dropout import threshold
from eosin.kernels._rows import Rows
from eosin.kernels.gated_attention.torch_impl import Gate, Kept, Masks, Pooling, halves
from eosin.kernels.segment_pool import triton_impl as segment_pool
from eosin.kernels.segment_pool.triton_impl import LOG2_E, NEVER, places_of, pool_combine

RECOMPUTED_ROWS = 132 * 128  # projected again at once: one wave of tiles on an H200, 33 MB of instances at D = 1024
BACKWARD_PROGRAMS = 264
RELU, TANH = tl.constexpr(0), tl.constexpr(1)


def launch_sizes(hidden: int, heads: int, dtype: torch.dtype) -> dict[str, int]:
    """Return block sizes without spills on Triton 3.6 and 3.9, a plain function of the shapes."""
    return {
        "ROW_BLOCK": 32,
        "HIDDEN_BLOCK": min(64 if heads == 1 else 16, max(16, triton.next_power_of_2(hidden))),
        "HEAD_BLOCK": 1 if heads == 1 else max(16, triton.next_power_of_2(heads)),
        "num_warps": 8 if heads == 1 or dtype == torch.float32 else 4,
    }


def score_forward(source: Rows, gate: Gate, keep_branches: bool) -> tuple[Tensor, Tensor]:  # noqa: FBT001
    """Return raw scores (N, H) and P, if it is to be kept: (N or 0, A or 2A)."""
    kept = Kept.make(source, gate, instances=False, branches=keep_branches).branches
    scores = gate.w_weight.new_empty((len(source), len(gate.w_weight)))
    weight = _stacked(gate)
    for chunk in _chunks(source, kept):
        projected = source[chunk].to(weight.dtype) @ weight.T
        if len(kept):
            kept[chunk].copy_(projected)
        _score(projected, gate, scores[chunk], chunk.start)
    return scores, kept


def score_backward(
    upstream: list[Tensor],
    results: list[Tensor],
    needs: list[bool],
    source: Rows,
    gate: Gate,
    keep_branches: bool,  # noqa: FBT001
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the values (if needed) and of the six tensors of the gate."""
    (d_scores,), (kept,), weight = upstream, results, _stacked(gate)
    d_values = source.new_gradient() if needs[0] else None
    d_weight = torch.zeros_like(weight, dtype=torch.float32)
    d_bias = d_weight.new_zeros(len(weight))
    d_w = torch.zeros_like(gate.w_weight)
    for chunk in _chunks(source, kept):
        rows = source[chunk].to(weight.dtype)
        projected = kept[chunk] if len(kept) else rows @ weight.T
        d_projected, part_bias, part_w = _score_gradient(projected, gate, d_scores[chunk].contiguous(), chunk.start)
        d_bias += part_bias
        d_w += part_w
        d_weight += _wide_product(d_projected.T, rows)
        if d_values is not None:
            source.add_gradient(d_values, chunk, d_projected @ weight)
    return d_values, *halves(d_weight, d_bias, len(gate.v_weight)), d_w, d_scores.sum(0)


def one_pass_sizes(n_rows: int, hidden: int, width: int) -> dict[str, int]:
    """Return rows per chunk and block sizes of `one_pass`: a plain function of the shapes."""
    return {
        "rows": 256 if n_rows < 32768 else 1024,
        "ROW_BLOCK": 64,
        "HIDDEN_BLOCK": min(64, max(16, triton.next_power_of_2(hidden))),
        "INNER_BLOCK": min(64, max(16, triton.next_power_of_2(width))),
        "WIDTH_BLOCK": max(16, triton.next_power_of_2(width)),
        "READ_BLOCK": 16,
        "num_warps": 8,
    }


def one_pass(pooling: Pooling) -> tuple[Tensor, ...]:
    """Return scores (N, 1), pooled (B, 1, D), log-sum-exp and entropy (B, 1) in float32, of one head; none kept."""
    source, gate, cu_seqlens, added = pooling.values, pooling.gate, pooling.cu_seqlens, _added(pooling.masks)
    weight = _stacked(gate).contiguous()
    values, bias = source.values.to(weight.dtype).contiguous(), _stacked_bias(gate)
    n_bags, width = cu_seqlens.shape[0] - 1, values.shape[1]
    sizes = one_pass_sizes(len(source), len(gate.v_weight), width)
    table = chunk_table(cu_seqlens, sizes.pop("rows"))
    empty = gate.w_weight.new_empty
    scores, pooled = empty(len(source), 1), empty(n_bags, 1, width)
    top, total, spread = (empty(table.n_chunks, 1) for _ in range(3))
    weighted, lse, entropy = empty(table.n_chunks, 1, width), empty(n_bags, 1), empty(n_bags, 1)
    score_bias = empty(1).zero_() if gate.w_bias is None else gate.w_bias
    if table.n_chunks:
        one_pass_partial[(table.n_chunks,)](
            values, table.start if source.index is None else source.index.contiguous(), weight, bias,
            gate.w_weight.contiguous(), score_bias, pooling.masks.temperature,
            bias if added is None else added.contiguous(), table.start, table.end, scores, top, total, spread,
            weighted, width, len(gate.v_weight), GATED=gate.u_weight is not None,
            ACTIVATION=1 if gate.activation == "tanh" else 0, MASKED=added is not None,
            GATHERED=source.index is not None, NARROW=not interpreting(),
            **sizes,
        )  # fmt: skip
    if n_bags:
        columns = min(256, max(16, triton.next_power_of_2(width)))
        pool_combine[(n_bags, 1, triton.cdiv(width, columns))](
            top, total, spread, weighted, table.first, pooled, lse, entropy, 1, width,
            COLUMN_BLOCK=columns, SOFTMAX=True, num_warps=4,
        )  # fmt: skip
    kept = pooling.new_kept()
    return scores, pooled, lse, entropy, kept.instances, kept.branches


def one_pass_backward(
    upstream: list[Tensor], results: list[Tensor], needs: list[bool], pooling: Pooling
) -> tuple[Tensor | None, ...]:
    """Return the gradients, as `torch_impl.pool_backward`; instances are projected again, in chunks."""
    source, masks, scores = pooling.values, pooling.masks, results[0]
    pooled = (upstream[1:], results[1:4], [True, needs[0]], scores, source, pooling.cu_seqlens)
    d_scores, d_pooled_values = segment_pool.backward(*pooled)
    assert d_scores is not None
    d_scores = torch.where(scores == float("-inf"), 0, d_scores + upstream[0])
    gate_needs = [needs[0], *needs[3:9]]
    d_values, *d_gate, _ = score_backward(
        [d_scores / masks.temperature], results[5:], gate_needs, source, pooling.gate, keep_branches=False
    )
    if d_values is not None and d_pooled_values is not None:
        d_values += d_pooled_values
    return d_values, None, None, *d_gate, *masks.gradients(d_scores, scores)


def _added(masks: Masks) -> Tensor | None:
    """Return both masks of one head as what is added to its scores, (N,)."""
    added = None if masks.added is None else masks.added.flatten()
    if masks.keep is None:
        return added
    never = torch.zeros(len(masks.keep), device=masks.keep.device).masked_fill_(~masks.keep.flatten(), float("-inf"))
    return never if added is None else never + added


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """Return left right in float32 without rounding the result to half precision on the way."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right


def _chunks(source: Rows, kept: Tensor) -> list[slice]:
    """Cut the instances where they are projected again or gathered, so that no copy of all of them exists."""
    whole = len(kept) and source.index is None
    size = max(1, len(source)) if whole else RECOMPUTED_ROWS
    return [slice(first, min(first + size, len(source))) for first in range(0, len(source), size)]


def _stacked(gate: Gate) -> Tensor:
    return gate.v_weight if gate.u_weight is None else torch.cat([gate.v_weight, gate.u_weight])


def _stacked_bias(gate: Gate) -> Tensor:
    hidden = len(gate.v_weight)
    parts = [gate.v_bias] if gate.u_weight is None else [gate.v_bias, gate.u_bias]
    zeros = gate.w_weight.new_zeros(hidden)
    return torch.cat([zeros if part is None else part for part in parts])


def _options(gate: Gate, first_row: int) -> dict[str, int | float | bool]:
    return {
        "seed": gate.seed,
        "first_row": first_row,
        "dropped": threshold(gate.drop_probability),
        "GATED": gate.u_weight is not None,
        "ACTIVATION": 1 if gate.activation == "tanh" else 0,
        "DROPOUT": gate.dropout > 0,
    }


def _score(projected: Tensor, gate: Gate, scores: Tensor, first_row: int) -> None:
    hidden, heads = len(gate.v_weight), len(gate.w_weight)
    sizes = launch_sizes(hidden, heads, projected.dtype)
    bias = scores.new_zeros(heads) if gate.w_bias is None else gate.w_bias
    gate_scores[(triton.cdiv(len(projected), sizes["ROW_BLOCK"]),)](
        projected, _stacked_bias(gate), gate.scaled_w.contiguous(), bias, scores, len(projected), hidden, heads,
        **_options(gate, first_row), **sizes,
    )  # fmt: skip


def _score_gradient(projected: Tensor, gate: Gate, d_scores: Tensor, first_row: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of P (n, A or 2A), of the stacked bias and of w (H, A)."""
    hidden, heads = len(gate.v_weight), len(gate.w_weight)
    sizes = launch_sizes(hidden, heads, projected.dtype)
    programs = min(BACKWARD_PROGRAMS, triton.cdiv(len(projected), sizes["ROW_BLOCK"]))
    d_projected = torch.empty_like(projected)
    d_bias = d_scores.new_empty((programs, projected.shape[1]))
    d_w = d_scores.new_empty((programs, heads, hidden))
    gate_gradient[(programs, triton.cdiv(hidden, sizes["HIDDEN_BLOCK"]))](
        projected, _stacked_bias(gate), gate.scaled_w.contiguous(), d_scores, d_projected, d_bias, d_w,
        len(projected), hidden, heads, **_options(gate, first_row), **sizes,
    )  # fmt: skip
    return d_projected, d_bias.sum(0), d_w.sum(0) / (1 - gate.drop_probability)


@triton.jit
def mixed(bits):
    """Scramble 32-bit integers, as `dropout._mixed`."""
    bits = bits ^ (bits >> 16)
    bits = bits * 0x7FEB352D
    bits = bits ^ (bits >> 15)
    bits = bits * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def is_kept(seed, rows, columns, dropped):
    """Return which entries of a tile dropout keeps: rows of the pack, hidden columns -> (rows, columns)."""
    row, column = mixed(rows.to(tl.uint32)), mixed(columns.to(tl.uint32) + 0x5BD1E995)
    factor, addend = mixed(row ^ seed.to(tl.uint32)), mixed(row ^ (seed ^ 1).to(tl.uint32))
    bits = factor[:, None] * mixed(column ^ (seed ^ 2).to(tl.uint32))[None, :] + addend[:, None]
    return bits.to(tl.int32, bitcast=True) >= dropped


@triton.jit
def activated(p, ACTIVATION: tl.constexpr):
    """Return tanh(p) or relu(p)."""
    if ACTIVATION == TANH:
        decayed = tl.exp2(tl.abs(p) * -2.885390081777927)  # e^(-2|p|)
        magnitude = (1 - decayed) / (1 + decayed)
        small = p * (1 - p * p * (1 / 3 - p * p * (2 / 15)))  # 1 - e^(-2|p|) loses its digits near 0
        t = tl.where(tl.abs(p) < 0.03, small, tl.where(p < 0, -magnitude, magnitude))
    else:
        t = tl.maximum(p, 0.0)
    return t


@triton.jit(do_not_specialize=["seed"])
def gate_scores(
    projected, bias, w, w_bias, scores, n_rows, hidden, heads, seed, first_row, dropped,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr,
    ROW_BLOCK: tl.constexpr, HIDDEN_BLOCK: tl.constexpr, HEAD_BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the raw scores of a block of rows."""
    rows = tl.program_id(0) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    head = tl.arange(0, HEAD_BLOCK)
    width = hidden * (2 if GATED else 1)
    s = tl.zeros([ROW_BLOCK, HEAD_BLOCK], tl.float32)
    for first in range(0, hidden, HIDDEN_BLOCK):
        columns = first + tl.arange(0, HIDDEN_BLOCK)
        inside = (rows[:, None] < n_rows) & (columns[None, :] < hidden)
        source = projected + rows[:, None].to(tl.int64) * width + columns[None, :]
        p = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        p += tl.load(bias + columns, mask=columns < hidden, other=0.0)[None, :]
        y = activated(p, ACTIVATION)
        if GATED:
            q = tl.load(source + hidden, mask=inside, other=0.0).to(tl.float32)
            q += tl.load(bias + hidden + columns, mask=columns < hidden, other=0.0)[None, :]
            y *= tl.sigmoid(q)
        if DROPOUT:
            y = tl.where(is_kept(seed, rows + first_row, columns, dropped), y, 0.0)
        weight = tl.load(
            w + head[:, None] * hidden + columns[None, :],
            mask=(head[:, None] < heads) & (columns[None, :] < hidden),
            other=0.0,
        )
        if HEAD_BLOCK == 1:
            s += tl.sum(y * tl.reshape(weight, [1, HIDDEN_BLOCK]), 1)[:, None]
        else:
            s += tl.dot(y, tl.trans(weight), input_precision="ieee")
    s += tl.load(w_bias + head, mask=head < heads, other=0.0)[None, :]
    tl.store(
        scores + rows[:, None].to(tl.int64) * heads + head[None, :],
        s,
        mask=(rows[:, None] < n_rows) & (head[None, :] < heads),
    )


@triton.jit(do_not_specialize=["seed"])
def gate_gradient(
    projected, bias, w, d_scores, d_projected, d_bias, d_w, n_rows, hidden, heads,
    seed, first_row, dropped,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr,
    ROW_BLOCK: tl.constexpr, HIDDEN_BLOCK: tl.constexpr, HEAD_BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of P for one block of hidden columns, every so many rows, and this program's sums."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.program_id(1) * HIDDEN_BLOCK + tl.arange(0, HIDDEN_BLOCK)
    head = tl.arange(0, HEAD_BLOCK)
    width = hidden * (2 if GATED else 1)
    weight = tl.load(
        w + head[:, None] * hidden + columns[None, :],
        mask=(head[:, None] < heads) & (columns[None, :] < hidden),
        other=0.0,
    )
    p_bias = tl.load(bias + columns, mask=columns < hidden, other=0.0)
    sum_p = tl.zeros([HIDDEN_BLOCK], tl.float32)
    sum_q = tl.zeros([HIDDEN_BLOCK], tl.float32)
    sum_w = tl.zeros([HEAD_BLOCK, HIDDEN_BLOCK], tl.float32)
    for first in range(program * ROW_BLOCK, n_rows, programs * ROW_BLOCK):
        rows = first + tl.arange(0, ROW_BLOCK)
        exists = (rows[:, None] < n_rows) & (columns[None, :] < hidden)
        place = rows[:, None].to(tl.int64) * width + columns[None, :]
        p = tl.load(projected + place, mask=exists, other=0.0).to(tl.float32) + p_bias[None, :]
        t = activated(p, ACTIVATION)
        ds = tl.load(
            d_scores + rows[:, None].to(tl.int64) * heads + head[None, :],
            mask=(rows[:, None] < n_rows) & (head[None, :] < heads),
            other=0.0,
        )
        if HEAD_BLOCK == 1:
            d = ds * tl.reshape(weight, [1, HIDDEN_BLOCK])
        else:
            d = tl.dot(ds, weight, input_precision="ieee")
        reads = exists & is_kept(seed, rows + first_row, columns, dropped) if DROPOUT else exists
        y = tl.where(reads, t, 0.0)
        if GATED:
            q = tl.load(projected + place + hidden, mask=exists, other=0.0).to(tl.float32)
            g = tl.sigmoid(q + tl.load(bias + hidden + columns, mask=columns < hidden, other=0.0)[None, :])
            y *= g
            d_q = d * y * (1 - g)
            tl.store(d_projected + place + hidden, d_q, mask=exists)
            sum_q += tl.sum(d_q, 0)
            d *= g
        slope = 1 - t * t if ACTIVATION == TANH else (p > 0).to(tl.float32)
        d_p = tl.where(reads, d * slope, 0.0)
        tl.store(d_projected + place, d_p, mask=exists)
        sum_p += tl.sum(d_p, 0)
        if HEAD_BLOCK == 1:
            sum_w += tl.sum(ds * y, 0)[None, :]
        else:
            sum_w += tl.dot(tl.trans(ds), y, input_precision="ieee")
    tl.store(d_bias + program * width + columns, sum_p, mask=columns < hidden)
    if GATED:
        tl.store(d_bias + program * width + hidden + columns, sum_q, mask=columns < hidden)
    tl.store(
        d_w + (program * heads + head)[:, None] * hidden + columns[None, :],
        sum_w,
        mask=(head[:, None] < heads) & (columns[None, :] < hidden),
    )


@triton.jit
def projected_rows(
    values, weight, rows, places, end, first_hidden, hidden, width,
    ROW_BLOCK: tl.constexpr, HIDDEN_BLOCK: tl.constexpr, INNER_BLOCK: tl.constexpr, GATED: tl.constexpr,
    NARROW: tl.constexpr,
):  # fmt: skip
    """Return V h and U h of a block of rows for some hidden columns; both read the same tile of instances."""
    columns = first_hidden + tl.arange(0, HIDDEN_BLOCK)
    p = tl.zeros([ROW_BLOCK, HIDDEN_BLOCK], tl.float32)
    q = tl.zeros([ROW_BLOCK, HIDDEN_BLOCK], tl.float32)
    for inner in range(0, width, INNER_BLOCK):
        k = inner + tl.arange(0, INNER_BLOCK)
        x = tl.load(
            values + places[:, None] * width + k[None, :],
            mask=(rows[:, None] < end) & (k[None, :] < width),
            other=0.0,
        )
        place = columns[None, :] * width + k[:, None]
        inside = (columns[None, :] < hidden) & (k[:, None] < width)
        v = tl.load(weight + place, mask=inside, other=0.0)
        if not NARROW:  # the interpreter multiplies bfloat16 as integers
            x, v = x.to(tl.float32), v.to(tl.float32)
        p = tl.dot(x, v, p, input_precision="ieee")
        if GATED:
            u = tl.load(weight + hidden * width + place, mask=inside, other=0.0)
            if not NARROW:
                u = u.to(tl.float32)
            q = tl.dot(x, u, q, input_precision="ieee")
    return p, q


@triton.jit
def one_pass_partial(
    values, row_index, weight, bias, w, w_bias, temperature, added, starts, ends, scores, top, total, spread,
    weighted, width, hidden,
    GATHERED: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, MASKED: tl.constexpr, NARROW: tl.constexpr,
    ROW_BLOCK: tl.constexpr, HIDDEN_BLOCK: tl.constexpr, INNER_BLOCK: tl.constexpr, WIDTH_BLOCK: tl.constexpr,
    READ_BLOCK: tl.constexpr,
):  # fmt: skip
    """Score the rows of one chunk and reduce them to its (m, l, e, Z)."""
    chunk = tl.program_id(0)
    start, end = tl.load(starts + chunk), tl.load(ends + chunk)
    column = tl.arange(0, WIDTH_BLOCK)
    m = tl.full([1], NEVER, tl.float32)
    mass = tl.zeros([1], tl.float32)
    e = tl.zeros([1], tl.float32)
    z = tl.zeros([WIDTH_BLOCK], tl.float32)
    for first in range(start, end, ROW_BLOCK):
        rows = first + tl.arange(0, ROW_BLOCK)
        places = places_of(row_index, rows, end, GATHERED)
        s = tl.zeros([ROW_BLOCK], tl.float32)
        for first_hidden in range(0, hidden, HIDDEN_BLOCK):
            p, q = projected_rows(
                values, weight, rows, places, end, first_hidden, hidden, width,
                ROW_BLOCK, HIDDEN_BLOCK, INNER_BLOCK, GATED, NARROW,
            )  # fmt: skip
            columns = first_hidden + tl.arange(0, HIDDEN_BLOCK)
            y = activated(p + tl.load(bias + columns, mask=columns < hidden, other=0.0)[None, :], ACTIVATION)
            if GATED:
                y *= tl.sigmoid(q + tl.load(bias + hidden + columns, mask=columns < hidden, other=0.0)[None, :])
            s += tl.sum(y * tl.load(w + columns, mask=columns < hidden, other=0.0)[None, :], 1)
        s = (s + tl.load(w_bias)) / tl.load(temperature)
        if MASKED:
            s += tl.load(added + rows, mask=rows < end, other=0.0)
        s = tl.where(rows < end, s, NEVER)
        tl.store(scores + rows, s, mask=rows < end)
        new = tl.maximum(m, tl.max(s, 0))
        shift = tl.where(new == NEVER, 0.0, new)
        share = tl.exp2((s - shift) * LOG2_E)
        decay = tl.exp2((m - shift) * LOG2_E)
        lowered = tl.where(decay > 0, m - shift, 0.0)
        e = (e + lowered * mass) * decay + tl.sum(tl.where(share > 0, s - shift, 0.0) * share, 0)
        mass = mass * decay + tl.sum(share, 0)
        z = z * decay
        m = new
        tl.debug_barrier()  # the scores are read again by other threads
        for part in range(0, ROW_BLOCK, READ_BLOCK):
            again = first + part + tl.arange(0, READ_BLOCK)
            weight_again = tl.exp2((tl.load(scores + again, mask=again < end, other=NEVER) - shift) * LOG2_E)
            x = tl.load(
                values + places_of(row_index, again, end, GATHERED)[:, None] * width + column[None, :],
                mask=(again[:, None] < end) & (column[None, :] < width),
                other=0.0,
            )
            z += tl.sum(x.to(tl.float32) * weight_again[:, None], 0)
    one = tl.zeros([1], tl.int64) + chunk
    tl.store(top + one, m)
    tl.store(total + one, mass)
    tl.store(spread + one, e)
    tl.store(weighted + chunk.to(tl.int64) * width + column, z, mask=column < width)
