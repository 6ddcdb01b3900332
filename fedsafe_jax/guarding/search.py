"""Search over answers under a budget of risk, block by block.

"Almost Surely Safe Alignment of Large Language Models at Inference-Time" (Ji et al., 2025, arXiv
2502.01208), InferenceGuard: decoding is a constrained Markov decision process whose state carries
the budget that is left, z. A block of tokens that costs c leaves

    z' = (z - c) / gamma ** tokens,    z = budget at first,

and answers with z <= 0 are rejected, whatever else they are worth. The cost of an answer is the
highest -log P(safe), in nats, that a guard reads of its beginnings so far, and a block costs what
that grows by: without discount an answer is within its budget where no beginning of it, block by
block, has a P(safe) of exp(-budget) or less. Best of n and beam search are the same loop with other
sizes; a penalty in the place of the budget is their Lagrangian form. The paper's code is not
published: the loop is the paper's, the cost is ours.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedsafe_jax.data.examples import Messages
from fedsafe_jax.data.refusals import REFUSAL
from fedsafe_jax.guarding.blocks import Blocks
from fedsafe_jax.guarding.contract import GuardError, Reward, Risk
from fedsafe_jax.guarding.decodings import Search
from fedsafe_jax.guarding.weighing import Foresight, Kept, Prompts, Weighing, avoiding, select
from fedsafe_jax.inference import generation
from fedsafe_jax.inference.language_model import LanguageModel
from fedsafe_jax.inference.sampling import Sampling


class Found(NamedTuple):
    """Answers of a search, in the prompts' order.

    Attributes:
      ids: token ids of each answer, without the stop token and without what was begun.
      finished: bool `[prompts]`; False for an answer cut at its longest.
      failed_closed: bool `[prompts]`; True where nothing was within the budget, and the
        refusal stands in for an answer.
      budget_left: float32 `[prompts]`, z of the answer; 0 where it failed closed.
      cost: float32 `[prompts]`, -log P(safe) of the answer, in nats.
      reward: float32 `[prompts]`, of that answer.
      tried: candidates that were generated for each prompt, a block counted once.
    """

    ids: list[list[int]]
    finished: np.ndarray
    failed_closed: np.ndarray
    budget_left: np.ndarray
    cost: np.ndarray
    reward: np.ndarray
    tried: np.ndarray


def search(
    lm: LanguageModel,
    dialogues: Sequence[Messages],
    settings: Search,
    max_new_tokens: int,
    *,
    risk: Risk | None = None,
    reward: Reward | None = None,
    critic: Foresight | None = None,
    begun: Sequence[Sequence[int]] | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    batch_size: int = 64,
    truncate: bool = False,
    refusal: str = REFUSAL,
) -> Found:
    """Searches an answer to each dialogue.

    With one candidate and no budget these are the answers of `LanguageModel.answer_dialogues`, and
    the candidates of best of n are those of `LanguageModel.sample`.

    Args:
      lm: the model, under its adapter.
      dialogues: (role, text) turns that end in a user turn.
      settings: sizes of the search.
      max_new_tokens: longest answer.
      risk: P(unsafe) of an answer or its beginning; needed by a budget or a penalty.
      reward: what is wanted of an answer; None for its mean log-probability a token, in nats.
      critic: what an unfinished answer will come to, in the place of what it is; None without.
      begun: token ids that each answer begins with; None for nothing. A guard reads them too.
      sampling: how continuations are drawn, in the place of `settings.temperature`.
      seed: seed of the samples.
      batch_size: candidates that are continued at once; at least those of one prompt.
      truncate: as in `LanguageModel.answer_dialogues`.
      refusal: what stands in where nothing is within the budget.

    Raises:
      GuardError: the settings ask for a guard, and no risk is given.
      ModelError: a dialogue is too long for the context.
    """
    if settings.reads_risk and risk is None:
        raise GuardError("a search with a budget or a penalty needs a guard, whose risk it reads.")
    said = [list(ids) for ids in begun] if begun is not None else [[] for _ in dialogues]
    room = max_new_tokens + max(map(len, said), default=0)
    rendered = lm.render(dialogues, room, truncate)
    prompts = [[*prompt, *own] for prompt, own in zip(rendered, said, strict=True)]
    generation.check_lengths(prompts, lm.config.max_length - max_new_tokens)
    engine = generation.Engine(
        lm.model,
        lm.params,
        lm.factors,
        stop_ids=lm.stop_ids,
        batch_size=max(batch_size // settings.candidates, 1),
        mesh=lm.mesh,
    )
    weigh = Weighing(lm, settings, risk, reward=reward, critic=critic)
    result = _nothing(len(prompts))
    refusal_ids = lm.tokenizer(refusal, add_special_tokens=False)["input_ids"]
    for row_of, size in engine.batches(prompts):
        at = [None] * size
        for i, row in row_of.items():
            at[row] = i
        rows = Prompts(
            *([each[i] if i is not None else () for i in at] for each in (prompts, dialogues, said))
        )
        blocks = Blocks(
            engine,
            rows.ids,
            [i or 0 for i in at],
            candidates=settings.candidates,
            max_new_tokens=max_new_tokens,
            sampling=sampling or Sampling(float(settings.temperature)),
            seed=seed,
        )
        kept, closed, tried = _batch(blocks, weigh, rows, max_new_tokens, lm.config.vocab_size)
        _write(
            result,
            row_of,
            kept,
            closed=closed,
            tried=tried,
            stop_ids=lm.stop_ids,
            refusal=refusal_ids,
        )
    return result


def _nothing(count: int) -> Found:
    return Found(
        ids=[[] for _ in range(count)],
        finished=np.zeros(count, bool),
        failed_closed=np.zeros(count, bool),
        budget_left=np.zeros(count, np.float32),
        cost=np.zeros(count, np.float32),
        reward=np.zeros(count, np.float32),
        tried=np.zeros(count, np.int64),
    )


def _batch(
    blocks: Blocks, weigh: Weighing, prompts: Prompts, room: int, vocab: int
) -> tuple[Kept, np.ndarray, np.ndarray]:
    """Searches the answers of a batch: `(answers, closed bool [rows], tried int64 [rows])`."""
    settings, rows = weigh.settings, len(prompts.ids)
    kept, step = weigh.first(blocks.first()), 0
    closed, tried = np.zeros(rows, bool), np.zeros(rows, np.int64)
    while step < room and not kept.answers.done.all():
        end = min(step + (settings.block or room), room)
        active = waiting = ~kept.answers.done.all(axis=1)
        best = bias = None
        for attempt in range(settings.retries + 1):
            answers = blocks.grow(step, end, kept.answers, waiting, bias, attempt)
            grown = weigh(prompts, kept, answers, is_last=end == room)
            tried += waiting * settings.candidates
            chosen = select(grown, settings.keep)
            blocks.choose(chosen, waiting)
            new = grown.take(chosen)
            best = new if best is None else best.replaced(new, waiting)
            waiting = active & ~np.isfinite(best.worth).any(axis=1)
            if not waiting.any():
                break
            bias = avoiding(grown, waiting, step, vocab, settings.frequency)
        blocks.advance()
        closed |= waiting
        done = best.answers.done | closed[:, None]
        kept, step = best._replace(answers=best.answers._replace(done=done)), end
    return kept, closed, tried


def _write(
    result: Found,
    row_of: Mapping[int, int],
    kept: Kept,
    closed: np.ndarray,
    tried: np.ndarray,
    stop_ids: Sequence[int],
    refusal: list[int],
) -> None:
    """Writes the best answers of a batch into those of all prompts."""
    best = kept.take(kept.worth.argmax(axis=1)[:, None])
    for i, row in row_of.items():
        ids = best.answers.out[row, 0]
        ids = ids[ids >= 0].tolist()
        ended = bool(ids) and ids[-1] in stop_ids
        result.ids[i] = list(refusal) if closed[row] else ids[:-1] if ended else ids
        result.finished[i] = closed[row] or ended
        result.failed_closed[i] = closed[row]
        result.budget_left[i] = 0.0 if closed[row] else best.budget[row, 0]
        result.cost[i], result.reward[i] = best.cost[row, 0], best.reward[row, 0]
        result.tried[i] = tried[row]
