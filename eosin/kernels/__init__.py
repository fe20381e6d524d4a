"""Operations on packed bags: segment reductions, attention scores and pooling, the selective scan
and its convolution.

Every function checks its arguments and picks an implementation per call: the plain definition (``reference``), a
memory-bounded torch path, or Triton on a GPU. `use_backend` or the variable ``EOSIN_KERNELS`` forces one.
"""

from eosin.kernels._checks import bag_offsets
from eosin.kernels._dispatch import choose, use_backend
from eosin.kernels._segments import (
    bag_index,
    segment_attention_entropy,
    segment_logsumexp,
    segment_max,
    segment_mean,
    segment_softmax,
    segment_sum,
    segment_topk_mask,
)
from eosin.kernels.causal_conv import causal_conv
from eosin.kernels.embedding import embed_instances
from eosin.kernels.few_query_attention import few_key_attention, few_query_attention
from eosin.kernels.gated_attention import AttentionPool, gated_attention_pool, gated_attention_scores
from eosin.kernels.leave_one_out import GreedyPath, greedy_removal, leave_one_out, pooled_without
from eosin.kernels.segment_pool import attention_pool, segment_pool
from eosin.kernels.selective_scan import ScanOrder, reversed_order, selective_scan, strided_order

__all__ = [
    "AttentionPool",
    "GreedyPath",
    "ScanOrder",
    "attention_pool",
    "bag_index",
    "bag_offsets",
    "causal_conv",
    "choose",
    "embed_instances",
    "few_key_attention",
    "few_query_attention",
    "gated_attention_pool",
    "gated_attention_scores",
    "greedy_removal",
    "leave_one_out",
    "pooled_without",
    "reversed_order",
    "segment_attention_entropy",
    "segment_logsumexp",
    "segment_max",
    "segment_mean",
    "segment_pool",
    "segment_softmax",
    "segment_sum",
    "segment_topk_mask",
    "selective_scan",
    "strided_order",
    "use_backend",
]
