"""Samples of a log of inspect_ai, read as answers."""

from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.data.text_files import shorten

ATTACHED = "attachment://"  # a text that stands elsewhere in the sample


def is_log(content: dict) -> bool:
    """Returns whether a JSON object is a log of inspect_ai."""
    return isinstance(content.get("eval"), dict) and "version" in content and "status" in content


def rows_of(path: str, log: dict) -> tuple[list[tuple[str, dict]], list[str]]:
    """Returns the answers of a log, a row a sample.

    Args:
      path: the log's file, named in errors.
      log: its content.

    Returns:
      Rows with `messages`, `answer`, `item`, `sample`, `reference` where there is a target,
      `scores` of the log and `metadata`; and what is left out, in words.

    Raises:
      SourceError: a log of another format or without samples, or a sample without a dialogue.
    """
    if log.get("version") not in (1, 2):
        raise SourceError(
            f"{path}: a log of the format {shorten(log.get('version'))}; 1 and 2 are read."
        )
    samples = log.get("samples")
    if not isinstance(samples, list) or not samples:
        raise SourceError(f"{path}: the log holds no samples, so no answers; give a whole log.")
    rows, failed = [], 0
    for number, sample in enumerate(samples, 1):
        place = f"{path} sample {number}"
        if not isinstance(sample, dict):
            raise SourceError(f"{place}: must be an object, found {shorten(sample)}.")
        place += f" (id {shorten(sample.get('id'))})"
        answer = _answer(place, sample)
        if answer is None:
            failed += 1
        else:
            rows.append((place, _row(place, sample, answer)))
    words = "samples ended before the model answered and are left out."
    return rows, [f"{failed} {words}"] if failed else []


def _answer(place: str, sample: dict) -> str | None:
    """Returns what the model said; None where the sample ended before."""
    output = sample.get("output") or {}
    choices = output.get("choices") if isinstance(output, dict) else None
    if not isinstance(choices, list) or not choices:
        if sample.get("error") or sample.get("limit"):
            return None
        raise SourceError(f"{place}: 'output' holds no choice, so no answer; remove the sample.")
    message = choices[0].get("message") if isinstance(choices[0], dict) else None
    if not isinstance(message, dict) or "content" not in message:
        raise SourceError(f"{place}: the first choice of 'output' must hold a 'message'.")
    content = _content(message["content"], sample)
    if isinstance(content, list):
        # Reasoning stands beside the answer as a part of its own, and is not what users read.
        texts = [part.get("text") for part in content if _is_text(part)]
        content = "\n".join(text for text in texts if isinstance(text, str))
    if not isinstance(content, str):
        raise SourceError(
            f"{place}: the answer in 'output' must be text, found {shorten(content)}."
        )
    return content


def _is_text(part: object) -> bool:
    return isinstance(part, dict) and part.get("type", "text") == "text"


def _row(place: str, sample: dict, answer: str) -> dict:
    asked = sample.get("messages") or sample.get("input")
    if isinstance(asked, str):
        asked = [{"role": "user", "content": asked}]
    if not isinstance(asked, list) or not all(isinstance(turn, dict) for turn in asked):
        raise SourceError(f"{place}: 'messages' or 'input' must be a dialogue or a text.")
    turns = [turn | {"content": _content(turn.get("content"), sample)} for turn in asked]
    if turns and turns[-1].get("role") == "assistant":
        turns = turns[:-1]
    row = {"item": sample.get("id"), "messages": turns, "answer": answer}
    if isinstance(epoch := sample.get("epoch"), int) and epoch > 1:
        row["sample"] = epoch - 1
    target = sample.get("target")
    if isinstance(target, str) and target:
        row["reference"] = target
    return row | {key: sample[key] for key in ("scores", "metadata") if sample.get(key)}


def _content(content: object, sample: dict) -> object:
    """A message's content, with texts that stand among the attachments put in their places."""
    attached = sample.get("attachments")
    if isinstance(content, list):
        return [
            part | {"text": _content(part["text"], sample)}
            if isinstance(part, dict) and isinstance(part.get("text"), str)
            else part
            for part in content
        ]
    if isinstance(content, str) and content.startswith(ATTACHED) and isinstance(attached, dict):
        return attached.get(content.removeprefix(ATTACHED), content)
    return content
