import asyncio
import contextlib
import dataclasses
import http.client
import json
import random
import socket
import string
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from bokeh.io import doc as current_document
from bokeh.models import Div
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.websocket import WebSocketError, websocket_connect

from eosin.errors import ConfigError
from eosin.viewer._server import ADDRESS, MOST_GUESTS, MOST_STRANGERS, serving, start_viewer
from eosin.viewer._show import open_browser, page_builder
from eosin.viewer._tiles import blank_png

FINE = {200}
REFUSED = {400, 403, 404, 405}


@pytest.fixture(scope="module")
def place(url, catalogue):
    """Host and port, token, key of a slide."""
    parts = urllib.parse.urlsplit(url)
    return parts.hostname, parts.port, parts.path.strip("/"), catalogue.shown[0].key


def ask(place, target, *, method="GET", headers=None, host=None):
    """Send one request as it is written, whatever a proper client would make of it."""
    connection = http.client.HTTPConnection(place[0], place[1], timeout=20)
    try:
        connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
        connection.putheader("Host", host or f"{place[0]}:{place[1]}")
        for name, value in (headers or {}).items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.read(), dict(answer.getheaders())
    finally:
        connection.close()


def test_page_scripts_and_tiles_come_with_the_token_alone(place):
    _, _, token, key = place
    status, page, headers = ask(place, f"/{token}/")
    assert status == 200
    assert b"http://" not in page.replace(b"http://www.w3.org", b"")
    assert b"https://" not in page
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["X-Frame-Options"] == "DENY"
    assert ask(place, f"/{token}/static/js/bokeh.min.js")[0] == 200
    status, tile, headers = ask(place, f"/{token}/tiles/{key}/colour/0/0/0.jpg")
    assert (status, tile[:3], headers["Content-Type"]) == (200, b"\xff\xd8\xff", "image/jpeg")
    assert ask(place, f"/{token}/tiles/{key}/colour/1/1/1.jpg")[1] == blank_png()
    for path in ("/", f"/{key}", f"/tiles/{key}/colour/0/0/0.jpg", "/static/js/bokeh.min.js", f"/{token[:-1]}/", "/ws"):
        assert ask(place, path)[0] == 403


def test_favicons_are_no_error(place):
    assert ask(place, "/favicon.ico")[:2] == (204, b"")


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost", "[::1]:80", "0.0.0.0", "a" * 300]
)
def test_foreign_hosts_are_refused(place, host):
    assert ask(place, f"/{place[2]}/", host=host)[0] == 403


def test_foreign_origins_are_refused_and_ours_is_not(place):
    for origin in ("http://evil.example", "null", "https://127.0.0.1", f"http://127.0.0.1:{place[1] + 1}", "file://"):
        assert ask(place, f"/{place[2]}/", headers={"Origin": origin})[0] == 403
    assert ask(place, f"/{place[2]}/", headers={"Origin": f"http://localhost:{place[1]}"})[0] == 200


@pytest.mark.parametrize(
    "rest", ["metadata", "autoload.js", "static/extensions/x", "static/../../etc/passwd", "static/css/a.css"]
)
def test_what_the_page_does_not_need_is_not_there(place, rest):
    assert ask(place, f"/{place[2]}/{rest}")[0] == 404


def hostile_requests(place, folder):
    """Yield 500 requests: traversal, huge and negative places, wrong methods, hosts, tokens and noise."""
    _, port, token, key = place
    rng = random.Random(0)
    up = ["../", "..%2f", "%2e%2e/", "..\\", "%252e%252e%252f", "....//", "..%c0%af", "%2e%2e%5c", "..;/", "/"]
    files = [
        "etc/passwd",
        f"{folder}/model/model.json",
        f"{folder}/slide-1.tiff",
        "proc/self/environ",
        "label",
        "macro",
    ]
    number = [
        "-1",
        "99999999",
        "1e9",
        "0x1",
        "999999999999999999999",
        "NaN",
        " ",
        "1.5",
        "%00",
        "%D9%A3",
        "0/../..",
        "--1",
        "''",
    ]
    method = ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "PATCH", "CONNECT", "BREW", "PROPFIND"]
    for _ in range(120):
        start = rng.choice(["", "static/", "static/js/", f"tiles/{key}/", "tiles/", f"tiles/{key}/colour/0/0/"])
        yield {"target": f"/{token}/{start}{rng.choice(up) * rng.randint(1, 9)}{rng.choice(files)}"}
    for _ in range(120):
        z, x, y = (rng.choice([*number, "0"]) for _ in range(3))
        z = z if (z, x, y) != ("0", "0", "0") else "7"
        target = f"/{token}/tiles/{key}/{rng.choice(['colour', 'grey', 'label', 'macro'])}/{z}/{x}/{y}.jpg"
        yield {"target": target.replace(" ", "+")}
    for _ in range(60):
        yield {
            "target": rng.choice([f"/{token}/", f"/{token}/ws", f"/{token}/tiles/{key}/colour/0/0/0.jpg"]),
            "method": rng.choice(method),
        }
    for _ in range(60):
        host = rng.choice(
            [
                "evil.example",
                f"evil.example:{port}",
                f"127.0.0.1.evil.example:{port}",
                "",
                "@",
                f"127.0.0.1:{port}@evil",
            ]
        )
        yield {"target": f"/{token}/tiles/{key}/colour/0/0/0.jpg", "host": host or " "}
    for _ in range(60):
        wrong = "".join(
            rng.choices(string.ascii_letters + string.digits + "-_.~%", k=rng.choice([0, 1, 31, 32, 33, 500]))
        )
        yield {"target": f"/{wrong}/tiles/{key}/colour/0/0/0.jpg"}
    for _ in range(60):
        other = "".join(rng.choices("0123456789abcdef", k=rng.choice([15, 16, 17])))
        yield {"target": f"/{token}/tiles/{other}/colour/0/0/0.jpg"}
    for size in range(20):
        yield {"target": f"/{token}/{'a' * 2 ** min(size, 13)}?{'b=1&' * size}"}


def test_five_hundred_hostile_requests_get_a_line_and_no_file(place, folder, catalogue):
    opened = {str(one.file.path) for one in catalogue.listed}
    requests = list(hostile_requests(place, folder))
    assert len(requests) == 500
    for request in requests:
        status, body, _ = ask(place, **request)
        assert status in REFUSED, (request, status)
        assert len(body) < 200, request
        assert not any(word in body for word in (b"Traceback", b"root:", b"/work", b"site-packages", b"line "))
    assert {str(file.path) for file in catalogue.slides._files.values()} == opened
    assert ask(place, f"/{place[2]}/")[0] == 200  # still well


@pytest.mark.parametrize(
    "junk",
    [b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"A" * 70_000, b"GET / HTTP/1.1\r\n\r\n"],
)
def test_what_is_no_http_is_dropped(place, junk):
    answer = b""
    with contextlib.suppress(ConnectionError), socket.create_connection(place[:2], timeout=10) as raw:
        raw.sendall(junk)
        raw.shutdown(socket.SHUT_WR)
        while chunk := raw.recv(4096):
            answer += chunk
    assert not answer.startswith(b"HTTP/1.1 200")
    assert b"Traceback" not in answer
    assert ask(place, f"/{place[2]}/")[0] == 200


async def hang_up(connection):
    """Close a websocket and wait until it is closed."""
    connection.close()
    with contextlib.suppress(TimeoutError):
        while await asyncio.wait_for(connection.read_message(), 5) is not None:
            pass


def talk(place, *, origin, token, subprotocols):
    """Open a websocket and return the first message, or the refusal."""

    async def session():
        request = HTTPRequest(f"ws://{place[0]}:{place[1]}/{token}/ws", headers={"Origin": origin})
        connection = await websocket_connect(request, subprotocols=subprotocols)
        try:
            return await asyncio.wait_for(connection.read_message(), 10)
        finally:
            await hang_up(connection)

    try:
        return asyncio.run(session())
    except (HTTPClientError, WebSocketError, OSError) as error:
        return str(error)


@pytest.mark.long
def test_the_websocket_needs_token_origin_and_a_session_of_the_page(place):
    ours = f"http://127.0.0.1:{place[1]}"
    assert "403" in talk(place, origin="http://evil.example", token=place[2], subprotocols=["bokeh", "x"])
    assert "403" in talk(place, origin=ours, token="x" * 32, subprotocols=["bokeh", "x"])
    for junk in ([], ["bokeh", "x"], ["other", "y"]):
        answer = talk(place, origin=ours, token=place[2], subprotocols=junk)
        assert answer is None or "Traceback" not in answer


def session_token(page: bytes) -> str:
    marker = b'"token":"'
    start = page.index(marker) + len(marker)
    return page[start : page.index(b'"', start)].decode()


@pytest.mark.long
def test_nonsense_over_the_websocket_gets_no_traceback(place):
    token = session_token(ask(place, f"/{place[2]}/")[1])

    async def converse():
        request = HTTPRequest(
            f"ws://{place[0]}:{place[1]}/{place[2]}/ws", headers={"Origin": f"http://127.0.0.1:{place[1]}"}
        )
        connection = await websocket_connect(request, subprotocols=["bokeh", token])
        fragments = [await asyncio.wait_for(connection.read_message(), 10) for _ in range(3)]  # ACK
        header = {"msgid": "1", "msgtype": "PATCH-DOC"}
        content = {"events": [{"kind": "ModelChanged", "model": {"id": "p9999"}, "attr": "text", "new": "x"}]}
        for part in (header, {}, content):
            await connection.write_message(json.dumps(part))
        try:
            while True:
                message = await asyncio.wait_for(connection.read_message(), 2)
                if message is None:
                    break
                fragments.append(message)
        except TimeoutError:
            pass
        await hang_up(connection)
        return "".join(str(fragment) for fragment in fragments)

    told = asyncio.run(converse())
    assert "ACK" in told
    assert "ERROR" in told
    assert "Traceback" not in told
    assert "site-packages" not in told
    assert not current_document._PATCHED_CURDOCS  # else no further page could be made


def test_a_page_that_cannot_be_made_tells_the_terminal_and_not_the_browser(desk, caplog):
    broken = page_builder(dataclasses.replace(desk, catalogue="secret"))
    with serving(broken, desk.store) as url, urllib.request.urlopen(url) as answer:
        body = answer.read()
    assert "the page could not be created: AttributeError" in caplog.text
    assert b"secret" not in body
    assert b"Traceback" not in body


def test_only_this_machine_is_listened_to(url, place):
    assert place[0] == ADDRESS
    own = socket.gethostbyname(socket.gethostname())
    if own.startswith("127."):
        pytest.skip("this machine has no other address")
    with pytest.raises(OSError, match=r"refused|unreachable|timed out"), socket.create_connection((own, place[1]), 3):
        pass


def test_a_port_that_is_taken_is_named(desk):
    async def start(port):
        start_viewer(lambda document, template: document.add_root(Div(text="")), desk.store, port=port)

    with socket.socket() as taken:
        taken.bind((ADDRESS, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} cannot be used"):
            asyncio.run(start(port))


def test_every_viewer_has_its_own_token(desk, url):
    with serving(lambda document, template: document.add_root(Div(text="")), desk.store) as other:
        first, second = (urllib.parse.urlsplit(one).path.strip("/") for one in (url, other))
    assert first != second
    assert len(first) >= 32


@pytest.mark.skipif(sys.platform != "linux", reason="all of 127.0.0.0/8 is this machine on Linux alone")
def test_no_other_address_of_this_machine_answers(place):
    _, port, *_ = place
    with socket.create_connection((ADDRESS, port), timeout=5):
        pass
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)


def strangers(place, number):
    """Open connections that say nothing."""
    return [socket.create_connection((place[0], place[1]), timeout=5) for _ in range(number)]


def test_connections_without_the_token_keep_nobody_out(place, caplog):
    _, _, token, _ = place
    held = []
    try:
        for _ in range(4):
            held += strangers(place, 80)
            assert ask(place, f"/{token}/static/js/bokeh.min.js")[0] == 200
        alive = [one for one in held if not is_closed(one)]
        assert 0 < len(alive) <= MOST_STRANGERS
        assert 1 <= sum("without the token" in record.message for record in caplog.records) <= 5
    finally:
        for one in held:
            one.close()


def is_closed(connection):
    """Return whether the other side has hung up."""
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def test_guests_are_limited_and_others_are_told(place):
    _, _, token, _ = place
    with contextlib.ExitStack() as stack:
        for _ in range(MOST_GUESTS):
            one = stack.enter_context(contextlib.closing(http.client.HTTPConnection(place[0], place[1], timeout=20)))
            one.request("GET", f"/{token}/static/js/nothing.js")
            one.getresponse().read()
        assert ask(place, f"/{token}/")[0] == 503
    assert ask(place, f"/{token}/static/js/bokeh.min.js")[0] == 200


NARROW = """
import contextlib, http.client, resource, socket, sys, time, urllib.parse
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from bokeh.models import Div
import eosin.viewer._server as server
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
server.MOST_STRANGERS = server.MOST_GUESTS = 1000
server._room = lambda: (1000, 1000)  # nothing but the limit of descriptors is left to help
import logging
logging.basicConfig(format="%(message)s")
store = SimpleNamespace(tile=lambda *place: b"")
with server.serving(lambda document, template: document.add_root(Div(text="")), store) as url:
    print(url, flush=True)
    sys.stdin.readline()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of descriptors as on Linux")
@pytest.mark.long
def test_without_descriptors_it_refuses_says_so_and_recovers():
    with subprocess.Popen(
        [sys.executable, "-c", NARROW], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as viewer:
        parts = urllib.parse.urlsplit(viewer.stdout.readline().strip())
        there = parts.hostname, parts.port
        held, told = [], []
        started = time.monotonic()
        while time.monotonic() - started < 3:
            with contextlib.suppress(OSError):
                held.append(socket.create_connection(there, timeout=5))
                held[-1].setblocking(False)
            time.sleep(0.01)
        for one in held:
            with contextlib.suppress(OSError):
                told.append(one.recv(15))
            one.close()
        assert b"HTTP/1.1 503 Se" in told
        path = f"{parts.path}static/js/bokeh.min.js"
        assert eventually(lambda: ask(there, path)[0] == 200)
        _, errors = viewer.communicate("\n", timeout=60)
    assert 1 <= len(errors.splitlines()) <= 8, errors[:2000]
    assert all("refused: Too many open files" in line for line in errors.splitlines())


def eventually(condition, seconds=10):
    """Return whether something becomes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if condition():
                return True
        time.sleep(0.1)
    return False


def test_scripts_run_by_their_hash_alone(place):
    _, page, headers = ask(place, f"/{place[2]}/")
    scripts = headers["Content-Security-Policy"].partition("script-src")[2].partition(";")[0]
    assert "unsafe-inline" not in scripts
    assert b"<script" in page
    assert "'sha256-" in scripts


def test_the_token_is_on_no_command_line(monkeypatch, tmp_path):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    open_browser("http://127.0.0.1:1/secret/", tmp_path)
    assert "secret" not in opened[0]
    assert "http://127.0.0.1:1/secret/" in Path(urllib.parse.urlsplit(opened[0]).path).read_text()
