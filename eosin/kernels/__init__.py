"""Operations on packed bags: segment reductions, attention scores and pooling.

Every function checks its arguments and picks an implementation per call: the plain definition (``reference``), a
memory-bounded torch path, or Triton on a GPU. `use_backend` or the variable ``EOSIN_KERNELS`` forces one.
"""

from eosin.kernels._dispatch import choose, use_backend
from eosin.kernels.gated_attention import AttentionPool, gated_attention_pool, gated_attention_scores
from eosin.kernels.segment_pool import attention_pool, segment_pool
from eosin.kernels.segments import (
    bag_index,
    segment_attention_entropy,
    segment_logsumexp,
    segment_max,
    segment_mean,
    segment_softmax,
    segment_sum,
    segment_topk_mask,
)

__all__ = [
    "AttentionPool",
    "attention_pool",
    "bag_index",
    "choose",
    "gated_attention_pool",
    "gated_attention_scores",
    "segment_attention_entropy",
    "segment_logsumexp",
    "segment_max",
    "segment_mean",
    "segment_pool",
    "segment_softmax",
    "segment_sum",
    "segment_topk_mask",
    "use_backend",
]
