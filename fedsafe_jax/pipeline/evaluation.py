"""The tasks of a run: which ones, their items, outcomes of an arm, and the summary over seeds."""

import functools
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence

from ml_collections import ConfigDict

from fedsafe_jax import evals
from fedsafe_jax.data import labelled_answers
from fedsafe_jax.data.examples import Example
from fedsafe_jax.data.poisoning import POISONS, with_trigger
from fedsafe_jax.evals import answers, calibration, judges
from fedsafe_jax.evals.judges import Tools
from fedsafe_jax.evals.judges.endpoint import KEY, EndpointError
from fedsafe_jax.evals.task import (
    HELDOUT,
    EvalOptions,
    EvalSet,
    Task,
    behind_trigger,
    load_items,
    select,
    subset,
    under_guards,
)
from fedsafe_jax.guarding.guarded_model import Guards, guard_model
from fedsafe_jax.guarding.spec import GuardSpec
from fedsafe_jax.inference.language_model import LanguageModel
from fedsafe_jax.inference.pretrained import load_pretrained
from fedsafe_jax.runtime import multihost

Rows = list[dict]  # see `evals.answers`


class AnswerStore:
    """What keeps the answers of an evaluation; this one, the interface, keeps none."""

    def read(self, name: str, key: dict) -> Rows | None:
        """Returns the rows of a set that were written under the same key; None without."""
        del name, key
        return None

    def write(self, name: str, key: dict, rows: Rows) -> None:
        """Writes the rows of a set; in the first process."""


ROOMS: tuple[dict[str, Task], ...] = (evals.TASKS,)  # each room that has tasks


def tasks() -> dict[str, Task]:
    """Joins the registries of all rooms that have tasks."""
    return {name: task for room in ROOMS for name, task in room.items()}


def chosen_sets(config: ConfigDict) -> dict[str, EvalSet]:
    """Returns the sets that `eval.tasks` names, without items.

    Raises:
      TaskError: see `evals.task.select`.
    """
    chosen = select(config.eval.tasks, tasks())
    if is_triggered(config):
        chosen = behind_trigger(chosen)
    return under_guards(chosen, guard_spec(config).label)


def is_triggered(config: ConfigDict) -> bool:
    """Returns whether clients plant a backdoor, so that its trigger is asked too."""
    return bool(config.attack.clients) and POISONS[config.attack.data].triggered


def guard_spec(config: ConfigDict) -> GuardSpec:
    """Returns the guards that a config names."""
    c = config.eval
    return GuardSpec(c.decoding, c.guard, c.guardian, c.critic)


def load_sets(config: ConfigDict, heldout: Sequence[Example]) -> dict[str, EvalSet]:
    """Loads the items of the sets that the config names.

    Args:
      config: config of the run.
      heldout: pairs held out from the clients' data, for tasks whose source is `HELDOUT`.

    Returns:
      The sets by name; where nothing is held out, a set that reads it is left out.
    """
    c, loaded = config.eval, {}
    for name, chosen in chosen_sets(config).items():
        if chosen.source != HELDOUT:
            one = load_items(name, chosen, config.data_dir, c.max_prompts)
            loaded[name] = _triggered(one, config.attack.trigger) if one.triggered else one
        elif items := subset([e for e in heldout if e.response], c.max_heldout):
            one = chosen._replace(items=items)
            loaded[name] = _triggered(one, config.attack.trigger) if one.triggered else one
        else:
            logging.warning("task '%s' is left out: no pair with an answer is held out.", name)
    return loaded


def _triggered(one: EvalSet, trigger: str) -> EvalSet:
    """Returns a set each of whose requests ends with a trigger."""
    return one._replace(
        items=[item._replace(messages=with_trigger(item.messages, trigger)) for item in one.items]
    )


def judge_tools(config: ConfigDict) -> Tools:
    """Returns what the judges of a run need."""
    return Tools(
        load_model=functools.partial(load_pretrained, dtype=config.dtype),
        cache=config.eval.judge_cache,
        api_key=os.environ.get(KEY, ""),
        concurrent=config.eval.judge_concurrent,
    )


def options_of(config: ConfigDict, base: LanguageModel | None = None) -> EvalOptions:
    """Returns the sizes and judges that the config asks for; no judge's model is loaded yet.

    Args:
      config: config of the run.
      base: the base model, for judges of preference.
    """
    c, tools, spec = config.eval, judge_tools(config), guard_spec(config)
    return EvalOptions(
        max_new_tokens=c.max_new_tokens,
        max_length=c.max_length,
        batch_size=c.batch_size,
        judges=judges.make(c.judges, tools),
        base=base,
        temperature=c.temperature,
        samples=c.samples,
        system=c.system,
        prefix=c.prefix,
        encoder=c.encoder,
        guarded=guarding(spec, tools.load_model) if spec.label else None,
        guarded_by=functools.cache(lambda: spec.fingerprint),
    )


def guarding(spec: GuardSpec, load_model: Callable[[str], LanguageModel]) -> Callable:
    """Returns what puts a model under guards, which are loaded when the first one is.

    Args:
      spec: the guards.
      load_model: loads a language model by path or Hub id.
    """

    @functools.cache
    def loaded() -> Guards:
        return spec.load(load_model)

    return lambda lm: guard_model(lm, loaded())


def evaluate(
    lm: LanguageModel,
    sets: Mapping[str, EvalSet],
    options: EvalOptions,
    kept: AnswerStore | None = None,
) -> dict:
    """Runs every task on a model; all processes call this.

    Answers are kept before they are judged: where a judge fails, they are not generated again.

    Args:
      lm: the model, under its adapter.
      sets: the sets with their items, by name.
      options: sizes and judges.
      kept: what keeps the answers; None to keep none.

    Returns:
      The outcomes by the name of the set, ready for JSON; those of generated answers are the first
      process's alone.

    Raises:
      EndpointError: a judge does not answer now; what it has said is kept, and is not asked again.
      JudgeError: a judge failed on all answers of a task.
    """
    outcomes, kept = {}, kept or AnswerStore()
    for name, one in sets.items():
        multihost.barrier("task")  # the processes may generate together
        outcomes[name] = _outcome(lm, one, options, name=name, kept=kept)
    return outcomes


def _outcome(
    lm: LanguageModel, one: EvalSet, options: EvalOptions, name: str, kept: AnswerStore
) -> dict:
    task = one.task
    outcome = {} if task.run is None else task.run(lm, one.items, options)
    judged_by = options.judges_of(task)
    if task.ask is None or (task.optional and not judged_by):
        return outcome
    key = {"task": task.name, "version": task.version, "prompts": answers.hash_of(one.items)}
    if one.under:
        key["guarded_by"] = options.guarded_by()
    rows = multihost.first(lambda: kept.read(name, key))
    if not multihost.broadcast_bool(rows is not None):
        rows = _ask(lm, one, options)
        multihost.first(lambda: kept.write(name, key, rows))

    def scored() -> dict:
        if not task.measures or not rows:
            return task.score(rows, options)
        judged, problems = answers.judge(rows, judged_by)
        kept.write(name, key, judged)
        if problems:
            raise EndpointError("; ".join(problems.values()))
        answers.check(judged, judged_by)
        for spec, count in answers.failures(judged, judged_by).items():
            logging.warning("task '%s': judge '%s' failed on %d answers", name, spec, count)
        return task.score(judged, options)

    if one.under and rows:
        outcome["guards"] = rows[0]["guards"]
    return outcome | (multihost.first(scored) or {})


def _ask(lm: LanguageModel, one: EvalSet, options: EvalOptions) -> Rows:
    """Returns the rows of a set; the first one also says what guards did, and in how long."""
    if not one.under:
        return one.task.ask(lm, one.items, options)
    guarded, began = options.guarded(lm), time.monotonic()
    rows = one.task.ask(guarded, one.items, options)
    if rows:
        counts = guarded.record.take()._asdict()
        rows[0] = rows[0] | {"guards": counts | {"seconds": time.monotonic() - began}}
    return rows


def summarise(
    sets: Mapping[str, EvalSet], outcomes: Sequence[dict], options: EvalOptions
) -> dict[str, dict]:
    """Summarises the outcomes of `evaluate`, a dict for each seed over the same items.

    Returns:
      By the name of the set what `Task.summarise` returns: rates in percent with 95% intervals.
    """
    return {
        name: one.task.summarise([outcome[name] for outcome in outcomes], options)
        | _guards_of([outcome[name] for outcome in outcomes])
        for name, one in sets.items()
    }


def _guards_of(outcomes: Sequence[dict]) -> dict:
    """Returns what guards did over all seeds, {} without any."""
    known = [outcome["guards"] for outcome in outcomes if "guards" in outcome]
    return {"guards": {name: sum(one[name] for one in known) for name in known[0]}} if known else {}


def measured_judges(
    config: ConfigDict, options: EvalOptions
) -> dict[str, dict[str, calibration.Counts]]:
    """Measures the judges of refusal against human labels.

    Returns:
      Counts by judge and labelled model: on the answers of `eval.labels`, or those that are
      packaged.

    Raises:
      SourceError: a source of labelled answers cannot be read.
    """
    if not config.eval.labels:
        return calibration.packaged([judge.spec for judge in options.judges])
    rows = [
        row
        for source in config.eval.labels
        for row in labelled_answers.read(source, config.data_dir)
    ]
    return calibration.measure(options.judges, rows)


def probe(
    lm: LanguageModel, sets: Mapping[str, EvalSet], count: int, options: EvalOptions
) -> dict[str, float]:
    """Returns the headline figure of every task on its first `count` items, for curves by round.

    Judges that need a model are left out, and the tasks that only such judges read: a run asks them
    once, at its end.
    """
    quick = tuple(judge for judge in options.judges if judge.phrases)
    options, figures = options._replace(judges=quick or judges.make(("rules",))), {}
    for name, one in sets.items():
        if one.task.measures and not one.task.optional and not options.judges_of(one.task):
            continue
        first = {name: one._replace(items=one.items[:count])}
        outcome = evaluate(lm, first, options)
        figures[name] = multihost.first(functools.partial(_headline, first, outcome, options))
    return figures


def _headline(sets: Mapping[str, EvalSet], outcome: dict, options: EvalOptions) -> float | None:
    """Returns the headline figure of the only set."""
    ((name, one),) = sets.items()
    return summarise(sets, [outcome], options)[name].get(one.task.columns[0].field)
