"""Messages between server and sites: named float32 arrays and JSON, never pickles.

An array's name is its path, such as `adapter.layers.self_attn.q_proj.a`: a record holds what a
safetensors file would.
"""

import io
import json
import math
from typing import Any

import ml_collections
import numpy as np
from flax import traverse_util
from flwr.app import Array, ArrayRecord, ConfigRecord

from fedsafe_jax.config import ConfigError, check_override, default_config

NPY = "numpy.ndarray"  # Flower's name for an array whose bytes are an .npy file
MOST_HEADER = 256  # bytes of the header of an .npy file; numpy's own have 128


class WireError(ValueError):
    """A message does not hold what this side needs; the text names the array or field."""


def arrays(tree: dict) -> ArrayRecord:
    """Packs nested dictionaries of float32 arrays into a record.

    Args:
      tree: nested dictionaries of arrays; leaves that are () are left out.
    """
    flat = traverse_util.flatten_dict(tree, sep=".")
    return ArrayRecord(
        {name: Array(np.asarray(x)) for name, x in flat.items() if not isinstance(x, tuple)}
    )


def tree(record: ArrayRecord, like: dict) -> dict:
    """Unpacks the arrays of a record, nested as in `like`.

    Args:
      record: a record that `arrays` packed.
      like: nested dictionaries of arrays, or of their shapes; () where nothing travels.

    Raises:
      WireError: an array is missing, unknown, or of another shape or dtype, as where the other
        side has another base model, rank or targets; or its bytes are not what it says.
    """
    flat = traverse_util.flatten_dict(like, sep=".")
    wanted = {name: x for name, x in flat.items() if not isinstance(x, tuple)}
    for names, what in ((wanted.keys() - record.keys(), "is missing"),
                        (record.keys() - wanted.keys(), "is not known here")):  # fmt: skip
        if names:
            raise WireError(f"array {min(names)} {what}: other lora_targets, or algorithm.")
    flat_arrays = {name: _array(name, record[name], x.shape) for name, x in wanted.items()}
    empty = {name: x for name, x in flat.items() if isinstance(x, tuple)}
    return traverse_util.unflatten_dict(flat_arrays | empty, sep=".")


def _array(name: str, sent: Array, shape: tuple[int, ...]) -> np.ndarray:
    """Unpacks a float32 array; nothing is allocated before all that it says of itself is right."""
    if tuple(sent.shape) != tuple(shape) or sent.dtype != "float32":
        raise WireError(
            f"array {name} is {sent.dtype} {list(sent.shape)}, expected float32 {list(shape)}: "
            "another base model, or lora_rank."
        )
    size = 4 * math.prod(shape)
    if sent.stype != NPY or not size < len(sent.data) <= size + MOST_HEADER:
        raise WireError(
            f"array {name} is {sent.stype:.20} of {len(sent.data)} bytes, expected an .npy file of "
            f"{size} and its header."
        )
    file = io.BytesIO(sent.data)
    try:
        version = np.lib.format.read_magic(file)
        inside, _, dtype = np.lib.format.read_array_header_1_0(file)
        right = version == (1, 0) and inside == tuple(shape) and dtype == np.float32
        if right and len(sent.data) - file.tell() == size:
            return sent.numpy()
    except Exception as error:  # numpy's parser raises what Python's does
        raise WireError(f"array {name} is no .npy file ({type(error).__name__}).") from None
    raise WireError(f"array {name} is no .npy file of float32 {list(shape)}.")


def config_record(config: ml_collections.ConfigDict) -> ConfigRecord:
    """Packs the config of a run as JSON."""
    return ConfigRecord({"config": json.dumps(config.to_dict())})


def config_of(record: ConfigRecord) -> ml_collections.ConfigDict:
    """Unpacks the config of a record.

    Args:
      record: a record that `config_record` packed.

    Raises:
      ConfigError: a field that this version of the package does not know, or of another type.
    """
    config = default_config()
    for name, value in traverse_util.flatten_dict(json.loads(record["config"]), sep=".").items():
        set_field(config, name, tuple(value) if isinstance(value, list) else value)
    return config


def set_field(config: ml_collections.ConfigDict, name: str, value: Any) -> None:
    """Sets one field by its dotted name.

    Args:
      config: changed in place.
      name: name of the field, such as `filter.action`.
      value: new value.

    Raises:
      ConfigError: there is no such field, or the value is of another type.
    """
    check_override(name, config)
    *sections, last = name.split(".")
    section = config
    for part in sections:
        section = section[part]
    try:
        section[last] = value
    except TypeError:
        kind = type(section[last]).__name__
        raise ConfigError(f"{name}={value!r}: expected a value of type {kind}.") from None
