"""Slides in stores: a local web server that can break, and a server that speaks S3."""

import hashlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")

from eosin._names import as_url
from eosin.errors import SlideError
from eosin.wsi import _remote
from eosin.wsi._job import JobFolder, Tiling, tile_slides
from eosin.wsi._remote import Copy, RemoteFile, fetch, working_ahead
from eosin.wsi._slide_file import find_slides, open_slide


class Store(ThreadingHTTPServer):
    """A web server of files in memory: ranges, ETags, and faults on request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.log, self.refused, self.breaks_after, self.ranges = {}, [], set(), None, "bytes"
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.on_range = lambda name: None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(is_head=True)

    def do_GET(self):
        self.answer(is_head=False)

    def answer(self, *, is_head):
        store, name = self.server, self.path.split("?")[0].strip("/").removeprefix("folder/")
        if name in store.refused:
            return self.send(403, b"")
        if name == "folder":
            links = "".join(f'<a href="/folder/{one}">{one}</a>' for one in store.files)
            return self.send(200, links.encode())
        if name not in store.files:
            return self.send(404, b"")
        data = store.files[name]
        tag = {"ETag": f'"{hashlib.md5(data).hexdigest()}"', "Accept-Ranges": store.ranges}
        if is_head:
            return self.send(200, data, tag, is_head=True)
        wanted = self.headers.get("Range")
        store.log.append((name, wanted))
        store.on_range(name)
        if wanted is None or store.ranges != "bytes":
            return self.send(200, data, tag)
        start, end = (int(one) for one in wanted.removeprefix("bytes=").split("-"))
        if store.breaks_after is not None and start >= store.breaks_after:
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        piece = data[start : end + 1]
        return self.send(206, piece, {**tag, "Content-Range": f"bytes {start}-{end}/{len(data)}"})

    def send(self, status, data, headers=None, *, is_head=False):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if not is_head:
            self.wfile.write(data)


@pytest.fixture
def store(tmp_path, monkeypatch, write_slide, tissue_picture):
    """A store with one slide, and a staging folder of the test's own."""
    monkeypatch.setenv("EOSIN_STAGING", str(tmp_path / "staging"))
    monkeypatch.setattr(_remote, "CHUNK_BYTES", 2**16)
    monkeypatch.setattr(_remote, "FIRST_PAUSE_S", 0.01)
    _remote.staging_folder.cache_clear()
    with Store() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        server.path = write_slide("here/a.tiff", tissue_picture)
        server.files["a.tiff"] = server.path.read_bytes()
        yield server
        server.shutdown()
    _remote.staging_folder.cache_clear()


def slide_of(store, name="a.tiff"):
    (found,) = find_slides([Path(f"{store.url}/{name}")])
    return found


def record(slides, job):
    (one,) = tile_slides(slides, JobFolder(job), Tiling(mpp=0.5, patch_size=128)).records
    return one


def test_addresses_survive_the_command_line():
    assert as_url(Path("s3://bucket/a b/c.svs")) == "s3://bucket/a b/c.svs"
    assert as_url(Path("https://host:81/x.svs?sig=1")) == "https://host:81/x.svs?sig=1"
    assert not any(as_url(text) for text in ("a/b.svs", "/s3:/x", "C:/x", "file.s3:/x", "s3:"))


def test_a_slide_of_a_store_gives_the_same_tiles_and_says_what_was_copied(store, tmp_path):
    slide = slide_of(store)
    assert slide.slide_id == "a"
    with slide.open() as there, open_slide(store.path) as here:
        assert np.array_equal(there.read((500, 300), (64, 64), 0.5), here.read((500, 300), (64, 64), 0.5))
    made = record([slide], tmp_path / "job")
    data = store.files["a.tiff"]
    assert made.status == "ok"
    assert f"copied from http: {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()[:16]}" in made.message
    assert hashlib.md5(data).hexdigest() in made.message
    assert record([slide], tmp_path / "job").reason == "done"


def test_a_copy_that_stops_half_way_goes_on_there(store):
    slide, half = slide_of(store), 3 * 2**16
    store.breaks_after = half
    with pytest.raises(SlideError, match="the store does not answer") as caught:
        slide.open()
    assert caught.value.code == "unreachable"
    assert store.url not in str(caught.value)
    copy = Copy(RemoteFile(slide.url).staged)
    assert copy.part.stat().st_size == half
    store.breaks_after, store.log[:] = None, []
    slide.open().close()
    assert min(int(wanted.removeprefix("bytes=").split("-")[0]) for _, wanted in store.log) == half
    assert copy.path.read_bytes() == store.files["a.tiff"]


def test_half_of_an_older_version_is_not_continued(store):
    slide = slide_of(store)
    store.breaks_after = 2**16
    with pytest.raises(SlideError):
        slide.open()
    store.breaks_after = None
    store.files["a.tiff"] = changed = bytes(reversed(store.files["a.tiff"]))
    assert fetch(RemoteFile(slide.url)).path.read_bytes() == changed


@pytest.mark.parametrize("stated", ["none", "unknown"])
def test_a_server_without_ranges_is_read_whole_and_once(store, stated):
    store.ranges = stated
    slide = slide_of(store)
    slide.open().close()
    assert len(store.log) == 1
    assert slide.path.read_bytes() == store.files["a.tiff"]


@pytest.mark.parametrize(("name", "code"), [("a.tiff", "forbidden"), ("b.tiff", "missing")])
def test_what_a_store_refuses_is_one_line(store, tmp_path, name, code):
    store.refused.add("a.tiff")
    made = record([slide_of(store, name)], tmp_path / "job")
    assert (made.status, made.reason) == ("failed", code)
    assert "\n" not in made.message


def test_a_change_under_the_same_name_is_noticed(store, tmp_path):
    slide = slide_of(store)
    assert record([slide], tmp_path / "job").reason != "done"
    data = bytearray(store.files["a.tiff"])
    data[len(data) // 2] ^= 1  # neither size nor ends say so
    store.files["a.tiff"] = bytes(data)
    assert record([slide], tmp_path / "job").reason != "done"


def test_a_change_while_it_is_copied_is_noticed(store):
    slide, old = slide_of(store), store.files["a.tiff"]

    def change(name):
        store.files[name] = old[:-1] + b"x"

    store.on_range = change
    with pytest.raises(SlideError, match="changed while it was copied") as caught:
        slide.open()
    assert caught.value.code == "changed"
    assert not Copy(RemoteFile(slide.url).staged).path.exists()


def test_a_damaged_copy_is_fetched_again(store):
    copy = fetch(RemoteFile(f"{store.url}/a.tiff"))
    copy.path.write_bytes(b"x" * copy.path.stat().st_size)
    assert fetch(RemoteFile(f"{store.url}/a.tiff")).path.read_bytes() == store.files["a.tiff"]


def test_a_list_and_a_folder_of_a_store(store, tmp_path):
    store.files |= {"b.tiff": store.files["a.tiff"], "c.vsi": b"", "readme.html": b""}
    table = tmp_path / "slides.csv"
    table.write_text(f"slide,ward\n{store.url}/a.tiff,1\nhere/a.tiff,2\n")
    (tmp_path / "here/a.tiff").rename(tmp_path / "here/z.tiff")
    table.write_text(table.read_text().replace("here/a", "here/z"))
    assert [(one.slide_id, bool(one.url)) for one in find_slides([table])] == [("a", True), ("z", False)]
    found = find_slides([Path(f"{store.url}/folder")], unread=True)
    assert [(one.slide_id, one.unread) for one in found] == [("a", False), ("b", False), ("c.vsi", True)]


def test_room_is_made_by_what_was_read_longest_ago_and_never_by_what_is_open(store, monkeypatch):
    size = len(store.files["a.tiff"])
    store.files |= dict.fromkeys(("b.tiff", "c.tiff"), store.files["a.tiff"])
    monkeypatch.setenv("EOSIN_STAGING_GB", str(2.5 * size / 1e9))
    a, b, c = (slide_of(store, name) for name in ("a.tiff", "b.tiff", "c.tiff"))
    held = a.open()
    b.open().close()
    c.open().close()
    assert [one.path.exists() for one in (a, b, c)] == [True, False, True]
    held.close()
    del held
    b.open().close()
    assert not a.path.exists()
    _remote.sweep()
    assert not any(one.path.exists() for one in (a, b, c))


def test_the_next_slides_are_copied_ahead_and_no_more(store, monkeypatch):
    monkeypatch.setenv("EOSIN_STAGING_AHEAD", "2")
    store.files |= {f"{number}.tiff": store.files["a.tiff"] for number in range(4)}
    slides = [slide_of(store, f"{number}.tiff") for number in range(4)]
    with working_ahead([RemoteFile(slide.url) for slide in slides]):
        wait(lambda: slides[1].path.exists())
        threading.Event().wait(3 * _remote.POLL_S)
        assert [slide.path.exists() for slide in slides] == [True, True, False, False]
        slides[0].open().close()
        wait(lambda: slides[2].path.exists())
    assert not slides[3].path.exists()


def test_what_was_copied_ahead_is_not_thrown_away_for_the_next(store, monkeypatch):
    monkeypatch.setenv("EOSIN_STAGING_GB", str(1.5 * len(store.files["a.tiff"]) / 1e9))
    store.files["b.tiff"] = store.files["a.tiff"]
    a, b = slide_of(store), slide_of(store, "b.tiff")
    with working_ahead([RemoteFile(a.url), RemoteFile(b.url)]):
        wait(a.path.exists)
        threading.Event().wait(3 * _remote.POLL_S)
        assert a.path.exists()
        assert not b.path.exists()
        a.open().close()
        wait(b.path.exists)


def wait(until):
    for _ in range(500):
        if until():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not happen")


def test_slides_of_several_files_are_refused_in_one_line(store, tmp_path):
    store.files["s.mrxs"] = b"x"
    made = record([slide_of(store, "s.mrxs")], tmp_path / "job")
    assert (made.status, made.reason) == ("failed", "unsupported-format")


@pytest.mark.long
def test_a_bucket_of_s3(store, tmp_path, monkeypatch):
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for key, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():  # fmt: skip
            monkeypatch.setenv(key, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="slides")
        client.upload_file(str(store.path), "slides", "ward 7/a.tiff")
        found = find_slides([Path("s3://slides/ward 7"), Path("s3://slides/none.tiff")])
        assert [slide.slide_id for slide in found] == ["a", "none"]
        made = tile_slides(found, JobFolder(tmp_path / "job"), Tiling(mpp=0.5, patch_size=128)).records
        assert [(one.status, one.reason) for one in made] == [("ok", ""), ("failed", "missing")]
        assert "copied from s3" in made[0].message
        assert "ward" not in json.dumps([one.message for one in made])
        client.put_object(Bucket="slides", Key="ward 7/a.tiff", Body=store.files["a.tiff"] + b" ")
        again = tile_slides(found[:1], JobFolder(tmp_path / "job"), Tiling(mpp=0.5, patch_size=128)).records
        assert again[0].reason != "done"
        client.close()
    finally:
        server.stop()
