"""Files and rows as users have them: read with their meaning, or refused in one line."""

import codecs
import csv
import gzip
import io
import json
import zipfile

import pytest

from fedsafe_jax.cli.filter_pairs import read_pairs
from fedsafe_jax.data import sources
from fedsafe_jax.data.examples import SourceError

ROW = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Säö."}]}
LINE = json.dumps(ROW, ensure_ascii=False)


def load(folder, data, source="chat:x.jsonl"):
    """Writes a file, bytes or a value of JSON, and reads it."""
    if not isinstance(data, bytes):
        data = (data if isinstance(data, str) else json.dumps(data)).encode()
    (folder / source.partition(":")[2]).write_bytes(data)
    return sources.load(source, str(folder))


def refused(folder, data, source="chat:x.jsonl"):
    """Returns the one line with which a file is refused."""
    with pytest.raises(SourceError) as caught:
        load(folder, data, source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        LINE.encode("utf-8-sig"),
        LINE.encode("utf-16"),
        codecs.BOM_UTF16_BE + LINE.encode("utf-16-be"),
        LINE.encode("utf-32"),
        f"\r\n{LINE}\r\n\r\n".encode(),
        f"[{LINE}]".encode(),
        json.dumps({"data": [ROW], "version": 1}, indent=1).encode(),
        json.dumps({"train": [ROW]}).encode(),
        json.dumps({"label": float("nan"), **ROW}).encode(),
    ],
)
def test_forms_that_are_one_row(tmp_path, data):
    (example,) = load(tmp_path, data)
    assert example.messages == (("user", "Why?"),) and example.response == "Säö."


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("é".encode("latin-1"), "line 1: not UTF-8"),
        (LINE.encode() + b"\n\xff", "line 2: not UTF-8"),
        (LINE.encode("utf-16-le"), "NUL character"),
        ('{"messages": [], "messages": []}', "'messages' occurs twice"),
        ('{"a": Infinity}', "Infinity is not a JSON number"),
        ("[" * 100_000, "nested too deeply"),
        ({"train": [ROW], "test": [ROW]}, "several lists of rows ('train', 'test')"),
        (["a"], "item 0: expected a JSON object"),
        ("7", "line 1: expected a JSON object"),
    ],
)
def test_files_that_are_refused(tmp_path, data, said):
    assert said in refused(tmp_path, data)


def test_damaged_archives_are_refused(tmp_path):
    packed = gzip.compress(LINE.encode())
    assert load(tmp_path, packed, "chat:x.jsonl.gz")[0].prompt == "Why?"
    for data in (packed[:-9], b"no gzip", packed[:12] + b"\0\0\0" + packed[15:], b""):
        assert "x.jsonl.gz" in refused(tmp_path, data, "chat:x.jsonl.gz")
    assert "damaged" in refused(tmp_path, b"no zip", "chat:x.zip")


def test_the_text_in_a_zip_is_found_behind_folders(tmp_path):
    def archive(*names):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as file:
            file.mkdir("rows")
            for name in names:
                file.writestr(name, LINE)
        return out.getvalue()

    one = archive("__MACOSX/._x.jsonl", "LICENSE", "rows/x.jsonl")
    assert load(tmp_path, one, "chat:x.zip")[0].prompt == "Why?"
    assert "a.jsonl" in refused(tmp_path, archive("a.jsonl", "b.jsonl"), "chat:x.zip")
    assert "expected one file" in refused(tmp_path, archive(), "chat:x.zip")


def test_cells_may_be_long_and_hold_lines(tmp_path):
    text = "word\u2028 " * 40_000 + "\nmore"
    out = io.StringIO()
    csv.writer(out).writerows([["instruction", "response"], [text, "A"], ["Q", ""]])
    before = csv.field_size_limit()
    long, blank = load(tmp_path, out.getvalue(), "dolly:x.csv")
    assert long.prompt == text and not blank.response and csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("goal,target\nQ,A\nQ,A,B\n", "row 3: 1 more cells than the 2 columns"),
        ("goal,goal\nQ,A\n", "the column 'goal' occurs twice"),
        ('goal\n"Q', "row 2: not CSV"),
        ("goal;target\nQ, R;A\n", "row 1: the columns are separated by ';'"),
        ("sep=;\ngoal;target\nQ;A\n", "row 1: the columns are separated by ';'"),
        ("goal\ttarget\nQ\tA\n", "row 1: the columns are separated by '\\t'"),
        ("target\nA\n", "row 2: no field 'goal'; found ['target']"),
        ("goal,target\n ,A\n", "row 2: the prompt is blank"),
    ],
)
def test_csv_that_is_refused(tmp_path, text, said):
    assert said in refused(tmp_path, text, "advbench:x.csv")


def test_prompt_files_are_split_at_newlines_alone(tmp_path):
    read = load(tmp_path, "one\u2028 still\r\n\ntwo\x0bstill\rthree\n", "prompts:x.txt")
    assert [e.prompt for e in read] == ["one\u2028 still", "two\x0bstill", "three"]


def chat(*messages):
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def test_roles_of_every_format_are_kept(tmp_path):
    shares = [
        ("system", "S"),
        ("human", "Q"),
        ("gpt", "call()"),
        ("observation", "T"),
        ("gpt", "A"),
    ]
    row = {"conversations": [{"from": who, "value": said} for who, said in shares]}
    (example,) = load(tmp_path, row)
    roles = ("system", "user", "assistant", "tool")
    assert example.messages == tuple(zip(roles, ("S", "Q", "call()", "T"), strict=True))
    assert (example.response, example.prompt) == ("A", "Q")
    (example,) = load(tmp_path, chat(("user", "Q"), ("assistant", "A"), ("model", "B")))
    assert example.messages == (("user", "Q"),) and example.response == "A\n\nB"
    parts = [{"type": "text", "text": "a"}, "b", {"text": "c"}]
    assert load(tmp_path, chat(("user", parts)))[0].messages == (("user", "a\nb\nc"),)


CALL = {"role": "assistant", "content": "Well", "tool_calls": [{"function": {"name": "f"}}]}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (chat(("narrator", "Q")), "message 1 of 'messages' has the unknown role 'narrator'"),
        (chat((None, "Q")), "unknown role None"),
        (chat(("user", " ")), "a user turn is blank"),
        (chat(("assistant", "A")), "must have a user turn"),
        (chat(("user", "Q"), ("system", "S")), "must have a user turn"),
        (chat(("user", None)), "'content' of message 1 of 'messages' must be text, found None"),
        (chat(("user", [{"type": "image_url", "image_url": "x"}])), "part 1 of 'content'"),
        (chat(("user", "a\ud800")), "half of a character"),
        (chat(("user", "a\0")), "NUL"),
        ({"messages": [{"role": "user", "content": "Q"}, CALL]}, "'tool_calls' beside"),
        ({"messages": [{"text": "Q"}]}, "needs 'role' and 'content'"),
        ({"messages": ["Q"]}, "must be an object"),
        ({"prompt": "Q"}, "found the fields ['prompt']"),
        ({**chat(("user", "Q")), "label": []}, "label must be"),
        ({**chat(("user", "Q")), "user": {}}, "'user' must be text"),
    ],
)
def test_dialogues_that_are_refused(tmp_path, row, said):
    assert said in refused(tmp_path, row) and "line 1: " in refused(tmp_path, row)


def test_a_number_is_a_text_and_null_is_none(tmp_path):
    (example,) = load(tmp_path, {**chat(("user", "Q")), "user": 0, "category": None})
    assert (example.user, example.category) == ("0", "")
    assert (
        load(tmp_path, [{"instruction": "6 * 7", "output": 42}], "alpaca:x.json")[0].response
        == "42"
    )
    said = refused(tmp_path, [{"instruction": "Q", "answer": "A"}], "alpaca:x.json")
    assert "no field 'output'; found ['answer', 'instruction']" in said


@pytest.mark.parametrize(
    ("source", "row", "said"),
    [
        ("square", {"question": "Q", "response": "A", "acceptable?": "yes"}, "'acceptable?' must"),
        ("kosbi", {"context": "Q", "sentence": "A", "sentence_label": 1}, "'sentence_label' must"),
        ("xstest", {"prompt": "Q", "completion": "A", "type": "t", "final_label": "4"}, "must be"),
    ],
)
def test_labels_are_never_guessed(tmp_path, source, row, said):
    assert said in refused(tmp_path, [row], f"{source}:x.json")


def test_prompt_sets_by_kind_and_language(tmp_path):
    rows = [{"prompt": p, "type": t} for p, t in (("A", "homonyms"), ("B", "contrast_homonyms"))]
    for name, prompt in (("xstest_safe", "A"), ("xstest_unsafe", "B")):
        (example,) = load(tmp_path, rows, f"{name}:x.json")
        assert example.prompt == prompt and example.category == rows["AB".index(prompt)]["type"]
    row = [{"question": "질문", "question_en": "Q", "sensitive?": 1, "category": "ethical"}]
    for name, prompt in (("square_questions", "Q"), ("square_questions_ko", "질문")):
        (example,) = load(tmp_path, row, f"{name}:x.json")
        assert (example.prompt, example.category, example.response) == (prompt, "ethical", "")
    said = "\n\nHuman: One\n\nAssistant: A\n\nHuman: Two\n\nAssistant: B"
    (example,) = load(tmp_path, {"chosen": said, "rejected": said}, "hh_first:x.json")
    assert example.messages == (("user", "One"),)


def test_blank_answers_are_counted_and_alone_refused(tmp_path):
    rows = [{"instruction": "Q", "output": said} for said in ("A", "", " ", None)]
    load(tmp_path, rows, "alpaca:x.json")
    answered, blank = sources.load_answered("alpaca:x.json", str(tmp_path))
    assert len(answered) == 1 and len(blank) == 3
    load(tmp_path, rows[1:], "alpaca:x.json")
    with pytest.raises(SourceError, match=r"x\.json.*none of its 3 .*'instruction', 'output'"):
        sources.load_answered("alpaca:x.json", str(tmp_path))


def test_pairs_of_a_filter_are_read_as_training_data_are(tmp_path):
    file = tmp_path / "p.jsonl"
    rows = [{"prompt": "Q", "response": "A", "label": "unsafe"}, {**ROW, "label": "safe"}]
    file.write_bytes(codecs.BOM_UTF8 + "\n".join(map(json.dumps, rows)).encode())
    (first, pair), (second, dialogue) = read_pairs(file)
    assert [first, second] == rows and (pair.prompt, pair.label) == ("Q", "unsafe")
    assert (dialogue.response, dialogue.label) == ("Säö.", "safe")
    for row in ({"prompt": "Q"}, {"prompt": "Q", "response": "A", "label": "toxic"}):
        file.write_text(json.dumps(row))
        with pytest.raises(SourceError, match="line 1: "):
            read_pairs(file)
