"""Judges that are chat models behind an OpenAI-compatible endpoint: `chat:MODEL@URL#RUBRIC`."""

import os
import re
from collections.abc import Sequence

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
from fedsafe_jax.evals.judges.rubrics import RUBRICS, Rubric
from fedsafe_jax.registry import unknown

FORM = "MODEL@URL#RUBRIC"
GIVE_UP = 3  # answers in a row on which an endpoint fails, after which it is asked no more
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

    def judge(answers: Sequence[Answered]) -> list[Verdict]:
        verdicts: list[Verdict] = []
        for one in answers:
            last = verdicts[-GIVE_UP:]
            if len(last) == GIVE_UP and all(verdict.problem for verdict in last):
                verdicts.append(last[-1])  # it does not answer: nor will it to the rest
                continue
            try:
                replies = [endpoint(messages) for messages in rubric.ask(one)]
            except EndpointError as error:
                verdicts.append(FAILED._replace(problem=str(error)))
                continue
            verdicts.append(rubric.read(replies))
        return verdicts

    return Judge(spec, rubric.measures, judge)


def _check(argument: str) -> None:
    split(argument)


CHAT = JudgeKind(
    _make, argument=FORM, check=_check, measures=lambda argument: split(argument)[2].measures
)
