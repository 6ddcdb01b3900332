"""An evaluation, an algorithm and an aggregator of one file each are all that a run needs."""

import json
import sys

import pytest
from commands import SMALL

from fedsafe_jax import evals, experiment
from fedsafe_jax.config import default_config
from fedsafe_jax.federated import aggregation, algorithms


@pytest.fixture
def toys(monkeypatch):
    """Registers the toys for a test; each file registers itself when it is imported."""
    for registry in (evals.TASKS, algorithms.ALGORITHMS, aggregation.AGGREGATORS):
        for name in ("toy", "toy_algorithm", "toy_aggregator"):
            monkeypatch.setitem(registry, name, None)
            del registry[name]
    for module in ("toy_task", "toy_algorithm", "toy_aggregator"):
        sys.modules.pop(module, None)
        __import__(module)


def small_config():
    c = default_config()
    for setting in SMALL:
        name, value = setting.split("=", 1)
        group, _, field = name.rpartition(".")
        section = c[group] if group else c
        section[field] = tuple(json.loads(value)) if value[0] == "[" else type(section[field])(
            eval(value) if value[0] == "(" else value
        )
    return c
