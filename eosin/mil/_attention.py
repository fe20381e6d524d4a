"""Attention between the instances of a bag and a few tokens of that bag, in memory that does not grow with the map.

The two directions are what ISAB and PMA (Set Transformer), Nyström attention (TransMIL) and GDAT (CoMEL) are made of:
`bag_attention` lets m tokens read n instances, `instance_attention` lets n instances read m tokens. A pack is cut
into blocks of one bag each; a few blocks are computed at a time and again in the backward pass. The only loop runs
over these chunks, of which a pack of small bags has one.

The letters of the project: B bags, N instances, H heads; m tokens of a bag, d and e widths of a head.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

BLOCK_ROWS = 1024  # most instances of one bag that are computed as one block
BLOCK_COST = 64  # what a block costs whatever it holds, in rows
CHUNK_ELEMENTS = 2**23  # most entries of an attention map that exist at one time
CHECKPOINT_ROWS = 2**15  # from this many instances on, layers are computed again in the backward pass
NORM_ROWS = 2**12  # tokens that are normed at once where there are many


def recomputed(function: Callable[..., Tensor], rows: int, *tensors: Tensor) -> Tensor:
    """Return ``function(*tensors)``; with many rows its intermediates are computed again in backward."""
    if rows < CHECKPOINT_ROWS or not torch.is_grad_enabled():
        return function(*tensors)
    result: Tensor = checkpoint(function, *tensors, use_reentrant=False)
    return result


def by_rows(function: Callable[..., Tensor], *tensors: Tensor, size: int | None = None) -> Tensor:
    """Return ``function(*tensors)`` where each row of the result depends on the same rows of the tensors only.

    Many rows are computed `size` at a time, `CHECKPOINT_ROWS` unless given, and again in backward.
    """
    rows = len(tensors[0])
    if rows < CHECKPOINT_ROWS:
        return function(*tensors)
    pieces = zip(*(torch.split(tensor, max(1, size or CHECKPOINT_ROWS)) for tensor in tensors), strict=True)
    return torch.cat([recomputed(function, rows, *piece) for piece in pieces])


def normed_linear(tokens: Tensor, norm: nn.LayerNorm, weight: Tensor) -> Tensor:
    """Return ``W LN(x)``: (N, E), (A, E) -> (N, A); with many rows the normed tokens never exist all at once.

    Differentiable once with many rows, in tokens, weight and the norm's parameters.
    """
    if len(tokens) < CHECKPOINT_ROWS:
        return functional.linear(norm(tokens), weight)
    out: Tensor = _NormedLinear.apply(tokens, norm.weight, norm.bias, weight, norm.eps)
    return out


class _NormedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(tokens, gain, shift, weight)
        ctx.eps = eps
        out = []
        for piece in torch.split(tokens, NORM_ROWS):
            out.append(functional.linear(_normed(piece, gain, shift, eps)[0], weight))
        return torch.cat(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, gain, shift, weight = ctx.saved_tensors
        dtokens, dweight = torch.empty_like(tokens), torch.zeros_like(weight, dtype=_wide(weight))
        dgain, dshift = torch.zeros_like(gain), torch.zeros_like(shift)
        for first in range(0, len(tokens), NORM_ROWS):
            rows = slice(first, first + NORM_ROWS)
            normed, wide, *statistics = _normed(tokens[rows], gain, shift, ctx.eps)
            dweight += grad[rows].mT @ normed.to(grad.dtype)
            dnormed = (grad[rows] @ weight.to(grad.dtype)).to(wide.dtype)
            piece, of_gain, of_shift = torch.ops.aten.native_layer_norm_backward(
                dnormed, wide, gain.shape, *statistics, gain, shift, [True, True, True]
            )
            dtokens[rows] = piece
            dgain += of_gain
            dshift += of_shift
        return dtokens, dgain, dshift, dweight.to(weight.dtype), None


def _normed(tokens: Tensor, gain: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return normed tokens, the tokens in the type of the norm, and their means and inverse deviations."""
    wide = tokens.to(gain.dtype)
    normed, mean, inverse = torch.native_layer_norm(wide, gain.shape, gain, shift, eps)
    return normed, wide, mean, inverse


def bag_product(values: Tensor, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the inner products of each instance with the tokens of its own bag: (N, d), (B, m, d) -> (N, m)."""
    if len(lengths) == 1:
        return values @ tokens[0].T
    products = [
        blocks.taken(blocks.gather(values) @ tokens[blocks.bag].mT)
        for blocks in _blocks(lengths, 1, values.device, limit=None)
    ]
    return torch.cat(products) if products else values.new_zeros(0, tokens.shape[1])


def bag_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    *,
    zeros: Tensor | None = None,
) -> Tensor:
    """Let the tokens of each bag attend to the instances of that bag.

    Memory is that of a few blocks of the attention map, forward and backward; softmax and sums are held in float32 at
    least. Differentiable once, in the first three arguments.

    Parameters
    ----------
    query : (B, m, H, d)
        Tokens of each bag.
    key, value : (N, H, d), (N, H, e)
        Instances.
    lengths : tuple of int
        Instances per bag.
    scale : float
        Multiplies the inner products before the softmax.
    zeros : (B,) float, optional
        How many instances each bag has besides whose keys and values are 0.

    Returns
    -------
    (B, m, H, e)
        0 for an empty bag.
    """
    with _full_precision(query):
        out: Tensor = _BagAttention.apply(query, key, value, lengths, scale, zeros)
    return out


def instance_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    *,
    counts: Tensor | None = None,
) -> Tensor:
    """Let each instance attend to the tokens of its own bag; memory and derivatives as `bag_attention`.

    Parameters
    ----------
    query : (N, H, d)
        Instances.
    key, value : (B, m, H, d), (B, m, H, e)
        Tokens of each bag.
    lengths : tuple of int
        Instances per bag.
    scale : float
        Multiplies the inner products before the softmax.
    counts : (B, m) bool or float, optional
        How many equal tokens each one stands for; 0 for tokens that a bag does not have.

    Returns
    -------
    (N, H, e)
    """
    with _full_precision(query):
        out: Tensor = _InstanceAttention.apply(query, key, value, lengths, scale, counts)
    return out


def mixed_weights(
    query: Tensor,
    key: Tensor,
    mix: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    *,
    zeros: Tensor | None = None,
) -> Tensor:
    """Return the weight of each instance in a mixture of the tokens' attention, computed as in `bag_attention`.

    For tokens t the result is ``Σ_t mix_t a_tn`` with a the weights of `bag_attention`.

    Parameters
    ----------
    query : (B, m, H, d)
        Tokens of each bag.
    key : (N, H, d)
        Instances.
    mix : (B, m, H)
        Share of each token; any sign.
    lengths : tuple of int
        Instances per bag.
    scale : float
        Multiplies the inner products before the softmax.
    zeros : (B,) float, optional
        As in `bag_attention`.

    Returns
    -------
    (N, H)
    """
    with _full_precision(query):
        out: Tensor = _MixedWeights.apply(query, key, mix, lengths, scale, zeros)
    return out


@dataclass(frozen=True, eq=False)
class _Blocks:
    """Some rows of a pack, cut into c blocks of R places; each block belongs to one bag, the last of a bag is not full.

    rows (c, R) int64 is the packed row of each place, filled (c, R) whether the place is used, bag (c,) the bag;
    start and stop bound the packed rows of all the blocks. When all are full, no row is copied to be read or written.
    """

    rows: Tensor
    filled: Tensor
    bag: Tensor
    start: int
    stop: int
    full: bool

    def gather(self, packed: Tensor) -> Tensor:
        """Return (c, R, ...); a place that is not filled holds some other row."""
        if self.full:
            return packed[self.start : self.stop].view(*self.rows.shape, *packed.shape[1:])
        return packed[self.rows]

    def taken(self, blocks: Tensor) -> Tensor:
        """Return the filled places of (c, R, ...) as packed rows; their number is known, so no device is asked."""
        flat = blocks.flatten(0, 1)
        if self.full:
            return flat
        return flat[torch.nonzero_static(self.filled.flatten(), size=self.stop - self.start)[:, 0]]

    def scatter(self, blocks: Tensor, packed: Tensor) -> None:
        """Write the filled places of (c, R, ...) to their rows."""
        packed[self.start : self.stop] = self.taken(blocks)

    def hide(self, scores: Tensor) -> Tensor:
        """Return scores of each place (c, H, m, R), -inf where it is not filled."""
        return scores if self.full else scores.masked_fill_(~self.filled[:, None, None], float("-inf"))


def _blocks(
    lengths: Sequence[int], entries: int, device: torch.device, *, limit: int | None = CHUNK_ELEMENTS
) -> Iterator[_Blocks]:
    """Yield the blocks of a pack in chunks, so that rows times `entries` stays below `limit`."""
    length = torch.tensor(lengths, dtype=torch.int64)
    size = _block_rows(length)
    count = (length + size - 1) // size  # (B,) blocks of each bag
    bag = torch.repeat_interleave(torch.arange(len(lengths)), count)
    number = torch.arange(len(bag)) - (count.cumsum(0) - count)[bag]  # of the block within its bag
    start = (length.cumsum(0) - length)[bag] + number * size
    fill = (length[bag] - number * size).clamp(max=size)
    place = torch.arange(size)
    chunk = len(bag) if limit is None else max(1, limit // (entries * size))
    for part in torch.split(torch.arange(len(bag)), chunk) if len(bag) else ():
        filled = place < fill[part, None]
        rows = start[part, None] + torch.where(filled, place, 0)
        stop = int(start[part[-1]] + fill[part[-1]])
        full = bool((fill[part] == size).all())
        yield _Blocks(rows.to(device), filled.to(device), bag[part].to(device), int(start[part[0]]), stop, full)


def _block_rows(length: Tensor) -> int:
    """Return the rows R of a block with which bags of these lengths (B,) leave the fewest places empty."""
    most = min(BLOCK_ROWS, max(16, int(length.max()) if len(length) else 0))
    sizes = [size for size in (16, 32, 64, 128, 256, 512) if size < most]
    costs = [int(((length + size - 1) // size).sum()) * (size + BLOCK_COST) for size in (*sizes, most)]
    return (*sizes, most)[costs.index(min(costs))]


class _BagAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: tuple[int, ...],
        scale: float,
        zeros: Tensor | None,
    ) -> Tensor:
        out, lse = _attended(query, key, value, lengths=lengths, scale=scale, zeros=zeros)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.lengths, ctx.scale = lengths, scale
        return out.transpose(1, 2).to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        wide = _wide(query)
        grad = grad.transpose(1, 2).to(wide)  # (B, H, m, e)
        level = (grad * out).sum(-1)
        scaled = query.to(wide) * ctx.scale
        dquery = torch.zeros_like(scaled)
        dkey, dvalue = torch.empty_like(key), torch.empty_like(value)
        for blocks in _blocks(ctx.lengths, query.shape[1] * query.shape[2], query.device):
            bag = blocks.bag
            weights = _bag_scores(scaled, key, blocks).sub_(lse[bag][..., None]).exp_()  # (c, H, m, R)
            blocks.scatter((weights.mT @ grad[bag]).transpose(1, 2), dvalue)
            dscores = grad[bag] @ blocks.gather(value).to(wide).permute(0, 2, 3, 1)
            dscores.sub_(level[bag][..., None]).mul_(weights)
            dqueries = dscores @ blocks.gather(key).to(wide).transpose(1, 2)  # (c, H, m, d)
            dquery += _per_bag(dqueries.transpose(1, 2), bag, len(query))
            blocks.scatter((dscores.mT @ scaled[bag].transpose(1, 2)).transpose(1, 2), dkey)
        return (dquery * ctx.scale).to(query.dtype), dkey, dvalue, None, None, None


class _MixedWeights(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        mix: Tensor,
        lengths: tuple[int, ...],
        scale: float,
        zeros: Tensor | None,
    ) -> Tensor:
        _, lse = _attended(query, key, key[..., :0], lengths=lengths, scale=scale, zeros=zeros)
        out = key.new_empty(key.shape[:2])
        shares = mix.to(lse.dtype).transpose(1, 2)  # (B, H, m)
        scaled = query.to(lse.dtype) * scale
        for blocks in _blocks(lengths, query.shape[1] * query.shape[2], query.device):
            weights = _bag_scores(scaled, key, blocks).sub_(lse[blocks.bag][..., None]).exp_()  # (c, H, m, R)
            blocks.scatter((shares[blocks.bag][:, :, None] @ weights)[:, :, 0].mT, out)
        ctx.save_for_backward(query, key, mix, lse)
        ctx.lengths, ctx.scale, ctx.zeros = lengths, scale, zeros
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, mix, lse = ctx.saved_tensors
        wide = lse.dtype
        shares = mix.to(wide).transpose(1, 2)
        dmix, _ = _attended(
            query, key, grad[..., None].to(wide), lengths=ctx.lengths, scale=ctx.scale, zeros=ctx.zeros
        )  # (B, H, m, 1)
        scaled = query.to(wide) * ctx.scale
        dquery, dkey = torch.zeros_like(scaled), torch.empty_like(key)
        for blocks in _blocks(ctx.lengths, query.shape[1] * query.shape[2], query.device):
            bag = blocks.bag
            dscores = blocks.gather(grad).to(wide).mT[:, :, None] - dmix[bag]  # (c, H, m, R)
            dscores.mul_(_bag_scores(scaled, key, blocks).sub_(lse[bag][..., None]).exp_())
            dscores.mul_(shares[bag][..., None])
            dqueries = dscores @ blocks.gather(key).to(wide).transpose(1, 2)  # (c, H, m, d)
            dquery += _per_bag(dqueries.transpose(1, 2), bag, len(query))
            blocks.scatter((dscores.mT @ scaled[bag].transpose(1, 2)).transpose(1, 2), dkey)
        return (dquery * ctx.scale).to(query.dtype), dkey, dmix[..., 0].mT.to(mix.dtype), None, None, None


def _attended(
    query: Tensor, key: Tensor, value: Tensor, *, lengths: tuple[int, ...], scale: float, zeros: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the attended values (B, H, m, e) and the logarithm of each softmax's sum (B, H, m), 0 for an empty bag."""
    n_bags, m, heads, _ = query.shape
    wide = _wide(query)
    top = query.new_full((n_bags, heads, m), float("-inf"), dtype=wide)  # running maximum
    total = torch.zeros_like(top)
    if zeros is not None:  # their scores are 0, and they add nothing to the values
        total += zeros[:, None, None]
        top = torch.where(total > 0, 0, top)
    out = query.new_zeros(n_bags, heads, m, value.shape[-1], dtype=wide)
    scaled = query.to(wide) * scale
    for blocks in _blocks(lengths, heads * m, query.device):
        scores = _bag_scores(scaled, key, blocks)
        owner = blocks.bag[:, None, None].expand(-1, heads, m)
        peak = top.scatter_reduce(0, owner, scores.amax(-1), "amax")
        shrink = torch.where(top == float("-inf"), 0, (top - peak).exp())
        weights = scores.sub_(peak[blocks.bag][..., None]).exp_()
        part = weights @ blocks.gather(value).to(wide).transpose(1, 2)  # (c, H, m, e)
        total = total * shrink + _per_bag(weights.sum(-1), blocks.bag, n_bags)
        out = out * shrink[..., None] + _per_bag(part, blocks.bag, n_bags)
        top = peak
    seen = total > 0
    return out / torch.where(seen, total, 1)[..., None], torch.where(seen, top + total.log(), 0)


class _InstanceAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: tuple[int, ...],
        scale: float,
        counts: Tensor | None,
    ) -> Tensor:
        out = query.new_empty(*query.shape[:2], value.shape[-1])
        scaled, values = key.to(_wide(query)) * scale, value.to(_wide(query))
        logs = None if counts is None else counts.to(scaled.dtype).log()
        for blocks in _blocks(lengths, key.shape[1] * key.shape[2], query.device):
            weights = _instance_weights(query, scaled, blocks, logs)
            blocks.scatter((weights @ values[blocks.bag].transpose(1, 2)).transpose(1, 2), out)
        ctx.save_for_backward(query, key, value)
        ctx.lengths, ctx.scale, ctx.logs = lengths, scale, logs
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        wide = _wide(query)
        dquery = torch.empty_like(query)
        scaled, values = key.to(wide) * ctx.scale, value.to(wide)
        dkey, dvalue = torch.zeros_like(scaled), torch.zeros_like(values)
        for blocks in _blocks(ctx.lengths, key.shape[1] * key.shape[2], query.device):
            bag = blocks.bag
            weights = _instance_weights(query, scaled, blocks, ctx.logs)  # (c, H, R, m)
            grads = blocks.gather(grad).to(wide)
            grads = grads if blocks.full else grads * blocks.filled[..., None, None]
            grads = grads.transpose(1, 2)  # (c, H, R, e)
            dvalue += _per_bag((weights.mT @ grads).transpose(1, 2), bag, len(value))
            dscores = grads @ values[bag].permute(0, 2, 3, 1)
            dscores = torch._softmax_backward_data(dscores, weights, -1, wide)
            dkeys = dscores.mT @ blocks.gather(query).to(wide).transpose(1, 2)  # (c, H, m, d)
            dkey += _per_bag(dkeys.transpose(1, 2), bag, len(key))
            blocks.scatter((dscores @ scaled[bag].transpose(1, 2)).transpose(1, 2), dquery)
        return dquery, (dkey * ctx.scale).to(key.dtype), dvalue.to(value.dtype), None, None, None


def _bag_scores(scaled: Tensor, key: Tensor, blocks: _Blocks) -> Tensor:
    """Return (c, H, m, R) from queries that are scaled, -inf in places that are not filled."""
    keys = blocks.gather(key).to(scaled.dtype).permute(0, 2, 3, 1)
    return blocks.hide(scaled[blocks.bag].transpose(1, 2) @ keys)


def _instance_weights(query: Tensor, scaled: Tensor, blocks: _Blocks, logs: Tensor | None) -> Tensor:
    """Return (c, H, R, m) from keys that are scaled and the logarithms (B, m) of how often each is there."""
    keys = scaled[blocks.bag].permute(0, 2, 3, 1)
    scores = blocks.gather(query).to(scaled.dtype).transpose(1, 2) @ keys
    if logs is not None:
        scores += logs[blocks.bag][:, None, None]
    return scores.softmax(-1)


def _per_bag(parts: Tensor, bag: Tensor, n_bags: int) -> Tensor:
    """Sum blocks of the same bag, (c, ...) -> (B, ...), as a product: deterministic on every device."""
    member = torch.zeros(n_bags, len(bag), dtype=parts.dtype, device=parts.device)
    member[bag, torch.arange(len(bag), device=bag.device)] = 1
    return (member @ parts.flatten(1)).view(n_bags, *parts.shape[1:])


def _full_precision(tensor: Tensor) -> torch.autocast:
    """The functions choose their own precision; autocast would undo it."""
    return torch.autocast(tensor.device.type, enabled=False)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
