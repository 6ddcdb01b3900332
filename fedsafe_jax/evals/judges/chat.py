"""Judges that are chat models behind an OpenAI-compatible endpoint: `chat:MODEL@URL#RUBRIC`."""

import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from fedsafe_jax.evals.judges.concurrency import concurrently
from fedsafe_jax.evals.judges.contract import (
    FAILED,
    Answered,
    Judge,
    JudgeError,
    JudgeKind,
    Tools,
    Verdict,
)
from fedsafe_jax.evals.judges.endpoint import KEY, ChatEndpoint, EndpointError, check_url
from fedsafe_jax.evals.judges.reply_cache import ReplyCache
from fedsafe_jax.evals.judges.rubrics import RUBRICS, Rubric
from fedsafe_jax.registry import unknown

FORM = "MODEL@URL#RUBRIC"
GIVE_UP = 3  # answers in a row on which an endpoint fails, after which it is asked no more
BUSY = re.compile("HTTP (?:429|503)")
_SPEC = re.compile(r"(?P<model>[^@#]+)@(?P<url>.+)#(?P<rubric>[\w-]+)")


def split(argument: str) -> tuple[str, str, Rubric]:
    """Returns model, base URL and rubric of what stands behind `chat:`.

    Raises:
      JudgeError: it is written otherwise, or names no rubric.
    """
    match = _SPEC.fullmatch(argument)
    if match is None:
        raise JudgeError(
            f"judge 'chat:...': write chat:{FORM}, such as chat:MODEL@https://HOST/v1#compare."
        )
    try:
        check_url(match["url"], bool(os.environ.get(KEY)))
    except EndpointError as error:
        raise JudgeError(str(error)) from None
    if match["rubric"] not in RUBRICS:
        raise JudgeError(unknown("judge 'chat': rubric", match["rubric"], RUBRICS))
    return match["model"], match["url"], RUBRICS[match["rubric"]]


def _make(spec: str, argument: str, tools: Tools) -> Judge:
    model, url, rubric = split(argument)
    endpoint = ChatEndpoint(url, model, tools.api_key)
    asked_by = {"model": model, "host": urlsplit(url).hostname}
    asked_by |= {"rubric": argument.rpartition("#")[2], "version": rubric.version}
    cache = ReplyCache(tools.cache, asked_by)

    def judge_one(one: Answered) -> Verdict:
        asked = rubric.ask(one)
        try:
            replies = [cache.read(messages) or endpoint(messages) for messages in asked]
        except EndpointError as error:
            return FAILED._replace(problem=str(error))
        verdict = rubric.read(replies) if replies and all(replies) else FAILED
        if verdict.score is not None:  # what nobody can read may be better when asked again
            for messages, reply in zip(asked, replies, strict=True):
                cache.write(messages, reply)
        return verdict

    return Judge(
        spec, rubric.measures, lambda answers: _judge(answers, judge_one, tools.concurrent)
    )


def _judge(
    answers: Sequence[Answered], judge_one: Callable[[Answered], Verdict], concurrent: int
) -> list[Verdict]:
    """Returns the verdicts in the order of the answers, several of which are judged at once.

    Where the endpoint fails on `GIVE_UP` in a row, it is asked no more. What it was too busy for is
    asked once more, one at a time.
    """
    verdicts: list[Verdict | None] = [None] * len(answers)
    for threads in dict.fromkeys((concurrent, 1)):
        left = [i for i, verdict in enumerate(verdicts) if verdict is None]
        problem, row = "", 0
        for number, verdict in concurrently(judge_one, [answers[i] for i in left], threads):
            verdicts[left[number]] = verdict
            row = row + 1 if verdict.problem else 0
            if row == GIVE_UP:
                problem = verdict.problem
                break
        busy = [i for i, verdict in enumerate(verdicts) if verdict and BUSY.search(verdict.problem)]
        if threads == 1 or not busy:
            break
        for i in busy:
            verdicts[i] = None
    return [FAILED._replace(problem=problem) if one is None else one for one in verdicts]


def _check(argument: str) -> None:
    split(argument)
    if importlib.util.find_spec("openai") is None:
        raise JudgeError("judge 'chat:...' needs the openai client; pip install -e .[judge]")


CHAT = JudgeKind(
    _make, argument=FORM, check=_check, measures=lambda argument: split(argument)[2].measures
)
