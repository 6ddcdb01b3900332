"""Tokenizers as models load them: templates by name, and end tokens from everywhere."""

import json
import pathlib
import shutil

import pytest

import fedsafe_jax
from fedsafe_jax.data import chat, chat_template
from fedsafe_jax.inference.tokenizer import load_tokenizer
from fedsafe_jax.models.hub import ModelError

PACKAGED = pathlib.Path(fedsafe_jax.__file__).parent / "assets" / "model"


@pytest.fixture
def folder(tmp_path):
    """The packaged model's configs and tokenizer, without a chat template."""
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(PACKAGED / name, tmp_path / name)
    return tmp_path


def test_a_base_model_is_told_how_to_name_a_template(folder):
    with pytest.raises(ModelError, match="chat_template: alpaca, chatml, vicuna, a file"):
        load_tokenizer(folder)
    (folder / "mine.jinja").write_text("{{ messages[0]['content'] + eos_token }}")
    for template in ("alpaca", "chatml", "vicuna"):
        tokenizer = load_tokenizer(folder, template)
        one = chat.encode(tokenizer, (("user", "Hi"),), "Yes.", 128)
        assert tokenizer.decode(one.ids[one.loss_mask]).strip() == "Yes.<|end|>"
    from_file = load_tokenizer(folder, str(folder / "mine.jinja"))
    assert chat.render(from_file, (("user", "Hi"),), True)[-1] == from_file.eos_token_id


def test_end_tokens_are_those_of_configs_tokenizer_and_template(folder):
    for name, ids in (("config.json", 7), ("generation_config.json", [9, 7])):
        path = folder / name
        raw = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(raw | {"eos_token_id": ids}))
    ends_with_user = "{% for m in messages %}{{ m['content'] + '<|user|>' }}{% endfor %}"
    tokenizer = load_tokenizer(folder, ends_with_user)
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    assert chat_template.of(tokenizer).stop_ids == (9, 7, tokenizer.eos_token_id, user)
