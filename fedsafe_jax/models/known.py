"""Shapes of public models by their Hub id, for plans and compilations without their folders.

The numbers are those of each model's public `config.json`.
"""

import dataclasses

from fedsafe_jax.models.decoder_config import DecoderConfig

_LLAMA_3_1_8B = DecoderConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=500000.0,
    rope_scaling=(8.0, 1.0, 4.0, 8192.0),
    tie_embeddings=False,
    max_length=131072,
)
_LLAMA_3_2_1B = dataclasses.replace(
    _LLAMA_3_1_8B,
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=16,
    head_dim=64,
    rope_scaling=(32.0, 1.0, 4.0, 8192.0),
    tie_embeddings=True,
)


def _smollm2(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, theta: float
) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=49152,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=64,
        rope_theta=theta,
        max_length=8192,
    )


_SMOLLM2 = {
    "135M": _smollm2(576, 1536, layers=30, heads=9, kv_heads=3, theta=100000.0),
    "360M": _smollm2(960, 2560, layers=32, heads=15, kv_heads=5, theta=100000.0),
    "1.7B": _smollm2(2048, 8192, layers=24, heads=32, kv_heads=32, theta=130000.0),
}
KNOWN: dict[str, DecoderConfig] = {
    "meta-llama/Llama-3.1-8B": _LLAMA_3_1_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_3_1_8B,
    "meta-llama/Llama-Guard-3-8B": _LLAMA_3_1_8B,
    "meta-llama/Llama-3.2-1B": _LLAMA_3_2_1B,
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA_3_2_1B,
    "meta-llama/Llama-Guard-3-1B": _LLAMA_3_2_1B,
    **{f"HuggingFaceTB/SmolLM2-{size}": shape for size, shape in _SMOLLM2.items()},
    **{f"HuggingFaceTB/SmolLM2-{size}-Instruct": shape for size, shape in _SMOLLM2.items()},
}
