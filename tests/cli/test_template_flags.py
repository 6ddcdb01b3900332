"""Flags of the chat template, in commands that ask a model."""

import datetime
import json
import types

import pytest
from absl import flags

import fedsafe_jax
from fedsafe_jax.cli import command
from fedsafe_jax.cli.command import UsageError
from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.inference.tokenizer import load_tokenizer
from fedsafe_jax.models.base_model import PACKAGED_FOLDER
from fedsafe_jax.models.hub import ModelError

ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{{ m.content }}<|end|>{% endfor %}"
)


class LoadedError(Exception):
    """Stands for a model that is loaded."""


def ask(name, folder, *given):
    prompts = folder / "p.txt"
    prompts.write_text("How do I tie a knot?\n")
    chosen, values = command.load(name), flags.FlagValues()
    chosen.define_flags(values)
    files = (f"--prompts={prompts}", f"--output={folder / 'out.jsonl'}")
    values([name, *files, *given])  # the last of two wins
    chosen.main(values)


@pytest.mark.parametrize("name", ["evaluate", "revise"])
def test_the_template_reaches_the_model(tmp_path, monkeypatch, name):
    def load(*args, **options):
        raise LoadedError(options)

    monkeypatch.setattr(fedsafe_jax, "load_pretrained", load)
    given = ("--chat_template=alpaca", "--date=2026-11-26")
    arguments = {"enable_thinking": True}
    with pytest.raises(LoadedError) as seen:
        ask(name, tmp_path, *given, f"--chat_template_kwargs={json.dumps(arguments)}")
    options = seen.value.args[0]
    assert options["chat_template"] == "alpaca" and options["date"] == "2026-11-26"
    assert options["chat_template_kwargs"] == arguments


@pytest.mark.parametrize("name", ["evaluate", "revise"])
@pytest.mark.parametrize("arguments", ["enable_thinking", "[1]", "true", '{"a": '])
def test_arguments_that_are_no_object_are_one_line(tmp_path, name, arguments):
    with pytest.raises(UsageError, match="--chat_template_kwargs.*expected a JSON object"):
        ask(name, tmp_path, f"--chat_template_kwargs={arguments}")


def test_the_form_of_base_models_is_a_template_of_its_own(tmp_path):
    with pytest.raises(UsageError, match="--chat_template and --form=dialogue"):
        ask("revise", tmp_path, "--form=dialogue", "--chat_template=alpaca")


def test_a_date_that_is_none_is_one_line():
    with pytest.raises(ModelError, match="date='tomorrow': expected a day such as '2026-11-26'"):
        load_tokenizer(PACKAGED_FOLDER, date="tomorrow")
    assert load_tokenizer(PACKAGED_FOLDER, date="2026-11-26").chat_settings.date == datetime.date(
        2026, 11, 26
    )


@pytest.mark.parametrize("name", ["evaluate", "revise"])
def test_a_prompt_that_the_template_refuses_is_named_by_its_row(tmp_path, monkeypatch, name):
    tokenizer = load_tokenizer(PACKAGED_FOLDER, template=ALTERNATING)
    lm = types.SimpleNamespace(tokenizer=tokenizer)
    monkeypatch.setattr(fedsafe_jax, "load_pretrained", lambda *args, **options: lm)
    rows = [[("user", "Hi")], [("assistant", "Hi"), ("user", "Do you hear me?")]]
    turns = [[{"role": r, "content": text} for r, text in row] for row in rows]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns))
    with pytest.raises(SourceError, match="m.jsonl line 2, 'Do you hear me\\?': .*must alternate"):
        ask(name, tmp_path, f"--prompts={tmp_path / 'm.jsonl'}", "--column=messages")
