"""Where the clients are and train: a simulation here, or real sites."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from etils import epath
from ml_collections import ConfigDict

from fedsafe_jax.federated.round_programs import Programs
from fedsafe_jax.federated.simulation import FederatedState
from fedsafe_jax.pipeline import clients, filtering, round_setup, rounds
from fedsafe_jax.pipeline.arms import Arm as ArmOfRun
from fedsafe_jax.pipeline.arms import PlannedArm, any_filter
from fedsafe_jax.pipeline.clients import Clients
from fedsafe_jax.pipeline.inputs import RunInputs
from fedsafe_jax.runtime.progress import Progress


class Arm(Protocol):
    """What training reads of an arm's run, which is `experiment.ArmRun`.

    Attributes:
      config, inputs: those of the run.
      planned: the arm and its algorithm.
      seed: seed of the arm.
      programs: the jitted programs of a round.
      secret: what noise and cohorts of differential privacy are drawn from; None without it.
    """

    config: ConfigDict
    inputs: RunInputs
    planned: PlannedArm
    seed: int
    programs: Programs
    secret: int | None

    def update_writer(self, state: FederatedState, t: int) -> Callable | None:
        """Returns what takes the updates of round `t`; None where none are read."""


class Federation(NamedTuple):
    """Where the clients are and train: simulated here, or at real sites.

    Attributes:
      clients: `(config, inputs, seed, workdir, progress) -> Clients`.
      train: `(arm_run, state, clients, t) -> (state, figures)`: local training of round `t`, from
        0, and the server's step.
    """

    clients: Callable[..., Clients]
    train: Callable[..., tuple[FederatedState, dict]]


def simulated_clients(
    config: ConfigDict, inputs: RunInputs, seed: int, workdir: epath.Path, progress: Progress
) -> Clients:
    """Builds the simulated clients of a seed, filtered where an arm asks for it."""
    built = clients.build(config, inputs, seed, progress)
    if any_filter(config):
        built = filtering.filter_clients(
            config, inputs, built, seed=seed, workdir=workdir, progress=progress
        )
    return built


def train_simulated(
    arm_run: Arm, state: FederatedState, members: Clients, t: int
) -> tuple[FederatedState, dict]:
    """Trains simulated clients on this machine's devices, see `rounds.run`; a centralised learner
    is one client with all pairs, but those of excluded clients."""
    arm = arm_run.planned.arm
    data = members.filtered if arm.filter else members.plain
    if arm.training == "centralised":
        unlearned = set(arm_run.config.federated.exclude)
        data = [[pair for i, own in enumerate(data) if i not in unlearned for pair in own]]
    return rounds.run(
        round_setup.arm_config(arm_run.config, arm),
        arm_run.planned.algorithm,
        arm_run.programs,
        state=state,
        base=arm_run.inputs.base,
        data=data,
        seed=arm_run.seed,
        t=t,
        secret=arm_run.secret,
        keep_update=arm_run.update_writer(state, t),
    )


def learned_from(config: ConfigDict, arm: ArmOfRun, row: dict) -> list[int]:
    """Returns the clients whose pairs a round could learn from.

    Args:
      config: config of the run.
      arm: the arm.
      row: figures of the round.
    """
    if arm.training == "centralised":
        return sorted(set(range(config.num_clients)) - set(config.federated.exclude))
    return row.get("clients", []) + row.get("no_data", [])


SIMULATED = Federation(simulated_clients, train_simulated)
