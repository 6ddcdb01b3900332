"""New answers to flagged pairs, for filter actions that need them: revised, or written anew."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict

from fedsafe_jax.cai import forms
from fedsafe_jax.cai.constitution import Constitution
from fedsafe_jax.cai.revise import Rules, Threads, revise
from fedsafe_jax.data.examples import Example
from fedsafe_jax.evals import judges
from fedsafe_jax.filters import rewriting
from fedsafe_jax.filters.actions import NewAnswer, WriteAnswers
from fedsafe_jax.filters.kinds import FILTER_KINDS, Filter
from fedsafe_jax.filters.pairs import Refuses
from fedsafe_jax.guarding import guardian
from fedsafe_jax.inference.chat_session import ChatSession
from fedsafe_jax.inference.language_model import LanguageModel
from fedsafe_jax.pipeline.evaluation import judge_tools
from fedsafe_jax.pipeline.inputs import RunInputs
from fedsafe_jax.random_streams import Purpose
from fedsafe_jax.runtime import multihost


def answer_writer(
    config: ConfigDict,
    inputs: RunInputs,
    make_filter: Callable[[], Filter] | None,
    *,
    threshold: float,
    seed: int,
) -> WriteAnswers:
    """Returns the function that writes new answers for flagged pairs.

    A guardian writes them itself. Else the frozen base model criticises and revises the answer of
    each pair towards a refusal, as in Constitutional AI, or with `filter.rewrite="debias"` writes
    it anew without harm, see `filters.rewriting`.

    Args:
      config, inputs: config and inputs of the run.
      make_filter: returns the filter; None for a simulated one, which accepts nothing.
      threshold: P(unsafe) from which a pair is flagged.
      seed: seed of the run.
    """
    if FILTER_KINDS[config.filter.kind].writes_answers:
        write = functools.partial(guardian.replies, make_filter())
        return lambda pairs: [NewAnswer(text) for text in write(pairs)]
    base = dataclasses.replace(inputs.lm, adapter=None)
    max_new_tokens = config.cai.max_new_tokens
    refuses = judges.refuses(config.filter.judge, judge_tools(config))
    if config.filter.rewrite == rewriting.DEBIAS:
        safety_filter = make_filter()
        return functools.partial(
            rewriting.new_answers,
            base,
            instruction=rewriting.load_instruction(config.filter.instruction),
            # What is accepted is trained on, which must be the same everywhere.
            risk=lambda pairs: multihost.broadcast(safety_filter.score(pairs)),
            refuses=refuses,
            threshold=threshold,
            max_new_tokens=max_new_tokens,
        )
    revise_all = functools.partial(
        revise_answers,
        base,
        inputs.constitution,
        max_new_tokens=max_new_tokens,
        seed=seed,
        refuses=refuses,
    )
    return lambda pairs: [NewAnswer(text) for text in revise_all(pairs)]


def revise_answers(
    lm: LanguageModel,
    constitution: Constitution,
    pairs: Sequence[Example],
    max_new_tokens: int,
    seed: int,
    refuses: Refuses,
) -> list[str]:
    """Revises the pairs' answers by a model; "" where a revision is of no use.

    Args:
      lm: model that criticises and revises.
      constitution: principles of the revision.
      pairs: pairs to revise, all of them flagged.
      max_new_tokens: most tokens of a critique or revision.
      seed: seed of the principles drawn.
      refuses: judge of refusal, by which a new answer is accepted.
    """
    session = ChatSession(lm)

    def given_answers(threads: Threads, call: int) -> tuple[list[str], np.ndarray]:
        del threads, call
        return [p.response for p in pairs], np.ones(len(pairs), bool)

    def reviser(threads: Threads, call: int) -> tuple[list[str], np.ndarray]:
        del call
        dialogues = [forms.as_chat(thread) for thread in threads]
        return session.answer_dialogues(dialogues, max_new_tokens, truncate=True)

    records = revise(
        [p.messages for p in pairs],
        constitution,
        given_answers,
        reviser=reviser,
        seed=(seed,),
        purpose=Purpose.FILTER_PRINCIPLES,
        rules=Rules([True] * len(pairs), refuses),
    )
    return ["" if r.dropped else r.revision for r in records]
