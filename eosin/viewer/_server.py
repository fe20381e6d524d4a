"""The local server: one page, its tiles, and a guard that everything else runs into.

Bound to 127.0.0.1. The path begins with a random token that every request needs: page, websocket, scripts, tiles.
Host and Origin must be this machine, so that no page from elsewhere reaches it (DNS rebinding); the few paths that
exist are listed; every fault is reported in one line.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import logging
import math
import os
import re
import secrets
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

from bokeh.application import Application
from bokeh.application.handlers.function import FunctionHandler
from bokeh.document import Document
from bokeh.io import doc as current_document
from bokeh.server.connection import ServerConnection
from bokeh.server.server import BaseServer
from bokeh.server.tornado import BokehTornado
from tornado.http1connection import HTTP1Connection
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPHeaders, HTTPServerRequest
from tornado.ioloop import IOLoop
from tornado.iostream import IOStream
from tornado.web import OutputTransform, RequestHandler

from eosin._processes import POLL_S, require_running, stop_requested
from eosin.errors import ConfigError
from eosin.viewer._tiles import TileStore

ADDRESS = "127.0.0.1"
MAX_BODY_BYTES = 2**20
MAX_MESSAGE_BYTES = 8 * 2**20
TILE_THREADS = 4
BACKLOG = 128
MOST_STRANGERS = 32
MOST_GUESTS = 96
REST_S = 0.1
SAID_EVERY_S = 1.0
PATHS = re.compile(r"/?|/ws|/static/js/[A-Za-z0-9._-]+\.js|/tiles/[0-9a-f]{16}/[a-z]{1,8}(/[0-9]{1,8}){3}\.jpg")
TILE_ROUTE = r"/tiles/([0-9a-f]{16})/([a-z]{1,8})/([0-9]{1,8})/([0-9]{1,8})/([0-9]{1,8})\.jpg"
BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 43\r\n"
    b"Retry-After: 1\r\nConnection: close\r\n\r\nthe viewer is busy; try again in a moment.\n"
)
SCRIPT = re.compile(rb"<script\b[^>]*>(.*?)</script>", re.DOTALL)
POLICY = (  # BokehJS compiles what this page does by itself (fading, reading scores) with `new Function`
    "default-src 'none'; script-src 'self' 'unsafe-eval'{scripts}; style-src 'unsafe-inline' 'self'; "
    "img-src 'self' data: blob:; connect-src 'self' ws:; font-src 'self' data:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'"
)
HEADERS = {
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Server": "eosin",
}
logger = logging.getLogger(__name__)

BuildPage = Callable[[Document, str], None]


class _Headers(OutputTransform):
    """Adds the protective headers to every answer, also to those of Bokeh's own handlers.

    Of scripts inside the page the browser runs those that were in it when it was sent, which their hashes tell.
    """

    def transform_first_chunk(
        self,
        status_code: int,
        headers: HTTPHeaders,
        chunk: bytes,
        finishing: bool,  # noqa: FBT001 - tornado's signature
    ) -> tuple[int, HTTPHeaders, bytes]:
        for name, value in HEADERS.items():
            headers[name] = value
        digests = [base64.b64encode(hashlib.sha256(text).digest()).decode() for text in SCRIPT.findall(chunk)]
        headers["Content-Security-Policy"] = POLICY.format(scripts="".join(f" 'sha256-{one}'" for one in digests))
        return status_code, headers, chunk


class _Refusal(RequestHandler):
    """Answers whatever must not be answered, to any method, in one line."""

    def initialize(self, status: int, reason: str) -> None:
        self._refusal = status, reason

    def prepare(self) -> None:
        status, reason = self._refusal
        self.set_status(status)
        if status != 204:
            self.set_header("Content-Type", "text/plain; charset=utf-8")
            self.write(f"{reason}\n")
        self.finish()


class _Tiles(RequestHandler):
    """Serves one tile of a listed slide."""

    def initialize(self, store: TileStore, pool: ThreadPoolExecutor) -> None:
        self._store, self._pool = store, pool

    async def get(self, key: str, look: str, zoom: str, column: str, row: str) -> None:
        place = int(zoom), int(column), int(row)
        try:
            data = await IOLoop.current().run_in_executor(self._pool, self._store.tile, key, look, *place)
        except LookupError:
            self.set_status(404)
            self.finish("no such tile\n")
            return
        self.set_header("Content-Type", "image/png" if data.startswith(b"\x89PNG") else "image/jpeg")
        self.set_header("Cache-Control", "private, max-age=3600")
        self.finish(data)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(f"the tile could not be read ({status_code})\n")


class _Connection(ServerConnection):  # type: ignore[misc]
    """A websocket whose error messages carry no traceback."""

    def error(self, message: Any, text: str) -> Any:
        # Bokeh keeps the document of what failed as the current one, and no page can be made once that is gone
        getattr(current_document, "_PATCHED_CURDOCS", []).clear()
        answer = super().error(message, "the viewer could not answer a request")
        answer.content["traceback"] = None
        return answer


class _Guarded(BokehTornado):  # type: ignore[misc]
    """Bokeh's application behind the guard."""

    def __init__(self, application: Application, *, token: str, port: int, extra_patterns: list[Any]) -> None:
        self._token = token.encode()
        self.guests: weakref.WeakSet[IOStream] = weakref.WeakSet()
        self._hosts = {f"{name}:{port}" for name in (ADDRESS, "localhost")}
        super().__init__(
            {"/": application},
            prefix=token,
            extra_patterns=extra_patterns,
            extra_websocket_origins=sorted(self._hosts),
            use_index=False,
            websocket_max_message_size_bytes=MAX_MESSAGE_BYTES,
            ico_path="none",
            include_headers=[],
            include_cookies=[],
            transforms=[_Headers],
        )

    def find_handler(self, request: HTTPServerRequest, **kwargs: Any) -> Any:
        """Return the handler of a request: the page's, or the refusal."""
        refusal = self._refuse(request)
        if refusal is None:
            self.guests.add(cast(HTTP1Connection, request.connection).stream)
            return super().find_handler(request, **kwargs)
        return self.get_handler_delegate(request, _Refusal, {"status": refusal[0], "reason": refusal[1]})

    def _refuse(self, request: HTTPServerRequest) -> tuple[int, str] | None:
        origin = request.headers.get("Origin")
        if request.headers.get("Host", "").lower() not in self._hosts:
            return 403, "this server answers its own machine only"
        if origin is not None and origin.lower().removeprefix("http://") not in self._hosts:
            return 403, "this server answers its own page only"
        if request.method != "GET":
            return 405, "only GET is answered"
        if request.path == "/favicon.ico":
            return 204, ""
        token, slash, rest = request.path.removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode("utf-8", "replace"), self._token):
            return 403, "the address needs the token that `eosin view` printed"
        return None if PATHS.fullmatch(slash + rest) else (404, "no such page")

    def new_connection(self, protocol: Any, socket: Any, application_context: Any, session: Any) -> ServerConnection:
        """Return a connection that tells no tracebacks."""
        connection = _Connection(protocol, socket, application_context, session)
        self._clients.add(connection)
        return connection


class _Complaints:
    """Says what is wrong, one line per second at most, however often it happens."""

    def __init__(self) -> None:
        self._said_at, self._kept_back = -math.inf, 0

    def __call__(self, message: str) -> None:
        if time.monotonic() - self._said_at < SAID_EVERY_S:
            self._kept_back += 1
            return
        more = f" (and {self._kept_back} times before)" if self._kept_back else ""
        logger.warning("%s%s", message, more)
        self._said_at, self._kept_back = time.monotonic(), 0


class _Door:
    """Lets connections in while there is room: few that have not shown the token, more that have.

    A stranger who says nothing makes way for the next one, so that nobody can keep the reader out. When the process
    has no descriptor left, one that was kept for it takes the connection, says so and closes it.
    """

    def __init__(self, listener: socket.socket, http: HTTPServer, guests: "weakref.WeakSet[IOStream]") -> None:
        self._listener, self._http, self._guests = listener, http, guests
        self._inside: list[IOStream] = []
        self._most_strangers, self._most_guests = _room()
        self._spare = os.open(os.devnull, os.O_RDONLY)
        self.complain = _Complaints()
        IOLoop.current().add_handler(listener, self._answer, IOLoop.READ)

    def _answer(self, *_event: object) -> None:
        try:
            connection, address = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError, InterruptedError):
            return
        except OSError as error:
            self._turn_away(error)
            return
        self._inside = [stream for stream in self._inside if not stream.closed()]
        strangers = [stream for stream in self._inside if stream not in self._guests]
        if len(self._inside) - len(strangers) >= self._most_guests:
            self.complain("the viewer has as many connections as it takes; others are refused")
            _say_busy(connection)
            return
        if len(strangers) >= self._most_strangers:
            self.complain("many connections come without the token; the oldest are closed")
            strangers[0].close()
        connection.setblocking(False)
        stream = IOStream(connection, max_buffer_size=MAX_BODY_BYTES)
        self._inside.append(stream)
        self._http.handle_stream(stream, address)

    def _turn_away(self, error: OSError) -> None:
        self.complain(f"a connection was refused: {error.strerror or error}")
        os.close(self._spare)
        with contextlib.suppress(OSError):
            _say_busy(self._listener.accept()[0])
        try:
            self._spare = os.open(os.devnull, os.O_RDONLY)
        except OSError:  # another thread took it: without rest this would be called again and again
            self._spare = -1
        loop = IOLoop.current()
        loop.remove_handler(self._listener)
        loop.call_later(REST_S, self._open_again)

    def _open_again(self) -> None:
        with contextlib.suppress(OSError):
            self._spare = os.open(os.devnull, os.O_RDONLY) if self._spare < 0 else self._spare
        if self._listener.fileno() >= 0:
            IOLoop.current().add_handler(self._listener, self._answer, IOLoop.READ)

    def close(self) -> None:
        """Let nobody in any more."""
        IOLoop.current().remove_handler(self._listener)
        self._listener.close()
        if self._spare >= 0:
            os.close(self._spare)


def _room() -> tuple[int, int]:
    """Return how many connections without and with the token leave enough descriptors for slides."""
    try:
        import resource
    except ImportError:
        return MOST_STRANGERS, MOST_GUESTS
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return min(MOST_STRANGERS, max(2, allowed // 16)), min(MOST_GUESTS, max(6, allowed // 8))


def _say_busy(connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):
        connection.setblocking(False)
        connection.send(BUSY)


@dataclass(frozen=True, eq=False)
class Viewer:
    """A running server.

    Parameters
    ----------
    url : str
        With the token.
    server : BaseServer
    pool : ThreadPoolExecutor
        Of the tiles.
    door : _Door
        Where connections come in.
    """

    url: str
    server: BaseServer
    pool: ThreadPoolExecutor
    door: _Door

    def stop(self) -> None:
        """Stop answering; to be called on the server's loop."""
        self.door.close()
        self.server.unlisten()
        self.server.stop(wait=False)
        self.pool.shutdown(wait=False, cancel_futures=True)


def start_viewer(build_page: BuildPage, store: TileStore, *, port: int = 0) -> Viewer:
    """Start serving on the current event loop.

    Parameters
    ----------
    build_page : callable
        Fills a Bokeh document; gets it and the template of the tiles' addresses with ``{key}`` and ``{look}`` to fill
        and Bokeh's ``{Z}``, ``{X}``, ``{Y}``.
    store : TileStore
    port : int
        0 takes a free one.

    Raises
    ------
    ConfigError
        If the port is taken or not allowed.
    """
    token = secrets.token_urlsafe(24)
    listener = _listen(port)
    chosen = listener.getsockname()[1]
    pool = ThreadPoolExecutor(TILE_THREADS, thread_name_prefix="tiles")
    template = f"/{token}/tiles/{{key}}/{{look}}/{{Z}}/{{X}}/{{Y}}.jpg"
    application = Application(FunctionHandler(lambda document: build_page(document, template)))
    routes = [(TILE_ROUTE, _Tiles, {"store": store, "pool": pool})]
    guarded = _Guarded(application, token=token, port=chosen, extra_patterns=routes)
    http = HTTPServer(guarded, max_body_size=MAX_BODY_BYTES, max_header_size=2**14, idle_connection_timeout=600)
    server = BaseServer(IOLoop.current(), guarded, http)
    server.start()
    door = _Door(listener, http, guarded.guests)
    asyncio.get_running_loop().set_exception_handler(lambda _loop, fault: door.complain(f"web server: {_short(fault)}"))
    return Viewer(f"http://{ADDRESS}:{chosen}/{token}/", server, pool, door)


def _short(fault: Mapping[str, Any]) -> str:
    return " ".join(str(fault.get("exception") or fault["message"]).split())


def _listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        if sys.platform != "win32":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((ADDRESS, port))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(f"port {port} cannot be used ({error}); remove --port to use a free port") from None
    return listener


def run_until_stopped(start: Callable[[], Viewer], ready: Callable[[str], None]) -> None:
    """Serve until a signal asks for the end; `ready` gets the address once it answers.

    Raises
    ------
    Stopped
        At the end; `KeyboardInterrupt` outside `eosin._processes.stoppable`.
    """
    with _quiet_loggers():
        asyncio.run(_serve(start, ready))
    require_running()


async def _serve(start: Callable[[], Viewer], ready: Callable[[str], None]) -> None:
    viewer = start()
    try:
        ready(viewer.url)
        while not stop_requested():
            await asyncio.sleep(POLL_S)
    finally:
        viewer.stop()


@contextlib.contextmanager
def serving(build_page: BuildPage, store: TileStore) -> Iterator[str]:
    """Serve from a thread of its own while the block runs, on a free port; yields the address."""
    loop = asyncio.new_event_loop()
    started: list[Viewer] = []
    is_up = threading.Event()

    async def start() -> None:
        started.append(start_viewer(build_page, store))
        is_up.set()

    def work() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(start())
        loop.run_forever()

    thread = threading.Thread(target=work, daemon=True)
    with _quiet_loggers():
        thread.start()
        is_up.wait()
        try:
            yield started[0].url
        finally:
            loop.call_soon_threadsafe(started[0].stop)
            loop.call_soon_threadsafe(loop.call_later, 0.2, loop.stop)
            thread.join()
            loop.close()


@contextlib.contextmanager
def _quiet_loggers() -> Iterator[None]:
    """Keep the web server's notes on single requests off the terminal; they would be for its developers."""
    loggers = [logging.getLogger(name) for name in ("bokeh", "tornado")]
    before = [(logger, logger.level) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in before:
            logger.setLevel(level)
