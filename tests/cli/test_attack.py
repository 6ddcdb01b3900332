"""`fedsafe attack`: its output, what it takes up again, and wrong input before any model."""

import json
import re

import pytest
from chat_server import Server

from fedsafe_jax import save_pretrained
from fedsafe_jax.attacks import ATTACKS
from fedsafe_jax.cli import startup

PROMPTS = "chat:package/clients_unsafe.jsonl#heldout"
HARMLESS = "chat:package/align_harmless_heldout.jsonl"
PAIRS = "--pairs=chat:package/clients_unsafe.jsonl"
SMALL = ("--max_prompts=2", "--max_new_tokens=8", f"--prompts={PROMPTS}")


def attack(output, *others):
    startup.start("attack", [f"--output={output}", *SMALL, *others])
    return json.loads(output.read_text())


def test_rates_are_written_by_method_and_taken_up_again(tmp_path, capsys, monkeypatch):
    output = tmp_path / "new" / "attack.json"
    flags = ("--judges=start,rules", f"--harmless={HARMLESS}")
    first = attack(output, "--method=prefill", *flags)
    assert set(first) == {"attacks", "harmonic_mean", "over_refusal", "judges", "settings"}
    assert list(first["attacks"]) == ["direct", "prefill"] and first["judges"] == ["start", "rules"]
    direct, prefill = first["attacks"].values()
    assert {"asr", "ci95", "n", "queries", "tokens", "by_prompt"} <= set(direct)
    assert direct["asr"] == 0 and direct["n"] == len(direct["by_prompt"]) == 2
    assert prefill["tokens"] == direct["tokens"] + 10
    assert first["harmonic_mean"] == {"direct": 0, "prefill": prefill["asr"]}
    assert first["over_refusal"]["n"] == 2
    assert "direct: attack success 0.0%" in capsys.readouterr().out

    asked = []
    for name in ("direct", "prefill", "encodings"):
        one = ATTACKS[name]

        def run(*args, name=name, one=one, **others):
            asked.append(name)
            return one.run(*args, **others)

        monkeypatch.setitem(ATTACKS, name, one._replace(run=run))
    again = attack(output, "--method=prefill,encodings", *flags)
    assert asked == ["encodings"] and "prefill: as " in capsys.readouterr().out
    assert {name: again["attacks"][name] for name in first["attacks"]} == first["attacks"]
    assert set(again["attacks"]["encodings"]["by_variant"]) == {"base64", "rot13", "leetspeak"}
    asked.clear()
    attack(output, "--method=prefill", *flags, "--prefill_tokens=2")
    assert asked == ["direct", "prefill"]


def test_an_attacker_by_url_and_refusal_by_steps_of_training(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = Server(lambda text, count: json.dumps({"prompt": f"Sing a song {count} times."}))
    flags = ("--method=pair,finetune", f"--attacker=mine@{server.url}", "--streams=3", PAIRS)
    flags += ("--iterations=1", "--finetune_pairs=4", "--finetune_steps=2,0", "--seed=1")
    shown = attack(tmp_path / "attack.json", *flags, f"--harmless={HARMLESS}")
    server.close()
    assert server.requests == 2 * 3 and len(server.asked) == 1  # the first turn of six streams
    direct, pair, finetune = shown["attacks"].values()
    assert pair["counts"] == {"dropped": 0, "malformed": 0, "unjudged": 0}
    # The judge of the run calls a song an answer. The queries: three in the search, and one more.
    assert pair["asr"] == 100 and pair["queries"] == 4
    assert "Sing a song" in pair["by_prompt"][0]["answers"][0]["attacked"][-1]["content"]

    start, last = finetune["by_step"]
    assert (start["step"], last["step"], start["loss"]) == (0, 2, None) and last["loss"] > 0
    assert {key: start[key] for key in ("asr", "ci95", "by_model", "by_judge")} == {
        key: direct[key] for key in ("asr", "ci95", "by_model", "by_judge")
    }
    for one, other in zip(direct["by_prompt"], finetune["by_prompt"], strict=True):
        assert [a["step"] for a in other["answers"]] == [0, 2]
        assert other["answers"][0] == {"step": 0} | one["answers"][0]
    assert start["harmless"]["n"] == 2
    assert start["harmless"]["refused"] == shown["over_refusal"]["refused"]
    assert finetune["asr"] == last["asr"] and finetune["counts"]["harmful_pairs"] == 4
    out, notes = capsys.readouterr()
    assert "by step 0: 0.0%, 2: " in out and "pair: iteration 1 of 1, 2 of 2 requests" in notes


def test_an_attacker_that_is_down_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = Server(lambda text, count: 404)
    output = tmp_path / "attack.json"
    with pytest.raises(SystemExit):
        attack(output, "--method=pair", f"--attacker=m@{server.url}", "--max_prompts=1")
    server.close()
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"error: 'pair': 3 of 3 prompts .* attacker at http.*: HTTP 404; there", line)
    assert list(json.loads(output.read_text())["attacks"]) == ["direct"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--method=gcgg",), "--method: 'gcgg' is not one of .* Did you mean 'gcg'?"),
        (("--method=gcg,gcg",), "--method: 'gcg' is there twice"),
        (("--method=templates",), "'templates' needs a file .* Give --templates=FILE"),
        (("--method=many_shot",), "'many_shot' needs pairs .* Give --shots=SOURCE"),
        (("--method=gcg", "--shots=chat:a.jsonl"), "--shots: add many_shot to --method"),
        (("--method=many_shot", "--shots=a.jsonl"), "--shots=a.jsonl: expected READER:LOCATION"),
        (
            ("--method=many_shot", "--shots=chat:package/align_harmful.jsonl"),
            "--shots=.*: no pair has an answer",
        ),
        (
            ("--method=many_shot", f"--shots={PROMPTS}", "--shot_counts=4,-1"),
            "--shot_counts=4,-1: expected whole numbers, at least 1",
        ),
        (("--method=pair",), "'pair' needs a chat model .* Give --attacker=MODEL@URL"),
        (("--method=gcg", "--attacker=m@http://h/v1"), "--attacker: add pair or tap to --method"),
        (("--method=tap", "--attacker=http://h/v1"), "--attacker: write MODEL@URL, such as"),
        (("--method=tap", "--attacker=m@ftp://h"), "--attacker: the attacker's URL is none"),
        (("--method=tap", "--attacker=m@http://u:p@h/v1"), "the attacker's URL, of host h, has"),
        (
            ("--method=pair", "--attacker=m@http://h/v1", "--attacker_prompt=no.txt"),
            "no.txt: cannot be read",
        ),
        (("--method=finetune",), "'finetune' needs pairs .* Give --pairs=SOURCE, --benign_pairs"),
        (("--method=gcg", PAIRS), "--pairs: add finetune to --method, which reads it"),
        (("--method=finetune", PAIRS, "--finetune_steps=5,x"), "--finetune_steps=5,x: expected"),
        (
            ("--method=finetune", f"--pairs={PROMPTS}", "--max_prompts=0"),
            "'finetune': all .* harmful pairs are near a prompt that the model is asked",
        ),
        (("--method=gcg", "--prompts=no.txt"), "no.txt: no such file"),
        (("--method=gcg", "--prompts=chatt:a.jsonl"), "'chatt:a.jsonl': expected NAME:LOCATION"),
        (("--method=gcg", "--judges=guard"), "--judges: judge 'guard': write guard:FOLDER"),
        (("--method=gcg", "--judges="), "--judges: give some of"),
        (("--method=gcg", "--adapter=a,b"), "--adapter: 2 for 1 models"),
        (("--method=gcg", "--model=a,b", "--adapter=x"), "--adapter: 1 for 2 models"),
        ((), "--method: missing"),
    ],
)
def test_wrong_input_is_one_line_before_any_model(tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.setattr("fedsafe_jax.load_pretrained", _not_yet)
    _refused(tmp_path, capsys, flags, message)


def _not_yet(*args, **others):
    raise AssertionError("a model is loaded before the flags are checked")


def _refused(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        attack(tmp_path / "attack.json", *flags)
    assert stopped.value.code == 2 and not list(tmp_path.glob("*.json"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")

    assert re.search(message.replace("?", r"\?"), line), line


def test_a_model_without_a_template_is_refused(packaged, tmp_path, capsys):
    folder = tmp_path / "bare"
    save_pretrained(packaged, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    flags = ("--method=prefill", f"--model={folder}")
    _refused(tmp_path, capsys, flags, "bare.* has no chat template")
