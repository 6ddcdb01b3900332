"""Checks of training, `federated` and `attack`: what goes together."""

import importlib.util

import ml_collections

from fedsafe_jax.config import ConfigError, default_config
from fedsafe_jax.data.poisoning import POISONS
from fedsafe_jax.federated import aggregation
from fedsafe_jax.federated.algorithms import ALGORITHMS
from fedsafe_jax.federated.attackers import ATTACKERS
from fedsafe_jax.federated.client import OptimizerError, make_optimizer
from fedsafe_jax.federated.privacy import ACCOUNTANTS
from fedsafe_jax.pipeline.arms import arms_of


def validate_federated(c: ml_collections.ConfigDict) -> None:
    """Checks the fields of training, `federated` and `attack`.

    Raises:
      ConfigError: naming the field, what was found and what is expected.
    """
    f = c.federated
    if c.warmup_rounds >= c.rounds:
        raise ConfigError(
            f"warmup_rounds={c.warmup_rounds}: expected fewer than rounds={c.rounds}."
        )
    for rank in f.client_ranks:
        if not 1 <= rank <= c.lora_rank:
            raise ConfigError(
                f"federated.client_ranks={tuple(f.client_ranks)}: expected 1 to "
                f"lora_rank={c.lora_rank}."
            )
    if POISONS[c.attack.data].triggered and not c.attack.trigger.strip():
        raise ConfigError(
            f"attack.trigger='{c.attack.trigger}': a backdoor needs a text that it listens to."
        )
    if f.average == "product":
        _validate_product_average(c)
    if not f.constrained_betas:
        raise ConfigError(
            "federated.constrained_betas=(): expected at least one beta, such as (0.5, 2.0, 0.1)."
        )
    if c.eval.client >= c.num_clients:
        raise ConfigError(
            f"eval.client={c.eval.client}: expected less than num_clients={c.num_clients}."
        )
    for name in c.algorithms:
        _validate_algorithm(c, name)
    if f.noise_multiplier and (alone := [arm.name for arm in arms_of(c) if arm.baseline]):
        raise ConfigError(
            f"arms: {', '.join(alone)} does not go with federated.noise_multiplier: baselines are "
            "not private, and epsilon would stand beside them; run them without it."
        )
    aggregator = aggregation.make(f.aggregator, f.trim_share, f.byzantine)
    robust, need = not aggregator.linear, aggregator.min_clients
    if c.clients_per_round < need:
        raise ConfigError(
            f"federated.aggregator='{f.aggregator}' with byzantine={f.byzantine} needs at least "
            f"{need} clients a round, clients_per_round={c.clients_per_round}."
        )
    _validate_min_answers(c, need)
    _validate_exclude(c, need)
    _validate_attribution(c)
    try:
        make_optimizer(c.optimizer, c.gradient_clip)
    except OptimizerError as error:
        raise ConfigError(f"optimizer: {error}") from None
    if f.noise_bands > 1 and not f.noise_multiplier:
        raise ConfigError(
            f"federated.noise_bands={f.noise_bands} without noise_multiplier: there is no noise."
        )
    if f.noise_multiplier:
        if importlib.util.find_spec("dp_accounting") is None:
            raise ConfigError(
                "federated.noise_multiplier: epsilon needs dp-accounting; pip install -e .[dp]"
            )
        _validate_bands(c)
        if not f.clip_norm:
            raise ConfigError(
                f"federated.noise_multiplier={f.noise_multiplier} without clip_norm: noise hides "
                "only updates of bounded length; set federated.clip_norm."
            )
        if f.sampling not in ACCOUNTANTS or f.weighting not in ("auto", "uniform"):
            raise ConfigError(
                f"federated.noise_multiplier: differential privacy needs sampling "
                f"{' or '.join(ACCOUNTANTS)} and uniform weights, not sampling='{f.sampling}', "
                f"weighting='{f.weighting}'."
            )
        if c.attack.clients and ATTACKERS[c.attack.kind].collude:
            raise ConfigError(
                f"attack.kind='{c.attack.kind}' does not go with federated.noise_multiplier: what "
                "such attackers send depends on the others' updates, so that a client moves the "
                "sum by more than clip_norm, which epsilon counts on; use 'boost' or 'sign_flip'."
            )
    # The bounds, or the arithmetic, of one method do not cover the other.
    for a, b, reason in (
        (robust, f.average == "product", "aggregator other than mean and average='product'"),
        (robust, bool(f.client_ranks), "aggregator other than mean and client_ranks"),
        (robust, bool(f.noise_multiplier), "aggregator other than mean and noise_multiplier"),
        (
            bool(f.noise_multiplier),
            f.average == "product" or bool(f.client_ranks),
            "noise_multiplier and average='product' or client_ranks",
        ),
        *(
            (
                ALGORITHMS[name].controls,
                robust or bool(f.client_ranks) or bool(f.noise_multiplier),
                f"algorithm {name}, whose control variates are averaged, and a robust aggregator, "
                "client_ranks or noise_multiplier",
            )
            for name in c.algorithms
        ),
    ):
        if a and b:
            raise ConfigError(f"federated: {reason} do not go together.")


def _validate_algorithm(c: ml_collections.ConfigDict, name: str) -> None:
    """Checks what an algorithm's entry says that it does not go with."""
    if ALGORITHMS[name].personal:
        if staged := [arm.name for arm in arms_of(c) if arm.federated and arm.cai]:
            raise ConfigError(
                f"arms: {', '.join(staged)} does not go with algorithm {name}: each client has a "
                "model of its own, and the server none that Constitutional AI could train."
            )
        if c.federated.unaligned:
            raise ConfigError(
                f"federated.unaligned='{c.federated.unaligned}' does not go with algorithm {name}: "
                "each client has a model of its own, and the server none that it could project."
            )
    for field, reason in ALGORITHMS[name].refuses.items():
        value, default = c, default_config()
        for part in field.split("."):
            value, default = value[part], default[part]
        if value != default:
            raise ConfigError(
                f"{field}={value!r} does not go with algorithm {name}: {reason}; use {default!r}."
            )


def _validate_attribution(c: ml_collections.ConfigDict) -> None:
    """Checks that there are single updates of one global model, which the server may look at."""
    where = f"federated.attribution={c.federated.attribution}"
    if not c.federated.attribution:
        return
    if c.federated.noise_multiplier:
        raise ConfigError(
            f"{where} does not go with noise_multiplier: it looks at each client's update before "
            "the noise, and epsilon would not hold for what it reports; set it to 0."
        )
    if own := [name for name in c.algorithms if ALGORITHMS[name].personal]:
        raise ConfigError(
            f"{where} does not go with algorithm {own[0]}: each client has a model of its own, and "
            "its update alone is none; set it to 0."
        )
    if not any(arm.federated for arm in arms_of(c)):
        raise ConfigError(f"{where}: no arm of {tuple(c.arms)} is a federation; add 'fl'.")
    if not c.cai.red_team_sources:
        raise ConfigError(f"{where}: it asks cai.red_team_sources; give some.")


def _validate_min_answers(c: ml_collections.ConfigDict, need: int) -> None:
    """Checks that a round can have `min_answers`, and that the aggregator's bound holds with it."""
    f = c.federated
    where = f"federated.min_answers={f.min_answers}"
    if not f.min_answers:
        return
    if not need <= f.min_answers <= c.clients_per_round:
        raise ConfigError(
            f"{where}: expected {need}, what the bound of aggregator='{f.aggregator}' needs, to "
            f"clients_per_round={c.clients_per_round}; or 0."
        )
    if f.noise_multiplier:
        raise ConfigError(
            f"{where} does not go with noise_multiplier: a round that is skipped for it would tell "
            "who took part; every round counts, as the noise does."
        )


def _validate_exclude(c: ml_collections.ConfigDict, need: int) -> None:
    """Checks that a run without the excluded clients is the replay that it is asked for."""
    f = c.federated
    where = f"federated.exclude={tuple(f.exclude)}"
    if f.replay and not f.exclude:
        raise ConfigError(
            f"federated.replay='{f.replay}' without exclude: a run is replayed without some client."
        )
    if not f.exclude:
        return
    if len(set(f.exclude)) != len(f.exclude) or max(f.exclude) >= c.num_clients:
        raise ConfigError(
            f"{where}: expected distinct clients, each less than num_clients={c.num_clients}."
        )
    left, least = c.num_clients - len(f.exclude), max(need, f.min_answers, 1)
    if left < least:
        raise ConfigError(
            f"{where} leaves {left} of num_clients={c.num_clients}, and every round needs {least} "
            "of them; exclude fewer."
        )
    if f.noise_multiplier:
        raise ConfigError(
            f"{where} does not go with noise_multiplier: the difference of two adapters with the "
            "same noise would be the client's update without any, and new noise is no replay; "
            "train anew without the client's data, which spends epsilon again."
        )
    own = [name for name in c.algorithms if ALGORITHMS[name].personal]
    own += [arm.name for arm in arms_of(c) if arm.training == "local"]
    if own and c.eval.client in f.exclude:
        raise ConfigError(
            f"{where} does not go with eval.client={c.eval.client} and {own[0]}: the model of "
            "that client would be evaluated; choose another eval.client."
        )


def _validate_product_average(c: ml_collections.ConfigDict) -> None:
    """Checks what goes with `average='product'`: nothing that lives in the basis of the factors.

    Each mean of products has a basis of its own, so the difference to the present factors is no
    step: half of it, a momentum of it, or an error kept from it changes the product at random.
    """
    f = c.federated
    reasons = [f"algorithm {name}" for name in c.algorithms if not ALGORITHMS[name].keeps_mean]
    if f.server_learning_rate != 1:
        reasons.append(f"server_learning_rate={f.server_learning_rate}")
    if f.compression:
        reasons.append(f"compression='{f.compression}' with its error feedback")
    if f.stragglers:
        reasons.append(f"stragglers={f.stragglers}")
    if reasons:
        works = [name for name, entry in ALGORITHMS.items() if entry.keeps_mean]
        works = f"{', '.join(works[:-1])} or {works[-1]}"
        raise ConfigError(
            f"federated.average='product' does not go with {', '.join(reasons)}: the basis of the "
            f"factors changes every round; use {works} with server_learning_rate=1, without "
            "compression and stragglers, or average='factors'."
        )


def _validate_bands(c: ml_collections.ConfigDict) -> None:
    """Checks that the epsilon of correlated noise is that of the run."""
    f = c.federated
    if f.noise_bands == 1:
        return
    where = f"federated.noise_bands={f.noise_bands}"
    if importlib.util.find_spec("jax_privacy") is None:
        raise ConfigError(f"{where}: correlated noise needs jax_privacy; pip install -e .[privacy]")
    if f.sampling != "poisson":
        raise ConfigError(
            f"{where}: epsilon is known for sampling='poisson' alone, not '{f.sampling}'."
        )
    if f.noise_bands > c.rounds:
        raise ConfigError(f"{where}: expected at most rounds={c.rounds}.")
    if f.noise_bands * c.clients_per_round > c.num_clients:
        raise ConfigError(
            f"{where}: groups of {c.num_clients // f.noise_bands} of num_clients={c.num_clients} "
            f"take turns, and cannot give clients_per_round={c.clients_per_round}; lower either."
        )
