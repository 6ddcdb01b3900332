"""Fields of a foreign `config.json`: an allow-list of what is read and of what changes nothing.

A field that is in neither list may change what the model computes, so it is refused by name, also
when a later transformers brings it. What transformers itself cannot read is refused in its words.
"""

import contextlib
import math
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fedsafe_jax.models.decoder_config import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Fields of every decoder that are computed with.
_DECODER = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim max_position_embeddings rms_norm_eps tie_word_embeddings "
    "rope_parameters rope_scaling rope_theta partial_rotary_factor hidden_act".split()
)
_WINDOWS = frozenset({"sliding_window", "layer_types"})
_GEMMA = _WINDOWS | frozenset(
    "hidden_activation attention_bias query_pre_attn_scalar final_logit_softcapping "
    "attn_logit_softcapping use_bidirectional_attention".split()
)
_QWEN = _WINDOWS | {"use_sliding_window", "max_window_layers"}
DECODER_FIELDS: dict[str, frozenset[str]] = {
    "llama": _DECODER | {"attention_bias", "mlp_bias"},
    "mistral": _DECODER | {"sliding_window"},
    "smollm3": _DECODER
    | _WINDOWS
    | {"attention_bias", "mlp_bias", "use_sliding_window", "no_rope_layers"}
    | {"no_rope_layer_interval"},
    "qwen2": _DECODER | _QWEN,
    "qwen3": _DECODER | _QWEN | {"attention_bias"},
    "gemma2": _DECODER | _GEMMA,
    # Its attention has no cap, though its class has the field; that of its logits works.
    "gemma3_text": (_DECODER | _GEMMA) - {"attn_logit_softcapping"}
    | {"rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern"},
}
_BERT = frozenset(
    "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act "
    "max_position_embeddings type_vocab_size layer_norm_eps hidden_dropout_prob".split()
)
ENCODER_FIELDS: dict[str, frozenset[str]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "modernbert": frozenset(
        "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size "
        "hidden_activation max_position_embeddings norm_eps norm_bias attention_bias mlp_bias "
        "mlp_dropout layer_types rope_parameters local_attention global_attn_every_n_layers "
        "global_rope_theta local_rope_theta classifier_pooling classifier_bias "
        "classifier_activation".split()
    ),
}
# Fields that change nothing of what a loaded model computes: names and notes, initial values that
# the tensors replace, dropout of training in transformers, and what is done with outputs.
HARMLESS = frozenset(
    "model_type architectures transformers_version dtype torch_dtype name_or_path auto_map "
    "initializer_range initializer_cutoff_factor use_cache cache_implementation attention_dropout "
    "attention_probs_dropout_prob embedding_dropout classifier_dropout hidden_dropout resid_pdrop "
    "embd_pdrop pretraining_tp max_window_layers output_attentions output_hidden_states "
    "return_dict use_return_dict torchscript use_bfloat16 chunk_size_feed_forward "
    "gradient_checkpointing id2label label2id num_labels problem_type bos_token_id eos_token_id "
    "pad_token_id cls_token_id sep_token_id mask_token_id unk_token_id tokenizer_class prefix "
    "task_specific_params finetuning_task decoder_bias sparse_prediction "
    "sparse_pred_ignore_index deterministic_flash_attn reference_compile "
    "repad_logits_with_grad attn_implementation is_llama_config language license "
    "model_max_length neftune_noise_alpha".split()
)
# What tools note of themselves, and private fields of transformers.
HARMLESS_PREFIXES = ("_", "unsloth", "transformers", "huggingface")
# Fields that are plain at one value, wherever they are.
PLAIN = {"position_embedding_type": "absolute", "rope_interleaved": False}
# A family's own: read by no code of transformers.
IGNORED = {
    "gemma2": frozenset({"hidden_act"}),
    "gemma3_text": frozenset({"hidden_act"}),
    "modernbert": frozenset({"layer_norm_eps", "tie_word_embeddings"}),
    # The encoder's decoder for masked words is not loaded.
    **dict.fromkeys(("bert", "roberta", "xlm-roberta"), frozenset({"tie_word_embeddings"})),
}
LAYER_TYPES = "full_attention", "sliding_attention"
# The largest values that a config may claim, far above those of models in use: what takes time or
# memory by them is not begun on a typing error, or by a folder that means harm.
LARGEST = {
    "num_hidden_layers": 1_000,
    "num_attention_heads": 4_096,
    "num_key_value_heads": 4_096,
    "head_dim": 16_384,
    "hidden_size": 2**18,
    "intermediate_size": 2**21,
    "vocab_size": 2**24,
    "type_vocab_size": 2**16,
    "max_position_embeddings": 2**31 - 1,
    "sliding_window": 2**31 - 1,
    "local_attention": 2**31 - 1,
    "num_labels": 10_000,
}
QUANTISED = ("quantization_config", "compression_config")
ROPE_FIELDS = {
    "default": {"rope_theta", "partial_rotary_factor"},
    "linear": {"rope_theta", "partial_rotary_factor", "factor"},
    "llama3": {"rope_theta", "partial_rotary_factor", "factor", "low_freq_factor"}
    | {"high_freq_factor", "original_max_position_embeddings"},
}
# Names of the kind of scaling, and of the length that it starts from, which linear has no use for.
ROPE_NOTES = {"rope_type", "type", "original_max_position_embeddings"}


def is_empty(value: Any) -> bool:
    """Returns whether a field's value asks for nothing: None, False, or an empty container."""
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


# What values of types that no config has raise where they are used.
UNFIT = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
    """Names the file in errors about its fields; a value that fits nowhere is one, too.

    Raises:
      ModelError: as raised within, behind the path.
    """
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    except UNFIT as error:
        words = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{path}: a field has a value of another kind than in any model ({words})."
        ) from error


def check_quantised(raw: Mapping) -> None:
    """Checks that the weights beside a config are not quantised.

    Args:
      raw: content of a `config.json`.

    Raises:
      ModelError: they are; the message names the method.
    """
    for name in QUANTISED:
        if not is_empty(given := raw.get(name)):
            method = given.get("quant_method") if isinstance(given, Mapping) else given
            raise ModelError(
                f"{name}: the weights are quantised by {method or 'an unnamed method'}, which is "
                "not supported; use the unquantised model."
            )


def check_fields(raw: Mapping, fields: Mapping[str, Collection[str]]) -> None:
    """Checks that every field of a `config.json` is read, or changes nothing.

    Args:
      raw: content of the file.
      fields: by family (`model_type`), the fields that are read.

    Raises:
      ModelError: an unsupported family, or a field that may change what is computed.
    """
    family = raw.get("model_type", "none given")
    if not isinstance(family, str) or family not in fields:
        raise ModelError(
            f"model_type {_short(family)} is not supported; supported are "
            f"{', '.join(sorted(fields))}."
        )
    known = set(fields[family]) | HARMLESS | IGNORED.get(family, frozenset()) | _of_generation()
    for name, value in raw.items():
        if name in known or name.startswith(HARMLESS_PREFIXES) or is_empty(value):
            continue
        if name in PLAIN and value == PLAIN[name]:
            continue
        raise ModelError(
            f"{name}={_short(value)} is not supported for model_type '{family}': it may change "
            f"what the model computes. Where it does not, take it out of config.json."
        )


def complete(raw: Mapping) -> "PretrainedConfig":
    """Returns the transformers config of a `config.json`, with defaults for missing fields.

    Args:
      raw: content of the file, of a family that transformers has.

    Raises:
      ModelError: fields of a wrong type, or that do not fit together.
    """
    from transformers import AutoConfig

    _check_claims(raw)
    try:
        return AutoConfig.for_model(**raw)
    except Exception as error:  # the library's own classes of errors, TypeError, KeyError, ...
        words = " ".join(str(error).split()).strip("\"' ")
        raise ModelError(f"transformers cannot read it: {words[:300]}") from error


def check_decoder(hf: "PretrainedConfig") -> None:
    """Checks the values of a decoder's fields.

    Args:
      hf: a completed config.

    Raises:
      ModelError: a value that is not supported, or that does not fit the others.
    """
    sizes = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
    check_numbers(hf, [*sizes.split(), "num_key_value_heads", "head_dim"])
    check_numbers(hf, ["max_position_embeddings", "sliding_window"])
    caps = "final_logit_softcapping", "attn_logit_softcapping"
    check_numbers(hf, ["rms_norm_eps", "query_pre_attn_scalar", *caps], whole=False)
    heads, kv_heads = hf.num_attention_heads, hf.num_key_value_heads or hf.num_attention_heads
    if heads % kv_heads:
        raise ModelError(
            f"num_key_value_heads={kv_heads}; expected a divisor of num_attention_heads={heads}."
        )
    if not getattr(hf, "head_dim", None) and hf.hidden_size % heads:
        raise ModelError(f"hidden_size={hf.hidden_size} is no multiple of {heads} heads.")
    for name, allowed in (("layer_types", LAYER_TYPES), ("no_rope_layers", (0, 1))):
        given = getattr(hf, name, None)
        if given is None:
            continue
        if len(given) != hf.num_hidden_layers or any(x not in allowed for x in given):
            raise ModelError(
                f"{name}={_short(given)}; expected one of {', '.join(map(str, allowed))} for each "
                f"of {hf.num_hidden_layers} layers."
            )
    windowed = LAYER_TYPES[1] in (getattr(hf, "layer_types", None) or ())
    if windowed and not getattr(hf, "sliding_window", None):
        raise ModelError("layer_types has layers with a window, but sliding_window is not given.")
    if not isinstance(parameters := hf.rope_parameters, Mapping):
        raise ModelError(f"rope_parameters={_short(parameters)}; expected an object.")
    by_kind = [parameters[kind] for kind in LAYER_TYPES if kind in parameters]
    for each in by_kind or [parameters]:
        check_rope(each)


def check_numbers(hf: "PretrainedConfig", names: Collection[str], whole: bool = True) -> None:
    """Checks that fields are positive numbers, where they are given.

    Args:
      hf: a completed config.
      names: fields; None is no value.
      whole: whether they have to be integers.

    Raises:
      ModelError: one of them is not.
    """
    kinds = (int,) if whole else (int, float)
    for name in names:
        value = getattr(hf, name, None)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
            kind = "a positive integer" if whole else "a positive number"
            raise ModelError(f"{name}={_short(value)}; expected {kind}.")
        if value > (most := LARGEST.get(name, math.inf)):
            raise ModelError(f"{name}={_short(value)}; expected at most {most:,}.")


def _check_claims(raw: Mapping) -> None:
    """Checks the sizes of a raw config by which transformers makes lists, before it does.

    Raises:
      ModelError: a size of another type, or larger than in any model.
    """
    for name, most in LARGEST.items():
        if isinstance(value := raw.get(name), bool) or (
            value is not None and not (isinstance(value, int) and value <= most)
        ):
            raise ModelError(f"{name}={_short(value)}; expected an integer of at most {most:,}.")


def check_rope(parameters: Any) -> None:
    """Checks the fields of one kind of rotary positions, as transformers completes them.

    Args:
      parameters: `rope_parameters`, or one of its entries by kind of layer.

    Raises:
      ModelError: a scaling, a field or a value that is not supported.
    """
    if not isinstance(parameters, Mapping):
        raise ModelError(f"rope_parameters={_short(parameters)}; expected an object.")
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_FIELDS:
        raise ModelError(
            f"rope scaling '{kind}' is not supported; expected default, linear or llama3."
        )
    for name, value in parameters.items():
        if name in ROPE_NOTES - ROPE_FIELDS[kind] or is_empty(value):
            continue
        if name not in ROPE_FIELDS[kind]:
            raise ModelError(f"rope scaling '{kind}' with {name}={_short(value)} is not supported.")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
            raise ModelError(
                f"rope_parameters: {name}={_short(value)}; expected a positive number."
            )
    if parameters.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ModelError(
            f"partial_rotary_factor={parameters['partial_rotary_factor']} is not supported; "
            "expected 1: all dimensions are rotated."
        )


def _of_generation() -> frozenset[str]:
    """Returns fields that tell how to sample; old configs have them, and no model reads them."""
    from transformers import GenerationConfig

    return frozenset(GenerationConfig().to_dict())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
