"""Few queries read a bag without its keys and values ever existing.

The projections are folded into the queries: with ``q̃ = scale W_kᵀ q`` a score is ``x · q̃`` (the key bias shifts all
scores of a query alike and cancels), and ``Σ a (W_v x + b_v) = W_v (Σ a x) + b_v``. That is attention pooling with one
head per query and head, 4·N·M·H·D operations instead of 4·N·D² and more.
"""

import torch
from torch import Tensor

from eosin.kernels._checks import accumulation_dtype
from eosin.kernels._products import product_dtype
from eosin.kernels.segment_pool import attention_pool


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
    wide, narrow = accumulation_dtype(values.dtype), product_dtype(values, k_weight)
    sliced_queries = queries.to(wide).reshape(len(queries), heads, -1)  # (M, H, E / H)
    sliced_keys = k_weight.to(wide).reshape(heads, -1, values.shape[1])  # (H, E / H, D)
    folded = torch.einsum("mhe,hed->mhd", sliced_queries, sliced_keys).flatten(0, 1) * scale
    scores = (values.to(narrow) @ folded.to(narrow).T).to(wide)
    pooled, lse, _ = attention_pool(scores, values, cu_seqlens)
    pooled = pooled.reshape(-1, len(queries), heads, values.shape[1])  # (B, M, H, D)
    sliced_read = v_weight.to(wide).reshape(heads, -1, values.shape[1])  # (H, F / H, D)
    out = torch.einsum("bmhd,hfd->bmhf", pooled, sliced_read).flatten(2)
    if k_bias is not None:
        out = out + 0 * k_bias.sum()  # its gradient is 0, not missing
    if v_bias is None:
        return out
    seen = (lse[:, :1] > float("-inf")).to(wide)  # an empty bag reads nothing, not even the bias
    return out + v_bias.to(wide) * seen[:, :, None]
