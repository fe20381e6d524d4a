"""Child processes and signals: how work is handed to another process, how long it may take, and what ends a run.

A decoder that crashes or hangs takes its process with it, so what may crash or hang runs in a `Child`. A signal sets a
flag; loops ask `require_running` and end in an orderly way. Nothing is raised inside a signal handler, where Python may
be anywhere, even in a callback that swallows every exception. A run that does not end within `GRACE_S` is ended hard,
which is safe because files are whole or not there.
"""

import atexit
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from types import FrameType, ModuleType
from typing import Any, TypeVar

from eosin.errors import EosinError, MissingPackageError, WorkerError

POLL_S = 0.2
GRACE_S = 10.0
IMPATIENT_S = 1.0
JOIN_S = 10.0
START_S = 300.0
WHOLE_S = 60.0  # a message that has begun is whole by then, however long its beginning may take
STOPPING = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)}

T = TypeVar("T")

_children: "weakref.WeakSet[Child]" = weakref.WeakSet()
_requested: list[signal.Signals] = []


class Stopped(BaseException):
    """A signal asked the run to end; like KeyboardInterrupt, no ``except Exception`` may swallow it.

    Parameters
    ----------
    number : signal.Signals
        Which one.
    """

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


def stop_requested() -> bool:
    """Return whether a signal asked this process to end."""
    return bool(_requested)


def require_running() -> None:
    """Raise `Stopped` in the main thread when a signal asked this process to end; loops call it."""
    if _requested and threading.current_thread() is threading.main_thread():
        raise Stopped(_requested[0])


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP ask for the end of the block instead of striking in the midst of it.

    A thread hears of the signal even while this one is inside a library that does not return to Python. It ends the
    process hard when the block goes on for `GRACE_S` seconds, or when a second signal comes.
    """
    if threading.current_thread() is not threading.main_thread():  # Python gives signals to the main thread alone
        yield
        return
    heard, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    ignored = (signal.SIG_IGN, None)  # as under nohup
    before = {one: signal.signal(one, _request) for one in STOPPING if signal.getsignal(one) not in ignored}
    descriptor = signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(heard,), name="eosin-signals", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in before.items():
            signal.signal(number, handler)
        wakeup.send(b"\0")
        watcher.join()
        heard.close()
        wakeup.close()
        _requested.clear()


def _request(number: int, _frame: FrameType | None) -> None:
    _requested.append(signal.Signals(number))


def _watch(heard: socket.socket) -> None:
    """Read the numbers of signals as they come, until a zero; end the process when patience ends."""
    asked_at: float | None = None
    while True:
        patience = None if asked_at is None else max(0.0, asked_at + GRACE_S - time.monotonic())
        number = heard.recv(1)[0] if select.select([heard], [], [], patience)[0] else None
        if number == 0:
            return
        if asked_at is None and number is not None and number in STOPPING:
            asked_at = time.monotonic()
            _request(number, None)
        elif asked_at is not None and (number is None or time.monotonic() - asked_at > IMPATIENT_S):
            end_hard(_requested[0])


def end_hard(number: signal.Signals) -> None:
    """End this process and its children at once, with the exit code of a signal."""
    for child in list(_children):
        child.process.kill()
    with suppress(OSError):  # whoever read it may be gone, and the process must end all the same
        os.write(2, f"error: stopped by {number.name}; finished results are kept\n".encode())
    os._exit(128 + number)


class Child:
    """A spawned process at the other end of a pipe; it ends with this process, however that ends.

    Parameters
    ----------
    serve : callable
        Runs in the process: gets its end of the pipe and `args`, and ends when the pipe does.
    *args
        Are pickled.
    has_children : bool
        Whether the process starts processes of its own.
    needs_script : bool
        Whether it may be given functions of the script that runs here. Python runs the script again in the process
        then, and one that does not guard its work with ``if __name__ == "__main__"`` ends in an error.
    """

    def __init__(
        self, serve: Callable[..., None], *args: Any, has_children: bool = False, needs_script: bool = True
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_run, args=(serve, theirs, args), daemon=not has_children)
        with _signals_blocked(), nullcontext() if needs_script else _script_hidden():
            self.process.start()
        theirs.close()
        _children.add(self)

    def send(self, message: object) -> None:
        """Send a message; that a process is dead is found by the next `receive`."""
        with suppress(OSError):
            self.connection.send(message)

    def receive(self, timeout_s: float | None = None, *, is_needed: Callable[[], bool] | None = None) -> Any:
        """Return the next message; an `EosinError` that was sent is raised.

        Parameters
        ----------
        timeout_s : float, optional
            How long to wait for its beginning; the rest must come within `WHOLE_S` seconds.
        is_needed : callable, optional
            Asked while nothing comes; None is returned once it says no.

        Raises
        ------
        WorkerError
            With code ``crashed`` when the process died, ``timeout`` when the message did not come in time; a process
            that stops in the midst of one is killed.
        """
        end = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            while not self.connection.poll(POLL_S if end is None else min(POLL_S, max(0.0, end - time.monotonic()))):
                require_running()
                if is_needed is not None and not is_needed():
                    return None
                if end is not None and time.monotonic() >= end:
                    raise WorkerError(f"gave no answer for {timeout_s:g} s", code="timeout")
        except (EOFError, OSError):
            raise self._dead() from None
        with self._whole_within(WHOLE_S):
            message = self.connection.recv()
        if isinstance(message, EosinError):
            raise message
        return message

    def receive_into(self, memory: memoryview, timeout_s: float) -> None:
        """Receive bytes of ``send_bytes`` in memory of their size.

        Raises
        ------
        WorkerError
            As `receive`; a process that stops in the midst of them is killed, which ends the wait.
        """
        with self._whole_within(timeout_s):
            self.connection.recv_bytes_into(memory)

    @contextmanager
    def _whole_within(self, timeout_s: float) -> Iterator[None]:
        """Kill the process when the block, which waits for it inside the system, goes on for too long."""
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self.process.kill()

        watch = threading.Timer(timeout_s, give_up)
        watch.daemon = True
        watch.start()
        try:
            yield
        except (EOFError, OSError):
            if late.is_set():
                raise WorkerError(f"gave no answer for {timeout_s:g} s", code="timeout") from None
            raise self._dead() from None
        finally:
            watch.cancel()

    def _dead(self) -> WorkerError:
        return WorkerError(f"died ({self.cause_of_death()})")

    def cause_of_death(self) -> str:
        """Return the signal or the exit code that ended the process."""
        self.process.join(timeout=JOIN_S)
        code = self.process.exitcode
        return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"

    def stop(self) -> None:
        """Kill the process, if it lives, and close the pipe."""
        self.process.kill()
        self.process.join()
        self.connection.close()
        _children.discard(self)


@contextmanager
def _script_hidden() -> Iterator[None]:
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block the signals that end a run: a process started meanwhile never gets them, and its parent decides for it.

    A signal to the whole group, as a batch system or a terminal sends it, would otherwise make a failed slide of the
    one that each child has.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # the first process of all starts it, and unblocks signals while it does
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run(serve: Callable[..., None], connection: "Connection[Any, Any]", args: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        serve(connection, *args)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def wait_for(children: Sequence[Child], timeout_s: float | None = None) -> list[Child]:
    """Return the children that have sent something or died; none when nothing happens in time.

    Raises
    ------
    Stopped
        When a signal asked this process to end.
    """
    end = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        require_running()
        patience = POLL_S if end is None else min(POLL_S, max(0.0, end - time.monotonic()))
        ready = wait([child.connection for child in children], timeout=patience)
        if ready or (end is not None and time.monotonic() >= end):
            return [child for child in children if child.connection in ready]


class Helper:
    """A process that answers calls one after another, for what may hang, crash or ask for any amount of memory.

    It starts with the first call and ends with this process; a new one takes over from one that hung or died.
    """

    def __init__(self) -> None:
        self._child: Child | None = None
        self._owner = 0

    def call(self, function: Callable[..., T], *args: Any, timeout_s: float) -> T:
        """Call a function of a module; arguments, what it returns and errors as of `call_apart`."""
        if self._owner != os.getpid():  # a fork has the pipe, too, but an answer can be read only once
            self._child, self._owner = None, os.getpid()
        if self._child is None:
            self._child = Child(serve_calls, needs_script=False)
            atexit.register(self.stop)  # Python would ask it to end by a signal that children do not hear, and wait
        self._child.send((function, args))
        answered = False
        try:
            result: T = self._child.receive(timeout_s)
            answered = True
        except EosinError as error:
            answered = not isinstance(error, WorkerError)
            raise
        finally:
            if not answered:  # also when this process is asked to end: a late answer is not that of the next call
                self.stop()
        return result

    def stop(self) -> None:
        """End the process."""
        atexit.unregister(self.stop)
        if self._child is not None:
            self._child.stop()
            self._child = None


def call_apart(function: Callable[..., T], *args: Any, timeout_s: float, most_bytes: int | None = None) -> T:
    """Call a function in a process of its own, for what may hang, crash or ask for any amount of memory.

    Parameters
    ----------
    function : callable
        Of a module, as it is pickled; so are `args` and what it returns.
    *args
    timeout_s : float
        Wall-clock seconds from the moment at which the process is ready, however long a busy machine needs for that.
    most_bytes : int, optional
        Address space that the function may take beyond what its process has when it begins.

    Raises
    ------
    EosinError
        What the function raises.
    WorkerError
        With code ``crashed``, ``timeout``, ``out-of-memory``, or ``internal`` for any other exception.
    """
    child = Child(serve_calls, most_bytes, needs_script=False)
    try:
        child.send((int, ()))
        child.receive(START_S)
        child.send((function, args))
        result: T = child.receive(timeout_s)
        return result
    finally:
        child.stop()


def serve_calls(connection: "Connection[Any, Any]", most_bytes: int | None = None) -> None:
    """Answer each ``(function, args)`` that comes with its result or an `EosinError`; what a `Child` may serve."""
    while True:
        function, args = connection.recv()
        if most_bytes is not None:
            limit_memory(most_bytes)
        try:
            answer = function(*args)
        except EosinError as error:
            answer = error
        except ImportError as error:
            answer = MissingPackageError(error)
        except MemoryError:
            answer = WorkerError("needs more memory than it may use", code="out-of-memory")
        except Exception as error:  # noqa: BLE001 - whatever it is must reach the parent
            answer = WorkerError(f"{type(error).__name__}: {error}", code="internal")
        connection.send(answer)


def limit_memory(most_bytes: int) -> None:
    """Let this process take so many bytes of address space more; where the system has no limits nothing happens."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - nothing of a user's
            taken = int(file.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (taken + most_bytes, hard))
