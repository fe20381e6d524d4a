"""Slide encoders that eosin builds itself: CHIEF, MADELEINE and COBRA.

Each is called with all tiles of a slide and returns one vector. Names of parameters are those of the authors' files, so
that their weights fit; parts that only their pre-training needs are left out.
"""

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

CHUNK_TOKENS = 64  # the quadratic part of a chunk stays small beside the linear one

State = Mapping[str, Tensor]


class SlideNetwork(nn.Module):
    """Base of what makes one vector of a slide's tiles."""

    def forward(self, features: Tensor, origins_px0: Tensor | None = None, tile_px0: int = 0) -> Tensor:
        """Return the vector of a slide.

        Parameters
        ----------
        features : (n, D) float32
        origins_px0 : (n, 2) int64, optional
            Top-left corners in level-0 pixels, x then y, for encoders that read places.
        tile_px0 : int
            Side of a tile in level-0 pixels.

        Returns
        -------
        (E,) float32
        """
        raise NotImplementedError

    @classmethod
    def adapt(cls, state: State) -> dict[str, Tensor]:
        """Return the weights that this network has, out of the authors' file."""
        return dict(state)

    @classmethod
    def of_state(cls, state: State) -> "SlideNetwork":
        """Return a network without weights that has the sizes of adapted ones."""
        return cls()


class GatedScore(nn.Module):
    """Gated attention of Ilse et al. (ICML 2018), one score per tile: ``w (tanh(V h) * sigmoid(U h))``."""

    def __init__(self, in_dim: int, hidden: int) -> None:
        super().__init__()
        self.attention_a = nn.Sequential(nn.Linear(in_dim, hidden), nn.Tanh())
        self.attention_b = nn.Sequential(nn.Linear(in_dim, hidden), nn.Sigmoid())
        self.attention_c = nn.Linear(hidden, 1)

    def forward(self, tiles: Tensor) -> Tensor:
        """Return (n,) scores of (n, in_dim)."""
        scores: Tensor = self.attention_c(self.attention_a(tiles) * self.attention_b(tiles))
        return scores[:, 0]


class Chief(SlideNetwork):
    """CHIEF (Wang et al., Nature 634, 2024): the tiles' features under one gated attention.

    The vector is the weighted mean of the features as they came, which the authors call ``WSI_feature``; their text
    branch adds the organ to another vector and has no part in this one.
    """

    def __init__(self, dim: int = 768, embed_dim: int = 512, hidden: int = 256) -> None:
        super().__init__()
        self.attention_net = nn.Sequential(
            nn.Linear(dim, embed_dim), nn.ReLU(), nn.Identity(), GatedScore(embed_dim, hidden)
        )

    @classmethod
    def adapt(cls, state: State) -> dict[str, Tensor]:
        """Keep the attention alone."""
        return {name: value for name, value in state.items() if name.startswith("attention_net.")}

    @classmethod
    def of_state(cls, state: State) -> "Chief":
        """Read the sizes off the weights."""
        embed_dim, dim = state["attention_net.0.weight"].shape
        return cls(dim, embed_dim, len(state["attention_net.3.attention_a.0.bias"]))

    def forward(self, features: Tensor, origins_px0: Tensor | None = None, tile_px0: int = 0) -> Tensor:
        """Return (768,)."""
        scores: Tensor = self.attention_net(features)
        return scores.softmax(0) @ features


class _Branches(nn.Module):
    """Embedding of tiles and one attention per branch, as MADELEINE's file names them."""

    def __init__(self, dim: int, hidden: int, heads: int, attention: int) -> None:
        super().__init__()
        sizes = pairwise((dim, hidden, hidden, hidden * heads))
        self.pre_attn = nn.Sequential(
            *(part for a, b in sizes for part in (nn.Linear(a, b), nn.LayerNorm(b), nn.GELU(), nn.Identity()))
        )
        self.attn = nn.ModuleList(GatedScore(hidden, attention) for _ in range(heads))

    def forward(self, features: Tensor) -> Tensor:
        """Return the pooled tiles of every branch, (E, H)."""
        embedded: Tensor = self.pre_attn(features)
        branches = embedded.reshape(len(features), -1, len(self.attn)).unbind(2)  # H of (n, E)
        pooled = [score(tiles).softmax(0) @ tiles for score, tiles in zip(self.attn, branches, strict=True)]
        return torch.stack(pooled, 1)


class Madeleine(SlideNetwork):
    """MADELEINE (Jaume et al., ECCV 2024), the branch of H&E: several gated attentions over embedded tiles."""

    def __init__(self, dim: int = 512, hidden: int = 512, heads: int = 4, attention: int = 512) -> None:
        super().__init__()
        self.wsi_embedders = _Branches(dim, hidden, heads, attention)
        self.projector = nn.Linear(hidden * heads, hidden)

    @classmethod
    def adapt(cls, state: State) -> dict[str, Tensor]:
        """Leave out the projection of single tiles, which only the pre-training uses."""
        return {name: value for name, value in state.items() if not name.startswith("token_projector.")}

    @classmethod
    def of_state(cls, state: State) -> "Madeleine":
        """Read the sizes off the weights."""
        hidden, dim = state["wsi_embedders.pre_attn.0.weight"].shape
        heads = len(state["wsi_embedders.pre_attn.8.bias"]) // hidden
        return cls(dim, hidden, heads, len(state["wsi_embedders.attn.0.attention_a.0.bias"]))

    def forward(self, features: Tensor, origins_px0: Tensor | None = None, tile_px0: int = 0) -> Tensor:
        """Return (512,)."""
        vector: Tensor = self.projector(self.wsi_embedders(features).flatten())
        return vector


class Mamba2(nn.Module):
    """A Mamba-2 layer (Dao and Gu, ICML 2024, https://arxiv.org/abs/2405.21060) with one group, in chunks.

    Within a chunk the sequence is an attention without softmax, between chunks a state of (heads, 64, states) is passed
    on, so that memory is linear in the number of tiles and no compiled package is needed.
    """

    def __init__(self, dim: int, states: int, *, head: int = 64, expand: int = 2, kernel: int = 4) -> None:
        super().__init__()
        self.inner, self.states, self.head = dim * expand, states, head
        heads = self.inner // head
        self.in_proj = nn.Linear(dim, 2 * self.inner + 2 * states + heads, bias=False)
        mixed = self.inner + 2 * states
        self.conv1d = nn.Conv1d(mixed, mixed, kernel, groups=mixed, padding=kernel - 1)
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.A_log = nn.Parameter(torch.linspace(1, 16, heads).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = nn.RMSNorm(self.inner, eps=1e-5)
        self.out_proj = nn.Linear(self.inner, dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (n, dim) for (n, dim), in the order of the tiles."""
        sizes = [self.inner, self.inner + 2 * self.states, len(self.dt_bias)]
        gate, mixed, step = torch.split(self.in_proj(tokens), sizes, dim=1)
        mixed = functional.silu(self.conv1d(mixed.T[None])[0, :, : len(tokens)].T)
        values, keys, queries = torch.split(mixed, [self.inner, self.states, self.states], dim=1)
        values = values.reshape(len(tokens), -1, self.head)  # (n, H, P)
        scanned = self._scan(values, functional.softplus(step + self.dt_bias), keys, queries)
        scanned = scanned + self.D[:, None] * values
        result: Tensor = self.out_proj(self.norm(scanned.flatten(1) * functional.silu(gate)))
        return result

    def _scan(self, values: Tensor, steps: Tensor, keys: Tensor, queries: Tensor) -> Tensor:
        """Return ``y_t = C_t S_t`` with ``S_t = exp(A dt_t) S_{t-1} + dt_t x_t B_t^T``, (n, H, P)."""
        rate = -self.A_log.exp()
        state = values.new_zeros(*values.shape[1:], self.states)  # (H, P, N)
        parts = []
        for x, dt, b, c in zip(
            *(torch.split(part, CHUNK_TOKENS) for part in (values, steps, keys, queries)), strict=True
        ):
            decay = (dt * rate).cumsum(0).T  # (H, L), logarithms
            between = (decay[:, :, None] - decay[:, None, :]).masked_fill(~_lower(len(x), x.device), float("-inf"))
            weights = (c @ b.T) * between.exp() * dt.T[:, None, :]  # (H, L, L)
            inside = torch.einsum("hij,jhp->ihp", weights, x)
            before = torch.einsum("hi,in,hpn->ihp", decay.exp(), c, state)
            parts.append(inside + before)
            left = (decay[:, -1:] - decay).exp() * dt.T  # (H, L)
            state = decay[:, -1].exp()[:, None, None] * state + torch.einsum("hj,jhp,jn->hpn", left, x, b)
        return torch.cat(parts)


def _lower(side: int, device: torch.device) -> Tensor:
    return torch.ones(side, side, dtype=torch.bool, device=device).tril()


class _MambaEncoder(nn.Module):
    """Mamba-2 layers between two linear ones, as COBRA's file names them."""

    def __init__(self, dim: int, layers: int, states: int) -> None:
        super().__init__()
        self._fc1 = nn.Sequential(nn.Linear(dim, dim), nn.GELU())
        self.norm = nn.LayerNorm(dim)  # in the file, and used by nobody
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(dim), Mamba2(dim, states)) for _ in range(layers))
        self.classifier = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (n, dim) for (n, dim)."""
        tokens = self._fc1(tokens)
        for layer in self.layers:
            tokens = tokens + layer(tokens)
        mixed: Tensor = self.classifier(tokens)
        return mixed


class _Embedding(nn.Module):
    """The embedding of one width, as COBRA's file names it."""

    def __init__(self, dim: int, embed_dim: int) -> None:
        super().__init__()
        self.head = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, embed_dim), nn.Identity(), nn.SiLU(), nn.Linear(embed_dim, embed_dim)
        )


class Cobra(SlideNetwork):
    """COBRA II (Lenz et al., CVPR 2025): weights of tiles from Mamba-2 and gated attention, applied to their features.

    Features of several tile encoders are read, each through an embedding of its width.
    """

    def __init__(
        self,
        dims: tuple[int, ...] = (512, 1024, 1280, 1536),
        *,
        embed_dim: int = 768,
        heads: int = 4,
        layers: int = 1,
        hidden: int = 256,
        states: int = 128,
    ) -> None:
        super().__init__()
        self.embed = nn.ModuleDict({str(dim): _Embedding(dim, embed_dim) for dim in dims})
        self.norm = nn.LayerNorm(embed_dim)
        self.mamba_enc = _MambaEncoder(embed_dim, layers, states)
        self.attn = nn.ModuleList(GatedScore(embed_dim // heads, hidden) for _ in range(heads))

    @classmethod
    def adapt(cls, state: State) -> dict[str, Tensor]:
        """Take the momentum encoder without its head out of a training's file, or the model of a fine-tuning."""
        for start in ("momentum_enc.", "cobra."):
            inside = {name.partition(start)[2]: value for name, value in state.items() if start in name}
            if inside:
                return {name: value for name, value in inside.items() if not name.startswith("proj.")}
        return dict(state)

    @classmethod
    def of_state(cls, state: State) -> "Cobra":
        """Read the sizes off the weights."""
        layers = {name.split(".")[2] for name in state if name.startswith("mamba_enc.layers.")}
        first = "mamba_enc.layers.0.1"
        inner = state[f"{first}.norm.weight"].shape[0]
        return cls(
            tuple(int(name.split(".")[1]) for name in state if name.endswith(".head.0.weight")),
            embed_dim=len(state["norm.weight"]),
            heads=len({name.split(".")[1] for name in state if name.startswith("attn.")}),
            layers=len(layers),
            hidden=len(state["attn.0.attention_a.0.bias"]),
            states=(state[f"{first}.conv1d.weight"].shape[0] - inner) // 2,
        )

    def forward(self, features: Tensor, origins_px0: Tensor | None = None, tile_px0: int = 0) -> Tensor:
        """Return a vector as wide as the features."""
        embedding = self.embed[str(features.shape[1])]
        assert isinstance(embedding, _Embedding)
        tokens: Tensor = self.norm(self.mamba_enc(embedding.head(features)))
        branches = tokens.reshape(len(features), -1, len(self.attn)).unbind(2)  # H of (n, E)
        scores = torch.stack([score(part) for score, part in zip(self.attn, branches, strict=True)]).mean(0)
        return scores.softmax(0) @ features
