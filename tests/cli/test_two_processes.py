"""Commands of one host, started on two."""

import os
import socket
import subprocess
import sys


def on_two_hosts(*arguments):
    """What each of two processes returns, prints, and says on stderr."""
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
    assert all(code == 0 for _, _, code in outcomes), outcomes
    return outcomes


def test_the_first_of_two_hosts_evaluates(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Who are you?"}\n')
    first, second = on_two_hosts(
        "evaluate", f"--prompts={tmp_path / 'prompts.jsonl'}", "--max_new_tokens=4",
        f"--output={tmp_path / 'out.json'}",
    )  # fmt: skip
    assert "Who are you?" in first[0] and (tmp_path / "out.json").is_file()
    assert second[0] == "" and "devices:" not in second[1]
