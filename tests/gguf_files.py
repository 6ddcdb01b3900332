"""Tiny GGUF files of every family, written by the rules of llama.cpp's conversion, not by ours."""

import gguf
import numpy as np
from families import COMMON, FAMILIES, VOCAB

from fedsafe_jax.models import hub
from fedsafe_jax.models.decoder_config import from_hf

ARCHITECTURES = {
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}  # fmt: skip
# What llama.cpp calls the parts of a layer; a norm before the MLP has one name in all families.
PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
GEMMA_PARTS = PARTS | {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?ĠĊ"
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}Ċ{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistantĊ{% endif %}"
)


def config_of(family, **changes):
    """The transformers config of a family of `families`, whose queries are scaled by head_dim."""
    from transformers import AutoConfig

    model_type, fields = FAMILIES[family]
    fields = COMMON | fields | changes
    if model_type.startswith("gemma"):
        fields |= {"query_pre_attn_scalar": fields["head_dim"], "tie_word_embeddings": True}
    if model_type == "gemma3_text":
        fields["layer_types"] = ["sliding_attention"] * fields["num_hidden_layers"]
    return AutoConfig.for_model(model_type, **fields)


def tensors_of(hf, seed=0):
    """Random float32 tensors by the names of a Hugging Face folder."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=leaf.tensor_shape).astype(np.float32)
        for leaf in hub.leaves(from_hf(hf))
        for name in leaf.names
    }


def vocabulary():
    """Tokens, types and merges of a byte-level vocabulary of the families' size."""
    tokens = ["<|pad|>", "<|start|>", "<|end|>", *LETTERS, "ab", "Ġa", "Ġab", "ĊĊ", "12", "ĠĠ"]
    types = [3, 3, 3] + [1] * (len(tokens) - 3)
    # Qwen's class of transformers adds its own end of text where there is none.
    tokens, types = [*tokens, "<think>", "<|endoftext|>"], [*types, 4, 3]
    left = range(len(tokens), VOCAB)
    return (
        [*tokens, *(f"[PAD{i}]" for i in left)],
        types + [5] * len(left),
        ["a b", "Ġ a", "Ġ ab", "Ċ Ċ", "1 2", "Ġ Ġ"],
    )


def add_tokenizer(writer, pre="smollm"):
    tokens, types, merges = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)


def add_config(writer, hf, arch):
    writer.add_block_count(hf.num_hidden_layers)
    writer.add_context_length(hf.max_position_embeddings)
    writer.add_embedding_length(hf.hidden_size)
    writer.add_feed_forward_length(hf.intermediate_size)
    writer.add_head_count(hf.num_attention_heads)
    writer.add_head_count_kv(hf.num_key_value_heads)
    writer.add_layer_norm_rms_eps(hf.rms_norm_eps)
    rope = hf.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if (head_dim := getattr(hf, "head_dim", None)) and arch != "qwen2":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_dimension_count(head_dim)
    if arch.startswith("gemma"):
        writer.add_sliding_window(hf.sliding_window)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(hf.attn_logit_softcapping)
        writer.add_final_logit_softcapping(hf.final_logit_softcapping)


def name_of(name, parts):
    """The name of a tensor in a GGUF file."""
    stem, _, last = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{last}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{parts[part]}.{last}"


def converted(name, array, hf, arch):
    """A tensor as llama.cpp has it: q and k of a Llama interleaved, Gemma's norms with their 1."""
    if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
        heads = hf.num_attention_heads if ".q_proj." in name else hf.num_key_value_heads
        size = array.shape[0] // heads
        order = [
            h * size + (j % 2) * (size // 2) + j // 2 for h in range(heads) for j in range(size)
        ]
        return array[order]
    if arch.startswith("gemma") and name.endswith("norm.weight"):
        return array + 1
    return array


def write(path, hf, tensors, kinds=None, tokenizer=add_tokenizer, fields=(), rope_factors=None):
    """Writes a file.

    Args:
      path: the file.
      hf: a config of `config_of`.
      tensors: of `tensors_of`.
      kinds: types of tensors by a part of their name, such as {"down_proj": "Q8_0"}; else F32.
        Bytes in place of an array are blocks that are written as they are.
      tokenizer: writes the tokenizer's fields.
      fields: (name of a method of the writer, argument) of further fields.
      rope_factors: content of `rope_freqs.weight`.
    """
    arch = ARCHITECTURES[hf.model_type]
    writer = gguf.GGUFWriter(path, arch)
    add_config(writer, hf, arch)
    tokenizer(writer)
    for method, value in fields:
        getattr(writer, method)(value)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(rope_factors, np.float32))
    parts = GEMMA_PARTS if arch.startswith("gemma") else PARTS
    for name, array in tensors.items():
        own = name_of(name, parts)
        kind = next((k for part, k in (kinds or {}).items() if part in name), "F32")
        quantised = gguf.GGMLQuantizationType[kind]
        if array.dtype == np.uint8:
            writer.add_tensor(own, array, raw_dtype=quantised)
            continue
        array = converted(name, array, hf, arch)
        if kind != "F32":
            array = gguf.quants.quantize(array, quantised)
        writer.add_tensor(own, np.ascontiguousarray(array), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
