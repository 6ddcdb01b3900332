"""What the server makes of sites' messages.

Shapes, finiteness and lengths are checked here; how many pairs a site holds is its own word.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from flwr.app import RecordDict
from jax.flatten_util import ravel_pytree

from fedsafe_jax.federated import aggregation
from fedsafe_jax.federated.lora_average import project_products
from fedsafe_jax.federated.round_programs import SKETCH, ClientMetrics, ClientUpdates
from fedsafe_jax.filters.actions import FilterCounts
from fedsafe_jax.flower import wire

# What reading a message raises that no site of this package sends; arrays that would need pickle
# are a ValueError.
BROKEN = (KeyError, TypeError, ValueError)


def read_description(content: RecordDict) -> dict:
    """What `Site.describe` said, checked field by field; raises one of `BROKEN`."""
    found = json.loads(content.config_records["site"]["json"])
    hidden = {k: 0 for k in FilterCounts._fields if k.startswith("unsafe")}
    shown = {k: int(found["filter"][k]) for k in FilterCounts._fields if k not in hidden}
    dropped = ("dropped_near_evaluation", "dropped_heldout")
    return {
        "client": int(found["client"]),
        "examples": max(int(found["examples"]), 0),
        "base": found["base"],
        "counts": FilterCounts(**shown, **hidden),
        "near": sum(int(found["data"][k]) for k in dropped),
    }


class Received:
    """A chunk's updates, as `federated.round` would have computed them here.

    Attributes:
      sent, metrics: leaves lead with the clients; zero, without weight, where nothing came.
    """

    def __init__(self, spec, server, size: int, steps: int):
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

    def add(self, i: int, content: RecordDict, weight: float) -> int:
        """Puts a site's reply in place `i`; returns its useful tokens.

        Raises:
          WireError: arrays of another shape.
        """
        sent, metrics = self.sent, self.metrics
        like = {"update": self._server.factors, "control": self._server.control}
        like |= {"losses": metrics.losses[i], "active": metrics.active[i]}
        found = wire.tree(content.array_records["update"], like | {"sketch": metrics.sketches[i]})
        numbers = content.metric_records["numbers"]
        update = np.asarray(ravel_pytree(found["update"])[0])
        reported = (numbers["norm"], numbers["steps"])
        everything = np.asarray(
            ravel_pytree((update, found["control"], found["sketch"], reported))[0]
        )
        finite = bool(np.isfinite(everything).all() and numbers["finite"])
        metrics.finite[i] = finite
        metrics.losses[i], metrics.active[i] = found["losses"], found["active"]
        if not finite:
            return int(numbers["useful_tokens"])
        if self._clip:  # the site has clipped; that it did is not taken on trust
            length = jnp.linalg.norm(update)
            update = np.asarray(aggregation.clip(update, length, self._clip))
        sent.updates[i], sent.weights[i] = update, weight
        sent.steps[i] = min(max(numbers["steps"], 0.0), 1.0)
        moved = jax.tree.map(jnp.add, self._server.factors, self._unravel(jnp.asarray(update)))
        sent.products[i] = project_products(moved)
        metrics.norms[i], metrics.sketches[i] = numbers["norm"], found["sketch"]
        jax.tree.map(lambda x, c: x.__setitem__(i, c), sent.controls, found["control"])
        return int(numbers["useful_tokens"])
