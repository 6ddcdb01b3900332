"""The `config.json` that the fields of a GGUF file describe.

As with a foreign `config.json`, what is neither read nor known to change nothing is refused by
name. Values that llama.cpp has in its code, and no field for, are those of that code.
"""

import numpy as np

from fedsafe_jax.models.decoder_config import ModelError
from fedsafe_jax.models.gguf_reader import GgufFile

# model_type of transformers by the architecture that a file names.
FAMILIES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
# Fields of a file, behind its architecture's name, that are computed with.
READ = frozenset(
    "block_count context_length embedding_length feed_forward_length attention.head_count "
    "attention.head_count_kv attention.key_length attention.value_length rope.freq_base "
    "rope.dimension_count rope.scaling.type rope.scaling.factor rope.scale_linear "
    "attention.layer_norm_rms_epsilon expert_count vocab_size".split()
)
HARMLESS = frozenset(
    "expert_used_count tensor_data_layout rope.scaling.original_context_length "
    "rope.scaling.finetuned".split()
)
_GEMMA = frozenset({"attention.sliding_window", "final_logit_softcapping"})
OF_FAMILY = {
    "gemma2": _GEMMA | {"attn_logit_softcapping"},
    "gemma3": _GEMMA | {"rope.freq_base_swa", "attention.sliding_window_pattern"},
}
ROPE_FACTORS = "rope_freqs.weight"  # divisors of rotary frequencies, where Llama 3.1 scales them
# Llama 3.1's and 3.2's scaling but for its factor, which a file tells by these divisors alone.
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Layers of the largest Gemma 2 and Gemma 3, whose queries are scaled by hidden_size / heads, and
# the others' by head_dim (llama.cpp, src/models/gemma2.cpp and gemma3.cpp).
LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
GEMMA3_PATTERN, GEMMA3_LOCAL_THETA = 6, 10_000.0
END_TOKENS = ("eos", "eot", "eom")


def architecture(file: GgufFile) -> str:
    """Returns the architecture of a file.

    Raises:
      ModelError: none, or one that is not supported.
    """
    name = file.text("general.architecture")
    if name not in FAMILIES:
        raise ModelError(
            f"{file.path}: architecture '{name[:60]}' is not supported; supported are "
            f"{', '.join(FAMILIES)}."
        )
    return name


def config_of(file: GgufFile) -> dict:
    """Returns the content of a `config.json` for a file.

    Args:
      file: an opened file.

    Raises:
      ModelError: a family, a field or a value that is not supported.
    """
    arch = architecture(file)
    _check_fields(file, arch)
    get = lambda name, default=None: file.number(f"{arch}.{name}", default)  # noqa: E731
    if "token_embd.weight" not in file.tensors:
        raise ModelError(f"{file.path}: tensor 'token_embd.weight' is missing.")
    hidden, heads = get("embedding_length"), get("attention.head_count")
    if not isinstance(heads, int) or heads < 1:
        raise ModelError(f"{file.path}: {arch}.attention.head_count={heads!r}; expected 1 or more.")
    rotated = get("rope.dimension_count", hidden // heads)
    head_dim = get("attention.key_length", rotated)
    for name, value in (
        ("attention.value_length", get("attention.value_length", head_dim)),
        ("rope.dimension_count", get("rope.dimension_count", head_dim)),
    ):
        if value != head_dim:
            raise ModelError(
                f"{file.path}: {arch}.{name}={value} beside heads of {head_dim} is not supported."
            )
    if get("expert_count", 0):
        raise ModelError(
            f"{file.path}: {arch}.expert_count={get('expert_count')}: mixtures of experts are not "
            "supported."
        )
    config = {
        "model_type": FAMILIES[arch],
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": float(get("rope.freq_base", 10_000.0)),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    if scaling := _rope_scaling(file, arch, head_dim, config["rope_theta"]):
        config["rope_scaling"] = scaling
    if arch == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    if arch == "qwen2":
        if head_dim * heads != hidden:
            raise ModelError(f"{file.path}: qwen2 with heads of {head_dim} is not supported.")
        del config["head_dim"]
    if arch.startswith("gemma"):
        config |= _gemma(file, arch, config)
    return config | token_ids(file)


def token_ids(file: GgufFile) -> dict:
    """Returns the ids of special tokens as `config.json` and `generation_config.json` name them.

    Several tokens may end an answer: the end of the text, of a turn, of a message.
    """
    named = {
        name: file.number(f"tokenizer.ggml.{name}_token_id")
        for name in (*END_TOKENS, "bos", "padding")
        if f"tokenizer.ggml.{name}_token_id" in file.fields
    }
    ends = list(dict.fromkeys(named[name] for name in END_TOKENS if name in named))
    ids = {"bos_token_id": named.get("bos"), "pad_token_id": named.get("padding")}
    if ends:
        ids["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return {name: value for name, value in ids.items() if value is not None}


def _check_fields(file: GgufFile, arch: str) -> None:
    known = READ | HARMLESS | OF_FAMILY.get(arch, frozenset())
    for name, value in file.fields.items():
        prefix, _, field = name.partition(".")
        if prefix == arch and field not in known:
            raise ModelError(
                f"{file.path}: {name}={value!r:.60} is not supported: it may change what the model "
                "computes."
            )


def _rope_scaling(file: GgufFile, arch: str, head_dim: int, theta: float) -> dict | None:
    """Returns `rope_scaling`, None for none."""
    kind = file.text(f"{arch}.rope.scaling.type", "none")
    linear = file.number(f"{arch}.rope.scale_linear", 1.0)  # of old files
    if kind == "linear":
        linear = file.number(f"{arch}.rope.scaling.factor")
    elif kind != "none":
        raise ModelError(
            f"{file.path}: {arch}.rope.scaling.type='{kind[:60]}' is not supported; expected none "
            "or linear."
        )
    if ROPE_FACTORS not in file.tensors:
        return {"rope_type": "linear", "factor": float(linear)} if linear != 1 else None
    given = np.asarray(file.read(ROPE_FACTORS), np.float32)
    scaling = LLAMA3 | {"factor": float(given.max(initial=1.0))}
    expected = llama3_divisors(scaling, head_dim, theta)
    if linear != 1 or given.shape != expected.shape or not np.allclose(given, expected, rtol=1e-3):
        raise ModelError(
            f"{file.path}: tensor '{ROPE_FACTORS}' has other rotary factors than Llama 3.1's, "
            "which is not supported."
        )
    return scaling


def llama3_divisors(scaling: dict, head_dim: int, theta: float) -> np.ndarray:
    """Returns the divisors of rotary frequencies, float32 `[head_dim / 2]`, of llama3 scaling.

    Args:
      scaling: `rope_parameters` of type llama3.
      head_dim: size of a head.
      theta: base of the frequencies.
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    waves = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (scaling["original_max_position_embeddings"] / waves - low) / (high - low)
    smooth = np.clip(smooth, 0.0, 1.0)
    return (1 / ((1 - smooth) / scaling["factor"] + smooth)).astype(np.float32)


def _gemma(file: GgufFile, arch: str, config: dict) -> dict:
    """Returns the fields of Gemma 2 and 3 beside those of all families."""
    get = lambda name, default=None: file.number(f"{arch}.{name}", default)  # noqa: E731
    heads, head_dim = config["num_attention_heads"], config["head_dim"]
    large = config["num_hidden_layers"] == LAYERS_OF_27B[arch]
    fields = {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": get("attention.sliding_window"),
        "query_pre_attn_scalar": config["hidden_size"] // heads if large else head_dim,
        "final_logit_softcapping": get("final_logit_softcapping", 0.0) or None,
    }
    if arch == "gemma2":
        # Files without the caps were made before llama.cpp had them: the model always has.
        fields["final_logit_softcapping"] = get("final_logit_softcapping", 30.0) or None
        fields["attn_logit_softcapping"] = get("attn_logit_softcapping", 50.0) or None
        return fields
    if get("attention.sliding_window_pattern", GEMMA3_PATTERN) != GEMMA3_PATTERN:
        raise ModelError(
            f"{file.path}: {arch}.attention.sliding_window_pattern="
            f"{get('attention.sliding_window_pattern')}; expected {GEMMA3_PATTERN}."
        )
    kinds = [
        "full_attention" if (i + 1) % GEMMA3_PATTERN == 0 else "sliding_attention"
        for i in range(min(config["num_hidden_layers"], 1_000))
    ]
    local = float(get("rope.freq_base_swa", GEMMA3_LOCAL_THETA))
    theta = float(get("rope.freq_base", 1_000_000.0))
    return fields | {"rope_theta": theta, "rope_local_base_freq": local, "layer_types": kinds}
