"""Adapters against peft, and against merging by hand."""

import json

import jax
import numpy as np
import pytest
from families import VOCAB, checkpoint
from tiny import tiny_config

from fedsafe_jax.inference import pretrained
from fedsafe_jax.models import hub, lora
from fedsafe_jax.models.decoder import Decoder


def random_factors(config, lora_config):
    factors = lora.init(jax.random.key(0), config, lora_config)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32), factors)


def test_fresh_adapter_changes_nothing_and_merging_equals_applying(tmp_path, packaged):
    tokens = np.random.default_rng(0).integers(0, packaged.config.vocab_size, (1, 20))
    plain = np.asarray(packaged(tokens))
    for stabilized in (False, True):
        config = lora.LoraConfig(
            4, 8.0, lora.expand_targets("all-linear"), rank_stabilized=stabilized
        )
        assert config.scale == (4.0 if stabilized else 2.0)
        fresh = lora.Adapter(lora.init(jax.random.key(0), packaged.config, config), config)
        np.testing.assert_array_equal(packaged.with_adapter(fresh)(tokens), plain)
        adapter = lora.Adapter(random_factors(packaged.config, config), config)
        adapted = packaged.with_adapter(adapter)
        applied = adapted(tokens)
        assert np.abs(applied - plain).max() > 0.1
        folder = tmp_path / str(stabilized)
        pretrained.save_pretrained(adapted, folder)
        merged = pretrained.load_pretrained(str(folder))
        # Merging rounds a*b into the kernel once; logits here are of size 10.
        np.testing.assert_allclose(merged(tokens), applied, atol=1e-3)


def test_export_agrees_with_transformers_and_peft(tmp_path, packaged):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fedsafe_jax.pipeline import export

    lora_config = lora.LoraConfig(4, 8.0, ("q_proj", "v_proj"))
    factors = random_factors(packaged.config, lora_config)
    adapter = lora.Adapter(factors, lora_config, packaged.name)
    export.export(packaged, adapter, tmp_path, "card")
    pretrained.save_pretrained(packaged, tmp_path / "base")

    read = lora.load_adapter(tmp_path / "adapter")
    lm = pretrained.load_pretrained(str(tmp_path / "base")).with_adapter(read)
    # A path that peft can load, where "package:model" is a name of this package alone.
    assert read.config == lora_config
    assert read.base_model == str(pretrained.model_folder("package:model"))
    tokens = np.array([lm.tokenizer("How do I bake bread?")["input_ids"]])
    ours = np.asarray(lm(tokens))

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        theirs = merged(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        theirs = adapted(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    messages = [{"role": "user", "content": "Hello!"}]
    assert tokenizer.apply_chat_template(
        messages, tokenize=False
    ) == packaged.tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("family", ["llama3.1", "qwen2.5", "gemma3"])
@pytest.mark.parametrize("stabilized", [False, True])
def test_adapters_made_by_peft_load(tmp_path, family, stabilized):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    base = checkpoint(family, tmp_path / "base")
    targets = ["q_proj", "o_proj", "down_proj"]
    torch.manual_seed(1)
    theirs = peft.get_peft_model(
        base,
        peft.LoraConfig(
            r=3,
            lora_alpha=5,
            target_modules=targets,
            use_rslora=stabilized,
            init_lora_weights=False,  # b random too
        ),
    ).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    adapter = lora.load_adapter(tmp_path / "adapter")
    assert set(adapter.config.targets) == set(targets)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 20))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    config = hub.read_config(tmp_path / "base")
    lora.check_base(adapter, config)
    params = hub.load_params(tmp_path / "base", config, "float32")
    positions = np.broadcast_to(np.arange(20), tokens.shape)
    logits = Decoder(config, adapter.config.scale).apply(
        {"params": params, "lora": adapter.factors},
        tokens,
        positions,
        np.ones_like(tokens),
        method="logits",
    )
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_adapters_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(ValueError, match="qproj"):
        lora.expand_targets(("qproj",))
    with pytest.raises(lora.ModelError, match="adapter_config.json: no such file"):
        lora.load_adapter(tmp_path)
    config = lora.LoraConfig(4, 8.0, ("q_proj",))
    adapter = lora.Adapter(lora.init(jax.random.key(0), tiny_config(), config), config, "a/base")
    lora.save_adapter(adapter, tmp_path)
    lora.check_base(lora.load_adapter(tmp_path), tiny_config())
    with pytest.raises(lora.ModelError, match=r"another base \(a/base\).*q_proj"):
        lora.check_base(adapter, tiny_config(hidden_size=64))
    with pytest.raises(lora.ModelError, match=r"another base.*\(2, 32, 4\).*needs \(3, 32, 4\)"):
        lora.check_base(adapter, tiny_config(num_layers=3))
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    for field, value in (("use_dora", True), ("peft_type", "IA3"), ("rank_pattern", {"q": 2})):
        hub.write_json(tmp_path / "adapter_config.json", raw | {field: value})
        with pytest.raises(lora.ModelError, match=f"{field}=.* is not supported"):
            lora.load_adapter(tmp_path)
    hub.write_json(tmp_path / "adapter_config.json", raw)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(lora.ModelError, match="damaged or cut off"):
        lora.load_adapter(tmp_path)
    weights.unlink()
    with pytest.raises(lora.ModelError, match="pickled adapters"):
        lora.load_adapter(tmp_path)
