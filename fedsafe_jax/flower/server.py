"""The server's side of the Flower app: `fedsafe_jax.flower.server:app`.

It runs what a simulation runs (rounds, Constitutional AI, evaluation, checkpoints, report), but the
clients train at their sites. `[tool.flwr.app.config]` in the app's pyproject.toml configures it.
"""

import ast
import importlib
import sys
import time

import jax
import ml_collections
import numpy as np
from etils import epath
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedsafe_jax import experiment
from fedsafe_jax.cai.revise import CHECKS
from fedsafe_jax.config import ConfigError
from fedsafe_jax.federated.simulation import FederatedState
from fedsafe_jax.filters.actions import FilterCounts
from fedsafe_jax.flower import wire
from fedsafe_jax.flower.received import BROKEN, ReceivedUpdates, read_description
from fedsafe_jax.flower.site import base_fingerprint
from fedsafe_jax.pipeline import rounds
from fedsafe_jax.pipeline.arms import arms_of
from fedsafe_jax.pipeline.clients import Clients
from fedsafe_jax.pipeline.inputs import RunInputs, load_inputs
from fedsafe_jax.runtime.libraries import prepare_libraries
from fedsafe_jax.runtime.progress import Progress
from fedsafe_jax.validation import input_errors, one_line, validate

app = ServerApp()


class SitesError(RuntimeError):
    """Too few sites take part."""


def read_config(run_config: dict) -> ml_collections.ConfigDict:
    """Builds the config of a run from Flower's run config.

    Args:
      run_config: `config` names a module of the app with a `get_config`; `overrides` sets fields of
        it, separated by spaces, such as `rounds=2 filter.action=mask algorithms=('scaffold',)`.

    Raises:
      ConfigError: a field is unknown or wrong, or has no meaning across sites.
    """
    config = importlib.import_module(run_config["config"]).get_config()
    for part in run_config["overrides"].split():
        name, _, text = part.partition("=")
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            value = text
        wire.set_field(config, name.removeprefix("config."), value)
    validate(config)
    for field in ("seeds", "algorithms"):
        if len(config[field]) != 1:
            raise ConfigError(f"{field}={tuple(config[field])}: a federation is one run; give one.")
    if sum(arm.trains for arm in arms_of(config)) != 1:
        raise ConfigError(f"arms={tuple(config.arms)}: a federation trains one arm beside base.")
    f = config.federated
    for field, value, reason in (
        ("federated.compression", f.compression, "adapters are sent whole"),
        ("federated.client_ranks", f.client_ranks, "all sites train lora_rank"),
        ("federated.dropout", f.dropout, "sites drop out by themselves"),
        ("attack.clients", config.attack.clients, "attacks are simulated only"),
        ("keep_updates", config.keep_updates, "they are kept in a simulation only"),
        ("cai.check", CHECKS[config.cai.check].judge, "the filter is at the sites"),
    ):
        if value:
            raise ConfigError(f"{field} is not for a federation of sites: {reason}.")
    if not config.heldout_sources:
        raise ConfigError("heldout_sources: the server has no client data to hold out; give some.")
    return config


class Sites:
    """The clients of a federation, behind Flower's grid.

    Args:
      grid: Flower's connection to the nodes.
      config: config of the run.
      wait_s: seconds to wait for all `num_clients` sites; after that `clients_per_round` suffice.
      round_s: seconds that a round waits for its sites.
    """

    def __init__(
        self, grid: Grid, config: ml_collections.ConfigDict, wait_s: float, round_s: float
    ):
        self.grid, self.config, self.wait_s, self.round_s = grid, config, wait_s, round_s
        self.nodes: dict[int, int] = {}
        self.sizes = [0.0] * config.num_clients  # what each site learns from
        self.pairs = 0
        self.counts: dict[int, FilterCounts] = {}

    def gather(self, progress: Progress) -> None:
        """Asks every node for its description, until all `num_clients` sites have answered.

        Args:
          progress: reports the sites that take part, and those left out.

        Raises:
          SitesError: fewer than `clients_per_round` can take part.
        """
        base, asked, until = base_fingerprint(self.config.model), set(), time.time() + self.wait_s
        while len(self.nodes) < self.config.num_clients and time.time() < until:
            new = [n for n in self.grid.get_node_ids() if n not in asked]
            asked.update(new)
            question = wire.config_record(self.config)
            for node, content in self._ask(new, "query", until - time.time(), question=question):
                self._admit(node, content, base, progress)
            if not new:
                time.sleep(1)
        if len(self.nodes) < self.config.clients_per_round:
            raise SitesError(
                f"{len(self.nodes)} of {self.config.num_clients} sites take part, a round needs "
                f"clients_per_round={self.config.clients_per_round}."
            )
        progress.note(f"{len(self.nodes)} sites, {self.pairs} pairs after filtering")

    def _admit(self, node: int, content: RecordDict | str, base: str, progress: Progress) -> None:
        """Takes a node in as the client that it says it is, or warns why it is left out."""
        if isinstance(content, str):
            progress.warn(f"node {node} is left out: {content}")
            return
        try:
            description = read_description(content)
        except BROKEN as error:
            progress.warn(f"node {node} is left out: its description cannot be read ({error!r}).")
            return
        client = description["client"]
        if not 0 <= client < self.config.num_clients:
            progress.warn(f"node {node} is left out: client {client} is not in this run.")
        elif description["base"] != base:
            progress.warn(
                f"client {client} is left out: its base model differs from the server's "
                f"{self.config.model}; config.json, tokenizer.json and weights must be the same "
                "files."
            )
        elif client in self.nodes:
            progress.warn(f"client {client} is there twice; node {node} is left out.")
        else:
            self.nodes[client], self.sizes[client] = node, description["learned"]
            self.pairs += description["examples"]
            self.counts[client] = description["counts"]
            near = description["near"]
            progress.note(
                f"client {client}: {description['examples']} pairs"
                + (f", {near} dropped, near evaluation prompts" if near else "")
                + ("" if description["learned"] else ", none of which it learns: it weighs 0")
            )

    def _ask(self, nodes, kind: str, timeout: float, question, arrays=None, each=None):
        """Asks nodes and waits for replies: `(node, content or the reason why none came)` of each.

        Args:
          nodes: node ids.
          kind: Flower's message type, "query" or "train".
          timeout: seconds to wait.
          question: record that every node gets.
          arrays: server's arrays for every node; None for none.
          each: fields of the question that differ, by node; None for none.
        """
        messages, timeout = [], max(timeout, 1.0)
        for i, node in enumerate(nodes):
            own = ConfigRecord(dict(question) | (each[i] if each else {}))
            content = RecordDict({"question": own} | ({"server": arrays} if arrays else {}))
            messages.append(Message(content, dst_node_id=node, message_type=kind, ttl=timeout))
        answers = dict.fromkeys(nodes, "no answer in time")
        if messages:
            for reply in self.grid.send_and_receive(messages, timeout=timeout):
                node = reply.metadata.src_node_id
                if reply.has_error():
                    answers[node] = reply.error.reason.strip().splitlines()[-1]
                elif "refused" in reply.content:
                    answers[node] = reply.content.config_records["refused"]["reason"]
                else:
                    answers[node] = reply.content
        return list(answers.items())

    def clients(
        self,
        config: ml_collections.ConfigDict,
        inputs: RunInputs,
        seed: int,
        workdir: epath.Path,
        progress: Progress,
    ) -> Clients:
        """Gathers the sites as clients of `experiment`: it gets counts, and never sees pairs."""
        del config, inputs, seed, workdir
        self.gather(progress)
        return Clients(plain=None, counts=self.counts)

    def train(
        self, arm_run: experiment.ArmRun, state: FederatedState, members: Clients, t: int
    ) -> tuple[FederatedState, dict]:
        """Has the sites train, and makes the server's step; see `experiment.Federation`.

        The figures of the round list under `no_answer` the clients without a usable answer.
        """
        del members
        config, seed, programs = self.config, arm_run.seed, arm_run.programs
        algorithm, secret = arm_run.planned.algorithm, arm_run.secret
        cohort = rounds.draw_cohort(config, algorithm, self.sizes, seed=seed, t=t, secret=secret)
        missing, useful = [], 0

        def train(server, base, inputs, rates):
            nonlocal useful
            del base
            size, ids = len(inputs.weights), np.asarray(inputs.batches)
            template = {"adapter": server.factors, "control": server.control}
            arrays = wire.arrays(jax.device_get(template))
            here = [i for i in range(size) if ids[i] >= 0]
            nodes = [self.nodes[int(ids[i])] for i in here]
            steps = dict(zip(cohort.ids.tolist(), cohort.steps.tolist(), strict=True))
            each = [{"round": t, "steps": steps[int(ids[i])]} for i in here]
            question = wire.config_record(config)
            answers = self._ask(
                nodes, "train", self.round_s, question=question, arrays=arrays, each=each
            )
            received = ReceivedUpdates(programs.spec, server, size, len(rates))
            for i, (_, content) in zip(here, answers, strict=True):
                reason = content
                if not isinstance(content, str):
                    try:
                        useful += received.add(i, content, float(inputs.weights[i]))
                        continue
                    except wire.WireError as error:
                        reason = str(error)
                    except BROKEN as error:
                        reason = f"its update cannot be read ({error!r})"
                missing.append(int(ids[i]))
                arm_run.progress.warn(f"round {t + 1}: client {int(ids[i])} is left out: {reason}")
            return received.sent, (), (), received.metrics

        def numbers(start, stop):
            ids = np.full(stop - start, -1, np.int32)
            some = cohort.ids[start:stop]
            ids[: len(some)] = some
            return ids

        remote = programs._replace(train=train)
        state, report = rounds.step(
            config,
            remote,
            state,
            base=None,
            packed=numbers,
            cohort=cohort,
            seed=seed,
            t=t,
            secret=secret,
        )
        row = rounds.figures(config, cohort, report, useful=useful, seed=seed, t=t)
        return state, row | {"no_answer": missing}


def run(grid: Grid, run_config: dict) -> dict:
    """Runs the whole federation; returns the content of `results.json`."""
    config = read_config(run_config)
    prepare_libraries(run_config["workdir"])
    inputs = load_inputs(config, ("red_team", "replay"))
    sites = Sites(grid, config, run_config["wait-seconds"], run_config["round-seconds"])
    federation = experiment.Federation(sites.clients, sites.train)
    return experiment.run(config, run_config["workdir"], inputs, federation)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Entry point of Flower's ServerApp process."""
    try:
        run(grid, dict(context.run_config))
    except (ConfigError, SitesError, *input_errors()) as error:
        print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
