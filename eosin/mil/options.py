"""Types for the options of methods: a range is part of the meaning of an option, and belongs in the signature.

``def __init__(self, in_dim, n_outputs, *, heads: Count = 8, mask_p: Share = 0.6)`` refuses 0 heads and a share of 1.5
when the method is built by name, in every recipe and on the command line. A plain ``int`` or ``float`` takes any
number.
"""

from typing import Annotated

from pydantic import Field

__all__ = ["Count", "Dropout", "NotNegative", "Part", "Positive", "Share", "Whole"]

Count = Annotated[int, Field(ge=1)]
"""How many there are of something that must exist: heads, layers, channels."""

Whole = Annotated[int, Field(ge=0)]
"""How many there are of something that may be left out."""

Share = Annotated[float, Field(ge=0, le=1)]
"""A fraction or a probability."""

Dropout = Annotated[float, Field(ge=0, lt=1)]
"""A probability of being dropped: at 1 nothing would be left."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A number whose formula has no meaning at 0: temperatures, widths of a margin in a denominator."""

NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""A weight that may be 0."""

Part = Annotated[float, Field(gt=0, lt=1)]
"""A fraction that leaves something on both sides."""
