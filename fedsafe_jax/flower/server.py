"""The server's side of the Flower app: `fedsafe_jax.flower.server:app`.

It runs what a simulation runs (rounds, Constitutional AI, evaluation, checkpoints, report), but the
clients train at their sites. `[tool.flwr.app.config]` in the app's pyproject.toml configures it.
"""

import sys
import time
from collections.abc import Iterator

import jax
import ml_collections
import numpy as np
from etils import epath
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedsafe_jax import experiment
from fedsafe_jax.config import ConfigError
from fedsafe_jax.federated.algorithms import ServerState
from fedsafe_jax.federated.participation import Cohort, capped
from fedsafe_jax.federated.simulation import FederatedState
from fedsafe_jax.flower import mail, wire
from fedsafe_jax.flower.received import ReceivedUpdates
from fedsafe_jax.flower.replies import ReplyError, checked, read_update
from fedsafe_jax.flower.seats import FILE, Seats, SitesError, parse_seats
from fedsafe_jax.flower.server_config import read_config
from fedsafe_jax.pipeline import rounds
from fedsafe_jax.pipeline.clients import Clients
from fedsafe_jax.pipeline.inputs import RunInputs, load_inputs
from fedsafe_jax.runtime.libraries import prepare_libraries
from fedsafe_jax.runtime.progress import Progress
from fedsafe_jax.validation import input_errors, one_line

app = ServerApp()
BENCHED = "benched"  # in place of a question


class RunFailed(Exception):
    """The run ended with an error, which the message says in one line.

    Flower sends an app's last lines to `flwr run --stream`, and marks the run as failed, where it
    ends with an `Exception`; with `SystemExit` nobody would see why.
    """


class Sites:
    """The clients of a federation, behind Flower's grid.

    Args:
      grid: Flower's connection to the nodes.
      config: config of the run.
      given: node of each client, see `seats.Seats`.
      wait_s: seconds to wait for all `num_clients` sites; after that `clients_per_round` suffice.
      round_s: seconds that a round waits for its sites.
    """

    def __init__(
        self,
        grid: Grid,
        config: ml_collections.ConfigDict,
        given: dict[int, int],
        wait_s: float,
        round_s: float,
    ):
        self.grid, self.config, self.given = grid, config, given
        self.wait_s, self.round_s = wait_s, round_s
        self.seats: Seats | None = None

    def clients(
        self,
        config: ml_collections.ConfigDict,
        inputs: RunInputs,
        seed: int,
        workdir: epath.Path,
        progress: Progress,
    ) -> Clients:
        """Gathers the sites as clients of `experiment`: it gets counts, and never sees pairs."""
        del inputs, seed
        self.seats = Seats(
            self.grid,
            config,
            self.given,
            patience=max(self.wait_s, self.round_s),
            file=workdir / FILE,
            progress=progress,
        )
        self.seats.gather(self.wait_s)
        return Clients(plain=None, counts=self.seats.counts)

    def train(
        self, arm_run: experiment.ArmRun, state: FederatedState, members: Clients, t: int
    ) -> tuple[FederatedState, dict]:
        """Has the sites train, and makes the server's step; see `experiment.Federation`.

        The figures of the round list under `no_answer` the clients without a usable answer.
        """
        del members
        config, seed, programs = self.config, arm_run.seed, arm_run.programs
        self.seats.poll()
        cohort = rounds.draw_cohort(
            config,
            arm_run.planned.algorithm,
            capped(self.seats.sizes),
            seed=seed,
            t=t,
            secret=arm_run.secret,
        )
        missing: list[int] = []
        useful = 0
        most_tokens = config.batch_size * config.accumulation * config.seq_len * config.local_steps
        # All are asked before any is waited for, however many chunks there are: a round takes
        # `round_s` at most.
        questions = self._ask(cohort, state.server, t)
        until = time.monotonic() + self.round_s

        def train(server, base, inputs, local):
            nonlocal useful
            del base
            places = {int(client): i for i, client in enumerate(inputs.batches) if client >= 0}
            received = ReceivedUpdates(programs.spec, server, len(inputs.weights), len(local.rates))

            def parse(content):
                return read_update(
                    content,
                    server.factors,
                    server.control,
                    steps=len(local.rates),
                    most_tokens=most_tokens,
                )

            for client, message in self._answers({i: questions[i] for i in places}, until):
                try:
                    update = checked(message, parse)
                except ReplyError as error:
                    missing.append(client)
                    reason = f"round {t + 1}: client {client} is left out: {error}"
                    arm_run.progress.warn(reason)
                    continue
                place = places[client]
                received.add(place, update, float(inputs.weights[place]))
                useful += update.tokens
            return received.sent, (), (), received.metrics

        def numbers(start, stop):
            ids = np.full(stop - start, -1, np.int32)
            some = cohort.ids[start:stop]
            ids[: len(some)] = some
            return ids

        state, report = rounds.step(
            config,
            programs._replace(train=train),
            state,
            base=None,
            packed=numbers,
            cohort=cohort,
            seed=seed,
            t=t,
            secret=arm_run.secret,
            keep_update=arm_run.update_writer(state, t),
        )
        row = rounds.figures(config, cohort, report, useful=useful, seed=seed, t=t)
        return state, row | {"no_answer": sorted(missing)}

    def _ask(self, cohort: Cohort, server: ServerState, t: int) -> dict[int, str | None]:
        """Asks the clients of a round to train, benched ones aside: the question of each."""
        arrays = wire.arrays(jax.device_get({"adapter": server.factors, "control": server.control}))
        common, questions = dict(wire.config_record(self.config)), {}
        for client, steps in zip(cohort.ids.tolist(), cohort.steps.tolist(), strict=True):
            if self.seats.benched(client):
                continue
            question = ConfigRecord(common | {"round": t, "steps": steps})
            content = RecordDict({"question": question, "server": arrays})
            node = self.seats.nodes[client]
            questions[client] = mail.ask(self.grid, node, "train", content, seconds=self.round_s)
        return dict.fromkeys(cohort.ids.tolist(), BENCHED) | questions

    def _answers(
        self, questions: dict[int, str | None], until: float
    ) -> Iterator[tuple[int, Message | ReplyError]]:
        """Yields each client's answer as it comes, or why there is none.

        Args:
          questions: question of each client, from `_ask`.
          until: when to stop waiting, by the monotonic clock. What is there by then still counts.
        """
        left = dict(questions)
        while True:
            last = time.monotonic() >= until
            for client, question in list(left.items()):
                if question == BENCHED:
                    yield client, ReplyError("benched until it answers again")
                elif (message := mail.answer(self.grid, question)) is not None:
                    self.seats.answered(client, in_time=True)
                    yield client, message
                elif last:
                    self.seats.answered(client, in_time=False)
                    yield client, ReplyError("no answer in time")
                else:
                    continue
                del left[client]
            if not left:
                return
            self.seats.poll()
            time.sleep(max(0.0, min(mail.SLICE, until - time.monotonic())))


def run(grid: Grid, run_config: dict) -> dict:
    """Runs the whole federation; returns the content of `results.json`.

    Raises:
      ConfigError: the run config is wrong.
      SitesError: too few sites take part.
    """
    config = read_config(run_config)
    try:
        given = parse_seats(str(run_config.get("seats", "")))
    except ValueError as error:
        raise ConfigError(f"--run-config seats: {error}.") from None
    prepare_libraries(run_config["workdir"])
    inputs = load_inputs(config, ("red_team", "replay"))
    sites = Sites(
        grid, config, given, wait_s=run_config["wait-seconds"], round_s=run_config["round-seconds"]
    )
    federation = experiment.Federation(sites.clients, sites.train)
    return experiment.run(config, run_config["workdir"], inputs, federation)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Entry point of Flower's ServerApp process."""
    try:
        run(grid, dict(context.run_config))
    except (ConfigError, SitesError, *input_errors()) as error:
        line = one_line(error)
        print(f"error: {line}", file=sys.stderr, flush=True)
        raise RunFailed(line) from None
