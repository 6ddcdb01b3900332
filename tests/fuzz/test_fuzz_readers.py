"""Files of any bytes and rows of any values: read with a meaning, or refused in one line."""

import csv
import io
import json

from fuzzing import fuzzed, refused
from hypothesis import given
from hypothesis import strategies as st

from fedsafe_jax.data import sources
from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.data.readers import READERS

NAMES = (
    "messages", "conversations", "role", "content", "from", "value", "type", "text", "label",
    "instruction", "output", "prompt", "question", "response", "goal", "chosen", "rejected",
    "acceptable?", "final_label", "data", "rows", "category", "prefix",
)  # fmt: skip
WORDS = st.sampled_from(
    ("user", "assistant", "gpt", "safe", "text", "1", "\n\nHuman: a\n\nAssistant: b", "3_x", " ")
)
# What costs much to read, or may stand for no text.
HOSTILE = st.sampled_from(
    (
        10**4000,
        -(10**399),
        "\x1b[2J\r\n",
        "\0",
        "\ud800",
        "a" * 9999,
        json.loads("[" * 60 + "]" * 60),
    )
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | WORDS | HOSTILE,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    ),
    max_leaves=20,
)
KINDS = st.sampled_from((".json", ".jsonl", ".csv", ".txt", ".json.gz", ".zip"))


def check(folder, reader, kind, data):
    """Asserts that a file is read with a checked meaning, or refused in one line."""
    (folder / f"x{kind}").write_bytes(data)
    try:
        examples = sources.load(f"{reader}:x{kind}", str(folder))
    except SourceError as error:
        refused(error)
        return
    assert examples
    for example in examples:
        texts = [*(text for _, text in example.messages), example.response, example.category]
        assert all(isinstance(text, str) and text.encode() is not None for text in texts)
        assert example.prompt.strip() and example.messages[-1][0] in ("user", "tool")
        assert {role for role, _ in example.messages} <= {"system", "user", "assistant", "tool"}


@fuzzed
@given(st.binary(max_size=200), st.sampled_from(sorted(READERS)), KINDS)
def test_any_bytes_are_read_or_refused(tmp_path, data, reader, kind):
    check(tmp_path, reader, kind, data)


@fuzzed
@given(VALUES | st.lists(VALUES, max_size=3), st.sampled_from(sorted(READERS)))
def test_any_json_is_read_or_refused(tmp_path, value, reader):
    check(tmp_path, reader, ".json", json.dumps(value).encode())


@fuzzed
@given(st.lists(st.lists(WORDS | st.text(max_size=5), max_size=4), max_size=4), st.data())
def test_any_table_is_read_or_refused(tmp_path, cells, data):
    header = data.draw(st.lists(st.sampled_from(NAMES), max_size=4))
    out = io.StringIO()
    csv.writer(out).writerows([header, *cells])
    reader = data.draw(st.sampled_from(sorted(READERS)))
    check(tmp_path, reader, ".csv", out.getvalue().encode(errors="replace"))
