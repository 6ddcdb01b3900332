"""The contract of an evaluation: what a task loads, asks, scores and shows.

A task is one file that makes a `Task` and puts it on the registry of its room, such as
`evals.tasks.TASKS`. Everything else reads the contract: inputs, removal of overlaps, the round
loop, `results.json`, the table, figures, report, model card, dry run and `fedsafe evaluate`.
"""

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fedsafe_jax.data.examples import Example
from fedsafe_jax.evals import judges
from fedsafe_jax.evals.judges import Judge
from fedsafe_jax.random_streams import Purpose, generator

SUBSET_SEED = 2025  # the evaluation sets are the same for every seed of a run
HELDOUT = "heldout"  # source of the pairs that a run holds out from its clients' data
TRIGGER = "trigger"  # what is behind the name of a set whose requests end with one
UNDEFINED = "n/a"  # a figure without a value, such as precision where nothing was flagged
ARROWS = {"up": "\u2191", "down": "\u2193"}


class TaskError(ValueError):
    """A task cannot be run as asked; the message names the task."""


class Column(NamedTuple):
    """A figure of a task, as tables and charts show it.

    Attributes:
      title: what is measured, such as "harmful refused".
      field: its key in the summary; a column without a value in any arm is not shown.
      better: which way is better, "up" or "down".
      digits: decimals shown.
      unit: "%" for a rate between 0 and 100, drawn as bars; "" for any other number.
      interval: key of its 95% interval in the summary.
      own_title: title where the task reads its default source, such as "AdvBench refused"; "" for
        `title`.
    """

    title: str
    field: str
    better: str
    digits: int = 1
    unit: str = "%"
    interval: str = "ci95"
    own_title: str = ""

    @property
    def header(self) -> str:
        """Title, unit and an arrow towards better, such as "HHH % \u2191"."""
        return " ".join(filter(None, (self.title, self.unit, ARROWS[self.better])))

    @property
    def label(self) -> str:
        """Title and unit, as axes and lists show them."""
        return ", ".join(filter(None, (self.title, self.unit)))

    def cell(self, summary: Mapping) -> str:
        """Returns the value with its interval, such as "63.7 (59.0-68.1)"; "" without a value, and
        "n/a" for one that is not defined."""
        if self.field not in summary:
            return ""
        if summary[self.field] is None:
            return UNDEFINED
        low, high = (f"{x:.{self.digits}f}" for x in summary[self.interval])
        return f"{summary[self.field]:.{self.digits}f} ({low}-{high})"

    def difference(self, gap: Mapping) -> str:
        """Returns a difference of `comparison.differences` with its interval, such as "-2.3 (-5.4,
        +0.8)"."""
        if gap["difference"] is None:
            return UNDEFINED
        mean, low, high = (f"{x:+.{self.digits}f}" for x in (gap["difference"], *gap["ci95"]))
        return f"{mean} ({low}, {high})"


class EvalOptions(NamedTuple):
    """Sizes and judges of an evaluation.

    Attributes:
      max_new_tokens: longest answer, in tokens.
      max_length: longest dialogue that is scored, in tokens.
      batch_size: prompts answered at once.
      judges: judges of the answers; the first that measures what a task asks is its headline.
      base: the base model, whose answers judges of preference compare with, and tasks that
        `reads_base` its distributions; None for none.
      temperature: temperature of the answers; 0 for greedy.
      samples: answers to each prompt.
      system: system prompt of dialogues that have none; "" for none.
      prefix: text that every answer begins with, as an attacker would force it; "" for none.
      encoder: folder of a sentence encoder, for tasks that `reads_encoder`; "" for none.
      guarded: puts a model under guards, for the sets that are asked so; None without.
      guarded_by: gives a hash of the guards, by which answers that were kept are known again.
    """

    max_new_tokens: int = 64
    max_length: int = 256
    batch_size: int = 64
    judges: tuple[Judge, ...] = judges.make(judges.DEFAULT)
    base: Any = None
    temperature: float = 0.0
    samples: int = 1
    system: str = ""
    prefix: str = ""
    encoder: str = ""
    guarded: Callable[[Any], Any] | None = None
    guarded_by: Callable[[], str] = str  # which gives ""

    def judges_of(self, task: "Task") -> tuple[Judge, ...]:
        """Returns the judges that measure what a task asks, the headline's first."""
        return tuple(judge for judge in self.judges if judge.measures in task.measures)


class Task(NamedTuple):
    """An evaluation.

    Attributes:
      name: key in `results.json`.
      version: raised when scoring changes, as figures of two versions cannot be compared.
      title: what the items are, such as "harmful prompts".
      source: where the items come from unless the config says otherwise.
      columns: figures shown; the first one is the headline.
      load: `(source, data_dir) -> items`.
      prompts: `items -> texts` that no training example may be near.
      run: `(lm, items, options) -> outcomes`, a JSON-ready dict with a value for every item, for
        what needs no generated answers; None for nothing.
      ask: `(lm, items, options) -> rows`, answers that are generated, see `answers.ask`; None for a
        task that only scores given ones.
      score: `(rows, options) -> outcomes`, of the rows that `ask` gave, with their verdicts.
      measures: what judges of the answers may measure, such as `(REFUSAL, HARM)`; () for a task
        whose answers no judge reads.
      optional: whether `ask` is left out, instead of being an error, where no judge measures that.
      summarise: `(outcomes by seed, options) -> {field: value, interval: [low, high], ...}`.
      values: `(outcome, options) -> {field of a column: value of each item}`: bool or from 0 to 1
        for a rate in percent, float for another figure, None for an item without a value. Arms are
        compared by them, item by item; None for a task whose arms are not compared.
      beside: names of tasks without one of which this one is never shown, the best match first,
        such as over-refusal for refusal; () for none. The first column of both is the side that
        `two_sides` shows.
      reads_base: whether `run` compares with a base: that of the options, or the model without its
        adapter.
      reads_encoder: whether texts are compared by the encoder of the options, where there is one.
    """

    name: str
    version: int
    title: str
    source: str
    columns: tuple[Column, ...]
    load: Callable[[str, str], list]
    prompts: Callable[[list], list[str]]
    summarise: Callable[[Sequence[dict], EvalOptions], dict]
    run: Callable[[Any, list, EvalOptions], dict] | None = None
    ask: Callable[[Any, list, EvalOptions], list[dict]] | None = None
    score: Callable[[list[dict], EvalOptions], dict] | None = None
    values: Callable[[dict, EvalOptions], dict[str, Sequence]] | None = None
    measures: tuple[str, ...] = ()
    optional: bool = False
    beside: tuple[str, ...] = ()
    reads_base: bool = False
    reads_encoder: bool = False

    @property
    def generates(self) -> bool:
        """Whether answers are always generated; a task that scores given ones is cheaper."""
        return self.ask is not None and not self.optional


class EvalSet(NamedTuple):
    """A task with its items.

    Attributes:
      task: the task.
      source: where its items come from.
      items: the items; () before they are loaded.
      under: the guards that the model is under, such as "budget"; "" for the model itself.
      triggered: whether each request ends with the trigger of a backdoor.
      told_apart: what its titles say besides, where another set of the run has the same ones; "".
    """

    task: Task
    source: str
    items: Sequence = ()
    under: str = ""
    triggered: bool = False
    told_apart: str = ""

    @property
    def columns(self) -> tuple[Column, ...]:
        """The task's columns, under the titles that this source and the guards deserve."""
        said = (self.told_apart, "trigger" if self.triggered else "", self.under)
        special = ", ".join(filter(None, said))
        columns, behind = self.task.columns, f" ({special})" if special else ""
        if self.source == self.task.source:
            columns = tuple(c._replace(title=c.own_title or c.title) for c in columns)
        return tuple(c._replace(title=f"{c.title}{behind}") for c in columns)


def under_guards(sets: Mapping[str, EvalSet], guards: str) -> dict[str, EvalSet]:
    """Returns the sets, and those that generate answers a second time, under guards.

    Args:
      sets: the sets by name.
      guards: what the guards are called, such as "budget"; "" for none.
    """
    again = {
        f"{name}@{guards}": one._replace(under=guards)
        for name, one in sets.items()
        if guards and one.task.generates
    }
    return {**sets, **again}


def behind_trigger(sets: Mapping[str, EvalSet]) -> dict[str, EvalSet]:
    """Returns the sets, and those that measure refusal a second time, with the trigger.

    Args:
      sets: the sets by name, not loaded yet.
    """
    again = {
        f"{name}@{TRIGGER}": one._replace(triggered=True)
        for name, one in sets.items()
        if one.task.generates and judges.REFUSAL in one.task.measures
    }
    return {**sets, **again}


def select(entries: Sequence[str], tasks: Mapping[str, Task]) -> dict[str, EvalSet]:
    """Chooses tasks by the words of a config or command line.

    Args:
      entries: "name" or "name=source" each. A task that is named with a second source gets a second
        name, such as "hhh_2".
      tasks: the registry.

    Returns:
      Sets without items, by their name in the results.

    Raises:
      TaskError: an unknown task, the same entry twice, or a task without the one it is shown with.
    """
    chosen: dict[str, EvalSet] = {}
    for entry in entries:
        name, _, source = str(entry).partition("=")
        if name not in tasks:
            raise TaskError(f"'{name}': no such task; expected some of {', '.join(tasks)}.")
        _check(name, tasks[name])
        one = EvalSet(tasks[name], source or tasks[name].source)
        if one in chosen.values():
            raise TaskError(f"'{entry}' is there twice.")
        number = 1 + sum(other.task.name == name for other in chosen.values())
        chosen[name if number == 1 else f"{name}_{number}"] = one
    names = {one.task.name for one in chosen.values()}
    for one in chosen.values():
        if one.task.beside and not names & set(one.task.beside):
            best, *others = one.task.beside
            also = f" ({' or '.join(map(repr, others))} will do, too)" if others else ""
            raise TaskError(
                f"'{one.task.name}' is never shown without '{best}'; add '{best}', or "
                f"'{best}=SOURCE'{also}."
            )
    titles = collections.Counter(one.columns[0].title for one in chosen.values())
    return {
        name: one._replace(told_apart=name) if titles[one.columns[0].title] > 1 else one
        for name, one in chosen.items()
    }


def _check(name: str, task: Task) -> None:
    """Finds the mistakes in a task that would show at the end of a run otherwise."""
    if task.name != name:
        raise TaskError(f"'{name}': the task calls itself '{task.name}'; both must be the same.")
    if not task.columns:
        raise TaskError(f"'{name}': a task needs at least one column.")
    if task.run is None and (task.ask is None or task.score is None):
        raise TaskError(f"'{name}': a task needs run, or ask with score.")
    if isinstance(task.beside, str):
        raise TaskError(f"'{name}': beside={task.beside!r}; write a tuple of names of tasks.")
    for column in task.columns:
        if column.better not in ARROWS:
            raise TaskError(
                f"'{name}': column '{column.title}' has better={column.better!r}; expected "
                f"{' or '.join(ARROWS)}."
            )


def check_judges(sets: Mapping[str, EvalSet], specs: Sequence[str]) -> None:
    """Checks that some judge measures what each task asks.

    Args:
      sets: the chosen sets by name.
      specs: specs of the judges.

    Raises:
      TaskError: a task has no judge; the message says what would do.
      JudgeError: a spec is wrong.
    """
    measured = {judges.measures(spec) for spec in specs}
    for name, one in sets.items():
        task = one.task
        if task.measures and not task.optional and not measured & set(task.measures):
            raise TaskError(
                f"'{name}' needs a judge of {' or '.join(task.measures)}, such as "
                f"{judges.EXAMPLES[task.measures[0]]}; the judges are {', '.join(specs)}."
            )


def load_items(name: str, chosen: EvalSet, data_dir: str, count: int) -> EvalSet:
    """Returns a set with its items, at most `count` (0: all).

    Args:
      name: name of the set in the results.
      chosen: the set without items.
      data_dir: folder that the source is relative to, or "hub".
      count: most items.

    Raises:
      TaskError: the source holds no item.
      SourceError: the source cannot be read.
    """
    items = subset(chosen.task.load(chosen.source, data_dir), count)
    if not items:
        raise TaskError(f"'{name}': {chosen.source} holds no item.")
    return chosen._replace(items=items)


def request_texts(requests: Iterable[Example]) -> list[str]:
    """Returns what training must not come near: each request, and each turn of a user before it."""
    texts = []
    for request in requests:
        texts.append(request.dialogue)
        if len(request.messages) > 1:
            texts += [text for role, text in request.messages if role == "user"]
    return texts


def subset(items: list, count: int, purpose: Purpose = Purpose.EVALUATION) -> list:
    """Returns at most `count` items (0: all), drawn by a fixed seed and kept in order.

    Args:
      items: items to draw from.
      count: most items.
      purpose: stream of the draw.
    """
    if not count or len(items) <= count:
        return items
    order = generator(purpose, SUBSET_SEED).permutation(len(items))[:count]
    return [items[i] for i in sorted(order)]
