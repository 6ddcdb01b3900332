"""Token losses that read a fixed reference too: the base alone, or the base with other factors.

They are losses of packed rows as `loss.PackedLoss` is, of one client and of the rows of many. The
reference is one for all clients, so its factors go where the base goes: its pass over the rows of
many clients is one pass, and nothing is differentiated in it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fedsafe_jax.models.by_owner import by_layer, sum_of_owners
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.loss import masked_mean, packed_hidden, token_divergence, token_nll


class Frozen(NamedTuple):
    """What no step of a client changes.

    Attributes:
      base: base parameters.
      reference: LoRA factors of the reference; None for the base alone.
    """

    base: dict
    reference: dict | None


class Tokens(NamedTuple):
    """What a loss can read of packed rows, under the factors in training and the reference.

    Attributes:
      nll: float32 `[rows, seq]`, negative log-likelihood of the targets in nats, 0 off target.
      reference_nll: `() -> float32 [rows, seq]`, that under the reference.
      divergence: `() -> float32 [rows, seq]`, KL(reference || model) of the next token in nats, 0
        off target.
      batch: the rows.
    """

    nll: jax.Array
    reference_nll: Callable[[], jax.Array]
    divergence: Callable[[], jax.Array]
    batch: Any


class ReferenceLoss(NamedTuple):
    """A loss of packed rows that reads a reference.

    Attributes:
      model: the decoder.
      of_tokens: `Tokens -> float32 [rows, seq]`, the loss of each target, such that a row's depend
        on that row alone.
    """

    model: Decoder
    of_tokens: Callable[[Tokens], jax.Array]

    @property
    def dtype(self) -> str:
        """Dtype that factors are rounded to where they meet rows."""
        return self.model.config.dtype

    def __call__(self, factors: dict, frozen: Frozen, batch: Any) -> jax.Array:
        """Returns the mean over target tokens, see `loss.masked_mean`, float32 scalar.

        Args:
          factors: LoRA factors.
          frozen: base and reference.
          batch: `data.packing.Batch` with fields `[rows, seq]`; of a `NoisyBatch` the inputs of the
            adapter in training have dropout, those of the reference have not.
        """
        return masked_mean(self._values(factors, frozen, batch), batch.mask)

    def by_owner(
        self, factors: dict, frozen: Frozen, batch: Any, owner: jax.Array, targets: jax.Array
    ) -> jax.Array:
        """Returns what rows of many clients add to the loss of each; see `PackedLoss.by_owner`."""
        values = self._values(by_layer(factors), frozen, batch, owner)
        return sum_of_owners(values, batch.mask, owner, targets)

    def _values(self, factors, frozen: Frozen, batch, owner=None) -> jax.Array:
        model, base = self.model, frozen.base
        hidden = packed_hidden(model, factors, base, batch, owner=owner)
        # No dropout: the reference is what the model was, not a draw of it.
        quiet = batch._replace(noise=None) if hasattr(batch, "noise") else batch
        fixed = jax.lax.stop_gradient(packed_hidden(model, frozen.reference, base, quiet))

        def nll(states):
            return token_nll(model, base, states, batch.targets, batch.mask)

        tokens = Tokens(
            nll(hidden),
            reference_nll=lambda: jax.lax.stop_gradient(nll(fixed)),
            divergence=lambda: token_divergence(model, base, hidden, fixed, batch.mask),
            batch=batch,
        )
        return self.of_tokens(tokens)
