"""The local viewer: a slide in the browser with maps over it, and questions asked by drawing."""

from typing import TYPE_CHECKING

from eosin._lazy import lazy

if TYPE_CHECKING:
    from eosin.viewer._catalogue import Catalogue, open_catalogue
    from eosin.viewer._saved import replay_sessions
    from eosin.viewer._show import show_slides
    from eosin.viewer._static import write_static

__all__ = [
    "Catalogue",
    "open_catalogue",
    "replay_sessions",
    "show_slides",
    "write_static",
]

__getattr__, __dir__ = lazy(__name__)
