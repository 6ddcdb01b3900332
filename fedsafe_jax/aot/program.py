"""A program of a run as shapes alone, and what all programs of a config share."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from fedsafe_jax.aot.lengths import Lengths
from fedsafe_jax.data.packing import Batch
from fedsafe_jax.federated.mesh import make_mesh
from fedsafe_jax.inference.language_model import model_folder
from fedsafe_jax.models import attention_kernels, hub, lora, loss, microbatch
from fedsafe_jax.models.decoder import Decoder, param_shapes
from fedsafe_jax.models.decoder_config import PROJECTIONS, DecoderConfig
from fedsafe_jax.models.known import KNOWN
from fedsafe_jax.models.quantize import quantize
from fedsafe_jax.models.sharding import CLIENTS, MODEL, leaf_spec

WHOLE = PartitionSpec()
# Scopes in the names of operations: the loop over local steps, and the loop over the chunks of
# target tokens, whose length is data.
STEPS_SCOPE, TARGET_SCOPE = "local_steps", "target_chunks"
PROJECTION_NAMES = tuple(name for names in PROJECTIONS.values() for name in names)


class Program(NamedTuple):
    """A program of a run, with the shapes that it is compiled for.

    Attributes:
      name: `train`, `sum`, `server`, `filter_train`, `filter_score`, `prefill`, `decode`, `cai`.
      function: the jitted function of the run itself.
      arguments: its arguments, `jax.ShapeDtypeStruct`s with shardings.
      kinds: the arguments' arrays by what they are: base, adapters, optimizer, batch, cache.
      mesh: devices that run it.
      tokens: tokens that a call computes, padding not counted; 0 where there are none.
      minimum: least operations of a call on all devices: products with weights, of attention, and
        those that `remat` computes again.
      attention: backend of its attention; "" without.
      kernel_flops: operations of one call's attention kernels on all devices, which the text of a
        compiled program does not show.
      trips: turns of the loops whose length is data, by the named scope they lie in.
      hidden_optimizer: bytes of the optimizer's state that are temporaries.
    """

    name: str
    function: Callable
    arguments: tuple
    kinds: dict[str, Any]
    mesh: Mesh
    tokens: int = 0
    minimum: float = 0.0
    attention: str = ""
    kernel_flops: float = 0.0
    trips: dict[str, int] = {}  # noqa: RUF012  never changed
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


class Run:
    """What the programs of a config share.

    Args:
      config: config of a run.
      devices: devices to compile for.
      lengths: lengths of the examples.
    """

    def __init__(self, config: ConfigDict, devices: Sequence, lengths: Lengths):
        self.config, self.lengths = config, lengths
        self.mesh = make_mesh(devices, config.model_parallel)
        # Constitutional AI and guards take the devices of one copy, classifiers the first.
        self.copy = make_mesh(self.mesh.devices[0].tolist(), config.model_parallel)
        self.first = make_mesh(self.mesh.devices[0][:1].tolist())
        self.shape = decoder_config(config.model, config, self.mesh)
        self.lora = lora.LoraConfig(
            config.lora_rank,
            config.lora_alpha,
            lora.expand_targets(config.lora_targets),
            config.lora_rank_stabilized,
        )
        self.base = base_shapes(self.shape, config)
        self.factors = jax.eval_shape(lambda: lora.init(jax.random.key(0), self.shape, self.lora))
        self.model = Decoder(self.shape, self.lora.scale)

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
          tokens: tokens of one client's rows, as a chunk has no more.
        """
        if self.shape.platform in microbatch.MICROBATCH_TOKENS:
            return 1  # of a microbatch
        chunk = loss.CHUNK_TOKENS.get(self.shape.platform, loss.DEFAULT_CHUNK_TOKENS)
        return max(1, -(-int(targets) // min(chunk, tokens)))


def least(shape: DecoderConfig, tokens: int, passes: float, logits: int, seq: float) -> float:
    """Returns the least operations for tokens: products of layers, attention, and logits.

    Args:
      shape: shape of the decoder.
      tokens: tokens that go through the layers.
      passes: products with each weight, 1 for a forward pass: 2 operations a weight and token.
      logits: tokens whose logits are computed, once or with their gradient, as products.
      seq: tokens that one attends to, on average.
    """
    layers = sum(shape.num_layers * a * b for a, b in map(shape.projection_shape, PROJECTION_NAMES))
    scores = 4 * shape.num_layers * shape.num_heads * shape.head_dim * seq
    head = 2 * shape.vocab_size * shape.hidden_size
    return passes * tokens * (2 * layers + scores) + logits * head


def kernel_flops(
    shape: DecoderConfig, backend: str, rows: int, seq: int, forward: int, backward: int
) -> float:
    """Returns the operations of a model's attention kernels over causal rows of `seq` tokens.

    A backward kernel computes five products where a forward one computes two (FlashAttention-2,
    arXiv 2307.08691).
    """
    if backend not in attention_kernels.KERNELS:
        return 0.0  # Its products are in the program's text.
    one = 2 * rows * seq * seq * shape.num_heads * shape.head_dim * shape.num_layers
    return one * (forward + 2.5 * backward)
