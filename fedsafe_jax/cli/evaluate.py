"""Evaluates any model folder or Hub id, with or without an adapter.

    fedsafe evaluate [--model=FOLDER] [--adapter=FOLDER] [--tasks=TASK=SOURCE,...] [--output=FILE]
    fedsafe evaluate [--model=FOLDER] --prompts=FILE [--column=NAME] [--output=FILE.json]
    fedsafe evaluate ... --export=inspect,lm_eval --export_dir=FOLDER
    fedsafe evaluate ... --decoding=budget --guard=guard:FOLDER | --guardian=FOLDER

The second form prints a line per prompt with the answer and each judge's verdict; a prompt may be a
whole dialogue, a list of {role, content}. With the fourth the model answers under guards. Without
further flags the packaged model answers the packaged sets.
"""

import functools
import json
import pathlib
import sys
import time

from absl import flags

from fedsafe_jax.cli import export_flags, guard_flags, judge_flags, template_flags
from fedsafe_jax.cli.command import Command, UsageError, check_file
from fedsafe_jax.cli.config_file import run_file
from fedsafe_jax.cli.prompts import read_prompts, repeats
from fedsafe_jax.config import default_config
from fedsafe_jax.data import template_check
from fedsafe_jax.data.examples import Example
from fedsafe_jax.evals import answers, judges, sentence_vectors, two_sides
from fedsafe_jax.evals.task import (
    HELDOUT,
    EvalOptions,
    EvalSet,
    TaskError,
    check_judges,
    load_items,
    select,
)
from fedsafe_jax.inference.language_model import LanguageModel
from fedsafe_jax.interop.origin import Origin
from fedsafe_jax.pipeline.evaluation import (
    AnswerStore,
    evaluate,
    guarding,
    summarise,
    tasks,
)
from fedsafe_jax.report import guards as report_guards


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    text, whole = flags.DEFINE_string, flags.DEFINE_integer
    here = {"flag_values": values}
    packaged = [entry for entry in default_config().eval.tasks if "=" in entry]
    text("model", "package:model", "Model folder or Hub id.", **here)
    text("adapter", None, "PEFT adapter folder.", **here)
    template_flags.define(values)
    flags.DEFINE_list(
        "tasks", packaged, f"TASK or TASK=SOURCE, some of {', '.join(tasks())}.", **here
    )
    text("register", None, "Python file, run first, that registers tasks of your own.", **here)
    text("data_dir", "", "Folder of the data, or 'hub'.", **here)
    text("output", None, "JSON file to write.", **here)
    text("prompts", None, "Prompt file (txt, JSONL or CSV) instead of tasks.", **here)
    text("column", "prompt", "Column of --prompts that holds the text or the messages.", **here)
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16"], "Precision of the model.", **here
    )
    whole("max_new_tokens", 64, "Longest answer.", lower_bound=1, **here)
    whole("batch_size", 64, "Rows generated at once.", lower_bound=1, **here)
    whole("max_length", 256, "Tokens of a scored dialogue.", lower_bound=16, **here)
    whole("max_prompts", 0, "Prompts taken of each set; 0 for all.", lower_bound=0, **here)
    judge_flags.define(values, judges.DEFAULT)
    text(
        "base",
        None,
        "Model that judges of preference, and tasks such as divergence, compare with.",
        **here,
    )
    text("encoder", "", "Sentence encoder's folder, for tasks such as rewrite.", **here)
    flags.DEFINE_float("temperature", 0.0, "Temperature; 0: greedy.", lower_bound=0.0, **here)
    whole("samples", 1, "Answers to each prompt.", lower_bound=1, **here)
    export_flags.define(values)
    guard_flags.define(values)
    text("system", "", "System prompt of dialogues that have none.", **here)
    text("prefix", "", "Text that every answer begins with.", **here)


def options_of(values: flags.FlagValues) -> EvalOptions:
    """Returns the sizes and judges that the flags ask for; the base model is not loaded yet.

    Raises:
      UsageError: a judge is unknown or cannot be made, or the base has none that compares.
    """
    chosen = judge_flags.make(values)
    compares = any(one.measures == judges.PREFERENCE for one in chosen)
    readers = [name for name, task in tasks().items() if task.reads_base]
    named = {entry.partition("=")[0] for entry in values.tasks}
    if values.base and not compares and not named & set(readers):
        raise UsageError(
            f"--base: add a judge that compares, {judges.EXAMPLES[judges.PREFERENCE]}, to "
            f"--judges, or one of {', '.join(readers)} to --tasks."
        )
    if values.samples > 1 and not values.temperature:
        raise UsageError("--samples: greedy answers are all the same; give --temperature.")
    return EvalOptions(
        max_new_tokens=values.max_new_tokens,
        max_length=values.max_length,
        batch_size=values.batch_size,
        judges=chosen,
        temperature=values.temperature,
        samples=values.samples,
        system=values.system,
        prefix=values.prefix,
        encoder=values.encoder,
    )


def check_encoder(values: flags.FlagValues) -> None:
    """Checks that `--encoder` is a sentence encoder, and that a task reads it.

    Raises:
      UsageError: no task of `--tasks` does.
      ModelError: the folder holds no encoder that is supported.
    """
    if not values.encoder:
        return
    readers = [name for name, task in tasks().items() if task.reads_encoder]
    if values.prompts or not {entry.partition("=")[0] for entry in values.tasks} & set(readers):
        raise UsageError(f"--encoder: add one of {', '.join(readers)} to --tasks.")
    sentence_vectors.check(values.encoder)


def load_sets(values: flags.FlagValues, options: EvalOptions) -> dict[str, EvalSet]:
    """Loads the items of `--tasks`.

    Raises:
      UsageError: a task is unknown, needs a judge, or needs a run's held-out pairs.
      SourceError: a source cannot be read.
    """
    if not values.tasks:
        raise UsageError(f"--tasks: give some of {', '.join(tasks())}.")
    try:
        chosen = select(values.tasks, tasks())
        check_judges(chosen, [judge.spec for judge in options.judges])
    except TaskError as error:
        raise UsageError(f"--tasks: {error}") from None
    sets = {}
    for name, one in chosen.items():
        if one.task.reads_base and not values.base and not values.adapter:
            raise UsageError(f"--tasks: '{name}' compares with a base: give --base or --adapter.")
        if one.source == HELDOUT:
            raise UsageError(
                f"--tasks: '{name}' reads the pairs that a run holds out; give {name}=SOURCE."
            )
        sets[name] = load_items(name, one, values.data_dir, values.max_prompts)
    return sets


class CollectedAnswers(AnswerStore):
    """Holds the answers of every set, with their verdicts once they are judged.

    Attributes:
      rows: rows of answers by the name of the set.
    """

    def __init__(self) -> None:
        self.rows: dict[str, list[dict]] = {}

    def write(self, name: str, key: dict, rows: list[dict]) -> None:
        """Takes the rows of a set in the place of those before they were judged."""
        del key
        self.rows[name] = rows


def run_tasks(
    lm: LanguageModel,
    sets: dict[str, EvalSet],
    options: EvalOptions,
    kept: AnswerStore | None = None,
) -> dict:
    """Runs the tasks and prints their figures with intervals, and how long each took."""
    outcome, seconds = {}, {}
    for name, one in sets.items():
        began = time.monotonic()
        outcome |= evaluate(lm, {name: one}, options, kept)
        seconds[name] = time.monotonic() - began
    summary = summarise(sets, [outcome], options)
    print("mean (95% interval)")
    for name, one in sets.items():
        for column in one.columns:
            if cell := column.cell(summary[name]):
                print(f"{name}: {column.label}: {cell}")
        if did := summary[name].get("guards"):
            print(f"{name}: {report_guards.in_words(did)}")
        if cut := summary[name].get("cut"):
            print(f"{name}: {cut} of {summary[name]['n']} dialogues are cut to --max_length")
    both_sides = two_sides.headline(sets, summary)
    for both in both_sides:
        print(two_sides.in_words(both))
    print("seconds:", ", ".join(f"{name} {spent:.1f}" for name, spent in seconds.items()))
    return {
        "summary": summary,
        "two_sides": both_sides,
        "outcomes": outcome,
        "seconds_by_task": seconds,
    }


def run_prompts(lm: LanguageModel, requests: list[Example], options: EvalOptions) -> dict:
    """Judges the answers to prompts, printing a line each and the rates with intervals."""
    from fedsafe_jax.evals import statistics

    if note := repeats(requests):
        print(note)
    judging = tuple(one for one in options.judges if one.measures in (judges.REFUSAL, judges.HARM))
    rows, problems = answers.judge(answers.ask(lm, requests, options), judging)
    for problem in problems.values():
        print(f"warning: {problem}", file=sys.stderr)
    answers.check(rows, judging)
    rows = [{"prompt": requests[row["item"]].dialogue} | row for row in rows]
    for row in rows:
        shown = " ".join(f"{spec}={_in_words(said)}" for spec, said in row["verdicts"].items())
        print(f"{shown} | {row['prompt']!r} -> {row['answer']!r}")
    rates = {}
    for one in judging:
        mean, interval = statistics.rate([answers.by_item(rows, one.spec, "refused")])
        rates[one.spec] = {"refused": mean, "ci95": interval, "n": len(requests)}
        if mean is not None:
            low, high = interval
            print(f"{one.spec}: {mean:.1f}% refused (95% interval {low:.1f} to {high:.1f})")
    return {"rates": rates, "prompts": rows}


def _in_words(said: dict | None) -> str:
    if said is None:
        return "failed"
    return "refused" if said["refused"] else "answered"


def export(
    values: flags.FlagValues,
    sets: dict[str, EvalSet],
    rows: dict[str, list[dict]],
    adapter: str | None,
) -> None:
    """Writes the answers of every set as `--export` says, and names sets without any.

    Args:
      values: the command's flags.
      sets: the sets by name; none for a file of prompts.
      rows: rows of answers by the name of the set.
      adapter: hash of the adapter that answered; None without.
    """
    settings = {k: values[k].value for k in ("max_new_tokens", "temperature", "system", "prefix")}
    facts = {"adapter": values.adapter, "adapter_sha256": adapter} if adapter else {}
    model = f"{values.model}:{values.adapter}" if values.adapter else values.model
    for name, answered in rows.items():
        one = sets.get(name)
        origin = Origin(
            name,
            model,
            version=one.task.version if one else 0,
            source=one.source if one else values.prompts,
            settings=settings,
            facts=facts,
        )
        export_flags.write(values, answered, origin)
    if without := [name for name in sets if not rows.get(name)]:
        print(f"not exported, as nothing is generated: {', '.join(without)}")


def main(values: flags.FlagValues) -> None:
    """Loads the model, runs the tasks or the prompt file, and writes the results."""
    import jax

    from fedsafe_jax import load_adapter, load_pretrained
    from fedsafe_jax.federated.mesh import make_mesh, use_cores
    from fedsafe_jax.models.adapter_hash import adapter_hash
    from fedsafe_jax.pipeline.workdir import HASH
    from fedsafe_jax.runtime import devices, multihost, run_files

    if values.output:
        check_file("output", values.output)
    export_flags.check(values)
    started = time.monotonic()
    options, prompts, sets = options_of(values), [], {}
    guards = guard_flags.spec(values, values.guard)
    template = template_flags.options(values)
    if values.register:
        run_file("register", values.register)
    if values.prompts:
        if values["tasks"].present:
            raise UsageError("--prompts and --tasks: give one of them.")
        prompts = read_prompts(values.prompts, values.column)
    else:
        sets = load_sets(values, options)
        # A task that only scores given answers asks the model itself.
        sets = {
            name: one._replace(under=guards.label) if one.task.generates else one
            for name, one in sets.items()
        }
    check_encoder(values)
    use_cores(values.batch_size)

    def work():
        local = make_mesh(jax.local_devices())
        lm = load_pretrained(values.model, values.dtype, mesh=local, **template)
        chosen = options
        if guards.label:
            chosen = options._replace(
                guarded=guarding(guards, functools.partial(load_pretrained, dtype=values.dtype))
            )
        if values.base:
            chosen = chosen._replace(base=load_pretrained(values.base, values.dtype, **template))
        evaluated = None
        if values.adapter:
            adapter = load_adapter(values.adapter)
            lm, evaluated = lm.with_adapter(adapter), adapter_hash(adapter.factors)
            print(f"adapter: {values.adapter}, SHA-256 of its tensors {evaluated}")
        template_check.check(lm.tokenizer, [(request.source, request) for request in prompts])
        for name, one in sets.items():
            template_check.check(
                lm.tokenizer, ((f"task '{name}', {one.source}", x) for x in one.items)
            )
        devices.announce()
        kept = CollectedAnswers()
        if prompts:
            asked, began = chosen.guarded(lm) if guards.label else lm, time.monotonic()
            result = run_prompts(asked, prompts, chosen)
            if guards.label:
                seconds = {"seconds": time.monotonic() - began}
                result["guards"] = asked.record.take()._asdict() | seconds
                print(report_guards.in_words(result["guards"]))
            kept.rows = {"prompts": result["prompts"]}
        else:
            result = run_tasks(lm, sets, chosen, kept)
        if values.export:
            export(values, sets, kept.rows, evaluated)
        if values.output:
            result |= {"model": values.model, "adapter": values.adapter, HASH: evaluated}
            result["seconds"] = time.monotonic() - started
            run_files.write_json(pathlib.Path(values.output), json.loads(json.dumps(result)))

    multihost.on_first(work, "evaluated")


COMMAND = Command(define_flags, main)
