"""What `eosin view` does: show slides in the browser until it is stopped."""

import logging
import tempfile
import webbrowser
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bokeh.document import Document
from bokeh.models import Div

from eosin._files import write_text
from eosin.viewer._annotations import require_apart
from eosin.viewer._catalogue import Catalogue
from eosin.viewer._page import Desk, Page
from eosin.viewer._server import BuildPage, run_until_stopped, start_viewer
from eosin.viewer._tiles import TileStore

logger = logging.getLogger(__name__)


REDIRECT = (
    '<!DOCTYPE html><meta name="referrer" content="no-referrer"><meta http-equiv="refresh" content="0; url={url}">\n'
)


def show_slides(
    catalogue: Catalogue,
    *,
    second: Catalogue | None = None,
    out: Path | None = None,
    port: int = 0,
    ready: Callable[[str], None],
    browser: bool = False,
) -> None:
    """Serve the viewer from this process until it is interrupted.

    Parameters
    ----------
    catalogue : Catalogue
        With at least one slide that can be shown.
    second : Catalogue, optional
        The same slides for a second model, which is shown beside the first.
    out : Path, optional
        Folder of the sessions and annotations that readers save; the only place that is written to. Without it
        nothing is saved.
    port : int
        0 takes a free one.
    ready : callable
        Gets the address, token included, when the server answers.
    browser : bool
        Whether to open the page in the user's browser.

    Raises
    ------
    ConfigError
        If the port cannot be used, or slides lie in `out`.
    """
    require_apart(out, [one.file.path for one in catalogue.listed])
    store = TileStore(catalogue.slides)

    def announce(url: str) -> None:
        ready(url)
        if browser:
            open_browser(url, Path(private))

    with ThreadPoolExecutor(1, thread_name_prefix="model") as pool, tempfile.TemporaryDirectory() as private:
        desk = Desk(catalogue, store, out, pool, second)
        try:
            run_until_stopped(lambda: start_viewer(page_builder(desk), store, port=port), announce)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def open_browser(url: str, private: Path) -> None:
    """Open a page of the viewer by way of a file that the user alone can read.

    All users of a machine see the command lines of each other's programs, and the address holds the token.
    """
    page = private / "eosin-view.html"
    write_text(page, REDIRECT.format(url=url))
    webbrowser.open(page.as_uri())


def page_builder(desk: Desk) -> BuildPage:
    """Return what fills a document for every tab that is opened; a failure becomes a sentence in it."""

    def build(document: Document, template: str) -> None:
        try:
            Page(desk, document, template)
        except Exception as error:
            logger.error("the page could not be created: %s: %s", type(error).__name__, error, exc_info=error)
            document.clear()
            document.add_root(Div(text="The page could not be created; the terminal shows the reason."))

    return build
