"""The packaged model's training, at a size of seconds."""

import json

import numpy as np

import fedsafe_jax
from fedsafe_jax.cli import startup

SMALL = """from fedsafe_jax.cli import config_file

def get_config(arg=""):
    c = config_file.read("configs/pretrain_demo.py" + (":balance" if arg else ""))
    c.vocab_size, c.hidden_size, c.intermediate_size, c.num_layers = 400, 32, 48, 1
    c.compute_dtype, c.steps, c.rows_per_step = "float32", 52, 1  # 50 warm up
    c.benign_sources = (("chat:package/clients_safe.jsonl", 0.2, 1),)
    c.red_team = "chat:package/clients_unsafe.jsonl"
    c.harmful_prompts = ("chat:package/red_team_heldout.jsonl",)
    c.templated_harmful = c.templated_benign = c.everyday = c.critique_threads = 20
    c.evaluation_sets = ("chat:package/red_team_heldout.jsonl",)
    c.hhh = "package/hhh_heldout.jsonl"
    c.init_from = arg
    return c
"""


def test_two_stages_leave_a_model_that_loads(tmp_path, capsys):
    (tmp_path / "small.py").write_text(SMALL)
    first, second = tmp_path / "first", tmp_path / "second"
    startup.start("pretrain", [f"--config={tmp_path / 'small.py'}", f"--output={first}"])
    said = capsys.readouterr()
    assert said.out == f"model: {first}\n"
    devices, data, rows, *steps = said.err.splitlines()
    assert devices.startswith("devices: ")
    assert data.startswith("data: {") and rows.endswith("52 steps")
    assert [line.split(" answer nll ")[0] for line in steps] == ["step 50/52", "step 52/52"]
    counts = json.loads(data.removeprefix("data: "))
    assert counts["chat:package/red_team_heldout.jsonl"]["kept"] == 0  # it is evaluated on
    # Better than every token alike.
    assert float(steps[1].split(" answer nll ")[1].split(",")[0]) < np.log(400)
    flags = [f"--config={tmp_path / 'small.py'}:{first}", f"--output={second}"]
    startup.start("pretrain", flags)
    assert len(json.loads((second / "stages.json").read_text())) == 2
    tokenizer = json.loads((second / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4 knows it
    assert "trained from scratch by `fedsafe pretrain`" in (second / "README.md").read_text()
    before, after = (fedsafe_jax.load_pretrained(str(folder)) for folder in (first, second))
    tokens = np.array([after.tokenizer("Who are you?")["input_ids"]])
    assert not np.allclose(before(tokens), after(tokens)) and np.isfinite(after(tokens)).all()
