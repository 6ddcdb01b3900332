"""Regular expressions of the package over texts that are made to hold them up."""

import ast
import importlib
import multiprocessing
import os
import pathlib
import re
import time

import pytest

import fedsafe_jax
from fedsafe_jax.cai import forms, given, revise
from fedsafe_jax.data import benchmark_readers, chat_template, overlap, readers
from fedsafe_jax.evals.judges import chat
from fedsafe_jax.models import tokenizer_loading

PACKAGE = pathlib.Path(fedsafe_jax.__file__).parent
# Rooms whose texts are the package's own or a compiler's, and their reasons.
OWN_TEXT = {
    "aot": "texts of XLA",
    "demo": "the package's own phrases",
    "cli/config_help.py": "the package's own config.py",
    "cli/startup.py": "the command line",
    "runtime/native_notes.py": "lines of native libraries",
    "runtime/checkpoint.py": "errors of storage",
    "runtime/client_updates.py": "names of the run's own files",
    "runtime/fingerprints.py": "names of files",
}
# Expressions that are put together when they are used; what else is in them is escaped or a class
# of characters, and the calls below run them.
PUT_TOGETHER = {
    "cai/constitution.py": "labels between fixed letters",
    "data/overlap.py": "one class of characters, repeated once",
    "data/control_tokens.py": "escaped names, none repeated",
    "models/lora.py": "names of at most a file's header, each part once",
    "data/sources.py": "an escaped path",
    "fetch/download.py": "one class of characters, repeated a fixed number of times",
    "evals/judges/mt_bench_prompts.py": "two patterns of a number in brackets",
    "evals/judges/strongreject_rubric.py": "names of scores before a number",
    "evals/judges/guard_formats.py": "a fixed line of a guard's reply, and an escaped name",
}
FUNCTIONS = ("compile", "search", "match", "fullmatch", "findall", "finditer", "split", "sub")


def expressions():
    """Yields `(file, expression or None where it is put together)` of every call of `re`."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if any(name == own or name.startswith(f"{own}/") for own in OWN_TEXT):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in FUNCTIONS
                and ast.unparse(node.func.value) == "re"
            ):
                try:
                    yield name, ast.literal_eval(node.args[0])
                except ValueError:
                    yield name, None


def module_patterns():
    """Patterns that modules hold ready, those that are put together among them."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if "re.compile" not in path.read_text() or any(name.startswith(own) for own in OWN_TEXT):
            continue
        module = importlib.import_module(
            f"fedsafe_jax.{name.removesuffix('.py').replace('/', '.')}"
        )
        for value in vars(module).values():
            if isinstance(value, re.Pattern):
                yield name, value.pattern, value.flags


# Those that are only ever asked whether they match from the start, which `sub` does not.
FROM_THE_START = {
    given.ALPACA.pattern, given.LLAMA.pattern, given._ENDS_BACKWARDS.pattern,
    revise.CRITIQUE.pattern, benchmark_readers._WRAPPED.pattern, chat._SPEC.pattern,
    r"(?:([^=:]+)=)?([a-z_]+):(.+)", r"\s*(yes|no)\b",
}  # fmt: skip
# Those that are asked of short texts alone: an expression, whose length is checked before.
SHORT = {r"\[\^?\]?[^\]]*\]": tokenizer_loading.MOST_CHARACTERS}
# A quadratic expression takes minutes on this many characters, a linear one a fraction of a second.
SIZE = int(os.environ.get("FEDSAFE_TEXT_SIZE", "200000"))
ALPHABET = (
    "a", " ", "\n", "1", "[", "]", "#", "*", "|", "<", ">", "_", ".", "(", "\\", '"', "\u3000", "é",
    "\n\n", " \n", "a ", "a\n", "1.", "[[1", "[[", "<|a|>", "</s>", "<|a|> ", "<think>", "<think> ",
    "[INST]", "[/INST]", "### Instruction:\n", "\n\n### Response:", "\n\nHuman:", "Human",
    "\nHuman",
    "Here is ", "Here is", "**Revision", "# Revision", "Sure, ", "The revised answer", "___",
)  # fmt: skip


def hostile_texts():
    for piece in ALPHABET:
        text = piece * (SIZE // len(piece))
        yield "!" + text + "!"


def run_all(pattern, flags, anchored, size):
    """Seconds of the slowest text; in a process of its own, which can be ended."""
    compiled = re.compile(pattern, flags)
    slowest = 0.0
    for text in hostile_texts():
        text = text[:size]
        start = time.process_time()
        compiled.fullmatch(text)
        if not anchored:
            compiled.sub("", text)  # all that `search` and `split` do
        slowest = max(slowest, time.process_time() - start)
    return slowest


def test_every_expression_is_linear_on_long_texts():
    """One that is linear may take a second on a busy machine."""
    ready = {(pattern, flags) for _, pattern, flags in module_patterns()}
    ready |= {(pattern, 0) for _, pattern in expressions() if pattern is not None}
    assert len(ready) >= 12
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for pattern, flags in sorted(ready):
            size = SHORT.get(pattern, SIZE + 2)
            arguments = pattern, flags, pattern in FROM_THE_START, size
            waiting = pool.apply_async(run_all, arguments)
            try:
                assert waiting.get(timeout=90) < 3, pattern
            except multiprocessing.TimeoutError:
                pool.terminate()
                pytest.fail(f"{pattern!r} takes more than a minute")


def test_expressions_that_are_put_together_are_known():
    unknown = {name for name, pattern in expressions() if pattern is None}
    ready = {name for name, _, _ in module_patterns()}
    assert unknown - ready <= set(PUT_TOGETHER), unknown


CALLS = {
    "forms.clean": forms.clean,
    "given.without_end_tokens": given.without_end_tokens,
    "opens_thought": chat_template.ChatTemplate.opens_thought,
    "parse_dialogue": readers.parse_dialogue,
}


@pytest.mark.parametrize("name", CALLS)
def test_what_calls_them_is_linear_too(name):
    for text in hostile_texts():
        start = time.process_time()
        CALLS[name](text)
        assert time.process_time() - start < 5, text[:20]


def test_overlap_is_linear_too():
    for function in (overlap.normalise, overlap.content_words, overlap.pieces):
        for text in hostile_texts():
            start = time.process_time()
            function(text[:200_000])
            assert time.process_time() - start < 5, text[:20]


@pytest.mark.parametrize(
    "text, left",
    [
        ("No.<|eot_id|>", "No."),
        ("No. </s> <|im_end|>\n", "No."),
        ("<|a|> No. <|b|> yes", "<|a|> No. <|b|> yes"),
        ("No.<|A|>", "No.<|A|>"),
        ("No.", "No."),
        ("</s>", ""),
    ],
)
def test_end_tokens_go_from_the_end_alone(text, left):
    assert given.without_end_tokens(text).strip() == left


@pytest.mark.parametrize(
    "text, answer",
    [
        ("So.\nHuman: More?", "So."),
        ("So.  \n \n\n Assistant: x", "So."),
        ("So. Human: no line of its own", "So. Human: no line of its own"),
        ("Human: x", ""),
        ("So.\n\nCritiqueRequest: y\nHuman: z", "So."),
    ],
)
def test_where_another_speaker_begins(text, answer):
    assert forms.clean(text)[0] == answer
