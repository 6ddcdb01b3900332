"""Filters on disk: a folder with `filter.json`, safetensors and a tokenizer; no pickles."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fedsafe_jax.filters.classifier import ClassifierFilter
from fedsafe_jax.filters.decision import Decision
from fedsafe_jax.filters.guard import GuardFilter
from fedsafe_jax.filters.protocol import FilterError
from fedsafe_jax.models import encoder_hub, lora
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.encoder import EncoderConfig
from fedsafe_jax.models.hub import read_json, write_json

NAME = "filter.json"


def save(found, folder, lora_config: lora.LoraConfig | None = None, base_model: str = "") -> None:
    """Writes a filter.

    Args:
      found: a `ClassifierFilter` or `GuardFilter`.
      folder: created if missing.
      lora_config, base_model: of a guard: its adapter's shape, and the folder or Hub id of its
        base.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"max_length": found.max_length, "decision": found.decision._asdict()}
    if isinstance(found, ClassifierFilter):
        flat = jax.tree_util.tree_flatten_with_path(found.params)[0]
        tensors = {"/".join(k.key for k in path): np.asarray(leaf) for path, leaf in flat}
        save_file(tensors, folder / "classifier.safetensors")
        about |= {
            "kind": "classifier",
            "encoder": dataclasses.asdict(found.config),
            "unsafe_classes": list(found.unsafe_classes),
        }
        found.tokenizer.save_pretrained(folder)
    else:
        lora.save_adapter(lora.Adapter(found.adapter, lora_config, base_model), folder)
        about |= {
            "kind": "guardian" if found.guardian else "guard",
            "template": found.template,
            "base_model": base_model,
        }
    write_json(folder / NAME, about)


def check(folder) -> None:
    """Raises `FilterError` where there is no filter."""
    if not (pathlib.Path(folder) / NAME).is_file():
        raise FilterError(
            f"{folder}: no {NAME}; give a folder that `fedsafe train-filter` wrote, or an "
            "encoder with a classification head as filter.encoder and filter.unsafe_labels."
        )


def check_encoder(folder) -> None:
    """Raises `FilterError` where there is no encoder."""
    if not (pathlib.Path(folder) / "config.json").is_file():
        raise FilterError(f"filter.encoder: {folder} holds no config.json.")


def check_folders(f) -> None:
    """Raises `FilterError` where a folder that a config's `filter` names holds none."""
    if f.load:
        check(f.load)
    elif f.encoder:
        check_encoder(f.encoder)


def load(folder, load_guard=None):
    """Reads a filter that `save` wrote.

    Args:
      folder: of the filter.
      load_guard: `base_model -> LanguageModel`, for guards.

    Raises:
      FilterError: no filter, or a damaged one.
    """
    from transformers import AutoTokenizer

    folder = pathlib.Path(folder)
    check(folder)
    try:
        about = read_json(folder / NAME)
        decision, length = Decision(**about["decision"]), int(about["max_length"])
        if about["kind"] != "classifier":
            adapter, lm = lora.load_adapter(folder), load_guard(about["base_model"])
            lora.check_base(adapter, lm.config)
            model = Decoder(lm.config, adapter.config.scale)
            return GuardFilter(
                model,
                lm.params,
                adapter.factors,
                tokenizer=lm.tokenizer,
                max_length=length,
                decision=decision,
                template=about["template"],
                guardian=about["kind"] == "guardian",
            )
        shape = {k: tuple(v) if isinstance(v, list) else v for k, v in about["encoder"].items()}
        params: dict = {}
        for name, value in load_file(folder / "classifier.safetensors").items():
            *where, last = name.split("/")
            node = params
            for key in where:
                node = node.setdefault(key, {})
            node[last] = jnp.asarray(value)
    except (KeyError, TypeError, json.JSONDecodeError, OSError, SafetensorError) as error:
        raise FilterError(f"{folder}: the filter is damaged ({error!r}); train it again.") from None
    return ClassifierFilter(
        EncoderConfig(**shape),
        params,
        AutoTokenizer.from_pretrained(folder),
        max_length=length,
        decision=decision,
        unsafe_classes=tuple(about["unsafe_classes"]),
    )


def from_encoder(folder, max_length: int, unsafe_labels: tuple[str, ...]) -> ClassifierFilter:
    """A Hugging Face classifier as it is, such as one of toxicity.

    Args:
      folder: with a classification head.
      max_length: tokens of a pair.
      unsafe_labels: names in its `id2label` that mean unsafe.

    Raises:
      FilterError: none of its labels, or all of them, are named.
    """
    from transformers import AutoTokenizer

    names = read_json(pathlib.Path(folder) / "config.json").get("id2label", {})
    names = {int(i): name for i, name in names.items()}
    classes = tuple(i for i, name in sorted(names.items()) if name in unsafe_labels)
    unknown = sorted(set(unsafe_labels) - set(names.values()))
    if unknown or not classes or len(classes) == len(names):
        raise FilterError(
            f"filter.unsafe_labels={tuple(unsafe_labels)}: name some, not all, of the labels of "
            f"{folder}: {', '.join(names.values()) or 'it has none'}."
        )
    config, params = encoder_hub.load_classifier(pathlib.Path(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    length = min(max_length, config.max_length)
    return ClassifierFilter(config, params, tokenizer, max_length=length, unsafe_classes=classes)
