"""Exports in other installations: `launch/foreign_clients.sh` makes them and calls this.

Without FOREIGN_PYTHON, the Python of such an installation, the tests run in this one.
"""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from families import FAMILIES, VOCAB, checkpoint

from fedsafe_jax.inference.language_model import LanguageModel
from fedsafe_jax.inference.pretrained import load_pretrained, save_pretrained
from fedsafe_jax.models import hub, lora

pytest.importorskip("torch")
pytest.importorskip("peft")
CLIENT = pathlib.Path(__file__).with_name("foreign_client.py")
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}\n"


class NoTokenizer:
    """The families' checkpoints have none."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def save_pretrained(self, folder):
        """Writes nothing."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory, packaged):
    """`(folder, our logits by name, what the other installation printed)`."""
    folder = tmp_path_factory.mktemp("exported")
    tokens, ours = np.random.default_rng(0).integers(0, VOCAB, (2, 40)), {}
    np.save(folder / "tokens.npy", tokens)
    for family in FAMILIES:
        checkpoint(family, folder / "reference")
        config = hub.read_config(folder / "reference")
        params = hub.load_params(folder / "reference", config, "float32")
        raw = hub.read_json(folder / "reference" / "config.json")
        lm = LanguageModel(config, params, NoTokenizer(), hf_config=raw)
        save_pretrained(lm, folder / "models" / family)
        ours[family] = np.asarray(lm(tokens))
    save_pretrained(packaged, folder / "chats" / "same")
    replaced = load_pretrained("package:model", chat_template=TEMPLATE)
    save_pretrained(replaced, folder / "chats" / "template")
    changed = load_pretrained("package:model")
    changed.tokenizer.add_tokens(["<|tool|>"])
    save_pretrained(changed, folder / "chats" / "changed")
    shape = lora.LoraConfig(4, 8.0, ("q_proj", "down_proj"))
    factors = lora.init(jax.random.key(0), packaged.config, shape)
    factors = jax.tree.map(lambda x: x + 0.05, factors)  # b is zero at first
    adapter = lora.Adapter(factors, shape, packaged.name)
    lora.save_adapter(adapter, folder / "adapter")
    ours["adapter"] = np.asarray(packaged.with_adapter(adapter)(tokens))
    python = os.environ.get("FOREIGN_PYTHON", sys.executable)
    done = subprocess.run(
        [python, str(CLIENT), str(folder)],
        capture_output=True,
        text=True,
        cwd="/",  # neither this checkout nor what PYTHONPATH says
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, ours, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", [*FAMILIES, "adapter"])
def test_logits_are_ours(exported, name):
    folder, ours, _ = exported
    theirs = np.load(folder / f"{name}.npy")
    # float32 sums in another order; a base of rope that is not read moves logits by more than 0.1.
    np.testing.assert_allclose(theirs, ours[name], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["same", "template", "changed"])
def test_prompts_and_answers_are_ours(exported, packaged, name):
    chat = exported[2]["chats"][name]
    if name == "template":
        assert chat["prompt"] == "Hello!"
        return
    turns = [{"role": "user", "content": "Hello!"}]
    prompt = packaged.tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=False
    )
    assert chat["prompt"] == prompt and chat["ids"] == packaged.tokenizer(prompt)["input_ids"]
    assert chat["answer"].strip() == packaged.generate(["Hello!"], max_new_tokens=12)[0]
