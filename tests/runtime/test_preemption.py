"""Signals become `Preempted`, and wait while a round is recorded."""

import signal
import sys
import time

import pytest

from fedsafe_jax.runtime import preemption


@pytest.fixture
def listening():
    """Signals as in a run; those of the tests' process afterwards."""
    old = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), sys.unraisablehook
    preemption.listen()
    yield
    signal.signal(signal.SIGTERM, old[0])
    signal.signal(signal.SIGINT, old[1])
    sys.unraisablehook = old[2]


def test_signals_wait_while_a_round_is_recorded(listening):
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


def test_a_second_signal_waits_as_the_first_one(listening):
    steps = []
    with pytest.raises(preemption.Preempted, match="SIGINT"):
        with preemption.hold(), preemption.hold():
            signal.raise_signal(signal.SIGTERM)
            steps.append(1)
            signal.raise_signal(signal.SIGINT)
            steps.append(2)
    assert steps == [1, 2]
    with preemption.hold():  # the first one is not left over
        pass


class Dying:
    """Gets a signal while it is deleted, where Python drops every exception."""

    def __init__(self, signum):
        self.signum = signum

    def __del__(self):
        signal.raise_signal(self.signum)
        time.sleep(0)  # a step of Python, at which the handler runs


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("held", [False, True])
def test_a_signal_within_a_deletion_is_not_lost(listening, capfd, signum, held):
    with pytest.raises(preemption.Preempted, match=signum.name):
        if held:
            with preemption.hold():
                Dying(signum)
        else:
            Dying(signum)
        for _ in range(500):
            time.sleep(0.01)
        sys.exit("not reached")
    assert "Exception ignored" not in capfd.readouterr().err


def test_other_errors_of_a_deletion_are_said_as_before(listening, monkeypatch):
    class Wrong:
        def __del__(self):
            raise KeyError("other")

    said = []
    monkeypatch.setattr(preemption._signals, "former_hook", lambda lost: said.append(lost.exc_type))
    Wrong()
    assert said == [KeyError]
