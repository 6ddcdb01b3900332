"""Answers of inspect_ai and lm-evaluation-harness are judged; what is wrong is named."""

import json
import zipfile

import pytest

from fedsafe_jax.cli.judge import read_answers
from fedsafe_jax.data.examples import SourceError

SETTINGS = {"until": ["\n"], "max_gen_toks": 12}
SAMPLE = {
    "doc_id": 0,
    "doc": {"q": "A river in France?"},
    "target": "Seine",
    "arguments": {"gen_args_0": {"arg_0": "Q: A river in France?", "arg_1": SETTINGS}},
    "resps": [[" Seine."]],
    "filtered_resps": ["Seine"],
    "filter": "none",
    "metrics": ["exact_match"],
    "exact_match": 1.0,
}
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A river?"}]


def samples(folder, *rows):
    file = folder / "samples_rivers_2026-01-02T03-04-05.678901.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_what_the_model_said_is_read_and_not_what_the_filter_left(tmp_path):
    (row,) = read_answers(samples(tmp_path, SAMPLE))
    assert row["messages"] == [{"role": "user", "content": "Q: A river in France?"}]
    assert (row["answer"], row["reference"], row["item"]) == (" Seine.", "Seine", 0)
    assert row["scores"] == {"exact_match": 1.0} and row["doc"] == SAMPLE["doc"]


def test_dialogues_repeats_and_the_old_form_are_read(tmp_path):
    chat = [json.dumps([turn | {"type": "text"} for turn in TURNS])]
    rows = [
        SAMPLE | {"arguments": {"gen_args_0": {"arg_0": chat, "arg_1": SETTINGS}}},
        SAMPLE | {"doc_id": 1, "arguments": [["Q: A lake?", SETTINGS]], "resps": [["a", "b"]]},
    ]
    first, second, third = read_answers(samples(tmp_path, *rows))
    assert first["messages"] == TURNS
    assert [second["answer"], third["answer"]] == ["a", "b"]
    assert [second["sample"], third["sample"]] == [0, 1]


def test_a_second_filter_of_the_same_answers_is_counted_and_left_out(tmp_path, caplog):
    rows = [SAMPLE | {"filter": "strict"}, SAMPLE | {"filter": "flexible"}]
    assert len(read_answers(samples(tmp_path, *rows))) == 1
    assert "1 rows repeat answers of another filter" in caplog.text


OPTION = {"gen_args_0": {"arg_0": "Q?", "arg_1": " Seine"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arguments": OPTION}, "scores given answers .*generate_until"),
        ({"arguments": OPTION | {"gen_args_1": {"arg_0": "Q?", "arg_1": "B"}}}, "given answers"),
        ({"arguments": {}}, "'arguments' must hold the request of a sample; found {}"),
        ({"arguments": [[5, {}]]}, "the prompt in 'arguments' must be a text.*found 5"),
        ({"arguments": [["  ", {}]]}, "the prompt in 'arguments' must be a text"),
        ({"arguments": [["a", {}], ["b", {}]]}, "must hold one request"),
        ({"resps": [["a", 5]]}, "'resps' must hold a list with the texts"),
        ({"resps": []}, "'resps' must hold a list with the texts.*found"),
        ({"resps": [[["-1.5", "False"]]]}, "'resps' must hold a list with the texts"),
        ({"doc_id": None}, "'doc_id' must be a number or text, found None"),
    ],
)
def test_a_sample_that_is_none_is_one_line_with_its_place(tmp_path, changes, message):
    with pytest.raises(SourceError, match=rf"samples_\S+jsonl line 2: .*{message}") as error:
        read_answers(samples(tmp_path, SAMPLE, SAMPLE | {"doc_id": 1} | changes))
    assert "\n" not in str(error.value)


def test_a_row_without_answers_among_samples_is_named(tmp_path):
    row = {name: value for name, value in SAMPLE.items() if name != "resps"}
    with pytest.raises(SourceError, match="line 2: 'resps' must .*it is missing"):
        read_answers(samples(tmp_path, SAMPLE, row))


def choice(content):
    return {"choices": [{"message": {"role": "assistant", "content": content}}]}


def sample(**changes):
    said = {"role": "assistant", "content": "Seine."}
    whole = {"id": "a", "epoch": 1, "input": "A river?", "target": "Seine"}
    whole |= {"messages": [*TURNS, said], "output": choice("Seine."), "scores": {}}
    return whole | changes


def log_of(*samples, **changes):
    spec = {"task": "rivers", "model": "none/m", "created": "2026-01-02T03:04:05+00:00"}
    return {"version": 2, "status": "success", "eval": spec, "samples": list(samples)} | changes


def log_file(folder, *samples, **changes):
    file = folder / "log.json"
    file.write_text(json.dumps(log_of(*samples, **changes), indent=1))
    return file


def test_the_samples_of_a_log_are_read(tmp_path, caplog):
    parts = [{"type": "reasoning", "reasoning": "Hm."}, {"type": "text", "text": "Loire."}]
    score = {"match": {"value": "C"}}
    rows = read_answers(
        log_file(
            tmp_path,
            sample(scores=score),
            sample(id="b", epoch=2, messages=[], output=choice(parts)),
            sample(id="c", output={"choices": []}, error={"message": "timeout"}),
            sample(
                id="d",
                messages=[{"role": "user", "content": "attachment://abc"}],
                attachments={"abc": "A long question?"},
            ),
        )
    )
    first, second, third = rows
    assert first["messages"] == TURNS and first["answer"] == "Seine."
    assert first["scores"] == score and first["reference"] == "Seine" and "sample" not in first
    assert second["messages"] == [{"role": "user", "content": "A river?"}]
    assert (second["answer"], second["sample"]) == ("Loire.", 1)
    assert third["messages"][0]["content"] == "A long question?"
    assert "1 samples ended before the model answered" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": {"choices": []}}, "'output' holds no choice"),
        ({"output": {"choices": 5}}, "'output' holds no choice"),
        ({"output": {"choices": [{}]}}, "first choice of 'output' must hold a 'message'"),
        ({"output": choice(5)}, "the answer in 'output' must be text, found 5"),
        ({"messages": [], "input": None}, "'messages' or 'input' must be a dialogue or a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "only parts with text"),
        ({"messages": [{"role": "pilot", "content": "Up?"}]}, "unknown role 'pilot'"),
    ],
)
def test_a_wrong_sample_of_a_log_is_named(tmp_path, changes, message):
    with pytest.raises(SourceError, match=rf"log.json sample 2 \(id 'b'\): .*{message}") as error:
        read_answers(log_file(tmp_path, sample(), sample(id="b", **changes)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 9}, "a log of the format 9; 1 and 2 are read"),
        ({"samples": None}, "the log holds no samples"),
        ({"samples": [5]}, "sample 1: must be an object, found 5"),
    ],
)
def test_a_log_that_cannot_be_read_is_named(tmp_path, changes, message):
    with pytest.raises(SourceError, match=f"log.json.*{message}"):
        read_answers(log_file(tmp_path, **changes))


def archive(folder, members, method=zipfile.ZIP_DEFLATED):
    file = folder / "log.eval"
    with zipfile.ZipFile(file, "w", method) as inside:
        for name, content in members.items():
            inside.writestr(name, content)
    return file


def test_an_archive_is_read_and_its_damages_are_named(tmp_path):
    header = log_of()
    del header["samples"]
    members = {"header.json": json.dumps(header), "_journal/start.json": "{}"}
    members["samples/a_epoch_1.json"] = json.dumps(sample())
    (row,) = read_answers(archive(tmp_path, members))
    assert (row["answer"], row["messages"]) == ("Seine.", TURNS)
    for content, message in (("{", "'samples/a_epoch_1.json' inside is not"), ("[]", "an object")):
        with pytest.raises(SourceError, match=f"log.eval: .*{message}"):
            read_answers(archive(tmp_path, members | {"samples/a_epoch_1.json": content}))
    with pytest.raises(SourceError, match="no 'header.json' inside; the log was not finished"):
        read_answers(archive(tmp_path, {"_journal/start.json": "{}"}))
    with pytest.raises(SourceError, match="unpacks to more than"):
        read_answers(archive(tmp_path, members | {"samples/b_epoch_1.json": " " * 2**27}))
    whole = archive(tmp_path, members).read_bytes()
    (tmp_path / "log.eval").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match="damaged, or no log of inspect_ai"):
        read_answers(tmp_path / "log.eval")
    # The number of the method, in the entry and in the directory, becomes one that nothing reads.
    (tmp_path / "log.eval").write_bytes(whole.replace(b"\x08\x00", b"\x63\x00"))
    with pytest.raises(SourceError, match="zstandard: from 3.14 on.*inspect log convert"):
        read_answers(tmp_path / "log.eval")
