"""Evaluation on its own, of any model folder or Hub id, with or without an adapter.

    python -m fedsafe_jax.evaluate --model=FOLDER [--adapter=FOLDER] \\
        --tasks=advbench,hhh,over_refusal --data_dir=DIR --output=FILE.json
    python -m fedsafe_jax.evaluate --model=FOLDER --prompts=FILE [--column=NAME] --output=FILE.json

The second form prints a line per prompt with the answer and each judge's verdict.
"""

import dataclasses
import json
import os
import pathlib
import time
from typing import NamedTuple

from absl import app, flags, logging

from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.evals.task import subset

TASKS = ("advbench", "over_refusal", "hhh", "utility", "mt_bench")

_MODEL = flags.DEFINE_string("model", "package:model", "Model folder or Hub id.")
_ADAPTER = flags.DEFINE_string("adapter", None, "PEFT adapter folder.")
_TASKS = flags.DEFINE_list("tasks", ["advbench", "hhh", "over_refusal"], f"Some of {TASKS}.")
_DATA_DIR = flags.DEFINE_string("data_dir", "", "Folder of the data, or 'hub'.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.", required=True)
_PROMPTS = flags.DEFINE_string("prompts", None, "Prompt file (txt, JSONL or CSV) instead of tasks.")
_COLUMN = flags.DEFINE_string(
    "column", "prompt", "Column or field of --prompts that holds the text."
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the model.")
_NEW = flags.DEFINE_integer("max_new_tokens", 64, "Longest answer.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 64, "Rows generated at once.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("max_length", 256, "Tokens of a scored dialogue.", lower_bound=16)
_LIMIT = flags.DEFINE_integer("max_prompts", 0, "Of each set; 0 for all.", lower_bound=0)
_JUDGE = flags.DEFINE_enum("judge", "start", ["start", "keyword"], "Of the headline rates.")
_ADVBENCH = flags.DEFINE_string("advbench", "advbench:advbench/harmful_behaviors.csv", "Source.")
_OVER = flags.DEFINE_string(
    "over_refusal",
    "prompts:refusal_direction/harmless_train.json.gz",
    "Source of harmless prompts.",
)
_HHH = flags.DEFINE_string("hhh", "hhh/438HHHEvaluations.jsonl", "Location of the comparisons.")
_UTILITY = flags.DEFINE_string(
    "utility", "dolly:dolly/databricks_dolly_sample.csv#heldout", "Source of held-out answers."
)
_MT = flags.DEFINE_string("mt_bench", "mt_bench/question.jsonl", "Location of the questions.")
_BASE = flags.DEFINE_string(
    "base", None, "Model to compare answers with, for the utility task's win rate (--judge_url)."
)
_ENDPOINT = flags.DEFINE_string("judge_url", "", "OpenAI-compatible base URL.")
_JUDGE_MODEL = flags.DEFINE_string("judge_model", "", "Model name at --judge_url.")


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


def judge_prompts(lm, rows, column: str, settings: Settings):
    """Answers each row's prompt; yields `(prompt, answer, verdicts by judge)`.

    Raises:
      SourceError: a row lacks the column.
    """
    from fedsafe_jax.data.examples import SourceError
    from fedsafe_jax.evals.tasks import refusal

    prompts = []
    for place, row in rows:
        if row.get(column) is None:
            raise SourceError(f"{place}: no column '{column}'; found {sorted(row)}. Set --column.")
        prompts.append(str(row[column]))
    found = refusal.run(lm, prompts, settings.max_new_tokens, settings.batch_size)
    for i, (prompt, answer) in enumerate(zip(found.prompts, found.answers, strict=True)):
        yield prompt, answer, {name: verdicts[i] for name, verdicts in found.refused.items()}


def run_prompts(lm, path: str, column: str, settings: Settings) -> dict:
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


def run_tasks(lm, tasks, settings: Settings) -> dict:
    """Runs the named tasks and prints their rates."""
    from fedsafe_jax import load_pretrained
    from fedsafe_jax.data import sources
    from fedsafe_jax.evals import judges, statistics, suite
    from fedsafe_jax.evals.tasks import mt_bench

    def limited(items):
        return subset(items, _LIMIT.value)

    def prompts(source):
        return limited([e.prompt for e in sources.load(source, _DATA_DIR.value)])

    unknown = sorted(set(tasks) - set(TASKS))
    if unknown:
        raise SourceError(f"--tasks: {unknown} unknown; expected some of {', '.join(TASKS)}.")
    judged = "mt_bench" in tasks or _BASE.value or _ENDPOINT.value
    if judged and not (_ENDPOINT.value and _JUDGE_MODEL.value):
        raise SourceError("a judge is asked for: give both --judge_url and --judge_model.")
    sets = Sets(
        prompts(_ADVBENCH.value) if "advbench" in tasks else [],
        prompts(_OVER.value) if "over_refusal" in tasks else [],
        limited(sources.load_choices(_HHH.value, _DATA_DIR.value)) if "hhh" in tasks else [],
        limited(sources.load(_UTILITY.value, _DATA_DIR.value)) if "utility" in tasks else [],
    )
    judge = base = None
    if _ENDPOINT.value:
        key = os.environ.get("OPENAI_API_KEY", "")
        judge = judges.ChatEndpoint(_ENDPOINT.value, _JUDGE_MODEL.value, key)
        base = load_pretrained(_BASE.value, _DTYPE.value) if _BASE.value else None
    outcome = suite.evaluate(lm, sets, settings, judge, base)
    summary = suite.summarise([outcome], _JUDGE.value)
    if "mt_bench" in tasks:
        questions = limited(mt_bench.load_questions(_MT.value, _DATA_DIR.value))
        ratings, unparsed = mt_bench.run(lm, questions, judge, settings.max_new_tokens)
        mean, interval = statistics.summarise([ratings], scale=1.0)
        summary["mt_bench"] = {"rating": mean, "ci95": interval, "unparsed": unparsed}
    for task, found in summary.items():
        value = next(v for k, v in found.items() if isinstance(v, float))
        low, high = found["ci95"]
        print(f"{task}: {value:.2f} (95% interval {low:.2f} to {high:.2f})")
        if "win_rate" in found:
            low, high = found["win_rate_ci95"]
            print(f"win rate: {found['win_rate']:.1f}% ({low:.1f} to {high:.1f})")
    return {"summary": summary, "outcomes": outcome}


def main(argv):
    del argv
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.set_verbosity(logging.WARNING)  # libraries; results are printed
    from fedsafe_jax import load_adapter, load_pretrained
    from fedsafe_jax.data.examples import SourceError
    from fedsafe_jax.evals.judges import EndpointError
    from fedsafe_jax.federated.mesh import make_mesh, use_cores
    from fedsafe_jax.models.hub import ModelError
    from fedsafe_jax.runtime import run_files

    started = time.monotonic()
    settings = Settings(_NEW.value, _LENGTH.value, _BATCH.value)
    try:
        use_cores(_BATCH.value)
        lm = load_pretrained(_MODEL.value, _DTYPE.value, mesh=make_mesh())
        if _ADAPTER.value:
            lm = lm.with_adapter(load_adapter(_ADAPTER.value))
        if _PROMPTS.value:
            result = run_prompts(lm, _PROMPTS.value, _COLUMN.value, settings)
        else:
            result = run_tasks(lm, _TASKS.value, settings)
    except (SourceError, EndpointError, ModelError) as error:
        raise SystemExit(f"error: {error}") from None
    result |= {"model": _MODEL.value, "adapter": _ADAPTER.value}
    result["seconds"] = time.monotonic() - started
    run_files.write_json(pathlib.Path(_OUTPUT.value), json.loads(json.dumps(result)))


if __name__ == "__main__":
    app.run(main)
