"""Chat templates put together from the parts of real ones, over dialogues in any order."""

import functools
import pathlib
import time

from fuzzing import REFUSALS, fuzzed, refused
from hypothesis import event, given
from hypothesis import strategies as st

import fedsafe_jax
from fedsafe_jax.data import chat, chat_template

FOLDER = pathlib.Path(fedsafe_jax.__file__).parent / "assets" / "model"
END = "<|end|>"
HEADERS = (
    "<|{role}|>\n",
    "<|start|>{role}\n\n",
    "[{role}] ",
    "### {role}:\n",
    "{role}: ",
)
FOOTERS = (END + "\n", END, "\n" + END + "\n", "", "\n\n")
THOUGHTS = ("", "<think>\n", "<think>\n\n</think>\n\n")
TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=30).filter(
    lambda text: text.strip() and "<" not in text
)
ROLES = st.sampled_from(("user", "assistant", "system"))


@functools.cache
def tokenizer_of(template):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    tokenizer.chat_template = template
    return tokenizer


@st.composite
def templates(draw):
    """Returns `(template, whether its answers end in the end token)`."""
    header, footer = draw(st.sampled_from(HEADERS)), draw(st.sampled_from(FOOTERS))
    before, after = header.split("{role}")
    content = draw(st.sampled_from(("m['content']", "m['content'] | trim")))
    checks = draw(st.sampled_from(("", "system", "order", "both")))
    raises = ""
    if checks in ("system", "both"):
        raises += "{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    if checks in ("order", "both"):
        raises += (
            "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
            "{{ raise_exception('roles must alternate') }}{% endif %}"
        )
    thought = draw(st.sampled_from(THOUGHTS))
    trailing = draw(st.sampled_from(("", " ")))
    in_answers = thought if draw(st.booleans()) else ""
    template = (
        "{{ bos_token }}{% for m in messages %}"
        + raises
        + "{{ " + repr(before) + " + m['role'] + " + repr(after) + " }}"
        + "{% if m['role'] == 'assistant' %}{{ " + repr(in_answers) + " }}{% endif %}"
        + "{{ " + content + " + " + repr(footer) + " }}{% endfor %}"
        + "{% if add_generation_prompt %}{{ "
        + repr(before + "assistant" + after + thought + trailing) + " }}{% endif %}"
    )  # fmt: skip
    return template, END in footer


DIALOGUES = st.one_of(
    st.tuples(TEXT).map(lambda t: (("user", t[0]),)),
    st.tuples(TEXT, TEXT, TEXT).map(
        lambda t: (("user", t[0]), ("assistant", t[1]), ("user", t[2]))
    ),
    st.tuples(TEXT, TEXT).map(lambda t: (("system", t[0]), ("user", t[1]))),
    st.lists(st.tuples(ROLES, TEXT), min_size=1, max_size=4).map(
        lambda turns: (*turns, ("user", "And now?"))
    ),
)


@fuzzed
@given(templates(), DIALOGUES, TEXT)
def test_the_answer_and_the_end_token_are_learned_or_the_template_is_refused(
    template, dialogue, answer
):
    text, ends = template
    tokenizer = tokenizer_of(text)
    try:
        encoded = chat.encode(tokenizer, dialogue, answer, 1000)
    except REFUSALS as error:
        event("refused")
        refused(error)
        roles = [role for role, _ in dialogue if role != "system"]
        assert not ends or roles[0] != "user", error  # merging turns loses nothing
        return
    event("accepted")
    assert ends, "nothing teaches the model to stop"
    learned = tokenizer.decode(encoded.ids[encoded.loss_mask], skip_special_tokens=False)
    assert learned.rstrip().endswith(END), learned
    spoken = learned.rstrip().removesuffix(END).rpartition("</think>")[2]
    assert spoken.strip() == answer.strip(), learned
    whole = tokenizer.decode(encoded.ids, skip_special_tokens=False)
    assert all(turn.strip() in whole for _, turn in dialogue)
    # What evaluation asks is how the training example begins, up to white space.
    prompt = tokenizer.decode(
        chat.render(tokenizer, dialogue, add_generation_prompt=True), skip_special_tokens=False
    )
    assert whole.startswith(prompt.rstrip().removesuffix("<think>").rstrip()) or (
        "think" in prompt
    ), (prompt, whole)


PIECES = st.sampled_from(
    (
        "{% for i in range(99999) %}", "{% for m in messages %}", "{% endfor %}", "{{ m.content }}",
        "{% set ns = namespace(s='ab', a=[1]) %}", "{% set ns.s = ns.s + ns.s %}", "{{ ns.s }}",
        "{% set ns.s = ns.s.replace('a', ns.s) %}", "{% set ns.a = [ns.a, ns.a] %}", "{{ ns.a }}",
        "{{ 'a' * 10000000000 }}", "{{ 10 ** 9999 }}", "{{ ns.s.center(99999999) }}",
        "{{ bos_token",
        "{% macro f(x) %}", "{{ f(1) }}{{ f(2) }}", "{% endmacro %}", "{{ f(3) }}", "}}",
        "{%", "{#",
        "{{ messages | tojson(indent=99999999) }}", "{{ ''.__class__.__mro__ }}",
        "{% include 'a' %}",
        "{{ '%9999999d' % 1 }}", "{{ cycler }}", "{{ ns.s | center(99999999) }}", "text",
        "\n", "-%}",
        "{{ messages.append(1) }}", "{{ raise_exception('no') }}", "{% import 'os' as os %}",
    )
)  # fmt: skip


@fuzzed
@given(st.lists(PIECES, max_size=8))
def test_any_template_ends_with_a_text_or_one_line(pieces):
    tokenizer = tokenizer_of("".join(pieces) or "x")
    start = time.monotonic()
    try:
        text = chat_template.of(tokenizer).write([("user", "Hi"), ("assistant", "Hello")])
    except REFUSALS as error:
        refused(error)
    else:
        assert len(text) <= 500_000_000
    assert time.monotonic() - start < 60
