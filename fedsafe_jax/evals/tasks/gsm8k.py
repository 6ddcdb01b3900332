"""GSM8K (Cobbe et al., 2021, arXiv 2110.14168): the final number of a word problem.

Wording and extraction are lm-evaluation-harness 0.4's (`gsm8k`, version 3.0): "flexible-extract",
the last number of an answer, and "strict-match", that behind "####". The problem is asked in the
chat template without examples (the harness' `--apply_chat_template --num_fewshot 0`).
"""

import re
from collections.abc import Sequence

from fedsafe_jax.data import sources
from fedsafe_jax.data.examples import Example, SourceError
from fedsafe_jax.data.refusals import spoken
from fedsafe_jax.data.row_fields import ask as ask_prompt
from fedsafe_jax.data.row_fields import field
from fedsafe_jax.evals import answers, statistics
from fedsafe_jax.evals.task import Column, EvalOptions, Task

STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
STOPS = ("Question:", "</s>", "<|im_end|>")  # the answer ends before them
IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")  # removed on both sides, in this order
INVALID = "[invalid]"


def strict(answer: str) -> str:
    """Returns the first number behind "####", as it is written; "[invalid]" without one."""
    match = STRICT.search(answer)
    return match[1].strip() if match else INVALID


def flexible(answer: str) -> str:
    """Returns the last number, as it is written; "[invalid]" without one."""
    matches = FLEXIBLE.findall(answer)
    return next(group for group in matches[-1] if group).strip() if matches else INVALID


def comparable(text: str) -> str:
    """Returns a number without what does not count: commas, dollars, a last full stop, case."""
    for pattern in IGNORED:
        text = re.sub(pattern, "", text)
    return text.lower()


def load(location: str, data_dir: str) -> list[Example]:
    """Reads `question` and `answer`, or `instruction` and `output` as copies of it are named.

    An answer without "####" ends in its last number.

    Raises:
      SourceError: the file is missing, or an answer holds no number.
    """
    problems = []
    for place, row in sources.read_rows(location, data_dir):
        asked, solution = field(place, row, "question", "instruction"), field(
            place, row, "answer", "output"
        )  # fmt: skip
        right = solution if "#### " in solution else flexible(solution)
        if right == INVALID:
            raise SourceError(f"{place}: the answer holds no number.")
        messages = ask_prompt(place, f"Question: {asked}\nAnswer:")
        problems.append(Example(messages, comparable(right)))
    return problems


def score(rows: Sequence[dict], options: EvalOptions) -> dict:
    """Returns the share of each problem's samples that are right, by both extractions.

    Returns:
      `{"flexible": [...], "strict": [...], "unfinished": int, "samples": [...]}`; `unfinished`
      counts answers that were cut at `max_new_tokens`.
    """
    del options
    right: dict[str, dict[int, list[bool]]] = {"flexible": {}, "strict": {}}
    for row in rows:
        said = spoken(row["answer"])
        for stop in STOPS:
            said = said.partition(stop)[0]
        for name, extract in (("flexible", flexible), ("strict", strict)):
            same = comparable(extract(said)) == row["reference"]
            right[name].setdefault(row["item"], []).append(same)
    return {
        name: [sum(items[i]) / len(items[i]) for i in sorted(items)]
        for name, items in right.items()
    } | {
        "unfinished": sum(not row["finished"] for row in rows),
        "samples": answers.samples(rows),
    }


def summarise(outcomes: Sequence[dict], options: EvalOptions) -> dict:
    """Returns both accuracies in percent, and how many answers of a seed were cut."""
    del options
    flexible_rate, interval = statistics.rate([o["flexible"] for o in outcomes])
    strict_rate, strict_interval = statistics.rate([o["strict"] for o in outcomes])
    return {
        "accuracy": flexible_rate,
        "ci95": interval,
        "strict": strict_rate,
        "strict_ci95": strict_interval,
        "n": len(outcomes[0]["flexible"]),
        "unfinished": outcomes[0]["unfinished"],
    }


GSM8K = Task(
    name="gsm8k",
    version=1,
    title="word problems",
    source="gsm8k/test.jsonl",
    columns=(
        Column("GSM8K", "accuracy", "up"),
        Column("GSM8K strict", "strict", "up", interval="strict_ci95"),
    ),
    load=load,
    prompts=lambda problems: [
        problem.prompt.removeprefix("Question: ").removesuffix("\nAnswer:") for problem in problems
    ],
    ask=answers.ask,
    score=score,
    summarise=summarise,
    values=lambda outcome, options: {
        "accuracy": outcome["flexible"],
        "strict": outcome["strict"],
    },
)
