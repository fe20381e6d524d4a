"""Definition of attention scores and attention pooling.

Attention-based pooling and its gate: Ilse, Tomczak, Welling, "Attention-based Deep Multiple Instance Learning",
ICML 2018, https://arxiv.org/abs/1802.04712, equations 8 and 9. For an instance x and head h

    t = act(V x + b_V),   g = σ(U x + b_U) (absent without a gate),   r_h = w_h · (t ⊙ g) + b_h,
    s_h = r_h / temperature + mask_h   (-inf where the instance is dropped).

An embedding in front, ``h = dropout(relu(W x + b))`` as in CLAM (Lu et al., 2021), takes the place of x in all of it.
Dropout zeroes entries of h, of t and of g with probability p and scales the rest by 1 / (1 - p). Of t and g only the
product is read, so one mask that drops it with probability 1 - (1 - p)² stands for both.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from eosin.kernels._checks import accumulation_dtype
from eosin.kernels._dropout import GATE_BRANCH, dropped, gate_probability
from eosin.kernels.embedding.reference import embed_instances
from eosin.kernels.segment_pool.reference import attention_pool

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}


def gated_attention_scores(
    values: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    u_weight: Tensor | None,
    u_bias: Tensor | None,
    w_weight: Tensor,
    w_bias: Tensor | None,
    *,
    gate_dropout: float = 0.0,
    seed: int = 0,
    activation: str = "tanh",
) -> Tensor:
    """Score every instance for every head: (N, D) -> (N, H)."""
    dtype = accumulation_dtype(torch.promote_types(values.dtype, v_weight.dtype))
    x = values.to(dtype)
    hidden = ACTIVATIONS[activation](linear(x, v_weight.to(dtype), _cast(v_bias, dtype)))
    if u_weight is not None:
        hidden = hidden * torch.sigmoid(linear(x, u_weight.to(dtype), _cast(u_bias, dtype)))
    hidden = dropped(hidden, seed, gate_probability(gate_dropout, gated=u_weight is not None), branch=GATE_BRANCH)
    return linear(hidden, w_weight.to(dtype), _cast(w_bias, dtype))


def embedded(
    values: Tensor, embed_weight: Tensor | None, embed_bias: Tensor | None, *, embed_dropout: float, seed: int
) -> Tensor:
    """Return ``dropout(relu(W x + b))``, or the values themselves without W: (N, D) -> (N, E)."""
    if embed_weight is None:
        return values
    return embed_instances(values, embed_weight, embed_bias, dropout=embed_dropout, seed=seed)


def gated_attention_pool(
    values: Tensor,
    embed_weight: Tensor | None,
    embed_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    u_weight: Tensor | None,
    u_bias: Tensor | None,
    w_weight: Tensor,
    w_bias: Tensor | None,
    temperature: Tensor,
    score_mask: Tensor | None,
    keep: Tensor | None,
    cu_seqlens: Tensor,
    *,
    embed_dropout: float = 0.0,
    gate_dropout: float = 0.0,
    seed: int = 0,
    activation: str = "tanh",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return scores (N, H), pooled (B, H, E), log-sum-exp (B, H) and entropy (B, H)."""
    instances = embedded(values, embed_weight, embed_bias, embed_dropout=embed_dropout, seed=seed)
    raw = gated_attention_scores(
        instances,
        v_weight,
        v_bias,
        u_weight,
        u_bias,
        w_weight,
        w_bias,
        gate_dropout=gate_dropout,
        seed=seed,
        activation=activation,
    )
    scores = masked_scores(raw, temperature, score_mask, keep)
    return scores, *attention_pool(scores, instances, cu_seqlens)


def masked_scores(raw: Tensor, temperature: Tensor, score_mask: Tensor | None, keep: Tensor | None) -> Tensor:
    """Apply temperature, additive mask and keep mask to raw scores: (N, H) -> (N, H)."""
    scores = raw / temperature
    if score_mask is not None:
        scores = scores + _per_head(score_mask)
    return scores if keep is None else scores.masked_fill(~_per_head(keep), float("-inf"))


def _per_head(mask: Tensor) -> Tensor:
    return mask[:, None] if mask.dim() == 1 else mask


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)
