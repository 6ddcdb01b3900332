"""Guards from the command line: a door and a critic are trained, and stand around a model."""

import json

import pytest

from fedsafe_jax.cli import startup
from fedsafe_jax.data.refusals import REFUSAL

SMALL = ("--max_new_tokens=10", "--batch_size=16")


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    """A filter of requests, trained by the command."""
    folder = tmp_path_factory.mktemp("door")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Tell me how to {verb} the {noun}."},
                {"role": "assistant", "content": "Like this."},
            ],
            "label": label,
        }
        for label, nouns in (("safe", ("apple", "pear")), ("unsafe", ("lock", "safe", "vault")))
        for noun in nouns
        for verb in ("take", "open", "break", "cut", "melt", "hide", "find", "lift")
    ]
    source = folder / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [
        "--config=configs/filter_minilm.py:scratch",
        f"--workdir={folder / 'f'}",
        f"--config.sources=('chat:{source}',)",
        "--config.reads=request",
        "--config.epochs=8",
        "--config.batch_size=8",
        "--config.max_length=32",
        "--config.learning_rate=3e-3",
    ]
    startup.start("train-filter", flags)
    return folder / "f"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "p.txt"
    path.write_text("Tell me how to open the vault.\nTell me how to cut the apple.\n")
    return path


def test_a_door_of_the_command_line(door, prompts, tmp_path, capsys):
    assert json.loads((door / "filter.json").read_text())["reads"] == "request"
    counts = json.loads((door / "filter_results.json").read_text())["counts"]
    assert counts["requests"] == counts["trained_on"]  # each request once
    output = tmp_path / "o.json"
    flags = [f"--prompts={prompts}", f"--output={output}", f"--guardian={door}", *SMALL]
    startup.start("evaluate", flags)
    result = json.loads(output.read_text())
    said = [row["answer"] for row in result["prompts"]]
    assert [text == REFUSAL for text in said] == [True, False]
    assert result["guards"]["by_guardian"] == 1
    assert "2 answers under guards: 1 by the guardian" in capsys.readouterr().out


@pytest.mark.slow
def test_a_critic_is_trained_and_guides(prompts, tmp_path, capsys):
    guard, folder = "guard:package:model#llama-guard", tmp_path / "critic"
    decoding = "--decoding=budget:candidates=2,keep=1,block=4,budget=5"
    flags = [
        "--sources=chat:package/align_harmless_heldout.jsonl",
        f"--guard={guard}",
        f"--output={folder}",
        decoding,
        "--max_prompts=3",
        "--answers=2",
        "--epochs=2",
        *SMALL,
    ]
    startup.start("train-critic", flags)
    assert "6 answers to 3 requests" in capsys.readouterr().out
    notes = json.loads((folder / "critic.json").read_text())
    assert notes["budget"] == 5 and notes["search"]["block"] == 4
    flags = [f"--prompts={prompts}", f"--guard={guard}", f"--critic={folder}", decoding, *SMALL]
    startup.start("evaluate", flags)
    assert "2 answers under guards" in capsys.readouterr().out
