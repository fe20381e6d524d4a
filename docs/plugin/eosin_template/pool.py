"""Attention pooling with a temperature that is learned, and a loss term that keeps the weights apart."""

import torch
from torch import Tensor, nn

from eosin.kernels import segment_attention_entropy, segment_softmax, segment_sum
from eosin.mil import AGGREGATORS, LOSS_TERMS, Aggregator, AttentionOutput, LossTerm, PackedBags


@AGGREGATORS.register("template_pool")
class TemplatePool(Aggregator):
    """Attention pooling with a learned temperature.

    Parameters
    ----------
    in_dim, n_outputs : int
    width : int
        Width of the embedded tiles.
    tau : float
        Temperature at the start.
    """

    output_type = AttentionOutput

    def __init__(self, in_dim: int, n_outputs: int, *, width: int = 64, tau: float = 1.0) -> None:
        super().__init__(in_dim, n_outputs, embed_dim=width)
        self.embed = nn.Sequential(nn.Linear(in_dim, width), nn.ReLU())
        self.score = nn.Linear(width, 1)
        self.tau = nn.Parameter(torch.tensor(tau))
        self.classifier = nn.Linear(width, n_outputs)

    def forward(self, bags: PackedBags) -> AttentionOutput:
        """Return logits (B, K), bag embeddings (B, E), scores (N, 1) and embedded instances (N, E)."""
        instances = self.embed(bags.values)
        scores = self.score(instances) / self.tau
        embedding = segment_sum(segment_softmax(scores, bags.cu_seqlens) * instances, bags.cu_seqlens)
        return AttentionOutput(self.classifier(embedding), embedding, scores, instances)


@LOSS_TERMS.register("template_spread")
class TemplateSpread(LossTerm):
    """Minus the entropy of the attention, mean over the bags."""

    requires = AttentionOutput

    def forward(self, output: AttentionOutput, bags: PackedBags, target: Tensor) -> Tensor:
        """Return a scalar."""
        return -segment_attention_entropy(output.scores, bags.cu_seqlens).mean()
