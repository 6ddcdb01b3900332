"""Greedy coordinate gradient: a suffix under which models begin with a target.

"Universal and Transferable Adversarial Attacks on Aligned Language Models" (Zou et al., 2023, arXiv
2307.15043), Algorithm 1, for one request at a time: a batch of suffixes fills the devices by
itself. The buffer is that of nanogcg (Gray Swan AI), after Hayase et al., 2024, arXiv 2402.12329.
Several models, of one tokenizer, and several targets count by the mean of their losses.
"""

import functools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fedsafe_jax.attacks import suffix as suffixes
from fedsafe_jax.attacks import target_loss
from fedsafe_jax.attacks.contract import (
    Attack,
    Attacked,
    AttackError,
    AttackPrompt,
    Settings,
    reworded,
)
from fedsafe_jax.data import chat
from fedsafe_jax.data.examples import Example, Messages
from fedsafe_jax.inference.language_model import LanguageModel

OVERDRAW = 4  # drawn for each that is scored, as many do not survive as text


def attack(
    models: Sequence[LanguageModel],
    requests: Sequence[Example],
    targets: Sequence[Sequence[str]],
    settings: Settings,
    key: jax.Array,
) -> Attacked:
    """Searches a suffix for each request.

    Args:
      models, requests, targets, settings, key: as in `Attack.run`.

    Returns:
      The request with the best suffix; losses are those of the suffix that the search holds, with
      `settings.buffer` the best so far.

    Raises:
      AttackError: the models have different tokenizers, or a request has no place for a suffix.
    """
    check_models(models)
    victims = [lm.on_one_device() for lm in models]
    allowed = np.logical_and.reduce(
        [suffixes.allowed_tokens(lm.tokenizer, lm.config.vocab_size) for lm in victims]
    )
    prompts, losses, queries = [], [], []
    for i, (request, texts) in enumerate(zip(requests, targets, strict=True)):
        began = time.monotonic()
        search = Search(victims, request, texts, settings=settings, allowed=allowed)
        trace = search.run(jax.random.fold_in(key, i))
        settings.note(
            f"gcg: request {i + 1} of {len(requests)}, loss {trace[0]:.3f} to {search.loss:.3f}, "
            f"{time.monotonic() - began:.0f} s"
        )
        prompts.append([AttackPrompt(search.messages)])
        losses.append(trace)
        queries.append(search.queries)
    return Attacked(
        prompts,
        losses=np.asarray(losses, np.float32).reshape(len(prompts), settings.steps + 1),
        queries=np.asarray(queries, np.int64),
    )


def check_models(models: Sequence[LanguageModel]) -> None:
    """Checks that one suffix has the same tokens in all models.

    Raises:
      AttackError: two models have different tokenizers.
    """
    first = models[0]
    for lm in models[1:]:
        same = lm.tokenizer.get_vocab() == first.tokenizer.get_vocab()
        if not same or lm.config.vocab_size != first.config.vocab_size:
            raise AttackError(
                f"'gcg' adds up gradients by tokens, and {lm.name} and {first.name} have different "
                "tokenizers; attack them apart."
            )


@functools.partial(jax.jit, static_argnames=("top_k", "count"))
def propose(
    key: jax.Array,
    gradient: jax.Array,
    suffix: jax.Array,
    allowed: jax.Array,
    *,
    top_k: int,
    count: int,
) -> jax.Array:
    """Draws changed suffixes: one token each, at a place and from its `top_k` drawn evenly.

    Args:
      key: PRNG key.
      gradient: float32 `[length, vocab]`.
      suffix: int32 `[length]`.
      allowed: bool `[vocab]`.
      top_k: tokens with the steepest descent that are drawn from; static.
      count: suffixes; static.

    Returns:
      int32 `[count, length]`.
    """
    _, top = jax.lax.top_k(jnp.where(allowed, -gradient, -jnp.inf), top_k)
    at, which = (
        jax.random.randint(k, (count,), 0, most)
        for k, most in zip(jax.random.split(key), top.shape, strict=True)
    )
    drawn = jnp.broadcast_to(suffix, (count, len(suffix)))
    return drawn.at[jnp.arange(count), at].set(top[at, which].astype(jnp.int32))


class Search:
    """The search of one request.

    Args:
      models: the models, each on one device, of one tokenizer.
      request: the request.
      targets: beginnings of answers that comply.
      settings: sizes.
      allowed: bool `[vocab]`, tokens that a suffix may have.
      gradient: what `target_loss.gradient` is, for comparisons with another direction.

    Attributes:
      loss: the loss of the best suffix so far.
      messages: the request with it.
      queries: sequences that each model has read.
    """

    def __init__(
        self,
        models: Sequence[LanguageModel],
        request: Example,
        targets: Sequence[str],
        settings: Settings,
        allowed: np.ndarray,
        gradient: Callable = target_loss.gradient,
    ):
        self._settings, self._request, self._allowed = settings, request, allowed
        self._tokenizers = [lm.tokenizer for lm in models]
        self._places = [
            suffixes.place(lm.tokenizer, request, settings.suffix_tokens) for lm in models
        ]
        if any(one.start != self._places[0].start for one in self._places):
            raise AttackError("'gcg': the models' templates leave a suffix different tokens.")
        self._reads = len(targets)
        behind = tuple(
            target_loss.read_before(
                lm,
                place.ids_before,
                place.ids_after,
                targets=[
                    target_ids(lm, request.messages, text, settings.target_tokens)
                    for text in targets
                ],
            )
            for lm, place in zip(models, self._places, strict=True)
        )
        variables = tuple(target_loss.variables_of(lm) for lm in models)
        inputs = tuple(lm.model for lm in models), variables, behind
        self._losses = functools.partial(target_loss.losses, *inputs)
        self._gradient = functools.partial(gradient, *inputs)
        self.queries = 0
        start = np.asarray(self._places[0].start, np.int32)
        # Sorted by loss: the suffixes that are kept, of which the first is changed next.
        self._kept = [(float(self.score(start[None])[0]), start)]
        self._best = self._kept[0]

    @property
    def loss(self) -> float:
        """The loss of the best suffix so far."""
        return self._best[0]

    @property
    def held_loss(self) -> float:
        """The loss of the suffix that is changed next."""
        return self._kept[0][0]

    @property
    def messages(self) -> Messages:
        """The request with the best suffix so far."""
        return self.messages_with(self._best[1])

    def messages_with(self, ids: np.ndarray) -> Messages:
        """Returns the request with a suffix, int32 `[length]`."""
        return reworded(self._request.messages, self._request.prompt + (self._text(ids) or ""))

    def start_from(self, others: Sequence[np.ndarray]) -> None:
        """Begins with the suffix of the lowest loss: its own start, or one of others, int32
        `[length]` each, that survives as text here."""
        surviving = [ids for ids in others if self._text(ids) is not None]
        if surviving := surviving[-self._settings.candidates :]:
            scores = self.score(np.stack(surviving))
            at = int(np.argmin(scores))
            if scores[at] < self.held_loss:
                self.move_to(float(scores[at]), surviving[at])

    def run(self, key: jax.Array) -> list[float]:
        """Takes all steps, and returns the loss of the suffix held, `[steps + 1]`."""
        trace = [self.held_loss]
        for step in range(self._settings.steps):
            self.step(jax.random.fold_in(key, step))
            trace.append(self.held_loss)
        return trace

    def step(self, key: jax.Array) -> None:
        """Takes a step: gradient, candidates, their losses, and the best of them into the buffer.

        Where no candidate survives as text nothing changes, and the next step draws others.
        """
        drawn = self.draw(key)
        if drawn is not None:
            candidates, scores = drawn
            at = int(np.argmin(scores))
            self.hold(float(scores[at]), candidates[at])

    def draw(self, key: jax.Array) -> tuple[np.ndarray, np.ndarray] | None:
        """Draws candidates by the gradient, and scores them.

        Returns:
          `(int32 [candidates, length], float32 [candidates])`; None where none survives as text.
        """
        settings, current = self._settings, self._kept[0][1]
        self.queries += self._reads
        drawn = propose(
            key,
            self._gradient(current),
            suffix=current,
            allowed=self._allowed,
            top_k=min(settings.top_k, int(self._allowed.sum())),
            count=OVERDRAW * settings.candidates,
        )
        candidates = self._surviving(np.asarray(drawn), current)
        return (candidates, self.score(candidates)) if len(candidates) else None

    def hold(self, loss: float, ids: np.ndarray) -> None:
        """Puts a suffix into the buffer, of which the best one is changed next."""
        buffer = self._settings.buffer
        if not buffer:
            self.move_to(loss, ids)
            return
        self._best = min(self._best, (loss, ids), key=lambda one: one[0])
        if not any((ids == other).all() for _, other in self._kept):
            kept = sorted([*self._kept, (loss, ids)], key=lambda one: one[0])
            self._kept = kept[:buffer]

    def move_to(self, loss: float, ids: np.ndarray) -> None:
        """Goes on from a suffix, whatever its loss, with a buffer of it alone."""
        self._best = min(self._best, (loss, ids), key=lambda one: one[0])
        self._kept = [(loss, ids)]

    def _surviving(self, drawn: np.ndarray, current: np.ndarray) -> np.ndarray:
        """Returns the first of the suffixes drawn that are new and survive as text."""
        seen, kept = {current.tobytes()}, []
        for ids in drawn:
            if ids.tobytes() in seen:
                continue
            seen.add(ids.tobytes())
            if self._text(ids) is not None:
                kept.append(ids)
                if len(kept) == self._settings.candidates:
                    break
        return np.asarray(kept, np.int32)

    def _text(self, ids: np.ndarray) -> str | None:
        """Returns the text of a suffix, the same for all models; None where there is none."""
        texts = {
            suffixes.as_text(tokenizer, place, ids.tolist())
            for tokenizer, place in zip(self._tokenizers, self._places, strict=True)
        }
        return texts.pop() if len(texts) == 1 else None

    def score(self, candidates: np.ndarray) -> np.ndarray:
        """Returns the losses of suffixes, float32 `[rows]`, in parts of one shape.

        Args:
          candidates: int32 `[rows, length]`, at most `settings.candidates` rows.
        """
        settings, rows = self._settings, len(candidates)
        self.queries += rows * self._reads
        part = min(settings.chunk, settings.candidates)
        parts = -(-settings.candidates // part)
        filled = np.resize(candidates, (parts * part, candidates.shape[1]))
        scores = self._losses(filled.reshape(parts, part, -1))
        return np.asarray(scores).reshape(-1)[:rows]


def target_ids(lm: LanguageModel, messages: Messages, text: str, count: int) -> list[int]:
    """Returns the first `count` tokens of an answer, as they stand behind a dialogue.

    Raises:
      AttackError: the answer has no token.
    """
    encoded = chat.encode(lm.tokenizer, messages, text, lm.config.max_length)
    if encoded is None:
        raise AttackError(f"'gcg': the target {text[:40]!r} has no token behind its request.")
    encoded = chat.without_end(lm.tokenizer, encoded)
    return encoded.ids[encoded.loss_mask][:count].tolist()


GCG = Attack(attack, check_models=check_models)
