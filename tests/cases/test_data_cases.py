"""Data files as users have them: read in full, or refused in one line that names the place."""

import json
import pathlib
import re

import pytest
from small_run import small_config
from tiny_llama import with_template

from fedsafe_jax.data import chat, sources
from fedsafe_jax.data.examples import Example, SourceError
from fedsafe_jax.inference.tokenizer import load_tokenizer
from fedsafe_jax.pipeline import inputs as inputs_lib
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


def test_lines_end_at_newlines_only():
    _, counts, lost = read("01-jsonl-line-separators", "chat:clients.jsonl")
    assert counts["read"] == 20 and not lost


@pytest.mark.parametrize(("file", "count"), [("mixed.jsonl", 44), ("korean.jsonl", 24)])
def test_prompts_in_other_scripts_are_kept(file, count):
    case = "02-korean-prompts-dropped"
    inputs, counts, _ = read(case, f"chat:{file}")
    prompts = [e.prompt for e in sources.load(f"chat:{file}", str(small_config(case).data_dir))]
    mine = [p for p in prompts if sources.part_of(p) != "heldout"]
    assert counts["read"] == len(set(prompts)) == count
    assert [e.prompt for e in inputs.safe] == mine


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("chat:bom.jsonl", 20),
        ("dolly:bom.csv", 20),
        ("chat:utf16.jsonl", 20),
        ("dolly:long_cell.csv", 21),
    ],
)
def test_files_of_spreadsheets_are_read(source, count):
    """A byte order mark says the encoding, of UTF-16 too, and a cell may be of any length."""
    _, counts, lost = read("03-bom-and-encodings", source)
    assert counts["read"] == count and not lost


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("dolly:latin1.csv", r"latin1\.csv line 2: not UTF-8 .*Windows-1252"),
        ("dolly:extra_cell.csv", r"extra_cell\.csv row 2\b"),
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


def test_a_set_that_the_template_refuses_is_named_before_any_compute(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs_lib, "load_base", lambda *args: pytest.fail("it loads the weights"))
    turns = [("assistant", "Before."), ("user", "Do you hear me?")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (tmp_path / "asked.jsonl").write_text(json.dumps(row))
    task = f"over_refusal=chat:{tmp_path / 'asked.jsonl'}"
    config = small_config(
        model=with_template(tmp_path / "model", STRICT_TEMPLATE), eval__tasks=(task,)
    )
    with pytest.raises(SourceError, match="task 'over_refusal', chat:.*'Do you.*must alternate"):
        load_inputs(config)


def test_text_parts_are_joined():
    inputs, counts, lost = read("06-content-parts-null-tools", "chat:parts.jsonl")
    assert counts["read"] == 20 and not lost
    assert {e.response for e in inputs.safe} == {"Fine."}
    assert all(re.fullmatch(r"About .+\?", e.prompt) for e in inputs.safe)


@pytest.mark.parametrize(("file", "line"), [("null.jsonl", 21), ("number.jsonl", 1)])
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
def test_sharegpt_is_read_or_named(file, named):
    try:
        inputs, counts, lost = read("07-sharegpt", f"chat:{file}")
    except SourceError as error:
        assert re.search(rf"{re.escape(file)}.*({named})", str(error))
    else:
        assert counts["read"] == 20 and not lost and all(e.response for e in inputs.safe)


def test_a_list_of_strings_is_refused():
    with pytest.raises(SourceError, match=r"array\.json item 0\b"):
        read("07-sharegpt", "chat:array.json")


@pytest.mark.parametrize("source", ["alpaca:alpaca.json", "prompts:prompts.txt"])
def test_training_data_without_answers_are_refused(source):
    file = re.escape(source.partition(":")[2])
    with pytest.raises(SourceError, match=rf"{file}.*(response|answer|output)"):
        read("16-pairs-without-answers", source)
