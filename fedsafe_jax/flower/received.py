"""Checks the messages of sites and turns them into the client updates of a round.

Shapes, finiteness and lengths are verified; what a site says that it learns from, which weighs its
update, is trusted up to its number of pairs, and that number too.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from flwr.app import RecordDict
from jax.flatten_util import ravel_pytree

from fedsafe_jax.federated import aggregation
from fedsafe_jax.federated.algorithms import ServerState
from fedsafe_jax.federated.lora_average import project_products
from fedsafe_jax.federated.round_programs import SKETCH, ClientMetrics, ClientUpdates, RoundSpec
from fedsafe_jax.filters.actions import FilterCounts
from fedsafe_jax.flower import wire

# Errors of reading a message that no site of this package sends. ValueError covers arrays that
# would need pickle.
BROKEN = (KeyError, TypeError, ValueError)


def read_description(content: RecordDict) -> dict:
    """Reads the reply of `Site.describe`, field by field.

    Args:
      content: reply of a site.

    Returns:
      `client`, the site's number; `examples`, its pairs after filtering; `learned`, the sum of
      their weights; `base`, the fingerprint of its base model; `counts`, a `FilterCounts`; `near`,
      pairs dropped near evaluation prompts.

    Raises:
      KeyError, TypeError, ValueError: no site of this package sends the message (`BROKEN`).
    """
    said = json.loads(content.config_records["site"]["json"])
    # Sites do not know which of their pairs are unsafe.
    hidden = {k: 0 for k in FilterCounts._fields if k.startswith("unsafe")}
    shown = {k: int(said["filter"][k]) for k in FilterCounts._fields if k not in hidden}
    dropped = ("dropped_near_evaluation", "dropped_heldout")
    examples, learned = max(int(said["examples"]), 0), float(said["learned"])
    if not 0 <= learned <= examples * (1 + 1e-6):  # also false for NaN
        raise ValueError(f"learned={learned}: expected 0 to {examples}, its number of pairs")
    return {
        "client": int(said["client"]),
        "examples": examples,
        "learned": learned,
        "base": said["base"],
        "counts": FilterCounts(**shown, **hidden),
        "near": sum(int(said["data"][k]) for k in dropped),
    }


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

    def add(self, i: int, content: RecordDict, weight: float) -> int:
        """Checks a site's reply and writes it to place `i`.

        An update that is not finite leaves its place without weight.

        Args:
          i: place of the client in the chunk.
          content: reply of the site.
          weight: the client's weight in the aggregation.

        Returns:
          Tokens of the site's batches, padding not counted.

        Raises:
          WireError: an array is missing or has another shape.
        """
        sent, metrics = self.sent, self.metrics
        like = {"update": self._server.factors, "control": self._server.control}
        like |= {"losses": metrics.losses[i], "active": metrics.active[i]}
        tree = wire.tree(content.array_records["update"], like | {"sketch": metrics.sketches[i]})
        numbers = content.metric_records["numbers"]
        update = np.asarray(ravel_pytree(tree["update"])[0])
        reported = (numbers["norm"], numbers["steps"])
        everything = np.asarray(
            ravel_pytree((update, tree["control"], tree["sketch"], reported))[0]
        )
        finite = bool(np.isfinite(everything).all() and numbers["finite"])
        metrics.finite[i] = finite
        metrics.losses[i], metrics.active[i] = tree["losses"], tree["active"]
        if not finite:
            return int(numbers["useful_tokens"])
        if self._clip:  # sites clip their updates, but the server does not rely on it
            length = jnp.linalg.norm(update)
            update = np.asarray(aggregation.clip(update, length, self._clip))
        sent.updates[i], sent.weights[i] = update, weight
        sent.steps[i] = min(max(numbers["steps"], 0.0), 1.0)
        moved = jax.tree.map(jnp.add, self._server.factors, self._unravel(jnp.asarray(update)))
        sent.products[i] = project_products(moved)
        metrics.norms[i], metrics.sketches[i] = numbers["norm"], tree["sketch"]
        jax.tree.map(lambda x, c: x.__setitem__(i, c), sent.controls, tree["control"])
        return int(numbers["useful_tokens"])
