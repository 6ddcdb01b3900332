"""One of several processes dies, or does not come: the others end in a stated time."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

WORKER = pathlib.Path(__file__).with_name("waiting_worker.py")


def outcomes(case):
    """`(code, output, seconds since the start)` of both processes."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes, started = [], time.monotonic()
    for i in range(2):
        environment = os.environ | {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(i), "XLA_FLAGS": "",
        }  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, WORKER, case], env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    done = [(p.communicate(timeout=120)[0], p.returncode) for p in processes]
    return [(code, output) for output, code in done], time.monotonic() - started


def test_the_others_of_a_killed_process_end():
    """Ten seconds here, and a hundred in a run, without a sign of life."""
    ((first, output), (second, _)), seconds = outcomes("killed")
    assert second == -signal.SIGKILL and "began" in output
    assert first not in (0, -signal.SIGKILL)
    assert "another task died" in output or "have ended" in output  # jax's words, or ours
    assert seconds < 100


def test_a_process_that_lives_and_does_not_come_is_waited_for_in_vain():
    ((first, output), (second, _)), _ = outcomes("absent")
    assert first == 1 and second != 0, output  # jax ends the second, as the first has ended
    [line] = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "waited at 'round' for processes that did not come within 3 s" in line
    assert "Start the same command again" in line
    assert 3 <= int(re.search(r"^(\d+) s$", output, re.MULTILINE)[1]) < 8
