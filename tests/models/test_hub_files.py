"""Files beside the weights: copied where nothing changed, else readable by transformers 4 and 5."""

import json
import os
import stat

import numpy as np
import pytest
from transformers import AutoTokenizer

from fedsafe_jax.data import chat
from fedsafe_jax.inference.pretrained import load_pretrained, save_pretrained
from fedsafe_jax.models import base_model, hub_files, tensor_files
from fedsafe_jax.models.base_model import model_folder
from fedsafe_jax.models.decoder_config import ModelError

PACKAGED = model_folder("package:model")
TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
TURNS = [{"role": "user", "content": "Hello!"}]
NAMES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def config_of(folder):
    """What `tokenizer_config.json` holds."""
    return json.loads((folder / "tokenizer_config.json").read_text())


def test_an_unchanged_tokenizer_is_copied_to_the_byte(tmp_path):
    source = tmp_path / "base"
    source.mkdir()
    for name in NAMES:
        (source / name).write_bytes((PACKAGED / name).read_bytes())
    # No class of transformers: what is copied is not read.
    (source / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=4)  # leaves a state
    folder = tmp_path / "export"
    folder.mkdir()
    hub_files.save_tokenizer(tokenizer, folder)
    assert sorted(p.name for p in folder.iterdir()) == sorted([*NAMES, "merges.txt"])
    for path in folder.iterdir():
        assert path.read_bytes() == (source / path.name).read_bytes()


def test_a_given_template_is_the_only_change(tmp_path):
    lm = load_pretrained("package:model", chat_template=TEMPLATE)
    hub_files.save_tokenizer(lm.tokenizer, tmp_path)
    tokens = (tmp_path / "tokenizer.json").read_bytes()
    assert tokens == (PACKAGED / "tokenizer.json").read_bytes()
    assert (tmp_path / "chat_template.jinja").read_text() == TEMPLATE
    assert config_of(tmp_path) == config_of(PACKAGED) | {"chat_template": TEMPLATE}
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read.apply_chat_template(TURNS, tokenize=False) == "<Hello!>"


def test_a_changed_tokenizer_is_written_in_a_class_of_both(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(PACKAGED)
    tokenizer.add_tokens(["<|tool|>"])
    hub_files.save_tokenizer(tokenizer, tmp_path)
    content = config_of(tmp_path)
    assert content["tokenizer_class"] == "PreTrainedTokenizerFast"
    # transformers 4 refuses a list under the new name, and token types in `generate`.
    assert "extra_special_tokens" not in content
    assert content["additional_special_tokens"] == ["<|system|>", "<|user|>", "<|assistant|>"]
    assert content["model_input_names"] == ["input_ids", "attention_mask"]
    assert AutoTokenizer.from_pretrained(tmp_path)("<|tool|>")["input_ids"] == [4096]


def test_a_copied_file_of_transformers_5_alone_is_mended(tmp_path):
    source, folder = tmp_path / "base", tmp_path / "export"
    folder.mkdir()
    AutoTokenizer.from_pretrained(PACKAGED).save_pretrained(source)
    assert config_of(source)["tokenizer_class"] == "TokenizersBackend"
    hub_files.save_tokenizer(AutoTokenizer.from_pretrained(source), folder)
    assert config_of(folder)["tokenizer_class"] == "PreTrainedTokenizerFast"
    tokens = (folder / "tokenizer.json").read_bytes()
    assert tokens == (source / "tokenizer.json").read_bytes()


def test_the_packaged_model_is_one_for_both():
    assert config_of(PACKAGED)["tokenizer_class"] == "PreTrainedTokenizerFast"
    raw = json.loads((PACKAGED / "config.json").read_text())
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"]
    assert raw["torch_dtype"] == raw["dtype"] == "bfloat16"


def test_rope_in_both_spellings():
    llama3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    config = hub_files.config_for_all({"rope_parameters": llama3, "torch_dtype": "x"}, "bfloat16")
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    assert config["rope_parameters"] == llama3 and config["torch_dtype"] == "bfloat16"
    local = {"rope_type": "default", "rope_theta": 1e4}
    both = {"sliding_attention": local, "full_attention": local | {"rope_theta": 1e6}}
    config = hub_files.config_for_all({"rope_parameters": both}, "float32")
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 1e4)
    assert "rope_scaling" not in config
    old = {"rope_theta": 1e4, "rope_scaling": None}  # of transformers 4: it stays as it is
    assert hub_files.config_for_all(old, "float32").items() >= old.items()


def test_base_names_load_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    assert base_model.loadable("base") == str(tmp_path / "base")
    assert base_model.loadable("package:model") == str(PACKAGED.resolve())
    assert base_model.loadable("org/model") == "org/model" and base_model.loadable("") == ""


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_files_have_the_mode_of_the_umask(tmp_path, packaged, umask, mode):
    old = os.umask(umask)
    try:
        save_pretrained(packaged, tmp_path)
    finally:
        os.umask(old)
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {mode}


def test_a_failed_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    tensor_files.save_file({"a": np.ones(3)}, path)
    before = path.read_bytes()
    with pytest.raises(Exception, match="str"):
        tensor_files.save_file({"a": "no array"}, path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    assert path.read_bytes() == before


def with_tokens(*tokens, special=False):
    tokenizer = AutoTokenizer.from_pretrained(PACKAGED)
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    else:
        tokenizer.add_tokens(list(tokens))
    return tokenizer


def test_the_first_token_without_a_row_is_named():
    tokenizer = with_tokens("<|x|>", "<|y|>")
    rows = len(tokenizer) - 2
    with pytest.raises(
        ModelError, match=rf"'<\|x\|>' of the tokenizer has id {rows}.*{rows} rows \({rows + 2} "
    ):
        hub_files.check_vocabulary(tokenizer, rows, where="model")
    for padded in (rows + 2, rows + 50):
        hub_files.check_vocabulary(tokenizer, padded, where="model")


def test_a_special_token_that_no_text_becomes_needs_no_row():
    """Gemma 3 of text alone has one for images; in the template, or as padding, it is refused."""
    tokenizer = with_tokens("<image_soft_token>", special=True)
    rows = len(tokenizer) - 1
    hub_files.check_vocabulary(tokenizer, rows, where="model")
    tokenizer.chat_template += "<image_soft_token>"
    with pytest.raises(ModelError, match="<image_soft_token>"):
        hub_files.check_vocabulary(tokenizer, rows, where="model")
    tokenizer = with_tokens("<image_soft_token>", special=True)
    tokenizer.chat_template = None  # as of an encoder
    with pytest.raises(ModelError, match="<image_soft_token>"):
        hub_files.check_vocabulary(tokenizer, rows, where="model")
    tokenizer = with_tokens("<image_soft_token>", special=True)
    tokenizer.pad_token = "<image_soft_token>"
    with pytest.raises(ModelError, match="<image_soft_token>"):
        hub_files.check_vocabulary(tokenizer, rows, where="model")


@pytest.mark.parametrize("given", [5000, [2, 5000]])
def test_end_tokens_without_a_row_are_named(given):
    tokenizer = with_tokens()
    with pytest.raises(ModelError, match=r"eos_token_id is 5000, but .* 4096 rows"):
        hub_files.check_vocabulary(tokenizer, 4096, "model", [{}, {"eos_token_id": given}])
    hub_files.check_vocabulary(tokenizer, 4096, "model", [{"pad_token_id": -1}])


def test_users_words_become_no_token_without_a_row(tmp_path):
    """What lets a special token beyond the embedding pass: no prompt and no answer has it."""
    save_pretrained(load_pretrained("package:model"), tmp_path)
    with_tokens("<image_soft_token>", special=True).save_pretrained(tmp_path)
    lm = load_pretrained(str(tmp_path))
    assert len(lm.tokenizer) > lm.config.vocab_size
    turns, answer = (("user", "see <image_soft_token> here"),), "no <image_soft_token>"
    assert max(chat.render(lm.tokenizer, turns, True)) < lm.config.vocab_size
    assert chat.encode(lm.tokenizer, turns, answer, 64).ids.max() < lm.config.vocab_size
