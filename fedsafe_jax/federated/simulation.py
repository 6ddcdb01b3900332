"""One round of simulated clients: chunk by chunk through the programs of `round`."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedsafe_jax.data.packing import Batch
from fedsafe_jax.federated.algorithms import ServerState
from fedsafe_jax.federated.participation import Cohort
from fedsafe_jax.federated.round_programs import ChunkInputs, Programs

# Clients of a chunk, unless told; few on CPU, where more gain nothing and every core holds all.
CHUNK = {"cpu": 16}
DEFAULT_CHUNK = 64


class FederatedState(NamedTuple):
    """Everything that a later round depends on.

    Attributes:
      server: on the devices, whole on each.
      clients: what clients keep, numpy leaves `[num_clients, ...]`: of the algorithm (`states`) and
        of compression (`residuals`); () where they keep nothing. On the host: a thousand clients'
        control variates need not fit on a device.
    """

    server: ServerState
    clients: dict


class RoundReport(NamedTuple):
    """What a round did, by client in the order of the cohort.

    Attributes:
      losses: float32 `[clients, steps]`, nats a learned token.
      active: float32 `[clients, steps]`, 1 where a step had targets.
      norms: float32 `[clients]`, of the updates before clipping.
      cosines: float32 `[clients]`, to the mean, within the error of `round.sketch`.
      excluded: ids whose update was not finite.
      skipped: nobody was left, the server stayed as it was.
      update_norm: of the server's step.
      product_gap: see `lora_average.product_gap`; estimated where updates are added up.
      bytes_up, bytes_down: of all clients together.
    """

    losses: np.ndarray
    active: np.ndarray
    norms: np.ndarray
    cosines: np.ndarray
    excluded: tuple[int, ...]
    skipped: bool
    update_norm: float
    product_gap: float
    bytes_up: int
    bytes_down: int

    @property
    def loss(self) -> float:
        """Mean over clients and steps that had targets; NaN without any."""
        return _mean(self.losses, self.active)

    @property
    def loss_last_step(self) -> float:
        """Of each client's last step that had targets."""
        some = np.flatnonzero(self.active.any(1))
        last = [int(np.flatnonzero(self.active[i])[-1]) for i in some]
        return float(np.mean(self.losses[some, last])) if len(some) else math.nan


def _mean(values, weights) -> float:
    total = weights.sum()
    return float((values * weights).sum() / total) if total else math.nan


def initial_state(programs: Programs, adapter, num_clients: int) -> FederatedState:
    """Before the first round.

    Args:
      programs: of the run.
      adapter: LoRA factors.
      num_clients: of the run.
    """
    spec = programs.spec
    template = jax.eval_shape(spec.algorithm.init_client, adapter)
    params = sum(x.size for x in jax.tree.leaves(adapter))
    clients = {
        "states": jax.tree.map(lambda x: np.zeros((num_clients, *x.shape), x.dtype), template),
        "residuals": np.zeros((num_clients, params), np.float32) if spec.compression else (),
    }
    return FederatedState(replicate(spec.algorithm.init(adapter), programs.mesh), clients)


def replicate(tree, mesh: Mesh):
    """Arrays whole on every device, also on those of other processes."""
    return jax.tree.map(lambda x: _spread(x, mesh, PartitionSpec()), tree)


def _spread(x, mesh: Mesh, spec: PartitionSpec):
    sharding = NamedSharding(mesh, spec)
    if jax.process_count() == 1:
        return jax.device_put(x, sharding)
    x = np.asarray(x)  # the same in every process; each gives what its devices hold
    return jax.make_array_from_callback(x.shape, sharding, lambda place: x[place])


def _fetch(tree):
    """Numpy arrays of what may be split over processes."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def wait(tree, interval: float = 0.002) -> None:
    """Waits for arrays in Python, so that a signal is heard while the devices compute."""
    for leaf in jax.tree.leaves(tree):
        while isinstance(leaf, jax.Array) and not leaf.is_ready():
            time.sleep(interval)


def chunk_size(cohort: int, devices: int, most: int = 0) -> int:
    """Clients of a chunk: even chunks of at most `most` (0: 64, on CPU 16), a multiple of
    `devices`."""
    most = most or CHUNK.get(jax.default_backend(), DEFAULT_CHUNK)
    chunks = -(-cohort // max(most, devices))
    return -(-cohort // (chunks * devices)) * devices


def run_round(
    programs: Programs,
    state: FederatedState,
    base,
    batches: Callable[[int, int], Batch],
    cohort: Cohort,
    rates: Sequence[float],
    key,
    chunk: int,
    update_scales: np.ndarray | None = None,
    ranks: np.ndarray | None = None,
) -> tuple[FederatedState, RoundReport]:
    """Trains a cohort and makes the server's step.

    Args:
      programs: from `make_round`.
      state: before the round; stays valid.
      base: frozen base parameters, on the mesh.
      batches: `(start, stop) -> Batch` of that part of the cohort, empty past its end, leaves
        `[stop - start, steps * accumulation, rows, seq]`.
      cohort: who takes part.
      rates: learning rate of each local step.
      key: of the noise.
      chunk: clients a call, a multiple of the mesh axis `clients`.
      update_scales: float32 `[clients]`, factor on each client's update; None for 1.
      ranks: int32 `[clients]`, of each client's adapter; None for the full rank.

    Returns:
      The state after the round, and a report.
    """
    spec, mesh = programs.spec, programs.mesh
    count = len(cohort.ids)
    if update_scales is None:
        update_scales = np.ones(count, np.float32)
    if ranks is None:
        ranks = np.full(count, np.iinfo(np.int32).max)
    rates = replicate(np.asarray(rates, np.float32), mesh)
    gathered: Any = None if spec.linear else []
    kept, figures = [], []
    if not count and not spec.noise_multiplier:
        none = np.zeros(0, np.float32)
        empty = np.zeros((0, len(rates)), np.float32)
        return state, RoundReport(
            empty,
            empty,
            none,
            cosines=none,
            excluded=(),
            skipped=True,
            update_norm=0.0,
            product_gap=math.nan,
            bytes_up=0,
            bytes_down=0,
        )
    # Under privacy an empty cohort must look like any other: it sends padding, and gets noise.
    for start in range(0, max(count, 1), chunk):
        stop = start + chunk
        ids = _pad(cohort.ids[start:stop], chunk)
        mine = jax.tree.map(lambda s, ids=ids: s[ids], state.clients)
        inputs = ChunkInputs(
            batches(start, stop),
            _pad(cohort.weights[start:stop], chunk),
            _pad(update_scales[start:stop].astype(np.float32), chunk),
            ranks=_pad(ranks[start:stop].astype(np.int32), chunk),
            states=mine["states"],
            residuals=mine["residuals"],
        )
        inputs = jax.tree.map(lambda x: _spread(x, mesh, programs.layout), inputs)
        sent, states, residuals, metrics = programs.train(state.server, base, inputs, rates)
        # One chunk at a time: the next one's arrays are made while the devices work.
        if figures:
            wait(figures[-1])
        figures.append(metrics)
        if isinstance(gathered, list):
            gathered.append(sent)
        else:
            gathered = programs.collect(gathered, sent)
        if jax.tree.leaves((states, residuals)):
            kept.append(_fetch({"states": states, "residuals": residuals}))
    server, step = programs.finish(state.server, gathered, key)
    wait(step)
    found = [jax.device_get(m) for m in figures]
    losses, active, norms, finite, sketches = (
        np.concatenate([getattr(m, name) for m in found])[:count] for name in found[0]._fields
    )
    step = jax.device_get(step)
    lengths = norms * float(step.mean_norm)
    cosines = np.clip(sketches @ step.sketch / np.maximum(lengths, 1e-12), -1, 1)
    report = RoundReport(
        losses,
        active,
        norms,
        cosines,
        tuple(cohort.ids[~finite].tolist()),
        not step.clients and not spec.noise_multiplier,
        float(step.update_norm),
        float(step.product_gap),
        *_bytes(spec, state.server, count),
    )
    counted = finite & (cohort.weights > 0)
    clients = state.clients
    if kept:
        rows = jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *kept)
        clients = jax.tree.map(
            lambda old, new: _replaced(old, cohort.ids[counted], new[counted]), clients, rows
        )
    return FederatedState(server, clients), report


def _pad(x: np.ndarray, count: int) -> np.ndarray:
    """Clients of weight zero, until there are `count`."""
    return np.concatenate([x, np.zeros(count - len(x), x.dtype)])


def _replaced(old: np.ndarray, ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
    new = old.copy()  # the old state may still be written to a checkpoint
    new[ids] = rows
    return new


def _bytes(spec, server: ServerState, clients: int) -> tuple[int, int]:
    """Up and down; control variates travel uncompressed, both ways."""
    params, controls = (
        sum(x.size for x in jax.tree.leaves(tree)) for tree in (server.factors, server.control)
    )
    up = spec.compression.num_bytes(params) if spec.compression else 4 * params
    return clients * (up + 4 * controls), clients * 4 * (params + controls)
