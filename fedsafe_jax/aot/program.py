"""A program of a run as shapes alone, and what all programs of a config share."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from fedsafe_jax import random_streams
from fedsafe_jax.aot.lengths import Lengths
from fedsafe_jax.data.packing import Batch
from fedsafe_jax.federated.mesh import make_mesh
from fedsafe_jax.models import hub, lora, loss, microbatch
from fedsafe_jax.models.base_model import model_folder
from fedsafe_jax.models.decoder import Decoder, param_shapes
from fedsafe_jax.models.decoder_config import PROJECTIONS, DecoderConfig
from fedsafe_jax.models.known import KNOWN
from fedsafe_jax.models.quantize import quantize
from fedsafe_jax.models.sharding import CLIENTS, MODEL, leaf_spec
from fedsafe_jax.random_streams import Purpose

WHOLE = PartitionSpec()
PROJECTION_NAMES = tuple(name for names in PROJECTIONS.values() for name in names)


class Program(NamedTuple):
    """A program of a run, with the shapes that it is compiled for.

    Attributes:
      name: `train`, `sum`, `server`, `filter_train`, `filter_score`, `prefill`, `decode`, `cai`.
      function: the jitted function of the run itself.
      arguments: its arguments, `jax.ShapeDtypeStruct`s with shardings.
      kinds: the arguments' arrays by what they are: base, adapters, optimizer, batch, cache.
      mesh: devices that run it.
      tokens: tokens that a call is for, padding not counted; 0 where there are none.
      computed: tokens that a call computes on all devices, with padding, and, where rows are in no
        slots, with clients that fill the chunk.
      minimum: least operations of a call on all devices, see `least`.
      attention: backend of its attention; "" without.
      trips: turns of the loops whose length is data, by the named scope they lie in.
      shares: shares in which a choice's branches are taken, the smallest branch first, by the named
        scope it lies in.
      hidden_optimizer: bytes of the optimizer's state that are temporaries.
    """

    name: str
    function: Callable
    arguments: tuple
    kinds: dict[str, Any]
    mesh: Mesh
    tokens: int = 0
    computed: int = 0
    minimum: float = 0.0
    attention: str = ""
    trips: dict[str, int] = {}  # noqa: RUF012  never changed
    shares: dict[str, tuple[float, ...]] = {}  # noqa: RUF012  never changed
    hidden_optimizer: int = 0


def decoder_config(name: str, config: ConfigDict, mesh: Mesh | None) -> DecoderConfig:
    """Returns the shape of a model as a run of the config has it.

    Args:
      name: path or Hub id; those in `known.KNOWN` need no folder.
      config: config of the run.
      mesh: devices that hold one copy of the model or more.
    """
    shape = KNOWN.get(name) or hub.read_config(model_folder(name), config.dtype)
    return dataclasses.replace(
        shape, dtype=config.dtype, remat=config.remat, attention=config.attention, mesh=mesh
    )


def on(tree: Any, mesh: Mesh, spec: PartitionSpec = WHOLE) -> Any:
    """Returns the shapes of a pytree's arrays, laid out on a mesh."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def base_shapes(shape: DecoderConfig, config: ConfigDict) -> dict:
    """Returns the shapes of a base's parameters, quantised and laid out as in `hub.load_params`."""
    mesh = shape.mesh

    def leaf(path, x):
        keys, x = [key.key for key in path], jax.ShapeDtypeStruct(x.shape, config.dtype)
        if config.quantization and keys[-1] == "kernel":
            x = jax.eval_shape(functools.partial(quantize, kind=config.quantization), x)
        size = mesh.shape[MODEL]
        return jax.tree.map(lambda y: on(y, mesh, leaf_spec(keys, y.shape, size)), x)

    return jax.tree_util.tree_map_with_path(leaf, param_shapes(shape))


def of_host(devices: Sequence, model_parallel: int) -> Sequence:
    """Returns the devices of the first process; all where a copy of the base spans processes."""
    own = [d for d in devices if d.process_index == devices[0].process_index]
    return devices if len(own) % model_parallel else own


class Run:
    """What the programs of a config share.

    Args:
      config: config of a run.
      devices: devices to compile for.
      lengths: lengths of the examples.
      copy: devices to compile the programs of one copy of the base for; None for some of `devices`.
      host: devices to compile the programs of one process for; None for some of `devices`.
    """

    def __init__(
        self,
        config: ConfigDict,
        devices: Sequence,
        lengths: Lengths,
        copy: Sequence | None = None,
        host: Sequence | None = None,
    ):
        self.config, self.lengths = config, lengths
        self.mesh = make_mesh(devices, config.model_parallel)
        # Constitutional AI trains on the devices of a process, guards take those of one copy,
        # classifiers the first.
        self.host = make_mesh(
            host or of_host(devices, config.model_parallel), config.model_parallel
        )
        self.copy = make_mesh(copy or self.mesh.devices[0].tolist(), config.model_parallel)
        self.first = make_mesh(self.mesh.devices[0][:1].tolist())
        self.shape = decoder_config(config.model, config, self.mesh)
        self.lora = lora.LoraConfig(
            config.lora_rank,
            config.lora_alpha,
            lora.expand_targets(config.lora_targets),
            rank_stabilized=config.lora_rank_stabilized,
            dropout=config.lora_dropout,
        )
        self.base = base_shapes(self.shape, config)
        self.factors = jax.eval_shape(
            lambda: lora.init(random_streams.key(Purpose.SHAPES, 0), self.shape, self.lora)
        )
        self.model = Decoder(self.shape, self.lora.scale, self.lora.dropout)

    def microbatches(self, batch: Batch, steps: int) -> int:
        """Returns the microbatches that a device computes in a step, all clients' together."""
        tokens = microbatch.MICROBATCH_TOKENS.get(self.shape.platform)
        if tokens is None:
            return 1  # A step is one.
        filled = int((batch.segment_ids > 0).any(-1).sum())
        rows = max(1, tokens // batch.mask.shape[-1])
        return max(1, -(-filled // (rows * steps * self.mesh.shape[CLIENTS])))

    def chunk_trips(self, targets: float, tokens: int) -> int:
        """Returns the turns of the loss's loop over chunks of target tokens.

        Args:
          targets: target tokens of one call, all clients' together.
          tokens: tokens of its rows, or of one client's where clients are mapped over it: a chunk
            has no more.
        """
        if self.shape.platform in microbatch.MICROBATCH_TOKENS:
            return 1  # of a microbatch
        chunk = loss.CHUNK_TOKENS.get(self.shape.platform, loss.DEFAULT_CHUNK_TOKENS)
        return max(1, -(-int(targets) // min(chunk, tokens)))


def attended(positions: np.ndarray, segment_ids: np.ndarray) -> float:
    """Returns the tokens that one attends to, itself included: the mean over filled slots.

    Args:
      positions, segment_ids: of packed rows, as in `data.packing.Batch`.
    """
    is_filled = segment_ids > 0
    return float(((positions + 1) * is_filled).sum() / max(is_filled.sum(), 1))


def least(
    shape: DecoderConfig,
    tokens: int,
    seen: float,
    logits: int,
    trains: bool = False,
    remat: bool = False,
) -> float:
    """Returns the least operations for tokens: products of layers, attention, and logits.

    Two operations a weight and token forward, and two for the gradient by a layer's input: a frozen
    base has no gradient of its own. Attention has two products forward and four backward.
    `remat` computes the forward products of layers again, except the last one of a layer, whose
    result nothing needs. Adapters are left out.

    Args:
      shape: shape of the decoder.
      tokens: tokens that go through the layers.
      seen: tokens that one attends to, on average.
      logits: tokens whose logits are computed, each time that they are: two with a gradient.
      trains: whether there is a backward pass.
      remat: whether layers are computed again in it.
    """
    sizes = {name: math.prod(shape.projection_shape(name)) for name in PROJECTION_NAMES}
    again = sum(sizes.values())
    if not shape.sandwich_norms:
        again -= sizes["down_proj"]
    recomputed = trains and remat
    weights = (1 + trains) * sum(sizes.values()) + recomputed * again
    scores = (1 + 2 * trains + recomputed) * 2 * shape.num_heads * shape.head_dim * seen
    head = shape.vocab_size * shape.hidden_size
    return 2.0 * (tokens * shape.num_layers * (weights + scores) + logits * head)
