"""When the server's step is not taken: too few clients count, or the step is not finite."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedsafe_jax.federated.algorithms import ServerState
from fedsafe_jax.federated.round_programs import RoundMetrics, RoundSpec

NOBODY = "no client was left"


def why_skipped(spec: RoundSpec, server: ServerState, step: RoundMetrics) -> str:
    """Says why the server's step is not to be taken; "" where it is.

    This is asked of the finished step, so that the programs of a round are the same with it.

    Args:
      spec: the round.
      server: state after the step.
      step: figures of the step, on the host.
    """
    if not spec.noise_multiplier and step.clients < spec.min_answers:
        if not step.clients:
            return NOBODY
        return f"{int(step.clients)} counted, fewer than min_answers={spec.min_answers}"
    # The factors are what the lengths are of.
    kept = (server.control, server.optimizer, server.residue)
    finite = not jax.tree.leaves(kept) or bool(_all_finite(kept))
    if not finite or not np.isfinite((step.update_norm, step.mean_norm)).all():
        return "the step is not finite, or longer than float32 can measure"
    return ""


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))
