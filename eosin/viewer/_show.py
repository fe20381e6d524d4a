"""What `eosin view` does: show slides in the browser until it is stopped."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bokeh.document import Document
from bokeh.models import Div

from eosin.viewer._catalogue import Catalogue
from eosin.viewer._page import Desk, Page
from eosin.viewer._server import BuildPage, run_until_stopped, start_viewer
from eosin.viewer._tiles import TileStore

logger = logging.getLogger(__name__)


def show_slides(catalogue: Catalogue, *, out: Path | None = None, port: int = 0, ready: Callable[[str], None]) -> None:
    """Serve the viewer from this process until it is interrupted.

    Parameters
    ----------
    catalogue : Catalogue
        With at least one slide that can be shown.
    out : Path, optional
        Folder of the sessions that readers save; the only place that is written to. Without it nothing is saved.
    port : int
        0 takes a free one.
    ready : callable
        Gets the address, token included, when the server answers.

    Raises
    ------
    ConfigError
        If the port cannot be used.
    """
    store = TileStore(catalogue.slides)
    with ThreadPoolExecutor(1, thread_name_prefix="model") as pool:
        desk = Desk(catalogue, store, out, pool)
        try:
            run_until_stopped(lambda: start_viewer(page_builder(desk), store, port=port), ready)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def page_builder(desk: Desk) -> BuildPage:
    """Return what fills a document for every tab that is opened; a failure becomes a sentence in it."""

    def build(document: Document, template: str) -> None:
        try:
            Page(desk, document, template)
        except Exception as error:
            logger.error("the page could not be made: %s: %s", type(error).__name__, error, exc_info=error)
            document.clear()
            document.add_root(Div(text="The page could not be made; the terminal says why."))

    return build
