"""Operators of `torch.library`, each from a plain definition and the paths that compute it.

`torch.compile` and `torch.export` see one node per operator. `torch.library.custom_op` would do the same, but takes
seconds at its first call.
"""

from collections.abc import Callable
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "eosin"
_TENSORS = ("Tensor", "Optional[Tensor]")


class Later:
    """Functions of a module that is imported when the first of them runs, such as one that needs Triton."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments, **options: getattr(import_module(self._module), name)(*arguments, **options)


class Operator:
    """One operator of the namespace ``eosin``, its gradient and its second derivatives.

    Parameters
    ----------
    name : str
        Its name.
    schema : str
        Arguments and results in torch's schema language, tensors before other arguments.
    reference : callable
        The plain definition, which autograd differentiates twice. It takes arguments by the names of the schema, and
        only those that it needs; where ``row_index`` is among the arguments, it gets ``values`` in that order.
    differentiable : int
        How many of the first arguments have a gradient.
    empty : callable
        Returns results of the right shape and type, not computed, from what the paths get.
    prepare : callable, optional
        Turns the arguments into those of the paths, a tuple; the same ones unless given.
    kept : int, optional
        How many of the last results are for the backward pass alone.
    reads_results : bool, optional
        Whether the backward pass reads the other results, too.
    **paths : pair of callables
        ``forward(*prepared)`` returns the results; ``backward(upstream, results, needs, *prepared)`` the gradients of
        the first arguments, None or anything where one is absent or not needed. The name is that of the backend.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        reference: Callable[..., Any],
        differentiable: int,
        empty: Callable[..., Any],
        prepare: Callable[..., tuple[Any, ...]] = lambda *arguments: arguments,
        kept: int = 0,
        reads_results: bool = False,
        **paths: tuple[Callable[..., Any], Callable[..., Any]],
    ) -> None:
        self._reference, self._prepare, self._empty, self._paths = reference, prepare, empty, paths
        self._differentiable, self._reads_results = differentiable, reads_results
        inputs, results = schema.split(" -> ")
        inputs = inputs.removeprefix("(").removesuffix(")") + ", str backend"
        self._forward = _define(name, f"({inputs}) -> {results}", self._run, self._fake)
        self._backward = _define(
            f"{name}_backward",
            f"(Tensor[] upstream, Tensor[] results, bool[] needs, {inputs}) -> Tensor[]",
            self._run_backward,
            self._fake_backward,
        )
        arguments = self._forward._schema.arguments
        self._names = [argument.name for argument in arguments]
        self._n_tensors = sum(str(argument.type) in _TENSORS for argument in arguments)
        self._n_results = len(self._forward._schema.returns) - kept
        self._defines = [name for name in self._names if name in signature(reference).parameters]
        torch.library.register_autograd(f"{NAMESPACE}::{name}", self._gradient, setup_context=self._save)

    def __call__(self, *arguments: Any, backend: str) -> Any:
        """Return the results that a caller may see: a tensor, or a tuple of several."""
        if backend == "reference":
            return self._definition(arguments)
        results = self._forward(*arguments, backend)
        if isinstance(results, Tensor):
            return results
        return results[0] if self._n_results == 1 else results[: self._n_results]

    def _definition(self, arguments: tuple[Any, ...]) -> Any:
        given = dict(zip(self._names, arguments, strict=False))
        if given.get("row_index") is not None:
            given["values"] = given["values"].index_select(0, given["row_index"])
        return self._reference(**{name: given[name] for name in self._defines})

    def _run(self, *arguments: Any) -> Any:
        *arguments_, backend = arguments
        return self._paths[backend][0](*self._prepare(*arguments_))

    def _run_backward(self, upstream: list[Tensor], results: list[Tensor], needs: list[bool], *arguments: Any) -> Any:
        *arguments_, backend = arguments
        found = self._paths[backend][1](upstream, results, needs, *self._prepare(*arguments_))
        return [
            gradient.to(tensor.dtype).reshape(tensor.shape).contiguous() if need else upstream[0].new_empty(0)
            for gradient, tensor, need in zip(found, arguments, needs, strict=False)
        ]

    def _fake(self, *arguments: Any) -> Any:
        return self._empty(*self._prepare(*arguments[:-1]))

    def _fake_backward(self, upstream: list[Tensor], results: list[Tensor], needs: list[bool], *arguments: Any) -> Any:
        wanted = zip(arguments, needs, strict=False)
        return [tensor.new_empty(tensor.shape) if need else upstream[0].new_empty(0) for tensor, need in wanted]

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        results = (output,) if isinstance(output, Tensor) else output
        saved = results if self._reads_results else results[self._n_results :]
        ctx.save_for_backward(*inputs[: self._n_tensors], *saved)
        ctx.options = inputs[self._n_tensors :]

    def _gradient(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: a checkpoint computes each again for one reading only
        arguments = (*saved[: self._n_tensors], *ctx.options)
        needs = list(ctx.needs_input_grad[: self._differentiable])
        if all(grad is None for grad in grads):
            return (None,) * len(arguments)
        results = list(saved[self._n_tensors :])
        upstream = [
            torch.zeros_like(results[place]) if grad is None else grad.contiguous()
            for place, grad in enumerate(grads[: self._n_results])
        ]
        if torch.is_grad_enabled():  # a second derivative is asked for
            found = self._second_order(arguments, needs, upstream)
        else:
            found = self._backward(upstream, results, needs, *arguments)
        gradients = [gradient if need else None for gradient, need in zip(found, needs, strict=True)]
        return *gradients, *(None,) * (len(arguments) - len(gradients))

    def _second_order(self, arguments: tuple[Any, ...], needs: list[bool], upstream: list[Tensor]) -> list[Any]:
        """Return the first gradients by the plain definition, so that autograd can differentiate them."""
        outputs = self._definition(arguments)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        wanted = [tensor for tensor, need in zip(arguments, needs, strict=False) if need]
        upstream = [grad.to(output.dtype) for grad, output in zip(upstream, outputs, strict=True)]
        found = iter(torch.autograd.grad(outputs, wanted, upstream, create_graph=True, allow_unused=True))
        return [next(found) if need else None for need in needs]


def _define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema)
    torch.library.impl(qualified, "CompositeExplicitAutograd", run)
    torch.library.register_fake(qualified, fake)
    return getattr(torch.ops.eosin, name).default
