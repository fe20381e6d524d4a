"""Plain PyTorch modules of the published aggregators: one bag at a time, whole tensors, autograd keeps what it likes.

They are what `benchmarks/aggregators.py` times eosin against, written from the papers' equations in the layout in which
the authors' modules are laid out, with the widths of eosin's defaults. Every one maps a bag (n, D) to logits (K,).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


def build(name: str, in_dim: int, n_outputs: int) -> nn.Module:
    """Return the plain module of an aggregator."""
    return MODULES[name](in_dim, n_outputs)


def _embedding(in_dim: int, width: int = 512, dropout: float = 0.25) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, width), nn.ReLU(), nn.Dropout(dropout))


class Pool(nn.Module):
    """Mean, maximum or smooth maximum of embedded instances."""

    def __init__(self, in_dim: int, n_outputs: int) -> None:
        super().__init__()
        self.embed = _embedding(in_dim)
        self.classifier = nn.Linear(512, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.classifier(self.pool(self.embed(x)))

    def pool(self, h: Tensor) -> Tensor:
        """Return the bag."""
        return h.mean(0)


class Max(Pool):
    """The maximum."""

    def pool(self, h: Tensor) -> Tensor:
        """Return the bag."""
        return h.max(0).values


class Lse(Pool):
    """The smooth maximum."""

    def pool(self, h: Tensor) -> Tensor:
        """Return the bag."""
        return (torch.logsumexp(5.0 * h, 0) - math.log(len(h))) / 5.0


class Gated(nn.Module):
    """Gated attention on embedded instances, one row per head."""

    hidden, gate_dropout, heads = 128, 0.0, 1

    def __init__(self, in_dim: int, n_outputs: int) -> None:
        super().__init__()
        self.embed = _embedding(in_dim)
        drop = nn.Dropout(self.gate_dropout)
        self.a = nn.Sequential(nn.Linear(512, self.hidden), nn.Tanh(), drop)
        self.b = nn.Sequential(nn.Linear(512, self.hidden), nn.Sigmoid(), drop)
        self.c = nn.Linear(self.hidden, self.heads)
        self.classifier = nn.Linear(512, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        h = self.embed(x)
        attention = functional.softmax(self.c(self.a(h) * self.b(h)).T, 1)  # (H, n)
        return self.classify(attention @ h)

    def classify(self, pooled: Tensor) -> Tensor:
        """Return logits from pooled heads (H, 512)."""
        return self.classifier(pooled)[0]


class ClamSb(Gated):
    """CLAM with one branch."""

    hidden, gate_dropout = 256, 0.25


class ClamMb(ClamSb):
    """CLAM with a branch per class; the benchmark has two."""

    heads = 2

    def classify(self, pooled: Tensor) -> Tensor:
        """Return logits, each class from its own row."""
        return (pooled * self.classifier.weight).sum(1) + self.classifier.bias


class Dsmil(nn.Module):
    """Comparison with the critical instances."""

    def __init__(self, in_dim: int, n_outputs: int) -> None:
        super().__init__()
        self.instance = nn.Linear(in_dim, n_outputs)
        self.query = nn.Sequential(nn.Linear(in_dim, 128), nn.ReLU(), nn.Linear(128, 128), nn.Tanh())
        self.classifier = nn.Conv1d(n_outputs, n_outputs, kernel_size=in_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        scores, query = self.instance(x), self.query(x)
        critical = torch.sort(scores, 0, descending=True).indices[0]
        key = self.query(x.index_select(0, critical))
        weights = functional.softmax(query @ key.T / 128**0.5, 0)
        logits = self.classifier((weights.T @ x)[None]).view(-1)
        return (logits + scores.max(0).values) / 2


class Ins(nn.Module):
    """Instance classifier with a projection head; the bag is its largest instance."""

    def __init__(self, in_dim: int, n_outputs: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(in_dim, 512), nn.ReLU())
        self.classifier = nn.Linear(512, n_outputs)
        self.project = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits; the projections take part through their mean, as a contrastive loss would use them."""
        h = self.embed(x)
        logits = self.classifier(h)
        projections = functional.normalize(self.project(h))
        return (logits - logits[:, :1]).max(0).values + projections.mean()


class Acmil(nn.Module):
    """Five branches of gated attention, the top instances of each hidden at random."""

    branches = 5

    def __init__(self, in_dim: int, n_outputs: int) -> None:
        super().__init__()
        width = in_dim // 2
        self.embed = nn.Sequential(nn.Linear(in_dim, width, bias=False), nn.ReLU())
        self.a = nn.Sequential(nn.Linear(width, 128), nn.Tanh())
        self.b = nn.Sequential(nn.Linear(width, 128), nn.Sigmoid())
        self.c = nn.Linear(128, self.branches)
        self.heads = nn.ModuleList(nn.Linear(width, n_outputs) for _ in range(self.branches))
        self.classifier = nn.Linear(width, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of the bag plus the mean of the branches'."""
        h = self.embed(x)
        attention = functional.softmax(_hide_top(self.c(self.a(h) * self.b(h)).T), 1)  # (M, n)
        pooled = attention @ h
        branches = torch.stack([head(row) for head, row in zip(self.heads, pooled, strict=True)])
        return self.classifier(attention.mean(0) @ h) + branches.mean(0)


def _hide_top(scores: Tensor, k: int = 10, share: float = 0.6) -> Tensor:
    top = scores.topk(k, 1).indices
    chosen = torch.rand(top.shape).argsort(1)[:, : int(k * share)]
    return scores.scatter(1, top.gather(1, chosen), -1e9)


class AcmilMultiHead(nn.Module):
    """Five learned queries with their own projections of the instances, eight heads each."""

    branches, n_heads = 5, 8

    def __init__(self, in_dim: int, n_outputs: int) -> None:
        super().__init__()
        width = in_dim // 2
        self.embed = nn.Sequential(nn.Linear(in_dim, width, bias=False), nn.ReLU())
        self.queries = nn.Parameter(torch.randn(self.branches, width) * 1e-6)
        self.read = nn.ModuleList(_Reader(width, self.n_heads) for _ in range(self.branches))
        self.read_bag = _Reader(width, self.n_heads)
        self.heads = nn.ModuleList(nn.Linear(width, n_outputs) for _ in range(self.branches))
        self.classifier = nn.Linear(width, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of the bag plus the mean of the branches'."""
        h = self.embed(x)
        maps = [read.weights(query[None], h) for read, query in zip(self.read, self.queries, strict=True)]
        rows = [read.pool(weights, h) for read, weights in zip(self.read, maps, strict=True)]
        branches = torch.stack([head(row) for head, row in zip(self.heads, rows, strict=True)])
        return self.classifier(self.read_bag.pool(torch.stack(maps).mean(0), h)) + branches.mean(0)


class _Reader(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.heads = heads

    def weights(self, query: Tensor, h: Tensor) -> Tensor:
        """Return the attention (H, 1, n)."""
        q, k = _by_head(self.q(query), self.heads), _by_head(self.k(h), self.heads)
        scores = q @ k.mT * q.shape[2] ** -0.5
        return functional.softmax(_hide_top(scores[:, 0])[:, None], 2)

    def pool(self, weights: Tensor, h: Tensor) -> Tensor:
        """Return the pooled row (width,)."""
        read = weights @ _by_head(self.v(h), self.heads)
        return self.norm(functional.dropout(self.out(read.transpose(0, 1).flatten(1)), 0.1))[0]


def _by_head(rows: Tensor, heads: int) -> Tensor:
    return rows.unflatten(1, (heads, -1)).transpose(0, 1)  # (H, n, width / H)


class TransMil(nn.Module):
    """Two Nyström layers with a position convolution between them."""

    def __init__(self, in_dim: int, n_outputs: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(in_dim, 512), nn.ReLU())
        self.cls = nn.Parameter(torch.randn(1, 512))
        self.norm1, self.norm2, self.norm = (nn.LayerNorm(512) for _ in range(3))
        self.attn1, self.attn2 = _Nystrom(512), _Nystrom(512)
        self.convs = nn.ModuleList(nn.Conv2d(512, 512, k, padding=k // 2, groups=512) for k in (7, 5, 3))
        self.classifier = nn.Linear(512, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        h = self.embed(x)
        side = math.ceil(len(h) ** 0.5)
        tokens = torch.cat([self.cls, h, h[: side * side - len(h)]])
        tokens = tokens + self.attn1(self.norm1(tokens))
        grid = tokens[1:].T.reshape(1, 512, side, side)
        grid = grid + sum(conv(grid) for conv in self.convs)
        tokens = torch.cat([tokens[:1], grid.flatten(2)[0].T])
        tokens = tokens + self.attn2(self.norm2(tokens))
        return self.classifier(self.norm(tokens)[0])


class _Nystrom(nn.Module):
    heads, landmarks, iterations = 8, 256, 6

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.1))
        self.conv = nn.Conv2d(self.heads, self.heads, (33, 1), padding=(16, 0), groups=self.heads, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the tokens read."""
        n = len(x)
        x = functional.pad(x, (0, 0, -n % self.landmarks, 0))
        q, k, v = (_by_head(part, self.heads) for part in self.qkv(x).chunk(3, 1))
        q = q * q.shape[2] ** -0.5
        group = len(x) // self.landmarks
        mean_q, mean_k = (part.unflatten(1, (-1, group)).mean(2) for part in (q, k))
        a1, a2, a3 = ((a @ b.mT).softmax(-1) for a, b in ((q, mean_k), (mean_q, mean_k), (mean_q, k)))
        out = (a1 @ self._inverse(a2)) @ (a3 @ v) + self.conv(v[None])[0]
        return self.out(out.transpose(0, 1).flatten(1))[-n:]

    def _inverse(self, a: Tensor) -> Tensor:
        z = a.mT / (a.abs().sum(-1).max() * a.abs().sum(-2).max())
        eye = torch.eye(len(a[0]))
        for _ in range(self.iterations):
            az = a @ z
            z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
        return z


class SetTransformer(nn.Module):
    """Two ISAB of 64 tokens and a PMA with one seed."""

    def __init__(self, in_dim: int, n_outputs: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(in_dim, 512), nn.ReLU())
        self.tokens = nn.ParameterList(nn.Parameter(torch.randn(64, 512) * 0.06) for _ in range(2))
        self.down, self.up = (nn.ModuleList(_Mab(512, 8) for _ in range(2)) for _ in range(2))
        self.seed = nn.Parameter(torch.randn(1, 512) * 0.06)
        self.pma = _Mab(512, 8)
        self.classifier = nn.Linear(512, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        h = self.embed(x)
        for tokens, down, up in zip(self.tokens, self.down, self.up, strict=True):
            h = up(h, down(tokens, h))
        return self.classifier(self.pma(self.seed, h)[0])


class _Mab(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.ff = (nn.Linear(width, width) for _ in range(4))
        self.heads, self.scale = heads, width**-0.5

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Let x read y."""
        q, k, v = (_by_head(part, self.heads) for part in (self.q(x), self.k(y), self.v(y)))
        read = q + torch.softmax(q @ k.mT * self.scale, 2) @ v
        out = read.transpose(0, 1).flatten(1)
        return out + functional.relu(self.ff(out))


class MambaMil(nn.Module):
    """Two mixers that scan the bag in its order and in a second one, as the published step-by-step reference does."""

    kind = "sr"

    def __init__(self, in_dim: int, n_outputs: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(in_dim, 512), nn.GELU())
        self.norms = nn.ModuleList(nn.LayerNorm(512) for _ in range(3))
        self.mixers = nn.ModuleList(_Mixer(512, 1024, self.kind) for _ in range(2))
        self.attention = nn.Sequential(nn.Linear(512, 128), nn.Tanh(), nn.Linear(128, 1))
        self.classifier = nn.Linear(512, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        h = self.embed(x)
        for norm, mixer in zip(self.norms, self.mixers, strict=False):
            h = h + mixer(norm(h))
        h = self.norms[-1](h)
        return self.classifier((self.attention(h).T.softmax(1) @ h)[0])


class MambaMilBoth(MambaMil):
    """The second order is from the end of the bag."""

    kind = "bi"


class MambaMilPlain(MambaMil):
    """Without a second order."""

    kind = "plain"


class _Mixer(nn.Module):
    rate = 5

    def __init__(self, width: int, inner: int, kind: str) -> None:
        super().__init__()
        self.into = nn.Linear(width, 2 * inner, bias=False)
        self.scans = nn.ModuleList(_Scan(inner, 16, 32) for _ in range(1 if kind == "plain" else 2))
        self.out = nn.Linear(inner, width, bias=False)
        self.second = {"sr": self._reordered, "bi": self._reversed, "plain": torch.zeros_like}[kind]

    def forward(self, x: Tensor) -> Tensor:
        """Mix instances along the bag."""
        inner, gate = self.into(x).chunk(2, 1)
        return self.out((self.scans[0](inner) + self.second(inner)) * functional.silu(gate))

    def _reordered(self, x: Tensor) -> Tensor:
        padded = functional.pad(x, (0, 0, 0, -len(x) % self.rate))
        order = torch.arange(len(padded)).view(-1, self.rate).T.flatten()
        return torch.empty_like(padded).index_copy(0, order, self.scans[1](padded[order]))[: len(x)]

    def _reversed(self, x: Tensor) -> Tensor:
        return self.scans[1](x.flip(0)).flip(0)


class _Scan(nn.Module):
    def __init__(self, inner: int, states: int, rank: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inner, inner, 4, padding=3, groups=inner)
        self.select = nn.Linear(inner, rank + 2 * states, bias=False)
        self.step = nn.Linear(rank, inner)
        self.a_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        self.sizes = [rank, states, states]

    def forward(self, x: Tensor) -> Tensor:
        """Scan one bag."""
        u = functional.silu(self.conv(x.T[None])[0, :, : len(x)].T)
        rank, b, c = self.select(u).split(self.sizes, 1)
        delta = functional.softplus(self.step(rank))
        decay = torch.exp(delta[:, :, None] * -torch.exp(self.a_log))  # (n, inner, states)
        drive = (delta * u)[:, :, None] * b[:, None]
        state, outputs = u.new_zeros(decay.shape[1:]), []
        for keep, add, read in zip(decay.unbind(), drive.unbind(), c.unbind(), strict=True):
            state = keep * state + add
            outputs.append(state @ read)
        return torch.stack(outputs) + u * self.skip


class Gdat(nn.Module):
    """Two blocks of attention through grouped tokens, and attention pooling."""

    def __init__(self, in_dim: int, n_outputs: int) -> None:
        super().__init__()
        self.embed = _embedding(in_dim)
        self.blocks = nn.ModuleList(_GdatBlock(512, 8, 16) for _ in range(2))
        self.attention = nn.Sequential(nn.Linear(512, 256, bias=False), nn.Tanh(), nn.Linear(256, 1, bias=False))
        self.classifier = nn.Linear(512, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.classifier((self.attention(h).T.softmax(1) @ h)[0])


class _GdatBlock(nn.Module):
    def __init__(self, width: int, heads: int, region: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        drop = nn.Dropout(0.1)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), drop, nn.Linear(4 * width, width), drop)
        self.heads, self.region, self.scale = heads, region, (width // heads) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        """Transform instances."""
        x = x + self._attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def _attend(self, x: Tensor) -> Tensor:
        n = len(x)
        side = math.ceil(math.ceil(n**0.5) / self.region) * self.region
        x = functional.pad(x, (0, 0, 0, side * side - n))
        per_side = side // self.region
        grid = x.view(per_side, self.region, per_side, self.region, -1)
        groups = grid.mean((0, 2)).flatten(0, 1)  # tokens at equal offsets of all regions
        q, k, v = (_by_head(part, self.heads) for part in self.qkv(x).chunk(3, 1))
        group_q, group_k, _ = (_by_head(part, self.heads) for part in self.qkv(groups).chunk(3, 1))
        read = (group_q @ k.mT * self.scale).softmax(-1) @ v
        out = (q @ group_k.mT * self.scale).softmax(-1) @ read + 0.1 * v
        return self.proj(out.transpose(0, 1).flatten(1))[:n]


class Downsampled(nn.Module):
    """Attention-driven weighting in front of attention pooling; at full length, as at inference."""

    def __init__(self, in_dim: int, n_outputs: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.Linear(in_dim, 128), nn.Tanh(), nn.Linear(128, 1))
        self.first, self.second = nn.Linear(in_dim, in_dim), nn.Linear(in_dim, in_dim)
        self.host = Gated(in_dim, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        weighted = x * (1 + self.attention(x).softmax(0))
        return self.host(self.second(functional.gelu(self.first(weighted))))


MODULES: dict[str, type[nn.Module]] = {
    "mean": Pool,
    "max": Max,
    "lse": Lse,
    "abmil": Gated,
    "clam_sb": ClamSb,
    "clam_mb": ClamMb,
    "dsmil": Dsmil,
    "ins": Ins,
    "acmil": Acmil,
    "acmil_mha": AcmilMultiHead,
    "transmil": TransMil,
    "set_transformer": SetTransformer,
    "mambamil": MambaMil,
    "mambamil_bi": MambaMilBoth,
    "mambamil_plain": MambaMilPlain,
    "gdat": Gdat,
    "downsampled": Downsampled,
}
