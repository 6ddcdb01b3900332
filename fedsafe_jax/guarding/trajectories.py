"""A model's own answers, cut into moments of a search: what a critic learns from."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedsafe_jax.data.examples import Messages
from fedsafe_jax.guarding.blocks import Blocks
from fedsafe_jax.guarding.contract import Reward, Risk
from fedsafe_jax.guarding.decodings import Search
from fedsafe_jax.guarding.weighing import cost_of
from fedsafe_jax.inference import generation
from fedsafe_jax.inference.language_model import LanguageModel
from fedsafe_jax.inference.sampling import Sampling


class Trajectory(NamedTuple):
    """One answer of the model.

    Attributes:
      prompt: number of its prompt.
      ids: token ids of the prompt and the answer.
      places: the last token of each beginning of the answer that a search would stop at, in `ids`.
      to_come: what the answer still costs behind each of them, discounted to it, in nats.
      reward: of the whole answer.
    """

    prompt: int
    ids: list[int]
    places: list[int]
    to_come: list[float]
    reward: float


class Moments(NamedTuple):
    """Beginnings of answers with what came of them.

    Attributes:
      prompt: int `[n]`, number of the prompt.
      hidden: float32 `[n, hidden]`, hidden state of the last token.
      to_come: float32 `[n]`, see `Trajectory`.
      reward: float32 `[n]`, of the whole answer.
    """

    prompt: np.ndarray
    hidden: np.ndarray
    to_come: np.ndarray
    reward: np.ndarray


def remaining(costs: Sequence[float], tokens: Sequence[int], gamma: float) -> list[float]:
    """Returns the discounted cost behind each block: what is left must be more than it.

    The budget z behind a block lasts where z > sum of gamma ** (tokens before block i) * cost of
    block i, over the blocks i that follow.

    Args:
      costs: cost of each block, in nats.
      tokens: tokens of each block.
      gamma: discount a token.

    Returns:
      A number for every block, 0 behind the last.
    """
    behind = [0.0]
    for cost, count in zip(reversed(costs), reversed(tokens), strict=True):
        behind.append(cost + gamma**count * behind[-1])
    return behind[::-1][1:]


def collect(
    lm: LanguageModel,
    dialogues: Sequence[Messages],
    settings: Search,
    max_new_tokens: int,
    risk: Risk,
    *,
    reward: Reward | None = None,
    answers: int = 5,
    seed: int = 0,
    batch_size: int = 64,
) -> list[Trajectory]:
    """Samples answers of a model, and cuts them where a search would.

    Args:
      lm: the model, under its adapter.
      dialogues: what it answers.
      settings: block, temperature and discount of the search.
      max_new_tokens: longest answer.
      risk, reward: see `search.search`.
      answers: answers to each dialogue.
      seed: seed of the samples.
      batch_size: answers decoded at once.
    """
    prompts = lm.render(dialogues, max_new_tokens, truncate=True)
    engine = generation.Engine(
        lm.model,
        lm.params,
        lm.factors,
        stop_ids=lm.stop_ids,
        batch_size=max(batch_size // answers, 1),
        mesh=lm.mesh,
    )
    answered: list[Trajectory] = []
    for row_of, size in engine.batches(prompts):
        rows, places = generation.in_rows(prompts, row_of, size), [0] * size
        for i, row in row_of.items():
            places[row] = i
        sampling = Sampling(float(settings.temperature))
        blocks = Blocks(
            engine,
            rows,
            places,
            candidates=answers,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
        )
        active = np.array([bool(len(row)) for row in rows])
        grown = blocks.grow(0, max_new_tokens, blocks.first(), active)
        for i, row in sorted(row_of.items()):
            for n in range(answers):
                ids = grown.out[row, n][grown.out[row, n] >= 0].tolist()
                mean = float(grown.log_prob[row, n]) / max(len(ids), 1)
                answered.append(
                    _cut(
                        lm,
                        settings,
                        i,
                        prompt=prompts[i],
                        ids=ids,
                        dialogue=dialogues[i],
                        risk=risk,
                        reward=mean,
                    )
                )
    if reward is not None:
        texts = [lm.text(one.ids[len(prompts[one.prompt]) :]) for one in answered]
        worth = reward([dialogues[one.prompt] for one in answered], texts)
        answered = [one._replace(reward=float(w)) for one, w in zip(answered, worth, strict=True)]
    return answered


def _cut(
    lm: LanguageModel,
    settings: Search,
    number: int,
    prompt: Sequence[int],
    ids: list[int],
    dialogue: Messages,
    risk: Risk,
    reward: float,
) -> Trajectory:
    step = settings.block or len(ids)
    ends = [*range(step, len(ids), step), len(ids)]
    texts = [lm.text(ids[:end]) for end in ends]
    highest = np.maximum.accumulate(cost_of(risk([dialogue] * len(ends), texts)))
    costs, tokens = np.diff(highest, prepend=0.0), np.diff(ends, prepend=0)
    to_come = remaining(costs.tolist(), tokens.tolist(), settings.gamma)
    return Trajectory(
        number,
        [*prompt, *ids],
        [len(prompt) + end - 1 for end in ends[:-1]],
        to_come=to_come[:-1],
        reward=reward,
    )
