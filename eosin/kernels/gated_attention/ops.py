"""The memory-bounded paths as `torch.library` operators, so that `torch.compile` and `torch.export` see one node each.

Every optional tensor that is absent, and every gradient that is not needed, is an empty tensor in the outputs: an
operator's outputs are fixed. Second derivatives differentiate the plain definition.
"""

from typing import Any

import torch
from torch import Tensor

from eosin.kernels._checks import accumulation_dtype
from eosin.kernels._library import Operator
from eosin.kernels._rows import Rows, gathered
from eosin.kernels.embedding.torch_impl import Embedding
from eosin.kernels.gated_attention import reference
from eosin.kernels.gated_attention.torch_impl import (
    Gate,
    Kept,
    Masks,
    pool_backward,
    pool_forward,
    score_backward,
    score_forward,
)
from eosin.kernels.memory import new_tensor

N_GATE = 6  # v_weight, v_bias, u_weight, u_bias, w_weight, w_bias
N_POOL_GRADIENTS = N_GATE + 5  # also values, embed_weight, embed_bias, temperature, score_mask
_GATE = "Tensor v_weight, Tensor? v_bias, Tensor? u_weight, Tensor? u_bias, Tensor w_weight, Tensor? w_bias"
_OPTIONS = "float gate_dropout, int seed, str activation, bool keep_branches, ScalarType product_dtype"
_SCORE_INPUTS = f"Tensor values, {_GATE}, Tensor? row_index, {_OPTIONS}, str backend"
_POOL_TENSORS = (
    f"Tensor values, Tensor? embed_weight, Tensor? embed_bias, {_GATE}, "
    "Tensor temperature, Tensor? score_mask, Tensor? keep, Tensor cu_seqlens, Tensor? row_index"
)
_POOL_INPUTS = f"{_POOL_TENSORS}, float embed_dropout, bool keep_instances, {_OPTIONS}"


def _scores(values: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    parameters, (index, dropout, seed, activation, *options) = arguments[:N_GATE], arguments[N_GATE:]
    keep_branches, dtype, backend = options
    source = Rows(values, index)
    gate = make_gate(parameters, dropout, seed, activation, dtype)
    kept = _kept(source, parameters, dtype, instances=False, branches=keep_branches)
    if backend == "triton":
        from eosin.kernels.gated_attention import triton_impl

        return triton_impl.score_forward(source, gate, kept.branches), kept.branches
    return score_forward(source, gate, kept), kept.branches


def _scores_backward(grad: Tensor, branches: Tensor, needs_values: bool, *inputs: Any) -> list[Tensor]:  # noqa: FBT001
    values, parameters = inputs[0], inputs[1 : 1 + N_GATE]
    index, dropout, seed, activation, _, dtype, backend = inputs[1 + N_GATE :]
    source = Rows(values, index)
    gate = make_gate(parameters, dropout, seed, activation, dtype)
    tensors = inputs[: 1 + N_GATE]
    if backend == "triton":
        from eosin.kernels.gated_attention import triton_impl

        d_values, (d_weight, d_bias, d_w) = triton_impl.score_backward(
            grad, source, gate, branches, needs_values=needs_values
        )
        hidden = len(parameters[0])
        halves = [d_weight[:hidden], d_bias[:hidden], d_weight[hidden:], d_bias[hidden:]]
        return dense([d_values, *halves, d_w, grad.sum(0)], tensors)
    kept = Kept(values.new_empty(0, 0), branches)
    d_values, found = score_backward(grad, source, gate, kept, needs_values=needs_values)
    return dense([d_values, *found.parameters(), grad.sum(0)], tensors)


def _pool(*inputs: Any) -> tuple[Tensor, ...]:
    """Return scores (N, H), pooled (B, H, E), lse (B, H), entropy (B, H) and what the backward pass reads again."""
    call = _PoolCall(*inputs)
    kept = _kept(call.source, call.parameters, call.dtype, instances=call.keep_instances, branches=call.keep_branches)
    results = pool_forward(call.source, call.embedding, call.gate, call.masks, call.cu_seqlens, kept)
    return *results, kept.instances, kept.branches


def _pool_backward(
    upstream: list[Tensor],
    results: list[Tensor],
    needs_values: bool,  # noqa: FBT001
    *inputs: Any,
) -> list[Tensor]:
    """Return the gradients of the first eleven tensors of `gated_pool`, empty where absent."""
    call = _PoolCall(*inputs)
    found = pool_backward(
        (upstream[0], upstream[1], upstream[2], upstream[3]),
        (results[0], results[1], results[2], results[3]),
        call.source,
        call.embedding,
        call.gate,
        call.masks,
        call.cu_seqlens,
        Kept(results[4], results[5]),
        needs_values=needs_values,
    )
    d_raw = found.scores / call.masks.temperature
    d_temperature = -(d_raw * call.masks.unmasked(results[0])).sum()
    d_mask = found.scores.sum(1) if call.masks.added is not None and call.masks.added.dim() == 1 else found.scores
    embedder = (None, None) if found.embedder is None else call.embedding.parameters(found.embedder)
    gradients = [found.values, *embedder, *found.gate.parameters(), d_raw.sum(0), d_temperature, d_mask]
    return dense(gradients, inputs[:N_POOL_GRADIENTS])


class _PoolCall:
    """The flat arguments of `gated_pool`, put together."""

    def __init__(self, *inputs: Any) -> None:
        values, embed_weight, embed_bias = inputs[:3]
        self.parameters = inputs[3 : 3 + N_GATE]
        temperature, score_mask, keep, self.cu_seqlens, row_index = inputs[9:14]
        embed_dropout, self.keep_instances, gate_dropout, seed, activation, self.keep_branches, self.dtype = inputs[14:]
        self.source = Rows(values, row_index)
        self.gate = make_gate(self.parameters, gate_dropout, seed, activation, self.dtype)
        wide = self.gate.w_weight.dtype
        self.embedding = Embedding.make(embed_weight, embed_bias, dropout=embed_dropout, seed=seed, dtype=self.dtype)
        self.masks = Masks(temperature.to(wide), _to(score_mask, wide), keep)


def make_gate(parameters: tuple[Any, ...], dropout: float, seed: int, activation: str, dtype: torch.dtype) -> Gate:
    """Return the hidden layer from its six tensors, weights in the type of the products."""
    v_weight, v_bias, u_weight, u_bias, w_weight, w_bias = parameters
    wide = accumulation_dtype(dtype)
    return Gate(
        v_weight.to(dtype),
        _to(v_bias, wide),
        _to(u_weight, dtype),
        _to(u_bias, wide),
        w_weight.to(wide),
        _to(w_bias, wide),
        dropout=dropout,
        seed=seed,
        activation=activation,
    )


def _kept(source: Rows, parameters: tuple[Any, ...], dtype: torch.dtype, *, instances: bool, branches: bool) -> Kept:
    v_weight, u_weight = parameters[0], parameters[2]
    values, n_rows = source.values, len(source)
    n_branches = len(v_weight) * (1 if u_weight is None else 2)
    return Kept(
        new_tensor(values, (n_rows if instances else 0, v_weight.shape[1]), dtype),
        new_tensor(values, (n_rows if branches else 0, n_branches), dtype),
    )


def dense(gradients: list[Tensor | None], inputs: tuple[Any, ...]) -> list[Tensor]:
    """Give each gradient its tensor's type; an empty tensor stands for none."""
    anchor = inputs[0]
    return [
        anchor.new_empty(0)
        if gradient is None or tensor is None
        else gradient.to(tensor.dtype).reshape(tensor.shape).contiguous()
        for gradient, tensor in zip(gradients, inputs, strict=True)
    ]


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _fake_scores(values: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    parameters, (index, _, _, _, keep_branches, dtype, _) = arguments[:N_GATE], arguments[N_GATE:]
    source = Rows(values, index)
    kept = _kept(source, parameters, dtype, instances=False, branches=keep_branches)
    return values.new_empty((len(source), len(parameters[4])), dtype=accumulation_dtype(dtype)), kept.branches


def _fake_scores_backward(grad: Tensor, branches: Tensor, needs_values: bool, *inputs: Any) -> list[Tensor]:  # noqa: FBT001
    return _empty_gradients(inputs[: 1 + N_GATE], needs_values)


def _fake_pool(*inputs: Any) -> tuple[Tensor, ...]:
    call = _PoolCall(*inputs)
    kept = _kept(call.source, call.parameters, call.dtype, instances=call.keep_instances, branches=call.keep_branches)
    heads, width = call.gate.w_weight.shape[0], call.gate.v_weight.shape[1]
    wide, n_bags = call.gate.w_weight, call.cu_seqlens.shape[0] - 1
    sizes = ((len(call.source), heads), (n_bags, heads, width), (n_bags, heads), (n_bags, heads))
    return *(wide.new_empty(size) for size in sizes), kept.instances, kept.branches


def _fake_pool_backward(
    upstream: list[Tensor],
    results: list[Tensor],
    needs_values: bool,  # noqa: FBT001
    *inputs: Any,
) -> list[Tensor]:
    return _empty_gradients(inputs[:N_POOL_GRADIENTS], needs_values)


def _empty_gradients(tensors: tuple[Any, ...], needs_values: bool) -> list[Tensor]:  # noqa: FBT001
    values, *others = tensors
    gradients = [torch.empty_like(values) if needs_values else values.new_empty(0)]
    return gradients + [values.new_empty(0) if other is None else torch.empty_like(other) for other in others]


def _save_scores(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[: 2 + N_GATE], output[1])
    ctx.options = inputs[2 + N_GATE :]


def _scores_gradient(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, branches = ctx.saved_tensors
    nothing = (None,) * len(ctx.options)
    if grad is None:
        return (None,) * len(tensors) + nothing
    if torch.is_grad_enabled():
        dropout, seed, activation = ctx.options[:3]
        values, *gate, index = tensors
        scores = reference.gated_attention_scores(
            gathered(values, index), *gate, gate_dropout=dropout, seed=seed, activation=activation
        )
        return *_second_order(ctx, (scores,), tensors, (grad,)), *nothing
    needs_values = ctx.needs_input_grad[0]
    found = gated_scores_backward(grad.contiguous(), branches, needs_values, *tensors, *ctx.options)
    return *_wanted(ctx, found), None, *nothing  # the index has no gradient


def _save_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    n_tensors = N_POOL_GRADIENTS + 3
    ctx.save_for_backward(*inputs[:n_tensors], *output)
    ctx.n_tensors, ctx.options = n_tensors, inputs[n_tensors:]


def _pool_gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors, results = ctx.saved_tensors[: ctx.n_tensors], ctx.saved_tensors[ctx.n_tensors :]
    nothing = (None,) * (len(ctx.options) + 3)  # also keep, cu_seqlens and row_index
    upstream = [
        torch.zeros_like(result) if grad is None else grad for grad, result in zip(grads[:4], results[:4], strict=True)
    ]
    if torch.is_grad_enabled():
        embed_dropout, _, gate_dropout, seed, activation = ctx.options[:5]
        values, *others, index = tensors
        outputs = reference.gated_attention_pool(
            gathered(values, index),
            *others,
            embed_dropout=embed_dropout,
            gate_dropout=gate_dropout,
            seed=seed,
            activation=activation,
        )
        return *_second_order(ctx, outputs, tensors[:N_POOL_GRADIENTS], upstream), *nothing
    found = gated_pool_backward(upstream, list(results), ctx.needs_input_grad[0], *tensors, *ctx.options)
    return *_wanted(ctx, found), *nothing


def _wanted(ctx: Any, found: list[Tensor]) -> list[Tensor | None]:
    return [gradient if need else None for gradient, need in zip(found, ctx.needs_input_grad, strict=False)]


def _second_order(ctx: Any, outputs: Any, tensors: Any, upstream: Any) -> list[Tensor | None]:
    needs = ctx.needs_input_grad[: len(tensors)]
    wanted = [tensor for tensor, need in zip(tensors, needs, strict=True) if need]
    found = iter(torch.autograd.grad(outputs, wanted, upstream, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


gated_scores = Operator(
    "gated_scores", f"({_SCORE_INPUTS}) -> (Tensor scores, Tensor branches)", run=_scores, fake=_fake_scores
)
gated_scores_backward = Operator(
    "gated_scores_backward",
    f"(Tensor grad, Tensor branches, bool needs_values, {_SCORE_INPUTS}) -> Tensor[]",
    run=_scores_backward,
    fake=_fake_scores_backward,
)
gated_pool = Operator(
    "gated_pool",
    f"({_POOL_INPUTS}) -> "
    "(Tensor scores, Tensor pooled, Tensor lse, Tensor entropy, Tensor instances, Tensor branches)",
    run=_pool,
    fake=_fake_pool,
)
gated_pool_backward = Operator(
    "gated_pool_backward",
    f"(Tensor[] upstream, Tensor[] results, bool needs_values, {_POOL_INPUTS}) -> Tensor[]",
    run=_pool_backward,
    fake=_fake_pool_backward,
)
gated_scores.differentiate(_scores_gradient, _save_scores)
gated_pool.differentiate(_pool_gradient, _save_pool)
