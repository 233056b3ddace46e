"""Ctrl-C: commands keep their results and end soon."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

GRACE = 1.5  # seconds a command has to end by itself
INTERRUPTED = 130  # exit code, as shells have it: 128 + SIGINT

_asked: list[int] | None = None  # the list of the outermost `postponed`
_patient: list[int] | None = None  # the same list, if that `postponed` is patient


@contextlib.contextmanager
def postponed(*numbers: int, patient: bool = False, says: str = "") -> Iterator[list[int]]:
    """Yields a list that receives signals; the first signal has no other effect.

    A second signal has its usual effect. Inside another `postponed` the outer list is yielded.
    The list stays empty outside the main thread, where Python allows no handlers, and for
    ignored signals, as in a shell's background job.

    Args:
      numbers: signal numbers; SIGINT by default.
      patient: `bounded` does not end the process meanwhile, as the body may take long (saving).
      says: message printed to standard error when the signal arrives.
    """
    global _asked, _patient
    if threading.current_thread() is not threading.main_thread() or _asked is not None:
        yield [] if _asked is None else _asked
        return
    received: list[int] = []

    def restore():
        for number, handler in previous.items():
            signal.signal(number, handler)

    def receive(number, _):
        received.append(number)
        if says:
            os.write(2, f"\n{says}\n".encode())
        restore()

    previous = {number: signal.getsignal(number) for number in numbers or (signal.SIGINT,)}
    previous = {n: h for n, h in previous.items() if h not in (signal.SIG_IGN, None)}
    _asked, _patient = received, received if patient else None
    try:
        for number in previous:
            signal.signal(number, receive)
        yield received
    finally:
        restore()
        _asked = _patient = None


@contextlib.contextmanager
def bounded() -> Iterator[list[int]]:
    """Ends the process with code 130 if it still runs `GRACE` seconds after a Ctrl-C.

    Python sees a signal only when a compilation or device call returns, so a thread that the
    signal wakes does it. It does nothing during a patient `postponed` or a web server, which
    handle the signal themselves.

    Yields:
      A list that is filled when a Ctrl-C is raised, as a library may turn it into another
      error.
    """
    raised: list[int] = []
    default = signal.getsignal(signal.SIGINT)
    here = threading.current_thread() is threading.main_thread()
    if not here or default is not signal.default_int_handler:
        yield raised
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    ended = threading.Event()

    def interrupt(number, frame):
        raised.append(number)
        default(number, frame)

    def watch():
        spared = None  # the `postponed` that has had its first signal
        while number := os.read(read, 1):
            others = signal.getsignal(signal.SIGINT) is not interrupt and _asked is None
            if number[0] != signal.SIGINT or others:
                continue
            if _patient is not None and _patient is not spared:
                spared = _patient
            elif not ended.wait(GRACE):
                os.write(2, b"\ninterrupted\n")
                os._exit(INTERRUPTED)

    previous = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, interrupt)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield raised
    finally:
        signal.signal(signal.SIGINT, default)
        signal.set_wakeup_fd(previous)
        ended.set()
        os.close(write)  # ends the thread
        thread.join()
        os.close(read)
