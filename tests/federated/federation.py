"""A tiny federation: four clients with fixed batches on a random Llama."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tiny import tiny_config

from fedsafe_jax.data.packing import Batch
from fedsafe_jax.federated import aggregation, algorithms, simulation
from fedsafe_jax.federated.client import LocalTraining, make_optimizer
from fedsafe_jax.federated.mesh import make_mesh
from fedsafe_jax.federated.participation import Cohort
from fedsafe_jax.federated.round_programs import RoundSpec, make_round
from fedsafe_jax.models import lora, loss
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.sharding import leaf_sharding

CLIENTS, STEPS, ROWS, SEQ, POPULATION = 4, 3, 2, 12, 6
LORA = lora.LoraConfig(4, 8.0, ("q_proj", "v_proj"))
IDS = np.arange(CLIENTS, dtype=np.int32)
WEIGHTS = np.array([10.0, 20.0, 30.0, 0.0], np.float32)
SGD = optax.sgd(1.0)


class Federation(NamedTuple):
    loss_fn: Callable
    base: dict
    adapter: dict
    batches: Batch
    jitted: Callable  # gradient of the loss

    def gradient(self, adapter, batch):
        return self.jitted(adapter, self.base, batch)

    def spec(self, name="fedavg", optimizer=None, accumulation=1, aggregator="mean", **changes):
        hyperparameters = changes.pop("hyperparameters", None)
        trim, byzantine = changes.pop("trim_share", 0.1), changes.pop("byzantine", 1)
        shared, platform = changes.pop("mesh", None), changes.pop("platform", None)
        training = LocalTraining(
            self.loss_fn,
            optimizer or make_optimizer(),
            accumulation,
            mesh=shared,
            platform=platform,
        )
        algorithm = algorithms.make(name, training, POPULATION, hyperparameters)
        return RoundSpec(algorithm, aggregation.make(aggregator, trim, byzantine), **changes)

    def run(
        self, spec, devices=1, parallel=1, rounds=2, weights=WEIGHTS, ids=IDS, model=1,
        chunk=0, rates=None, update_scales=None, ranks=None, state=None, key=0,
        malicious=None, keep_update=None, rows=None,
    ):  # fmt: skip
        """The state after some rounds with the same batches, and the last report."""
        mesh = make_mesh(jax.devices()[:devices], model)
        base = self.base
        if model > 1:
            base = jax.tree_util.tree_map_with_path(
                lambda path, x: jax.device_put(
                    x, leaf_sharding([key.key for key in path], x.shape, mesh)
                ),
                base,
            )
        programs = make_round(spec, mesh, parallel)
        if state is None:
            state = simulation.initial_state(programs, self.adapter, POPULATION)
        count = self.batches.mask.shape[1]
        rates = [0.01] * count if rates is None else rates
        cohort = Cohort(ids, weights, np.full(len(ids), len(rates)), dropped_out=(), no_data=())

        def batches(start, stop):
            missing = stop - min(stop, len(ids))

            def part(x):
                x = x[start:stop]
                return np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)])

            return jax.tree.map(part, self.batches)

        chunk = chunk or simulation.chunk_size(len(ids), mesh)
        for t in range(rounds):
            state, report = simulation.run_round(
                programs,
                state,
                base,
                batches=batches,
                cohort=cohort,
                rates=rates,
                key=jax.random.fold_in(jax.random.key(key), t),
                chunk=chunk,
                update_scales=update_scales,
                ranks=ranks,
                malicious=malicious,
                keep_update=keep_update,
                rows=rows,
            )
        return state, report


def close(a, b, atol=2e-5):
    # Adam divides by the root of tiny second moments, which magnifies the order of summation.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


def sgd_by_hand(federation, start, client, rates, mu=0.0, accumulation=1):
    """The factors of a client after steps of plain SGD."""
    x = start
    for s, rate in enumerate(rates):
        batches = [
            Batch(*(f[client, s * accumulation + a] for f in federation.batches))
            for a in range(accumulation)
        ]
        grads = [federation.gradient(x, batch) for batch in batches]
        mean = jax.tree.map(lambda *g: sum(g) / accumulation, *grads)
        pulled = jax.tree.map(lambda p, g, x0: g + mu * (p - x0), x, mean, start)
        x = jax.tree.map(lambda p, g, rate=rate: p - rate * g, x, pulled)
    return x


def make_federation():
    config = tiny_config()
    model = Decoder(config, LORA.scale)
    blank = jnp.zeros((1, 4), jnp.int32)
    base = model.init(jax.random.key(0), blank, blank, blank)["params"]
    adapter = lora.init(jax.random.key(1), config, LORA)
    rng = np.random.default_rng(0)
    shape = (CLIENTS, STEPS, ROWS, SEQ)
    batches = Batch(
        rng.integers(0, 97, shape).astype(np.int32),
        rng.integers(0, 97, shape).astype(np.int32),
        np.ones(shape, np.float32),
        segment_ids=np.ones(shape, np.int32),
        positions=np.broadcast_to(np.arange(SEQ, dtype=np.int32), shape).copy(),
    )

    loss_fn = loss.PackedLoss(model)
    return Federation(loss_fn, base, adapter, batches=batches, jitted=jax.jit(jax.grad(loss_fn)))
