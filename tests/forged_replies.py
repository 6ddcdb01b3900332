"""A server of three clients with a tiny adapter, and replies that any site could send it.

Nothing is trained: an honest reply is drawn from (client, round), so that rounds take milliseconds.
"""

import contextlib
import itertools
import json
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from flwr.app import Array, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedsafe_jax.config import default_config
from fedsafe_jax.federated import aggregation, algorithms, simulation
from fedsafe_jax.federated.client import LocalTraining
from fedsafe_jax.federated.mesh import make_mesh
from fedsafe_jax.federated.round_programs import RoundSpec, make_round
from fedsafe_jax.flower import mail, server, wire
from fedsafe_jax.flower.site import base_fingerprint

CLIENTS, STEPS, FORGER = 3, 2, 1
NAME = "update.q_proj.a"
rng = np.random.default_rng(0)
FACTORS = {
    "q_proj": {
        "a": rng.standard_normal((2, 3, 2)).astype(np.float32),
        "b": rng.standard_normal((2, 2, 3)).astype(np.float32),
    }
}


@contextlib.contextmanager
def flower_process():
    """Gives this process the ids that Flower gives its processes."""
    from flwr.supercore.task_identity import TaskIdentity

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_run_id", "_node_id", "_task_id"):
            patch.setattr(TaskIdentity, name, 1)
        patch.setattr(mail, "SLICE", 0.01)
        yield


class Clock:
    """All of `time` that a federation may use: no wall clock, which can jump."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        assert seconds >= 0
        self.now += max(seconds, 1e-3)


class ScriptedGrid:
    """Flower's grid without a network; node 100 + i is client i.

    Args:
      answers: `question -> messages that the node sends to it` by node, [] for a silent one; or an
        exception, which looking for the answer then raises.
      delays: seconds by node until its answers are there; they need a clock.
    """

    def __init__(self, answers, delays=(), clock=None):
        self.answers, self.delays, self.clock = answers, dict(delays), clock or Clock()
        self.box, self.asked, self.ids = {}, [], itertools.count()

    def get_node_ids(self):
        return list(self.answers)

    def push_messages(self, messages):
        for message in messages:
            message.metadata.__dict__["_message_id"] = question = f"question {next(self.ids)}"
            node = message.metadata.dst_node_id
            self.asked.append((self.clock.now, node, message.metadata.message_type))
            ready = self.clock.now + self.delays.get(node, 0.0)
            self.box[question] = ready, self.answers[node](message)
            yield question

    def pull_messages(self, questions):
        for question in questions:
            ready, sent = self.box.get(question, (0.0, []))
            if self.clock.now < ready:
                continue
            self.box[question] = ready, []
            if isinstance(sent, Exception):
                raise sent
            yield from sent


def description(client, **changes):
    """What `Site.describe` says."""
    counts = {"kept": 10, "dropped": 2, "rewritten": 0, "masked": 0, "weighted": 0}
    data = {"dropped_near_evaluation": 1, "dropped_heldout": 0}
    return {
        "client": client, "examples": 10, "learned": 10.0, "filter": counts, "data": data,
        "base": base_fingerprint("package:model"),
    } | changes  # fmt: skip


def described(client, **changes):
    text = json.dumps(description(client, **changes))
    return RecordDict({"site": ConfigRecord({"json": text})})


def update(client, t=0, control=False, length=0.1):
    """What a site sends after its steps of round `t`."""
    draws = np.random.default_rng([client, t])

    def like_factors():
        return jax.tree.map(
            lambda x: (length * draws.standard_normal(x.shape)).astype(np.float32), FACTORS
        )

    losses = draws.random(STEPS).astype(np.float32)
    tree = {"update": like_factors(), "losses": losses, "active": np.ones(STEPS, np.float32)}
    tree["control"] = like_factors() if control else ()
    numbers = MetricRecord({"useful_tokens": 40 + client, "finite": 1})
    return RecordDict({"update": wire.arrays(tree), "numbers": numbers})


def honest(client, control=False):
    """A node that answers every question as client `client` does."""

    def answers(message):
        if message.metadata.message_type == "query":
            return [Message(described(client), reply_to=message)]
        t = message.content.config_records["question"]["round"]
        return [Message(update(client, t, control), reply_to=message)]

    return answers


def forger(forge, control=False, client=FORGER, kind="train"):
    """A node that is honest but for `forge(content) -> content, Error, Exception or None`."""

    def answers(message):
        (reply,) = honest(client, control)(message)
        if message.metadata.message_type != kind:
            return [reply]
        forged = forge(reply.content)
        if isinstance(forged, Exception):
            return forged
        if isinstance(forged, Error):
            return [Message(forged, reply_to=message)]
        return [] if forged is None else [Message(forged, reply_to=message)]

    return answers


class Log:
    """The part of `Progress` that a federation uses, which keeps its lines."""

    def __init__(self):
        self.warnings, self.notes = [], []

    def warn(self, text):
        self.warnings.append(text)

    def note(self, text):
        self.notes.append(text)


def federation_config(**federated):
    c = default_config()
    c.num_clients = c.clients_per_round = CLIENTS
    c.local_steps, c.batch_size, c.seq_len = STEPS, 4, 16
    c.federated.weighting, c.federated.min_answers = "uniform", 2
    c.federated.update(federated)
    return c


def programs(algorithm="fedavg", aggregator="mean", clip_norm=0.0, min_answers=2):
    """The server's part of a round's programs."""
    training = LocalTraining(lambda *args: 0.0, optax.sgd(1.0))
    made = algorithms.make(algorithm, training, CLIENTS)
    spec = RoundSpec(
        made,
        aggregation.make(aggregator, byzantine=1),
        clip_norm=clip_norm,
        min_answers=min_answers,
    )
    return make_round(spec, make_mesh(jax.devices()[:1], 1))


class Server:
    """Sites of a grid that train round after round.

    `compiled` comes from `programs`, and is shared by servers of one kind.
    """

    def __init__(
        self, grid, workdir, compiled, algorithm="fedavg", round_s=0.05, wait_s=0.05, given=(),
        config=None,
    ):  # fmt: skip
        self.log, self.compiled, self.algorithm = Log(), compiled, algorithm
        self.sites = server.Sites(
            grid, config or federation_config(), dict(given), wait_s=wait_s, round_s=round_s
        )
        self.state = simulation.initial_state(compiled, FACTORS, CLIENTS)
        self.sites.clients(self.sites.config, None, seed=0, workdir=workdir, progress=self.log)

    def round(self, t=0):
        """Returns the row of metrics of a round."""
        run = SimpleNamespace(
            planned=SimpleNamespace(algorithm=self.algorithm), seed=0, programs=self.compiled,
            secret=None, progress=self.log, update_writer=lambda state, t: None,
        )  # fmt: skip
        self.state, row = self.sites.train(run, self.state, None, t)
        return row

    @property
    def adapter(self):
        return jax.device_get(self.state.server)


def nodes(**others):
    """Honest nodes 100, 101 and 102; `n101=...` replaces one."""
    answers = {100 + i: honest(i) for i in range(CLIENTS)}
    return answers | {int(name[1:]): answer for name, answer in others.items()}


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def assert_lines(lines, names):
    """Every line is printable and short, and says who is meant."""
    assert lines
    for line in lines:
        assert line.isprintable() and len(f"WARNING: {line}") <= 200, line
        assert any(name in line for name in names), line


def with_array(content, name=NAME, **changes):
    """The content with one array's claims or bytes changed."""
    old = content["update"][name]
    fields = {k: getattr(old, k) for k in ("dtype", "shape", "stype", "data")} | changes
    content["update"][name] = Array(**fields)
    return content


def with_number(content, name, value):
    content["numbers"][name] = value
    return content
