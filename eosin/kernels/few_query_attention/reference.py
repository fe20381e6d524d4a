"""Definition of multi-head attention between a bag and a few learned vectors.

Lee et al., "Set Transformer", ICML 2019, https://arxiv.org/abs/1810.00825: few queries read a bag (pooling by
attention, inducing points), or the instances of a bag read a few keys. Heads are contiguous slices of the width.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from eosin.kernels._bags import log_sum_exp, softmax
from eosin.kernels._checks import accumulation_dtype, host_lengths


def few_query_attention(
    queries: Tensor,
    values: Tensor,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    cu_seqlens: Tensor,
    *,
    heads: int,
    scale: float,
) -> Tensor:
    """Attend from the same queries to every bag: (M, E), (N, D) -> (B, M, F)."""
    dtype = accumulation_dtype(values.dtype)
    x = values.to(dtype)
    keys = linear(x, k_weight.to(dtype), None if k_bias is None else k_bias.to(dtype))
    read = linear(x, v_weight.to(dtype), None if v_bias is None else v_bias.to(dtype))
    lengths = host_lengths(cu_seqlens)
    bags = zip(torch.split(keys, lengths), torch.split(read, lengths), strict=True)
    attended = [_attend(queries.to(dtype), key, value, heads, scale) for key, value in bags]
    return torch.stack(attended) if attended else x.new_zeros(0, len(queries), len(v_weight))


def shared_query_attention(
    query: Tensor, values: Tensor, k_weight: Tensor | None, v_weight: Tensor | None, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """Attend without biases or scale; the instances are keys and values where no projection is given.

    (H, M, e), (N, D) -> read (B, H, M, f) and the log-sum-exp of the scores (B, H, M).
    """
    rows = values.to(query.dtype)
    keys = rows if k_weight is None else linear(rows, k_weight.to(query.dtype))
    read = rows if v_weight is None else linear(rows, v_weight.to(query.dtype))
    lengths = host_lengths(cu_seqlens)
    out, lse = [], []
    for key, value in zip(torch.split(keys, lengths), torch.split(read, lengths), strict=True):
        key, value = (part.reshape(len(part), len(query), -1).transpose(0, 1) for part in (key, value))  # (H, n, e)
        scores = (query @ key.transpose(1, 2)).movedim(2, 0)  # (n, H, M)
        out.append(softmax(scores).movedim(0, 2) @ value)
        lse.append(log_sum_exp(scores))
    if not out:
        width = read.shape[1] // len(query)
        return query.new_zeros(0, *query.shape[:2], width), query.new_zeros(0, *query.shape[:2])
    return torch.stack(out), torch.stack(lse)


def few_key_attention(
    queries: Tensor, keys: Tensor, values: Tensor, cu_seqlens: Tensor, *, heads: int, scale: float
) -> Tensor:
    """Attend from each instance to the few keys of its own bag: (N, E), (B, M, E), (B, M, F) -> (N, F)."""
    dtype = accumulation_dtype(queries.dtype)
    bags = torch.split(queries.to(dtype), host_lengths(cu_seqlens))
    few = zip(bags, keys.to(dtype), values.to(dtype), strict=True)
    attended = [_attend(bag, key, value, heads, scale) for bag, key, value in few]
    return torch.cat(attended) if attended else queries.new_zeros(0, values.shape[2], dtype=dtype)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, heads: int, scale: float) -> Tensor:
    """Return softmax(q kᵀ scale) v by heads; nothing to read gives 0: (M, E), (n, E), (n, F) -> (M, F)."""
    sliced = [tensor.reshape(len(tensor), heads, tensor.shape[1] // heads) for tensor in (queries, keys, values)]
    query, key, value = (tensor.transpose(0, 1) for tensor in sliced)  # (H, rows, width / H)
    scores = query @ key.transpose(1, 2) * scale
    weights = softmax(scores.movedim(2, 0)).movedim(0, 2)
    attended: Tensor = weights @ value
    return attended.transpose(0, 1).flatten(1)
