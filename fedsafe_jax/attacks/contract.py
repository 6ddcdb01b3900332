"""The contract of an attack: what it is given, and what it returns.

An attack turns requests into prompts that a model may answer although it refuses the request. It is
one file that ends with an entry of the registry, `attacks.ATTACKS`. What the prompts achieve is
measured elsewhere (`measurement`): an attack knows no judge.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from fedsafe_jax.data.examples import Example, Messages
from fedsafe_jax.inference.language_model import LanguageModel


class AttackError(ValueError):
    """An attack cannot be run as asked; the message names what is missing."""


class Settings(NamedTuple):
    """Sizes of all attacks; each reads its own.

    Attributes:
      steps: steps of a search.
      candidates: suffixes that are scored in a step.
      top_k: tokens that are tried at a place, those with the steepest gradient.
      suffix_tokens: length of a suffix that is searched.
      buffer: suffixes that are kept, the best of which is changed in the next step; 0 to go on
        from the best one of a step even where it is worse than the last.
      chunk: suffixes that are scored at once; bounds the memory.
      target_tokens: tokens of a target that a search looks at.
      prefill_tokens: tokens of the target that are put into the model's mouth.
      templates: lines with `{request}`, each with its name in the results, `(name, line)`.
      shots: requests with answers that comply, `(request, answer)`.
      shot_counts: numbers of shots that are tried.
      note: called with a line on the progress of a search.
    """

    steps: int = 250
    candidates: int = 512
    top_k: int = 256
    suffix_tokens: int = 20
    buffer: int = 4
    chunk: int = 64
    target_tokens: int = 24
    prefill_tokens: int = 10
    templates: tuple[tuple[str, str], ...] = ()
    shots: tuple[tuple[str, str], ...] = ()
    shot_counts: tuple[int, ...] = (4, 16, 64)
    note: Callable[[str], None] = lambda line: None


class AttackPrompt(NamedTuple):
    """What a model is asked in place of a request.

    Attributes:
      messages: (role, text) turns up to the request.
      begin: text that is put into the model's mouth; "" for none.
      chat: whether the chat template writes the turns; else their texts alone are read.
      variant: which of several prompts for one request it is, such as "base64"; "" for the only.
    """

    messages: Messages
    begin: str = ""
    chat: bool = True
    variant: str = ""


class Attacked(NamedTuple):
    """What an attack returns.

    Attributes:
      prompts: one or several prompts for each request.
      losses: float32 `[requests, steps + 1]`, nats a token of the targets, before the search and
        after each step; `[requests, 0]` of attacks without a search.
      queries: int64 `[requests]`, sequences that each model read in the search.
    """

    prompts: list[list[AttackPrompt]]
    losses: np.ndarray
    queries: np.ndarray


Run = Callable[
    [Sequence[LanguageModel], Sequence[Example], Sequence[Sequence[str]], Settings, jax.Array],
    Attacked,
]


class Attack(NamedTuple):
    """An entry of the registry.

    Attributes:
      run: `(models, requests, targets, settings, key) -> Attacked`. The same prompts are meant for
        all models; of the requests the turns are read; `targets` are beginnings of answers that
        comply, one or more for each request; the key is a PRNG key of jax.
      check: raises `AttackError` where settings lack what the attack needs.
      check_models: raises `AttackError` where the attack cannot be run on these models.
    """

    run: Run
    check: Callable[[Settings], None] = lambda settings: None
    check_models: Callable[[Sequence[LanguageModel]], None] = lambda models: None


def without_search(prompts: list[list[AttackPrompt]]) -> Attacked:
    """Returns the result of an attack that writes its prompts without asking a model."""
    return Attacked(
        prompts,
        losses=np.zeros((len(prompts), 0), np.float32),
        queries=np.zeros(len(prompts), np.int64),
    )


def reworded(messages: Messages, text: str) -> Messages:
    """Returns a dialogue whose last turn of the user has another text."""
    last = max(i for i, (role, _) in enumerate(messages) if role == "user")
    return (*messages[:last], ("user", text), *messages[last + 1 :])
