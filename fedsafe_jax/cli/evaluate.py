"""Evaluates any model folder or Hub id, with or without an adapter.

    fedsafe evaluate [--model=FOLDER] [--adapter=FOLDER] [--tasks=advbench,hhh] [--output=FILE.json]
    fedsafe evaluate [--model=FOLDER] --prompts=FILE [--column=NAME] [--output=FILE.json]

The second form prints a line per prompt with the answer and each judge's verdict. Without further
flags the packaged model answers the packaged sets.
"""

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from absl import flags

from fedsafe_jax.cli.command import Command, check_file
from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.inference.language_model import LanguageModel

TASKS = ("advbench", "over_refusal", "hhh", "utility", "mt_bench")


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    text, whole = flags.DEFINE_string, flags.DEFINE_integer
    here = {"flag_values": values}
    text("model", "package:model", "Model folder or Hub id.", **here)
    text("adapter", None, "PEFT adapter folder.", **here)
    flags.DEFINE_list(
        "tasks", ["advbench", "hhh", "over_refusal"], f"Some of {', '.join(TASKS)}.", **here
    )
    text("data_dir", "", "Folder of the data, or 'hub'.", **here)
    text("output", None, "JSON file to write.", **here)
    text("prompts", None, "Prompt file (txt, JSONL or CSV) instead of tasks.", **here)
    text("column", "prompt", "Column or field of --prompts that holds the text.", **here)
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16"], "Precision of the model.", **here
    )
    whole("max_new_tokens", 64, "Longest answer.", lower_bound=1, **here)
    whole("batch_size", 64, "Rows generated at once.", lower_bound=1, **here)
    whole("max_length", 256, "Tokens of a scored dialogue.", lower_bound=16, **here)
    whole("max_prompts", 0, "Prompts taken of each set; 0 for all.", lower_bound=0, **here)
    flags.DEFINE_enum(
        "judge", "start", ["start", "keyword"], "Judge of the headline rates.", **here
    )
    text("advbench", "chat:package/red_team_heldout.jsonl", "Source of harmful prompts.", **here)
    text("over_refusal", "chat:package/benign_heldout.jsonl", "Source of harmless prompts.", **here)
    text("hhh", "package/hhh_heldout.jsonl", "Location of the comparisons.", **here)
    text("utility", "chat:package/benign_heldout.jsonl", "Source of held-out answers.", **here)
    text("mt_bench", "mt_bench/question.jsonl", "Location of the questions.", **here)
    text(
        "base",
        None,
        "Model to compare answers with, for the utility task's win rate (--judge_url).",
        **here,
    )
    text("judge_url", "", "OpenAI-compatible base URL.", **here)
    text("judge_model", "", "Model name at --judge_url.", **here)


class Sets(NamedTuple):
    """Evaluation sets; an empty one is skipped."""

    advbench: list
    over_refusal: list
    hhh: list
    heldout: list


@dataclasses.dataclass
class Settings:
    """Sizes of an evaluation."""

    max_new_tokens: int
    max_length: int
    batch_size: int


def judge_prompts(
    lm: LanguageModel, rows: Iterable[tuple[str, dict]], column: str, settings: Settings
) -> Iterator[tuple[str, str, dict]]:
    """Answers each row's prompt; yields `(prompt, answer, verdicts by judge)`.

    Raises:
      SourceError: a row lacks the column.
    """
    from fedsafe_jax.evals.tasks import refusal

    prompts = []
    for place, row in rows:
        if row.get(column) is None:
            raise SourceError(f"{place}: no column '{column}'; found {sorted(row)}. Set --column.")
        prompts.append(str(row[column]))
    result = refusal.run(lm, prompts, settings.max_new_tokens, settings.batch_size)
    for i, (prompt, answer) in enumerate(zip(result.prompts, result.answers, strict=True)):
        yield prompt, answer, {name: verdicts[i] for name, verdicts in result.refused.items()}


def run_prompts(lm: LanguageModel, path: str, column: str, settings: Settings) -> dict:
    """Judges a prompt file, printing a line each and the rates with intervals."""
    from fedsafe_jax.data import sources
    from fedsafe_jax.evals import statistics

    file = pathlib.Path(path)
    rows = sources.read_rows(file.name, str(file.parent))
    lines = []
    for prompt, answer, verdicts in judge_prompts(lm, rows, column, settings):
        shown = " ".join(f"{name}={'refused' if v else 'answered'}" for name, v in verdicts.items())
        print(f"{shown} | {prompt!r} -> {answer!r}")
        lines.append({"prompt": prompt, "answer": answer, "refused": verdicts})
    rates = {}
    for name in lines[0]["refused"]:
        mean, interval = statistics.summarise([[line["refused"][name] for line in lines]])
        rates[name] = {"refused": mean, "ci95": interval, "n": len(lines)}
        print(f"{name}: {mean:.1f}% refused (95% interval {interval[0]:.1f} to {interval[1]:.1f})")
    return {"rates": rates, "prompts": lines}


def run_tasks(lm: LanguageModel, values: flags.FlagValues, settings: Settings) -> dict:
    """Runs the tasks of `--tasks` and prints their rates."""
    from fedsafe_jax import load_pretrained
    from fedsafe_jax.data import sources
    from fedsafe_jax.evals import judges, statistics, suite
    from fedsafe_jax.evals.task import subset
    from fedsafe_jax.evals.tasks import hhh, mt_bench

    def limited(items):
        return subset(items, values.max_prompts)

    def prompts(source):
        return limited([e.prompt for e in sources.load(source, values.data_dir)])

    tasks = values.tasks
    unknown = sorted(set(tasks) - set(TASKS))
    if unknown:
        raise SourceError(f"--tasks: {unknown} unknown; expected some of {', '.join(TASKS)}.")
    judged = "mt_bench" in tasks or values.base or values.judge_url
    if judged and not (values.judge_url and values.judge_model):
        raise SourceError("a judge is asked for: give both --judge_url and --judge_model.")
    sets = Sets(
        prompts(values.advbench) if "advbench" in tasks else [],
        prompts(values.over_refusal) if "over_refusal" in tasks else [],
        limited(hhh.load_choices(values.hhh, values.data_dir)) if "hhh" in tasks else [],
        limited(sources.load(values.utility, values.data_dir)) if "utility" in tasks else [],
    )
    judge = base = None
    if values.judge_url:
        key = os.environ.get("OPENAI_API_KEY", "")
        judge = judges.ChatEndpoint(values.judge_url, values.judge_model, key)
        base = load_pretrained(values.base, values.dtype) if values.base else None
    outcome = suite.evaluate(lm, sets, settings, judge, base)
    summary = suite.summarise([outcome], values.judge)
    if "mt_bench" in tasks:
        questions = limited(mt_bench.load_questions(values.mt_bench, values.data_dir))
        ratings, unparsed = mt_bench.run(lm, questions, judge, settings.max_new_tokens)
        mean, interval = statistics.summarise([ratings], scale=1.0)
        summary["mt_bench"] = {"rating": mean, "ci95": interval, "unparsed": unparsed}
    for task, rates in summary.items():
        value = next(v for k, v in rates.items() if isinstance(v, float))
        low, high = rates["ci95"]
        print(f"{task}: {value:.2f} (95% interval {low:.2f} to {high:.2f})")
        if "win_rate" in rates:
            low, high = rates["win_rate_ci95"]
            print(f"win rate: {rates['win_rate']:.1f}% ({low:.1f} to {high:.1f})")
    return {"summary": summary, "outcomes": outcome}


def main(values: flags.FlagValues) -> None:
    """Loads the model, runs the tasks or the prompt file, and writes the results."""
    from fedsafe_jax import load_adapter, load_pretrained
    from fedsafe_jax.federated.mesh import make_mesh, use_cores
    from fedsafe_jax.runtime import run_files

    if values.output:
        check_file("output", values.output)
    started = time.monotonic()
    settings = Settings(values.max_new_tokens, values.max_length, values.batch_size)
    use_cores(values.batch_size)
    lm = load_pretrained(values.model, values.dtype, mesh=make_mesh())
    if values.adapter:
        lm = lm.with_adapter(load_adapter(values.adapter))
    if values.prompts:
        result = run_prompts(lm, values.prompts, values.column, settings)
    else:
        result = run_tasks(lm, values, settings)
    if values.output:
        result |= {"model": values.model, "adapter": values.adapter}
        result["seconds"] = time.monotonic() - started
        run_files.write_json(pathlib.Path(values.output), json.loads(json.dumps(result)))


COMMAND = Command(define_flags, main)
