"""Data files as users have them: read in full, or refused in one line that names the place."""

import csv
import pathlib
import re

import pytest
from small_run import NOT_RAISED, fails_today, small_config
from tiny_llama import with_template

from fedsafe_jax.data import chat, sources
from fedsafe_jax.data.examples import Example, SourceError
from fedsafe_jax.inference.tokenizer import load_tokenizer
from fedsafe_jax.pipeline.clients import encode
from fedsafe_jax.pipeline.inputs import load_inputs

# Refuses a system turn, as Gemma's template does, and two user turns in a row, as Mistral's.
STRICT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def read(case, source, **changes):
    """Reads a run's safe data as far as training does.

    Returns:
      `(inputs, counts of the safe pairs, how many have nothing to learn)`.
    """
    config = small_config(case, safe_sources=(source,), **changes)
    inputs = load_inputs(config)
    _, lost = encode(inputs.lm.tokenizer, inputs.safe, config.seq_len)
    return inputs, inputs.counts["client, safe"], lost


@fails_today("lines are split at U+2028 and U+0085 too: 'not JSON'", SourceError)
def test_lines_end_at_newlines_only():
    _, counts, lost = read("01-jsonl-line-separators", "chat:clients.jsonl")
    assert counts["read"] == 20 and not lost


@pytest.mark.parametrize(
    ("file", "count"),
    [
        pytest.param(
            "mixed.jsonl",
            44,
            marks=fails_today("every Korean prompt counts as a held-out one", AssertionError),
        ),
        pytest.param(
            "korean.jsonl",
            24,
            marks=fails_today("every prompt counts as a held-out one: none left", SourceError),
        ),
    ],
)
def test_prompts_in_other_scripts_are_kept(file, count):
    case = "02-korean-prompts-dropped"
    inputs, counts, _ = read(case, f"chat:{file}")
    prompts = [e.prompt for e in sources.load(f"chat:{file}", str(small_config(case).data_dir))]
    mine = [p for p in prompts if sources.part_of(p) != "heldout"]
    assert counts["read"] == len(set(prompts)) == count
    assert [e.prompt for e in inputs.safe] == mine


@pytest.mark.parametrize("source", ["chat:bom.jsonl", "dolly:bom.csv"])
@fails_today("the byte order mark is taken for text of the first line", SourceError)
def test_a_byte_order_mark_is_skipped(source):
    _, counts, lost = read("03-bom-and-encodings", source)
    assert counts["read"] == 20 and not lost


@pytest.mark.parametrize(
    ("source", "place"),
    [
        pytest.param(
            "dolly:latin1.csv",
            r"latin1\.csv.*(?i:utf-?8)",
            marks=fails_today("UnicodeDecodeError", UnicodeDecodeError),
        ),
        pytest.param(
            "chat:utf16.jsonl",
            r"utf16\.jsonl.*(?i:utf-?(8|16))",
            marks=fails_today("UnicodeDecodeError", UnicodeDecodeError),
        ),
        pytest.param(
            "dolly:long_cell.csv",
            r"long_cell\.csv row 22\b",
            marks=fails_today("an error of the csv module", csv.Error),
        ),
        pytest.param(
            "dolly:extra_cell.csv",
            r"extra_cell\.csv row 2\b",
            marks=fails_today("TypeError while the error is written", TypeError),
        ),
    ],
)
def test_files_of_spreadsheets_are_refused_with_file_and_place(source, place):
    with pytest.raises(SourceError, match=place):
        read("03-bom-and-encodings", source)


@pytest.mark.parametrize("source", ["chat:system.jsonl", "hh_rlhf:hh.jsonl"])
def test_turns_that_the_template_refuses_are_merged(tmp_path, source):
    """A system turn becomes the beginning of the request, two requests in a row become one."""
    model = with_template(tmp_path / "model", STRICT_TEMPLATE)
    inputs, counts, lost = read("04-roles-the-template-refuses", source, model=model)
    assert counts["kept"] and not lost
    example = inputs.safe[0]
    one = chat.encode(inputs.lm.tokenizer, example.messages, example.response, 128)
    text = inputs.lm.tokenizer.decode(one.ids)
    request = "\n\n".join(words.strip() for _, words in example.messages)
    assert request in text and text.count("<|user|>") == 1 and one.notes == (chat.MERGED,)


@pytest.mark.parametrize("first", ["assistant", "tool"])
def test_turns_that_cannot_be_merged_are_one_line_with_their_source(tmp_path, first):
    model = with_template(tmp_path / "model", STRICT_TEMPLATE)
    tokenizer = load_tokenizer(pathlib.Path(model))
    turns = ((first, "Before."), ("user", "Do you hear me?"))
    with pytest.raises(SourceError, match="source logs, 'Do you.*roles must alternate") as error:
        encode(tokenizer, [Example(turns, "Yes.", source="logs")], 128)
    assert "\n" not in str(error.value)


@fails_today("the list is taken for the text: AttributeError", AttributeError)
def test_text_parts_are_joined():
    inputs, counts, lost = read("06-content-parts-null-tools", "chat:parts.jsonl")
    assert counts["read"] == 20 and not lost
    assert {e.response for e in inputs.safe} == {"Fine."}
    assert all(re.fullmatch(r"About .+\?", e.prompt) for e in inputs.safe)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        pytest.param("null.jsonl", 21, marks=fails_today("an error in the template", TypeError)),
        pytest.param(
            "number.jsonl",
            1,
            marks=fails_today("the number is taken for text: AttributeError", AttributeError),
        ),
    ],
)
def test_content_without_text_is_refused(file, line):
    with pytest.raises(SourceError, match=rf"{re.escape(file)} line {line}\b.*content"):
        read("06-content-parts-null-tools", f"chat:{file}")


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("sharegpt.jsonl", r"'?conversations'?"),
        ("roles.jsonl", r"'?human'?"),
        ("object.json", r"'data'|a list"),
    ],
)
@fails_today("the message does not name what the file has instead", AssertionError)
def test_sharegpt_is_read_or_named(file, named):
    try:
        inputs, counts, lost = read("07-sharegpt", f"chat:{file}")
    except SourceError as error:
        assert re.search(rf"{re.escape(file)}.*({named})", str(error))
    else:
        assert counts["read"] == 20 and not lost and all(e.response for e in inputs.safe)


@fails_today("a string is taken for a row: AttributeError", AttributeError)
def test_a_list_of_strings_is_refused():
    with pytest.raises(SourceError, match=r"array\.json item 0\b"):
        read("07-sharegpt", "chat:array.json")


@pytest.mark.parametrize("source", ["alpaca:alpaca.json", "prompts:prompts.txt"])
@fails_today("accepted: the clients learn to answer with the end token alone", NOT_RAISED)
def test_training_data_without_answers_are_refused(source):
    file = re.escape(source.partition(":")[2])
    with pytest.raises(SourceError, match=rf"{file}.*(response|answer|output)"):
        read("16-pairs-without-answers", source)
