# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Pooling within bags on a GPU: partial sums per chunk of rows, merged in a fixed order.

One program holds a chunk's running (m, l, e, Z) for a block of columns and a block of heads; a second kernel merges
the chunks of each bag. The backward pass reads the instances once for the scores' gradient and writes theirs once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from eosin.kernels._chunks import ChunkTable, chunk_table
from eosin.kernels._dispatch import interpreting
from eosin.kernels._rows import Rows

NEVER = tl.constexpr(float("-inf"))
LOG2_E = tl.constexpr(1.4426950408889634)
TOPK_ROWS = 1024


def launch_sizes(n_rows: int, heads: int, width: int) -> dict[str, int]:
    """Return rows per chunk and block sizes: a plain function of the shapes, so that results never change."""
    head_block = 1 if heads == 1 else min(64, max(16, triton.next_power_of_2(heads)))
    column_block = 128 if head_block == 64 else 256
    return {
        "rows": 256 if n_rows < 8192 else 1024,
        "ROW_BLOCK": 32,
        "HEAD_BLOCK": head_block,
        "COLUMN_BLOCK": min(column_block, max(16, triton.next_power_of_2(width))),
        "gradient_columns": min(column_block // 2, max(16, triton.next_power_of_2(width))),
        "num_warps": 8 if head_block == 64 else 4,  # with 4, Triton 3.6 spills
    }


def forward(scores: Tensor, source: Rows, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return pooled (B, H, D), log-sum-exp (B, H) and entropy (B, H) in float32."""
    pooled, lse, entropy = _pool(scores.contiguous(), source, cu_seqlens, softmax=True)
    return pooled, lse, entropy


def weighted_forward(weights: Tensor, source: Rows, cu_seqlens: Tensor) -> Tensor:
    """Return Σ weight · value of each bag: (B, H, D) in float32."""
    return _pool(weights.contiguous(), source, cu_seqlens, softmax=False)[0]


def _pool(scores: Tensor, source: Rows, cu_seqlens: Tensor, *, softmax: bool) -> tuple[Tensor, Tensor, Tensor]:
    values = source.values.contiguous()
    n_rows, heads = scores.shape
    width, n_bags = values.shape[1], cu_seqlens.shape[0] - 1
    sizes = launch_sizes(n_rows, heads, width)
    table = chunk_table(cu_seqlens, sizes["rows"])
    top, total, spread = (_floats(values, table.n_chunks, heads) for _ in range(3))
    weighted = _floats(values, table.n_chunks, heads, width)
    pooled = _floats(values, n_bags, heads, width)
    lse, entropy = _floats(values, n_bags, heads), _floats(values, n_bags, heads)
    columns = max(1, triton.cdiv(width, sizes["COLUMN_BLOCK"]))  # without values there is still a sum to take
    head_blocks = triton.cdiv(heads, sizes["HEAD_BLOCK"])
    if table.n_chunks:
        pool_partial[(table.n_chunks, columns, head_blocks)](
            scores, values, _index(source, table), table.start, table.end, top, total, spread, weighted, heads, width,
            GATHERED=source.index is not None, ROW_BLOCK=sizes["ROW_BLOCK"], HEAD_BLOCK=sizes["HEAD_BLOCK"],
            COLUMN_BLOCK=sizes["COLUMN_BLOCK"],
            SOFTMAX=softmax, NARROW=not interpreting(), num_warps=sizes["num_warps"],
        )  # fmt: skip
    if n_bags:
        pool_combine[(n_bags, heads, columns)](
            top, total, spread, weighted, table.first, pooled, lse, entropy, heads, width,
            COLUMN_BLOCK=sizes["COLUMN_BLOCK"], SOFTMAX=softmax, num_warps=sizes["num_warps"],
        )  # fmt: skip
    return pooled, lse, entropy


def backward(
    upstream: list[Tensor],
    results: list[Tensor],
    needs: list[bool],
    scores: Tensor,
    source: Rows,
    cu_seqlens: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of scores and values, as `torch_impl.backward`."""
    g_pooled, g_lse, g_entropy = upstream
    pooled, lse, entropy = results
    level = g_lse - (pooled * g_pooled).sum(2)
    per_bag = (level, lse, entropy, g_entropy)
    return _gradients(needs, scores.contiguous(), source, cu_seqlens, g_pooled, per_bag)


def weighted_backward(
    upstream: list[Tensor],
    results: list[Tensor],
    needs: list[bool],
    weights: Tensor,
    source: Rows,
    cu_seqlens: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of given weights and of values: ``dw = x·g_z`` and ``dx = w g_z``."""
    unused = upstream[0].new_empty(1)
    return _gradients(needs, weights.contiguous(), source, cu_seqlens, upstream[0], (unused,) * 4, softmax=False)


def _gradients(
    needs: list[bool],
    scores: Tensor,
    source: Rows,
    cu_seqlens: Tensor,
    g_pooled: Tensor,
    per_bag: tuple[Tensor, ...],
    *,
    softmax: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    values = source.values.contiguous()
    n_rows, heads = scores.shape
    width = values.shape[1]
    sizes = launch_sizes(n_rows, heads, width)
    table = chunk_table(cu_seqlens, sizes["rows"])
    d_scores = torch.empty_like(scores) if needs[0] else None
    d_values = values.new_empty(n_rows, width) if needs[1] else None
    blocks = {name: sizes[name] for name in ("ROW_BLOCK", "HEAD_BLOCK", "num_warps")}
    blocks |= {"COLUMN_BLOCK": sizes["gradient_columns"], "NARROW": not interpreting()}
    head_blocks = triton.cdiv(heads, sizes["HEAD_BLOCK"])
    if d_scores is not None and table.n_chunks:
        score_gradient[(table.n_chunks, head_blocks)](
            scores, values, _index(source, table), table.bag, table.start, table.end, g_pooled, *per_bag, d_scores,
            heads, width, GATHERED=source.index is not None, SOFTMAX=softmax, **blocks,
        )  # fmt: skip
    if d_values is not None and table.n_chunks:
        value_gradient[(table.n_chunks, triton.cdiv(width, sizes["gradient_columns"]))](
            scores, table.bag, table.start, table.end, g_pooled, per_bag[1], d_values, heads, width,
            SOFTMAX=softmax, **blocks,
        )  # fmt: skip
    return d_scores, source.spread(d_values)


def _index(source: Rows, table: ChunkTable) -> Tensor:
    """Return the rows to read, or any tensor where they lie one after the other."""
    return table.start if source.index is None else source.index.contiguous()


def topk_mask(scores: Tensor, counts: Tensor, cu_seqlens: Tensor, *, largest: bool) -> Tensor:
    """Return which instances are among the ``counts`` (B,) highest or lowest of their bag and head: (N, H) bool."""
    scores = scores.to(torch.float32).contiguous()
    chosen = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    grid = (cu_seqlens.shape[0] - 1, scores.shape[1])
    if all(grid):
        radix_select[grid](
            scores, cu_seqlens, counts, chosen, scores.shape[1], LARGEST=largest, ROW_BLOCK=TOPK_ROWS, num_warps=8
        )
    return chosen


def _floats(like: Tensor, *size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=like.device)


@triton.jit
def product(left, right, NARROW: tl.constexpr):
    """Return left right with sums in float32, in half precision where one of them is and the device can."""
    dtype = left.dtype if left.dtype != tl.float32 else right.dtype
    if not NARROW:  # the interpreter multiplies bfloat16 as integers
        dtype = tl.float32
    return tl.dot(left.to(dtype), right.to(dtype), input_precision="ieee")


@triton.jit
def places_of(row_index, rows, end, GATHERED: tl.constexpr):
    """Return where in the values the rows of a block lie."""
    places = rows.to(tl.int64)
    if GATHERED:
        places = tl.load(row_index + rows, mask=rows < end, other=0)
    return places


@triton.jit
def pool_partial(
    scores, values, row_index, starts, ends, top, total, spread, weighted, heads, width,
    GATHERED: tl.constexpr, ROW_BLOCK: tl.constexpr, HEAD_BLOCK: tl.constexpr, COLUMN_BLOCK: tl.constexpr,
    SOFTMAX: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Reduce one chunk for one block of columns and of heads."""
    chunk = tl.program_id(0)
    columns = tl.program_id(1) * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    head = tl.program_id(2) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
    start, end = tl.load(starts + chunk), tl.load(ends + chunk)
    m = tl.full([HEAD_BLOCK], NEVER, tl.float32)
    mass = tl.zeros([HEAD_BLOCK], tl.float32)
    e = tl.zeros([HEAD_BLOCK], tl.float32)
    z = tl.zeros([HEAD_BLOCK, COLUMN_BLOCK], tl.float32)
    for first in range(start, end, ROW_BLOCK):
        rows = first + tl.arange(0, ROW_BLOCK)
        inside = (rows[:, None] < end) & (head[None, :] < heads)
        s = tl.load(scores + rows[:, None].to(tl.int64) * heads + head[None, :], mask=inside, other=NEVER)
        s = s.to(tl.float32)
        if SOFTMAX:
            new = tl.maximum(m, tl.max(s, 0))
            shift = tl.where(new == NEVER, 0.0, new)
            p = tl.exp2((s - shift[None, :]) * LOG2_E)
            decay = tl.exp2((m - shift) * LOG2_E)
            lowered = tl.where(decay > 0, m - shift, 0.0)
            relative = tl.where(p > 0, s - shift[None, :], 0.0)
            e = (e + lowered * mass) * decay + tl.sum(p * relative, 0)
            mass = mass * decay + tl.sum(p, 0)
            z = z * decay[:, None]
            m = new
        else:
            p = tl.where(inside, s, 0.0)
        places = places_of(row_index, rows, end, GATHERED)
        x = tl.load(
            values + places[:, None] * width + columns[None, :],
            mask=(rows[:, None] < end) & (columns[None, :] < width),
            other=0.0,
        )
        if HEAD_BLOCK == 1:
            z += tl.sum(tl.reshape(p, [ROW_BLOCK, 1]) * x.to(tl.float32), 0)[None, :]
        else:
            z += product(tl.trans(p), x, NARROW)
    place = chunk.to(tl.int64) * heads + head
    if SOFTMAX and tl.program_id(1) == 0:
        tl.store(top + place, m, mask=head < heads)
        tl.store(total + place, mass, mask=head < heads)
        tl.store(spread + place, e, mask=head < heads)
    tl.store(
        weighted + place[:, None] * width + columns[None, :],
        z,
        mask=(head[:, None] < heads) & (columns[None, :] < width),
    )


@triton.jit
def pool_combine(
    top, total, spread, weighted, first, pooled, lse, entropy, heads, width,
    COLUMN_BLOCK: tl.constexpr, SOFTMAX: tl.constexpr,
):  # fmt: skip
    """Merge the chunks of one bag and head for one block of columns, in order."""
    bag, head = tl.program_id(0), tl.program_id(1)
    columns = tl.program_id(2) * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    m = tl.full([1], NEVER, tl.float32)
    mass = tl.zeros([1], tl.float32)
    e = tl.zeros([1], tl.float32)
    z = tl.zeros([COLUMN_BLOCK], tl.float32)
    for chunk in range(tl.load(first + bag), tl.load(first + bag + 1)):
        place = (tl.zeros([1], tl.int64) + chunk) * heads + head
        part = tl.load(weighted + place * width + columns, mask=columns < width, other=0.0)
        if SOFTMAX:
            other = tl.load(top + place)
            other_mass = tl.load(total + place)
            other_spread = tl.load(spread + place)
            new = tl.maximum(m, other)
            shift = tl.where(new == NEVER, 0.0, new)
            mine, theirs = tl.exp2((m - shift) * LOG2_E), tl.exp2((other - shift) * LOG2_E)
            my_lead, their_lead = tl.where(mine > 0, m - shift, 0.0), tl.where(theirs > 0, other - shift, 0.0)
            e = (e + my_lead * mass) * mine + (other_spread + their_lead * other_mass) * theirs
            mass = mass * mine + other_mass * theirs
            z = z * mine + part * theirs
            m = new
        else:
            z += part
    place = (tl.zeros([1], tl.int64) + bag) * heads + head
    if SOFTMAX:
        safe = tl.where(mass > 0, mass, 1.0)
        z = z / safe
        if tl.program_id(2) == 0:
            tl.store(lse + place, tl.where(mass > 0, m + tl.log(safe), NEVER))
            tl.store(entropy + place, tl.log(safe) - e / safe)
    tl.store(pooled + place * width + columns, z, mask=columns < width)


@triton.jit
def score_gradient(
    scores, values, row_index, bags, starts, ends, g_pooled, level, lse, entropy, g_entropy, d_scores, heads, width,
    GATHERED: tl.constexpr, SOFTMAX: tl.constexpr, NARROW: tl.constexpr,
    ROW_BLOCK: tl.constexpr, HEAD_BLOCK: tl.constexpr, COLUMN_BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one chunk's scores (or given weights) for one block of heads."""
    chunk = tl.program_id(0)
    head = tl.program_id(1) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
    bag = tl.load(bags + chunk).to(tl.int64)
    start, end = tl.load(starts + chunk), tl.load(ends + chunk)
    place = bag * heads + head
    for first in range(start, end, ROW_BLOCK):
        rows = first + tl.arange(0, ROW_BLOCK)
        places = places_of(row_index, rows, end, GATHERED)
        c = tl.zeros([ROW_BLOCK, HEAD_BLOCK], tl.float32)
        for column in range(0, width, COLUMN_BLOCK):
            columns = column + tl.arange(0, COLUMN_BLOCK)
            x = tl.load(
                values + places[:, None] * width + columns[None, :],
                mask=(rows[:, None] < end) & (columns[None, :] < width),
                other=0.0,
            )
            g = tl.load(
                g_pooled + place[:, None] * width + columns[None, :],
                mask=(head[:, None] < heads) & (columns[None, :] < width),
                other=0.0,
            )
            if HEAD_BLOCK == 1:
                c += tl.sum(x.to(tl.float32) * tl.reshape(g, [1, COLUMN_BLOCK]), 1)[:, None]
            else:
                c += product(x, tl.trans(g), NARROW)
        inside = (rows[:, None] < end) & (head[None, :] < heads)
        target = rows[:, None].to(tl.int64) * heads + head[None, :]
        if SOFTMAX:
            s = tl.load(scores + target, mask=inside, other=NEVER).to(tl.float32)
            base = tl.load(lse + place, mask=head < heads, other=0.0)
            base = tl.where(base == NEVER, 0.0, base)
            a = tl.exp2((s - base[None, :]) * LOG2_E)
            middle = tl.load(entropy + place, mask=head < heads, other=0.0) - base
            surprise = tl.where(a > 0, s + middle[None, :], 0.0)
            offset = tl.load(level + place, mask=head < heads, other=0.0)
            g_e = tl.load(g_entropy + place, mask=head < heads, other=0.0)
            c = a * (c + offset[None, :] - g_e[None, :] * surprise)
        tl.store(d_scores + target, c, mask=inside)


@triton.jit
def value_gradient(
    scores, bags, starts, ends, g_pooled, lse, d_values, heads, width,
    SOFTMAX: tl.constexpr, NARROW: tl.constexpr,
    ROW_BLOCK: tl.constexpr, HEAD_BLOCK: tl.constexpr, COLUMN_BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one chunk's instances for one block of columns."""
    chunk = tl.program_id(0)
    columns = tl.program_id(1) * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    bag = tl.load(bags + chunk).to(tl.int64)
    start, end = tl.load(starts + chunk), tl.load(ends + chunk)
    for first in range(start, end, ROW_BLOCK):
        rows = first + tl.arange(0, ROW_BLOCK)
        d = tl.zeros([ROW_BLOCK, COLUMN_BLOCK], tl.float32)
        for head_start in range(0, heads, HEAD_BLOCK):
            head = head_start + tl.arange(0, HEAD_BLOCK)
            inside = (rows[:, None] < end) & (head[None, :] < heads)
            s = tl.load(scores + rows[:, None].to(tl.int64) * heads + head[None, :], mask=inside, other=NEVER)
            s = s.to(tl.float32)
            if SOFTMAX:
                base = tl.load(lse + bag * heads + head, mask=head < heads, other=0.0)
                a = tl.exp2((s - tl.where(base == NEVER, 0.0, base)[None, :]) * LOG2_E)
            else:
                a = tl.where(inside, s, 0.0)
            g = tl.load(
                g_pooled + (bag * heads + head)[:, None] * width + columns[None, :],
                mask=(head[:, None] < heads) & (columns[None, :] < width),
                other=0.0,
            )
            if HEAD_BLOCK == 1:
                d += tl.reshape(a, [ROW_BLOCK, 1]) * tl.reshape(g, [1, COLUMN_BLOCK])
            else:
                d += product(a.to(d_values.dtype.element_ty), g, NARROW)
        tl.store(
            d_values + rows[:, None].to(tl.int64) * width + columns[None, :],
            d,
            mask=(rows[:, None] < end) & (columns[None, :] < width),
        )


@triton.jit
def sortable(scores, rows, end, heads, head, LARGEST: tl.constexpr):
    """Return scores as unsigned integers in the same (or the opposite) order, NaN as the last choice."""
    s = tl.load(scores + rows.to(tl.int64) * heads + head, mask=rows < end, other=0.0)
    s = tl.where(s == 0, 0.0, s if LARGEST else -s)  # -0 equals 0
    bits = s.to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)
    return tl.where(s == s, keys, keys * 0)


@triton.jit
def radix_select(scores, offsets, counts, chosen, heads, LARGEST: tl.constexpr, ROW_BLOCK: tl.constexpr):
    """Mark the chosen rows of one bag and head: find the last chosen score 8 bits at a time, then share out ties."""
    bag, head = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(offsets + bag), tl.load(offsets + bag + 1)
    wanted = tl.minimum(tl.load(counts + bag), end - begin)
    left = wanted
    bins = tl.arange(0, 256)
    prefix = tl.zeros([1], tl.uint32)
    for digit in tl.static_range(4):
        shift = 24 - 8 * digit
        histogram = tl.zeros([256], tl.int32)
        for first in range(begin, end, ROW_BLOCK):
            rows = first + tl.arange(0, ROW_BLOCK)
            keys = sortable(scores, rows, end, heads, head, LARGEST)
            same = (rows < end) & (((keys ^ prefix) >> shift) < 256)
            histogram += tl.histogram(((keys >> shift) & 255).to(tl.int32), 256, mask=same)
        at_least = tl.cumsum(histogram, 0, reverse=True)
        here = (at_least >= left) & (at_least - histogram < left)
        prefix |= tl.sum(tl.where(here, bins, 0), 0).to(tl.uint32) << shift
        left -= tl.sum(tl.where(here, at_least - histogram, 0), 0)
    seen = left * 0
    for first in range(begin, end, ROW_BLOCK):
        rows = first + tl.arange(0, ROW_BLOCK)
        keys = sortable(scores, rows, end, heads, head, LARGEST)
        tied = ((keys == prefix) & (rows < end)).to(tl.int32)
        place = tl.cumsum(tied, 0) + seen
        mark = ((keys > prefix) | ((tied > 0) & (place <= left))) & (rows * 0 + wanted > 0)
        tl.store(chosen + rows.to(tl.int64) * heads + head, mark, mask=rows < end)
        seen += tl.sum(tied, 0)
