"""Adapters against peft, and against merging by hand."""

import jax
import numpy as np
import pytest
from conftest import tiny_config

from fedsafe_jax import language_model
from fedsafe_jax.models import lora
from fedsafe_jax.models.decoder import Decoder


def random_adapter(config, lora_config):
    adapter = lora.init(jax.random.key(0), config, lora_config)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32), adapter)


def test_fresh_adapter_changes_nothing_and_merge_equals_applying(packaged):
    lora_config = lora.LoraConfig(4, 8.0, lora.expand_targets("all-linear"))
    config = packaged.config
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 20))
    positions, ones = np.arange(20)[None], np.ones((1, 20), np.int32)

    def logits(params, adapter):
        model = Decoder(config, lora_config.scale)
        variables = {"params": params} | ({"lora": adapter} if adapter else {})
        return model.apply(variables, tokens, positions, ones, method="logits")

    fresh = lora.init(jax.random.key(0), config, lora_config)
    np.testing.assert_array_equal(logits(packaged.params, fresh), logits(packaged.params, None))
    adapter = random_adapter(config, lora_config)
    merged = lora.merge(packaged.params, adapter, lora_config.scale)
    applied = logits(packaged.params, adapter)
    assert np.abs(applied - logits(packaged.params, None)).max() > 0.1
    # Merging rounds a*b into the kernel once; logits here are of size 10.
    np.testing.assert_allclose(logits(merged, None), applied, atol=1e-3)


def test_export_agrees_with_transformers_and_peft(tmp_path, packaged):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fedsafe_jax import export

    lora_config = lora.LoraConfig(4, 8.0, ("q_proj", "v_proj"))
    adapter = random_adapter(packaged.config, lora_config)
    export.export(packaged, adapter, lora_config, tmp_path, "card")
    language_model.save_pretrained(packaged, tmp_path / "base")

    lm = language_model.load_pretrained(str(tmp_path / "base"))
    lm.adapter, read = lora.load_adapter(tmp_path / "adapter")
    lm.lora_scale = read.scale
    assert read == lora_config
    tokens = np.array([lm.tokenizer("How do I bake bread?")["input_ids"]])
    ours = np.asarray(lm(tokens))

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        theirs = merged(torch.tensor(tokens)).logits.numpy()
    # The bound for float32; measured differences are below 1e-4.
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        theirs = adapted(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    messages = [{"role": "user", "content": "Hello!"}]
    assert tokenizer.apply_chat_template(
        messages, tokenize=False
    ) == packaged.tokenizer.apply_chat_template(messages, tokenize=False)


def test_unknown_targets_and_adapters_are_named(tmp_path):
    with pytest.raises(ValueError, match="qproj"):
        lora.expand_targets(("qproj",))
    with pytest.raises(Exception, match="adapter_config.json"):
        lora.load_adapter(tmp_path)
    assert tiny_config().projection_shape("k_proj") == (32, 16)
