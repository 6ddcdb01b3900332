"""A run whose judge breaks down: what is known is kept, and no secret is written anywhere."""

import http.server
import json
import os
import subprocess
import sys
import threading

import pytest
from commands import ENVIRONMENT, ROOT

KEYS = {"OPENAI_API_KEY": "sk-planted-openai", "HF_TOKEN": "hf_planted_token"}
IN_URL = "planted-in-the-url"
QUESTIONS = [f"What is {n} and {n}?" for n in range(4)]
CONFIG = """
from fedsafe_jax.config import default_config

def get_config():
    c = default_config()
    c.arms, c.export_arm = ("base", "fl"), "fl"
    c.rounds = c.local_steps = 1
    c.num_clients = c.clients_per_round = c.batch_size = 2
    c.examples_per_client = 4
    c.data_dir = DATA
    c.eval.tasks = ("utility", "mt_bench=questions.jsonl")
    c.eval.max_heldout, c.eval.max_new_tokens = 4, 8
    c.eval.judge_concurrent = 1
    c.eval.judges = ("rules", "chat:judge@" + URL + "#mt_bench", "chat:judge@" + URL + "#compare")
    return c
"""


class Judge:
    """A judge that gives some good replies, and then repeats what it was sent, key and all."""

    def __init__(self, good: int):
        self.good, self.asked, self.wrong = good, [], []
        judge = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                key = self.headers["Authorization"]
                judge.asked.append(json.loads(body)["messages"][-1]["content"])
                good = len(judge.asked) <= judge.good
                reply = {"message": {"content": "[[C]] [[5]]"}} if good else {"error": key}
                content = json.dumps({"choices": [reply]} if good else reply).encode()
                self.send_response(200 if good else 401, "OK" if good else key)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture()
def judge():
    made = Judge(good=2)
    yield made
    made.server.shutdown()
    made.server.server_close()


def fedsafe(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fedsafe_jax", *arguments]
    environment = ENVIRONMENT | KEYS
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_judge_that_breaks_down_costs_no_answer_and_shows_no_key(judge, tmp_path):
    data, workdir, said = tmp_path / "data", tmp_path / "run", []
    data.mkdir()
    rows = "".join(json.dumps({"turns": [q]}) + "\n" for q in QUESTIONS)
    (data / "questions.jsonl").write_text(rows)
    config = tmp_path / "config.py"
    config.write_text(CONFIG.replace("DATA", repr(str(data))).replace("URL", repr(judge.url)))
    command = ("run", f"--config={config}", f"--workdir={workdir}")

    wrong = judge.url.replace("//", f"//user:{IN_URL}@"), f"{judge.url}?key={IN_URL}"
    for url in wrong:
        refused = fedsafe(*command, f"--config.eval.judges=('chat:m@{url}#mt_bench',)")
        said.append(refused)
        assert refused.returncode == 2 and "OPENAI_API_KEY" in refused.stderr
    asked = fedsafe("evaluate", "--tasks=advbench", f"--judges=chat:m@{wrong[0]}#mt_bench")
    said.append(asked)
    assert asked.returncode == 2 and "--judges: the judge's URL, of host" in asked.stderr
    assert not judge.asked and not workdir.exists()

    broken = fedsafe(*command)
    said.append(broken)
    assert broken.returncode == 1, broken.stderr[-2000:]
    line = f"error: judge at {judge.url}/chat/completions: HTTP 401; the key in OPENAI_API_KEY"
    assert line in broken.stderr and "Traceback" not in broken.stderr
    kept = (workdir / "evals" / "base_seed0" / "mt_bench.jsonl").read_text().splitlines()
    rated = [json.loads(line)["verdicts"][f"chat:judge@{judge.url}#mt_bench"] for line in kept]
    assert [verdict and verdict["score"] for verdict in rated] == [5, 5, None, None]

    judge.good, before = 10**6, len(judge.asked)
    done = fedsafe(*command)
    said.append(done)
    assert done.returncode == 0, done.stderr[-2000:]
    again = judge.asked[before:]
    assert QUESTIONS[2] in again[0] and QUESTIONS[3] in again[1]  # and none that had a reply
    results = json.loads((workdir / "results.json").read_text())
    assert results["arms"]["fl"]["mt_bench"]["rating"] == 5
    assert results["arms"]["fl"]["utility"]["win_rate"] == 50

    files = [p for p in workdir.rglob("*") if p.is_file() and "xla" not in str(p)]
    assert {"config.json", "report.html", "metrics.jsonl", "README.md"} <= {p.name for p in files}
    secrets = [*KEYS.values(), IN_URL]
    for path in files:
        content = path.read_bytes()
        assert not any(secret.encode() in content for secret in secrets), path
    for one in said:
        assert not any(secret in one.stdout + one.stderr for secret in secrets)
    assert not any(secret in os.fspath(p) for p in files for secret in secrets)
