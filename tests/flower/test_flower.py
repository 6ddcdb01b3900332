"""A federation of three sites is the simulation of three clients, with and without a network.

The other files of this folder run parts of the same federation, on the grid defined here.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from commands import QUICK, rows
from safetensors.numpy import load_file

pytest.importorskip("flwr")

from flwr.app import Context, RecordDict  # noqa: E402

from fedsafe_jax import experiment  # noqa: E402
from fedsafe_jax.flower import client, server  # noqa: E402
from fedsafe_jax.pipeline import filtering  # noqa: E402
from fedsafe_jax.pipeline.clients import Clients, encode  # noqa: E402
from fedsafe_jax.pipeline.filtering import apply_action  # noqa: E402
from fedsafe_jax.pipeline.inputs import load_inputs  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]
DEMO = ROOT / "fedsafe_jax/assets/demo"
PROGRAMS = pathlib.Path(sys.executable).parent
OVERRIDES = (
    "rounds=2 local_steps=3 batch_size=4 seq_len=64 filter.kind=simulated eval.max_prompts=4 "
    "eval.max_heldout=4 eval.max_new_tokens=4 eval.batch_size=4 cai.red_team_prompts=2 "
    "cai.benign_prompts=1 cai.steps=2 cai.batch_size=2 cai.pairs_per_step=1 "
    "cai.replay_examples=4 cai.max_new_tokens=8 algorithms=('scaffold',) eval.tasks=('utility',)"
)


ASKED = "federated.attribution=2"


def run_config(workdir, *overrides):
    return {
        "config": "federation_config", "overrides": " ".join((OVERRIDES, *overrides)),
        "workdir": str(workdir), "wait-seconds": 2, "round-seconds": 60,
    }  # fmt: skip


def node_config(folder, i):
    return {
        "client": i, "sources": f"chat:site{i}.jsonl", "data-dir": str(folder),
        "workdir": str(folder / f"work{i}"),
    }  # fmt: skip


class LocalGrid:
    """Flower's grid without a network: nodes 100, 101, ... answer at once.

    `spoil(node, reply) -> reply` may change a node's reply; None stands for no reply.
    """

    def __init__(self, nodes, spoil=lambda node, reply: reply):
        self.nodes, self.spoil = {100 + i: n for i, n in enumerate(nodes)}, spoil
        self.replies, self.asked = {}, 0

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        for message in messages:
            assert message.metadata.ttl > 0
            self.asked += 1
            message.metadata.__dict__["_message_id"] = question = f"question {self.asked}"
            node = message.metadata.dst_node_id
            context = Context(1, node, self.nodes[node], RecordDict(), {})
            self.replies[question] = self.spoil(node, client.app(message, context))
            yield question

    def pull_messages(self, message_ids):
        replies = [self.replies.pop(question, None) for question in message_ids]
        return [reply for reply in replies if reply is not None]


def exported(workdir):
    return load_file(workdir / "export/adapter/adapter_model.safetensors")


@pytest.fixture(scope="module")
def simulated(folder, tmp_path_factory):
    """Workdir of the simulation of the same clients: their pairs and verdicts are given."""
    workdir = tmp_path_factory.mktemp("simulated")
    config = server.read_config(run_config(workdir, ASKED))

    def members(config, inputs, seed, workdir, progress):
        del progress
        filtered = []
        for i in range(3):
            config.safe_sources, config.data_dir = (f"chat:site{i}.jsonl",), str(folder)
            pairs = load_inputs(config, ("site",)).site
            scored = filtering.score_pairs(config, inputs, pairs, seed, workdir)
            filtered += apply_action(config, inputs, [pairs], scored, seed)
        encoded = [
            encode(inputs.lm.tokenizer, f.examples, config.seq_len, f.weights)[0] for f in filtered
        ]
        return Clients(None, encoded, [f.counts for f in filtered])

    inputs = load_inputs(config, ("red_team", "replay"))
    federation = experiment.SIMULATED._replace(clients=members)
    experiment.run(config, str(workdir), inputs, federation)
    return workdir


@pytest.fixture(scope="module")
def federated(folder, tmp_path_factory):
    """Workdir of the server of a federation without a network."""
    workdir = tmp_path_factory.mktemp("federated")
    nodes = [node_config(folder, i) for i in (2, 0, 1)]
    server.run(LocalGrid(nodes), run_config(workdir, ASKED))
    return workdir


def assert_same_run(workdir, wanted):
    """Adapters and figures. Sums in another order leave 1e-5 of a tensor's length; Adam's first
    steps take the sign of a gradient, so that a single number may also go the other way."""
    tensors = exported(workdir)
    assert tensors.keys() == exported(wanted).keys()
    for name, x in exported(wanted).items():
        assert np.linalg.norm(tensors[name] - x) <= 1e-3 * np.linalg.norm(x), name
        assert "lora_B" not in name or np.abs(x).max() > 1e-3
    for mine, theirs in zip(rows(workdir), rows(wanted), strict=True):
        assert mine["useful_tokens"] == theirs["useful_tokens"] and mine["no_answer"] == []
        assert mine["filter"]["dropped"] == theirs["filter"]["dropped"] > 0
        np.testing.assert_allclose(mine["delta_norms"], theirs["delta_norms"], rtol=1e-3)
        np.testing.assert_allclose(mine["loss"], theirs["loss"], rtol=1e-3)
        ours, wished = (row.get("attribution") for row in (mine, theirs))
        if ours is not None:
            assert ours["clients"] == [0, 1, 2] and ours["filter"] == wished["filter"]
            np.testing.assert_allclose(ours["divergence"], wished["divergence"], rtol=2e-2)


def test_sites_give_the_adapter_of_the_simulation(simulated, federated):
    assert_same_run(federated, simulated)
    results = json.loads((federated / "results.json").read_text())
    assert results["arms"].keys() == {"base", "fl+filter+cai"}
    assert "fl+filter+cai" in (federated / "report.html").read_text()


@pytest.mark.slow
def test_a_federation_continues_with_the_state_that_its_sites_had(
    federated, folder, tmp_path, monkeypatch
):
    nodes = [node_config(folder, i) | {"workdir": str(tmp_path / f"work{i}")} for i in range(3)]
    save = experiment.checkpoint.RoundCheckpoints.save

    def killed(self, done, state):
        if done == 2:
            raise KeyboardInterrupt
        save(self, done, state)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(experiment.checkpoint.RoundCheckpoints, "save", killed)
        server.run(LocalGrid(nodes), run_config(tmp_path / "server"))
    client._site.cache_clear()  # the sites' processes are new as well
    server.run(LocalGrid(nodes), run_config(tmp_path / "server"))
    for name, x in exported(federated).items():
        np.testing.assert_array_equal(exported(tmp_path / "server")[name], x)


def free_ports(count):
    held = [socket.socket() for _ in range(count)]
    for each in held:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in held]
    for each in held:
        each.close()
    return ports


def wait_for(address, log, seconds=120):
    """Returns once `address` takes connections: `flwr run` does not try twice."""
    host, port = address.split(":")
    end = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((host, int(port)), timeout=5).close()
        except OSError:
            assert time.monotonic() < end, f"no SuperLink in {seconds} s:\n{log.read_text()}"
            time.sleep(0.2)


@contextlib.contextmanager
def superlink_and_nodes(folder, tmp_path, environment):
    """A SuperLink that answers and three SuperNodes on loopback; gives the address."""
    link, *ports = free_ports(4)
    address, started = f"127.0.0.1:{link}", []

    def start(name, *flags):
        log = (tmp_path / f"{name}{len(started)}.log").open("w")
        started.append(
            subprocess.Popen(
                [PROGRAMS / name, "--insecure", *flags],
                env=environment,
                cwd=tmp_path,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        )

    try:
        start("flower-superlink", "--port", str(link), "--disable-runtime-dependency-installation")
        for i, port in enumerate(ports):
            own = node_config(folder, i) | {"workdir": str(tmp_path / f"work{i}")}
            text = " ".join(f"{k}={json.dumps(v)}" for k, v in own.items())
            flags = ("--superlink", address, "--port", str(port), "--node-config", text)
            start("flower-supernode", *flags)
        wait_for(address, tmp_path / "flower-superlink0.log")
        yield address
    finally:
        for process in started:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
def test_a_superlink_and_three_supernodes_give_the_same(simulated, folder, tmp_path):
    environment = os.environ | {
        "XLA_FLAGS": QUICK, "FLWR_HOME": str(tmp_path / "flower"), "FLWR_TELEMETRY_ENABLED": "0",
        "PYTHONPATH": str(ROOT), "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
    }  # fmt: skip
    shutil.copytree(ROOT / "launch/flower", tmp_path / "app")
    with superlink_and_nodes(folder, tmp_path, environment) as address:
        (tmp_path / "flower").mkdir(exist_ok=True)
        connection = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{address}"\n'
        (tmp_path / "flower/config.toml").write_text(connection + "insecure = true\n")
        settings = run_config(tmp_path / "server") | {"wait-seconds": 300, "round-seconds": 300}
        text = " ".join(f"{k}={json.dumps(v)}" for k, v in settings.items())
        done = subprocess.run(
            ["flwr", "run", "app", "here", "--stream", "--run-config", text], cwd=tmp_path,
            env=environment, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
    logs = [path.read_text()[-2000:] for path in sorted(tmp_path.glob("*.log"))]
    assert (tmp_path / "server/results.json").is_file(), "\n".join(
        [done.stdout, done.stderr, *logs]
    )
    assert_same_run(tmp_path / "server", simulated)
