"""A decoder that stops in the midst of a message, where waiting for the next message would not notice."""

import multiprocessing
import os
import threading
from pathlib import Path

import pytest

from eosin.errors import CorruptSlideError
from eosin.features import _reading as reading
from eosin.wsi._slide_file import SlideFile

SHAPE = (4, 256, 256, 3)


@pytest.mark.parametrize(("killed", "reason"), [(True, "crashed"), (False, "timeout")])
def test_a_decoder_that_stops_within_a_batch_ends_the_wait(
    monkeypatch: pytest.MonkeyPatch, killed: bool, reason: str
) -> None:
    monkeypatch.setattr(reading, "HANG_S", 60.0 if killed else 0.5)
    reader = reading._SlideReader(reading.pageable)
    child = reader.child
    ours, theirs = multiprocessing.Pipe()
    theirs.send((range(SHAPE[0]), SHAPE))
    os.write(theirs.fileno(), (SHAPE[0] * SHAPE[1] * SHAPE[2] * SHAPE[3]).to_bytes(4, "big") + bytes(1000))

    def end_of_process() -> None:
        child.process.join()
        theirs.close()  # as the system does with the pipe of a process that is gone

    watcher = threading.Thread(target=end_of_process)
    watcher.start()
    if killed:
        child.process.kill()
    asked, child.connection = child.connection, _Deaf(ours)  # open: a process that nobody asks any more ends by itself
    request = reading.ReadRequest(SlideFile(Path("x.tiff"), "x"), Path("x.h5"), 4)
    with pytest.raises(CorruptSlideError) as caught:
        list(reader.read(request, threading.Event()))
    watcher.join()
    asked.close()
    ours.close()
    assert caught.value.code == reason


class _Deaf:
    """A connection that receives only: what would be asked of the process is in the pipe already."""

    def __init__(self, connection):
        self.poll, self.recv, self.recv_bytes_into = connection.poll, connection.recv, connection.recv_bytes_into

    def send(self, request):
        pass
