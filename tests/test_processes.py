"""Children that die, hang or eat memory, and signals that end a run in an orderly way or hard."""

import os
import pickle
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from eosin import _processes as processes
from eosin._processes import (
    Child,
    Helper,
    Stopped,
    call_apart,
    require_running,
    serve_calls,
    stop_requested,
    stoppable,
    wait_for,
)
from eosin.errors import ConfigError, WorkerError


def double(number: int) -> int:
    return 2 * number


def refuse() -> None:
    raise ConfigError("no")


def divide() -> float:
    return 1 / 0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    os._exit(7)


def take(number_bytes: int) -> int:
    return len(bytearray(number_bytes))


def test_a_call_apart_gives_its_result_or_its_error() -> None:
    assert call_apart(double, 21, timeout_s=60) == 42
    with pytest.raises(ConfigError, match="no"):
        call_apart(refuse, timeout_s=60)


@pytest.mark.parametrize(
    ("function", "args", "options", "code", "message"),
    [
        (die, (), {}, "crashed", r"died \(SIGKILL\)"),
        (leave, (), {}, "crashed", r"died \(exit code 7\)"),
        (divide, (), {}, "internal", "ZeroDivisionError: division by zero"),
        (time.sleep, (60,), {"timeout_s": 0.1}, "timeout", "gave no answer for 0.1 s"),
        (take, (2**31,), {"most_bytes": 2**28}, "out-of-memory", "needs more memory"),
    ],
)
def test_what_a_call_apart_may_die_of(function: Any, args: Any, options: Any, code: str, message: str) -> None:
    with pytest.raises(WorkerError, match=message) as caught:
        call_apart(function, *args, **{"timeout_s": 60, **options})
    assert caught.value.code == code


def serve_bytes(connection: Connection, count: int) -> None:
    connection.recv()
    connection.send_bytes(bytes(range(count)))


def test_bytes_come_into_memory_that_is_there() -> None:
    child, memory = Child(serve_bytes, 5), bytearray(5)
    child.send("go")
    child.receive_into(memoryview(memory), timeout_s=60)
    child.stop()
    assert memory == bytes(range(5))


def serve_half_a_message(connection: Connection) -> None:
    connection.recv()
    whole = pickle.dumps("x" * 1000)
    os.write(connection.fileno(), struct.pack("!i", len(whole)) + whole[:500])
    os.kill(os.getpid(), signal.SIGSTOP)


def test_a_child_that_stops_in_the_midst_of_a_message_does_not_hold_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "WHOLE_S", 0.3)
    child = Child(serve_half_a_message)
    child.send("go")
    guard = threading.Timer(10, child.process.kill)  # so that this test fails and does not hang
    guard.start()
    with pytest.raises(WorkerError, match=r"gave no answer for 0.3 s") as caught:
        child.receive()
    guard.cancel()
    assert caught.value.code == "timeout"
    assert child.cause_of_death() == "SIGKILL"
    child.stop()


def test_a_child_that_is_not_needed_any_more_gives_nothing() -> None:
    child = Child(serve_calls)
    assert child.receive(is_needed=lambda: False) is None
    assert wait_for([child], timeout_s=0.0) == []
    child.send((double, (4,)))
    assert wait_for([child]) == [child]
    assert child.receive() == 8
    child.stop()
    child.send("to nobody")


def test_a_signal_to_the_whole_group_leaves_the_children_to_their_parent() -> None:
    child = Child(serve_calls)
    child.send((double, (1,)))
    assert child.receive(60) == 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(child.process.pid or 0, number)
    child.send((double, (2,)))
    assert child.receive(60) == 4
    child.stop()


def in_a_new_process(code: str, *, wait_for_line: bool = True) -> subprocess.Popen[str]:
    program = "from eosin._processes import *\nimport os, signal, sys, time\n" + textwrap.dedent(code)
    started = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    if wait_for_line:
        assert started.stdout is not None
        assert started.stdout.readline() == "ready\n"
    return started


def test_children_end_with_a_parent_that_was_killed() -> None:
    parent = in_a_new_process("""
        child = Child(serve_calls)
        child.send((os.getpid, ()))
        pid = child.receive(60)
        print("ready", pid, sep="\\n", flush=True)
        child.send((time.sleep, (100,)))
        time.sleep(100)
    """)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    end = time.monotonic() + 10
    while time.monotonic() < end and is_alive(pid):
        time.sleep(0.05)
    assert not is_alive(pid)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(") ", 1)[1][0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_a_flag_that_loops_ask_for(number: signal.Signals) -> None:
    def run() -> None:
        assert not stop_requested()
        require_running()
        os.kill(os.getpid(), number)
        while not stop_requested():
            time.sleep(0.001)
        require_running()

    before = signal.getsignal(number)
    with pytest.raises(Stopped) as caught, stoppable():
        run()
    assert caught.value.number == number
    assert not stop_requested()
    assert signal.getsignal(number) == before


def test_nothing_is_raised_where_it_would_be_swallowed() -> None:
    """An exception raised by the handler inside a weak reference's callback would be printed and lost."""

    class Thing:
        pass

    def strike(_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            pass

    def run() -> None:
        thing = Thing()
        reference = weakref.ref(thing, strike)
        del thing
        assert reference() is None
        while True:
            require_running()

    with pytest.raises(Stopped), stoppable():
        run()


def test_a_run_that_does_not_ask_is_ended_hard() -> None:
    stubborn = in_a_new_process("""
        import eosin._processes
        eosin._processes.GRACE_S = 0.3
        with stoppable():
            child = Child(serve_calls)
            print("ready", flush=True)
            while True:
                time.sleep(0.01)
    """)
    stubborn.send_signal(signal.SIGTERM)
    _, err = stubborn.communicate(timeout=20)
    assert stubborn.returncode == 128 + signal.SIGTERM
    assert err == "error: stopped by SIGTERM; finished results are kept\n"


def test_a_second_signal_ends_at_once() -> None:
    stubborn = in_a_new_process("""
        import eosin._processes
        eosin._processes.IMPATIENT_S = 0.2
        with stoppable():
            print("ready", flush=True)
            time.sleep(100)
    """)
    stubborn.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert stubborn.poll() is None
    stubborn.send_signal(signal.SIGINT)
    stubborn.communicate(timeout=5)
    assert stubborn.returncode == 128 + signal.SIGINT


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    nohup = in_a_new_process("""
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with stoppable():
            print("ready", flush=True)
            time.sleep(0.5)
            require_running()
    """)
    nohup.send_signal(signal.SIGHUP)
    nohup.communicate(timeout=20)
    assert nohup.returncode == 0


def test_a_fork_of_this_process_has_a_helper_of_its_own() -> None:
    helper = Helper()
    mine = helper.call(os.getpid, timeout_s=60)
    read, write = os.pipe()
    fork = os.fork()
    if not fork:
        os.write(write, str(helper.call(os.getpid, timeout_s=60)).encode())
        helper.stop()
        os._exit(0)
    os.waitpid(fork, 0)
    assert int(os.read(read, 20)) != mine
    assert helper.call(os.getpid, timeout_s=60) == mine
    helper.stop()
    os.close(read)
    os.close(write)
