"""Turns the checked updates of sites into the client updates of a round.

Norms and sketches are computed here, of what was received, never read from a site.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from fedsafe_jax.federated import aggregation
from fedsafe_jax.federated.algorithms import ServerState
from fedsafe_jax.federated.lora_average import project_products
from fedsafe_jax.federated.round_programs import (
    SKETCH,
    ClientMetrics,
    ClientUpdates,
    RoundSpec,
    sketch,
)
from fedsafe_jax.flower.replies import SiteUpdate

_sketch, _products, _norm = jax.jit(sketch), jax.jit(project_products), jax.jit(jnp.linalg.norm)


class ReceivedUpdates:
    """Updates of a chunk of clients, in the form that a simulated round's program returns them.

    Args:
      spec: the round.
      server: state that the sites started from.
      size: clients of the chunk.
      steps: local steps.

    Attributes:
      sent, metrics: arrays `[size, ...]`; 0, with weight 0, for clients without a reply.
    """

    def __init__(self, spec: RoundSpec, server: ServerState, size: int, steps: int):
        self._clip, self._server = spec.clip_norm, server
        flat, self._unravel = ravel_pytree(server.factors)
        zeros = functools.partial(np.zeros, dtype=np.float32)
        controls = jax.tree.map(lambda x: zeros((size, *x.shape)), server.control)
        products = zeros((size, *jax.eval_shape(project_products, server.factors).shape))
        self.sent = ClientUpdates(
            zeros((size, flat.size)),
            (),
            controls,
            weights=zeros(size),
            steps=zeros(size),
            products=products,
        )
        self.metrics = ClientMetrics(
            zeros((size, steps)),
            zeros((size, steps)),
            zeros(size),
            finite=np.ones(size, bool),
            sketches=zeros((size, SKETCH)),
        )

    def add(self, i: int, received: SiteUpdate, weight: float) -> None:
        """Writes a site's update to place `i`; one that is not finite leaves it without weight.

        Args:
          i: place of the client in the chunk.
          received: what the site sent.
          weight: the client's weight in the aggregation.
        """
        sent, metrics = self.sent, self.metrics
        metrics.finite[i] = received.finite
        metrics.losses[i], metrics.active[i] = received.losses, received.active
        if not received.finite:
            return
        metrics.norms[i], metrics.sketches[i] = _norm(received.update), _sketch(received.update)
        update = self._bounded(received.update)
        # The control is a gradient, but the server adds it up as it does updates: a site's pull on
        # either has the same bound.
        control, unravel = ravel_pytree(received.control)
        control = unravel(self._bounded(control))
        sent.updates[i], sent.weights[i] = update, weight
        sent.steps[i] = received.active.mean()
        moved = jax.tree.map(jnp.add, self._server.factors, self._unravel(jnp.asarray(update)))
        sent.products[i] = _products(moved)
        jax.tree.map(lambda x, c: x.__setitem__(i, c), sent.controls, control)

    def _bounded(self, flat: np.ndarray) -> np.ndarray:
        """Clips what a site sent; it does so itself, but the server does not rely on it."""
        if not self._clip or not flat.size:
            return flat
        return np.asarray(aggregation.clip(flat, _norm(flat), self._clip))
