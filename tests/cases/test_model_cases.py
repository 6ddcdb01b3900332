"""Model folders, adapters and chat templates as the Hub has them: used as meant, or refused."""

import datetime
import json
import pathlib
import re

import jax
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file
from small_run import BORDER, small_config
from tiny_llama import PACKAGED, make, with_template
from transformers import AutoTokenizer, GenerationConfig
from transformers.utils import chat_template_utils

from fedsafe_jax.data import chat
from fedsafe_jax.evals import judges
from fedsafe_jax.inference.pretrained import load_pretrained, save_pretrained
from fedsafe_jax.models import lora
from fedsafe_jax.models.hub import ModelError
from fedsafe_jax.pipeline import export
from fedsafe_jax.pipeline.inputs import load_inputs
from fedsafe_jax.report import model_card

IDS = np.array([[1, 5, 6, 7, 9, 300]])
HI = (("user", "Hi"),)


def loaded_by_a_run(folder):
    """The language model as a run has it."""
    return load_inputs(small_config(model=folder)).lm


def asked(lm) -> str:
    """What evaluation asks the model with."""
    return lm.tokenizer.decode(lm.render([HI], 8, False)[0])


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    folder = make(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|tool|>", "<|x1|>", "<|x2|>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="tokenizer.*embedding|embedding.*tokenizer"):
        load_pretrained(folder)


def test_a_head_of_its_own_is_used_or_refused(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    folder = make(tmp_path / "model", own_head=True)
    try:
        ours = np.asarray(load_pretrained(folder)(IDS))
    except ModelError as error:
        assert "lm_head" in str(error)
        return
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4)


TURNS = "{% for m in messages %}"
MARKED = TURNS + "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
ANSWER_NEXT = "{% if add_generation_prompt %}{{ 'NEXT' }}{% endif %}"
TEMPLATES = {
    "space": TURNS
    + "{{ ('Human: ' if m['role'] == 'user' else 'Assistant: ') + m['content'] + '<|end|>\n' }}"
    + "{% endfor %}"
    + ANSWER_NEXT.replace("NEXT", "Assistant: "),
    "think": MARKED + ANSWER_NEXT.replace("NEXT", "<|assistant|>\n<think>\n"),
    "header": TURNS
    + "{{ ('<|user|>\n' if m['role'] == 'user' else '') + m['content'] + '<|end|>' }}{% endfor %}"
    + ANSWER_NEXT.replace("NEXT", "<|assistant|>\n"),
    "no end": MARKED.replace("<|end|>", "") + ANSWER_NEXT.replace("NEXT", "<|assistant|>\n"),
}


@pytest.mark.parametrize("answer", ["Sorry, I cannot help with that request.", "No."])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answer_and_an_end_token_are_learned(name, answer):
    """Else an error names the template."""
    try:
        lm = load_pretrained("package:model", chat_template=TEMPLATES[name])
        encoded = chat.encode(lm.tokenizer, HI, answer, 128)
    except BORDER as error:
        assert "template" in str(error)
        return
    assert encoded is not None
    learned = lm.tokenizer.decode(encoded.ids[encoded.loss_mask])
    assert learned.strip() == f"{answer}<|end|>"


NO_THOUGHT = "<think>\n\n</think>\n\n"
THINKING = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ 'THOUGHT' }}{% endif %}"
    "{{ m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ 'THOUGHT' }}{% endif %}"
    "{% endif %}"
).replace("THOUGHT", NO_THOUGHT)


def test_evaluation_asks_with_thinking_off(tmp_path):
    lm = loaded_by_a_run(with_template(tmp_path / "model", THINKING))
    assert asked(lm).endswith(NO_THOUGHT)


@pytest.mark.parametrize(
    ("judge", "thought", "answer", "refused"),
    [
        (
            "start",
            "This is harmful, so I should decline.",
            "I'm sorry, but I can't help with that.",
            True,
        ),
        ("rules", "It is illegal. I should decline.", "I must refuse.", True),
        ("rules", "I cannot help with that.", "Here is how to bake bread.", False),
        ("keyword", "Is this illegal? It is not.", "Here is how to bake bread.", False),
    ],
)
def test_judges_look_behind_the_thought(judge, thought, answer, refused):
    (made,) = judges.make((judge,))
    said = (answer, f"<think>\n{thought}\n</think>\n\n{answer}")
    verdicts = made.judge([judges.Answered((("user", "How?"),), text) for text in said])
    assert [verdict.refused for verdict in verdicts] == [refused, refused]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("alora_invocation_tokens", [9]),
    ],
)
def test_adapters_that_are_not_plain_are_refused(tmp_path, field, value):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(make(tmp_path / "base"), dtype=torch.float32)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        **{field: value},
    )
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=field):
        lora.load_adapter(tmp_path / "adapter")


def without_rank(folder):
    raw = json.loads((folder / "adapter_config.json").read_text())
    del raw["r"]
    (folder / "adapter_config.json").write_text(json.dumps(raw))


def of_another_rank(folder):
    raw = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(raw | {"r": 16}))


def without_b(folder):
    path = folder / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "lora_B" not in k}, path)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (without_rank, r"adapter_config\.json.*\br\b"),
        (of_another_rank, r"adapter_config\.json.*\br\b"),
        (without_b, r"adapter_model\.safetensors.*lora_B"),
    ],
)
def test_config_and_tensors_of_an_adapter_agree(tmp_path, edit, named):
    lm = load_pretrained(make(tmp_path / "base"))
    write_adapter(lm, tmp_path / "adapter")
    edit(tmp_path / "adapter")
    with pytest.raises(ModelError, match=named):
        lm.with_adapter(lora.load_adapter(tmp_path / "adapter"))


def write_adapter(lm, folder):
    config = lora.LoraConfig(4, 8.0, ("q_proj", "v_proj"))
    factors = lora.init(jax.random.key(0), lm.config, config)
    lora.save_adapter(lora.Adapter(factors, config, lm.name), folder)


def test_the_date_of_a_template_stays_as_it_was(tmp_path, monkeypatch):
    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime.now(tz) + datetime.timedelta(days=1)

    dated = "Today Date: {{ strftime_now('%d %b %Y') }}\n"
    template = dated + (PACKAGED / "chat_template.jinja").read_text()
    lm = loaded_by_a_run(with_template(tmp_path / "model", template))
    today = asked(lm)
    assert re.search(r"\d\d \w+ \d{4}", today)
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert asked(lm) == today


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("fp8_scaled", "compressed-tensors"),
        ("fp8_bare", "compressed-tensors"),
        ("gptq", "gptq"),
    ],
)
def test_quantised_checkpoints_are_named_as_such(tmp_path, kind, method):
    folder = make(tmp_path / "model", quantised=kind)
    with pytest.raises(ModelError) as error:
        load_pretrained(folder)
    message = str(error.value).replace(folder, "")
    assert re.search("quanti[sz]ed", message) and method in message and "not supported" in message


def export_packaged(lm, folder):
    """Exports an adapter of the packaged model as a run does."""
    config = lora.LoraConfig(2, 4.0, ("q_proj", "v_proj"))
    factors = lora.init(jax.random.key(0), lm.config, config)
    export.export(
        lm,
        lora.Adapter(factors, config, lm.name),
        folder,
        model_card.text("fl", small_config().to_dict(), summary={}, sets={}),
    )


def test_the_base_of_an_exported_adapter_is_found(tmp_path, monkeypatch, packaged):
    """Or none is named, and the card says which it was."""
    peft = pytest.importorskip("peft")
    export_packaged(packaged, tmp_path)
    folder = tmp_path / "adapter"
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    if base:
        monkeypatch.chdir(folder)  # a relative path is one from the adapter's folder
        peft.AutoPeftModelForCausalLM.from_pretrained(".")
    else:
        assert "package:model" in (folder / "README.md").read_text()


def test_the_card_of_an_exported_adapter_names_its_library(tmp_path, packaged):
    export_packaged(packaged, tmp_path)
    assert "library_name: peft" in (tmp_path / "adapter" / "README.md").read_text()


def base_model(folder, **ends):
    """A base model without a chat template; `ends` are the end tokens of its configs."""
    path = pathlib.Path(make(folder))
    (path / "chat_template.jinja").unlink()
    for name, given in ends.items():
        file = path / f"{name}.json"
        raw = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps(raw | given))
    return str(path)


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ({"config": {"eos_token_id": 7}, "generation_config": {"eos_token_id": [9, 7]}}, [9, 7, 2]),
        ({"generation_config": {"temperature": 0.5}}, 2),
        ({}, 2),
    ],
    ids=["union", "not named", "no file"],
)
def test_an_export_names_all_end_tokens(tmp_path, ends, expected):
    lm = load_pretrained(base_model(tmp_path / "base", **ends), chat_template="alpaca")
    save_pretrained(lm, tmp_path / "out")
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == expected
    assert set(load_pretrained(str(tmp_path / "out")).stop_ids) == set(lm.stop_ids)


def test_an_export_of_a_base_model_carries_the_template_that_it_was_given(tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    lm = load_pretrained(base_model(tmp_path / "base"), chat_template="alpaca")
    shape = lora.LoraConfig(4, 8.0, ("q_proj", "v_proj"))
    factors = lora.init(jax.random.key(0), lm.config, shape)
    keys = iter(jax.random.split(jax.random.key(1), 99))
    factors = jax.tree.map(lambda x: x + jax.random.normal(next(keys), x.shape) * 0.1, factors)
    adapter = lora.Adapter(factors, shape, lm.name)
    export.export(lm, adapter, epath.Path(tmp_path / "export"), card="")
    merged = str(tmp_path / "export" / "merged")
    tokenizer = AutoTokenizer.from_pretrained(merged)
    ids = tokenizer.apply_chat_template(
        chat.to_dicts(HI), add_generation_prompt=True, return_dict=False
    )
    assert ids == chat.render(lm.tokenizer, HI, True)
    ours = np.asarray(lm.with_adapter(adapter)(np.array([ids])))
    base = AutoModelForCausalLM.from_pretrained(str(tmp_path / "base"), dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "export" / "adapter")
    for theirs in (adapted, AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)):
        with torch.no_grad():
            logits = theirs(torch.tensor([ids])).logits.numpy()
        np.testing.assert_allclose(ours, logits, atol=1e-4)
