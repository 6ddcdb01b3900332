"""How models are asked, and how their text is read back."""

import copy

import pytest
from cai_examples import PRINCIPLES, SHOT

from fedsafe_jax.cai import forms


@pytest.mark.parametrize(
    ("said", "text", "ended"),
    [
        (" A plain answer.", "A plain answer.", False),
        ("An answer.\n\nHuman: And now?\n\nAssistant: Well", "An answer.", True),
        ("An answer.\n\nCritiqueRequest: Is it", "An answer.", True),
        ("\n\nHuman: again", "", True),
        ("Revision: Mended.", "Mended.", False),
        ("Sure! Here is the revised response:\n\nMended.", "Mended.", False),
        ("Here's a version without harm: Mended: all of it.", "Mended: all of it.", False),
        ("Revised answer: Mended.", "Mended.", False),
        ('"Mended."', "Mended.", False),
        ('"One" and "two"', '"One" and "two"', False),
        ("The human: a study", "The human: a study", False),
        ("Two\n\nparagraphs.", "Two\n\nparagraphs.", False),
        ("**Revised response:** Mended.", "Mended.", False),
        ("**Revised Response**:\n\nMended.", "Mended.", False),
        ("### Revised response\n\nMended.", "Mended.", False),
        ("## **The revised version:**\nMended.", "Mended.", False),
        ("__Revision__\nMended.", "Mended.", False),
        ('Sure! *Here is the revised answer:* "Mended."', "Mended.", False),
        ("**Note:** all of it.", "**Note:** all of it.", False),
        ("**Revision** is good.", "**Revision** is good.", False),
        ("# Here are the steps\n1.", "# Here are the steps\n1.", False),
    ],
)
def test_what_models_say_is_read_back(said, text, ended):
    assert forms.clean(said) == (text, ended)


def test_base_models_are_asked_in_dialogue_form(packaged):
    tokenizer = copy.deepcopy(packaged.tokenizer)
    tokenizer.chat_template = forms.DIALOGUE
    turns = [{"role": role, "content": text} for role, text in PRINCIPLES.few_shots[0]]
    question = [*turns, {"role": "user", "content": "And this?"}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert text == SHOT + " And this?\n\nAssistant:"
    text = tokenizer.apply_chat_template(turns[:3], tokenize=False, add_generation_prompt=True)
    assert text.endswith("\n\nCritiqueRequest: Is it bad?\n\nCritique:")
    chat = forms.as_chat([*PRINCIPLES.few_shots[0], ("user", "And this?")])
    assert [role for role, _ in chat] == ["user", "assistant"] * 3 + ["user"]


def test_base_models_see_system_prompts_and_tools(packaged):
    tokenizer = copy.deepcopy(packaged.tokenizer)
    tokenizer.chat_template = forms.DIALOGUE
    said = [("system", "Be brief."), ("user", "The time?"), ("tool", "noon")]
    turns = [{"role": role, "content": text} for role, text in said]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "\n\nBe brief.\n\nHuman: The time?\n\nTool: noon\n\nAssistant:"
