"""Parts that more than one method is made of."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from eosin import kernels
from eosin.kernels import AttentionPool, attention_pool
from eosin.mil._attention import by_rows
from eosin.mil.bags import PackedBags
from eosin.mil.subsets import Floats, as_array

Activation = Literal["relu", "gelu", "none"]
AttentionActivation = Literal["tanh", "relu", "gelu"]
Init = Literal["default", "xavier"]
DropoutAfter = Literal["each", "last"]

_ONE_KERNEL = {nn.Linear, nn.ReLU, nn.Dropout}
_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "none": nn.Identity}


def activation(name: Activation) -> nn.Module:
    """Return the module of an activation."""
    return _ACTIVATIONS[name]()


def embedding(
    in_dim: int,
    widths: tuple[int, ...],
    *,
    activation: Activation = "relu",
    bias: bool = True,
    dropout: float = 0.0,
    dropout_after: DropoutAfter = "each",
    residual_blocks: int = 0,
) -> "Embedding":
    """Return what turns features into instances: a linear layer, an activation and dropout per width.

    Parameters
    ----------
    in_dim : int
        Feature width D.
    widths : tuple of int
        Width after each layer, the last is E; none leaves the features as they are.
    activation : {"relu", "gelu", "none"}
        GELU is the exact one.
    bias : bool
        Whether the linear layers have one.
    dropout : float
        After the activations.
    dropout_after : {"each", "last"}
        Whether after every activation or only the last.
    residual_blocks : int
        Blocks ``h + relu(W_2 relu(W_1 h))`` that follow.
    """
    layers: list[nn.Module] = []
    for number, (fan_in, fan_out) in enumerate(zip((in_dim, *widths), widths, strict=False), 1):
        layers += [nn.Linear(fan_in, fan_out, bias=bias), _ACTIVATIONS[activation]()]
        drops = dropout and (dropout_after == "each" or number == len(widths))
        layers += [nn.Dropout(dropout)] if drops else []
    return Embedding(*layers, *(ResidualBlock(widths[-1]) for _ in range(residual_blocks)))


class ResidualBlock(nn.Module):
    """``h + relu(W_2 relu(W_1 h))`` without biases, as in ACMIL's code."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, values: Tensor) -> Tensor:
        """Transform instances: (N, E) -> (N, E)."""
        added: Tensor = functional.relu(self.second(functional.relu(self.first(values))))
        return values + added


def head(in_dim: int, widths: tuple[int, ...], activations: tuple[Activation, ...], n_outputs: int) -> nn.Module:
    """Return what turns the embedding of a bag into logits: a linear layer, behind others where widths are given."""
    layers: list[nn.Module] = []
    for fan_in, fan_out, name in zip((in_dim, *widths), widths, activations, strict=False):
        layers += [nn.Linear(fan_in, fan_out), activation(name)]
    last = nn.Linear((in_dim, *widths)[-1], n_outputs)
    return nn.Sequential(*layers, last) if layers else last


class Embedding(nn.Sequential):
    """Linear layers, each with its activation and perhaps dropout; those with relu run as one kernel on a CPU."""

    def forward(self, values: Tensor) -> Tensor:
        """Return instances (N, E) of features (N, D)."""
        # the one kernel is written for ReLU on a CPU
        if values.device.type != "cpu" or not {type(layer) for layer in self} <= _ONE_KERNEL:
            embedded: Tensor = super().forward(values)  # type: ignore[no-untyped-call]
            return embedded
        for number, layer in enumerate(self):
            if isinstance(layer, nn.Linear):
                values = kernels.embed_instances(values, layer.weight, layer.bias, dropout=self._dropout_after(number))
        return values

    def _dropout_after(self, number: int) -> float:
        """Return the rate of the dropout that follows a linear layer and its activation."""
        follower = self[number + 2] if number + 2 < len(self) else None
        return follower.p if self.training and isinstance(follower, nn.Dropout) else 0.0


class Attention(nn.Module):
    """Scores of instances, ``w · (act(V h) ⊙ σ(U h))``, one column per head; ungated attention has no U.

    Ilse, Tomczak, Welling, ICML 2018, equations 8 and 9, https://arxiv.org/abs/1802.04712.

    Parameters
    ----------
    in_dim : int
        Width of an instance.
    hidden : int
        Width A of the projections.
    heads : int
        Columns H of scores that share V and U.
    gated : bool
        Whether there is a gate.
    activation : {"tanh", "relu", "gelu"}
        Activation of V. The kernels know the first two; GELU, which few public models have, is computed by plain torch.
    bias : bool
        Whether the linear maps have one.
    gate_dropout : float
        On both projections, in training.
    """

    def __init__(
        self,
        in_dim: int,
        *,
        hidden: int,
        heads: int = 1,
        gated: bool = True,
        activation: AttentionActivation = "tanh",
        bias: bool = True,
        gate_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.V = nn.Linear(in_dim, hidden, bias=bias)
        self.U = nn.Linear(in_dim, hidden, bias=bias) if gated else None
        self.w = nn.Linear(hidden, heads, bias=bias)
        self.activation = activation
        self.gate_dropout = gate_dropout

    def forward(self, instances: Tensor) -> Tensor:
        """Return scores (N, H) of instances (N, E)."""
        if self.activation == "gelu":
            return by_rows(self._with_gelu, instances)
        scores: Tensor = kernels.gated_attention_scores(
            instances, *self._weights(), gate_dropout=self._dropout(), activation=self.activation
        )
        return scores

    def pool(self, instances: Tensor, bags: PackedBags, *, keep: Tensor | None = None) -> AttentionPool:
        """Return scores (N, H), pooled bags (B, H, E), their log-sum-exp and entropy (B, H).

        Parameters
        ----------
        instances : (N, E) float
        bags : PackedBags
            Says which instances belong together.
        keep : (N,) or (N, H) bool, optional
            False keeps an instance out of a head's softmax.
        """
        if self.activation == "gelu":
            scores = self(instances)
            kept = scores if keep is None else scores.masked_fill(~keep.view(len(scores), -1), float("-inf"))
            return AttentionPool(kept, *attention_pool(kept, instances, bags.cu_seqlens))
        return kernels.gated_attention_pool(
            instances,
            *self._weights(),
            bags.cu_seqlens,
            keep=keep,
            gate_dropout=self._dropout(),
            activation=self.activation,
        )

    def _with_gelu(self, instances: Tensor) -> Tensor:
        hidden = functional.dropout(functional.gelu(self.V(instances)), self._dropout())
        if self.U is not None:
            hidden = hidden * functional.dropout(torch.sigmoid(self.U(instances)), self._dropout())
        scores: Tensor = self.w(hidden)
        return scores

    def _dropout(self) -> float:
        return self.gate_dropout if self.training else 0.0

    def _weights(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor | None]:
        gate = (None, None) if self.U is None else (self.U.weight, self.U.bias)
        return (self.V.weight, self.V.bias, *gate, self.w.weight, self.w.bias)


def initialise(module: nn.Module, how: Init) -> None:
    """Set the weights of all linear layers: torch's default as they are, or Xavier normal with zero bias."""
    if how == "default":
        return
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def as_dtype(values: Tensor, like: Tensor) -> Tensor:
    """Return pooled values, which are float32 at least, in the dtype of the layer that reads them."""
    # autocast converts by itself
    return values if torch.is_autocast_enabled(values.device.type) else values.to(like.dtype)


def pooling_gradient(scores: Tensor, instances: Tensor, classifier: nn.Linear, slope: Tensor) -> Floats:
    """Return ``α_i (p_i - F)``, (n,): the slope by log weights of softmax pooling before a linear classifier.

    Parameters
    ----------
    scores, instances : (n, 1), (n, E)
        Of one bag.
    classifier : Linear
        Of weights (K, E).
    slope : (K,)
        Derivative by the logits of the number that is asked about.
    """
    share = scores[:, 0].double().softmax(0)
    own = (instances @ (slope.to(classifier.weight) @ classifier.weight).detach()).double()
    return as_array(share * (own - share @ own))
