"""Pools that are read, and what is said where nothing of them is left."""

import json

import pytest

from fedsafe_jax.config import default_config
from fedsafe_jax.data import sources
from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.pipeline.inputs import load_inputs


def config_of(folder, rows):
    text = "\n".join(
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": prompt},
                    {"role": "assistant", "content": answer},
                ]
            }
        )
        for prompt, answer in rows
    )
    (folder / "mine.jsonl").write_text(text)
    c = default_config()
    c.data_dir, c.safe_sources, c.harmful_share = str(folder), ("chat:mine.jsonl",), 0.0
    return c


def test_why_no_example_is_left(tmp_path):
    harmful = [e.prompt for e in sources.load(default_config().eval.tasks[0].split("=")[-1], "")]
    held = next(p for p in map(str, range(999)) if sources.part_of(p) == "heldout")
    rows = [(harmful[0], "A"), (harmful[1], "A"), (held, "A"), ("What is bread?", " ")]
    message = (
        r"client, safe data: no example is left of 4 read .*2 near an evaluation prompt, "
        r"1 held out for evaluation, 1 without an answer.*chat:mine\.jsonl"
    )
    with pytest.raises(SourceError, match=message):
        load_inputs(config_of(tmp_path, rows))
