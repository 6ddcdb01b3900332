"""One of several processes that run the tiny federation together; writes what it ends with.

python worker.py PROCESS PROCESSES PORT OUTPUT
"""

import pathlib
import sys

sys.path[:0] = [str(p) for p in pathlib.Path(__file__).parents[:2]]

import jax  # noqa: E402

process, processes, port = (int(x) for x in sys.argv[1:4])
jax.config.update("jax_num_cpu_devices", 4 // processes)
if processes > 1:
    jax.distributed.initialize(f"localhost:{port}", processes, process)

import numpy as np  # noqa: E402
from federation import make_federation  # noqa: E402

from fedsafe_jax.federated import compression  # noqa: E402

federation, leaves = make_federation(), []
weights = np.array([10, 20, 30, 5], np.float32)
code = compression.make("int8")
for spec in (
    federation.spec("scaffold"),
    federation.spec("fedavg", aggregator="median", compression=code),
):
    state, report = federation.run(spec, devices=4, rounds=3, weights=weights)
    leaves += [np.asarray(x) for x in jax.tree.leaves((state, report.norms, report.losses))]
if process == 0:
    np.savez(sys.argv[4], *leaves)
