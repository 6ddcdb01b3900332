"""Local batches of a round's clients, drawn and packed from (seed, round, client)."""

import random
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fedsafe_jax.data.chat import Encoded
from fedsafe_jax.data.packing import Batch, NoisyBatch, assign_rows, bucket, fill
from fedsafe_jax.random_streams import Purpose, generator


def _shuffled(size: int, seed: int, round_number: int, client: int, count: int) -> list[int]:
    """Walks through shuffles of all examples, a new one when one ends."""
    rng = generator(Purpose.EXAMPLES, seed, round_number, client)
    indices: list[int] = []
    while len(indices) < count:
        indices.extend(rng.permutation(size).tolist())
    return indices[:count]


def _openfedllm(size: int, seed: int, round_number: int, client: int, count: int) -> list[int]:
    """Walks through one sample without replacement, drawn from the round number alone.

    The sample is walked through again when it ends; OpenFedLLM (Ye et al., 2024, arXiv 2402.06954)
    then shuffles it anew.
    """
    del seed, client
    sample = random.Random(round_number).sample(range(size), min(size, count))
    return [sample[i % len(sample)] for i in range(count)]


# `(size, seed, round_number, client, count) -> indices` by name; `size` is at least 1.
ORDERS: dict[str, Callable] = {"shuffle": _shuffled, "openfedllm": _openfedllm}


def draw_examples(
    size: int, seed: int, round_number: int, client: int, count: int, order: str = "shuffle"
) -> list[int]:
    """Draws the examples that a client takes in a round.

    Args:
      size: examples that the client holds.
      seed, round_number, client: seed of the run, and numbers of the round and the client; the draw
        depends on nothing else.
      count: examples wanted.
      order: a name in `ORDERS`.

    Returns:
      `count` indices below `size`, in order; none where the client holds nothing.
    """
    return ORDERS[order](size, seed, round_number, client, count) if size else []


class RoundBatches:
    """Batches of a round, packed when they are asked for, so that many clients need little memory.

    The number of rows is the bucketed maximum over the round: one shape for all chunks of clients.

    Args:
      clients: encoded examples of every client of the run.
      seed, round_number: seed of the run and number of the round, from which examples are drawn.
      ids: clients of the round.
      steps: int `[len(ids)]`, steps that each client gets done; the rest of its batches are empty.
      local_steps: steps of the arrays.
      batch_size: examples a batch.
      seq: tokens a row.
      accumulation: batches a step.
      order: how clients take their examples, a name in `ORDERS`.
      noise: whether batches have the random bits of dropout, drawn from (seed, round, client,
        batch).

    Attributes:
      rows: rows of a batch.
      filled: int `[len(ids), batches]`, rows of each batch that are not empty.
    """

    def __init__(
        self,
        clients: Sequence[Sequence[Encoded]] | Mapping[int, Sequence[Encoded]],
        seed: int,
        round_number: int,
        ids: Sequence[int] | np.ndarray,
        steps: Sequence[int] | np.ndarray,
        local_steps: int,
        batch_size: int,
        seq: int,
        accumulation: int = 1,
        order: str = "shuffle",
        noise: bool = False,
    ):
        self._noise = (seed, round_number, [int(i) for i in ids]) if noise else None
        self._seq, self._plans, most = seq, [], 1
        self._batches = local_steps * accumulation
        for client, done in zip(ids, steps, strict=True):
            examples, batches = clients[client], int(done) * accumulation
            chosen = draw_examples(
                len(examples),
                seed,
                round_number,
                client=int(client),
                count=batches * batch_size,
                order=order,
            )
            plan = []
            for b in range(batches if chosen else 0):
                picked = [examples[i] for i in chosen[b * batch_size : (b + 1) * batch_size]]
                rows = assign_rows([len(e.ids) for e in picked], seq)
                most = max(most, len(rows))
                plan.append((picked, rows))
            self._plans.append(plan)
        self.rows = bucket(most)
        self.filled = np.array(
            [
                [len(rows) for _, rows in plan] + [0] * (self._batches - len(plan))
                for plan in self._plans
            ],
            int,
        ).reshape(len(self._plans), self._batches)

    def __len__(self) -> int:
        return len(self._plans)

    def chunk(self, start: int, stop: int) -> Batch | NoisyBatch:
        """Packs the batches of clients `start` to `stop` of the round.

        Returns:
          Arrays `[stop - start, batches, rows, seq]`; clients past the end of the round, and
          batches that are not done, are empty.
        """
        shape = (stop - start, self._batches, self.rows, self._seq)
        whole = Batch(
            *(np.zeros(shape, np.float32 if n == "mask" else np.int32) for n in Batch._fields)
        )
        for i, plan in enumerate(self._plans[start:stop]):
            for b, (picked, rows) in enumerate(plan):
                for field, packed in zip(
                    whole, fill(picked, rows, self.rows, self._seq), strict=True
                ):
                    field[i, b] = packed
        return (
            whole
            if self._noise is None
            else NoisyBatch(**whole._asdict(), noise=self._drawn(start, shape))
        )

    def _drawn(self, start: int, shape: tuple[int, ...]) -> np.ndarray:
        """Draws the noise of the clients from `start` on, uint32 of `shape`.

        Each batch has a stream of its own, from which its first rows are the same however many
        there are: the number of rows is the cohort's, and nothing of a client may depend on others.
        """
        seed, round_number, ids = self._noise
        noise = np.zeros(shape, np.uint32)
        for client, batches in zip(ids[start:], noise, strict=False):
            for b, rows in enumerate(batches):
                rng = generator(Purpose.ADAPTER_DROPOUT, seed, round_number, client, b)
                rows[:] = rng.integers(2**32, size=rows.shape, dtype="uint32")
        return noise
