"""One round of simulated clients: chunk by chunk through the programs of `round_programs`."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedsafe_jax.data.packing import Batch
from fedsafe_jax.federated.algorithms import ServerState, count
from fedsafe_jax.federated.client import LocalSteps
from fedsafe_jax.federated.participation import Cohort
from fedsafe_jax.federated.round_programs import (
    ChunkInputs,
    ClientUpdates,
    Programs,
    RoundSpec,
)
from fedsafe_jax.federated.skipped_rounds import NOBODY, why_skipped
from fedsafe_jax.models.sharding import CLIENTS, platform_of

# Default number of clients in a chunk. On CPU larger chunks gain nothing, and every core holds all
# clients of a chunk.
CHUNK = {"cpu": 16}
DEFAULT_CHUNK = 64


class FederatedState(NamedTuple):
    """Everything that a later round depends on.

    Attributes:
      server: state of the server, whole on each device.
      clients: what clients keep for the algorithm (`states`) and for compression (`residuals`),
        numpy leaves `[num_clients, ...]`; () where they keep nothing. It lies on the host: a
        thousand clients' control variates need not fit on a device.
    """

    server: ServerState
    clients: dict


class RoundReport(NamedTuple):
    """Figures of a round, by client in the order of the cohort.

    Attributes:
      losses: float32 `[clients, steps]`, nats per target token, times its weight.
      active: float32 `[clients, steps]`, 1 where a step had targets.
      norms: float32 `[clients]`, lengths of the updates before clipping.
      cosines: float32 `[clients]`, cosine of each update to the mean, within the error of
        `round_programs.sketch`.
      excluded: ids whose update was not finite.
      skipped_because: why the server, and what clients keep, stayed as they were; "" for a round
        that counts.
      update_norm: length of the server's step.
      product_gap: see `lora_average.product_gap`; estimated where updates are added up.
      bytes_up, bytes_down: bytes that all clients together send and receive.
    """

    losses: np.ndarray
    active: np.ndarray
    norms: np.ndarray
    cosines: np.ndarray
    excluded: tuple[int, ...]
    skipped_because: str
    update_norm: float
    product_gap: float
    bytes_up: int
    bytes_down: int

    @property
    def skipped(self) -> bool:
        """Whether the server stayed as it was."""
        return bool(self.skipped_because)

    @property
    def loss(self) -> float:
        """Mean loss over clients and steps that had targets; NaN without any."""
        return _mean(self.losses, self.active)

    @property
    def loss_last_step(self) -> float:
        """Mean loss of each client's last step that had targets; NaN without any."""
        some = np.flatnonzero(self.active.any(1))
        last = [int(np.flatnonzero(self.active[i])[-1]) for i in some]
        return float(np.mean(self.losses[some, last])) if len(some) else math.nan


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    total = weights.sum()
    return float((values * weights).sum() / total) if total else math.nan


def initial_state(programs: Programs, factors: Any, num_clients: int) -> FederatedState:
    """Returns the state before the first round.

    Args:
      programs: programs of the run.
      factors: LoRA factors that the server begins with.
      num_clients: clients of the run, in the cohort or not.
    """
    spec = programs.spec
    template = jax.eval_shape(spec.algorithm.init_client, factors)
    params = sum(x.size for x in jax.tree.leaves(factors))
    clients = {
        "states": jax.tree.map(lambda x: np.zeros((num_clients, *x.shape), x.dtype), template),
        "residuals": np.zeros((num_clients, params), np.float32) if spec.compression else (),
    }
    return FederatedState(replicate(spec.algorithm.init(factors), programs.mesh), clients)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Lays the arrays of a pytree whole on every device, also on those of other processes."""
    return jax.tree.map(lambda x: _spread(x, mesh, PartitionSpec()), tree)


def _spread(x: Any, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    sharding = NamedSharding(mesh, spec)
    if jax.process_count() == 1:
        return jax.device_put(x, sharding)
    x = np.asarray(x)  # Every process has the same array, and gives what its devices hold.
    return jax.make_array_from_callback(x.shape, sharding, lambda place: x[place])


def _fetch(tree: Any) -> Any:
    """Returns numpy arrays of a pytree that may be split over processes."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def wait(tree: Any, interval: float = 0.002) -> None:
    """Waits for arrays in Python, so that a signal is heard while the devices compute."""
    for leaf in jax.tree.leaves(tree):
        while isinstance(leaf, jax.Array) and not leaf.is_ready():
            time.sleep(interval)


def chunk_size(cohort: int, mesh: Mesh, most: int = 0) -> int:
    """Returns the number of clients in a chunk, such that all chunks are about even.

    Args:
      cohort: clients a round.
      mesh: devices of the run; a chunk is a multiple of their number along `clients`.
      most: most clients of a chunk; 0 for 64, on CPU for 16.
    """
    devices = mesh.shape[CLIENTS]
    most = most or CHUNK.get(platform_of(mesh), DEFAULT_CHUNK)
    chunks = -(-cohort // max(most, devices))
    return -(-cohort // (chunks * devices)) * devices


def run_round(
    programs: Programs,
    state: FederatedState,
    base: Any,
    batches: Callable[[int, int], Batch],
    cohort: Cohort,
    rates: Sequence[float],
    chunk: int,
    key: jax.Array | None = None,
    noising_row: np.ndarray | None = None,
    update_scales: np.ndarray | None = None,
    ranks: np.ndarray | None = None,
    malicious: np.ndarray | None = None,
    keep_update: Callable[[int, np.ndarray], None] | None = None,
    rows: np.ndarray | None = None,
) -> tuple[FederatedState, RoundReport]:
    """Trains a cohort and makes the server's step.

    Args:
      programs: programs from `make_round`.
      state: state before the round; it stays valid.
      base: frozen base parameters, on the mesh.
      batches: `(start, stop) -> Batch` of that part of the cohort, empty past its end, leaves
        `[stop - start, steps * accumulation, rows, seq]`.
      cohort: clients that take part.
      rates: learning rate of each local step.
      chunk: clients a call, a multiple of the mesh axis `clients`.
      key: random key of the noise, and of slots and factors that begin anew (`lora_average`); None
        where there is neither.
      noising_row: float32 `[rounds]`, weights of the rounds' draws from the key in this round's
        noise, see `privacy.noising_row`; None for noise of its own, from a key of its own.
      update_scales: float32 `[clients]`, factor on each client's update; None for 1.
      ranks: int32 `[clients]`, rank of each client's factors; None for the full rank.
      malicious: bool `[clients]`, those that collude where the spec says how; None for nobody.
        All updates of the cohort are then held at once, as under robust aggregation.
      keep_update: `(id, float32 [params])`, called with the update of each client that counts, as
        the server receives it and before any noise. Each chunk is then fetched before the next one
        begins, so no device holds more updates than without.
      rows: int `[clients, steps * accumulation]`, filled rows of each batch of the cohort, by which
        accelerators leave out the empty ones; None: they compute these too.

    Returns:
      The state after the round, and a report.

    Raises:
      ValueError: something is to be drawn, and no key is given.
    """
    spec, mesh = programs.spec, programs.mesh
    if (spec.noise_multiplier or spec.product or spec.algorithm.combine) and key is None:
        raise ValueError("noise, and means of products, need a key from `random_streams.key`.")
    count = len(cohort.ids)
    if update_scales is None:
        update_scales = np.ones(count, np.float32)
    if ranks is None:
        ranks = np.full(count, np.iinfo(np.int32).max)
    slots = () if rows is None else programs.slots(rows, chunk)
    local = LocalSteps(replicate(np.asarray(rates, np.float32), mesh), slots)
    gathered: Any = None if spec.linear and not spec.collude else []
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
            skipped_because=NOBODY,
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
        sent, states, residuals, metrics = programs.train(state.server, base, inputs, local)
        # The devices work on one chunk while the arrays of the next one are made.
        if figures:
            wait(figures[-1])
        figures.append(metrics)
        if isinstance(gathered, list):
            gathered.append(sent)
        else:
            gathered = programs.collect(gathered, sent)
        if keep_update is not None and not spec.collude:
            _hand_over(spec, sent, cohort.ids[start:stop], len(rates), keep_update)
        if jax.tree.leaves((states, residuals)):
            kept.append(_fetch({"states": states, "residuals": residuals}))
    if spec.collude:
        known = np.zeros(count, bool) if malicious is None else malicious
        known = replicate(_pad(known, len(gathered) * chunk), mesh)
        sent, metrics = programs.attack(state.server, gathered, figures, known)
        gathered, figures = programs.collect(None, sent) if spec.linear else [sent], [metrics]
        if keep_update is not None:
            _hand_over(spec, sent, cohort.ids, len(rates), keep_update)
    server, step = programs.finish(state.server, gathered, key, noising_row)
    wait(step)
    chunks = [jax.device_get(metrics) for metrics in figures]
    metrics = jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *chunks)
    step = jax.device_get(step)
    because = why_skipped(spec, server, step)
    if because:
        step = jax.tree.map(np.zeros_like, step)._replace(product_gap=math.nan)
    lengths = metrics.norms * float(step.mean_norm)
    cosines = np.clip(metrics.sketches @ step.sketch / np.maximum(lengths, 1e-12), -1, 1)
    bytes_up, bytes_down = _bytes(spec, state.server, count)
    report = RoundReport(
        losses=metrics.losses,
        active=metrics.active,
        norms=metrics.norms,
        cosines=cosines,
        excluded=tuple(cohort.ids[~metrics.finite].tolist()),
        skipped_because=because,
        update_norm=float(step.update_norm),
        product_gap=float(step.product_gap),
        bytes_up=bytes_up,
        bytes_down=bytes_down,
    )
    if because:
        return state, report
    counted = metrics.finite & (cohort.weights > 0)
    clients = state.clients
    if kept:
        rows = jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *kept)
        clients = jax.tree.map(
            lambda old, new: _replaced(old, cohort.ids[counted], new[counted]), clients, rows
        )
    return FederatedState(server, clients), report


def _hand_over(
    spec: RoundSpec, sent: ClientUpdates, ids: np.ndarray, steps: int, keep_update: Callable
) -> None:
    """Fetches a chunk's updates and calls `keep_update` with those that count."""
    wait(sent)
    updates, weights, done = _fetch((sent.updates, sent.weights, sent.steps))
    for i, client in enumerate(ids.tolist()):
        if weights[i] > 0:
            # What the client moved by: clients that differ in steps send the move per step.
            factor = max(float(done[i]), 1 / steps) if spec.normalize_steps else 1.0
            keep_update(client, updates[i] * np.float32(factor))


def _pad(x: np.ndarray, count: int) -> np.ndarray:
    """Appends zeros, clients without weight, until there are `count`."""
    return np.concatenate([x, np.zeros(count - len(x), x.dtype)])


def _replaced(old: np.ndarray, ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
    new = old.copy()  # A checkpoint of the old state may still be in writing.
    new[ids] = rows
    return new


def _bytes(spec: RoundSpec, server: ServerState, clients: int) -> tuple[int, int]:
    """Returns bytes up and down of a round that begins with `server`.

    Control variates travel uncompressed, both ways. Clients send the factors that their updates
    change; a code has places for all. They receive all factors, and of a residue what a round adds.
    """
    params, controls = (
        sum(x.size for x in jax.tree.leaves(tree)) for tree in (server.factors, server.control)
    )
    up = 4 * count(server.factors, spec.algorithm.sent(server))
    if spec.compression:
        up = spec.compression.num_bytes(params)
    down = spec.algorithm.received(server.factors, clients)
    return clients * (up + 4 * controls), clients * 4 * (down + controls)
