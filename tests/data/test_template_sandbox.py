"""Chat templates that never end or make any amount of text: one line, soon, in any thread."""

import concurrent.futures
import json
import pathlib
import shutil
import threading
import time

import pytest

import fedsafe_jax
from fedsafe_jax.data import template_sandbox
from fedsafe_jax.data.template_sandbox import TooMuchError, render
from fedsafe_jax.inference.tokenizer import load_tokenizer
from fedsafe_jax.models.decoder_config import ModelError
from fedsafe_jax.validation import one_line

MODEL = pathlib.Path(fedsafe_jax.__file__).parent / "assets" / "model"
VARIABLES = {
    "messages": [
        {"role": "user", "content": "Hi <b>"},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHello."},
    ],
    "tools": None,
    "documents": None,
    "add_generation_prompt": True,
    "bos_token": "<s>",
}
LOOP = "{% for i in range(99999) %}"
END = "{% endfor %}"
GROW = "{% set ns = namespace(a=['x'], s='xx', n=9) %}" + LOOP
HOSTILE = {
    "loops in loops": LOOP * 3 + END * 3,
    "a loop with words": LOOP + LOOP + "word" + END * 2,
    "a loop with much text": LOOP + "word" * 20_000 + END,
    "a loop that calls itself": "{% for i in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "a macro that calls itself": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "text times a number": "{{ 'a' * 10000000000 }}",
    "a number times text": "{{ 10000000000 * 'a' }}",
    "a list times a number": "{{ ([0] * 10000000000) | length }}",
    "text that doubles": GROW + "{% set ns.s = ns.s + ns.s %}" + END,
    "text joined to itself": GROW + "{% set ns.s = ns.s ~ ns.s %}" + END,
    "text replaced by itself": GROW + "{% set ns.s = ns.s.replace('x', ns.s) %}" + END,
    "text replaced by a filter": GROW + "{% set ns.s = ns.s | replace('x', ns.s) %}" + END,
    "text joined by itself": GROW + "{% set ns.s = ns.s.join([ns.s, ns.s, ns.s]) %}" + END,
    "text joined by a filter": GROW + "{% set ns.s = [ns.s, ns.s, ns.s] | join(ns.s) %}" + END,
    "text formatted into itself": GROW + "{% set ns.s = '{0}{0}{0}'.format(ns.s) %}" + END,
    "text put into itself": GROW + "{% set ns.s = '%s%s' % (ns.s, ns.s) %}" + END,
    "text captured": GROW + "{% set b %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = b %}" + END,
    "lists in lists": GROW + "{% set ns.a = [ns.a, ns.a] %}" + END + "{{ ns.a }}",
    "objects in objects": GROW + "{% set ns.a = {1: ns.a, 2: ns.a} %}" + END + "{{ ns.a }}",
    "objects by a call": GROW + "{% set ns.a = dict(a=ns.a, b=ns.a) %}" + END + "{{ ns.a }}",
    "lists that double": GROW + "{% set ns.a = ns.a + ns.a %}" + END + "{{ ns.a }}",
    "powers": "{{ 10 ** 10 ** 10 }}",
    "squares": GROW + "{% set ns.n = ns.n * ns.n %}" + END,
    "sums": GROW + "{% set ns.n = ns.n + ns.n %}" + END + "{{ ns.n }}",
    "padding": "{{ 'a'.ljust(10000000000) }}",
    "padding by zeros": "{{ 'a'.zfill(10000000000) }}",
    "padding by format": "{{ '{:>1000000000}'.format('a') }}",
    "padding by a given width": "{{ '{:>{}}'.format('a', 1000000000) }}",
    "padding by percent": "{{ '%1000000000d' % 1 }}",
    "padding by a star": "{{ '%*d' % (1000000000, 1) }}",
    "padding by a filter": "{{ 'a' | center(10000000000) }}",
    "indents": "{{ ('a\n' * 1000) | indent(1000000000) }}",
    "indents of JSON": "{{ messages | tojson(indent=1000000000) }}",
    "separators of JSON": "{{ messages | tojson(separators=('a' * 100000, 'b')) }}",
    "batches": "{{ [1] | batch(10000000000, 0) | list }}",
    "slices": "{{ [1] | slice(10000000000) | list }}",
    "words": "{{ lipsum(n=1000000) }}",
    "maps": "{{ range(99999) | map('replace', '', 'a' * 100000) | join }}",
    "maps that pad": "{{ range(99999) | map('center', 100000) | join }}",
    "a joined list of one text": (
        "{% set big = 'a' * 10000000 %}{{ ([big] * 100000) | join }}"
    ),
    "a written list of one text": "{% set big = 'a' * 10000000 %}{{ [big] * 100000 }}",
    "one text again and again": "{% set big = 'a' * 10000000 %}" + LOOP + "{{ big }}" + END,
    "a range": "{{ range(10000000000) | list }}",
    "a translated text": "{{ ('a' * 1000000).translate({97: 'b' * 1000000}) }}",
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "a long template": "a" * 300_000,
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_templates_that_never_end_or_grow_are_stopped(name):
    start = time.monotonic()
    with pytest.raises(Exception) as caught:
        render(HOSTILE[name], VARIABLES)
    assert time.monotonic() - start < 60  # 2 seconds on a core of its own
    assert type(caught.value).__module__.startswith(("jinja2", "fedsafe_jax")), caught.value
    assert len(one_line(caught.value)) < 500


def test_a_folder_with_such_a_template_is_one_line(tmp_path):
    folder = shutil.copytree(MODEL, tmp_path / "model")
    for name in ("loops in loops", "text times a number", "deep brackets", "words"):
        (folder / "chat_template.jinja").write_text(HOSTILE[name])
        with pytest.raises(ModelError) as caught:
            load_tokenizer(folder)
        assert str(folder) in str(caught.value) and len(one_line(caught.value)) < 700


PLAIN = (
    "{{ bos_token }}{% for m in messages %}{{ loop.index }}{{ loop.last }}{{ loop.length }}"
    "{{ '<' + m['role'] ~ '>' + m.content|trim }}{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ m.content | e }}{% else %}none{% endfor %}",
    "{{ messages | tojson(indent=2) }}{{ messages | map(attribute='role') | join(', ') }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages[1:] }}",
    "{% set ns = namespace(last='', n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.last = m.content.split('</think>')[-1].lstrip('\n') %}{% endfor %}{{ ns.last }}",
    "{{ '%s-%d' % ('a', 3) }}{{ 'a{}b{x}'.format(1, x=2) }}{{ 'ab'.replace('a', 'c') }}",
    "{% macro f(x, y=2) %}[{{ x }}{{ y }}{{ caller() if caller }}]{% endmacro %}{{ f(1) }}"
    "{% call f(3) %}inner{% endcall %}",
    "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is sequence else x }}{% endfor %}",
    "{% for k, v in {'a': 1, 'b': [2]}.items() %}{{ k }}{{ v }}{% endfor %}{{ 2 ** 8 }}",
    "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}"
    "{{ i }}{% endfor %}{% generation %}a{% endgeneration %}",
    "{{ nowhere }}{% for z in nowhere %}x{% else %}none{% endfor %}{{ (1, 2)[0] }}{{ 7 % 4 }}",
    "{% set parts = [] %}{% set parts = parts + ['a'] + ['b'] %}{{ parts | join('-') | upper }}",
    "{{ 'line\nline' | indent(4) }}{{ messages | length * 2 }}{{ ['a'] * 3 }}{{ '=' * 40 }}",
)


@pytest.mark.parametrize("text", PLAIN)
def test_other_templates_are_rendered_as_in_transformers(text):
    from transformers.utils.chat_template_utils import render_jinja_template

    (theirs,), _ = render_jinja_template(
        [VARIABLES["messages"]], chat_template=text, add_generation_prompt=True, bos_token="<s>"
    )
    assert render(text, VARIABLES) == theirs


def test_long_dialogues_are_far_below_the_limits():
    text = (MODEL / "chat_template.jinja").read_text()
    turns = [{"role": r, "content": "word " * 200} for r in ("user", "assistant")] * 500
    assert len(render(text, VARIABLES | {"messages": turns})) > 10**6
    long = [{"role": "user", "content": "a" * 4_000_000}]
    assert len(render(text, VARIABLES | {"messages": long})) > 4_000_000


def test_threads_have_meters_of_their_own(monkeypatch):
    monkeypatch.setattr(template_sandbox, "MOST_STEPS", 20_000)
    text = "{% for i in range(9000) %}x{% endfor %}"
    ready = threading.Barrier(4)

    def one(_):
        ready.wait()
        return len(render(text, VARIABLES))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(4))) == [9000] * 4
    with pytest.raises(TooMuchError):
        render(text * 3, VARIABLES)


def test_templates_cannot_reach_the_meter():
    for text in ("{{ 1 | made }}", "{{ environment }}", json.dumps("{{ self }}")):
        try:
            assert "meter" not in render(text, VARIABLES).lower()
        except Exception as error:
            assert "No filter named" in str(error)
