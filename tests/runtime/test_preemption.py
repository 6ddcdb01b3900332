"""Signals become `Preempted`, and wait while a round is recorded."""

import signal
import sys
import time

import pytest

from fedsafe_jax.runtime import preemption


def test_signals_wait_while_a_round_is_recorded():
    old = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    preemption.listen()
    try:
        reached = False
        with pytest.raises(preemption.Preempted, match="SIGTERM"):
            with preemption.hold():
                signal.raise_signal(signal.SIGTERM)
                reached = True
            time.sleep(1)
            sys.exit("not reached")
        assert reached
        with pytest.raises(preemption.Preempted, match="SIGINT"):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, old[0])
        signal.signal(signal.SIGINT, old[1])
