"""Answers in the files of inspect_ai and lm-evaluation-harness, by what their makers document."""

import datetime
import hashlib
import json
import re

import pytest

from fedsafe_jax.cli import evaluate
from fedsafe_jax.cli.export_answers import COMMAND
from fedsafe_jax.cli.startup import parse
from fedsafe_jax.interop import exports, inspect_log, lm_eval_samples, reading
from fedsafe_jax.interop.origin import Origin, numbered

CREATED = datetime.datetime(2026, 3, 4, 5, 6, 7, tzinfo=datetime.UTC)
NO = {"refused": True, "score": 0.9, "label": "full"}
RATED = {"refused": None, "score": 7.0}
ASKED = [{"role": "user", "content": "How do I tie a knot?"}]
TALK = [
    {"role": "system", "content": "Be brief."},
    *ASKED,
    {"role": "assistant", "content": "Which one?"},
    {"role": "user", "content": "A bowline."},
]
ROWS = [
    {
        "item": 0,
        "messages": ASKED,
        "answer": "I can't help.",
        "finished": True,
        "category": "knots",
        "verdicts": {"rules": NO, "chat:m@http://h/v1#mt_bench": RATED},
    },
    {
        "item": 1,
        "messages": TALK,
        "answer": "Make a loop",
        "finished": False,
        "reference": "A loop.",
        "verdicts": {"rules": NO | {"refused": False}, "chat:m@http://h/v1#mt_bench": None},
    },
]
ORIGIN = Origin(
    "knots",
    "fl:seed0",
    version=2,
    source="chat:knots.jsonl",
    settings={"max_new_tokens": 16, "temperature": 0.0, "system": "", "prefix": "So"},
    facts={"adapter": "abc"},
    tags=("fl",),
    packages={"fedsafe_jax": "1"},
)


def test_a_log_has_the_fields_that_inspect_documents():
    log = inspect_log.log_of(ROWS, ORIGIN, CREATED)
    assert (log["version"], log["status"]) == (2, "success")
    spec = log["eval"]
    assert spec["created"] == "2026-03-04T05:06:07+00:00"
    assert (spec["task"], spec["task_version"], spec["tags"]) == ("knots", 2, ["fl"])
    assert spec["model"] == "none/fl:seed0"  # API/NAME, of an API that asks nobody
    assert spec["model_generate_config"] == {"max_tokens": 16, "temperature": 0.0}
    assert spec["metadata"] == {"model": "fl:seed0", "prefix": "So", "adapter": "abc"}
    assert spec["dataset"]["sample_ids"] == [0, 1] and spec["config"] == {"epochs": 1}
    rules, rated = log["results"]["scores"]
    assert rules["metrics"]["mean"]["value"] == 0.5 and rules["unscored_samples"] == 0
    assert rated["metrics"]["mean"]["value"] == 7 and rated["unscored_samples"] == 1
    first, second = log["samples"]
    assert (first["id"], first["epoch"], first["target"]) == (0, 1, "")
    assert first["scores"]["rules"]["value"] == 1 and first["metadata"] == {"category": "knots"}
    assert first["scores"]["rules"]["metadata"] == NO
    assert second["target"] == "A loop." and second["output"]["completion"] == "Make a loop"
    (choice,) = second["output"]["choices"]
    assert choice["stop_reason"] == "max_tokens"
    assert [turn["role"] for turn in second["messages"]][-2:] == ["user", "assistant"]
    assert set(second["scores"]) == {"rules"}
    assert second["metadata"] == {"judges_failed": ["chat:m@http://h/v1#mt_bench"]}
    # `inspect view` lists .json files whose names begin with a time.
    assert re.match(r"2026-03-04T05-06-07\+00-00_knots_\w{22}\.json$", inspect_log.file_name(log))


def test_samples_and_depths_have_names_of_their_own():
    row = {"messages": ASKED, "answer": "So."}
    rows = [row | {"item": 3, "sample": 0, "depth": 0}, row | {"item": 3, "sample": 1, "depth": 0}]
    rows.append(row | {"item": 3, "depth": 5})
    assert numbered(rows) == [(3, 1), (3, 2), ("3.2", 1)]
    assert numbered([row, row]) == [(0, 1), (1, 1)]
    log = inspect_log.log_of(rows, ORIGIN, CREATED)
    assert [(s["id"], s["epoch"]) for s in log["samples"]] == [("3", 1), ("3", 2), ("3.2", 1)]
    assert log["eval"]["config"] == {"epochs": 2} and log["results"]["scores"] == []
    samples = lm_eval_samples.samples_of(rows, ORIGIN)
    assert [sample["resps"] for sample in samples] == [[["So.", "So."]], [["So."]]]


def test_half_a_character_and_odd_fields_do_not_spoil_a_log():
    odd = {"item": [1], "sample": "x", "finished": "y", "messages": ASKED, "answer": "So \ud83d"}
    (sample,) = inspect_log.log_of([odd], ORIGIN, CREATED)["samples"]
    assert (sample["id"], sample["epoch"]) == (0, 1)
    assert sample["output"]["choices"][0]["stop_reason"] == "unknown"
    assert sample["output"]["completion"] == "So \ufffd"


def test_samples_are_those_of_lm_eval_and_come_back(tmp_path):
    (path,) = exports.write(str(tmp_path), ["lm_eval"], ROWS, ORIGIN)
    name = path.removeprefix(f"{tmp_path}/")
    assert re.match(r"fl__seed0/samples_knots_\d{4}-\d\d-\d\dT[\d-]+\.\d+\.jsonl$", name)
    first, second = map(json.loads, open(path, encoding="utf-8"))
    assert first["resps"] == [["I can't help."]] and first["filtered_resps"] == ["I can't help."]
    asked, settings = first["arguments"]["gen_args_0"].values()
    assert asked == "How do I tie a knot?"
    assert settings == {"until": [], "max_gen_toks": 16, "temperature": 0.0}
    assert first["prompt_hash"] == hashlib.sha256(asked.encode()).hexdigest()
    assert second["metrics"] == list(ROWS[1]["verdicts"])
    assert [second[name] for name in second["metrics"]] == [0.0, None]
    assert second["target"] == "A loop."
    assert json.loads(second["arguments"]["gen_args_0"]["arg_0"][0]) == TALK
    read = [row for _, row in reading.read(tmp_path / name)]
    for row, back in zip(ROWS, read, strict=True):
        assert {k: back[k] for k in ("item", "messages", "answer")} == {
            k: row[k] for k in ("item", "messages", "answer")
        }
    assert read[1]["reference"] == "A loop."


def test_a_log_comes_back_as_answers(tmp_path):
    (path,) = exports.write(str(tmp_path), ["inspect"], ROWS, ORIGIN)
    read = [row for _, row in reading.read(tmp_path / path)]
    for row, back in zip(ROWS, read, strict=True):
        turns = [{k: turn[k] for k in ("role", "content")} for turn in back["messages"]]
        assert (turns, back["answer"]) == (row["messages"], row["answer"])
    assert read[0]["scores"]["rules"]["value"] == 1 and read[1]["reference"] == "A loop."


def run(*arguments):
    COMMAND.main(parse("export-answers", COMMAND, arguments))


def test_kept_answers_are_exported(tmp_path, capsys):
    kept = tmp_path / "knots.jsonl"
    key = {"task": "knots", "version": 2, "prompts": "abc"}
    kept.write_text("".join(json.dumps(key | row) + "\n" for row in ROWS))
    run(f"--input={kept}", f"--export_dir={tmp_path / 'logs'}", "--model=mine")
    (path,) = (tmp_path / "logs").iterdir()
    assert f"exported: {path}" in capsys.readouterr().out
    log = json.loads(path.read_text())
    assert log["eval"]["task"] == "knots" and log["eval"]["metadata"]["prompts"] == "abc"
    assert log["samples"][0]["metadata"] == {"category": "knots"}


def test_the_answers_of_a_run_are_exported_by_arm_and_seed(tmp_path, capsys):
    workdir = tmp_path / "run"
    for folder in ("base_seed0", "fl_seed0", "fl_seed1"):
        (workdir / "evals" / folder).mkdir(parents=True)
        rows = [{"task": "advbench", "version": 2, "adapter": folder} | row for row in ROWS]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (workdir / "evals" / folder / "advbench.jsonl").write_text(text)
    config = {"arms": ["base", "fl"], "seeds": [0, 1], "model": "m"}
    (workdir / "config.json").write_text(json.dumps(config))
    run(f"--workdir={workdir}", f"--export_dir={tmp_path / 'all'}")
    logs = [json.loads(path.read_text()) for path in (tmp_path / "all").iterdir()]
    assert {tuple(log["eval"]["tags"]) for log in logs} == {
        ("base", "seed0"),
        ("fl", "seed0"),
        ("fl", "seed1"),
    }
    for log in logs:
        arm, seed = log["eval"]["tags"]
        assert log["eval"]["model"] == f"none/{arm}:{seed}"
        assert log["eval"]["metadata"]["adapter"] == f"{arm}_{seed}"
    run(f"--workdir={workdir}", "--arm=fl", "--seed=1", f"--export_dir={tmp_path / 'one'}")
    assert len(list((tmp_path / "one").iterdir())) == 1
    for flags, message in (
        (("--arm=fedx",), "--arm=fedx: not there; arms of the run: base, fl"),
        (("--seed=7",), "--seed=7: not there; seeds of the run: 0, 1"),
        (("--arm=base", "--seed=1"), "keeps no answers of these arms and seeds"),
    ):
        with pytest.raises(ValueError, match=message):
            run(f"--workdir={workdir}", f"--export_dir={tmp_path}", *flags)


class Polite:
    """Answers every request alike."""

    def answer_dialogues(self, dialogues, **options):
        return ["I'm sorry, I can't."] * len(dialogues), [True] * len(dialogues)


def test_what_evaluate_asks_is_exported_with_its_verdicts(tmp_path, capsys):
    flags = ("--export=inspect,lm_eval", f"--export_dir={tmp_path}", "--samples=2")
    flags += ("--max_prompts=3", "--judges=rules,start", "--temperature=0.5")
    values = parse("evaluate", evaluate.COMMAND, flags)
    options = evaluate.options_of(values)
    sets = evaluate.load_sets(values, options)
    kept = evaluate.CollectedAnswers()
    asked = {name: one for name, one in sets.items() if one.task.ask and one.task.measures}
    evaluate.run_tasks(Polite(), asked, options, kept)
    evaluate.export(values, sets, kept.rows, None)
    printed = capsys.readouterr().out
    assert "not exported, as nothing is generated: hhh" in printed
    logs = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert {log["eval"]["task"] for log in logs} == {"advbench", "over_refusal"}
    for log in logs:
        assert log["eval"]["dataset"]["name"].startswith("chat:package/")
        assert len(log["samples"]) == 6 and log["eval"]["config"]["epochs"] == 2
        assert log["results"]["scores"][0]["metrics"]["mean"]["value"] == 1
    assert len(list((tmp_path / "package__model").glob("samples_*.jsonl"))) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--workdir, --input: give one of them"),
        (("--input=x", "--arm=fl"), "--arm: belongs to --workdir"),
        (("--workdir=x", "--model=m"), "--model: belongs to --input"),
        (
            ("--input=x", "--export=inspct"),
            "--export: 'inspct' is not one of .* Did you mean 'inspect'",
        ),
        (("--input=/no/such", "--export=lm_eval"), "no such file"),
        (("--workdir=/no/such",), "no config.json"),
    ],
)
def test_what_cannot_be_exported_is_one_line(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        run(f"--export_dir={tmp_path}", *flags)


def test_inspect_reads_the_log_and_scores_it_anew(tmp_path):
    pytest.importorskip("inspect_ai")
    from inspect_ai import score
    from inspect_ai.log import list_eval_logs, read_eval_log, write_eval_log
    from inspect_ai.scorer import includes

    exports.write(str(tmp_path), ["inspect"], ROWS, ORIGIN)
    (info,) = list_eval_logs(str(tmp_path))
    log = read_eval_log(info.name)
    assert [sample.scores["rules"].value for sample in log.samples] == [1, 0]
    assert log.samples[1].output.completion == "Make a loop"
    anew = score(log, includes(), action="append", display="none")
    names = [one.name for one in anew.results.scores]
    assert "rules" in names and "includes" in names
    # The target "" of the first is in every answer, "A loop." not in "Make a loop".
    assert [sample.scores["includes"].value for sample in anew.samples] == ["C", "I"]
    write_eval_log(anew, str(tmp_path / "anew.json"))
    assert len(reading.read(tmp_path / "anew.json")) == 2
