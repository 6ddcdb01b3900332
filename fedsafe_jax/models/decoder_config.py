"""Shape of a decoder, and how each model family differs from Llama.

A family is a row of differences, not a module of its own: `from_hf` reads a transformers config
into the one `DecoderConfig` that `decoder.py` and `decoder_layer.py` switch on.
"""

import dataclasses
import math
from typing import TYPE_CHECKING

from jax.sharding import Mesh

from fedsafe_jax.models.sharding import MODEL, platform_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PROJECTIONS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


class ModelError(ValueError):
    """Model folder that cannot be used; the message says what it has and what is supported."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder; hashable, so that it can be a static argument of `jax.jit`.

    Attributes:
      vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim:
        sizes, as in transformers.
      rope_theta: base of the rotary frequencies.
      rope_scaling: None, or Llama 3.1's `(factor, low_freq_factor, high_freq_factor,
        original_length)`.
      rope_factor: divisor of positions (linear scaling; Gemma 3).
      rope_local_theta: unscaled base in layers with a window; None for `rope_theta` (Gemma 3).
      unrotated_layers: indices of layers without rotary positions (SmolLM3).
      window: number of tokens that a windowed layer sees, the query included; 0 for no window.
      windowed_layers: indices of layers with the window.
      qkv_bias, output_bias, mlp_bias: whether the projections have biases.
      qk_norm: whether each head of queries and keys has an RMS norm (Qwen3, Gemma 3).
      sandwich_norms: whether attention and MLP have a norm after them too, before the residual
        (Gemma).
      norm_offset: added to the learned scale of every norm (1 for Gemma).
      activation: `silu`, or `gelu_tanh`.
      query_scale: factor of query-key products; None for `head_dim ** -0.5`.
      embedding_scale: factor of input embeddings (Gemma: square root of `hidden_size`).
      attention_softcap, final_softcap: `cap * tanh(x / cap)` on attention and final logits
        (Gemma 2, arXiv 2408.00118); None for no cap.
      rms_norm_eps: added to the mean square.
      tie_embeddings: whether the output matrix is the embedding's transpose.
      max_length: longest context, in tokens.
      dtype: dtype of activations.
      remat: whether layers are recomputed in the backward pass.
      attention: attention backend; `auto` for the platform's, see `attention.choose_backend`.
      mesh: devices that compute; None for the first device of this process.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: tuple | None = None
    rope_factor: float = 1.0
    rope_local_theta: float | None = None
    unrotated_layers: tuple[int, ...] = ()
    window: int = 0
    windowed_layers: tuple[int, ...] = ()
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False
    norm_offset: float = 0.0
    activation: str = "silu"
    query_scale: float | None = None
    embedding_scale: float = 1.0
    attention_softcap: float | None = None
    final_softcap: float | None = None
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = True
    max_length: int = 2048
    dtype: str = "float32"
    remat: bool = False
    attention: str = "auto"
    mesh: Mesh | None = None

    @property
    def platform(self) -> str:
        """Platform of the devices that compute, see `sharding.platform_of`."""
        return platform_of(self.mesh)

    @property
    def model_parallel(self) -> int:
        """Number of devices that share one copy of the base."""
        return 1 if self.mesh is None else self.mesh.shape.get(MODEL, 1)

    @property
    def attention_scale(self) -> float:
        """Factor of query-key products."""
        return self.query_scale or self.head_dim**-0.5

    def projection_shape(self, name: str) -> tuple[int, int]:
        """Returns `(in, out)` of one linear projection, by its Hugging Face name."""
        hidden, heads = self.hidden_size, self.num_heads * self.head_dim
        kv, wide = self.num_kv_heads * self.head_dim, self.intermediate_size
        shapes = {
            "q_proj": (hidden, heads),
            "k_proj": (hidden, kv),
            "v_proj": (hidden, kv),
            "o_proj": (heads, hidden),
            "gate_proj": (hidden, wide),
            "up_proj": (hidden, wide),
            "down_proj": (wide, hidden),
        }
        return shapes[name]


_GEMMA = {"sandwich_norms": True, "norm_offset": 1.0}

# Fields by which a family differs from Llama and which its transformers config does not state.
FAMILIES = {
    "llama": {},
    "mistral": {},
    "smollm3": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA | {"qk_norm": True},
}
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
LLAMA3_SCALING = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def from_hf(hf: "PretrainedConfig", dtype: str = "float32") -> DecoderConfig:
    """Reads a transformers config.

    Args:
      hf: config as transformers completes it, with all defaults and one spelling of rope.
      dtype: dtype of activations.

    Raises:
      ModelError: the family, its activation or its rope scaling is not supported.
    """
    family = hf.model_type
    if family not in FAMILIES:
        raise ModelError(
            f"model_type '{family}' is not supported; supported are {', '.join(sorted(FAMILIES))}."
        )
    row = dict(FAMILIES[family])
    get = lambda name, default=None: getattr(hf, name, default)  # noqa: E731

    activation = get("hidden_activation") or get("hidden_act")
    if activation not in ACTIVATIONS:
        raise ModelError(
            f"activation '{activation}' is not supported; expected {', '.join(ACTIVATIONS)}."
        )
    if get("use_bidirectional_attention"):
        raise ModelError("use_bidirectional_attention: the decoder is causal only.")
    if get("attention_bias"):
        row |= {"qkv_bias": True, "output_bias": True}
    head_dim = get("head_dim") or hf.hidden_size // hf.num_attention_heads
    if get("query_pre_attn_scalar"):
        row["query_scale"] = float(hf.query_pre_attn_scalar) ** -0.5
    if family.startswith("gemma"):
        row["embedding_scale"] = math.sqrt(hf.hidden_size)

    layers = range(hf.num_hidden_layers)
    kinds = get("layer_types")
    if kinds is None:  # One window for all layers, as in Mistral.
        kinds = ["sliding_attention" if get("sliding_window") else "full_attention"] * len(layers)
    windowed = tuple(i for i in layers if kinds[i] == "sliding_attention")
    rotated = get("no_rope_layers")  # Contrary to its name, 1 where a layer has rope.

    return DecoderConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads or hf.num_attention_heads,
        head_dim=head_dim,
        unrotated_layers=tuple(i for i in layers if rotated and not rotated[i]),
        window=hf.sliding_window if windowed else 0,
        windowed_layers=windowed,
        mlp_bias=bool(get("mlp_bias")),
        activation=ACTIVATIONS[activation],
        attention_softcap=get("attn_logit_softcapping"),
        final_softcap=get("final_logit_softcapping"),
        rms_norm_eps=hf.rms_norm_eps,
        tie_embeddings=bool(hf.tie_word_embeddings),
        max_length=hf.max_position_embeddings,
        dtype=dtype,
        **_rope(hf.rope_parameters),
        **row,
    )


def _rope(parameters: dict) -> dict:
    """Reads the fields of rotary positions; windowed layers may have a base of their own."""
    fields = {}
    if "full_attention" in parameters:
        local = parameters["sliding_attention"]
        if local.get("rope_type", "default") != "default":
            raise ModelError("rope scaling in layers with a window is not supported.")
        fields["rope_local_theta"] = float(local["rope_theta"])
        parameters = parameters["full_attention"]
    fields["rope_theta"] = float(parameters["rope_theta"])
    kind = parameters.get("rope_type", "default")  # of those that `config_fields` lets pass
    if kind == "llama3":
        fields["rope_scaling"] = tuple(float(parameters[name]) for name in LLAMA3_SCALING)
    elif kind == "linear":
        fields["rope_factor"] = float(parameters["factor"])
    return fields
