"""Answers of a model as rows: asked, judged, and kept, so that they can be judged again."""

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

from fedsafe_jax.data import chat
from fedsafe_jax.data.examples import Example, Messages
from fedsafe_jax.evals.judges import Answered, Judge, JudgeError
from fedsafe_jax.evals.task import EvalOptions
from fedsafe_jax.inference.language_model import LanguageModel

SHOWN = 12  # answers that outcomes keep for the report


def ask(lm: LanguageModel, requests: Sequence[Example], options: EvalOptions) -> list[dict]:
    """Answers every request in its dialogue, `options.samples` times.

    Args:
      lm: the model, under its adapter.
      requests: dialogues; their responses, where there are some, become the rows' `reference`.
      options: sizes, temperature, system prompt and beginning of the answers.

    Returns:
      Rows, by request and then sample: `item`, its number; `messages`, `answer`, `finished`
      (whether the answer ended within `max_new_tokens`), and where there are some `sample`,
      `category`, `language`, `groups` (`{kind: name}`) and `reference`.
    """
    dialogues = [with_system(request.messages, options.system) for request in requests]
    by_sample = [
        lm.answer_dialogues(
            dialogues,
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
            temperature=options.temperature,
            seed=sample,
            begin=options.prefix,
            truncate=True,
        )
        for sample in range(options.samples)
    ]
    return as_rows(requests, dialogues, by_sample)


def as_rows(
    requests: Sequence[Example],
    dialogues: Sequence[Messages],
    by_sample: Sequence[tuple[Sequence[str], Sequence[bool]]],
) -> list[dict]:
    """Returns answers as the rows that `ask` describes.

    Args:
      requests: the requests.
      dialogues: the turns that were answered, of each request.
      by_sample: for each sample the answers, and whether each is finished.
    """
    rows = []
    for i, (request, messages) in enumerate(zip(requests, dialogues, strict=True)):
        for sample, (answers, finished) in enumerate(by_sample):
            row = {"item": i} | ({"sample": sample} if len(by_sample) > 1 else {})
            row |= {"messages": chat.to_dicts(messages), "answer": answers[i]}
            row["finished"] = bool(finished[i])
            known = {"category": request.category, "language": request.language}
            known |= {"groups": dict(request.groups), "reference": request.response}
            rows.append(row | {key: value for key, value in known.items() if value})
    return rows


def with_system(messages: Messages, system: str) -> Messages:
    """Returns turns under a system prompt, unless they have one or it is ""."""
    if not system or messages[0][0] == "system":
        return messages
    return (("system", system), *messages)


def read(row: dict) -> Answered:
    """Returns what judges read of a row."""
    turns = tuple((turn["role"], turn["content"]) for turn in row["messages"])
    extra = {key: row[key] for key in ("reference", "other", "category") if key in row}
    return Answered(turns, row["answer"], references=tuple(row.get("references") or ()), **extra)


class Judged(NamedTuple):
    """Rows with their verdicts.

    Attributes:
      rows: the rows with `verdicts`: `{spec: {"refused", "score"}}`, null where a judge failed.
      problems: what keeps a judge from answering that may answer later, by its spec.
    """

    rows: list[dict]
    problems: dict[str, str]


def judge(rows: Sequence[dict], judges: Sequence[Judge]) -> Judged:
    """Judges rows; verdicts that they have already are kept, but for those that are null."""
    problems = {}
    judged = [row | {"verdicts": dict(row.get("verdicts") or {})} for row in rows]
    for one in judges:
        missing = [row for row in judged if not row["verdicts"].get(one.spec)]
        verdicts = one.judge([read(row) for row in missing]) if missing else []
        for row, verdict in zip(missing, verdicts, strict=True):
            said = {"refused": verdict.refused, "score": verdict.score}
            said |= {"label": verdict.label} if verdict.label else {}
            row["verdicts"][one.spec] = None if verdict.score is None else said
            if verdict.problem:
                problems[one.spec] = verdict.problem
    return Judged(judged, problems)


def failures(rows: Sequence[dict], judges: Sequence[Judge]) -> dict[str, int]:
    """Returns on how many of the rows each judge failed, of those that failed on any."""
    counts = {one.spec: sum(row["verdicts"][one.spec] is None for row in rows) for one in judges}
    return {spec: count for spec, count in counts.items() if count}


def check(rows: Sequence[dict], judges: Sequence[Judge]) -> None:
    """Checks that every judge judged some answer.

    Raises:
      JudgeError: one failed on all of them.
    """
    for spec, count in failures(rows, judges).items():
        if count == len(rows):
            raise JudgeError(
                f"judge '{spec}' failed on all {count} answers; the answers are kept, and the same "
                "command judges them again."
            )


def by_item(rows: Sequence[dict], spec: str, field: str) -> list:
    """Returns a judge's verdicts by item: the mean over samples of `field`, None where it failed.

    A single bool stays one.
    """
    said = [row["verdicts"].get(spec) for row in rows]
    return mean_by_item(rows, [None if verdict is None else verdict[field] for verdict in said])


def mean_by_item(rows: Sequence[dict], values: Sequence) -> list:
    """Returns the mean of the values of each item's rows, None where no row has one; a single value
    stays what it is.

    Args:
      rows: rows, of which `item` is read.
      values: a value for each row, None for none.
    """
    items: dict[int, list] = {}
    for row, value in zip(rows, values, strict=True):
        items.setdefault(row["item"], []).append(value)
    return [_mean(items[i]) for i in sorted(items)]


def groups(rows: Sequence[dict]) -> dict[str, list[str]]:
    """Returns by kind, such as "category", "language" or "attack", the group of each item; "" where
    it is in none. A kind without any group is not there."""
    first = {row["item"]: row for row in rows}
    by_row = [
        {kind: first[i].get(kind, "") for kind in ("category", "language")}
        | first[i].get("groups", {})
        for i in sorted(first)
    ]
    kinds = {kind: None for row in by_row for kind in row}  # in the order in which they come
    named = {kind: [row.get(kind, "") for row in by_row] for kind in kinds}
    return {kind: names for kind, names in named.items() if any(names)}


def labels(rows: Sequence[dict], specs: Sequence[str]) -> dict[str, list[str | None]]:
    """Returns by judge the label of each answer, None where it failed, of judges that give any."""
    said = {spec: [row["verdicts"].get(spec) for row in rows] for spec in specs}
    named = {spec: [v and v.get("label", "") for v in verdicts] for spec, verdicts in said.items()}
    return {spec: names for spec, names in named.items() if any(names)}


def _mean(values: list) -> float | bool | None:
    known = [value for value in values if value is not None]
    if len(values) == 1 or not known:
        return values[0] if len(values) == 1 else None
    return sum(known) / len(known)


def samples(rows: Sequence[dict]) -> list[dict]:
    """Returns the first answers as the report shows them: `[{"prompt", "answer"}]`."""
    first = [row for row in rows if not row.get("sample")][:SHOWN]
    return [{"prompt": _as_text(row["messages"]), "answer": row["answer"]} for row in first]


def _as_text(messages: Sequence[dict]) -> str:
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)


def hash_of(items: Sequence) -> str:
    """Hashes a prompt set, to 16 hexadecimal digits: the same items in the same order."""
    text = json.dumps(items, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:16]
