"""Unfinished answers of a batch, and how the arrays of generation are laid out over devices."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec

from fedsafe_jax.inference.prompt_packing import Packed
from fedsafe_jax.models.cache import KVCache, unrolls
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.owned_lora import Owned
from fedsafe_jax.models.sharding import CLIENTS, manual_axes


class Steering(NamedTuple):
    """What a search over answers adds to their decoding, see `guarding.search`.

    Attributes:
      bias: float32 `[groups, rows, vocab]`, added to the logits that tokens are drawn from.
      log_prob: float32 `[groups, rows]`, log-probability of the answers so far under the model, in
        nats: without the bias, at a temperature of 1.
      end: int32 `[]`, tokens of an answer at which decoding stops.
    """

    bias: jax.Array
    log_prob: jax.Array
    end: jax.Array


class State(NamedTuple):
    """Unfinished answers of a batch; a group holds the rows of one adapter.

    Attributes:
      token: int32 `[groups, rows]`, the last token of each answer, which is not in the cache yet.
      out: int32 `[groups, rows, max_new_tokens]`, the answers; -1 where no token was written.
      done: bool `[groups, rows]`, whether the answer has a stop token.
      cache: keys and values of the prompts and of the answers so far.
      steering: what a search adds; None elsewhere, which costs nothing.
    """

    token: jax.Array
    out: jax.Array
    done: jax.Array
    cache: KVCache
    steering: Steering | None = None


class Specs(NamedTuple):
    """Partition specs of a program's arguments and results: the mesh axis `clients` splits rows.

    Attributes:
      whole: anything that every device holds whole: parameters, LoRA factors, scalars.
      rows: arrays `[rows, ...]`.
      groups: arrays `[groups, rows, ...]`.
      packed: packed prompts.
      cache: a KV cache, in the layout that generation uses for the model.
      state: unfinished answers.
    """

    whole: PartitionSpec
    rows: PartitionSpec
    groups: PartitionSpec
    packed: Packed
    cache: KVCache
    state: State

    def factors(self, owned: bool) -> Any:
        """Returns the specs of LoRA factors; `owned`: they are an `Owned`."""
        return Owned(self.whole, self.rows) if owned else self.whole

    @classmethod
    def of(cls, model: Decoder, stacked: bool) -> "Specs":
        """Returns the specs for a model; `stacked`: its cache has a leading axis of adapters."""
        whole, rows, groups = PartitionSpec(), PartitionSpec(CLIENTS), PartitionSpec(None, CLIENTS)
        adapters = (None,) * stacked
        # An unrolled decoder's cache is an array a layer, any other has an axis of layers.
        layers = () if unrolls(model.config) else (None,)
        kv = PartitionSpec(*adapters, *layers, CLIENTS)
        valid = PartitionSpec(*adapters, CLIENTS)
        cache = KVCache(key=kv, value=kv, valid=valid, length=whole)
        packed = Packed(
            tokens=rows,
            positions=rows,
            segment_ids=rows,
            source=rows,
            valid=rows,
            last=rows,
            width=whole,
        )
        state = State(token=groups, out=groups, done=groups, cache=cache)
        return cls(whole, rows, groups, packed=packed, cache=cache, state=state)


def split_rows(
    function: Callable, mesh: Mesh | None, in_specs: tuple, out_specs: Any, donate: tuple = ()
) -> Callable:
    """Compiles a program whose rows are split over the mesh, so that each device stops by itself.

    Args:
      function: the program.
      mesh: devices; None for one device.
      in_specs: specs of each argument.
      out_specs: specs of the result.
      donate: numbers of the arguments whose memory the results take over.
    """
    if mesh is None or mesh.size == 1:
        return jax.jit(function, donate_argnums=donate)
    # Nothing is differentiated, so there is nothing for check_vma to check.
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        axis_names=manual_axes(mesh),
        check_vma=False,
        in_specs=in_specs,
        out_specs=out_specs,
    )
    return jax.jit(mapped, donate_argnums=donate)
