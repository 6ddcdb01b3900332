"""What a classifier's `filter.json` and tensors hold, checked before memory is taken by it."""

import dataclasses
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from safetensors.numpy import load_file

from fedsafe_jax import random_streams
from fedsafe_jax.filters.protocol import FilterError
from fedsafe_jax.models.config_fields import LARGEST
from fedsafe_jax.models.encoder import ACTIVATIONS, Classifier, EncoderConfig
from fedsafe_jax.models.model_files import check_finite
from fedsafe_jax.random_streams import Purpose

SIZES = {  # names of `LARGEST` in an `EncoderConfig`; without types and window there are none of it
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_length": "max_position_embeddings",
    "num_types": "type_vocab_size",
    "window": "local_attention",
    "position_offset": "type_vocab_size",
}
MAY_BE_ZERO = ("num_types", "window", "position_offset")
WORDS = {
    "activation": tuple(ACTIVATIONS),
    "pooling": ("mean", "first"),
    "head": ("linear", "tanh", "norm"),
}


def encoder_config(shape: Any, where: pathlib.Path) -> EncoderConfig:
    """Returns the encoder's config that a `filter.json` has under `encoder`.

    Args:
      shape: what stands there.
      where: the file, for messages.

    Raises:
      FilterError: an unknown field, or a value of another type or larger than in any encoder.
    """
    if not isinstance(shape, dict):
        raise FilterError(f"{where}: encoder={shape!r:.60}; expected an object.")
    defaults = {f.name: f.default for f in dataclasses.fields(EncoderConfig)}
    del defaults["platform"]
    for name, value in shape.items():
        if name not in defaults:
            raise FilterError(
                f"{where}: encoder has the unknown field '{name[:60]}'; a newer version wrote it, "
                "or it is damaged: train the filter again."
            )
        if not _fits(name, value, defaults[name], shape.get("num_layers", 2)):
            raise FilterError(f"{where}: encoder.{name}={value!r:.60} is no value of an encoder.")
    if "vocab_size" not in shape:
        raise FilterError(f"{where}: encoder has no vocab_size; the filter is damaged.")
    # JSON has no tuples, and a config with lists could not be hashed for `jit`.
    config = EncoderConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in shape.items()})
    if config.hidden_size % config.num_heads:
        raise FilterError(
            f"{where}: encoder.hidden_size={config.hidden_size} is no multiple of "
            f"num_heads={config.num_heads}."
        )
    return config


def _fits(name: str, value: Any, default: Any, layers: int) -> bool:
    """Whether a field's value is of its type and no larger than in any encoder."""
    if name in WORDS:
        return value in WORDS[name]
    if name == "rotary_thetas":
        return value is None or (
            isinstance(value, list) and len(value) == 2 and all(map(_is_positive, value))
        )
    if name == "local_layers":
        return isinstance(value, list) and all(
            type(v) is int and 0 <= v < min(layers, LARGEST["num_hidden_layers"]) for v in value
        )
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, float):
        return value == 0 or (_is_positive(value) and value < 1)
    most = LARGEST[SIZES.get(name, name)]
    return type(value) is int and (name not in MAY_BE_ZERO) <= value <= most


def _is_positive(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value < 1e30 and math.isfinite(value)


def tensors(path: pathlib.Path, config: EncoderConfig) -> dict:
    """Reads the weights of a classifier.

    Args:
      path: its safetensors.
      config: shape of the encoder.

    Returns:
      Params of `models.encoder.Classifier`.

    Raises:
      FilterError: tensors are missing, unknown, of another shape or type.
      ModelError: one is not finite.
    """
    given = load_file(path)
    if config.num_layers > len(given):
        raise FilterError(
            f"{path}: {len(given)} tensors, but filter.json says {config.num_layers} layers."
        )
    blank = jnp.zeros((1, 8), jnp.int32)
    shapes = jax.eval_shape(
        lambda: Classifier(config).init(
            random_streams.key(Purpose.SHAPES, 0), blank, blank, blank == 0
        )["params"]
    )
    flat = jax.tree_util.tree_flatten_with_path(shapes)[0]
    expected = {"/".join(k.key for k in keys): leaf.shape for keys, leaf in flat}
    if other := sorted(set(expected) ^ set(given)):
        raise FilterError(
            f"{path}: tensor '{other[0][:80]}' is in one of filter.json and the file alone; the "
            "filter is damaged, train it again."
        )
    params: dict = {}
    for name, shape in expected.items():
        value = given[name]
        if value.shape != shape or not jnp.issubdtype(value.dtype, jnp.floating):
            raise FilterError(
                f"{path}: tensor '{name}' is {value.dtype.name}{list(value.shape)}; filter.json "
                f"asks for floats {list(shape)}."
            )
        check_finite(value, f"{path}: tensor '{name}'")
        *parents, last = name.split("/")
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = jnp.asarray(value)
    return params


def unsafe_classes(given: Any, config: EncoderConfig, where: pathlib.Path) -> tuple[int, ...]:
    """Returns the classes that mean unsafe: some of the encoder's, not all.

    Raises:
      FilterError: they are none, all, or others.
    """
    known = range(config.num_labels)
    if (
        not isinstance(given, list)
        or not all(type(i) is int and i in known for i in given)
        or not 0 < len(set(given)) < len(known)
    ):
        raise FilterError(
            f"{where}: unsafe_classes={given!r:.60}; expected some, not all, of the "
            f"{len(known)} classes' numbers."
        )
    return tuple(given)


def pair_length(given: Any, where: pathlib.Path) -> int:
    """Returns the most tokens of a pair.

    Raises:
      FilterError: no such number.
    """
    if type(given) is not int or not 0 < given <= 2**20:
        raise FilterError(f"{where}: max_length={given!r:.60}; expected a number of tokens.")
    return given
