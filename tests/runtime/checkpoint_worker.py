"""One of two processes that resume from a folder, and save rounds up to one.

python checkpoint_worker.py PROCESS PORT FOLDER LAST; with `?unreachable` behind the folder, reading
it fails.
"""

import sys

import jax

process, port, folder, last = sys.argv[1:5]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{port}", 2, int(process))

import numpy as np  # noqa: E402

from fedsafe_jax.federated import simulation  # noqa: E402
from fedsafe_jax.federated.algorithms import ServerState  # noqa: E402
from fedsafe_jax.federated.mesh import make_mesh  # noqa: E402
from fedsafe_jax.runtime.checkpoint import CheckpointError, RoundCheckpoints  # noqa: E402

mesh = make_mesh()


def state(value):
    factors = {"a": np.full((2, 3), value, np.float32), "b": np.arange(6.0).reshape(3, 2)}
    server = simulation.replicate(ServerState(factors, (), ()), mesh)
    clients = {"states": {"c": np.full((5, 3), value)}, "residuals": ()}
    return simulation.FederatedState(server, clients)


def unreachable(*args):
    raise TimeoutError(110, "Connection timed out")


folder, _, unreached = folder.partition("?")
saved = RoundCheckpoints(folder)
if unreached:
    saved._read = unreachable
try:
    found, done = saved.restore(state(0.0))
except CheckpointError as error:
    print(f"refused: {error}")
    sys.stdout.flush()
else:
    expected = state(float(done))
    same = jax.tree.structure(found) == jax.tree.structure(expected) and all(
        np.array_equal(np.asarray(a), np.asarray(b)) and a.dtype == b.dtype
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    )
    what = ("same" if same else "other") if done else "nothing"
    for t in range(done + 1, int(last) + 1):
        saved.save(t, state(float(t)))
    saved.close()
    print(f"resumed {done} {what}")
