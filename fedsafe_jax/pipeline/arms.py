"""The arms of a run: which training, with which defences; their names are read here alone."""

from typing import NamedTuple

from ml_collections import ConfigDict

from fedsafe_jax.runtime import run_files


class Arm(NamedTuple):
    """What a model goes through before it is evaluated.

    Attributes:
      name: as the config writes it, such as "fl+filter+cai".
      training: "none" for the base model, "federated", "server": the server's own alone, or a
        baseline: "local", each client alone, or "centralised", one learner with all pairs.
      filter: whether clients filter their pairs.
      cai: whether the server runs Constitutional AI after each round.
    """

    name: str
    training: str
    filter: bool = False
    cai: bool = False

    @property
    def trains(self) -> bool:
        """Whether the arm has rounds."""
        return self.training != "none"

    @property
    def federated(self) -> bool:
        """Whether clients train in its rounds, under each of the run's algorithms."""
        return self.training == "federated"

    @property
    def baseline(self) -> bool:
        """Whether it trains on the clients' pairs without a federation."""
        return self.training in BASELINES


# What trains on the clients' pairs without a federation, and the algorithm that does it.
BASELINES = {"local": "local", "centralised": "fedavg"}

ARMS = {
    arm.name: arm
    for arm in (
        Arm("base", "none"),
        Arm("cai", "server", cai=True),
        Arm("fl", "federated"),
        Arm("fl+filter", "federated", filter=True),
        Arm("fl+cai", "federated", cai=True),
        Arm("fl+filter+cai", "federated", filter=True, cai=True),
        Arm("local", "local"),
        Arm("local+filter", "local", filter=True),
        Arm("centralised", "centralised"),
        Arm("centralised+filter", "centralised", filter=True),
    )
}


class PlannedArm(NamedTuple):
    """An arm under one algorithm.

    Attributes:
      id: key in `results.json`: the arm's name, behind that of the algorithm where there are
        several.
      algorithm: name of the federated algorithm, or of a baseline's; "" for an arm that trains on
        no client's pairs.
      arm: the arm.
    """

    id: str
    algorithm: str
    arm: Arm

    @property
    def folder(self) -> str:
        """The id as the name of a file or folder."""
        return run_files.file_name(self.id)


def arms_of(config: ConfigDict) -> list[Arm]:
    """Returns the arms that a config asks for, in its order."""
    return [ARMS[name] for name in config.arms]


def planned_arms(config: ConfigDict) -> list[PlannedArm]:
    """Returns everything to run for a seed: federated arms by algorithm, all others once."""
    arms = arms_of(config)
    planned = [
        PlannedArm(arm.name, BASELINES.get(arm.training, ""), arm)
        for arm in arms
        if not arm.federated
    ]
    for algorithm in config.algorithms:
        for arm in arms:
            if arm.federated:
                several = len(config.algorithms) > 1
                arm_id = f"{algorithm}/{arm.name}" if several else arm.name
                planned.append(PlannedArm(arm_id, algorithm, arm))
    return planned


def references(config: ConfigDict) -> dict[str, list[str]]:
    """Returns the arms that each arm is compared with, by `PlannedArm.id`: the base, baselines,
    federated learning alone under the same algorithm, the same arm under the first algorithm."""
    planned = planned_arms(config)

    def others(one: PlannedArm) -> list[str]:
        return [
            other.id
            for other in planned
            if other.id != one.id
            and (
                not other.arm.trains
                or other.arm.baseline
                or (other.algorithm == one.algorithm and other.arm.name == "fl")
                or (other.algorithm == config.algorithms[0] and other.arm.name == one.arm.name)
            )
        ]

    return {one.id: others(one) for one in planned if one.arm.trains}


def total_rounds(config: ConfigDict) -> int:
    """Returns the rounds of all arms, algorithms and seeds."""
    trained = sum(planned.arm.trains for planned in planned_arms(config))
    return len(config.seeds) * trained * config.rounds


def any_federated(config: ConfigDict) -> bool:
    """Returns whether clients train in an arm."""
    return any(arm.federated for arm in arms_of(config))


def any_filter(config: ConfigDict) -> bool:
    """Returns whether an arm filters the clients' pairs."""
    return any(arm.filter for arm in arms_of(config))
