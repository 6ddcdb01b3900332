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
from fedsafe_jax.filters.actions import ACTIONS
from fedsafe_jax.filters.cache import content_hash

# Why a site refuses, by the code that it sends: the text of an error may quote the site's files,
# so it stays in the site's log, and the server prints these sentences.
REFUSALS = {
    "settings": "its operator's --node-config is not valid for this run",
    "config": "the run's config is not valid there, or its version of the package is another one",
    "policy": "the run's config names what its operator does not allow",
    "filter": "its safety filter cannot be used, or the run would train without it",
    "data": "its pairs, or the evaluation prompts there, cannot be read, or none is left",
    "model": "its base model cannot be loaded, or does not fit the run",
    "message": "the server's message does not fit the run there",
    "storage": "its workdir cannot be read or written",
    "internal": "an error that the package does not expect",
}

# Fields that the operator of a site sets there, whatever the run's config says.
OPERATORS_OWN = (
    "safe_sources", "unsafe_sources", "data_dir", "harmful_share", "partition", "dirichlet_alpha",
    "examples_per_client", "size_sigma", "attack",
)  # fmt: skip
# Fields that a site reads of the server's own section: which prompts must not be trained on.
SENT_OF_EVAL = ("tasks", "max_prompts", "max_heldout")
# Stand for the server's judges: tasks that a chat model rates are valid, and no site can ask it.
JUDGES_AT_SERVER = ("rules", "chat:at-the-server@https://judge.invalid#mt_bench")

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
    """Packs what a site needs of a run's config.

    The rest (where the server's data, judge and revisions are) stays at the server; a site has the
    package's defaults there.

    Args:
      config: config of the run.

    Returns:
      `config`, the fields as JSON; `federation`, a hash of the whole config, by which a site knows
      the federation again.
    """
    whole = config.to_dict()
    del whole["eval"]["judges"]  # may hold a password: not even hashed
    federation = content_hash(whole)
    sent = {k: v for k, v in whole.items() if k not in OPERATORS_OWN}
    # Principles, say, travel only to where flagged answers are revised.
    sent["cai"] = {k: whole["cai"][k] for k in ACTIONS[config.filter.action].reads}
    # Safe LoRA is the server's step, on models that lie there, and so are questions to its model.
    # Whom it leaves out is nothing that other sites need to know.
    at_server = ("unaligned", "attribution", "exclude")
    sent["federated"] = {k: v for k, v in whole["federated"].items() if k not in at_server}
    sent["eval"] = {k: v for k, v in whole["eval"].items() if k in SENT_OF_EVAL}
    if any(":" in spec for spec in config.eval.judges):
        sent["eval"]["judges"] = JUDGES_AT_SERVER
    return ConfigRecord({"config": json.dumps(sent), "federation": federation})


def config_of(record: ConfigRecord) -> ml_collections.ConfigDict:
    """Unpacks the config of a record; fields that it does not hold have the package's defaults.

    Args:
      record: a record that `config_record` packed.

    Raises:
      ConfigError: no JSON object; a field that this version of the package does not know, or of
        another type; a number that is not finite, or has more than 64 bits.
    """

    def no_number(text: str) -> None:
        raise ConfigError(f"the server's config holds {text}, which is no number.")

    try:
        said = json.loads(record["config"], parse_constant=no_number)
    except ConfigError:
        raise
    except (KeyError, TypeError, ValueError, RecursionError):
        raise ConfigError("the server's config is no JSON.") from None
    if not isinstance(said, dict):
        raise ConfigError(f"the server's config is a {type(said).__name__}, expected an object.")
    config = default_config()
    for name, value in traverse_util.flatten_dict(said, sep=".").items():
        for one in value if isinstance(value, list) else [value]:
            if not isinstance(one, str | int | float):
                raise ConfigError(f"{name}: expected text, numbers, or a list of them.")
            if isinstance(one, int | float) and not abs(one) < 2**63:
                raise ConfigError(f"{name}={one}: expected less than 2**63.")
        set_field(config, name, tuple(value) if isinstance(value, list) else value)
    return config


def refused(code: str) -> ConfigRecord:
    """Packs a refusal; `code` is a key of `REFUSALS`."""
    return ConfigRecord({"code": code})


def refusal(record: ConfigRecord) -> str:
    """Returns the sentence of a refusal; no text of a site is in it.

    Args:
      record: a record that `refused` packed, or whatever else a site sent.
    """
    code = record.get("code")
    known = REFUSALS.get(code) if isinstance(code, str) else None
    if known is None:
        return "it refused with a code that is not known here"
    return f"{known} (code {code}; the reason is in the site's own log)"


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
