"""Registers the parts of this package; eosin imports it when a name is asked for."""

from eosin_template import encoder, pool, reader

__all__ = ["encoder", "pool", "reader"]
