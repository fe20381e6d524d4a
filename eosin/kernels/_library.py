"""Definition of `torch.library` operators, without the seconds that `custom_op` takes at its first call."""

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "eosin"


class Operator:
    """One operator of the namespace ``eosin``.

    Parameters
    ----------
    name : str
        Its name.
    schema : str
        Arguments and results in torch's schema language.
    run : callable
        The implementation for every device.
    fake : callable
        Returns results of the right shape and type without computing them.
    """

    def __init__(self, name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
        self.qualified_name = f"{NAMESPACE}::{name}"
        torch.library.define(self.qualified_name, schema)
        torch.library.impl(self.qualified_name, "CompositeExplicitAutograd", run)
        torch.library.register_fake(self.qualified_name, fake)
        self._overload = getattr(torch.ops.eosin, name).default

    def __call__(self, *arguments: Any) -> Any:
        """Run the operator."""
        return self._overload(*arguments)

    def differentiate(self, gradient: Callable[..., Any], save: Callable[..., None]) -> None:
        """Register the gradient and what it saves, as `torch.library.register_autograd`."""
        torch.library.register_autograd(self.qualified_name, gradient, setup_context=save)
