"""Signals that end a run: SIGTERM on a preempted machine, SIGINT from Ctrl-C."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

AGAIN_S = 0.1  # after which a signal that was lost is sent again


class Preempted(BaseException):
    """The run was told to end; raised between two steps of Python, never inside `hold`.

    A BaseException, so that no `except Exception` of a library swallows it.

    Args:
      signum: number of the signal.
    """

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class _Signals:
    def __init__(self):
        self.held, self.pending = 0, None
        self.former_hook = sys.unraisablehook

    def handle(self, signum, frame):
        del frame
        if self.held:
            self.pending = signum
        else:
            raise Preempted(signum)

    def unraisable(self, lost):
        """Sends a signal again that came while Python ran a `__del__`, which drops exceptions."""
        if isinstance(lost.exc_value, Preempted):
            again = threading.Timer(AGAIN_S, os.kill, (os.getpid(), lost.exc_value.signum))
            again.daemon = True
            again.start()
        else:
            self.former_hook(lost)


_signals = _Signals()


def listen() -> None:
    """Turns SIGTERM and SIGINT into `Preempted` from now on; for the main thread only.

    With several processes jax handles SIGTERM: all processes must end after the same round, see
    `reached`.
    """
    if jax.process_count() == 1:
        signal.signal(signal.SIGTERM, _signals.handle)
    signal.signal(signal.SIGINT, _signals.handle)
    if sys.unraisablehook != _signals.unraisable:
        _signals.former_hook, sys.unraisablehook = sys.unraisablehook, _signals.unraisable


def reached(step: int) -> None:
    """Raises `Preempted` in all processes at the same step, after any of them got a SIGTERM.

    Args:
      step: number that rises with every call, the same in all processes.
    """
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
        raise Preempted(signal.SIGTERM)


@contextlib.contextmanager
def hold() -> Iterator[None]:
    """Defers signals until the block is done, such as while a round is recorded."""
    _signals.held += 1
    try:
        yield
    finally:
        _signals.held -= 1
    if not _signals.held and _signals.pending is not None:
        signum, _signals.pending = _signals.pending, None
        raise Preempted(signum)
