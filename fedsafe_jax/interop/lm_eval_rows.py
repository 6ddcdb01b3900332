"""Rows of `samples_*.jsonl` of lm-evaluation-harness, read as answers."""

import json

from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.data.text_files import parse_json, shorten

KEPT = ("doc", "filter")  # of a row, beside what is read


def is_sample(row: dict) -> bool:
    """Returns whether a row is the harness's: it has requests and responses."""
    return "resps" in row and "arguments" in row


def rows_of(samples: list[tuple[str, dict]]) -> tuple[list[tuple[str, dict]], list[str]]:
    """Returns the answers of the samples of a task that generates, a row an answer.

    The answer is what the model said, before the harness's filter took a part of it. Where the
    harness writes a document once a filter, the first one counts.

    Args:
      samples: rows of the file, with their places.

    Returns:
      Rows with `messages`, `answer`, `item` (the document's number), `sample` where there are
      several, `reference` where there is a target; and what is left out, in words.

    Raises:
      SourceError: a row is no sample, or one of a task whose answers are given.
    """
    rows, again = [], 0
    first: dict[object, object] = {}
    for place, row in samples:
        messages, said = _messages(place, row), _answers(place, row)
        item = row.get("doc_id")
        if not isinstance(item, int | str):
            raise SourceError(f"{place}: 'doc_id' must be a number or text, found {shorten(item)}.")
        by = row.get("filter")
        if item in first and first[item] != by:
            again += 1
            continue
        first[item] = by
        target = row.get("target")
        known = {"reference": str(target)} if isinstance(target, str | int) and target != "" else {}
        known |= {name: row[name] for name in KEPT if name in row}
        metrics = row.get("metrics")
        named = metrics if isinstance(metrics, list) else []
        if scores := {name: row[name] for name in named if isinstance(name, str) and name in row}:
            known["scores"] = scores
        for sample, answer in enumerate(said):
            which = {"sample": sample} if len(said) > 1 else {}
            asked = {"item": item} | which | {"messages": messages, "answer": answer}
            rows.append((place, asked | known))
    filters = "rows repeat answers of another filter and are left out."
    return rows, [f"{again} {filters}"] if again else []


def _messages(place: str, row: dict) -> list[dict]:
    """The dialogue of the only request of a row."""
    requests = row.get("arguments")
    if isinstance(requests, dict):
        requests = [_in_order(one) for one in requests.values()]
    if not isinstance(requests, list) or not requests:
        there = f"found {shorten(row.get('arguments'))}" if "arguments" in row else "it is missing"
        raise SourceError(f"{place}: 'arguments' must hold the request of a sample; {there}.")
    given = all(isinstance(one, list) and len(one) > 1 for one in requests)
    if given and any(isinstance(one[1], str) for one in requests):
        raise SourceError(
            f"{place}: a sample of a task that scores given answers (loglikelihood, multiple "
            "choice), so there is no answer to judge; give the samples of a generate_until task."
        )
    if len(requests) != 1 or not isinstance(requests[0], list) or not requests[0]:
        raise SourceError(
            f"{place}: 'arguments' must hold one request of a prompt and its settings; found "
            f"{shorten(row['arguments'])}."
        )
    return _turns(place, requests[0][0])


def _in_order(one: object) -> object:
    return list(one.values()) if isinstance(one, dict) else one


def _turns(place: str, prompt: object) -> list[dict]:
    """A prompt is a text; that of a chat endpoint is a list with a dialogue written as JSON."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        try:
            turns = parse_json(prompt[0])
        except ValueError:
            turns = None
        if isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns):
            # An endpoint that takes texts alone has a type beside each; images it would refuse.
            return [{k: v for k, v in turn.items() if k != "type"} for turn in turns]
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt.strip():
        raise SourceError(
            f"{place}: the prompt in 'arguments' must be a text, or a list with a dialogue written "
            f"as JSON; found {shorten(prompt)}."
        )
    return [{"role": "user", "content": prompt}]


def _answers(place: str, row: dict) -> list[str]:
    responses = row.get("resps")
    if isinstance(responses, list) and len(responses) == 1:
        said = responses[0] if isinstance(responses[0], list) else responses
        if said and all(isinstance(text, str) for text in said):
            return said
    there = f"found {shorten(json.dumps(responses))}" if "resps" in row else "it is missing"
    raise SourceError(
        f"{place}: 'resps' must hold a list with the texts that the model generated; {there}."
    )
