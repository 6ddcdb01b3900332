"""The config of a federation of sites, from Flower's run config."""

import ast
import importlib

import ml_collections

from fedsafe_jax.cai.revise import parse_check
from fedsafe_jax.config import ConfigError
from fedsafe_jax.federated import aggregation
from fedsafe_jax.federated.algorithms import ALGORITHMS
from fedsafe_jax.federated.participation import SAMPLINGS
from fedsafe_jax.flower import wire
from fedsafe_jax.pipeline.arms import arms_of
from fedsafe_jax.validation import validate

FEWEST_SITES = 2  # an adapter of one site's data alone is not the federation's


def read_config(run_config: dict) -> ml_collections.ConfigDict:
    """Builds the config of a run from Flower's run config.

    What a site says of its size sets no weight by default, and a round needs two sites at least.

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
    trained = [arm for arm in arms_of(config) if arm.trains]
    if len(trained) != 1 or not trained[0].federated:
        raise ConfigError(f"arms={tuple(config.arms)}: a federation trains one arm beside base.")
    f = config.federated
    aggregator = aggregation.make(f.aggregator, f.trim_share, f.byzantine)
    for field, value, reason in (
        ("federated.compression", f.compression, "adapters are sent whole"),
        ("federated.client_ranks", f.client_ranks, "all sites train lora_rank"),
        ("federated.replay", f.replay, "sites repeat all rounds"),
        ("federated.dropout", f.dropout, "sites drop out by themselves"),
        ("attack.clients", config.attack.clients, "attacks are simulated only"),
        (
            f"algorithms={tuple(config.algorithms)}",
            not ALGORITHMS[config.algorithms[0]].sites,
            "sites are sent the adapter and control variates, and it needs more of the server",
        ),
        ("keep_updates", config.keep_updates, "they are kept in a simulation only"),
        ("cai.check", parse_check(config.cai.check).judge, "the filter is at the sites"),
        (
            f"federated.weighting='{f.weighting}'",
            f.weighting == "product_norm",
            "a site that sends more would weigh more; use 'uniform'",
        ),
        (
            f"federated.sampling='{f.sampling}'",
            SAMPLINGS[f.sampling].weigh_by_draws,
            "a site that claims to be large would be drawn every time; use 'uniform'",
        ),
        (
            f"federated.weighting='examples' with aggregator='{f.aggregator}'",
            f.weighting == "examples" and not aggregator.linear,
            "half of the weight moves it, and sites say themselves how large they are; "
            "use 'uniform'",
        ),
    ):
        if value:
            raise ConfigError(f"{field} is not for a federation of sites: {reason}.")
    if not config.heldout_sources:
        raise ConfigError("heldout_sources: the server has no client data to hold out; give some.")
    if f.weighting == "auto":
        f.weighting = "uniform"
    if not f.min_answers and not f.noise_multiplier:
        needed = max(aggregator.min_clients, FEWEST_SITES)
        f.min_answers = min(needed, config.clients_per_round)
    return config
