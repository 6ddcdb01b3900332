"""A tiny decoder."""

from fedsafe_jax.models.decoder import DecoderConfig


def tiny_config(**changes) -> DecoderConfig:
    """Two layers, grouped-query attention, an odd intermediate size."""
    fields = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 72,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "max_length": 64,
    }
    return DecoderConfig(**(fields | changes))
