"""The tasks of a run: which ones, their items, outcomes of an arm, and the summary over seeds."""

import logging
from collections.abc import Callable, Mapping, Sequence

from ml_collections import ConfigDict

from fedsafe_jax import evals
from fedsafe_jax.data.examples import Example
from fedsafe_jax.evals.judges import ChatEndpoint, EndpointError
from fedsafe_jax.evals.task import (
    HELDOUT,
    EvalOptions,
    EvalSet,
    Task,
    load_items,
    select,
    subset,
)
from fedsafe_jax.inference.language_model import LanguageModel
from fedsafe_jax.pipeline.unfinished import Unfinished
from fedsafe_jax.runtime import multihost

STOPPED = "the first process has stopped; it says why."
ROOMS: tuple[dict[str, Task], ...] = (evals.TASKS,)  # each room that has tasks


def tasks() -> dict[str, Task]:
    """Joins the registries of all rooms that have tasks."""
    return {name: task for room in ROOMS for name, task in room.items()}


def chosen_sets(config: ConfigDict) -> dict[str, EvalSet]:
    """Returns the sets that `eval.tasks` names, without items.

    Raises:
      TaskError: see `evals.task.select`.
    """
    return select(config.eval.tasks, tasks())


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
            loaded[name] = load_items(name, chosen, config.data_dir, c.max_prompts)
        elif items := subset([e for e in heldout if e.response], c.max_heldout):
            loaded[name] = chosen._replace(items=items)
        else:
            logging.warning("task '%s' is left out: no pair with an answer is held out.", name)
    return loaded


def options_of(
    config: ConfigDict, endpoint: Callable | None = None, base: LanguageModel | None = None
) -> EvalOptions:
    """Returns the sizes and judges that the config asks for.

    Args:
      config: config of the run.
      endpoint: see `endpoint_of`.
      base: the base model, for comparisons by the endpoint.
    """
    c = config.eval
    return EvalOptions(
        max_new_tokens=c.max_new_tokens,
        max_length=c.max_length,
        batch_size=c.batch_size,
        judge=c.judge,
        endpoint=endpoint,
        base=base,
    )


def endpoint_of(config: ConfigDict, together: bool, kept: Unfinished) -> Callable | None:
    """Returns the chat model that judges answers; None where the config names none.

    Only the first process asks it: in the others it is None, or waits for the first one's replies.

    Args:
      config: config of the run.
      together: whether all processes generate together; see `_asked_by_first`.
      kept: keeps the replies.
    """
    c = config.eval
    if not c.judge_url:
        return None
    endpoint = kept.keeping(ChatEndpoint.from_environment(c.judge_url, c.judge_model))
    if together:
        return _asked_by_first(endpoint)
    return endpoint if multihost.is_primary() else None


def _asked_by_first(endpoint: Callable) -> Callable:
    """Returns an endpoint that the first process asks, and for whose replies the others wait.

    For models that all processes generate with together: the processes must call the same programs,
    so each of them goes through a task as if it had the replies. Those of the others are "".
    """

    def ask(messages: Sequence[dict]) -> str:
        reply, failure = "", None
        if multihost.is_primary():
            try:
                reply = endpoint(messages)
            except EndpointError as error:
                failure = error
        if multihost.broadcast_bool(failure is not None):
            raise failure or EndpointError(STOPPED)
        return reply

    return ask


def evaluate(
    lm: LanguageModel,
    sets: Mapping[str, EvalSet],
    options: EvalOptions,
    kept: Unfinished | None = None,
) -> dict:
    """Runs every task on a model.

    Args:
      lm: the model, under its adapter.
      sets: the tasks with their items, by name.
      options: sizes and judges.
      kept: what an earlier process knew of this evaluation, whose tasks are not run again; it
        receives what is known now, also where the judge does not answer. None to keep nothing.

    Returns:
      The outcomes by the name of the set, ready for JSON; {} in other processes than the first for
      a task that is not run again.

    Raises:
      EndpointError: the judge does not answer.
    """
    outcomes = {}
    for name, one in sets.items():
        known = kept.outcomes.get(name) if kept else None
        if multihost.broadcast_bool(known is not None):
            outcomes[name] = known or {}
            continue
        failure = None
        try:  # the processes may generate together
            outcomes[name] = one.task.run(lm, one.items, options)
        except EndpointError as error:
            failure = error
            if kept:
                kept.write()
        if multihost.broadcast_bool(failure is not None):
            raise failure or EndpointError(STOPPED)
        if kept:
            kept.add(name, outcomes[name])
    return outcomes


def summarise(
    sets: Mapping[str, EvalSet], outcomes: Sequence[dict], options: EvalOptions
) -> dict[str, dict]:
    """Summarises the outcomes of `evaluate`, a dict for each seed over the same items.

    Returns:
      By the name of the set what `Task.summarise` returns: rates in percent with 95% intervals.
    """
    return {
        name: one.task.summarise([outcome[name] for outcome in outcomes], options)
        for name, one in sets.items()
    }


def probe(
    lm: LanguageModel, sets: Mapping[str, EvalSet], count: int, options: EvalOptions
) -> dict[str, float]:
    """Returns the headline figure of every task on its first `count` items, for curves by round.

    Tasks that need an endpoint are left out: a run asks it once, at its end.
    """
    figures = {}
    for name, one in sets.items():
        if not one.task.needs_endpoint:
            outcome = one.task.run(lm, one.items[:count], options)
            headline = one.task.columns[0].field
            figures[name] = one.task.summarise([outcome], options)[headline]
    return figures
