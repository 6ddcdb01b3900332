"""Checks of single fields: the names that they may have, and the numbers."""

from collections.abc import Collection, Sequence

import ml_collections

from fedsafe_jax.cai.losses import LOSSES
from fedsafe_jax.cai.revise import DATA
from fedsafe_jax.cai.schedule import SCHEDULES
from fedsafe_jax.config import ConfigError
from fedsafe_jax.data.partition import PARTITIONS
from fedsafe_jax.data.poisoning import POISONS
from fedsafe_jax.federated.aggregation import AGGREGATORS
from fedsafe_jax.federated.algorithms import ALGORITHMS
from fedsafe_jax.federated.algorithms.moments import FIRST_MOMENTS, SECOND_MOMENTS
from fedsafe_jax.federated.algorithms.referenced import REFERENCES
from fedsafe_jax.federated.algorithms.scaffold import CORRECTIONS
from fedsafe_jax.federated.attackers import ATTACKERS
from fedsafe_jax.federated.compression import COMPRESSIONS
from fedsafe_jax.federated.participation import SAMPLINGS, WEIGHTINGS
from fedsafe_jax.federated.schedules import DECAYS
from fedsafe_jax.filters.actions import ACTIONS
from fedsafe_jax.filters.decision import TARGETS
from fedsafe_jax.filters.kinds import FILTER_KINDS
from fedsafe_jax.filters.rewriting import WAYS
from fedsafe_jax.models.attention import BACKENDS
from fedsafe_jax.models.quantize import KINDS as QUANTIZATIONS
from fedsafe_jax.pipeline.arms import ARMS
from fedsafe_jax.registry import unknown
from fedsafe_jax.validation.ranges import NUMBER_LISTS, RANGES, WHOLE_NUMBERS


def choices() -> dict[str, Collection[str]]:
    """Returns the names that a field may have, by the name of the field, from the registries."""
    return {
        "arms": ARMS,
        "algorithms": ALGORITHMS,
        "export_arm": ARMS,
        "dtype": ("float32", "bfloat16"),
        "quantization": ("", *QUANTIZATIONS),
        "attention": BACKENDS,
        "partition": PARTITIONS,
        "schedule": DECAYS,
        "step_schedule": DECAYS,
        "attack.data": POISONS,
        "attack.kind": ATTACKERS,
        "federated.sampling": SAMPLINGS,
        "federated.weighting": ("auto", *WEIGHTINGS),
        "federated.scaffold": CORRECTIONS,
        "federated.second_moment": SECOND_MOMENTS,
        "federated.first_moment": FIRST_MOMENTS,
        "federated.reference": REFERENCES,
        "federated.average": ("factors", "product"),
        "federated.aggregator": AGGREGATORS,
        "federated.compression": COMPRESSIONS,
        "filter.kind": FILTER_KINDS,
        "filter.action": ACTIONS,
        "filter.rewrite": WAYS,
        "filter.target": TARGETS,
        "cai.reviser": ("global", "base"),
        "cai.revise": ("all", "wrong"),
        "cai.data": DATA,
        "cai.schedule": SCHEDULES,
        "cai.losses": LOSSES,
        "cai.reference": ("base", "global"),
    }


def check_choices(c: ml_collections.ConfigDict, prefix: str = "") -> None:
    """Checks the fields of `choices`.

    Args:
      c: a config or a group of one.
      prefix: the group that `c` is, such as "filter.".

    Raises:
      ConfigError: naming the field, what was found and what is expected.
    """
    for name, allowed in choices().items():
        if name.startswith(prefix):
            value = c
            for part in name.removeprefix(prefix).split("."):
                value = value[part]
            check_choice(name, value if isinstance(value, tuple | list) else (value,), allowed)


def check_choice(field: str, values: Sequence, allowed: Collection[str]) -> None:
    """Checks that a field's values are among those allowed.

    Raises:
      ConfigError: naming the field, what was found and what is expected.
    """
    for value in values:
        if not isinstance(value, str) or value not in allowed:
            raise ConfigError(unknown(field, value, allowed))


def check_values(c: ml_collections.ConfigDict, prefix: str = "") -> None:
    """Checks every number against its range, and what every list holds.

    Args:
      c: a config or a group of one.
      prefix: the group that `c` is, such as "filter.".

    Raises:
      ConfigError: naming the field, what was found and what is expected.
    """
    for name, value in c.items():
        field = prefix + name
        if field == "chat_template_kwargs":
            continue  # the template's own: whatever JSON holds
        if isinstance(value, ml_collections.ConfigDict):
            check_values(value, f"{field}.")
        elif isinstance(value, tuple | list):
            _check_list(field, value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            # Fields that a filter's own config has beside those of a run's `filter`.
            allowed = RANGES[field if field in RANGES else name]
            if not allowed.holds(value):
                raise ConfigError(f"{field}={value}: expected {allowed}.")


def _check_list(field: str, values: Sequence) -> None:
    """Checks what a list holds: text, unless `NUMBER_LISTS` names it."""
    allowed = NUMBER_LISTS.get(field)
    for value in values:
        if allowed is None:
            if not isinstance(value, str):
                raise ConfigError(f"{field}: expected a list of text, found {value!r} in it.")
            continue
        kind = int if field in WHOLE_NUMBERS else int | float
        if not isinstance(value, kind) or isinstance(value, bool) or not allowed.holds(value):
            whole = "whole numbers" if kind is int else "numbers"
            raise ConfigError(f"{field}: {value!r} in it; expected {whole}, each {allowed}.")
