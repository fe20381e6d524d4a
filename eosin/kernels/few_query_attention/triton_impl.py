# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Instances read the few keys of their bag on a GPU: one program per chunk of rows and head.

The keys of a bag and head stay in the program while its rows go by. The backward pass computes the attention of a
block again and leaves the gradients of keys and values as one partial per chunk, which are added up in order: with so
few keys, a backward pass that is parallel over keys would keep a handful of programs busy.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from eosin.kernels._checks import accumulation_dtype
from eosin.kernels._chunks import ChunkTable, chunk_table
from eosin.kernels._dispatch import interpreting
from eosin.kernels.few_query_attention import torch_impl
from eosin.kernels.segment_pool.triton_impl import LOG2_E, NEVER, pool_combine, product

MOST_WIDTH = 64  # of a head
MOST_ENTRIES = {2: 128 * 64, 4: 16 * 64}  # of a head's keys in one program, by bytes: beyond, registers spill


def fits(n_keys: int, head_width: int, read_width: int, dtype: torch.dtype) -> bool:
    """Return whether keys and values of one head fit into a program."""
    key_block, head_block, read_block = _blocks(n_keys, head_width, read_width)
    widest = max(head_block, read_block)
    return widest <= MOST_WIDTH and key_block * widest <= MOST_ENTRIES[dtype.itemsize]


def launch_sizes(n_rows: int, n_keys: int, head_width: int, read_width: int, dtype: torch.dtype) -> dict[str, int]:
    """Return rows per chunk and block sizes: a plain function of the shapes, so that results never change."""
    key_block, head_block, read_block = _blocks(n_keys, head_width, read_width)
    small = dtype.itemsize == 2 and key_block * max(head_block, read_block) <= 64 * 64
    return {
        "rows": 256 if n_rows < 8192 else 1024,
        "ROW_BLOCK": 64 if small else 16,
        "KEY_BLOCK": key_block,
        "HEAD_BLOCK": head_block,
        "READ_BLOCK": read_block,
        "num_warps": 8,
    }


def _blocks(*sizes: int) -> list[int]:
    return [max(16, triton.next_power_of_2(size)) for size in sizes]


def key_forward(
    queries: Tensor, keys: Tensor, values: Tensor, cu_seqlens: Tensor, heads: int, scale: float, dtype: torch.dtype
) -> Tensor:
    """Return what the instances read, as `torch_impl.key_forward`, which does as well where tiles are large."""
    if not _fits(keys, values, heads, dtype):
        return torch_impl.key_forward(queries, keys, values, cu_seqlens, heads, scale, dtype)
    queries, keys, values = queries.contiguous(), keys.to(dtype).contiguous(), values.to(dtype).contiguous()
    out = queries.new_empty((len(queries), values.shape[2]), dtype=accumulation_dtype(queries.dtype))
    table, sizes = _plan(queries, keys, values, cu_seqlens, heads, dtype)
    if table.n_chunks:
        few_key_forward[(table.n_chunks, heads)](
            queries, keys, values, table.bag, table.start, table.end, out, scale, keys.shape[1],
            queries.shape[1], values.shape[2], heads, NARROW=not interpreting(), **sizes,
        )  # fmt: skip
    return out


def key_backward(
    upstream: list[Tensor],
    results: list[Tensor],
    needs: list[bool],
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    heads: int,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values, as `torch_impl.key_backward`."""
    if not _fits(keys, values, heads, dtype):
        return torch_impl.key_backward(upstream, results, needs, queries, keys, values, cu_seqlens, heads, scale, dtype)
    queries, (grad,) = queries.contiguous(), upstream
    narrow_keys, narrow_values = keys.to(dtype).contiguous(), values.to(dtype).contiguous()
    table, sizes = _plan(queries, keys, values, cu_seqlens, heads, dtype)
    d_queries = torch.empty_like(queries)
    wide = accumulation_dtype(queries.dtype)
    key_parts, value_parts = (
        queries.new_empty((table.n_chunks, *tokens.shape[1:]), dtype=wide) for tokens in (keys, values)
    )
    if table.n_chunks:
        few_key_gradient[(table.n_chunks, heads)](
            queries, narrow_keys, narrow_values, grad, table.bag, table.start, table.end, d_queries, key_parts,
            value_parts, scale, keys.shape[1], queries.shape[1], values.shape[2], heads,
            NARROW=not interpreting(), **sizes,
        )  # fmt: skip
    return d_queries, _summed(key_parts, table, keys), _summed(value_parts, table, values)


def _fits(keys: Tensor, values: Tensor, heads: int, dtype: torch.dtype) -> bool:
    return fits(keys.shape[1], keys.shape[2] // heads, values.shape[2] // heads, dtype)


def _plan(
    queries: Tensor, keys: Tensor, values: Tensor, cu_seqlens: Tensor, heads: int, dtype: torch.dtype
) -> tuple[ChunkTable, dict[str, int]]:
    sizes = launch_sizes(len(queries), keys.shape[1], keys.shape[2] // heads, values.shape[2] // heads, dtype)
    return chunk_table(cu_seqlens, sizes.pop("rows")), sizes


def _summed(parts: Tensor, table: ChunkTable, tokens: Tensor) -> Tensor:
    """Add up the chunks of each bag in order: (chunks, M, E) -> (B, M, E)."""
    n_bags, n_keys, width = tokens.shape
    out = parts.new_empty(tokens.shape)
    unused = parts.new_empty(1)
    columns = min(256, max(16, triton.next_power_of_2(width)))
    pool_combine[(n_bags, n_keys, triton.cdiv(width, columns))](
        unused, unused, unused, parts, table.first, out, unused, unused, n_keys, width,
        COLUMN_BLOCK=columns, SOFTMAX=False, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def head_slice(tokens, bag, n_keys, width, heads, head, key, column):
    """Return the keys or values of one bag and head, and where they lie: (KEY_BLOCK, columns)."""
    place = (bag * n_keys + key)[:, None] * width + head * (width // heads) + column[None, :]
    inside = (key[:, None] < n_keys) & (column[None, :] < width // heads)
    return tl.load(tokens + place, mask=inside, other=0.0)


@triton.jit
def key_weights(q, k, key, n_keys, scale, NARROW: tl.constexpr):
    """Return the attention of a block of rows: (ROW_BLOCK, KEY_BLOCK)."""
    s = product(q.to(k.dtype), tl.trans(k), NARROW) * scale
    s = tl.where(key[None, :] < n_keys, s, NEVER)
    p = tl.exp2((s - tl.max(s, 1)[:, None]) * LOG2_E)
    return p / tl.sum(p, 1)[:, None]


@triton.jit
def few_key_forward(
    queries, keys, values, bags, starts, ends, out, scale, n_keys, width, read_width, heads,
    ROW_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, HEAD_BLOCK: tl.constexpr, READ_BLOCK: tl.constexpr,
    NARROW: tl.constexpr,
):  # fmt: skip
    """Write what the rows of one chunk read through one head."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    bag = tl.load(bags + chunk).to(tl.int64)
    key, column, read = tl.arange(0, KEY_BLOCK), tl.arange(0, HEAD_BLOCK), tl.arange(0, READ_BLOCK)
    k = head_slice(keys, bag, n_keys, width, heads, head, key, column)
    v = head_slice(values, bag, n_keys, read_width, heads, head, key, read)
    start, end = tl.load(starts + chunk), tl.load(ends + chunk)
    for first in range(start, end, ROW_BLOCK):
        rows = first + tl.arange(0, ROW_BLOCK)
        place = rows[:, None].to(tl.int64) * width + head * (width // heads) + column[None, :]
        inside = (rows[:, None] < end) & (column[None, :] < width // heads)
        p = key_weights(tl.load(queries + place, mask=inside, other=0.0), k, key, n_keys, scale, NARROW)
        place = rows[:, None].to(tl.int64) * read_width + head * (read_width // heads) + read[None, :]
        inside = (rows[:, None] < end) & (read[None, :] < read_width // heads)
        tl.store(out + place, product(p.to(v.dtype), v, NARROW), mask=inside)


@triton.jit
def few_key_gradient(
    queries, keys, values, d_out, bags, starts, ends, d_queries, key_parts, value_parts, scale, n_keys,
    width, read_width, heads,
    ROW_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, HEAD_BLOCK: tl.constexpr, READ_BLOCK: tl.constexpr,
    NARROW: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the rows of one chunk through one head, and its part of those of keys and values."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    bag = tl.load(bags + chunk).to(tl.int64)
    key, column, read = tl.arange(0, KEY_BLOCK), tl.arange(0, HEAD_BLOCK), tl.arange(0, READ_BLOCK)
    k = head_slice(keys, bag, n_keys, width, heads, head, key, column)
    v = head_slice(values, bag, n_keys, read_width, heads, head, key, read)
    d_k = tl.zeros([KEY_BLOCK, HEAD_BLOCK], tl.float32)
    d_v = tl.zeros([KEY_BLOCK, READ_BLOCK], tl.float32)
    start, end = tl.load(starts + chunk), tl.load(ends + chunk)
    for first in range(start, end, ROW_BLOCK):
        rows = first + tl.arange(0, ROW_BLOCK)
        place = rows[:, None].to(tl.int64) * width + head * (width // heads) + column[None, :]
        inside = (rows[:, None] < end) & (column[None, :] < width // heads)
        q = tl.load(queries + place, mask=inside, other=0.0).to(k.dtype)
        p = key_weights(q, k, key, n_keys, scale, NARROW)
        read_place = rows[:, None].to(tl.int64) * read_width + head * (read_width // heads) + read[None, :]
        readable = (rows[:, None] < end) & (read[None, :] < read_width // heads)
        g = tl.load(d_out + read_place, mask=readable, other=0.0).to(v.dtype)
        d_v += product(tl.trans(p).to(v.dtype), g, NARROW)
        d_s = product(g, tl.trans(v), NARROW)
        d_s = (d_s - tl.sum(d_s * p, 1)[:, None]) * p * scale
        d_k += product(tl.trans(d_s).to(k.dtype), q, NARROW)
        tl.store(d_queries + place, product(d_s.to(k.dtype), k, NARROW), mask=inside)
    part = chunk.to(tl.int64) * n_keys + key
    place = part[:, None] * width + head * (width // heads) + column[None, :]
    tl.store(key_parts + place, d_k, mask=(key[:, None] < n_keys) & (column[None, :] < width // heads))
    place = part[:, None] * read_width + head * (read_width // heads) + read[None, :]
    tl.store(value_parts + place, d_v, mask=(key[:, None] < n_keys) & (read[None, :] < read_width // heads))
