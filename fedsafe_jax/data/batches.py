"""The local batches of a round's clients, drawn and packed from (seed, round, client)."""

import random
from collections.abc import Sequence

import numpy as np

from fedsafe_jax.data.chat import Encoded
from fedsafe_jax.data.packing import Batch, assign_rows, bucket, fill

DRAWS = ("shuffle", "openfedllm")


def draw(
    size: int, seed: int, round_number: int, client: int, count: int, how: str = "shuffle"
) -> list[int]:
    """Which of a client's `size` examples it takes in a round, `count` in order.

    Args:
      size: examples that the client holds.
      seed, round_number, client: the draw depends on nothing else.
      count: examples wanted.
      how: `shuffle`: walk through shuffles of all examples, a new one when one ends. `openfedllm`:
        a sample without replacement from the round alone, walked through again when it ends (that
        package then shuffles it anew).
    """
    if not size:
        return []
    if how == "openfedllm":
        some = random.Random(round_number).sample(range(size), min(size, count))
        return [some[i % len(some)] for i in range(count)]
    rng = np.random.default_rng([seed, round_number, 1, client])
    draws: list[int] = []
    while len(draws) < count:
        draws.extend(rng.permutation(size).tolist())
    return draws[:count]


class RoundBatches:
    """Batches of a round, packed when they are asked for, so that many clients need little memory.

    Rows are the bucketed maximum over the round: one shape for all chunks of clients.

    Args:
      clients: encoded examples of every client of the run.
      seed, round_number: of the draws.
      ids: the round's clients.
      steps: int `[len(ids)]`, steps that each gets done; the rest of its batches are empty.
      local_steps: steps of the arrays.
      batch_size: examples a batch.
      seq: tokens a row.
      accumulation: batches a step.
      how: see `draw`.
    """

    def __init__(
        self,
        clients: Sequence[Sequence[Encoded]],
        seed: int,
        round_number: int,
        ids: Sequence[int],
        steps: Sequence[int],
        local_steps: int,
        batch_size: int,
        seq: int,
        accumulation: int = 1,
        how: str = "shuffle",
    ):
        self._seq, self._plans, most = seq, [], 1
        self._batches = local_steps * accumulation
        for client, done in zip(ids, steps, strict=True):
            examples, batches = clients[client], int(done) * accumulation
            chosen = draw(
                len(examples),
                seed,
                round_number,
                client=int(client),
                count=batches * batch_size,
                how=how,
            )
            plan = []
            for b in range(batches if chosen else 0):
                picked = [examples[i] for i in chosen[b * batch_size : (b + 1) * batch_size]]
                rows = assign_rows([len(e.ids) for e in picked], seq)
                most = max(most, len(rows))
                plan.append((picked, rows))
            self._plans.append(plan)
        self.rows = bucket(most)

    def __len__(self) -> int:
        return len(self._plans)

    def chunk(self, start: int, stop: int) -> Batch:
        """Clients `start` to `stop` of the round, `[stop - start, batches, rows, seq]`; those past
        the end and batches that are not done are empty."""
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
        return whole
