"""Programs of a federated round: chunks of clients train, and their updates are combined.

Three jitted programs: `train` maps local training over a chunk of clients, `collect` adds a chunk
to a weighted sum, `finish` makes the server's step. Where malicious clients see the whole cohort,
`attack` comes before the latter two. `simulation.run_round` calls them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedsafe_jax import random_streams
from fedsafe_jax.data.packing import Batch
from fedsafe_jax.federated import aggregation, compression, lora_average, privacy, slots
from fedsafe_jax.federated.aggregation import Aggregator
from fedsafe_jax.federated.algorithms import FederatedAlgorithm, ServerState
from fedsafe_jax.federated.client import LocalSteps
from fedsafe_jax.federated.compression import Compression
from fedsafe_jax.models.microbatch import compiler_options
from fedsafe_jax.models.sharding import CLIENTS, manual_axes, platform_of
from fedsafe_jax.random_streams import Purpose

SKETCH = 4096  # numbers kept of an update, for its angle to the mean


class RoundSpec(NamedTuple):
    """A description of what a round does, static.

    Attributes:
      algorithm: local training and the server's step, from `algorithms.make`.
      aggregator: rule that combines the updates, from `aggregation.make`.
      product: whether the products of the factors are averaged instead
        (`lora_average.product_mean`); the aggregator is then not used. Goes with algorithms that
        keep the mean (`Algorithm.keeps_mean`) at a server rate of 1, without compression and
        `normalize_steps`.
      compression: code of the updates, with error feedback; None for none.
      clip_norm: longest update that counts in full; 0 for no limit.
      noise_multiplier: noise of differential privacy, see `privacy`; 0 for none.
      cohort: expected clients a round, the denominator under differential privacy.
      normalize_steps: whether updates count per local step, and the mean is scaled back by the mean
        number of steps (FedNova, Wang et al., 2020, arXiv 2007.07481, Equation 6): for stragglers.
      ragged_ranks: whether clients have ranks of their own.
      product_weights: whether a client's weight is multiplied by the length of the product of its
        factors (HetLoRA), `weighting="product_norm"`.
      min_answers: fewest clients that must count; a round with fewer is skipped, unless there is
        noise, as under privacy nobody is to learn how many there were.
      collude: what malicious clients that see the whole cohort make of its updates, see
        `attackers.Attacker`; None for nothing.
    """

    algorithm: FederatedAlgorithm
    aggregator: Aggregator
    product: bool = False
    compression: Compression | None = None
    clip_norm: float = 0.0
    noise_multiplier: float = 0.0
    cohort: int = 1
    normalize_steps: bool = False
    ragged_ranks: bool = False
    product_weights: bool = False
    min_answers: int = 1
    collude: Callable | None = None

    @property
    def linear(self) -> bool:
        """Whether chunks of clients can be added up."""
        return self.aggregator.linear and not self.product and self.algorithm.combine is None


class ChunkInputs(NamedTuple):
    """Inputs of `Programs.train` for a chunk of clients; leaves lead with `[clients]`."""

    batches: Batch  # [clients, steps * accumulation, rows, seq]
    weights: Any  # float32, 0 for padding
    update_scales: Any  # float32, factor on the update: 1, unless a client is malicious
    ranks: Any  # int32, rank of each client's factors
    states: Any  # what the algorithm keeps of each client; () where it keeps nothing
    residuals: Any  # float32 [clients, params], errors of compression; () without


class ClientUpdates(NamedTuple):
    """Messages of a chunk of clients; leaves lead with `[clients]`.

    Attributes:
      updates: float32 `[clients, params]`, as the server counts them.
      masks: float32 `[clients, params]`, 1 where a client has the coordinate; () unless ranks
        differ.
      controls: changes of SCAFFOLD's control variates; () without.
      weights: float32 `[clients]`, 0 also for a client whose update is not finite.
      steps: float32 `[clients]`, share of the local steps that were done.
      products: float32 `[clients, ...]`, see `lora_average.project_products`.
    """

    updates: jax.Array
    masks: Any
    controls: Any
    weights: jax.Array
    steps: jax.Array
    products: jax.Array


class ClientMetrics(NamedTuple):
    """Figures of a chunk of clients; leaves lead with `[clients]`."""

    losses: jax.Array  # float32 [clients, steps], nats per target token
    active: jax.Array  # float32 [clients, steps], 1 where a step had targets
    norms: jax.Array  # float32 [clients], length of the update before clipping
    finite: jax.Array  # bool [clients]
    sketches: jax.Array  # float32 [clients, SKETCH]


class PartialSum(NamedTuple):
    """Sums over the clients so far."""

    total: jax.Array  # float32 [params], weighted
    weight: jax.Array  # float32 [], or [params] where ranks differ
    steps: jax.Array  # float32 [], weighted
    clients: jax.Array  # float32 [], clients that count
    controls: Any  # changes of control variates, shaped like the factors; () without
    products: jax.Array  # float32 [...], weighted


class RoundMetrics(NamedTuple):
    """Figures of the server's step."""

    update_norm: jax.Array  # float32 [], length of the server's step; of the mean update, if exact
    sketch: jax.Array  # float32 [SKETCH], sketch of the mean update
    mean_norm: jax.Array  # float32 [], length of the mean update
    product_gap: jax.Array  # float32 [], see `lora_average`
    clients: jax.Array  # float32 [], clients that counted


class Programs(NamedTuple):
    """The jitted programs of a round.

    Attributes:
      spec, mesh: description and devices that the programs were built for.
      layout: layout of `ChunkInputs` on the mesh.
      train: `(server, base, ChunkInputs, LocalSteps) -> (ClientUpdates, states, residuals,
        ClientMetrics)`; the number of clients is a multiple of the mesh axis `clients`.
      collect: `(PartialSum or None, ClientUpdates) -> PartialSum`, for linear aggregation.
      finish: `(server, PartialSum or [ClientUpdates, ...], key, noising_row) -> (server,
        RoundMetrics)`. Where no client counts the server stays as it was. The key is that of noise,
        and of slots that begin anew; None without either. The row is that of correlated noise.
      slots: `(filled rows int [clients, batches], clients of a chunk) -> LocalSteps.slots`, the
        same for all chunks of a round.
      attack: `(server, [ClientUpdates, ...], [ClientMetrics, ...], malicious bool [clients]) ->
        (ClientUpdates, ClientMetrics)` of all chunks together, after `spec.collude`; None without.
    """

    spec: RoundSpec
    mesh: Mesh
    layout: PartitionSpec
    train: Callable
    collect: Callable
    finish: Callable
    slots: Callable
    attack: Callable | None = None


def sketch(update: jax.Array) -> jax.Array:
    """Returns a sketch of a flat update, float32 `[SKETCH]`, that keeps inner products.

    Signs are flipped at random, then every 4096th number is summed (count sketch, Charikar et al.,
    2002). Inner products of sketches are those of the updates within about 1.6% of the product of
    their lengths, and exact up to 4096 numbers.
    """
    key = random_streams.key(Purpose.SKETCH, 0)
    signs = jax.random.rademacher(key, update.shape, jnp.float32)
    return jnp.pad(update * signs, (0, -update.size % SKETCH)).reshape(-1, SKETCH).sum(0)


def make_round(spec: RoundSpec, mesh: Mesh, clients_in_parallel: int = 1) -> Programs:
    """Builds the programs of a round.

    Args:
      spec: description of what a round does.
      mesh: devices along `clients`, which split a chunk, and `model`, which split the base.
      clients_in_parallel: clients that each device vmaps at once; it takes the rest in turn. 0:
        all clients are mapped at once, and a `LocalTraining` with a mesh deals out their rows to
        devices; CPU cores then hold all clients each, other devices a part of them.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    is_cpu = platform_of(mesh) == "cpu"
    layout = whole.spec if is_cpu and not clients_in_parallel else PartitionSpec(CLIENTS)

    def train_clients(server, base, inputs, steps):
        def one(client):
            return _client(spec, server, base, steps, client)

        if not clients_in_parallel:
            return jax.vmap(one)(inputs)
        return jax.lax.map(one, inputs, batch_size=clients_in_parallel)

    def train(server: ServerState, base, inputs: ChunkInputs, steps: LocalSteps):
        mapped = train_clients
        if clients_in_parallel and mesh.size > 1:
            # check_vma=False: with it on, `grad` of the device-invariant factors would sum
            # gradients over devices inside every local step. `pcast` to varying avoids that too,
            # but failed in the backward pass of a checkpointed `cond` (jax 0.10.2).
            mapped = jax.shard_map(
                train_clients,
                mesh=mesh,
                axis_names=manual_axes(mesh),
                check_vma=False,
                in_specs=(PartitionSpec(), PartitionSpec(), layout, PartitionSpec()),
                out_specs=layout,
            )
        sent, states, residuals, metrics = mapped(server, base, inputs, steps)
        # Every process reads all clients' figures.
        return sent, states, residuals, jax.lax.with_sharding_constraint(metrics, whole)

    # In float32, which accelerators compute only where a product says so.
    @jax.default_matmul_precision("float32")
    def collect(so_far: PartialSum | None, sent: ClientUpdates) -> PartialSum:
        present = (sent.weights > 0).astype(jnp.float32)
        new = PartialSum(
            sent.weights @ sent.updates,
            sent.weights @ sent.masks if spec.ragged_ranks else jnp.sum(sent.weights),
            sent.weights @ sent.steps,
            clients=jnp.sum(present),
            controls=jax.tree.map(lambda c: jnp.tensordot(present, c, axes=1), sent.controls),
            products=sent.weights @ sent.products,
        )
        return new if so_far is None else jax.tree.map(jnp.add, so_far, new)

    @jax.default_matmul_precision("float32")
    def finish(server: ServerState, gathered, key, noising_row=None):
        current, unravel = ravel_pytree(server.factors)
        if isinstance(gathered, PartialSum):
            sums = gathered
            mean = sums.total / jnp.maximum(sums.weight, 1e-12)
            products = sums.products / jnp.maximum(jnp.max(sums.weight), 1e-12)
            gap = lora_average.projected_gap(products, unravel(current + mean))
        else:
            sent = jax.tree.map(lambda *parts: jnp.concatenate(parts), *gathered)
            sums = collect(None, sent)
            mean, gap = _combine(spec, sent, current, unravel, key)
        if spec.normalize_steps:
            mean = mean * sums.steps / jnp.maximum(jnp.max(sums.weight), 1e-12)
        if spec.noise_multiplier:
            # All clients weigh the same, and the denominator is the expected cohort: the actual
            # number depends on who took part, which is to stay private.
            mean, deviation = sums.total / spec.cohort, spec.noise_multiplier * spec.clip_norm
            deviation /= spec.cohort
            if noising_row is None:
                mean = privacy.add_noise(mean, key, deviation)
            else:
                mean = privacy.add_correlated_noise(mean, key, noising_row, deviation=deviation)
        if spec.algorithm.combine is None:
            stepped = spec.algorithm.server_update(server, unravel(mean), sums.controls)
        else:
            mean = sums.total / jnp.maximum(sums.weight, 1e-12)
            stepped, gap = _combine_exactly(spec, server, sent, mean=unravel(mean), key=key)
        moves = (sums.clients > 0) | (spec.noise_multiplier > 0)
        stepped = jax.tree.map(lambda new, old: jnp.where(moves, new, old), stepped, server)
        # A step that combines clients may draw new factors, which are no step's length.
        change = mean
        if spec.algorithm.combine is None:
            change = jax.tree.map(jnp.subtract, stepped.factors, server.factors)
        return stepped, RoundMetrics(
            update_norm=jnp.linalg.norm(ravel_pytree(change)[0]),
            sketch=sketch(mean),
            mean_norm=jnp.linalg.norm(mean),
            product_gap=gap,
            clients=sums.clients,
        )

    # In float32, as the sums above: lengths decide here.
    @jax.default_matmul_precision("float32")
    def attack(server: ServerState, sent, metrics, malicious: jax.Array):
        sent, metrics = (
            jax.tree.map(lambda *parts: jnp.concatenate(parts), *chunks)
            for chunks in (sent, metrics)
        )
        counts = sent.weights > 0
        malicious &= counts
        updates = spec.collude(sent.updates, malicious, counts & ~malicious)
        current, unravel = ravel_pytree(server.factors)
        starts = current * sent.masks if spec.ragged_ranks else current
        products = jax.vmap(lambda x: lora_average.project_products(unravel(x)))(starts + updates)
        rows = malicious[:, None]
        metrics = metrics._replace(
            norms=jnp.where(malicious, jnp.linalg.norm(updates, axis=1), metrics.norms),
            sketches=jnp.where(rows, jax.vmap(sketch)(updates), metrics.sketches),
        )
        sent = sent._replace(updates=updates, products=jnp.where(rows, products, sent.products))
        # Every process reads all clients' figures.
        return sent, jax.lax.with_sharding_constraint(metrics, whole)

    return Programs(
        spec,
        mesh,
        layout,
        train=jax.jit(train, compiler_options=compiler_options(platform_of(mesh))),
        collect=jax.jit(collect, donate_argnums=0, out_shardings=whole),
        # The old state is not donated, since a run that is stopped in a round still saves it.
        finish=jax.jit(finish, out_shardings=whole),
        slots=functools.partial(slots.of_round, mesh, clients_in_parallel, spec.algorithm.queued),
        attack=jax.jit(attack) if spec.collude else None,
    )


def _client(
    spec: RoundSpec, server: ServerState, base: Any, local: LocalSteps, inputs: ChunkInputs
) -> tuple[ClientUpdates, Any, Any, ClientMetrics]:
    """Trains one client from the global factors; `inputs` has no axis of clients here."""
    start, masks = server.factors, ()
    if spec.ragged_ranks:
        mask = lora_average.rank_mask(start, inputs.ranks)
        # Slots that are zero in both factors have no gradient, so they stay zero.
        start, masks = jax.tree.map(jnp.multiply, start, mask), ravel_pytree(mask)[0]
    update, state, result = spec.algorithm.client_update(
        server, inputs.states, start, base, inputs.batches, local
    )
    flat, residual = ravel_pytree(update.delta)[0] * inputs.update_scales, inputs.residuals
    everything = ravel_pytree((jnp.sum(jnp.square(flat)), flat, update.control, state))[0]
    finite = jnp.all(jnp.isfinite(everything))
    flat = jnp.where(finite, flat, 0.0)
    if spec.compression is not None:
        flat, left = compression.send(spec.compression, flat, residual)
        residual = jnp.where(finite, left, residual)
    steps = jnp.mean(result.active)
    if spec.normalize_steps:
        flat = flat / jnp.maximum(steps, 1 / len(local.rates))
    norm = jnp.linalg.norm(flat)
    sketched = sketch(flat)
    if spec.clip_norm:
        flat = aggregation.clip(flat, norm, spec.clip_norm)
    # A client that does not count keeps the state that it had.
    counts = finite & (inputs.weights > 0)
    state = jax.tree.map(lambda new, old: jnp.where(counts, new, old), state, inputs.states)
    control = jax.tree.map(lambda c: jnp.where(counts, c, 0.0), update.control)
    sent_factors = jax.tree.map(jnp.add, start, ravel_pytree(start)[1](flat))
    products = lora_average.project_products(sent_factors)
    weight = jnp.where(counts, inputs.weights, 0.0)
    if spec.product_weights:
        weight = weight * lora_average.product_norm(sent_factors)
    sent = ClientUpdates(flat, masks, control, weights=weight, steps=steps, products=products)
    metrics = ClientMetrics(result.losses, result.active, norm, finite=finite, sketches=sketched)
    return sent, state, residual, metrics


def _combine_exactly(
    spec: RoundSpec, server: ServerState, sent: ClientUpdates, mean: Any, key: jax.Array
) -> tuple[ServerState, jax.Array]:
    """Returns the state after `FederatedAlgorithm.combine`, and the product gap, `[]`."""
    current, unravel = ravel_pytree(server.factors)
    starts = current * sent.masks if spec.ragged_ranks else current
    client_factors = jax.vmap(unravel)(starts + sent.updates)
    stepped = spec.algorithm.combine(server, client_factors, sent.weights, mean, key)
    # What the model gained: clients' products do not hold the residue that they began with.
    gained = lora_average.join(stepped.adapter, lora_average.negative(server.residue))
    return stepped, lora_average.product_gap(client_factors, sent.weights, gained)


def _combine(
    spec: RoundSpec, sent: ClientUpdates, current: jax.Array, unravel: Callable, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the mean delta of all clients' updates, `[params]`, and the product gap, `[]`."""
    starts = current * sent.masks if spec.ragged_ranks else current
    client_factors = jax.vmap(unravel)(starts + sent.updates)
    if spec.product:
        mean = lora_average.product_mean(client_factors, sent.weights, key)
        gap = lora_average.product_gap(client_factors, sent.weights, mean)
        return ravel_pytree(mean)[0] - current, gap
    mean = spec.aggregator.combine(sent.updates, sent.weights, current)
    return mean, lora_average.product_gap(client_factors, sent.weights, unravel(current + mean))
