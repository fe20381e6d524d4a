"""The global recycle network of MHIM-MIL version 2: tokens that read what was taken away, equation 6 of `mhim`."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from eosin.mil.attention import bag_attention
from eosin.mil.bags import PackedBags
from eosin.mil.layers import require_counts, require_fractions
from eosin.mil.masking import rows_where


class GlobalRecycle(nn.Module):
    """The global recycle network: tokens that read the instances taken away, equation 6.

    Parameters
    ----------
    width : int
        Width E of embedded instances.
    tokens, heads, head_dim : int
    dropout, momentum : float
    token_share : float or None
        Most tokens that a bag is given, as a fraction of the instances that it keeps; none gives each bag all.
    """

    queries: Tensor

    def __init__(
        self,
        width: int,
        *,
        tokens: int,
        heads: int,
        head_dim: int,
        dropout: float,
        momentum: float,
        token_share: float | None = None,
    ) -> None:
        super().__init__()
        require_counts("mhim_v2", tokens=tokens, heads=heads, head_dim=head_dim)
        if token_share is not None:
            require_fractions("mhim_v2", token_share=token_share)
        require_fractions("mhim_v2", token_dropout=dropout, token_momentum=momentum)
        bound = math.sqrt(6 / (768 + width))
        self.register_buffer("queries", torch.empty(tokens, width).uniform_(-bound, bound))
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, width)
        self.heads = heads
        self.dropout = dropout
        self.momentum = momentum
        self.token_share = token_share
        self._read: Tensor | None = None

    def read(self, rest: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Let the tokens read instances: (N, E) -> (B, k, E)."""
        query = self._split(self.to_q(self.norm(self.queries.to(rest.dtype)))).expand(len(lengths), -1, -1, -1)
        key, value = (self._split(part) for part in self.to_kv(self.norm(rest)).chunk(2, 1))
        read = bag_attention(query, key, value, lengths, query.shape[3] ** -0.5).flatten(2)
        return functional.dropout(self.to_out(read), self.dropout, self.training)

    def forward(
        self, embedded: Tensor, bags: PackedBags, kept: Tensor, rest: Tensor, counts: list[tuple[int, int]]
    ) -> PackedBags:
        """Return bags of the kept instances followed by what the tokens read in the rest."""
        keep, take = (tuple(column) for column in zip(*counts, strict=True))
        tokens = self.read(embedded[rows_where(rest, sum(take))], take)  # (B, k, E)
        self._read = tokens.detach()
        given = [self.given(count) for count in keep]
        lengths = torch.tensor(keep) + torch.tensor(given)
        bag = torch.repeat_interleave(torch.arange(bags.n_bags), lengths)
        place = torch.arange(len(bag)) - (lengths.cumsum(0) - lengths)[bag] - torch.tensor(keep)[bag]
        is_token = place >= 0
        rows = len(embedded) + bag * tokens.shape[1] + place
        source = rows.to(embedded.device)
        source[rows_where(~is_token.to(embedded.device), sum(keep))] = rows_where(kept, sum(keep))
        values = torch.cat([embedded, tokens.flatten(0, 1).to(embedded.dtype)])[source]
        ends = functional.pad(lengths.cumsum(0), (1, 0)).to(bags.cu_seqlens)
        return PackedBags(values, ends, tuple(lengths.tolist()), None, bags.ids)

    def given(self, kept: int) -> int:
        """Return how many tokens stand beside so many kept instances."""
        k = len(self.queries)
        return k if self.token_share is None else min(k, math.floor(self.token_share * kept + 1e-9))

    @torch.no_grad()
    def follow(self) -> None:
        """Move the tokens towards what they read in the last step, the mean over its bags."""
        if self._read is not None:
            self.queries.lerp_(self._read.mean(0).to(self.queries.dtype), 1 - self.momentum)
            self._read = None

    def _split(self, values: Tensor) -> Tensor:
        return torch.unflatten(values, -1, (self.heads, -1))
