"""Useful share of the tokens that a round computes, by how clients' rows are laid out.

    python benchmarks/useful_share.py [--lengths=FILE] [--devices=1]

Counted, not run: lengths of examples are packed as a run packs them. A line a shape: clients side
by side with the rows of the fullest batch, all steps with the slots of the fullest step, and slots
that follow each step (`models.row_queue`); the programs that six rounds of the last need.
"""

import numpy as np
from absl import app, flags

from fedsafe_jax.aot import lengths
from fedsafe_jax.data.batches import RoundBatches
from fedsafe_jax.models import row_queue

_LENGTHS = flags.DEFINE_string("lengths", None, "As of `fedsafe compile`; None for Dolly's.")
_DEVICES = flags.DEFINE_integer("devices", 1, "Devices that share the slots.")

SEQ, ROUNDS, EXAMPLES = 512, 6, 200
SHAPES = ((5, 16, 25), (20, 4, 10), (64, 16, 10), (64, 4, 10))  # clients, batch, steps


def main(_):
    given = lengths.read(_LENGTHS.value) if _LENGTHS.value else lengths.default()
    for clients, batch, steps in SHAPES:
        # Clients share examples where there are too few.
        examples = given.encoded(clients * EXAMPLES, SEQ)
        data = [examples[i::clients] for i in range(clients)]
        found, programs = [], set()
        for t in range(ROUNDS):
            batches = RoundBatches(
                data, 0, t, ids=range(clients), steps=[steps] * clients, local_steps=steps,
                batch_size=batch, seq=SEQ,
            )  # fmt: skip
            packed = batches.chunk(0, clients)
            totals, useful = batches.filled.sum(0), int((packed.segment_ids > 0).sum())
            slots = row_queue.choose_slots(totals, _DEVICES.value)
            programs.add(slots)
            computed = row_queue.computed(totals, slots).sum()
            rows = (packed.mask[..., 0].size, slots[-1] * steps, computed, totals.sum())
            found.append([useful / SEQ / count for count in rows])
        padded, largest, own, bound = np.mean(found, axis=0)
        print(
            f"{clients} x {batch}: side by side {padded:.0%}, slots of the fullest step "
            f"{largest:.0%}, of each step {own:.0%} (rows without a slot to spare {bound:.0%}); "
            f"programs: {sorted(programs)}"
        )


if __name__ == "__main__":
    app.run(main)
