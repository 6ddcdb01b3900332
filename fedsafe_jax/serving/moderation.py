"""Moderation: what a guard says of texts and dialogues, in the shape of OpenAI's API.

The guards of `evals.judges` judge answers. A text is judged as an answer whose request is not
known; a dialogue, as Mistral's API takes one, by its last message, the assistant's.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fedsafe_jax.evals.judges import Answered, Verdict
from fedsafe_jax.evals.judges.guard import Guard
from fedsafe_jax.serving.batching import Batcher, Event, Failed, Job
from fedsafe_jax.serving.errors import ApiError, malformed
from fedsafe_jax.serving.fields import Fields, check_text, read_turn, shown

UNSAFE = "unsafe"  # the category that every guard tells
EVEN = 0.5  # score from which a category is kept


class Asked(NamedTuple):
    """A request.

    Attributes:
      model: name of the guard; "" for the first.
      answers: what is judged.
    """

    model: str
    answers: tuple[Answered, ...]


def read(content: dict[str, Any]) -> Asked:
    """Reads a request to `/v1/moderations`.

    Raises:
      ApiError: a field is missing, wrong or unknown; it is named.
    """
    fields = Fields(content)
    model = fields.typed("model", "", lambda x: isinstance(x, str), what="a text")
    given = fields.take("input")
    fields.check_rest()
    if isinstance(given, str) or _is_one(given):
        return Asked(model, (_answered(given, "input"),))
    if not isinstance(given, list) or not given:
        raise malformed(
            "'input' must be a text, a dialogue of {role, content}, or a list of either.", "input"
        )
    return Asked(model, tuple(_answered(one, f"input[{i}]") for i, one in enumerate(given)))


def _is_one(given: Any) -> bool:
    """Whether a list is one input: parts of a text, or a dialogue."""
    return isinstance(given, list) and bool(given) and isinstance(given[0], dict)


def _answered(given: Any, where: str) -> Answered:
    if _is_one(given) and "role" in given[0]:
        *turns, (role, answer) = [read_turn(one, f"{where}[{i}]") for i, one in enumerate(given)]
        if role != "assistant" or not turns:
            raise malformed(
                f"'{where}' must end with the assistant's answer to what stands before it: guards "
                "judge answers. Give another text alone.",
                "input",
            )
        return Answered(tuple(turns), answer)
    if isinstance(given, list):
        (_, given) = read_turn({"role": "assistant", "content": given}, where)
    elif not isinstance(given, str):
        raise malformed(f"'{where}' must be a text or a dialogue, not {shown(given)}.", "input")
    check_text(given, where)
    return Answered((("user", ""),), given)


async def judge(asked: Asked, batcher: Batcher, timeout_s: float) -> list[Verdict]:
    """Returns the verdicts, judged in batches with those of other requests.

    Args:
      asked: the request, with the guard's name.
      batcher: who does the work.
      timeout_s: seconds until it is given up.

    Raises:
      ApiError: the queue is full, the guard failed or gave no verdict, or it took too long.
    """
    loop, events = asyncio.get_running_loop(), asyncio.Queue()
    deadline = time.monotonic() + timeout_s

    def job(index: int, answered: Answered) -> Job:
        def deliver(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop may have ended before the thread
                loop.call_soon_threadsafe(events.put_nowait, (index, event))

        return Job(asked.model, deliver, deadline, answered=answered)

    jobs = [job(i, answered) for i, answered in enumerate(asked.answers)]
    batcher.submit(jobs)
    verdicts: dict[int, Verdict] = {}
    try:
        async with asyncio.timeout(timeout_s):
            while len(verdicts) < len(jobs):
                index, event = await events.get()
                if isinstance(event, Failed):
                    raise event.error
                if event.refused is None or event.score is None:
                    # It is not said to be harmless: nothing passes that was not read.
                    raise ApiError(500, f"The guard gave no verdict on 'input[{index}]'.", "input")
                verdicts[index] = event
    except TimeoutError:
        raise ApiError(
            504, f"The request took more than {timeout_s:g} seconds.", code="timeout"
        ) from None
    finally:
        for one in jobs:
            one.is_over = True
    return [verdicts[i] for i in range(len(jobs))]


def reply(model: str, guard: Guard, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Returns the reply to a request.

    Args:
      model: name of the guard.
      guard: whose categories are told.
      verdicts: of each input.
    """
    return {
        "id": f"modr-{secrets.token_hex(12)}",
        "model": model,
        "results": [_result(guard, verdict) for verdict in verdicts],
    }


def _result(guard: Guard, verdict: Verdict) -> dict[str, Any]:
    """One input's result: `unsafe` is whether, the others are what of."""
    risk, said = 1.0 - verdict.score, verdict.label.partition(":")[0]
    names: Mapping[str, float] = {guard.taxonomy.get(k, k): s for k, s in verdict.hazards}
    flagged = {UNSAFE: not verdict.refused}
    scores = {UNSAFE: risk}
    for word in guard.words:
        if word != UNSAFE:
            flagged[word] = not verdict.refused and word == said
            scores[word] = risk if flagged[word] else 0.0
    for name in [*guard.taxonomy.values(), *names]:
        kept = names.get(name, 1.0)
        flagged[name], scores[name] = kept < EVEN, 1.0 - kept
    return {
        "flagged": not verdict.refused,
        "categories": flagged,
        "category_scores": scores,
        "category_applied_input_types": {name: ["text"] for name in flagged},
    }
