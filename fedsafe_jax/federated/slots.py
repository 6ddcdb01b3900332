"""Slots of a round's program, from the rows that its clients fill; see `models.row_queue`."""

import numpy as np
from jax.sharding import Mesh

from fedsafe_jax.models import row_queue
from fedsafe_jax.models.sharding import CLIENTS, platform_of


def of_round(
    mesh: Mesh, clients_in_parallel: int, queued: bool, rows: np.ndarray, chunk: int
) -> tuple[int, ...]:
    """Returns the numbers of slots of a round's program, see `row_queue.choose_slots`.

    Args:
      mesh, clients_in_parallel: as in `make_round`.
      queued: see `FederatedAlgorithm`.
      rows: int `[clients, batches]`, filled rows of each batch of the cohort.
      chunk: clients a call, a multiple of the mesh axis `clients`.

    Returns:
      One to three numbers; () where rows are in no slots: on CPU, and where they are not queued.
    """
    if platform_of(mesh) == "cpu" or not queued:
        return ()
    devices = 1 if clients_in_parallel else mesh.shape[CLIENTS]
    return row_queue.choose_slots(queued_rows(mesh, clients_in_parallel, rows, chunk), devices)


def queued_rows(mesh: Mesh, clients_in_parallel: int, rows: np.ndarray, chunk: int) -> np.ndarray:
    """Returns the filled rows of each queue, int `[queues, batches]`; arguments as in `of_round`.

    A queue has the rows of clients that are mapped at once: of a chunk, or, where each device takes
    `clients_in_parallel` at a time, of those.
    """
    at_once = chunk
    rows = np.pad(rows, ((0, -len(rows) % chunk), (0, 0)))
    if clients_in_parallel:
        of_device = chunk // mesh.shape[CLIENTS]
        at_once = min(clients_in_parallel, of_device)
        rows = rows.reshape(-1, of_device, rows.shape[1])
        rows = np.pad(rows, ((0, 0), (0, -of_device % at_once), (0, 0)))
    return rows.reshape(-1, at_once, rows.shape[-1]).sum(1)
