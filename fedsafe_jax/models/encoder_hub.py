"""Encoders from Hugging Face folders, with a head or without: BERT, RoBERTa, XLM-R, ModernBERT."""

import pathlib
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from fedsafe_jax import random_streams
from fedsafe_jax.models import config_fields
from fedsafe_jax.models.decoder_config import ModelError
from fedsafe_jax.models.encoder import Classifier, EncoderConfig
from fedsafe_jax.models.hub_files import check_vocabulary
from fedsafe_jax.models.model_files import Tensors, check_finite, read_json
from fedsafe_jax.models.tokenizer_loading import read_tokenizer
from fedsafe_jax.random_streams import Purpose

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

FAMILIES = ("bert", "roberta", "xlm-roberta", "modernbert")
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}

# Hugging Face name of each module of `encoder`; `{}` stands for the layer's number.
BERT = {
    "word": "embeddings.word_embeddings",
    "position": "embeddings.position_embeddings",
    "type": "embeddings.token_type_embeddings",
    "embedding_norm": "embeddings.LayerNorm",
    "attention/query": "encoder.layer.{}.attention.self.query",
    "attention/key": "encoder.layer.{}.attention.self.key",
    "attention/value": "encoder.layer.{}.attention.self.value",
    "attention/output": "encoder.layer.{}.attention.output.dense",
    "attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
    "up": "encoder.layer.{}.intermediate.dense",
    "down": "encoder.layer.{}.output.dense",
    "mlp_norm": "encoder.layer.{}.output.LayerNorm",
}
MODERN = {
    "word": "embeddings.tok_embeddings",
    "embedding_norm": "embeddings.norm",
    "attention/query": "layers.{}.attn.Wqkv",
    "attention/key": "layers.{}.attn.Wqkv",
    "attention/value": "layers.{}.attn.Wqkv",
    "attention/output": "layers.{}.attn.Wo",
    "attention_norm": "layers.{}.attn_norm",
    "up": "layers.{}.mlp.Wi",
    "gate": "layers.{}.mlp.Wi",
    "down": "layers.{}.mlp.Wo",
    "mlp_norm": "layers.{}.mlp_norm",
    "final_norm": "final_norm",
}
# Modules whose tensors are one in the folder: (index of the part, number of parts), along torch's
# output axis.
PARTS = {
    "attention/query": (0, 3), "attention/key": (1, 3), "attention/value": (2, 3),
    "up": (0, 2), "gate": (1, 2),
}  # fmt: skip
HEADS = {
    "bert": {"head_dense": "pooler.dense", "head": "classifier"},
    "roberta": {"head_dense": "classifier.dense", "head": "classifier.out_proj"},
    "modernbert": {"head_dense": "head.dense", "head_norm": "head.norm", "head": "classifier"},
}
PREFIXES = ("bert.", "roberta.", "model.")


def from_hf(hf: "PretrainedConfig") -> EncoderConfig:
    """Reads a transformers config.

    Raises:
      ModelError: a family or an activation that is not supported.
    """
    family = hf.model_type
    if family not in FAMILIES:
        raise ModelError(
            f"encoder model_type '{family}' is not supported; supported are {', '.join(FAMILIES)}."
        )
    modern = family == "modernbert"
    _check_values(hf)
    activation = hf.hidden_activation if modern else hf.hidden_act
    if activation not in ACTIVATIONS:
        raise ModelError(
            f"activation '{activation}' is not supported; expected {', '.join(ACTIVATIONS)}."
        )
    common = {
        "vocab_size": hf.vocab_size,
        "hidden_size": hf.hidden_size,
        "num_layers": hf.num_hidden_layers,
        "num_heads": hf.num_attention_heads,
        "intermediate_size": hf.intermediate_size,
        "num_labels": hf.num_labels,
        "embedding_norm": True,
        "activation": ACTIVATIONS[activation],
    }
    if modern:
        kinds = hf.layer_types
        rope = hf.rope_parameters
        return EncoderConfig(
            **common,
            max_length=hf.max_position_embeddings,
            num_types=0,
            dropout=hf.mlp_dropout,
            first_norm=False,
            norm_epsilon=hf.norm_eps,
            use_bias=hf.attention_bias,
            norm_bias=hf.norm_bias,
            gated_mlp=True,
            rotary_thetas=tuple(
                float(rope[kind]["rope_theta"]) for kind in ("full_attention", "sliding_attention")
            ),
            window=hf.local_attention // 2,
            local_layers=tuple(i for i, k in enumerate(kinds) if k == "sliding_attention"),
            pooling="first" if hf.classifier_pooling == "cls" else "mean",
            head="norm",
            head_bias=hf.classifier_bias,
        )
    # RoBERTa's first position has the index after the padding token's.
    offset = 0 if family == "bert" else hf.pad_token_id + 1
    return EncoderConfig(
        **common,
        max_length=hf.max_position_embeddings - offset,
        num_types=hf.type_vocab_size,
        dropout=hf.hidden_dropout_prob,
        pre_norm=False,
        norm_epsilon=hf.layer_norm_eps,
        position_offset=offset,
        pooling="first",
        head="tanh",
    )


def _check_values(hf: "PretrainedConfig") -> None:
    """Checks sizes, and fields of ModernBERT that have to agree with others."""
    sizes = "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size"
    config_fields.check_numbers(hf, [*sizes.split(), "max_position_embeddings", "local_attention"])
    config_fields.check_numbers(hf, ["layer_norm_eps", "norm_eps"], whole=False)
    if hf.hidden_size % hf.num_attention_heads:
        raise ModelError(
            f"hidden_size={hf.hidden_size} is no multiple of {hf.num_attention_heads} heads."
        )
    if hf.model_type != "modernbert":
        return
    for name, other in (
        ("mlp_bias", "attention_bias"),
        ("classifier_activation", "hidden_activation"),
    ):
        if getattr(hf, name) != getattr(hf, other):
            raise ModelError(
                f"{name}={getattr(hf, name)!r} is not supported beside "
                f"{other}={getattr(hf, other)!r}; expected the same."
            )
    kinds = config_fields.LAYER_TYPES
    if len(hf.layer_types) != hf.num_hidden_layers or set(hf.layer_types) - set(kinds):
        raise ModelError(
            f"layer_types={hf.layer_types!r}; expected one of {', '.join(kinds)} for each of "
            f"{hf.num_hidden_layers} layers."
        )
    for kind in kinds:
        config_fields.check_rope(rope := hf.rope_parameters[kind])
        if rope.get("rope_type", "default") != "default":
            raise ModelError(f"rope scaling '{rope['rope_type']}' is not supported in encoders.")


def load_classifier(
    folder: pathlib.Path, num_labels: int | None = None, seed: int = 0
) -> tuple[EncoderConfig, dict]:
    """Reads an encoder with its head; parts of the head that the folder lacks are drawn at random.

    Args:
      folder: a Hugging Face folder with safetensors, such as MiniLM's or a toxicity classifier's.
      num_labels: number of classes; None for the folder's. A head of another size is drawn anew.
      seed: seed of the parts that are drawn.

    Returns:
      `(config, params of a Classifier)`, float32.

    Raises:
      ModelError: an unsupported model, or a missing or wrong tensor.
    """
    folder = pathlib.Path(folder)
    hf, config = read_config(folder, num_labels)
    family = "roberta" if "roberta" in hf.model_type else hf.model_type
    modules, head = MODERN if family == "modernbert" else BERT, HEADS[family]
    tensors = Tensors(folder)
    prefix = next((p for p in PREFIXES if any(n.startswith(p) for n in tensors.names())), "")
    blank = jnp.zeros((1, 8), jnp.int32)
    key = random_streams.key(Purpose.FILTER_START, seed)
    has_head = _has_head(tensors, head["head"], config.num_labels)

    def draw():
        return Classifier(config).init(key, blank, blank, blank == 0)["params"]

    def read(path, leaf):
        *where, kind = (key.key for key in path)
        if where[0] == "encoder":
            stem, part = _encoder_tensor(where[1:], modules)
            stem = prefix + stem
        else:
            stem, part = head[where[0]], (0, 1)
            stem = prefix + stem if stem.startswith("pooler") else stem
            # A head with another number of labels was trained for another task, so none of it is
            # used. BERT's pooler was trained with the encoder, so it is.
            if not has_head and not stem.endswith("pooler.dense"):
                return leaf
        name = f"{stem}.{'bias' if kind == 'bias' else 'weight'}"
        if name not in tensors.names():
            if where[0] != "encoder":
                return leaf
            raise ModelError(f"{folder}: tensor '{name}' is missing.")
        tensors.check_dtype(name)
        value = tensors.read(name, (slice(None),) * len(tensors.shape(name)))
        value = value.astype(np.float32)
        check_finite(value, f"{folder}: tensor '{name}'")
        if part[1] > 1 and family == "modernbert":
            value = np.split(value, part[1])[part[0]]
        value = value.T if kind == "kernel" else value
        if value.shape != leaf.shape:
            raise ModelError(
                f"{folder}: tensor '{name}' has shape {list(value.shape)}, config.json asks for "
                f"{list(leaf.shape)}."
            )
        return jnp.asarray(value)

    # From shapes first: what config.json claims takes no memory unless the tensors have it.
    if config.num_layers > len(tensors.names()):
        raise ModelError(
            f"{folder}: config.json says {config.num_layers} layers, but there are "
            f"{len(tensors.names())} tensors."
        )
    params = jax.tree_util.tree_map_with_path(read, jax.eval_shape(draw))
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        params = jax.tree.map(
            lambda leaf, drawn: drawn if isinstance(leaf, jax.ShapeDtypeStruct) else leaf,
            params,
            draw(),
        )
    return config, params


def load_tokenizer(folder: pathlib.Path, config: EncoderConfig) -> "PreTrainedTokenizerBase":
    """Reads an encoder's tokenizer.

    Args:
      folder: a Hugging Face folder.
      config: the encoder's config, from `load_classifier`.

    Raises:
      ModelError: none that can be loaded, or one with tokens that the embedding has no row for.
    """
    folder = pathlib.Path(folder)
    tokenizer = read_tokenizer(folder)
    check_vocabulary(tokenizer, config.vocab_size, where=folder)
    return tokenizer


def read_config(
    folder: pathlib.Path, num_labels: int | None = None
) -> tuple["PretrainedConfig", EncoderConfig]:
    """Reads `config.json`; arguments and errors as in `load_classifier`.

    Returns:
      The config of transformers, and what the encoder needs of it.
    """
    path = pathlib.Path(folder) / "config.json"
    raw = read_json(path)
    with config_fields.naming(path):
        config_fields.check_quantised(raw)
        config_fields.check_fields(raw, config_fields.ENCODER_FIELDS)
        hf = config_fields.complete(raw)
        if num_labels is not None:
            hf.num_labels = num_labels
        return hf, from_hf(hf)


def _has_head(tensors: Tensors, stem: str, num_labels: int) -> bool:
    """Returns whether the folder has a classification head of `num_labels` labels."""
    name = f"{stem}.weight"
    return name in tensors.names() and tensors.shape(name)[0] == num_labels


def _encoder_tensor(where: list[str], modules: dict[str, str]) -> tuple[str, tuple[int, int]]:
    """Returns the Hugging Face stem of a module of the encoder, and its part of the tensor."""
    number = None
    if where[0].startswith("layer_"):
        number, where = where[0].removeprefix("layer_"), where[1:]
    module = "/".join(where)
    return modules[module].format(number), PARTS.get(module, (0, 1))
