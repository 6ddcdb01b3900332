"""Flags of the chat template, in commands that ask a model."""

import datetime
import json

import pytest
from absl import flags

import fedsafe_jax
from fedsafe_jax.cli import command
from fedsafe_jax.cli.command import UsageError
from fedsafe_jax.inference.tokenizer import load_tokenizer
from fedsafe_jax.models.base_model import PACKAGED_FOLDER
from fedsafe_jax.models.hub import ModelError


class LoadedError(Exception):
    """Stands for a model that is loaded."""


def ask(name, folder, *given):
    prompts = folder / "p.txt"
    prompts.write_text("How do I tie a knot?\n")
    chosen, values = command.load(name), flags.FlagValues()
    chosen.define_flags(values)
    files = (f"--prompts={prompts}", f"--output={folder / 'out.jsonl'}")
    values([name, *files, *given])
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
