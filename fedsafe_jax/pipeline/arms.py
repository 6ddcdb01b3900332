"""The arms of a run: which training, with which defences; their names are read here alone."""

from typing import NamedTuple

from ml_collections import ConfigDict


class Arm(NamedTuple):
    """What a model goes through before it is evaluated.

    Attributes:
      name: as the config writes it, such as "fl+filter+cai".
      training: "none" for the base model, "federated", or "server": the server's own alone.
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
        """Whether clients train in its rounds."""
        return self.training == "federated"


ARMS = {
    arm.name: arm
    for arm in (
        Arm("base", "none"),
        Arm("cai", "server", cai=True),
        Arm("fl", "federated"),
        Arm("fl+filter", "federated", filter=True),
        Arm("fl+cai", "federated", cai=True),
        Arm("fl+filter+cai", "federated", filter=True, cai=True),
    )
}


class PlannedArm(NamedTuple):
    """An arm under one algorithm.

    Attributes:
      id: key in `results.json`: the arm's name, behind that of the algorithm where there are
        several.
      algorithm: name of the federated algorithm; "" for an arm without clients.
      arm: the arm.
    """

    id: str
    algorithm: str
    arm: Arm

    @property
    def folder(self) -> str:
        """The id as the name of a file or folder."""
        return self.id.replace("/", "_")


def arms_of(config: ConfigDict) -> list[Arm]:
    """Returns the arms that a config asks for, in its order."""
    return [ARMS[name] for name in config.arms]


def planned_arms(config: ConfigDict) -> list[PlannedArm]:
    """Returns everything to run for a seed: arms without clients once, others by algorithm."""
    arms = arms_of(config)
    planned = [PlannedArm(arm.name, "", arm) for arm in arms if not arm.federated]
    for algorithm in config.algorithms:
        for arm in arms:
            if arm.federated:
                several = len(config.algorithms) > 1
                arm_id = f"{algorithm}/{arm.name}" if several else arm.name
                planned.append(PlannedArm(arm_id, algorithm, arm))
    return planned


def references(config: ConfigDict) -> dict[str, list[str]]:
    """Returns the arms that each arm is compared with: the base, federated learning alone under the
    same algorithm, and the same arm under the first algorithm; by `PlannedArm.id`."""
    planned = planned_arms(config)

    def others(one: PlannedArm) -> list[str]:
        return [
            other.id
            for other in planned
            if other.id != one.id
            and (
                not other.arm.trains
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
