"""Checks of a config before any compute; every message names the field."""

import datetime
import importlib.util
import json
from collections.abc import Collection, Sequence

import ml_collections

from fedsafe_jax.cai.losses import LOSSES
from fedsafe_jax.cai.revise import CHECKS, DATA
from fedsafe_jax.cai.schedule import SCHEDULES
from fedsafe_jax.config import ConfigError, check_override, default_config, unsafe_sources
from fedsafe_jax.data import named_templates, sources
from fedsafe_jax.data.chat_template import ChatTemplateError
from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.data.partition import PARTITIONS
from fedsafe_jax.data.readers import EVALUATION_ONLY
from fedsafe_jax.evals.judges import JUDGES
from fedsafe_jax.evals.task import TaskError, select
from fedsafe_jax.federated import aggregation
from fedsafe_jax.federated.aggregation import AGGREGATORS
from fedsafe_jax.federated.algorithms import ALGORITHMS
from fedsafe_jax.federated.algorithms.moments import FIRST_MOMENTS, SECOND_MOMENTS
from fedsafe_jax.federated.algorithms.scaffold import CORRECTIONS
from fedsafe_jax.federated.attackers import ATTACKERS
from fedsafe_jax.federated.client import OptimizerError, make_optimizer
from fedsafe_jax.federated.compression import COMPRESSIONS
from fedsafe_jax.federated.participation import SAMPLINGS, WEIGHTINGS
from fedsafe_jax.federated.privacy import ACCOUNTANTS
from fedsafe_jax.federated.registry import unknown
from fedsafe_jax.federated.schedules import DECAYS
from fedsafe_jax.filters.actions import ACTIONS
from fedsafe_jax.filters.decision import TARGETS
from fedsafe_jax.filters.kinds import FILTER_KINDS
from fedsafe_jax.models.attention import BACKENDS
from fedsafe_jax.models.quantize import KINDS as QUANTIZATIONS
from fedsafe_jax.pipeline.arms import ARMS, any_filter
from fedsafe_jax.pipeline.evaluation import tasks
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
        "attack.kind": ATTACKERS,
        "federated.sampling": SAMPLINGS,
        "federated.weighting": ("auto", *WEIGHTINGS),
        "federated.scaffold": CORRECTIONS,
        "federated.second_moment": SECOND_MOMENTS,
        "federated.first_moment": FIRST_MOMENTS,
        "federated.average": ("factors", "product"),
        "federated.aggregator": AGGREGATORS,
        "federated.compression": COMPRESSIONS,
        "filter.kind": FILTER_KINDS,
        "filter.action": ACTIONS,
        "filter.target": TARGETS,
        "cai.reviser": ("global", "base"),
        "cai.revise": ("all", "wrong"),
        "cai.check": CHECKS,
        "cai.data": DATA,
        "cai.schedule": SCHEDULES,
        "cai.losses": LOSSES,
        "cai.reference": ("base", "global"),
        "eval.judge": JUDGES,
    }


def _check_choices(c: ml_collections.ConfigDict, prefix: str = "") -> None:
    """Checks the fields of `choices`; `prefix` is the group that `c` is, such as "filter."."""
    for name, allowed in choices().items():
        if name.startswith(prefix):
            value = c
            for part in name.removeprefix(prefix).split("."):
                value = value[part]
            _choice(name, value if isinstance(value, tuple | list) else (value,), allowed)


def _choice(field: str, values: Sequence, allowed: Collection[str]) -> None:
    for value in values:
        if not isinstance(value, str) or value not in allowed:
            raise ConfigError(unknown(field, value, allowed))


def _check_values(c: ml_collections.ConfigDict, prefix: str = "") -> None:
    """Checks every number against its range, and what every list holds.

    Args:
      c: a config or a group of one.
      prefix: the group that `c` is, such as "filter.".
    """
    for name, value in c.items():
        field = prefix + name
        if field == "chat_template_kwargs":
            continue  # the template's own: whatever JSON holds
        if isinstance(value, ml_collections.ConfigDict):
            _check_values(value, f"{field}.")
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


def validate(c: ml_collections.ConfigDict) -> None:
    """Checks every field against the others; files and models are checked where they are read.

    Raises:
      ConfigError: naming the field, what was found and what is expected.
    """

    for field in ("arms", "algorithms", "seeds"):
        value = c[field]
        if not isinstance(value, tuple | list) or not value or len(set(value)) != len(value):
            raise ConfigError(f"{field}={value!r}: expected a tuple of distinct values, not empty.")
    _check_values(c)
    _check_choices(c)
    _validate_cai(c.cai)
    validate_filter(c.filter)
    if CHECKS[c.cai.check].judge:
        judging = FILTER_KINDS[c.filter.kind].make is not None and any_filter(c)
        if not judging:
            raise ConfigError(
                f"cai.check='{c.cai.check}': no filter is trained; add 'fl+filter' or "
                "'fl+filter+cai' to arms, with a filter that is not simulated, or use 'rules'."
            )
    _validate_eval(c.eval)
    _validate_chat(c)
    _validate_federated(c)
    if c.clients_per_round > c.num_clients:
        raise ConfigError(
            f"clients_per_round={c.clients_per_round} exceeds num_clients={c.num_clients}; "
            "lower it."
        )
    _check_sources("safe_sources", c.safe_sources)
    _check_sources("unsafe_sources", unsafe_sources(c))
    _check_sources("heldout_sources", c.heldout_sources, trained=False)
    for field in ("red_team_sources", "benign_sources"):
        _check_sources(f"cai.{field}", c.cai[field])


def _check_sources(field: str, names: Sequence[str], trained: bool = True) -> None:
    """Checks how sources are written, and that none that is trained on is a benchmark."""
    for source in names:
        try:
            name, _, _ = sources.parse_source(source)
        except SourceError as error:
            raise ConfigError(f"{field}: {error}") from None
        if trained and name in EVALUATION_ONLY:
            raise ConfigError(
                f"{field}: source {source!r}: {name} is a benchmark and is never trained on."
            )


def _validate_eval(c: ml_collections.ConfigDict) -> None:
    """Checks the fields of `eval`."""
    if known := sorted(set(c) - set(default_config().eval)):
        check_override(f"eval.{known[0]}", default_config())
    if bool(c.judge_url) != bool(c.judge_model):
        raise ConfigError("eval.judge_url and eval.judge_model: give both, or neither.")
    try:
        chosen = select(c.tasks, tasks())
    except TaskError as error:
        raise ConfigError(f"eval.tasks: {error}") from None
    for name, one in chosen.items():
        if one.task.needs_endpoint and not c.judge_url:
            raise ConfigError(
                f"eval.tasks: {name!r} is graded by a chat model; give eval.judge_url and "
                "eval.judge_model."
            )


def _validate_chat(c: ml_collections.ConfigDict) -> None:
    """Checks the fields of the chat template."""
    if c.date:
        try:
            datetime.date.fromisoformat(c.date)
        except ValueError:
            raise ConfigError(f"date='{c.date}': expected a day such as '2026-11-26'.") from None
    try:
        if c.chat_template:
            named_templates.resolve(c.chat_template)
        json.dumps(c.chat_template_kwargs.to_dict())
    except ChatTemplateError as error:
        raise ConfigError(str(error)) from None
    except TypeError as error:
        raise ConfigError(f"chat_template_kwargs: {error}; use text, numbers or bool.") from None


def _validate_federated(c: ml_collections.ConfigDict) -> None:
    """Checks the fields of training, `federated` and `attack`."""
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
    if f.average == "product":
        _validate_product_average(c)
    aggregator = aggregation.make(f.aggregator, f.trim_share, f.byzantine)
    robust, need = not aggregator.linear, aggregator.min_clients
    if c.clients_per_round < need:
        raise ConfigError(
            f"federated.aggregator='{f.aggregator}' with byzantine={f.byzantine} needs at least "
            f"{need} clients a round, clients_per_round={c.clients_per_round}."
        )
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
        works = " or ".join(name for name, entry in ALGORITHMS.items() if entry.keeps_mean)
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


def _validate_cai(c: ml_collections.ConfigDict) -> None:
    """Checks the fields of `cai`."""
    if c.revise == "wrong" and c.check == "none":
        raise ConfigError("cai.revise='wrong': cai.check='none' finds nothing wrong; use 'rules'.")
    given = DATA[c.data].given
    if given != bool(c.records):
        raise ConfigError(
            f"cai.data='{c.data}', cai.records={tuple(c.records)}: ready-made revisions are "
            "read by cai.data='given' alone; give both or neither."
        )
    if given and SCHEDULES[c.schedule].steps_after_probe and not c.red_team_sources:
        raise ConfigError(
            f"cai.schedule='{c.schedule}': it asks cai.red_team_sources how much is refused, also "
            "with cai.data='given'; give some, or use 'light', 'full' or 'final'."
        )
    if not c.losses or len(set(c.losses)) != len(c.losses):
        raise ConfigError(f"cai.losses={tuple(c.losses)}: expected distinct losses, at least one.")
    if len(c.weights) != len(c.losses) or not c.weights:
        raise ConfigError(
            f"cai.weights={tuple(c.weights)}: expected a positive weight for each of "
            f"cai.losses={tuple(c.losses)}."
        )


def validate_filter(f: ml_collections.ConfigDict) -> None:
    """Checks the fields of `filter`, or those of `config.filter_config`.

    Raises:
      ConfigError: naming the field, what was found and what is expected.
    """
    _check_values(f, "filter.")
    _check_choices(f, "filter.")
    for field in set(f) & {"dtype", "quantization"}:
        _choice(field, (f[field],), choices()[field])
    _check_sources("filter.sources", f.sources)
    if FILTER_KINDS[f.kind].needs_model and not f.model and not f.load:
        raise ConfigError(
            f"filter.model: filter.kind='{f.kind}' needs the guard's folder or Hub id."
        )
    if f.unsafe_labels and not f.encoder:
        raise ConfigError("filter.unsafe_labels: they are labels of filter.encoder; give it.")
