"""Tiny random checkpoints of every decoder family, made by transformers."""

VOCAB = 97
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8}

# name: (model_type, what differs from COMMON)
FAMILIES = {
    "llama2": ("llama", {"num_key_value_heads": 4}),
    "llama3.1": ("llama", {"rope_parameters": LLAMA3}),
    "llama3.2": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 16}),
    "smollm2": ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 0], "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen2.5": ("qwen2", {"use_sliding_window": False, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma3": (
        "gemma3_text",
        GEMMA | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    ),
}


def checkpoint(family: str, folder, seed: int = 0, **others):
    """Saves a random checkpoint and returns its torch model, in float32; `others` of its config.

    Every parameter is random, norms and biases too: at their initial ones and zeros a loader that
    forgets them would pass.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, changes = FAMILIES[family]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **(COMMON | changes | others))
    # Eager attention: the one that applies soft caps in Gemma 2.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15)
            if parameter.ndim == 1:
                parameter.add_(0.0 if model_type.startswith("gemma") else 0.8)
    model.save_pretrained(folder)
    return model
