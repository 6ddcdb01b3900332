"""A queue of work, and the one thread that owns the device.

What has arrived with the same sampling settings is decoded as one batch, whatever adapter it is
for. A batch is
not joined by what arrives later; it ends early when nobody waits for any of its answers.
"""

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from fedsafe_jax.evals.judges import Answered, Verdict
from fedsafe_jax.evals.judges.guard import Guard
from fedsafe_jax.inference.sampling import Sampling
from fedsafe_jax.serving.errors import ApiError
from fedsafe_jax.serving.served_models import Draw
from fedsafe_jax.serving.token_scores import TokenScores

# Clients that were answered together ask again together, within milliseconds: a worker that took
# the first alone would let the others wait for a batch of one. So a batch begins when nothing new
# has come for a moment, and as many wait as the last batch had; or at the latest.
QUIET_S = 0.004
LONGEST_WAIT_S = 0.04


class Models(Protocol):
    """What the thread asks, see `served_models.ServedModels`."""

    def group(self, model: str) -> str:
        """Returns what models that answer in one batch have in common."""

    def generate(
        self, models: Sequence[str], sampling: Sampling, draws: Sequence[Draw]
    ) -> Iterator[list[tuple[list[int], bool]]]:
        """Continues prompts in pieces, each under its model."""

    def score(self, model: str, sequences: Sequence[Sequence[int]], top: int) -> list[TokenScores]:
        """Scores the tokens of each sequence."""


class Piece(NamedTuple):
    """An answer so far: its token ids, and whether no more come."""

    ids: list[int]
    is_last: bool


class Failed(NamedTuple):
    """Work that ended without an answer."""

    error: ApiError


Event = Piece | TokenScores | Verdict | Failed


@dataclasses.dataclass(eq=False)
class Job:
    """One prompt's work.

    Attributes:
      model: name of the model, or guard.
      deliver: takes what comes of it, called from the worker's thread.
      deadline: time of `time.monotonic` after which nobody waits.
      draw: the prompt; for scores, `draw.ids` is the sequence.
      sampling: how tokens are drawn.
      top: likeliest tokens at each place, for scores; None to generate.
      answered: what a guard judges; None for other work.
      is_over: set by whoever waits no longer, and at the last event.
    """

    model: str
    deliver: Callable[[Event], None]
    deadline: float
    draw: Draw = Draw((), 0, 0, place=0)
    sampling: Sampling = Sampling()
    top: int | None = None
    answered: Answered | None = None
    is_over: bool = False

    def alike(self, group: Callable[[str], str]) -> tuple[Any, ...]:
        """Returns what jobs of one batch have in common.

        Answers of about one length are decoded together: a short one does not wait for a long one.

        Args:
          group: what models that answer in one batch have in common.
        """
        if self.answered is not None:
            return self.model, "verdicts"
        if self.top is not None:
            return self.model, "scores", self.top
        return group(self.model), self.sampling, max(16, self.draw.max_tokens - 1).bit_length()


class Batcher:
    """Collects jobs into batches and runs them in a thread of its own.

    Args:
      models: what is asked; None for guards alone.
      batch_size: most jobs of a batch.
      most_waiting: most jobs that wait; more are refused.
      guards: what judges, by name.
    """

    def __init__(
        self,
        models: Models | None,
        batch_size: int,
        most_waiting: int,
        guards: Mapping[str, Guard] | None = None,
    ):
        self._models, self._batch_size, self.most_waiting = models, batch_size, most_waiting
        self._guards = guards or {}
        self._waiting: collections.deque[Job] = collections.deque()
        self._changed, self._is_closed = threading.Condition(), False
        self._arrived = 0  # calls of `submit`, ever
        self._last_size = 0  # jobs of the last batch
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self, timeout_s: float = 10) -> None:
        """Ends the thread after its current piece; jobs that wait fail with status 503.

        Args:
          timeout_s: seconds to wait for it.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def submit(self, jobs: Sequence[Job], admitted: bool = False) -> None:
        """Puts jobs in the queue, all or none.

        Args:
          jobs: what is to be done.
          admitted: whether they go on with what was taken before, so that no limit is asked.

        Raises:
          ApiError: too many jobs wait (429), or the server is going down (503).
        """
        with self._changed:
            if self._is_closed:
                raise _closing()
            waiting = sum(not job.is_over for job in self._waiting)
            if not admitted and waiting + len(jobs) > self.most_waiting:
                raise ApiError(
                    429,
                    f"{waiting} prompts wait of at most {self.most_waiting}; ask again later.",
                    code="rate_limit_exceeded",
                )
            self._waiting.extend(jobs)
            self._arrived += 1
            self._changed.notify_all()

    def _run(self) -> None:
        while batch := self._next_batch():
            try:
                self._work(batch)
            except Exception:  # whatever it was, the next batch is another one
                logging.exception("a batch of %d prompts failed", len(batch))
                for job in batch:
                    _finish(job, Failed(ApiError(500, "The model failed; see the server's log.")))
        for job in self._waiting:
            _finish(job, Failed(_closing()))

    def _next_batch(self) -> list[Job]:
        """Waits for work; returns jobs that are alike, oldest first, [] when it is over."""
        with self._changed:
            while not self._is_closed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                self._wait_for_more()
                self._drop_late()
                if self._waiting:
                    break
            if self._is_closed:
                return []
            alike, batch, rest = self._alike(self._waiting[0]), [], collections.deque()
            for job in self._waiting:
                is_taken = len(batch) < self._batch_size and self._alike(job) == alike
                (batch if is_taken else rest).append(job)
            self._waiting, self._last_size = rest, len(batch)
            return batch

    def _alike(self, job: Job) -> tuple[Any, ...]:
        return job.alike(lambda model: self._models.group(model) if self._models else model)

    def _wait_for_more(self) -> None:
        latest = time.monotonic() + LONGEST_WAIT_S
        while len(self._waiting) < self._batch_size and time.monotonic() < latest:
            known = self._arrived
            is_quiet = not self._changed.wait_for(lambda n=known: self._arrived > n, QUIET_S)
            if is_quiet and len(self._waiting) >= self._last_size:
                break

    def _drop_late(self) -> None:
        now = time.monotonic()
        for job in self._waiting:
            job.is_over |= now > job.deadline
        self._waiting = collections.deque(job for job in self._waiting if not job.is_over)

    def _work(self, batch: list[Job]) -> None:
        first, draws = batch[0], [job.draw for job in batch]
        if first.answered is not None:
            verdicts = self._guards[first.model].judge([job.answered for job in batch])
            for job, verdict in zip(batch, verdicts, strict=True):
                _finish(job, verdict)
            return
        if first.top is not None:
            scores = self._models.score(first.model, [draw.ids for draw in draws], first.top)
            for job, one in zip(batch, scores, strict=True):
                _finish(job, one)
            return
        names = [job.model for job in batch]
        for answers in self._models.generate(names, first.sampling, draws):
            for job, (ids, is_done) in zip(batch, answers, strict=True):
                most = job.draw.max_tokens
                job.is_over |= time.monotonic() > job.deadline
                if is_done or len(ids) >= most:
                    _finish(job, Piece(ids[:most], True))
                elif not job.is_over:
                    job.deliver(Piece(ids, False))
            if self._is_closed:
                for job in batch:
                    _finish(job, Failed(_closing()))
            if all(job.is_over for job in batch):
                break


def _finish(job: Job, event: Event) -> None:
    if not job.is_over:
        job.is_over = True
        job.deliver(event)


def _closing() -> ApiError:
    return ApiError(503, "The server is going down.", code="closing")
