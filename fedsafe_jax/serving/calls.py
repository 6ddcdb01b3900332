"""One request from its admission to its last token."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence

import numpy as np

from fedsafe_jax.inference.sampling import GREEDY
from fedsafe_jax.serving.answer_text import AnswerText
from fedsafe_jax.serving.batching import Batcher, Event, Failed, Job, Piece
from fedsafe_jax.serving.errors import ApiError
from fedsafe_jax.serving.schema import Asked
from fedsafe_jax.serving.served_models import Draw, ServedModels
from fedsafe_jax.serving.token_scores import TokenScores


class Choice:
    """One answer of a request.

    Attributes:
      index: its place in the reply.
      prompt: token ids of its prompt.
      text: the answer's text so far; it also holds the answer's tokens.
      finish: why it ended, "stop" or "length"; "" before.
      scores: of prompt and answer, where they were asked for.
    """

    def __init__(self, index: int, prompt: Sequence[int], text: AnswerText):
        self.index, self.prompt, self.text = index, prompt, text
        self.finish, self.scores = "", None
        self.is_done = False


class Call:
    """The answers to one request.

    Args:
      asked: the request.
      prompts: token ids of each prompt.
      models: what is served.
      batcher: who does the work.
      timeout_s: seconds until it is given up.
    """

    def __init__(
        self,
        asked: Asked,
        prompts: Sequence[Sequence[int]],
        models: ServedModels,
        batcher: Batcher,
        timeout_s: float,
    ):
        self._asked, self._models, self._batcher = asked, models, batcher
        self._timeout_s, self._deadline = timeout_s, time.monotonic() + timeout_s
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue()
        rows = [prompt for prompt in prompts for _ in range(asked.n)]
        self.prompt_tokens = sum(map(len, prompts))
        self.choices = [
            Choice(i, row, AnswerText(models.decode, row, asked.stop)) for i, row in enumerate(rows)
        ]
        # The likeliest next token is among the scores: nothing need be generated.
        is_scored_alone = asked.max_tokens == 1 and asked.sampling == GREEDY
        self._only_scores = asked.top is not None and (is_scored_alone or not asked.max_tokens)
        if asked.top is None and not asked.max_tokens:
            for choice in self.choices:
                choice.finish, choice.is_done = "length", True
        waiting = [choice for choice in self.choices if not choice.is_done]
        self._jobs = {choice.index: self._job(choice, self._only_scores) for choice in waiting}
        batcher.submit(list(self._jobs.values()))

    @property
    def completion_tokens(self) -> int:
        """Tokens of all answers so far."""
        return sum(len(choice.text.ids) for choice in self.choices)

    async def pieces(self) -> AsyncIterator[tuple[Choice, str]]:
        """Yields text as it comes, each answer's last with its `finish` set.

        Raises:
          ApiError: the model failed, or the request took too long.
        """
        for choice in self.choices:
            if choice.is_done:
                yield choice, ""
        while not all(choice.is_done for choice in self.choices):
            try:
                async with asyncio.timeout(self._deadline - time.monotonic()):
                    index, event = await self._events.get()
            except TimeoutError:
                raise ApiError(
                    504, f"The request took more than {self._timeout_s:g} seconds.", code="timeout"
                ) from None
            choice = self.choices[index]
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, TokenScores):
                self._take_scores(choice, event)
                yield choice, choice.text.text
            elif not choice.finish:
                new = self._take_piece(choice, event)
                if new or choice.is_done:
                    yield choice, new

    def cancel(self) -> None:
        """Ends the work: its answers are not waited for."""
        for job in self._jobs.values():
            job.is_over = True

    def _job(self, choice: Choice, scores: bool) -> Job:
        asked = self._asked
        ids = [*choice.prompt, *choice.text.ids]

        def deliver(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop may have ended before the thread
                self._loop.call_soon_threadsafe(self._events.put_nowait, (choice.index, event))

        draw = Draw(ids, asked.max_tokens, asked.seed, place=choice.index, dialogue=asked.dialogue)
        top = max(asked.top or 0, 1) if scores else None
        return Job(
            asked.model,
            deliver,
            self._deadline,
            draw=draw,
            sampling=asked.sampling,
            top=top,
        )

    def _take_piece(self, choice: Choice, piece: Piece) -> str:
        new = choice.text.grow(piece.ids, piece.is_last)
        if not (piece.is_last or choice.text.is_stopped):
            return new
        self._jobs[choice.index].is_over = True  # the thread may decode on for others
        self._end(choice)
        choice.is_done = self._asked.top is None
        if not choice.is_done:
            self._jobs[choice.index] = job = self._job(choice, scores=True)
            self._batcher.submit([job], admitted=True)
        return new

    def _take_scores(self, choice: Choice, scores: TokenScores) -> None:
        if not np.isfinite(scores.top_log_probs[:, 0]).all():
            raise ApiError(500, "The model's logits are no numbers; it has diverged.")
        choice.scores, choice.is_done = scores, True
        if self._only_scores:
            if self._asked.max_tokens:
                best = int(scores.top_ids[-1, 0])
                choice.text.grow([best], is_last=True)
                own = scores.top_log_probs[-1:, 0]
                choice.scores = scores._replace(log_probs=np.append(scores.log_probs, own))
            self._end(choice)

    def _end(self, choice: Choice) -> None:
        ids = choice.text.ids
        has_ended = choice.text.is_stopped or (ids and ids[-1] in self._models.stop_ids)
        choice.finish = "stop" if has_ended else "length"
