"""Judges answers that are there already: those that a run kept, or answers made elsewhere.

    fedsafe judge --input=evals/ARM_seedK/TASK.jsonl --judges=rules,guard:DIR --output=judged.jsonl

A row holds `messages` (a list of {role, content} up to the request), ShareGPT's `conversations`, or
`prompt`; and `answer`, unless the dialogue ends with it; where a judge needs them also `reference`
and `other`. A log of inspect_ai (.json, .eval) and samples of lm-evaluation-harness are read, too.
Output rows gain `verdicts`: what each judge says, null where it failed. Verdicts that a row has
already are kept.
"""

import os
import pathlib
import sys

from absl import flags

from fedsafe_jax import whole_files
from fedsafe_jax.cli import judge_flags
from fedsafe_jax.cli.command import Command, UsageError, check_file
from fedsafe_jax.data import chat
from fedsafe_jax.data.dialogue_rows import split_answer, turns_of
from fedsafe_jax.data.examples import Messages, SourceError
from fedsafe_jax.data.row_fields import ask
from fedsafe_jax.data.text_files import shorten
from fedsafe_jax.evals import answers, judges, statistics
from fedsafe_jax.evals.judges import Judge
from fedsafe_jax.interop import reading


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    here = {"flag_values": values}
    flags.DEFINE_string("input", None, "Rows with messages and answer.", **here)
    flags.DEFINE_string("output", None, "JSON lines, written.", **here)
    judge_flags.define(values, ["rules"])
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of guards.", **here)


def read_answers(path: pathlib.Path) -> list[dict]:
    """Reads rows of answers, of ours or of another harness.

    Args:
      path: the file; see `interop.reading`.

    Raises:
      SourceError: no file, or a row without a dialogue or an answer, or with two; it is named.
    """
    if not os.path.isfile(path):
        fault = "is a folder; name a file of answers" if os.path.isdir(path) else "no such file"
        raise SourceError(f"--input: {path}: {fault}.")
    return [_checked(place, row) for place, row in reading.read(path)]


def _checked(place: str, row: dict) -> dict:
    messages, answer = _dialogue(place, row)
    verdicts = row.get("verdicts") or {}
    if not isinstance(verdicts, dict):
        raise SourceError(f"{place}: 'verdicts' must be an object, found {verdicts!r:.60}.")
    for spec, said in verdicts.items():
        if said is not None and not _is_verdict(said):
            raise SourceError(
                f"{place}: the verdict of {shorten(spec)} must be null, or hold 'refused' (true, "
                f"false or null) and 'score' (a number); found {shorten(said)}."
            )
    return row | {"messages": chat.to_dicts(messages), "answer": answer, "verdicts": verdicts}


def _is_verdict(said: object) -> bool:
    if not isinstance(said, dict) or not {"refused", "score"} <= set(said):
        return False
    return isinstance(said["refused"], bool | None) and isinstance(said["score"], int | float)


def _dialogue(place: str, row: dict) -> tuple[Messages, str]:
    """Returns the turns up to the request, and the answer, of other tools' rows too."""
    last = ""
    if row.get("messages") is None and row.get("conversations") is None:
        if not isinstance(row.get("prompt"), str):
            raise SourceError(
                f"{place}: 'messages' must be a list of {{role, content}} up to the request, or "
                f"'prompt' a text; found the fields {shorten(sorted(row), 300)}."
            )
        messages: Messages = ask(place, row["prompt"])
    else:
        messages, last = split_answer(place, turns_of(place, row))
    if "answer" not in row and not last:
        raise SourceError(
            f"{place}: no field 'answer', and no answer at the end of the dialogue; found "
            f"{shorten(sorted(row), 300)}. Name the field of the answer so."
        )
    answer = row.get("answer", last)
    if not isinstance(answer, str):
        raise SourceError(f"{place}: 'answer' must be a text, found {answer!r:.60}.")
    if last and answer != last:
        raise SourceError(
            f"{place}: the dialogue ends with an answer that is not 'answer'; leave one out."
        )
    return messages, answer


def summary(rows: list[dict], made: tuple[Judge, ...]) -> list[str]:
    """Returns a line a judge: its rate of refusals, or mean rating, with interval and failures."""
    lines = []
    for one in made:
        said = [row["verdicts"][one.spec] for row in rows]
        failed = sum(verdict is None for verdict in said)
        tail = f", failed on {failed}" if failed else ""
        rated = one.measures in (judges.RATING, judges.PREFERENCE)
        field = "score" if rated else "refused"
        values = [None if verdict is None else verdict[field] for verdict in said]
        middle, (low, high) = (statistics.mean if rated else statistics.rate)([values])
        if middle is None:
            lines.append(f"{one.spec}: n/a of {len(rows)}{tail}")
        elif rated:
            lines.append(f"{one.spec}: {middle:.2f} ({low:.2f}-{high:.2f}) of {len(rows)}{tail}")
        else:
            word = "harmless" if one.measures == judges.HARM else "refused"
            shown = f"{middle:.1f}% {word} ({low:.1f}-{high:.1f})"
            lines.append(f"{one.spec}: {shown} of {len(rows)}{tail}")
    return lines


def main(values: flags.FlagValues) -> None:
    """Judges, writes, and prints a line a judge."""
    check_file("output", values.output)
    source, output = pathlib.Path(values.input), pathlib.Path(values.output)
    if (
        os.path.exists(output)
        and os.path.exists(source)
        and output.samefile(source)
        and source.suffix != ".jsonl"
    ):
        raise UsageError(f"--output: {output} is the input, and no JSON lines; name another file.")
    made = judge_flags.make(values)
    rows, problems = answers.judge(read_answers(source), made)
    whole_files.write(values.output, whole_files.to_json_lines(rows))
    print("\n".join(summary(rows, made)))
    print(f"output: {values.output}")
    for problem in problems.values():
        print(f"warning: {problem}", file=sys.stderr)
    answers.check(rows, made)


COMMAND = Command(define_flags, main, required=("input", "output"))
