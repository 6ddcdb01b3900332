"""Commands of one host, started on two."""

import os
import socket
import subprocess
import sys

import pytest
from etils import epath

from fedsafe_jax.runtime.owner import owned


def on_two_hosts(*arguments, ends=(0, 0)):
    """What each of two processes prints, says on stderr, and returns, which is `ends`."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = []
    for i in range(2):
        environment = os.environ | {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(i), "XLA_FLAGS": "",
        }  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "fedsafe_jax", *arguments], env=environment,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    outcomes = [(*process.communicate(timeout=300), process.returncode) for process in processes]
    assert tuple(code for _, _, code in outcomes) == ends, outcomes
    return outcomes


def test_the_first_of_two_hosts_evaluates(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Who are you?"}\n')
    first, second = on_two_hosts(
        "evaluate", f"--prompts={tmp_path / 'prompts.jsonl'}", "--max_new_tokens=4",
        f"--output={tmp_path / 'out.json'}",
    )  # fmt: skip
    assert "Who are you?" in first[0] and (tmp_path / "out.json").is_file()
    assert second[0] == "" and "devices:" not in second[1]


@pytest.mark.slow
def test_two_hosts_have_a_workdir_together_and_are_refused_together(tmp_path):
    command = (
        "run", "--config=configs/demo.py", f"--workdir={tmp_path}", "--config.arms=('base',)",
        "--config.eval.tasks=('utility',)", "--config.eval.max_heldout=4",
        "--config.seeds=(0,)",
    )  # fmt: skip
    (first, _, _), (second, _, _) = on_two_hosts(*command)
    assert "report: " in first and "report: " not in second
    assert (tmp_path / "report.html").is_file() and (tmp_path / "inputs.json").is_file()
    assert not (tmp_path / "owner.json").exists()
    with owned(epath.Path(tmp_path)):
        (_, first, _), (_, second, _) = on_two_hosts(*command, ends=(1, 1))
    assert f"error: --workdir={tmp_path} is in use by process {os.getpid()} on" in first
    assert "error: the first process has stopped; it says why." in second
    assert "Traceback" not in first + second
