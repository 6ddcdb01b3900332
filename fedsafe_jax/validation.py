"""Checks of a config before any compute; every message names the field."""

import difflib
import importlib.util
from collections.abc import Collection, Sequence

import ml_collections

from fedsafe_jax.cai.losses import LOSSES
from fedsafe_jax.cai.revise import CHECKS, DATA
from fedsafe_jax.cai.schedule import SCHEDULES
from fedsafe_jax.config import ConfigError, check_override, default_config
from fedsafe_jax.data import sources
from fedsafe_jax.data.partition import PARTITIONS
from fedsafe_jax.data.readers import EVALUATION_ONLY
from fedsafe_jax.evals.judges import JUDGES
from fedsafe_jax.evals.task import TaskError, select
from fedsafe_jax.federated import aggregation
from fedsafe_jax.federated.aggregation import AGGREGATORS
from fedsafe_jax.federated.algorithms import ALGORITHMS
from fedsafe_jax.federated.algorithms.moments import FIRST_MOMENTS, SECOND_MOMENTS
from fedsafe_jax.federated.algorithms.scaffold import CORRECTIONS
from fedsafe_jax.federated.client import OptimizerError, make_optimizer
from fedsafe_jax.federated.compression import COMPRESSIONS
from fedsafe_jax.federated.participation import SAMPLINGS, WEIGHTINGS
from fedsafe_jax.federated.privacy import ACCOUNTANTS
from fedsafe_jax.federated.schedules import DECAYS
from fedsafe_jax.filters.actions import ACTIONS
from fedsafe_jax.filters.decision import TARGETS
from fedsafe_jax.filters.kinds import FILTER_KINDS
from fedsafe_jax.models.attention import BACKENDS
from fedsafe_jax.models.quantize import KINDS as QUANTIZATIONS
from fedsafe_jax.pipeline.arms import ARMS, any_filter
from fedsafe_jax.pipeline.evaluation import tasks


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
        if value not in allowed:
            near = difflib.get_close_matches(str(value), allowed, 1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            names = ", ".join(name or "'' (none)" for name in allowed)
            raise ConfigError(f"{field}: '{value}' is not one of {names}.{hint}")


def _at_least(field: str, value: float, low: float) -> None:
    if value < low:
        raise ConfigError(f"{field}={value}: expected at least {low}.")


def validate(c: ml_collections.ConfigDict) -> None:
    """Checks every field against the others; files and models are checked where they are read.

    Raises:
      ConfigError: naming the field, what was found and what is expected.
    """

    for field in ("arms", "algorithms", "seeds"):
        value = c[field]
        if not isinstance(value, tuple | list) or not value or len(set(value)) != len(value):
            raise ConfigError(f"{field}={value!r}: expected a tuple of distinct values, not empty.")
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
    for field in (
        "rounds",
        "num_clients",
        "clients_per_round",
        "local_steps",
        "batch_size",
        "lora_rank",
        "model_parallel",
        "accumulation",
        "checkpoint_every",
    ):
        _at_least(field, c[field], 1)
    _at_least("seq_len", c.seq_len, 16)
    _validate_federated(c)
    if c.clients_per_round > c.num_clients:
        raise ConfigError(
            f"clients_per_round={c.clients_per_round} exceeds num_clients={c.num_clients}; "
            "lower it."
        )
    if not 0 <= c.harmful_share <= 1:
        raise ConfigError(f"harmful_share={c.harmful_share}: expected a share between 0 and 1.")
    training = [*c.safe_sources, *c.unsafe_sources, *c.filter.sources]
    for source in [*training, *c.cai.red_team_sources, *c.cai.benign_sources]:
        name, _, _ = sources.parse_source(source)
        if name in EVALUATION_ONLY:
            raise ConfigError(f"source '{source}': {name} is a benchmark and is never trained on.")


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
                f"eval.tasks: '{name}' is graded by a chat model; give eval.judge_url and "
                "eval.judge_model."
            )


def _validate_federated(c: ml_collections.ConfigDict) -> None:
    """Checks the fields of training, `federated` and `attack`."""
    f = c.federated
    for field in ("clip_norm", "noise_multiplier", "prox_mu", "byzantine"):
        _at_least(f"federated.{field}", f[field], 0)
    for field in (
        "gradient_clip",
        "size_sigma",
        "warmup_rounds",
        "chunk_clients",
        "checkpoint_keep",
    ):
        _at_least(field, c[field], 0)
    for field, value, most in (
        ("attack.clients", c.attack.clients, 1),
        ("attack.harmful_share", c.attack.harmful_share, 1),
        ("federated.dropout", f.dropout, 0.99),
        ("federated.stragglers", f.stragglers, 1),
        ("federated.trim_share", f.trim_share, 0.49),
    ):
        if not 0 <= value <= most:
            raise ConfigError(f"{field}={value}: expected a share between 0 and {most}.")
    if not 0 < f.topk_share <= 1:
        raise ConfigError(f"federated.topk_share={f.topk_share}: expected more than 0, at most 1.")
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
    if f.noise_multiplier:
        if importlib.util.find_spec("dp_accounting") is None:
            raise ConfigError(
                "federated.noise_multiplier: epsilon needs dp-accounting; pip install -e .[dp]"
            )
        if not 0 < f.delta < 1:
            raise ConfigError(f"federated.delta={f.delta}: expected between 0 and 1.")
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


def _validate_cai(c: ml_collections.ConfigDict) -> None:
    """Checks the fields of `cai`."""
    if c.revise == "wrong" and c.check == "none":
        raise ConfigError("cai.revise='wrong': cai.check='none' finds nothing wrong; use 'rules'.")
    if not c.losses or len(set(c.losses)) != len(c.losses):
        raise ConfigError(f"cai.losses={tuple(c.losses)}: expected distinct losses, at least one.")
    if len(c.weights) != len(c.losses) or min(c.weights) <= 0:
        raise ConfigError(
            f"cai.weights={tuple(c.weights)}: expected a positive weight for each of "
            f"cai.losses={tuple(c.losses)}."
        )
    positive = ("steps", "batch_size", "pairs_per_step", "red_team_prompts", "revision_rounds")
    for field in (*positive, "probe_prompts", "max_new_tokens"):
        _at_least(f"cai.{field}", c[field], 1)
    for field in ("benign_prompts", "replay_examples", "few_shots"):
        _at_least(f"cai.{field}", c[field], 0)
    if not 0 < c.target <= 100:
        raise ConfigError(f"cai.target={c.target}: expected a rate in percent, more than 0.")
    if not c.beta > 0:
        raise ConfigError(f"cai.beta={c.beta}: expected more than 0.")


def validate_filter(f: ml_collections.ConfigDict) -> None:
    """Checks the fields of `filter`, or those of `config.filter_config`.

    Raises:
      ConfigError: naming the field, what was found and what is expected.
    """
    _check_choices(f, "filter.")
    for field in set(f) & {"dtype", "quantization"}:
        _choice(field, (f[field],), choices()[field])
    if "model_parallel" in f:
        _at_least("model_parallel", f.model_parallel, 1)
    if FILTER_KINDS[f.kind].needs_model and not f.model and not f.load:
        raise ConfigError(
            f"filter.model: filter.kind='{f.kind}' needs the guard's folder or Hub id."
        )
    if f.unsafe_labels and not f.encoder:
        raise ConfigError("filter.unsafe_labels: they are labels of filter.encoder; give it.")
    shares = ("threshold", "validation_share", "precision_floor", "unsafe_share")
    for field in (*shares, "simulated_recall", "hard_negatives"):
        whole = field in ("simulated_recall", "hard_negatives") and f[field] == 1
        if not 0 <= f[field] < 1 and not whole:
            raise ConfigError(f"filter.{field}={f[field]}: expected a share between 0 and 1.")
    if not 0 < f.simulated_precision <= 1:
        raise ConfigError(
            f"filter.simulated_precision={f.simulated_precision}: expected more than 0, at most 1."
        )
    _at_least("filter.epochs", f.epochs, 0)
    for field in ("batch_size", "patience", "lora_rank"):
        _at_least(f"filter.{field}", f[field], 1)
    _at_least("filter.max_length", f.max_length, 16)


def storage_errors() -> tuple[type[Exception], ...]:
    """Returns the exception types of storage that may answer later: one line, not wrong input."""
    from fedsafe_jax.runtime.checkpoint import CheckpointError

    return (CheckpointError,)


def input_errors() -> tuple[type[Exception], ...]:
    """Returns the exception types of wrong input: reported as one line, without a traceback."""
    from fedsafe_jax.aot.targets import TargetError
    from fedsafe_jax.cai.constitution import ConstitutionError
    from fedsafe_jax.data.examples import SourceError
    from fedsafe_jax.data.partition import PartitionError
    from fedsafe_jax.evals.judges import EndpointError
    from fedsafe_jax.filters.protocol import FilterError
    from fedsafe_jax.models.hub import ModelError
    from fedsafe_jax.runtime.cluster import ClusterError
    from fedsafe_jax.runtime.run_files import WorkdirError

    data = ConstitutionError, PartitionError, SourceError, TaskError, WorkdirError
    return *data, ClusterError, EndpointError, FilterError, ModelError, TargetError
