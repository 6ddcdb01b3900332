"""Filters on disk: a folder with `filter.json`, safetensors and a tokenizer; no pickles."""

import dataclasses
import json
import os
import pathlib

from safetensors import SafetensorError

from fedsafe_jax.filters.decision import Decision
from fedsafe_jax.filters.kinds import FILTER_KINDS, Filter, LoadModel
from fedsafe_jax.filters.protocol import FilterError
from fedsafe_jax.filters.requests import PAIR, REQUEST
from fedsafe_jax.models import encoder_hub
from fedsafe_jax.models.hub import ModelError, read_json, write_json

NAME = "filter.json"


def save(safety_filter: Filter, folder: str | os.PathLike, reads: str = PAIR) -> None:
    """Writes a filter; a guard's folder holds its adapter and names its base model.

    Args:
      safety_filter: a trained filter.
      folder: created if missing.
      reads: what it was trained to read, one of `requests.READS`.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "max_length": safety_filter.max_length,
        "decision": dataclasses.asdict(safety_filter.decision),
        "kind": safety_filter.kind,
    }
    if reads != PAIR:
        content["reads"] = reads
    content |= FILTER_KINDS[safety_filter.kind].save(safety_filter, folder)
    write_json(folder / NAME, content)


def check(folder: str | os.PathLike) -> None:
    """Raises `FilterError` where there is no filter."""
    if not os.path.isfile(pathlib.Path(folder) / NAME):
        raise FilterError(
            f"{folder}: no {NAME}; give a folder that `fedsafe train-filter` wrote, or an "
            "encoder with a classification head as filter.encoder and filter.unsafe_labels."
        )


def check_encoder(folder: str | os.PathLike) -> None:
    """Raises `FilterError` where there is no encoder, `ModelError` where it is not supported."""
    if not os.path.isfile(pathlib.Path(folder) / "config.json"):
        raise FilterError(f"filter.encoder: {folder} holds no config.json.")
    encoder_hub.read_config(pathlib.Path(folder))


def check_folders(filter_folder: str, encoder: str) -> None:
    """Raises an error where a folder that a config's `filter` names is not what it should be.

    Args:
      filter_folder: folder of a trained filter, which then is all that is used; "" for none.
      encoder: folder of an encoder; "" for none.

    Raises:
      FilterError, ModelError: it holds nothing of use, or a model that is not supported.
    """
    if filter_folder:
        check(filter_folder)
    elif encoder:
        check_encoder(encoder)


def base_of(folder: str | os.PathLike) -> str:
    """Returns the base model that a guard's folder names, "" for other filters and without one."""
    try:
        return read_json(pathlib.Path(folder) / NAME).get("base_model", "")
    except (AttributeError, ValueError, OSError, ModelError):  # `load` says what is wrong
        return ""


def reads(folder: str | os.PathLike) -> str:
    """Returns what a filter's folder says that it reads, one of `requests.READS`."""
    try:
        return read_json(pathlib.Path(folder) / NAME).get("reads", PAIR)
    except (AttributeError, ValueError, OSError, ModelError):  # `load` says what is wrong
        return PAIR


def load(
    folder: str | os.PathLike, load_model: LoadModel | None = None, reading: str = PAIR
) -> Filter:
    """Reads a filter that `save` wrote.

    Args:
      folder: folder of the filter.
      load_model: loads a language model by path or Hub id, for guards.
      reading: what it is to read, one of `requests.READS`.

    Raises:
      FilterError: no filter, a damaged one, or one that reads something else.
    """
    folder = pathlib.Path(folder)
    check(folder)
    if (trained := reads(folder)) != reading:
        raise FilterError(
            f"{folder}: this filter was trained with reads='{trained}', and here it would read a "
            f"{reading}; " + ("use it as a guardian." if trained == REQUEST else "train another.")
        )
    try:
        content = read_json(folder / NAME)
        kind, decision = FILTER_KINDS[content["kind"]], Decision(**content["decision"])
        return kind.load(folder, content, decision, load_model)
    except FilterError as error:
        raise FilterError(f"{folder}: {error}") from None
    except OSError as error:
        # Its files may be as they were: nothing asks for another training.
        reason = error.strerror or error
        raise FilterError(f"{folder}: the filter cannot be read ({reason}).") from None
    except (KeyError, TypeError, json.JSONDecodeError, SafetensorError) as error:
        raise FilterError(f"{folder}: the filter is damaged ({error!r}); train it again.") from None
