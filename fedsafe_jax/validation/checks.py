"""Checks of a config before any compute; every message names the field."""

import datetime
import json
from collections.abc import Sequence

import ml_collections

from fedsafe_jax.cai.losses import KL
from fedsafe_jax.cai.revise import DATA, parse_check
from fedsafe_jax.cai.schedule import SCHEDULES
from fedsafe_jax.config import ConfigError, check_override, default_config, unsafe_sources
from fedsafe_jax.data import labelled_answers, named_templates, sources
from fedsafe_jax.data.chat_template import ChatTemplateError
from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.data.readers import EVALUATION_ONLY
from fedsafe_jax.evals import judges
from fedsafe_jax.evals.judges import JudgeError
from fedsafe_jax.evals.task import TaskError, check_judges, select
from fedsafe_jax.filters.actions import ACTIONS
from fedsafe_jax.filters.kinds import FILTER_KINDS
from fedsafe_jax.filters.requests import READS
from fedsafe_jax.filters.rewriting import DEBIAS
from fedsafe_jax.guarding.contract import GuardError
from fedsafe_jax.guarding.spec import GuardSpec
from fedsafe_jax.pipeline.arms import any_filter
from fedsafe_jax.pipeline.evaluation import tasks
from fedsafe_jax.validation.federated import validate_federated
from fedsafe_jax.validation.fields import check_choice, check_choices, check_values, choices


def validate(c: ml_collections.ConfigDict) -> None:
    """Checks every field against the others; files and models are checked where they are read.

    Raises:
      ConfigError: naming the field, what was found and what is expected.
    """

    for field in ("arms", "algorithms", "seeds"):
        value = c[field]
        if not isinstance(value, tuple | list) or not value or len(set(value)) != len(value):
            raise ConfigError(f"{field}={value!r}: expected a tuple of distinct values, not empty.")
    check_values(c)
    check_choices(c)
    _validate_cai(c.cai)
    validate_filter(c.filter)
    if parse_check(c.cai.check).judge:
        judging = FILTER_KINDS[c.filter.kind].make is not None and any_filter(c)
        if not judging:
            raise ConfigError(
                f"cai.check='{c.cai.check}': no filter is trained; add 'fl+filter' or "
                "'fl+filter+cai' to arms, with a filter that is not simulated, or use 'start'."
            )
    _validate_eval(c.eval)
    _validate_chat(c)
    validate_federated(c)
    if c.clients_per_round > c.num_clients:
        raise ConfigError(
            f"clients_per_round={c.clients_per_round} exceeds num_clients={c.num_clients}; "
            "lower it."
        )
    _check_sources("safe_sources", c.safe_sources)
    _check_sources("unsafe_sources", unsafe_sources(c))
    _check_sources("heldout_sources", c.heldout_sources, trained=False)
    for field in ("red_team_sources", "benign_sources", "harmless_sources"):
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
    try:
        if not c.judges:
            raise JudgeError("give at least one, such as 'rules'.")
        judges.make(c.judges)
    except JudgeError as error:
        raise ConfigError(f"eval.judges: {error}") from None
    try:
        for source in c.labels:
            labelled_answers.parse(source)
    except SourceError as error:
        raise ConfigError(f"eval.labels: {error}") from None
    if c.samples > 1 and not c.temperature:
        raise ConfigError(
            f"eval.samples={c.samples}, eval.temperature=0: greedy answers are all the same; set a "
            "temperature, or eval.samples=1."
        )
    try:
        GuardSpec(c.decoding, c.guard, c.guardian, c.critic).check()
    except (GuardError, JudgeError) as error:
        raise ConfigError(f"eval: {error}") from None
    try:
        chosen = select(c.tasks, tasks())
        check_judges(chosen, c.judges)
    except TaskError as error:
        raise ConfigError(f"eval.tasks: {error}") from None
    if c.encoder and not any(one.task.reads_encoder for one in chosen.values()):
        readers = ", ".join(name for name, task in tasks().items() if task.reads_encoder)
        raise ConfigError(f"eval.encoder: no task of eval.tasks reads it; add some of {readers}.")


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


def _validate_cai(c: ml_collections.ConfigDict) -> None:
    """Checks the fields of `cai`."""
    if c.check == "both":
        raise ConfigError("cai.check='both': write which judge, such as 'start+filter'.")
    if spec := parse_check(c.check).refusal:
        _check_judge("cai.check", spec, others="; or 'filter', 'start+filter', 'none'")
    _check_judge("cai.probe_judge", c.probe_judge)
    if not c.refusal_word.strip():
        raise ConfigError(
            f"cai.refusal_word='{c.refusal_word}': expected a word, such as ' Sorry': its first "
            "token is what harmful answers turn to."
        )
    if c.revise == "wrong" and c.check == "none":
        raise ConfigError("cai.revise='wrong': cai.check='none' finds nothing wrong; use 'start'.")
    if c.replace_dropped and c.check == "none":
        raise ConfigError("cai.replace_dropped: cai.check='none' drops nothing; use 'start'.")
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
    if KL in c.losses and len(c.losses) == 1:
        raise ConfigError(
            f"cai.losses={tuple(c.losses)}: '{KL}' keeps the model what it is; add a loss that "
            "learns the revisions, such as 'sft'."
        )
    if KL in c.losses and not c.replay_examples:
        raise ConfigError(
            f"cai.losses={tuple(c.losses)}: '{KL}' holds the model on replayed pairs, and "
            "cai.replay_examples=0 replays none; set it to 1 or more."
        )


def _check_judge(field: str, spec: str, others: str = "") -> None:
    """Checks that a field names a judge of refusal."""
    try:
        if judges.measures(spec) != judges.REFUSAL:
            raise JudgeError(f"judge '{spec}' does not tell refusals; use 'start' or 'rules'.")
    except JudgeError as error:
        raise ConfigError(f"{field}='{spec}': {error}{others}") from None


def validate_filter(f: ml_collections.ConfigDict) -> None:
    """Checks the fields of `filter`, or those of `config.filter_config`.

    Raises:
      ConfigError: naming the field, what was found and what is expected.
    """
    check_values(f, "filter.")
    check_choices(f, "filter.")
    for field in set(f) & {"dtype", "quantization"}:
        check_choice(field, (f[field],), choices()[field])
    if "reads" in f:
        check_choice("reads", (f.reads,), READS)
    _check_judge("filter.judge", f.judge)
    _check_sources("filter.sources", f.sources)
    if FILTER_KINDS[f.kind].needs_model and not f.model and not f.load:
        raise ConfigError(
            f"filter.model: filter.kind='{f.kind}' needs the guard's folder or Hub id."
        )
    if f.unsafe_labels and not f.encoder:
        raise ConfigError("filter.unsafe_labels: they are labels of filter.encoder; give it.")
    if f.instruction and f.rewrite != DEBIAS:
        raise ConfigError(
            f"filter.instruction='{f.instruction}': filter.rewrite='{f.rewrite}' asks for nothing "
            f"of it; set filter.rewrite='{DEBIAS}', or leave the instruction out."
        )
    if f.rewrite == DEBIAS:
        _validate_debias(f)


def _validate_debias(f: ml_collections.ConfigDict) -> None:
    """Checks that there are answers to rewrite, and a filter that accepts them."""
    field, kind = f"filter.rewrite='{DEBIAS}'", FILTER_KINDS[f.kind]
    if not ACTIONS[f.action].needs_answers:
        raise ConfigError(
            f"{field}: filter.action='{f.action}' writes no answers; use filter.action='rewrite'."
        )
    if kind.writes_answers:
        raise ConfigError(
            f"{field}: filter.kind='{f.kind}' writes its own answers, and the base model none; use "
            "'guard' or 'classifier', or leave filter.rewrite at its default."
        )
    if kind.make is None:
        raise ConfigError(
            f"{field}: filter.kind='{f.kind}' scores no new answer, so that none is accepted; use "
            "'classifier' or 'guard'."
        )
