"""Ready-made revisions: files of records or triples, in place of what a round would generate.

A row is a record of `fedsafe revise --output` or of a run's `cai/`; `{prompt, initial, revision}`
written by others; or one of DeRTa (Yuan et al., 2024, arXiv 2407.09121), `{prefix, text, safe}`.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

from fedsafe_jax.cai.revise import Record
from fedsafe_jax.data import sources
from fedsafe_jax.data.dialogue_rows import turns_of
from fedsafe_jax.data.examples import SAFE, Example, SourceError
from fedsafe_jax.data.row_fields import text_of
from fedsafe_jax.data.text_files import shorten

FORMS = "{prompt, initial, revision} or DeRTa's {prefix, text, safe}"
NO_SAFE_ANSWER = "no safe answer"  # why a harmful answer alone teaches nothing
# How DeRTa writes a request; in the second form words of a harmful answer may follow it.
ALPACA = re.compile(r"### Instruction:\n(.*?)\n\n### Response:(.*)", re.DOTALL)
LLAMA = re.compile(r"\[INST\](.*?)\[\\?/?INST\](.*)", re.DOTALL)
# End tokens such as "<|eot_id|>" and "</s>", each written backwards.
_ENDS_BACKWARDS = re.compile(r"\s*+(?:(?:>\|[a-z_]++\|<|>s/<)\s*+)*+")
LABELS = {"true": True, "false": False}


def read(locations: Sequence[str], data_dir: str) -> list[Record]:
    """Reads records in the order of the files.

    DeRTa's rows with the labels that its code writes, `"safe": "true"` for a harmful answer that
    training turns into a refusal, "false" for one to imitate, are put together by request.

    Args:
      locations: files below `data_dir`, as in `data.sources`.
      data_dir: folder of the files.

    Returns:
      The records; those that say why they were dropped, or lack a safe answer, keep a reason in
      `dropped` and are not trained on.

    Raises:
      SourceError: a file cannot be read, a row has another form, or nothing is left to train on;
        the message names the place, what was read and what is expected.
    """
    records: list[Record] = []
    for location in locations:
        rows = sources.read_rows(location, data_dir)
        with sources.quoting_no_other_file(location, data_dir):
            records += _records(rows)
    if not any(not record.dropped for record in records):
        raise SourceError(f"cai.records={tuple(locations)}: no row has a revision to train on.")
    return records


def _records(rows: Sequence[tuple[str, dict]]) -> list[Record]:
    """The records of a file's rows."""
    records: list[Record] = []
    labelled: dict[str, dict[str, str]] = {}
    for place, row in rows:
        if not isinstance(row, dict):
            raise SourceError(f"{place}: expected an object, {FORMS}.")
        if "revision" in row:
            records.append(_record(place, row))
        elif "safe" in row and "text" in row:
            request, begun = _request(place, row)
            answer = without_end_tokens(_text(place, row, "text")).strip()
            label = LABELS.get(str(row["safe"]).strip().lower())
            if label is None:  # the safe answer itself
                safe = without_end_tokens(_text(place, row, "safe")).strip()
                records.append(_mended(request, answer, safe))
            else:
                answers = labelled.setdefault(request, {})
                answers.setdefault("harmful" if label else "safe", answer)
                if begun:
                    answers.setdefault("begun", begun)
        else:
            names = shorten(sorted(map(str, row)), 200)
            raise SourceError(f"{place}: expected {FORMS}; it has {names}.")
    for request, answers in labelled.items():
        harmful = answers.get("harmful") or answers.get("begun", "")
        records.append(_mended(request, harmful, answers.get("safe", "")))
    return records


def without_end_tokens(text: str) -> str:
    """Returns a text without the end tokens, and the white space about them, at its end.

    Read from the end, as an expression that looks for its place from the start takes a time that
    grows as the square of the text.
    """
    backwards = text[::-1]
    return backwards[_ENDS_BACKWARDS.match(backwards).end() :][::-1]


def _text(place: str, row: dict, name: str) -> str:
    if not isinstance(row.get(name), str):
        raise SourceError(
            f"{place}: field '{name}' must be text, not {row.get(name)!r:.40}; expected {FORMS}."
        )
    return text_of(place, row[name], repr(name))


def _record(place: str, row: dict) -> Record:
    """Record of a row `{prompt, initial, revision}`, which may have a record's other fields."""
    prompt, initial, revision = (_text(place, row, f) for f in ("prompt", "initial", "revision"))
    dropped, preferred = row.get("dropped", ""), row.get("preferred")
    if not prompt.strip():
        raise SourceError(f"{place}: 'prompt' is blank.")
    if not isinstance(dropped, str) or not isinstance(preferred, bool | None):
        raise SourceError(f"{place}: 'dropped' must be text, and 'preferred' true or false.")
    record = _mended(prompt, initial, revision)
    dropped = dropped or record.dropped
    if preferred is not None:
        record = record._replace(preferred=preferred)
    if not isinstance(row.get("replaced", ""), str):
        raise SourceError(f"{place}: 'replaced' must be text.")
    principle, earlier = row.get("principle") or 0, row.get("earlier") or []
    if not re.fullmatch(r"\d{1,9}", str(principle)):  # a table has it as text
        raise SourceError(f"{place}: 'principle' is {shorten(principle)}; expected its number.")
    if not isinstance(earlier, list) or not all(map(_is_earlier, earlier)):
        raise SourceError(
            f"{place}: 'earlier' is {shorten(earlier)}; expected lists of principle, critique and "
            "revision."
        )
    earlier = tuple((i, critique, text) for i, critique, text in earlier)
    return record._replace(
        principle=int(principle),
        critique=str(row.get("critique") or ""),
        earlier=earlier,
        dropped=dropped,
        preferred=record.preferred and not dropped,
        replaced=row.get("replaced", ""),
        **_turns(place, row),
    )


def _is_earlier(value: object) -> bool:
    """Whether a value is an earlier revision: the principle's number, critique and text."""
    is_list = isinstance(value, list) and len(value) == 3
    return is_list and type(value[0]) is int and all(isinstance(v, str) for v in value[1:])


def _turns(place: str, row: dict) -> dict:
    """The dialogue of a row that has one, as `Record.messages`."""
    if not row.get("messages"):
        return {}
    return {"messages": turns_of(place, row)}


def _mended(prompt: str, initial: str, revision: str) -> Record:
    """Record of a request with a worse and a better answer; "" where it has none."""
    reason = "" if revision.strip() else NO_SAFE_ANSWER
    if not reason and revision.strip() == initial.strip():
        reason = "unchanged"
    return Record(
        prompt,
        initial,
        principle=0,
        critique="",
        revision=revision,
        earlier=(),
        dropped=reason,
        preferred=bool(initial.strip()) and not reason,
    )


def _request(place: str, row: dict) -> tuple[str, str]:
    """The request of DeRTa's row, and the words of a harmful answer behind it."""
    name = next((n for n in ("prefix", "prompt", "question") if n in row), "prefix")
    text = _text(place, row, name)
    for form in (ALPACA, LLAMA):
        if match := form.fullmatch(text.strip()):
            text, begun = match.groups()
            break
    else:
        begun = ""
    if not text.strip():
        raise SourceError(f"{place}: '{name}' is blank.")
    return text.strip(), begun.strip()


def examples_of(records: Sequence[Record]) -> list[Example]:
    """Returns an example of each record, for what looks at training data as examples."""
    return [Example(r.turns, r.revision, SAFE) for r in records]


def rows_of_round(
    records: Sequence[Record],
    count: int,
    t: int,
    generator: Callable[[int], np.random.Generator],
) -> list[Record]:
    """Returns the slice of a round: rounds take turns through one shuffled epoch after another.

    A row is seen again when all others have been seen, whatever the number of rounds.

    Args:
      records: all records.
      count: rows of a round; at most all of them are taken.
      t: number of the round, from 0.
      generator: gives an epoch's generator by its number; nothing else decides the order.
    """
    count = min(count, len(records))
    if not count:
        return []
    first, last = t * count, (t + 1) * count - 1
    chosen = []
    for epoch in range(first // len(records), last // len(records) + 1):
        order, begin = generator(epoch).permutation(len(records)), epoch * len(records)
        chosen += [int(i) for i in order[max(first - begin, 0) : last - begin + 1]]
    return [records[i] for i in chosen]


def rows_a_round(losses_imitate: bool, steps: int, batch: int, replay: int, pairs: int) -> int:
    """Computes how many rows `steps` steps read, so that each row is read once.

    Args:
      losses_imitate: whether revisions are imitated, beside the replay.
      steps: steps of the round.
      batch: dialogues imitated a step.
      replay: replayed dialogues of the round, which take their part of the steps.
      pairs: pairs a step of the losses that compare answers.
    """
    return max(steps * batch - replay, 1) if losses_imitate else steps * pairs
