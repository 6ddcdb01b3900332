"""How far two runs of the same config drift apart that add the same numbers in another order.

    C="--config=configs/demo.py --config.arms=('fl',) --config.export_arm=fl"
    C="$C --config.checkpoint_keep=0"
    fedsafe run $C --workdir=runs/one
    bash launch/local_multiprocess.sh 2 $C --workdir=runs/two
    fedsafe run $C --config.chunk_clients=1 --workdir=runs/chunks
    XLA_FLAGS=--xla_force_host_platform_device_count=8 fedsafe run $C --workdir=runs/eight
    python benchmarks/order_of_sums.py runs/one runs/two runs/chunks runs/eight

Prints, for every kept round, the differences of the LoRA factors and of the clients' loss from the
first run's, and whether the verdicts on all answers are the same at the end.
"""

import json
import pathlib
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp


def factors(folder: pathlib.Path, round_number: int) -> np.ndarray:
    """Returns all LoRA factors of a kept round, flat; they are the arrays of three axes."""
    path = folder / "checkpoints" / "fl" / "seed0" / str(round_number) / "default"
    reader = ocp.PyTreeCheckpointer()
    tree = reader.metadata(path.resolve()).item_metadata.tree
    on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    arrays = jax.tree.leaves(reader.restore(path.resolve(), restore_args=on_host))
    return np.concatenate([np.ravel(x) for x in arrays if np.ndim(x) == 3])


def main(first: str, *others: str) -> None:
    """Prints the table."""
    runs = [pathlib.Path(name) for name in (first, *others)]
    rows = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().split("\n") if line]
        for run in runs
    ]
    steps = json.loads((runs[0] / "config.json").read_text())["local_steps"]
    answers = [json.loads((run / "arms" / "fl_seed0.json").read_text()) for run in runs]
    for run, own in zip(runs[1:], rows[1:], strict=True):
        for t, row in enumerate(own):
            a, b = factors(runs[0], t + 1), factors(run, t + 1)
            print(
                f"{run.name}, {steps * (t + 1)} steps: largest {np.abs(a - b).max():.1e}, norm "
                f"{np.linalg.norm(a - b) / np.linalg.norm(a):.1e}, loss "
                f"{abs(row['loss'] - rows[0][t]['loss']):.1e}"
            )
    for run, own in zip(runs[1:], answers[1:], strict=True):
        same = all(
            own[task].get(kind) == answers[0][task].get(kind)
            for task in own
            if isinstance(own[task], dict)
            for kind in ("refused", "correct")
        )
        print(f"{run.name}: verdicts {'are the same' if same else 'DIFFER'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
