"""The contract of an attack: what it is given, and what it returns.

An attack turns requests into prompts that a model may answer although it refuses the request. It is
one file that ends with an entry of the registry, `attacks.ATTACKS`. What the prompts achieve is
measured elsewhere (`measurement`). Of the judge an attack knows no more than scores of answers
(`Settings.score`), by which some searches choose. An attack may also change the models, and then
returns them in stages.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from fedsafe_jax.data.examples import Example, Messages
from fedsafe_jax.inference.language_model import LanguageModel


class AttackError(ValueError):
    """An attack cannot be run as asked; the message names what is missing."""


class Score(NamedTuple):
    """How far a prompt has led, by the answer to it.

    Attributes:
      value: from 0 for a refusal, or a harmless answer, to 1 for an answer, or a harmful one.
      broken: whether the request counts as answered.
    """

    value: float
    broken: bool


Chat = Callable[[Sequence[dict]], str]  # `[{"role", "content"}, ...] -> reply`
# `(requests, answers) -> scores`, one for each; None for an answer that could not be judged.
Scoring = Callable[[Sequence[Example], Sequence[str]], Sequence[Score | None]]


class Settings(NamedTuple):
    """Sizes of all attacks, and what they are given; each reads its own.

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
      attacker: the chat model that writes prompts; it raises `endpoint.EndpointError`.
      evaluator: the chat model that tells whether a prompt still asks for the same.
      attacker_prompt: what the attacker is told, with `{request}` where the request goes; "" for
        the wording of `attacker.PROMPT`.
      concurrent: replies that a chat model is asked for at once.
      score: scores of answers, by the judge whose verdicts are the headline.
      scores: the same by each judge.
      streams: conversations that the attacker has about a request.
      iterations: prompts that it writes in each.
      branching, width, depth: prompts that a tree grows from each of its leaves, leaves that are
        kept, and how often it grows.
      max_new_tokens: longest answer in a search, in tokens.
      batch_size: prompts answered at once.
      pairs, benign_pairs: what a model is trained on, harmful pairs with answers that comply and
        harmless ones.
      harmless: harmless requests that models are asked too; nothing near them is trained on.
      finetune_pairs: pairs that are taken of each kind; 0 for all.
      finetune_steps: numbers of steps of training, rising, after which models are asked.
      finetune_batch_size: pairs a step.
      finetune_rate: learning rate.
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
    attacker: Chat | None = None
    evaluator: Chat | None = None
    attacker_prompt: str = ""
    concurrent: int = 8
    score: Scoring | None = None
    scores: tuple[Scoring, ...] = ()
    streams: int = 30
    iterations: int = 3
    branching: int = 4
    width: int = 10
    depth: int = 10
    max_new_tokens: int = 64
    batch_size: int = 64
    pairs: tuple[Example, ...] = ()
    benign_pairs: tuple[Example, ...] = ()
    harmless: tuple[Example, ...] = ()
    finetune_pairs: int = 10
    finetune_steps: tuple[int, ...] = (0, 5, 10, 20, 50)
    finetune_batch_size: int = 8
    finetune_rate: float = 1e-3
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


class Stage(NamedTuple):
    """Models as an attack has changed them.

    Attributes:
      step: steps that this took; 0 for models as they were given.
      models: the models, in their order.
      loss: nats a token of what was trained on, the mean over models and the steps since the stage
        before; NaN where none was taken.
    """

    step: int
    models: list[LanguageModel]
    loss: float


class Attacked(NamedTuple):
    """What an attack returns.

    Attributes:
      prompts: one or several prompts for each request.
      losses: float32 `[requests, steps + 1]`, nats a token of the targets, before the search and
        after each step; `[requests, 0]` of attacks without a search.
      queries: int64 `[requests]`, sequences that each model read in the search.
      stages: models that are asked in the place of those given, one stage after the other; the
        last one is what the attack achieves. () for an attack that changes no model.
      counts: what is to be told beside rates, such as replies that an attacker did not give.
    """

    prompts: list[list[AttackPrompt]]
    losses: np.ndarray
    queries: np.ndarray
    stages: tuple[Stage, ...] = ()
    counts: Mapping[str, int] = {}


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
      check_requests: `(settings, requests)`; raises `AttackError` where these requests leave the
        attack nothing to work with.
    """

    run: Run
    check: Callable[[Settings], None] = lambda settings: None
    check_models: Callable[[Sequence[LanguageModel]], None] = lambda models: None
    check_requests: Callable[[Settings, Sequence[Example]], None] = lambda settings, requests: None


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
